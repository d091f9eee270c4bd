"""Attention for `model.MultiHeadAttention` and `model.LatentAttention`: the kernel that suits the
device, and documents without a mask."""

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

import model
from fast import kernels
from fast.device import has_kernels, on_gpu
from fast.kernels import two_powers

BLOCK = 128  # queries, and keys, of a block of FlexAttention's


@dataclass
class Documents:
    """Which tokens see each other, in place of a mask: see `group_documents`."""

    numbers: Tensor  # (B, T) of each token's document, on the CPU
    groups: list[Tensor]  # of each group (count, longest): indices of the B * T tokens
    places: Tensor  # (B * T,) where each token is in all groups one after another

    @cached_property
    def blocks(self):
        """The same as a BlockMask for FlexAttention, whose shapes do not depend on the documents'
        lengths. It skips the blocks of keys that no query of a block sees."""
        from torch.nn.attention.flex_attention import BlockMask  # takes a second to import

        device, T = self.places.device, self.numbers.shape[1]
        padded = F.pad(self.numbers[:, None].double(), (0, -T % BLOCK), mode="replicate")[:, 0]
        begins, ends = padded[:, ::BLOCK], padded[:, BLOCK - 1 :: BLOCK]  # (B, blocks)
        seen = (ends[:, None] >= begins[:, :, None]).tril()  # (B, blocks of queries, of keys)
        whole = (begins[:, None] == ends[:, :, None]).tril(-1)
        numbers = self.numbers.to(device)

        def sees(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (query >= key) & (numbers[b, query] == numbers[b, key])

        lists = []
        for chosen in (seen & ~whole, whole):
            count = chosen.sum(-1, dtype=torch.int32)[:, None].to(device)
            order = chosen.int().argsort(dim=-1, descending=True, stable=True)
            lists += [count, order.int()[:, None].to(device)]
        return BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=(T, T))


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
    return Documents(documents, groups, places.to(device))


class SameBitsAttention(torch.autograd.Function):
    """Causal attention by cuDNN; q, k (B, T, H, A), v (B, T, H, Z) -> (B, T, H, Z). cuDNN's output
    and its gradients of k and v have the same bits in every run. Its gradient of q has not:
    `kernels.query_gradient` computes that instead."""

    @staticmethod
    def forward(ctx, q, k, v, scale):
        given = (x.transpose(1, 2) for x in (q, k, v))
        options = {"attn_bias": None, "compute_log_sumexp": True, "is_causal": True}
        out, logsumexp, *_, seed, offset, _ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            *given, **options, scale=scale
        )
        out = out.transpose(1, 2)
        ctx.save_for_backward(q, k, v, out, logsumexp, seed, offset)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx, dy):
        q, k, v, out, logsumexp, seed, offset = ctx.saved_tensors
        dy, T = dy.contiguous(), q.shape[1]
        given = (x.transpose(1, 2) for x in (dy, q, k, v, out))
        rest = logsumexp, seed, offset, None, None, None, T, T, 0.0, True
        backward = torch.ops.aten._scaled_dot_product_cudnn_attention_backward
        _, dk, dv = backward(*given, *rest, scale=ctx.scale)
        dq = kernels.query_gradient(q, k, v, out, dy, logsumexp, ctx.scale)
        return dq, dk.transpose(1, 2), dv.transpose(1, 2), None


def on_hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device)[0] == 9


def has_same_bits(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `SameBitsAttention` serves: on Hopper, whose programs have the memory that the kernel
    needs, for widths up to DeepSeek's. cuDNN wants more than one token. The kernel counts the
    numbers of a row in 32 bits."""
    if not (q.is_cuda and has_kernels(q) and on_hopper(q.device)):
        return False
    (_, T, heads, width), value_width = q.shape, v.shape[-1]
    widths = width <= 192 and two_powers(width) and value_width in (16, 32, 64, 128)
    fits = T > 1 and T * max(x.stride(1) for x in (q, k, v)) < 2**31
    half = q.dtype in (torch.bfloat16, torch.float16)
    return bool(widths) and fits and half and heads == k.shape[2]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask=None,
    scale: float | None = None,
) -> Tensor:
    """What `model.attend` returns; `mask` may be what `group_documents` returns, or its blocks."""
    if isinstance(mask, Documents):
        tokens = [x.flatten(0, 1) for x in (q, k, v)]
        out = [attend(*(x[indices] for x in tokens), scale=scale) for indices in mask.groups]
        return torch.cat([x.flatten(0, 1) for x in out])[mask.places].view(*q.shape[:2], -1)
    grouped = {"enable_gqa": q.shape[2] != k.shape[2]}
    if mask is not None and not isinstance(mask, Tensor):
        from torch.nn.attention.flex_attention import flex_attention

        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = flex_attention(q, k, v, block_mask=mask, scale=scale, **grouped)
        return out.transpose(1, 2).flatten(2)
    same_bits = torch.are_deterministic_algorithms_enabled() and not q.is_meta
    if same_bits and mask is None and has_same_bits(q, k, v):
        return SameBitsAttention.apply(q, k, v, scale or q.shape[-1] ** -0.5).flatten(2)
    if same_bits or not on_gpu(q):
        return model.attend(q, k, v, mask, scale)
    # cuDNN takes narrower values as they are, and is faster, but its bits differ from run to run.
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(
        q, k, v, mask, is_causal=mask is None, scale=scale, **grouped
    )
    return out.transpose(1, 2).flatten(2)


def attend_cache(q: Tensor, past: Tensor, positions: Tensor, C: int, scale: float) -> Tensor:
    """What `model.attend_cache` returns."""
    powers = all(n >= 16 and n & (n - 1) == 0 for n in (C, q.shape[-1] - C))
    # With few rows the cache is small beside the weights, and the compiler has the faster kernels.
    # In float32 the kernel's products would be rounded, to TF32.
    half = q.dtype in (torch.bfloat16, torch.float16)
    serves = len(q) >= 32 and half and powers and q.is_cuda and has_kernels(q)
    return (kernels if serves else model).attend_cache(q, past, positions, C, scale)
