"""Faster decoding steps on a GPU: a step captured in a CUDA graph, and when compiling it pays."""

from collections.abc import Callable

import torch

from fast.device import FEW_TOKENS
from fast.lora import FAST
from fast.packed import GROUPED
from model import MoE, Transformer

COMPILED_STEPS = 4000  # so many steps of a large model make up for the time of their compilation


def can_be_captured(model: Transformer, rows: int) -> bool:
    """Returns whether no layer waits for the GPU in a step of `rows` tokens."""
    moes = [block.mlp for block in model.model.layers if isinstance(block.mlp, MoE)]
    if any(moe.run_experts not in FAST or not moe.experts.is_whole for moe in moes):
        return False
    few = rows <= FEW_TOKENS and all(moe.run_experts in GROUPED for moe in moes)
    return few or model.lm_head.weight.dtype == torch.bfloat16  # else grouped_mm is a loop


def compiling_pays(model: Transformer, rows: int, steps: int) -> bool:
    """Returns whether the model is large enough, and `steps` are enough, to compile the step."""
    large = sum(p.numel() for p in model.parameters()) > 1e9
    return large and steps >= COMPILED_STEPS and can_be_captured(model, rows)


def captured(step: Callable[[], None], model: Transformer, rows: int) -> Callable[[], None]:
    """Returns a function that replays `step` from a CUDA graph, with one call of the host; `step`
    itself where a layer waits for the GPU. The step's buffers must keep their place."""
    if not can_be_captured(model, rows):
        print("decoding: without a CUDA graph; this expert path waits for the GPU")
        return step
    with torch.cuda.device(model.lm_head.weight.device):
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compiles, and takes the memory that libraries need
            step()
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph, stream=stream):  # its own default may be another GPU's
            step()
    return graph.replay
