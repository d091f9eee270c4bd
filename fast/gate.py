"""Faster functions for `model.Gate`."""

import torch
from torch import Tensor

import model
from fast.device import compiling_for_few


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
            dx = (dy @ weight.float()).to(x.dtype)
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


def top_experts(scores: Tensor, count: int) -> Tensor:
    """What `model.top_experts` returns. Compiled for few tokens, it counts for each expert how many
    are ahead of it, which is one kernel instead of a sort."""
    if not compiling_for_few(scores):
        return model.top_experts(scores, count)
    ids = torch.arange(scores.shape[1], device=scores.device)
    mine, other = scores[:, :, None], scores[:, None, :]
    ahead = ((other > mine) | ((other == mine) & (ids < ids[:, None]))).sum(-1)  # (N, E)
    place = torch.arange(count, device=scores.device)[:, None]
    indices = ((ahead[:, None] == place) * ids).sum(-1)
    return indices.clamp(max=len(ids) - 1)  # NaN scores give any expert, but one that exists
