"""Grouped products for experts that carry LoRA: in place of `experts_grouped` where lora.py adds
matrices to the experts of a layer."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fast.experts import grouped_mm, grouped_outer, sort_by_expert, trained_prefix
from model import MoE


def experts_with_lora(moe: MoE, x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
    """What `model.experts_loop` returns, with gradients of x, weights and every A and B. Raises
    ValueError if the experts' own weights want a gradient, too."""
    stacks = moe.experts
    if trained_prefix(stacks):
        raise ValueError('LoRA over experts that are trained, too, needs experts "loop"')
    N, K = weights.shape
    order, inverse, ends = sort_by_expert(stacks.place_of[indices], len(stacks.expert_at))
    slots, experts = x[order // K], [stacks[e] for e in stacks.expert_at]  # (S, D)
    w_gate, w_up = stacks.gate_up.chunk(2, 1)
    gate = grouped_lora(slots, w_gate, [e.gate_proj for e in experts], ends)  # (S, I)
    up = grouped_lora(slots, w_up, [e.up_proj for e in experts], ends)
    act = F.silu(gate.float()) * up.float() * weights.flatten()[order, None]
    out = grouped_lora(act.to(x.dtype), stacks.down, [e.down_proj for e in experts], ends)
    return out[inverse].view(N, K, x.shape[1]).sum(1)


def grouped_lora(x: Tensor, stack: Tensor, linears: list[nn.Linear], ends: Tensor) -> Tensor:
    """x (S, A), sorted by expert -> W x + scaling * B A x (S, Z), with each W in stack (E, Z, A). A
    Linear without LoRA counts as one with zeros."""
    y = GroupedProduct.apply(x, stack.mT, ends)
    carriers = [linear for linear in linears if hasattr(linear, "lora_A")]
    if not carriers:
        return y
    rank = max(linear.lora_A.out_features for linear in carriers)
    scaling = carriers[0].lora_scaling
    if any(linear.lora_scaling != scaling for linear in carriers):
        scaling = 1.0  # `matrices` puts each one's own into its B
    zeros = x.new_zeros(rank, x.shape[1]), x.new_zeros(y.shape[1], rank)
    pairs = [matrices(m, rank, scaling) if hasattr(m, "lora_A") else zeros for m in linears]
    A, B = (torch.stack(each) for each in zip(*pairs))
    padding = -rank % 8  # grouped products on a GPU need strides of 16 bytes
    A, B = F.pad(A, (0, 0, 0, padding)), F.pad(B, (0, padding))
    low = GroupedProduct.apply(x, A.mT, ends)  # (S, rank and padding)
    return y + scaling * GroupedProduct.apply(low, B.mT, ends)


def matrices(linear: nn.Linear, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """Returns A and B of a Linear as they are with that rank, which may be higher, and scaling."""
    A, B = linear.lora_A.weight, linear.lora_B.weight
    if missing := rank - len(A):
        A, B = F.pad(A, (0, 0, 0, missing)), F.pad(B, (0, missing))
    if linear.lora_scaling != scaling:
        B = B * (linear.lora_scaling / scaling)
    return A, B


class GroupedProduct(torch.autograd.Function):
    """`grouped_mm` with a backward. x is kept only for a stack that wants its gradient."""

    @staticmethod
    def forward(ctx, x, stack, ends):
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, stack, ends)
        return grouped_mm(x, stack, ends)

    @staticmethod
    def backward(ctx, dy):
        x, stack, ends = ctx.saved_tensors
        dx = grouped_mm(dy, stack.mT, ends) if ctx.needs_input_grad[0] else None
        dstack = grouped_outer(x, dy, ends) if ctx.needs_input_grad[1] else None
        return dx, dstack, None
