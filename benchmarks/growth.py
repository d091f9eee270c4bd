"""How the speed of ESFT's step grows with sequence length, batch and number of trained experts, in
the DeepSeek-V2-Lite shape.

    python benchmarks/growth.py           # a GPU with 141 GB
    python benchmarks/growth.py --tiny    # on a CPU, in seconds: the same, not compiled

Random bfloat16 weights, random tokens; forward and backward to the gradients of the trained experts
(what AdamW adds depends on their number alone: benchmarks/v2_lite.py has whole steps), layers
compiled, no gradient checkpointing, algorithms of the GPU's choice. Prints its conditions, a table,
and one JSON line."""

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from v2_lite import (  # noqa: E402
    TINY,
    V2_LITE,
    command_line,
    empty_memory,
    median_seconds,
    peak_gib,
    print_conditions,
    random_model,
)

from adapter import mark_trainable  # noqa: E402
from fast import compiled_blocks, token_losses  # noqa: E402
from model import ModelConfig, Transformer  # noqa: E402


def measure(
    model: Transformer, rows: int, length: int, trained: int, device: str, steps: int
) -> dict:
    """One setting, with `trained` experts in each layer; the median of `steps`."""
    layers = model.config.moe_layers
    mark_trainable(model, {"experts": {str(layer): list(range(trained)) for layer in layers}})
    tokens = torch.randint(0, model.config.vocab_size, (rows, length))

    def step() -> None:
        how = {"run_block": compiled_blocks(model), "compiled": True} if device == "cuda" else {}
        losses, _ = token_losses(model, tokens.to(device), tokens, **how)
        losses.mean().backward()
        model.zero_grad()

    empty_memory(device)
    seconds = median_seconds(step, device, steps, burn_in=2)
    return {
        "rows": rows,
        "length": length,
        "trained_per_layer": trained,
        "ms": round(seconds * 1e3, 1),
        "tokens_per_second": round(rows * length / seconds),
        "peak_gib": round(peak_gib(device), 2),
    }


def main() -> None:
    args = command_line(__doc__).parse_args()
    device, unit, steps = ("cpu", 4, 1) if args.tiny else ("cuda", 1024, 5)
    fields = V2_LITE | TINY if args.tiny else V2_LITE
    model = random_model(ModelConfig(**fields), device)
    made = print_conditions(device)
    E = model.config.n_routed_experts
    tables = {
        f"sequence length, {16 * unit:,} tokens at once": [
            (16 // n, n * unit, 5) for n in (1, 2, 4, 8, 16)
        ],
        "rows": [(rows, 4 * unit, 5) for rows in (1, 2, 4, 8)],
        "trained experts of a layer": [(1, 4 * unit, n) for n in (1, 2, 4, 8, 16, 32, E)],
    }
    results, known = [], {}
    for title, settings in tables.items():
        print(f"\n{title}")
        print(f"{'rows':>5} {'length':>7} {'trained':>8} {'ms':>8} {'tokens/s':>9} {'peak GiB':>9}")
        for setting in settings:
            if setting not in known:
                known[setting] = measure(model, *setting, device, steps)
            row = known[setting]
            results.append({"table": title, **row})
            print(
                f"{row['rows']:>5} {row['length']:>7} {row['trained_per_layer']:>8} {row['ms']:>8} "
                f"{row['tokens_per_second']:>9,} {row['peak_gib']:>9}",
                flush=True,
            )
    print()
    print(json.dumps({"benchmark": "growth", **made, "results": results}))


if __name__ == "__main__":
    main()
