"""What the ranks of a plan send to each other, how long that takes, and what memory it needs."""

from math import comb

import torch

from checkpoint import build_model
from data import micro_batches
from model import ModelConfig
from processes import SingleProcess
from training.config import TrainConfig
from training.table import size_text, table_row

# GB/s one way: as four H100s exchange tokens in a step (docs/several_gpus.md), and a network's
# nominal one.
LINKS = {"NVLink 4": 130, "400 Gbit/s a GPU": 50}
# A second: whole steps of the V2-Lite job on one H100 (docs/several_gpus.md).
FLOPS = 430e12


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


def ranks_reached(E: int, R: int, K: int) -> float:
    """Returns to how many of R ranks a token goes on average, if its K of E experts are drawn
    evenly. Where they come from some groups of experts only, as in V3, it goes to fewer."""
    return R * (1 - comb(E - E // R, K) / comb(E, K))


def nccl_bytes(world_size: int, ep_size: int) -> int:
    """Returns what NCCL takes of a GPU beside torch's memory: 0.13 GiB for each group that the rank
    is in and 0.175 for each member; 0.4 for each other rank that it sends tokens to. This was
    measured in groups of two and four H100s of one host. A larger group is assumed to take what 8
    ranks of one host would."""
    smaller = [n for n in (ep_size, world_size // ep_size) if 1 < n < world_size]
    groups = [min(n, 8) for n in (world_size, *smaller) if n > 1]
    gib = sum(0.13 + 0.175 * n for n in groups) + 0.4 * (min(ep_size, 8) - 1)
    return round(gib * 2**30)


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
    others = [(c.ep_size - 1) / c.ep_size for c in columns]
    reached = [ranks_reached(base.n_routed_experts, c.ep_size, K) for c in columns]
    sent = [round(n * r * part) for n, r, part in zip(tokens, reached, others)]
    way = [count * base.hidden_size * size for count in sent]
    step = [n * ways * layers * len(parts) for n, parts in zip(way, batches)]
    rows = {
        "exchange of one rank: ep_size": [str(c.ep_size) for c in columns],
        "tokens of a micro-batch": [f"{n:,}" for n in tokens],
        f"x the other ranks with some of its {K} experts": [f"{n:,}" for n in sent],
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
