"""What the ranks of a plan send to each other, and how long that takes."""

import torch

from checkpoint import build_model
from data import micro_batches
from model import ModelConfig
from processes import SingleProcess
from training.config import TrainConfig
from training.table import size_text, table_row

LINKS = {"NVLink 4": 450, "400 Gbit/s a GPU": 50}  # GB/s one way
# A second: measured for whole steps of the V2-Lite job on an H200 (docs/several_gpus.md).
FLOPS = 350e12


def step_flops(config: TrainConfig, base: ModelConfig) -> float:
    """Returns the floating-point operations of a token in a step: forward (twice with
    checkpointing) and backward, without the weight gradients of the few trained experts."""
    linear = sum(
        p.numel()
        for name, p in build_model(base, "meta").named_parameters()
        if ".mlp.experts." not in name and "embed_tokens" not in name
    )
    expert = 3 * base.hidden_size * base.moe_intermediate_size
    linear += len(base.moe_layers) * base.num_experts_per_tok * expert
    heads = 2 * base.rotary_dim  # of queries and of values, in model_type deepseek
    if base.model_type != "deepseek":
        heads = base.qk_nope_head_dim + base.qk_rope_head_dim + base.v_head_dim
    # A query sees half of the row, on average.
    seen = base.num_hidden_layers * base.num_attention_heads * heads * config.seq_length / 2
    forwards = 2 if config.gradient_checkpointing else 1
    return 2 * (linear * (forwards + 1) + seen * (forwards + 2.5))


def exchange_lines(
    config: TrainConfig, base: ModelConfig, columns: list[SingleProcess]
) -> list[str]:
    """Returns lines of a plan. Each of `columns` has a world_size and an ep_size."""
    size = getattr(torch, config.dtype).itemsize
    ways = 6 if config.gradient_checkpointing else 4
    layers, K = len(base.moe_layers), base.num_experts_per_tok
    sizes = config.batch_size, config.micro_batch
    batches = [micro_batches(*sizes, 0, c.world_size) for c in columns]
    tokens = [len(parts[0]) * config.seq_length for parts in batches]
    slots = [n * K * (c.ep_size - 1) // c.ep_size for n, c in zip(tokens, columns)]
    way = [count * base.hidden_size * size for count in slots]
    step = [n * ways * layers * len(parts) for n, parts in zip(way, batches)]
    rows = {
        "exchange of one rank: ep_size": [str(c.ep_size) for c in columns],
        "tokens of a micro-batch": [f"{n:,}" for n in tokens],
        f"x {K} experts, those on other ranks": [f"{n:,}" for n in slots],
        f"x {base.hidden_size} x {size} bytes: one way": map(size_text, way),
        f"x {ways} ways: a layer and micro-batch": [size_text(n * ways) for n in way],
        f"x {layers} layers x micro-batches: a step": map(size_text, step),
    }
    again = " (twice, as layers are computed again)" if ways == 6 else ""
    notes = [f"ways: tokens to their experts and back{again}, gradients to them and back"]
    if config.gradient_checkpointing == "auto":
        notes.append("auto: these are the figures of all layers, the most; fewer may run again")
    if config.device.startswith("cuda"):
        flops = step_flops(config, base)
        seconds = [n * len(parts) * flops / FLOPS for n, parts in zip(tokens, batches)]
        shown = [f"{s:.2f} s" for s in seconds]
        rows[f"arithmetic of a step at {FLOPS / 1e12:.0f} TFLOP/s"] = shown
        for name, speed in LINKS.items():
            taken = [n / speed / 1e9 for n in step]
            shown = [f"{t:.2f} s, {t / (t + s):.0%}" for t, s in zip(taken, seconds)]
            rows[f"exchange at {speed} GB/s ({name})"] = shown
        notes.append("%: of exchange and arithmetic in turns; shared experts overlap")
    return ["", *(table_row(label, cells) for label, cells in rows.items()), *notes]
