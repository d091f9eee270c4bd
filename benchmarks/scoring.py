"""Scoring the experts of the DeepSeek-V2-Lite shape on 2^17 tokens: tokens per second, beside
transformers.

    python benchmarks/scoring.py           # a GPU with 80 GB
    python benchmarks/scoring.py --tiny    # on a CPU, in seconds: the same, not compiled

Random bfloat16 weights, the same in both models; 32 rows of 4096 random tokens. Ours is
`collect_scores`, to the finished scores on the host, with the layers as they are, and compiled: the
command line does not compile, since that takes longer than scoring. "first s" is the first run,
compilation included. transformers runs its layers alone, without the head, with experts by
grouped_mm, and counts nothing. Prints its conditions, a table, and one JSON line."""

import json
import sys
import time
from functools import partial
from pathlib import Path
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from v2_lite import (  # noqa: E402
    TINY,
    V2_LITE,
    command_line,
    median_seconds,
    print_conditions,
    random_model,
    transformers_model,
)

from fast import compiled_blocks  # noqa: E402
from model import ModelConfig  # noqa: E402
from select_experts import collect_scores  # noqa: E402


@torch.no_grad()
def main() -> None:
    args = command_line(__doc__).parse_args()
    device, count, length = ("cpu", 4, 64) if args.tiny else ("cuda", 32, 4096)
    fields = V2_LITE | TINY if args.tiny else V2_LITE
    model = random_model(ModelConfig(**fields), device)
    theirs = transformers_model(model, fields, device)
    tokens = torch.randint(0, fields["vocab_size"], (count, length))
    made = print_conditions(device)
    print(f"bfloat16, {count} rows of {length} tokens")
    print(f"{'who':<16} {'rows at once':>12} {'seconds':>8} {'tokens/s':>9} {'first s':>8}")
    results = []

    def report(who: str, rows: int, run) -> None:
        start = time.perf_counter()
        run()
        first = time.perf_counter() - start
        seconds = median_seconds(run, device, 3)
        row = {
            "who": who,
            "rows": rows,
            "seconds": round(seconds, 3),
            "tokens_per_second": round(tokens.numel() / seconds),
            "first_s": round(first, 1),
        }
        results.append(row)
        print(
            f"{who:<16} {rows:>12} {row['seconds']:>8} {row['tokens_per_second']:>9,} "
            f"{row['first_s']:>8}",
            flush=True,
        )

    for rows in (4, 8) if device == "cuda" else (2,):
        parts = tokens.split(rows)
        batches = [(part, torch.full((len(part),), length)) for part in parts]
        report("ours", rows, lambda: collect_scores(model, batches))
        if device == "cuda":
            compiled = partial(model.hidden_states, run_block=compiled_blocks(model))
            with mock.patch.object(model, "hidden_states", compiled):
                report("ours, compiled", rows, lambda: collect_scores(model, batches))

        def forward() -> None:
            for part in parts:
                theirs.model(part.to(device), use_cache=False)

        report("transformers", rows, forward)
    print(json.dumps({"benchmark": "scoring", **made, "seq_length": length, "results": results}))


if __name__ == "__main__":
    main()
