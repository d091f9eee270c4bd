"""LoRA of the experts of a layer, by grouped products. All A lie side by side in one parameter and
all B in another, as the experts' weights do: for gate and up together, and for down.

Dimensions as in fast/experts.py; R is the highest rank, rounded up to a multiple of 8, because
grouped products on a GPU need strides of 16 bytes. What fills a stack up is zero, and stays zero in
training."""

from itertools import product
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fast.experts import (
    StackedExperts,
    by_token,
    grouped_mm,
    grouped_outer,
    sum_slots,
    swiglu,
    swiglu_backward,
    trained_prefix,
)
from fast.packed import GROUPED
from model import MoE

PARTS = {"gate_up": ("gate_proj", "up_proj"), "down": ("down_proj",)}


class Part(NamedTuple):
    """The A or B of one expert's Linear, within a stack. It is used as the Linears are that are A
    and B elsewhere."""

    experts: StackedExperts
    stack: str
    expert: int
    rows: slice
    columns: slice

    @property
    def weight(self) -> Tensor:
        stack = self.experts.get_parameter(self.stack)
        return stack[self.experts.expert_at.index(self.expert), self.rows, self.columns]

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


def stack_lora(experts: StackedExperts, ranks: dict[nn.Linear, int]) -> None:
    """Gives the experts frozen stacks, all zero: lora_gate_up_A (E, 2R, D), lora_gate_up_B
    (E, 2I, R), lora_down_A (E, R, I), lora_down_B (E, D, R). lora_A and lora_B of the Linears in
    `ranks` become parts of them. The Linears must have their lora_scaling."""
    R = -(-max(ranks.values()) // 8) * 8
    for kind, names in PARTS.items():
        weights, A, B = getattr(experts, kind), f"lora_{kind}_A", f"lora_{kind}_B"
        E, height, width = weights.shape
        for stack, shape in ((A, (E, len(names) * R, width)), (B, (E, height, R))):
            values = nn.Parameter(weights.new_zeros(shape), requires_grad=False)
            experts.register_parameter(stack, values)
        height //= len(names)
        for (i, name), e in product(enumerate(names), experts.expert_at):
            linear = getattr(experts[e], name)
            if rank := ranks.get(linear):
                rows = slice(i * R, i * R + rank), slice(i * height, (i + 1) * height)
                linear.lora_A = Part(experts, A, e, rows[0], slice(None))
                linear.lora_B = Part(experts, B, e, rows[1], slice(rank))
    experts.index_places()  # puts the scalings side by side


def experts_with_lora(moe: MoE, x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
    """Returns what `model.experts_loop` returns, with gradients of x, weights and every A and B.
    Raises ValueError if the experts' own weights want a gradient, too."""
    experts = moe.experts
    # Compiled code must not look at the parameters: each layer would need a graph of its own.
    trained = experts.trained if torch.compiler.is_compiling() else trained_prefix(experts)
    if trained:
        raise ValueError('LoRA over experts that are trained, too, needs experts "loop"')
    slots = experts.sort_slots(indices)
    scalings = experts.lora_scalings
    B1 = scaled_blocks(experts.lora_gate_up_B, scalings[:, :2])
    B2 = scaled_blocks(experts.lora_down_B, scalings[:, 2:])
    gate_up, down = (experts.gate_up, experts.lora_gate_up_A), (experts.down, experts.lora_down_A)
    return GroupedLora.apply(x, weights, *slots, *gate_up, B1, *down, B2)


def scaled_blocks(B: Tensor, scalings: Tensor) -> Tensor:
    """B (E, P * height, R) of P Linears one below the other, and their scalings (E, P) -> (E,
    P * height, P * R): each Linear's scaling * B in columns of its own, so that one product serves
    all of them."""
    P = scalings.shape[1]
    blocks = B.unflatten(1, (P, -1))[:, :, :, None] * scalings.diag_embed()[:, :, None, :, None]
    return blocks.to(B.dtype).flatten(3).flatten(1, 2)


class GroupedLora(torch.autograd.Function):
    """`fast.experts.GroupedExperts` with frozen weights and, beside each, the matrices A and B of a
    layer. It also saves the narrow products between A and B."""

    @staticmethod
    def forward(ctx, x, weights, order, inverse, ends, *stacks):
        (gate_up, A1, B1, down, A2, B2), K = stacks, weights.shape[1]
        slots = x.index_select(0, order // K)
        h, low1 = grouped_lora(slots, gate_up.mT, A1.mT, B1.mT, ends)  # (S, 2I), (S, 2R)
        act = swiglu(h, weights.flatten()[order])  # (S, I)
        out, low2 = grouped_lora(act, down.mT, A2.mT, B2.mT, ends)  # (S, D), (S, R)
        ctx.save_for_backward(x, weights, order, inverse, ends, h, low1, low2, *stacks)
        return sum_slots(out, inverse, K)

    @staticmethod
    def backward(ctx, dy):
        x, weights, order, inverse, ends, h, low1, low2, *stacks = ctx.saved_tensors
        (gate_up, A1, B1, down, A2, B2), (N, K) = stacks, weights.shape
        token, weight = order // K, weights.flatten()[order]
        dy = dy.index_select(0, token)  # (S, D)
        dact, dlow2 = grouped_lora(dy, down, B2, A2, ends)
        dh, dweights = swiglu_backward(h, weight, dact)
        dA2 = grouped_outer(dlow2, swiglu(h, weight), ends)
        dB2 = grouped_outer(dy, low2, ends)
        dslots, dlow1 = grouped_lora(dh, gate_up, B1, A1, ends)
        dx = sum_slots(dslots, inverse, K)
        dA1 = grouped_outer(dlow1, x.index_select(0, token), ends)
        dB1 = grouped_outer(dh, low1, ends)
        dweights = by_token(dweights, inverse).view(N, K)
        return dx, dweights, None, None, None, None, dA1, dB1, None, dA2, dB2


def grouped_lora(
    x: Tensor, W: Tensor, first: Tensor, second: Tensor, ends: Tensor
) -> tuple[Tensor, Tensor]:
    """x (S, A), sorted by expert, and stacks W (E, A, Z), first (E, A, R), second (E, R, Z) ->
    x W + x first second (S, Z), and x first (S, R)."""
    low = grouped_mm(x, first, ends)
    return grouped_mm(x, W, ends).add_(grouped_mm(low, second, ends)), low


FAST = (*GROUPED, experts_with_lora)  # what may be compiled, or captured
