"""Decoding as an evaluation does: 500 prompts, 256 new tokens each, on the DeepSeek-V2-Lite shape.

    python benchmarks/evaluation.py           # a GPU with 80 GB
    python benchmarks/evaluation.py --tiny    # the same code on a CPU, in seconds
    python benchmarks/evaluation.py --prompts intent.jsonl --tokenizer DIR    # real prompts

Random bfloat16 weights, which end no answer. Without --prompts, tokens are random, and lengths are
like those of ESFT's intent prompts: 300 to 1,000 tokens, 700 in the mean. Ours decodes as many
prompts at a time as memory allows, and 64. transformers' `generate`, with experts by grouped_mm,
takes the first prompts, as many as it can at a time, halving from 256. "ready s" is until the step
is captured in a CUDA graph. Prints its conditions, a table, and one JSON line."""

import json
import random
import sys
import time
from pathlib import Path
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from v2_lite import (  # noqa: E402
    TINY,
    V2_LITE,
    command_line,
    empty_memory,
    peak_gib,
    print_conditions,
    random_model,
    synchronise,
    transformers_model,
)

from chat import load_tokenizer, read_rows  # noqa: E402
from generate import Decoder, generate  # noqa: E402
from model import ModelConfig, Transformer  # noqa: E402


def read_prompts(args, vocab_size: int) -> list[list[int]]:
    if args.prompts:
        texts = [row["prompt"] for _, row in read_rows(args.prompts)][: args.count]
        prompts = load_tokenizer(args.tokenizer).encode_prompts(texts)
        return [[token % vocab_size for token in prompt] for prompt in prompts]
    draw, (low, high) = random.Random(0), (3, 10) if args.tiny else (300, 1000)
    lengths = [
        round(draw.triangular(low, high, low + (high - low) * 5 / 7)) for _ in range(args.count)
    ]
    return [[draw.randrange(vocab_size) for _ in range(n)] for n in lengths]


def ours(model: Transformer, prompts: list, new: int, batch: int, device: str) -> dict:
    seconds = {"ready": 0.0, "prefill": 0.0, "steps": 0.0}

    def timed(name: str, function):
        def call(*args):
            synchronise(device)
            begin = time.perf_counter()
            result = function(*args)
            synchronise(device)
            seconds[name] += time.perf_counter() - begin
            return result

        return call

    class Timed(Decoder):
        prefill, run = timed("prefill", Decoder.prefill), timed("steps", Decoder.run)

        def __init__(self, model, rows, *args):
            seconds["batch"] = rows
            timed("ready", super().__init__)(model, rows, *args)

    empty_memory(device)
    begin = time.perf_counter()
    with mock.patch("generate.Decoder", Timed):
        generate(model, prompts, new, [], batch)
    return {
        "who": "ours",
        "seconds": time.perf_counter() - begin,
        "prompts": len(prompts),
        **seconds,
    }


@torch.inference_mode()
def theirs(model, prompts: list, new: int, device: str) -> dict | None:
    """Returns nothing if the prompts do not fit together."""
    longest = max(map(len, prompts))
    tokens = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": 0}
    empty_memory(device)
    synchronise(device)
    begin = time.perf_counter()
    try:
        model.generate(
            tokens, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, **options
        )
    except torch.OutOfMemoryError:
        return None
    synchronise(device)
    found = {"who": "transformers", "seconds": time.perf_counter() - begin}
    return found | {"prompts": len(prompts), "batch": len(prompts)}


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--prompts", help="a file of rows with the field prompt")
    parser.add_argument("--tokenizer", help="a directory with their tokenizer")
    parser.add_argument("--count", type=int, default=500, help="of prompts (default: 500)")
    parser.add_argument("--skip_transformers", action="store_true", help="time ours alone")
    args = parser.parse_args()
    device, new, fields = "cuda", 256, V2_LITE
    if args.tiny:
        device, new, fields, args.count = "cpu", 4, V2_LITE | TINY, 5
    model = random_model(ModelConfig(**fields), device)
    prompts = read_prompts(args, fields["vocab_size"])
    made = print_conditions(device)
    total = sum(map(len, prompts))
    print(f"bfloat16, {len(prompts)} prompts of {total:,} tokens in all, {new} new tokens each")
    names = ("seconds", "ready", "prefill", "steps", "tokens_per_second", "peak_gib")
    print(
        f"{'who':<13} {'prompts':>7} {'batch':>5} {'seconds':>8} {'ready s':>8} {'prefill s':>9} "
        f"{'steps s':>8} {'tokens/s':>9} {'peak GiB':>8}"
    )
    results = []

    def report(row: dict) -> None:
        speed = round(row["prompts"] * new / row["seconds"])
        row |= {"tokens_per_second": speed, "peak_gib": peak_gib(device)}
        row |= {name: round(row[name], 2) for name in names if name in row}
        results.append(row)
        cells = [row.get(name, "") for name in names]
        print(
            "{:<13} {:>7} {:>5} {:>8} {:>8} {:>9} {:>8} {:>9} {:>8}".format(
                row["who"], row["prompts"], row["batch"], *cells
            ),
            flush=True,
        )

    generate(model, prompts[:2], 2, [])  # burn-in
    for batch in (0, 2) if args.tiny else (0, 64):
        report(ours(model, prompts, new, batch, device))
    if not args.skip_transformers:
        empty_memory(device)  # a decoder's cache may be in a cycle
        peer = transformers_model(model, fields, device)
        del model
        theirs(peer, prompts[:2], 2, device)  # burn-in
        sizes = (4, 2) if args.tiny else (256, 128, 64, 32, 16)
        report(next(row for n in sizes if (row := theirs(peer, prompts[:n], new, device))))
    made |= {"prompts": len(prompts), "prompt_tokens": total, "new_tokens": new}
    print(json.dumps({"benchmark": "evaluation", **made, "results": results}))


if __name__ == "__main__":
    main()
