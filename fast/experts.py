"""Computes what `model.experts_loop` computes by grouped matrix products: one call serves all
experts of a layer, because their weights lie side by side in one tensor, a stack.

Dimensions as in model.py, but E is the number of experts that this process holds, and S that of
their slots: N * K, unless other processes hold some experts of a layer. Slots are sorted by place
in the stack; `ends` (E,) says where the slots of each place end."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fast import kernels
from fast.device import FEW_TOKENS, has_kernels, on_gpu, stays_on_device
from model import MLP, MoE

# ------------------------------------------------------------------------------------------
# Weights side by side

# The grouped products read whole stacks, which are no parameters. Gradients must reach the experts'
# own parameters, which are views of the stacks, and autograd does not know that. So `TrainedStack`
# returns the front of a stack as a tensor that depends on those parameters. `GroupedExperts` never
# reads it, but returns a gradient for it.


class TrainedFront(NamedTuple):
    gate_up: Tensor  # (length, 2I, D)
    down: Tensor  # (length, D, I)
    last: Tensor  # (1,) place of the last trained expert; as a number it would be part of a graph


class StackedExperts(nn.ModuleList):
    """The experts of a layer. Their weights lie in two stacks, gate_up (E, 2I, D), down (E, D, I).

    The experts' own parameters are views of the stacks, so each can still be frozen or trained
    alone. Expert e lies at place_of[e], which lets `put_first` move trained experts to the front.
    An expert that another process holds (train_ep.py) is no MLP; its place is behind the stacks."""

    slots_here: int | None = None  # S; None: all. train_ep.py sets it for the tokens of each call

    def __init__(self, experts: nn.ModuleList):
        super().__init__(experts)
        self.expert_at = [e for e, expert in enumerate(experts) if isinstance(expert, MLP)]
        self.is_whole = len(self.expert_at) == len(experts)
        self.trained: TrainedFront | None = None  # `compiled_blocks` sets it
        old = [experts[e] for e in self.expert_at]
        I, D = old[0].gate_proj.weight.shape
        self.gate_up = old[0].gate_proj.weight.new_empty(len(old), 2 * I, D)
        self.down = old[0].gate_proj.weight.new_empty(len(old), D, I)
        with torch.no_grad():
            for expert, gate_up, down in zip(old, self.gate_up, self.down):
                gate_up[:I], gate_up[I:] = expert.gate_proj.weight, expert.up_proj.weight
                down.copy_(expert.down_proj.weight)
        self._view_stacks()

    def _view_stacks(self) -> None:
        """Makes the experts' parameters views of the stacks."""
        for place, e in enumerate(self.expert_at):
            expert, (gate, up) = self[e], self.gate_up[place].chunk(2)
            views = ((expert.gate_proj, gate), (expert.up_proj, up))
            for linear, view in (*views, (expert.down_proj, self.down[place])):
                linear.weight = nn.Parameter(view, requires_grad=linear.weight.requires_grad)
        self.index_places()

    def index_places(self) -> None:
        places = [len(self.expert_at)] * len(self)
        for place, e in enumerate(self.expert_at):
            places[e] = place
        self.place_of = torch.tensor(places, device=self.down.device)
        # Kept, because asking modules in every step is slow; gate_proj, up_proj, down_proj.
        linears = [tuple(self[e].children()) for e in self.expert_at]
        self.parameters_at = [tuple(m.weight for m in each) for each in linears]
        scalings = [[getattr(m, "lora_scaling", 0.0) for m in each] for each in linears]
        self.lora_scalings = torch.tensor(scalings, device=self.down.device)  # (E, 3)

    def sort_slots(self, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """indices (N, K) -> `order` (S,), and `inverse` and `ends` as `sort_by_expert` returns
        them."""
        order, inverse, ends = sort_by_expert(self.place_of[indices], len(self.expert_at))
        return order[: self.slots_here], inverse, ends

    def _apply(self, fn, recurse=True):
        """Moves the stacks for .to() and .cuda(), and makes the parameters views of them again."""
        self.gate_up, self.down = fn(self.gate_up), fn(self.down)
        self._view_stacks()
        return super()._apply(fn, recurse=False)  # LoRA's stacks are parameters

    @torch.no_grad()
    def put_first(self, experts: list[int]) -> None:
        """Moves those of `experts` that are held here to the front of the stacks. Their parameters
        remain the same objects with the same values."""
        experts = [e for e in experts if e in self.expert_at]
        if set(self.expert_at[: len(experts)]) == set(experts):
            return
        before = self.expert_at.copy()
        for place, e in enumerate(experts):
            other = self.expert_at.index(e)
            self.expert_at[place], self.expert_at[other] = e, self.expert_at[place]
        moved = [i for i, e in enumerate(self.expert_at) if before[i] != e]
        sources = [before.index(self.expert_at[i]) for i in moved]
        for stack in (self.gate_up, self.down, *self.parameters(recurse=False)):
            stack[moved] = stack[sources]
        for i in moved:
            expert = self[self.expert_at[i]]
            expert.gate_proj.weight.data, expert.up_proj.weight.data = self.gate_up[i].chunk(2)
            expert.down_proj.weight.data = self.down[i]
        self.index_places()


class TrainedStack(torch.autograd.Function):
    """Returns the first places of a stack as a tensor that depends on `parameters`. In backward
    each parameter gets its part of the gradient, without a copy."""

    @staticmethod
    def forward(ctx, stack, length, *parameters):
        ctx.shape, ctx.count = parameters[0].shape, len(parameters)
        return stack[:length]

    @staticmethod
    def backward(ctx, dstack):
        pieces = dstack.view(-1, *ctx.shape)
        if ctx.count < len(pieces):  # the rest only fills up `length`: a copy lets it be freed
            pieces = pieces[: ctx.count].clone()
        return None, None, *pieces.unbind()


def trained_prefix(experts: StackedExperts) -> int:
    """Returns the smallest n such that all trained experts are among the first n places; 0 without
    grad mode. Frozen ones are among them only if requires_grad was set by hand."""
    if not torch.is_grad_enabled():
        return 0
    wanted = [any(p.requires_grad for p in weights) for weights in experts.parameters_at]
    return max((place for place, wants in enumerate(wanted, 1) if wants), default=0)


def trained_stacks(experts: StackedExperts, length: int = 0) -> TrainedFront | None:
    """Returns the trained front of the stacks, or None if no expert is trained. `length` gives all
    layers a front of the same size, so that one compiled graph serves them."""
    count = trained_prefix(experts)
    if not count:
        return None
    length = max(length, count)
    gates, ups, downs = zip(*experts.parameters_at[:count])
    pairs = (p for two in zip(gates, ups) for p in two)  # in the order of gate_up
    gate_up = TrainedStack.apply(experts.gate_up, length, *pairs)
    down = TrainedStack.apply(experts.down, length, *downs)
    return TrainedFront(gate_up, down, torch.full((1,), count - 1, device=down.device))


# ------------------------------------------------------------------------------------------
# In place of the loop


def experts_grouped(moe: MoE, x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
    """Returns what `model.experts_loop` returns. Experts behind the last trained one get no weight
    gradient: `mark_trainable` moves the trained ones to the front."""
    experts = moe.experts
    if on_gpu(x) and len(x) <= FEW_TOKENS and not torch.is_grad_enabled():
        return experts_for_few(experts, x, weights, experts.place_of[indices])
    slots = experts.sort_slots(indices)
    # Compiled code gets the tensors that `compiled_blocks` made outside of the graph: with the
    # parameters themselves, each layer would need a graph of its own.
    trained = experts.trained if torch.compiler.is_compiling() else trained_stacks(experts)
    stacks = experts.gate_up, experts.down, *(trained or (None, None, None))
    return GroupedExperts.apply(x, weights, *slots, *stacks)


def experts_for_few(experts: StackedExperts, x: Tensor, weights: Tensor, places: Tensor) -> Tensor:
    """Returns the result of `experts_grouped` for few tokens, without gradients and without sorting
    the slots."""
    E = len(experts.expert_at)
    if places.numel() < E and experts.is_whole and has_kernels(x):
        return kernels.experts_for_few(x, weights, places, experts.gate_up, experts.down)
    # Every expert for every token: most experts would be read anyway, and each is read once.
    weight = weights.new_zeros(len(x), E + 1).scatter_(1, places, weights)  # the last: elsewhere
    weight = weight[:, :E].T[..., None]  # (E, N, 1)
    h = torch.bmm(x.expand(E, -1, -1), experts.gate_up.mT)  # (E, N, 2I)
    gate, up = h.float().chunk(2, -1)
    act = torch.where(weight != 0, F.silu(gate) * up * weight, 0)  # no inf * 0 where not chosen
    return torch.bmm(act.to(x.dtype), experts.down.mT).sum(0)


def swiglu(h: Tensor, weight: Tensor, count: Tensor | None = None) -> Tensor:
    """Gate and up product h (S, 2I), routing weight (S,) -> the experts' activation times its
    weight (S, I), computed in float32. With `count` (1,), only the first slots are wanted."""
    if has_kernels(h):
        return kernels.swiglu(h, weight, count)
    gate, up = h.float().chunk(2, -1)
    return (F.silu(gate) * up * weight[:, None]).to(h.dtype)


def swiglu_backward(h: Tensor, weight: Tensor, dact: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of `swiglu`'s result (S, I) -> those of h (S, 2I) and of the weights (S,)."""
    if has_kernels(h):
        return kernels.swiglu_backward(h, weight, dact)
    gate, up = h.float().chunk(2, -1)
    dact, weight, sigmoid = dact.float(), weight[:, None], gate.sigmoid()
    silu = gate * sigmoid
    dgate = dact * weight * up * (sigmoid + silu * (1 - sigmoid))
    dh = torch.cat([dgate, dact * weight * silu], -1).to(h.dtype)
    return dh, (dact * silu * up).sum(-1)


class GroupedExperts(torch.autograd.Function):
    """Routed experts with a backward written by hand. It saves the layer's input (not its K
    copies), the gate and up product, and the order of the slots.

    The routing weight multiplies the activation, not the output. So its gradient is a sum over the
    I columns of one slot, and the output of the down projection is not kept. One grouped product
    gives the weight gradients of the trained front."""

    @staticmethod
    def forward(ctx, x, weights, order, inverse, ends, gate_up, down, *trained):
        N, K = weights.shape
        h = grouped_mm(x.index_select(0, order // K), gate_up.mT, ends)  # (S, 2I)
        act = swiglu(h, weights.flatten()[order])  # (S, I)
        out = grouped_mm(act, down.mT, ends)  # (S, D)
        _, trained_down, last = trained
        ctx.save_for_backward(x, weights, order, inverse, ends, h, gate_up, down, last)
        ctx.length = 0 if last is None else len(trained_down)
        return sum_slots(out, inverse, K)

    @staticmethod
    def backward(ctx, dy):
        x, weights, order, inverse, ends, h, gate_up, down, last = ctx.saved_tensors
        (N, K), token = weights.shape, order // weights.shape[1]
        weight = weights.flatten()[order]  # (S,)
        dy = dy.index_select(0, token)  # (S, D)
        dh, dweights = swiglu_backward(h, weight, grouped_mm(dy, down, ends))
        dweights = by_token(dweights, inverse).view(N, K)
        dx = dgate_up = ddown = None
        if ctx.needs_input_grad[0]:
            dx = sum_slots(grouped_mm(dh, gate_up, ends), inverse, K)
        if ctx.length:
            # The slots of trained experts come first. Where knowing their number costs nothing, the
            # others are cut off. A GPU keeps them: `trained_ends` ends the products in time.
            count, rows = ends[last], slice(None)
            if not stays_on_device(x):
                rows = slice(sum(slots_per_place(ends, len(order))[: ctx.length]))
            # Experts behind the last trained one only fill up `length`: they get no slots.
            trained_ends = torch.minimum(ends[: ctx.length], count)
            act = swiglu(h[rows], weight[rows], count)
            dgate_up = grouped_outer(dh[rows], take_rows(x, token[rows], count), trained_ends)
            ddown = grouped_outer(dy[rows], act, trained_ends)
        return dx, dweights, None, None, None, None, None, dgate_up, ddown, None


# ------------------------------------------------------------------------------------------
# Slots and products


def sort_by_expert(indices: Tensor, n_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """indices (N, K), of experts or of places -> order and its inverse (N * K,), and `ends` int32
    (E,). `order` sorts slots by index, ties by token. Slot s belongs to token s // K. Slots with an
    index from n_experts on come last, behind all `ends`."""
    # int16 suffices (checkpoint.py), and a GPU sorts it in half the time.
    experts, order = indices.flatten().to(torch.int16).sort(stable=True)
    if has_kernels(order):
        inverse = kernels.invert(order)
    else:
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(len(order), device=order.device)
    ids = torch.arange(n_experts, dtype=torch.int16, device=order.device)
    return order, inverse, torch.searchsorted(experts, ids, right=True).int()


def slots_per_place(ends: Tensor, slots: int) -> list[int]:
    """Returns the number of slots of each place; see `model.slots_per_expert`."""
    if ends.is_meta:
        bounds = [slots * e // len(ends) for e in range(1, len(ends) + 1)]
    else:
        bounds = ends.tolist()
    return [end - begin for begin, end in zip([0, *bounds], bounds)]


def take_rows(x: Tensor, index: Tensor, count: Tensor) -> Tensor:
    """Returns x[index]. Only the first `count` (1,) rows are wanted."""
    return kernels.take_rows(x, index, count) if has_kernels(x) else x.index_select(0, index)


def sum_slots(out: Tensor, inverse: Tensor, K: int) -> Tensor:
    """out (S, D), sorted -> the sum of each token's K slots (N, D). A slot whose place is from S on
    counts as zero. It has no backward."""
    # Compiled code, too, calls this kernel. Torch fused the sum into the gradient of the norm
    # before, stored a value there, and read it back without a barrier (pytorch 190519).
    if has_kernels(out):
        return kernels.sum_slots(out, inverse, K)
    # On a CPU this is one pass, without a copy of the slots in another order.
    out, inverse = with_zero(out, inverse)
    return F.embedding_bag(inverse.view(-1, K), out, mode="sum")


def by_token(values: Tensor, inverse: Tensor) -> Tensor:
    """values (S,), sorted -> in the order of tokens (N * K,); 0 for a slot whose place is from S
    on."""
    values, inverse = with_zero(values, inverse)
    return values[inverse]


def with_zero(out: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """Puts a zero behind `out`, if it has not all slots, and lets the others' places be there."""
    if len(out) == len(inverse):
        return out, inverse
    return torch.cat([out, out.new_zeros(1, *out.shape[1:])]), inverse.clamp(max=len(out))


def grouped_mm(x: Tensor, stack: Tensor, ends: Tensor) -> Tensor:
    """x (S, A), sorted by expert, times stack (E, A, Z) -> (S, Z)."""
    if stays_on_device(x):
        return F.grouped_mm(x, stack, offs=ends)
    # On a CPU, torch's own loop takes up to three times as long as this one.
    out = x.new_empty(len(x), stack.shape[-1])
    counts = slots_per_place(ends, len(x))
    for rows, weight, result in zip(x.split(counts), stack, out.split(counts)):
        torch.mm(rows, weight, out=result)
    return out


def grouped_outer(x: Tensor, dy: Tensor, ends: Tensor) -> Tensor:
    """x (S, A) and dy (S, Z), sorted by expert -> x_e^T dy_e (E, A, Z), the gradient of a stack. It
    is zero for an expert without rows."""
    if stays_on_device(x):
        out = F.grouped_mm(x.T, dy, offs=ends)
        # On Blackwell GPUs the product of an expert without rows is not written (pytorch 172439).
        empty = ends.diff(prepend=ends.new_zeros(1)) == 0
        return out.masked_fill(empty[:, None, None], 0)
    out = x.new_empty(len(ends), x.shape[1], dy.shape[1])
    counts = slots_per_place(ends, len(x))
    for rows, dys, result in zip(x.split(counts), dy.split(counts), out):
        torch.mm(rows.T, dys, out=result)
    return out
