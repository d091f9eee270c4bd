"""Frozen experts that rest in fewer bits. A layer's weights are unpacked as it runs, in forward and
again in backward, into memory that all layers share. Experts that are trained, or that an adapter
replaces, are never packed: they have memory of their own.

fp8 is the format of DeepSeek-V3's checkpoints, which keep their bytes: e4m3 values, with a float32
factor for each block of rows and columns. nf4 is QLoRA's 4-bit NormalFloat (arXiv 2305.14314,
appendix E): each value is one of 16, times a bfloat16 factor for 64 neighbours.

Dimensions as in fast/experts.py; P is 2 for gate and up, 1 for down."""

import threading
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from itertools import product
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from fast.device import compiler_error
from fast.experts import StackedExperts, experts_grouped
from model import MoE, Transformer, experts_loop
from stored_tensors import StoredTensor, dequantise, spread

QUANTIZATIONS = ("fp8", "nf4")

# ------------------------------------------------------------------------------------------
# Formats. Codes are uint8 in either: torch cannot index float8 tensors on every device.


class Fp8:
    """Codes (..., rows, columns), scale (..., blocks of rows, blocks of columns) float32."""

    def __init__(self, block: tuple[int, int]):
        self.block = block

    def empty(self, count: int, P: int, rows: int, columns: int) -> list[Tensor]:
        """Returns uninitialised codes and scale of count x P matrices, on the meta device."""
        blocks = [-(-size // block) for size, block in zip((rows, columns), self.block)]
        codes = torch.empty(count, P, rows, columns, dtype=torch.uint8, device="meta")
        return [codes, torch.empty(count, P, *blocks, device="meta")]

    def pack(self, weight: Tensor) -> list[Tensor]:
        """weight (rows, columns) -> codes and scale. The largest value of a block becomes 448, the
        largest of e4m3."""
        (rows, columns), (high, wide) = weight.shape, self.block
        padded = F.pad(weight.float().abs(), (0, -columns % wide, 0, -rows % high))
        scale = padded.unflatten(1, (-1, wide)).unflatten(0, (-1, high)).amax((1, 3)) / 448
        scale = torch.where(scale == 0, 1, scale)
        values = weight.float() / spread(scale, rows, columns, self.block)
        return [values.to(torch.float8_e4m3fn).view(torch.uint8), scale]

    def unpacking(self, codes: Tensor, scale: Tensor, out: Tensor) -> Callable[[], None]:
        """Returns a function that writes the matrices into out (count, P * rows, columns)."""
        given = codes.view(torch.float8_e4m3fn), scale, out.view(codes.shape), self.block
        return partial(kernel_of(unpack_fp8, out.device), *given)

    def keep_bytes(
        self, stored: StoredTensor, codes: Tensor, scale: Tensor, buffer: Tensor
    ) -> bool:
        """Fills codes and scale of one matrix with the bytes of a file, if it has this format."""
        if stored.scale is None or stored.block != self.block:
            return False
        replace(stored, scale=None).copy_to(codes.view(torch.float8_e4m3fn), buffer)
        scale.copy_(stored.read_scale())
        return True


def unpack_fp8(values: Tensor, scale: Tensor, out: Tensor, block: tuple[int, int]) -> None:
    out.copy_(dequantise(values, scale, block))


NF4_BLOCK = 64
# fmt: off
NF4_VALUES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)
# fmt: on


@cache
def values_on(device: torch.device) -> Tensor:
    return torch.tensor(NF4_VALUES, device=device)


class Nf4:
    """Codes (..., blocks, 32), two in a byte, of which the lower four bits are those of the block's
    second half; scale (..., blocks) bfloat16. A block is 64 values one behind the other."""

    def empty(self, count: int, P: int, rows: int, columns: int) -> list[Tensor]:
        """See `Fp8.empty`. Raises ValueError for sizes that do not fill the blocks."""
        if rows * columns % NF4_BLOCK:
            sizes = f"hidden_size x moe_intermediate_size is {rows * columns}"
            raise ValueError(f"quantize is 'nf4'; {sizes}, and must be a multiple of {NF4_BLOCK}")
        shape = count, P, rows * columns // NF4_BLOCK
        codes = torch.empty(*shape, NF4_BLOCK // 2, dtype=torch.uint8, device="meta")
        return [codes, torch.empty(shape, dtype=torch.bfloat16, device="meta")]

    def pack(self, weight: Tensor) -> list[Tensor]:
        """weight (rows, columns) -> codes and scale. NF4's own scale, the largest value of a block,
        gives the first codes. The scale that fits them best, by least squares, gives the codes."""
        blocks, values = weight.float().view(-1, NF4_BLOCK), values_on(weight.device)
        between = (values[1:] + values[:-1]) / 2

        def nearest(scale: Tensor) -> Tensor:
            ratios = blocks / torch.where(scale == 0, 1, scale)[:, None]
            return torch.bucketize(ratios, between, out_int32=True)

        first = values[nearest(blocks.abs().amax(1))]
        scale = (blocks * first).sum(1) / first.square().sum(1).clamp(min=0.01)  # 0 for zeros
        scale = scale.bfloat16()
        high, low = nearest(scale.float()).to(torch.uint8).chunk(2, 1)
        return [high << 4 | low, scale]

    def unpacking(self, codes: Tensor, scale: Tensor, out: Tensor) -> Callable[[], None]:
        """See `Fp8.unpacking`."""
        out = out.view(*scale.shape, 2, NF4_BLOCK // 2)
        run = kernel_of(unpack_nf4, out.device)
        return partial(run, codes, scale, out, values_on(out.device))

    def keep_bytes(self, *_) -> bool:
        """Returns False: no checkpoint has this format."""
        return False


def unpack_nf4(codes: Tensor, scale: Tensor, out: Tensor, values: Tensor) -> None:
    halves = torch.stack([codes >> 4, codes & 15], -2)  # (..., blocks, 2, 32)
    out.copy_(values[halves.int()] * scale[..., None, None].float())


@cache
def kernel_of(unpack: Callable, device: torch.device) -> Callable:
    """Returns `unpack` as one kernel where this machine can compile it, else expert by expert."""

    def one_by_one(codes: Tensor, scale: Tensor, out: Tensor, extra) -> None:
        for each in zip(codes, scale, out):  # so that what lies between is small
            unpack(*each, extra)

    if device.type != "cuda":
        return one_by_one
    reason = compiler_error(device)
    if unpack is unpack_fp8 and torch.cuda.get_device_capability(device) < (8, 9):
        reason = "this GPU has no FP8"
    if reason:
        print(f"experts are unpacked without torch.compile, which takes much longer: {reason}")
        return one_by_one
    torch._dynamo.config.recompile_limit = 64  # a graph for each shape and mode
    return torch.compile(unpack, dynamic=False)


# ------------------------------------------------------------------------------------------
# The experts of a layer

PARTS = {"gate_proj": (0, 0), "up_proj": (0, 1), "down_proj": (1, 0)}  # -> stack, matrix in it


class SharedStacks:
    """The memory that layers are unpacked into: gate_up (E, 2I, D) and down (E, D, I)."""

    def __init__(self):
        self.stacks: list[Tensor] = []
        self.holder: PackedExperts | None = None  # whose weights are there

    def on(self, device: torch.device, like: list[Tensor]) -> list[Tensor]:
        """Returns the stacks on `device`, of the shapes and dtypes of `like`."""
        if not self.stacks or self.stacks[0].device != device:
            self.stacks, self.holder = [torch.empty_like(x, device=device) for x in like], None
        return self.stacks


class PackedExperts(StackedExperts):
    """The experts of a layer, of which frozen ones rest packed. `gate_up` and `down` are the shared
    stacks: they hold this layer's weights after `unpack`, until another layer's.

    The parameters of packed experts have no data; they are on the meta device. Those that
    `put_first` names have memory of their own, `exact`."""

    def __init__(self, experts: nn.ModuleList, form: Fp8 | Nf4, shared: SharedStacks):
        super().__init__(experts)  # on the meta device
        self.form, self.shared, self.shapes = form, shared, [self.gate_up, self.down]
        (count, double, D), I = self.gate_up.shape, self.down.shape[2]
        self.packed = [form.empty(count, 2, double // 2, D), form.empty(count, 1, D, I)]
        self.exact = [stack.new_empty(0, *stack.shape[1:]) for stack in self.shapes]
        self.stored: dict[tuple[int, str], StoredTensor] = {}
        self._view_exact()

    @property
    def memory(self) -> list[Tensor]:
        """All tensors that hold weights."""
        return [*self.packed[0], *self.packed[1], *self.exact, *self.stacks]

    @property
    def stacks(self) -> list[Tensor]:
        return [self.gate_up, self.down]

    def _apply(self, fn, recurse=True):
        """Moves the layer for .to() and .cuda()."""
        self.packed = [[fn(codes), fn(scale)] for codes, scale in self.packed]
        self.exact = [fn(stack) for stack in self.exact]
        if self.exact[0].dtype != self.shapes[0].dtype:
            raise ValueError("packed experts keep their dtype; load the model in another one")
        self._view_exact()
        return self

    def _view_exact(self) -> None:
        """Makes the first experts' parameters views of `exact`, and those of the others empty."""
        self.gate_up, self.down = self.shared.on(self.exact[0].device, self.shapes)
        count = len(self.exact[0])
        for place, e in enumerate(self.expert_at):
            sources = self.exact if place < count else self.shapes
            at = place if place < count else 0
            views = *sources[0][at].chunk(2), sources[1][at]
            for linear, view in zip(self[e].children(), views):
                trained = place < count and linear.weight.requires_grad
                linear.weight = nn.Parameter(view, requires_grad=trained)
        self.index_places()
        # Kept, because making views in every step is slow. `.data`: for autograd the stacks do not
        # change after a layer saved them. It is right: when it reads them, they hold its weights.
        stacks = [stack.data for stack in self.stacks]
        self.unpackings = [
            (self.form.unpacking(*packed, stack), stack[: len(exact)], exact)
            for packed, stack, exact in zip(self.packed, stacks, self.exact)
        ]

    def rows(self, e: int, part: str) -> list[Tensor]:
        """Returns the codes and the scale of a matrix of expert e."""
        stack, matrix = PARTS[part]
        return [x[self.expert_at.index(e), matrix] for x in self.packed[stack]]

    @torch.no_grad()
    def pack(self, e: int, part: str, weight: Tensor) -> None:
        """Packs a matrix of expert e."""
        for rows, x in zip(self.rows(e, part), self.form.pack(weight)):
            rows.copy_(x)

    def read(self, e: int, part: str, stored: StoredTensor, buffer: Tensor) -> None:
        """Packs a tensor of a file. It is read again where the expert is needed exactly."""
        self.stored[e, part] = stored
        if not self.form.keep_bytes(stored, *self.rows(e, part), buffer):
            weight = torch.empty(stored.shape, dtype=self.down.dtype, device=self.down.device)
            stored.copy_to(weight, buffer)
            with PACKING:
                self.pack(e, part, weight)

    @torch.no_grad()
    def put_first(self, experts: list[int]) -> None:
        """Gives those of `experts` that are held here memory of their own, at the front of the
        stacks, with the exact values of the checkpoint. The others are packed, as they were. Unless
        the same experts have their own memory already, all parameters are new objects."""
        experts = [e for e in experts if e in self.expert_at]
        if set(self.expert_at[: len(self.exact[0])]) == set(experts):
            return
        order = experts + [e for e in self.expert_at if e not in experts]
        places = torch.tensor([self.expert_at.index(e) for e in order], device=self.down.device)
        self.packed = [[codes[places], scale[places]] for codes, scale in self.packed]
        self.expert_at = order
        self.exact = [stack.new_empty(len(experts), *stack.shape[1:]) for stack in self.stacks]
        self._view_exact()
        self.shared.holder = None
        for e, part in product(experts, PARTS):
            weight = self[e].get_submodule(part).weight.data
            if (e, part) in self.stored:
                self.stored[e, part].copy_to(weight)
            elif not weight.is_meta:  # a model that was not loaded from files
                with torch.compiler.set_stance("force_eager"):
                    self.form.unpacking(*(x[None] for x in self.rows(e, part)), weight)()

    def unpack(self) -> None:
        """Writes this layer's weights into the shared stacks."""
        if self.down.is_meta:
            return
        # Where a checkpointed layer runs again, `UnpackAgain` may have been there just before.
        # Without gradients a step may be captured, and must hold the unpacking.
        there = self.shared.holder is self and torch.is_grad_enabled()
        self.shared.holder = None  # until all is there
        with torch.no_grad():
            for unpack, front, exact in self.unpackings:
                if not there:
                    unpack()
                front.copy_(exact)
        self.shared.holder = self

    def unpacked(self, e: int) -> nn.Module | Callable[[Tensor], Tensor]:
        """Returns expert e as a function of its rows; call `unpack` before."""
        if e not in self.expert_at[len(self.exact[0]) :]:  # exact, or held elsewhere
            return self[e]
        place = self.expert_at.index(e)
        views = *self.gate_up[place].chunk(2), self.down[place]
        weights = {f"{part}.weight": view for part, view in zip(PARTS, views)}
        return lambda rows: functional_call(self[e], weights, (rows,))


PACKING = threading.Lock()  # threads pack in turns, so that what lies between stays small


class UnpackAgain(torch.autograd.Function):
    """Returns y, an output of the layer or of its experts. In backward, unpacks the layer before
    its gradients, unless it ran again just before, as a checkpointed layer may."""

    @staticmethod
    def forward(ctx, y, experts):
        ctx.experts = experts
        return y.view_as(y)

    @staticmethod
    def backward(ctx, dy):
        if ctx.experts.shared.holder is not ctx.experts:
            ctx.experts.unpack()
        return dy, None


# ------------------------------------------------------------------------------------------
# In place of the loop, and of the grouped products


def grouped_packed(moe: MoE, x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
    """Returns what `experts_grouped` returns. Compiled layers are unpacked by `compiled_blocks`,
    outside of their graphs."""
    if torch.compiler.is_compiling():
        return experts_grouped(moe, x, weights, indices)
    moe.experts.unpack()
    return UnpackAgain.apply(experts_grouped(moe, x, weights, indices), moe.experts)


def loop_packed(moe: MoE, x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
    """Returns what `model.experts_loop` returns."""
    moe.experts.unpack()
    experts = [moe.experts.unpacked(e) for e in range(len(moe.experts))]
    y = experts_loop(SimpleNamespace(experts=experts), x, weights, indices)
    return UnpackAgain.apply(y, moe.experts)


GROUPED = (experts_grouped, grouped_packed)


def quantize(model: Transformer, kind: str) -> None:
    """Lets the routed experts of a model on the meta device rest packed. Raises ValueError for an
    unknown kind, or sizes that it cannot pack."""
    if kind not in QUANTIZATIONS:
        raise ValueError(f"quantize is {kind!r}; must be one of {', '.join(QUANTIZATIONS)}")
    stored = model.config.quantization_config or {}  # blocks as in the file keep its bytes
    form = Fp8(tuple(stored.get("weight_block_size") or (128, 128))) if kind == "fp8" else Nf4()
    shared = SharedStacks()
    for module in model.modules():
        if isinstance(module, MoE):
            module.experts = PackedExperts(module.experts, form, shared)
            grouped = module.run_experts in GROUPED
            module.run_experts = grouped_packed if grouped else loop_packed


def packed_layers(model: Transformer) -> dict[str, PackedExperts]:
    return {name: m for name, m in model.named_modules() if isinstance(m, PackedExperts)}


def readers(model: Transformer) -> dict[str, Callable[[StoredTensor, Tensor], None]]:
    """Returns, for each parameter that rests packed, the function that reads it from a file: name
    -> (where it lies, memory to read into)."""
    return {
        f"{name}.{e}.{part}.weight": partial(experts.read, e, part)
        for name, experts in packed_layers(model).items()
        for e in experts.expert_at
        for part in PARTS
    }


def memory(model: Transformer) -> list[Tensor]:
    """Returns a tensor for each piece of memory that holds the model's weights and buffers."""
    layers = packed_layers(model).values()
    theirs = {id(p) for layer in layers for p in layer.parameters()}  # views, or without data
    tensors = [x for layer in layers for x in layer.memory]
    tensors += [x for x in [*model.parameters(), *model.buffers()] if id(x) not in theirs]
    return list({x.untyped_storage()._cdata: x for x in tensors}.values())
