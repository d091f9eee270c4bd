"""Attention for `model.MultiHeadAttention` and `model.LatentAttention`: the kernel that suits the
device, and documents without a mask."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import model
from fast.device import on_gpu


@dataclass
class Documents:
    """Which tokens see each other, in place of a mask: see `group_documents`."""

    groups: list[Tensor]  # of each group (count, longest): indices of the B * T tokens
    places: Tensor  # (B * T,) where each token is in all groups one after another


def group_documents(documents: Tensor, device: torch.device) -> Documents:
    """documents (B, T), on the CPU, equal numbers next to each other -> groups of documents of like
    length, within a power of two, which share an attention call. Indices run on past the end of a
    document: causal attention does not look there, and the results there are dropped."""
    begins = (documents.diff(dim=1, prepend=documents[:, :1] - 1) != 0).flatten().nonzero()[:, 0]
    total = documents.numel()
    lengths = begins.diff(append=begins.new_tensor([total]))
    power = (lengths - 1).double().log2().floor()  # 1, 2, 3 to 4, 5 to 8, ... tokens
    groups, places, before = [], torch.empty(total, dtype=torch.int64), 0
    for each in power.unique():
        chosen = power == each
        offsets = torch.arange(lengths[chosen].max())
        indices = (begins[chosen, None] + offsets) % total
        within = offsets < lengths[chosen, None]
        places[indices[within]] = before + within.flatten().nonzero()[:, 0]
        before += indices.numel()
        groups.append(indices.to(device))
    return Documents(groups, places.to(device))


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | Documents | None = None,
    scale: float | None = None,
) -> Tensor:
    """What `model.attend` returns; `mask` may be what `group_documents` returns."""
    if isinstance(mask, Documents):
        tokens = [x.flatten(0, 1) for x in (q, k, v)]
        out = [attend(*(x[indices] for x in tokens), scale=scale) for indices in mask.groups]
        return torch.cat([x.flatten(0, 1) for x in out])[mask.places].view(*q.shape[:2], -1)
    if not on_gpu(q) or torch.are_deterministic_algorithms_enabled():
        return model.attend(q, k, v, mask, scale)
    # cuDNN takes narrower values as they are, and is faster, but its bits differ from run to run.
    options = {"scale": scale, "enable_gqa": q.shape[2] != k.shape[2]}
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, **options)
    return out.transpose(1, 2).flatten(2)
