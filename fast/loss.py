"""The loss of `model.token_losses`, without logits for all tokens at once."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fast import kernels
from fast.device import has_kernels
from model import Block, RunBlock, Transformer, next_tokens


def cross_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """logits (M, V), targets (M,) -> losses (M,) float32, and the gradient of each loss with
    respect to its logits (M, V), in their dtype. The logits may be overwritten."""
    if has_kernels(logits):
        return kernels.cross_entropy(logits, targets)
    scores = logits.float()
    total = scores.logsumexp(-1, keepdim=True)
    losses = (total - scores.gather(1, targets[:, None]))[:, 0]
    slope = (scores - total).exp_()
    ids = torch.arange(slope.shape[1], device=slope.device)
    return losses, slope.add_(ids == targets[:, None], alpha=-1).to(logits.dtype)


class HeadLosses(torch.autograd.Function):
    """Cross-entropy of each of hidden (M, D) under a frozen head (V, D) -> (M,).

    A loss depends on its own state alone. So its gradient, but for a factor, is formed in forward
    while the logits of `chunk` tokens are there, and the logits need not be formed again."""

    @staticmethod
    def forward(ctx, hidden, head, targets, chunk):
        losses, slopes = [], torch.empty_like(hidden)
        for states, aims, slope in zip(*(x.split(chunk) for x in (hidden, targets, slopes))):
            loss, dlogits = cross_entropy(F.linear(states, head), aims)
            losses.append(loss)
            torch.mm(dlogits, head, out=slope)
        ctx.save_for_backward(slopes)
        return torch.cat(losses)

    @staticmethod
    def backward(ctx, dlosses):
        (slopes,) = ctx.saved_tensors
        return (slopes * dlosses[:, None]).to(slopes.dtype), None, None, None


def token_losses(
    model: Transformer,
    tokens: Tensor,
    labels: Tensor,
    documents: Tensor | None = None,
    balance: bool = False,
    run_block: RunBlock = Block.__call__,
    chunk: int = 2048,
) -> tuple[Tensor, Tensor | None]:
    """What `model.token_losses` returns. Logits exist for `chunk` tokens at a time; only where the
    head is trained are they formed again in backward."""
    places, targets = next_tokens(labels)
    hidden, balance_loss = model.hidden_states(
        tokens, documents=documents, balance=balance, run_block=run_block
    )
    hidden = hidden.flatten(0, 1)[places.to(hidden.device)]  # (M, D)
    targets, head = targets.to(hidden.device), model.lm_head
    if hidden.requires_grad and not head.weight.requires_grad:
        return HeadLosses.apply(hidden, head.weight, targets, chunk), balance_loss

    def losses(hidden: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(head(hidden).float(), targets, reduction="none")

    pieces = [
        checkpoint(losses, *piece, use_reentrant=False)
        if torch.is_grad_enabled()
        else losses(*piece)
        for piece in zip(hidden.split(chunk), targets.split(chunk))
    ]
    return torch.cat(pieces), balance_loss
