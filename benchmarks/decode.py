"""Greedy decoding of the DeepSeek-V2-Lite shape: new tokens per second, beside transformers.

    python benchmarks/decode.py           # a GPU with 80 GB
    python benchmarks/decode.py --tiny    # the same code on a CPU, in seconds

Random bfloat16 weights, the same in both models; random prompts of 512 tokens, 128 new ones. Timed
are the steps without the prompts' pass: ours 128; transformers', seconds for 128 new tokens less
seconds for one, over 127. Ours with the step as it is and compiled, both captured in a CUDA graph;
transformers' `generate` with experts by grouped_mm, up to batch 64: beside our weights, its cache
has no room for more. Prints its conditions, a table, and one JSON line."""

import json
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from v2_lite import (  # noqa: E402
    TINY,
    V2_LITE,
    command_line,
    median_seconds,
    print_conditions,
    random_model,
    synchronise,
    transformers_model,
)

from generate import Decoder  # noqa: E402
from model import ModelConfig, Transformer  # noqa: E402


@torch.inference_mode()
def ours(model: Transformer, prompts: list, new: int, compiled: bool, device: str) -> dict:
    """Seconds a step, for the prompts, and until the decoder was ready."""
    start = time.perf_counter()
    decoder = Decoder(model, len(prompts), len(prompts[0]) + new, new, [], compiled)
    synchronise(device)
    ready = time.perf_counter() - start
    placed = dict(enumerate(prompts))
    prefill = median_seconds(lambda: decoder.prefill(placed), device, 3)

    def both():
        decoder.prefill(placed)
        for _ in range(new):
            decoder.step()

    total = median_seconds(both, device, 3)
    return {"step": (total - prefill) / new, "prefill": prefill, "ready": ready}


@torch.inference_mode()
def transformers_step(theirs, prompts: list, new: int, device: str) -> float:
    tokens = torch.tensor(prompts, device=device)

    def run(count: int):
        return theirs.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=0,
        )

    one = median_seconds(lambda: run(1), device, 1)
    return (median_seconds(lambda: run(new), device, 1) - one) / (new - 1)


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--skip_transformers", action="store_true", help="time ours alone")
    args = parser.parse_args()
    device = "cpu" if args.tiny else "cuda"
    context, new, batches = (16, 4, (1, 3)) if args.tiny else (512, 128, (1, 16, 64, 256, 512))
    fields = V2_LITE | TINY if args.tiny else V2_LITE
    model = random_model(ModelConfig(**fields), device)
    theirs = None if args.skip_transformers else transformers_model(model, fields, device)
    made = print_conditions(device)
    print(f"bfloat16, context {context}, {new} new tokens")
    print(
        f"{'batch':>5} {'who':<22} {'ms a step':>10} {'tokens/s':>9} {'prompts s':>9} "
        f"{'ready s':>8}"
    )
    results = []

    def report(batch: int, who: str, step: float, prefill: float = 0.0, ready: float = 0.0):
        row = {
            "batch": batch,
            "who": who,
            "ms_a_step": round(step * 1e3, 3),
            "tokens_per_second": round(batch / step),
            "prefill_s": round(prefill, 3),
            "ready_s": round(ready, 1),
        }
        results.append(row)
        print(
            f"{batch:>5} {who:<22} {row['ms_a_step']:>10} {row['tokens_per_second']:>9,} "
            f"{row['prefill_s']:>9} {row['ready_s']:>8}",
            flush=True,
        )

    for batch in batches:
        prompts = torch.randint(0, fields["vocab_size"] - 1, (batch, context)).tolist()
        for compiled in (False,) if device == "cpu" else (False, True):
            who = "ours, compiled" if compiled else "ours"
            report(batch, who, **ours(model, prompts, new, compiled, device))
        if theirs is not None and batch <= 64:
            report(batch, "transformers", transformers_step(theirs, prompts, new, device))
    print(json.dumps({"benchmark": "decode", **made, "results": results}))


if __name__ == "__main__":
    main()
