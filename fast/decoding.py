"""Faster decoding on a GPU: as many rows in a step as memory allows, a step captured in a CUDA
graph, and when compiling it pays."""

from collections.abc import Callable

import torch

from fast.device import FEW_TOKENS
from fast.lora import FAST
from fast.packed import GROUPED
from model import MoE, Transformer

# Compiled, a step saves 3 to 5 ms, with 1 row as with 64. Compiling takes 5 to 50 s.
COMPILED_STEPS = 4000
MOST_ROWS = 512  # with more, a step takes longer almost in proportion
PART_OF_MEMORY = 0.9  # of what is free; the rest is for gaps, and for kernels that are loaded


def can_be_captured(model: Transformer, rows: int) -> bool:
    """Returns whether no layer waits for the GPU in a step of `rows` tokens."""
    moes = [block.mlp for block in model.model.layers if isinstance(block.mlp, MoE)]
    if any(moe.run_experts not in FAST or not moe.experts.is_whole for moe in moes):
        return False
    few = rows <= FEW_TOKENS and all(moe.run_experts in GROUPED for moe in moes)
    return few or model.lm_head.weight.dtype == torch.bfloat16  # else grouped_mm is a loop


def rows_at_once(model: Transformer, longest: int, length: int, pass_tokens: int) -> int:
    """Returns how many prompts of up to `longest` tokens the memory of a GPU allows to decode
    together, with caches of `length` tokens and `pass_tokens` in a pass of prompts. It is a power
    of two, so that a little more or less of free memory does not change it, and with it rounding.
    It is 64 where a step is no CUDA graph, as over ranks, which must agree."""
    device = model.lm_head.weight.device
    if not can_be_captured(model, MOST_ROWS):
        return 64
    torch.cuda.empty_cache()  # what torch holds without need counts as free
    free, total = torch.cuda.mem_get_info(device)
    allowed = torch.cuda.get_per_process_memory_fraction(device) * total
    free = PART_OF_MEMORY * min(free, allowed - torch.cuda.memory_reserved(device))
    rows = MOST_ROWS
    while rows > 1 and decoding_bytes(model, rows, longest, length, pass_tokens) > free:
        rows //= 2
    return rows


def decoding_bytes(
    model: Transformer, rows: int, longest: int, length: int, pass_tokens: int
) -> int:
    """Returns an upper bound of what decoding in bfloat16 allocates; see `rows_at_once`."""
    c, heads = model.config, model.model.layers[0].self_attn.o_proj.in_features
    K, cached = c.num_experts_per_tok, 2 * c.num_hidden_layers * c.cache_width
    # Of a token: the experts' products and what is around them, or attention.
    experts = 6 * K * c.moe_intermediate_size + (2 * K + 14) * c.hidden_size
    layer = max(experts, 24 * heads)
    step = layer + 14 * c.num_attention_heads * length + 4 * c.vocab_size  # scores and logits
    prompts = min(rows * longest, max(pass_tokens, longest)) * (cached + layer)
    return rows * (length * cached + 2 * step) + prompts  # 2: a graph has memory of its own


def compiling_pays(model: Transformer, rows: int, steps: int) -> bool:
    """Returns whether the model is large enough, and `steps` are enough, to compile the step."""
    large = sum(p.numel() for p in model.parameters()) > 1e9
    return large and steps >= COMPILED_STEPS and can_be_captured(model, rows)


def captured(step: Callable[[], None], model: Transformer, rows: int) -> Callable[[], None] | None:
    """Returns a function that replays `step` from a CUDA graph, with one call of the host; None
    where a layer waits for the GPU. The step's buffers must keep their place."""
    if not can_be_captured(model, rows):
        print("decoding: without a CUDA graph; this expert path waits for the GPU")
        return None
    with torch.cuda.device(model.lm_head.weight.device):
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compiles, and takes the memory that libraries need
            step()
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph, stream=stream):  # its own default may be another GPU's
            step()
    return graph.replay
