"""Faster functions for `model.Gate`."""

import torch
from torch import Tensor

import model
from fast.device import compiling_for_few, on_gpu


class RouterProduct(torch.autograd.Function):
    """x (N, D) times weight (E, D) -> (N, E) float32, as if the factors were float32. Products of
    bfloat16 numbers are exact, and a GPU adds them in float32 without copies of the factors."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return torch.mm(x, weight.T, out_dtype=torch.float32)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        dx = dweight = None
        if ctx.needs_input_grad[0]:
            # Two bfloat16 numbers hold 16 bits of a float32 one, which is more than dx keeps.
            high = dy.to(x.dtype)
            both = torch.cat([high, (dy - high.float()).to(x.dtype)], 1)  # (N, 2E)
            dx = both @ torch.cat([weight, weight])
        if ctx.needs_input_grad[1]:
            dweight = (dy.T @ x.float()).to(x.dtype)
        return dx, dweight


def router_logits(x: Tensor, weight: Tensor) -> Tensor:
    """What `model.router_logits` returns."""
    if compiling_for_few(x):
        return (x[:, None].float() * weight.float()).sum(-1)
    if x.is_cuda and x.dtype == torch.bfloat16:
        return RouterProduct.apply(x, weight)
    return model.router_logits(x, weight)


class ScoresAt(torch.autograd.Function):
    """scores (N, E), indices (N, K), different in a row -> scores at the indices (N, K). Backward
    adds by comparing, in a fixed order; torch's own adds by atomics, or sorts all indices first."""

    @staticmethod
    def forward(ctx, scores, indices):
        ctx.save_for_backward(indices)
        ctx.experts = scores.shape[1]
        return scores.gather(1, indices)

    @staticmethod
    def backward(ctx, dy):
        (indices,) = ctx.saved_tensors
        ids = torch.arange(ctx.experts, device=dy.device)
        return (dy[..., None] * (indices[..., None] == ids)).sum(1), None


def top_experts(scores: Tensor, choice: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """What `model.top_experts` returns. Compiled for few tokens, it counts for each expert how many
    are ahead of it, which is one kernel instead of a sort."""
    if not compiling_for_few(choice):
        indices = choice.topk(count, -1).indices
        values = ScoresAt.apply(scores, indices) if on_gpu(scores) else scores.gather(1, indices)
        return values, indices
    ids = torch.arange(choice.shape[1], device=choice.device)
    mine, other = choice[:, :, None], choice[:, None, :]
    ahead = ((other > mine) | ((other == mine) & (ids < ids[:, None]))).sum(-1)  # (N, E)
    place = torch.arange(count, device=choice.device)[:, None]
    indices = ((ahead[:, None] == place) * ids).sum(-1)
    # NaN scores give any expert, but one that exists.
    indices = indices.clamp(max=len(ids) - 1)
    return scores.gather(1, indices), indices
