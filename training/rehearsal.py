"""What a training step, and a pass without gradients, allocate. The code itself runs, on tensors
without data, and the bytes that it allocates are counted."""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from data import Rows
from fast.device import meta_as_gpu
from fast.packed import memory
from generate import Decoder
from model import Transformer
from processes import SingleProcess
from select_experts import BATCH_TOKENS
from training.config import TrainConfig
from training.host_optimizer import make_optimizer


class FlashAttention(torch.autograd.Function):
    """Needs the memory of a fused attention kernel: its inputs, its output, and one number a query.
    On the meta device torch would take the kernel that holds all scores."""

    @staticmethod
    def forward(ctx, q, k, v):
        out = torch.empty_like(q[..., : v.shape[-1]])
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx, dy):
        q, k, v, *_ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def fused_attention(q, k, v, mask=None, **_) -> Tensor:
    """Stands in for `scaled_dot_product_attention`. A TorchFunctionMode would not reach the layers
    that backward runs again."""
    return FlashAttention.apply(q, k, v)


class FusedNorm(torch.autograd.Function):
    """Needs the memory of a GPU's RMSNorm: its input and one number a token. On the meta device
    torch would keep the input in float32, too."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, dy):
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


def fused_norm(x, shape, weight, eps) -> Tensor:
    """Stands in for `rms_norm`."""
    return FusedNorm.apply(x, weight)


class Allocations(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make, for as long as they live. The tensors
    `known` are there already and do not count."""

    def __init__(self, known: Iterable[Tensor]):
        super().__init__()
        self.live = self.peak = 0
        self.known = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.count(tensor.untyped_storage())
        return out

    def count(self, storage) -> None:
        if storage._cdata not in self.known:
            self.known.add(storage._cdata)
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())

    def free(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


def step_bytes(
    config: TrainConfig,
    model: Transformer,
    trained: dict[str, Tensor],
    ranks: SingleProcess,
    compute_gradients: Callable,
) -> int:
    """Returns the most bytes that one step allocates beside weights, masters and moments:
    activations, gradients, temporaries. `compute_gradients` is train.py's. It runs one micro-batch,
    which meets the gradients of those before it, where there are more."""
    count = min(config.batch_size, config.micro_batch * ranks.world_size)
    rows = Rows(*[torch.zeros(count, config.seq_length, dtype=torch.int64)] * 3)
    steps = count // config.micro_batch
    rehearsal = replace(config, device="meta", gradient_accumulation_steps=steps, compile=False)
    optimizer = make_optimizer(trained, rehearsal, ranks)
    alpha = config.balance_weight(model.config)
    with (
        as_on_device(config),
        Allocations([*memory(model), *optimizer.masters.values()]) as allocations,
    ):
        if count < config.batch_size and not config.optimizer_device:
            for master in optimizer.masters.values():
                master.grad = torch.empty_like(master)
        compute_gradients(rehearsal, model, rows, alpha, optimizer, ranks)
    return allocations.peak


PROMPT = 1024  # tokens of a prompt with its answer, as a plan assumes


@torch.no_grad()
def inference_bytes(config: TrainConfig, model: Transformer) -> int:
    """Returns the bytes that scoring allocates beside weights: one pass of so many tokens as there
    are at a time. Evaluation, if `config` evaluates, takes the memory that is there: counted is the
    least, decoding one prompt at a time."""
    rows = max(BATCH_TOKENS // config.seq_length, 1)
    tokens = torch.zeros(rows, min(config.seq_length, BATCH_TOKENS), dtype=torch.int64)
    with as_on_device(config), Allocations(memory(model)) as allocations:
        model.hidden_states(tokens.to("meta"))
        if config.eval_sets:
            decoder = Decoder(model, 1, PROMPT, 1, [])
            decoder.prefill({0: [0] * PROMPT})
            decoder.decode_one()
    return allocations.peak


@contextmanager
def as_on_device(config: TrainConfig) -> Iterator[None]:
    """Lets tensors on the meta device take the path of the config's device."""
    # float32 has no grouped product of its own: torch goes through a loop, as ours on a CPU.
    like_gpu = config.device.startswith("cuda") and config.dtype == "bfloat16"
    with (
        meta_as_gpu(like_gpu),
        mock.patch.object(nn.functional, "scaled_dot_product_attention", fused_attention),
        mock.patch.object(nn.functional, "rms_norm", fused_norm if like_gpu else F.rms_norm),
    ):
        yield
