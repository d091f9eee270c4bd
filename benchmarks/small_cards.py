"""Training steps, scoring and decoding of the DeepSeek-V2-Lite shape with experts that rest in fewer
bits, under a hard limit of GPU memory.

    python benchmarks/small_cards.py           # a GPU with 80 GB, of which a part is used
    python benchmarks/small_cards.py --tiny    # on a CPU, in seconds: the same, without limits

Random weights; ESFT trains 124 experts (1.07 billion parameters). A step has 32 rows of 4096 tokens
in 32 micro-batches, with gradient checkpointing, compiled, gradient norm, clipping, and AdamW on
float32 masters. Each case is a process of its own. torch.cuda.set_per_process_memory_fraction lets
it have no more than the limit. The first case is the bfloat16 run that the others are compared
with. Then each kind of model scores 2^17 tokens, and decodes, without a limit. Prints its
conditions, two tables, and one JSON line."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.v2_lite import (  # noqa: E402
    TINY,
    V2_LITE,
    Measured,
    command_line,
    empty_memory,
    median_seconds,
    peak_gib,
    planned,
    print_conditions,
    random_model,
    synchronise,
)
from fast.packed import memory  # noqa: E402
from generate import generate  # noqa: E402
from model import ModelConfig  # noqa: E402
from select_experts import collect_scores, scoring_batches  # noqa: E402
from train import be_deterministic  # noqa: E402
from training.config import TrainConfig  # noqa: E402

# GiB of the limit (None: all), quantize, optimizer_device, same bits each time
CASES = [
    (None, "", "", False),
    (42.0, "fp8", "", False),
    (27.0, "fp8", "cpu", False),
    (20.0, "nf4", "cpu", False),
    (15.0, "nf4", "cpu", False),
    (None, "", "", True),
    (27.0, "fp8", "cpu", True),
    (20.0, "nf4", "cpu", True),
]


def measure(case: list, tiny: bool, steps: int, rows: int) -> dict:
    """Training steps of a case of CASES."""
    limit, quantize, optimizer_device, deterministic = case
    device, length = ("cpu", 64) if tiny else ("cuda", 4096)
    if limit and not tiny:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(limit * 2**30 / total)
    be_deterministic(deterministic)
    start = time.perf_counter()
    fields = V2_LITE | TINY if tiny else V2_LITE
    model = random_model(ModelConfig(**fields), device, quantize=quantize)
    config = TrainConfig(
        seq_length=length,
        batch_size=rows,
        gradient_accumulation_steps=rows,
        gradient_checkpointing=True,
        learning_rate=1e-5,
        device=device,
        dtype="bfloat16",
        compile=not tiny,  # compiling on a CPU takes longer than a test may
        quantize=quantize,
        optimizer_device=optimizer_device,
    )
    empty_memory(device)
    measured = Measured(model, config)
    measured.step()
    synchronise(device)
    first = time.perf_counter() - start
    seconds = median_seconds(measured.step, device, steps, burn_in=0)
    peak, reserved = peak_gib(device), 0 if tiny else torch.cuda.max_memory_reserved()
    measured.gradients()
    begin = time.perf_counter()
    measured.optimizer.step(1e-5)
    synchronise(device)
    return {
        "limit_gib": limit,
        "quantize": quantize,
        "optimizer_device": optimizer_device,
        "deterministic": deterministic,
        "until_first_step_s": round(first, 1),
        "step_s": round(seconds, 3),
        "optimizer_s": round(time.perf_counter() - begin, 3),
        "tokens_per_second": round(rows * length / seconds),
        "weights_gib": gib(sum(x.untyped_storage().nbytes() for x in memory(model))),
        "peak_gib": round(peak, 2),
        "reserved_gib": gib(reserved),
        "planned_gib": round(
            planned(config, model.config)(model.config.num_hidden_layers) / 2**30, 2
        ),
    }


def gib(count: int) -> float:
    return round(count / 2**30, 2)


def inference(quantize: str, tiny: bool) -> dict:
    """Tokens per second, and peak memory, of scoring, and of decoding at batch 1 and 64."""
    device, length, tokens = ("cpu", 64, 2**9) if tiny else ("cuda", 4096, 2**17)
    be_deterministic(False)
    fields = V2_LITE | TINY if tiny else V2_LITE
    model = random_model(ModelConfig(**fields), device, quantize=quantize)
    sequences = [torch.randint(0, model.config.vocab_size, (length,)).tolist()] * (tokens // length)
    empty_memory(device)
    seconds = median_seconds(
        lambda: collect_scores(model, scoring_batches(sequences, 0)), device, 2
    )
    result = {"quantize": quantize, "scoring": round(tokens / seconds)}
    result["scoring_peak_gib"] = round(peak_gib(device), 2)
    for batch in (1, 64):
        prompts = [sequence[: length // 8] for sequence in sequences[:1]] * batch
        new, times = 8 if tiny else 128, {}
        empty_memory(device)
        for count in (1, new + 1):
            run = lambda: generate(model, prompts, count, [model.config.vocab_size], batch)  # noqa
            times[count] = median_seconds(run, device, 2)
        result[f"decoding_{batch}"] = round(batch * new / (times[new + 1] - times[1]))
        result[f"decoding_{batch}_peak_gib"] = round(peak_gib(device), 2)
    return result


def in_a_process(args, *options: str) -> dict | None:
    """Returns what a process of this script measures. Without a result, prints why. With --tiny,
    there is no process of its own."""
    if args.tiny:
        kind, value = options
        if kind == "--case":
            return measure(json.loads(value), True, args.steps, args.rows)
        return inference(value.replace("bfloat16", ""), True)
    command = [sys.executable, __file__, "--steps", str(args.steps), "--rows", str(args.rows)]
    environment = {**os.environ, "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    command += options
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        print(options, done.stderr.strip().splitlines()[-1], flush=True)
        return None
    return json.loads(done.stdout.splitlines()[-1])


def show(row: dict) -> None:
    print(
        f"{str(row['limit_gib'] or '-'):>9} {row['quantize'] or 'bfloat16':<9} "
        f"{row['optimizer_device'] or 'device':<7} {'same' if row['deterministic'] else 'any':<5} "
        f"{row['tokens_per_second']:>9,} {row['step_s']:>8} {row['optimizer_s']:>7} "
        f"{row['peak_gib']:>6} {row['reserved_gib']:>8} {row['planned_gib']:>7}",
        flush=True,
    )


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--steps", type=int, default=2, help="timed steps (default: 2), after one")
    parser.add_argument("--rows", type=int, default=32, help="rows of a step (default: 32)")
    parser.add_argument("--cases", type=int, nargs="*", help="numbers of the cases to measure")
    parser.add_argument("--case", help="for this script: measure a case, given as JSON")
    parser.add_argument("--inference", help="for this script: measure bfloat16, fp8 or nf4")
    args = parser.parse_args()
    if args.case:
        print(json.dumps(measure(json.loads(args.case), False, args.steps, args.rows)))
        return
    if args.inference:
        print(json.dumps(inference(args.inference.replace("bfloat16", ""), False)))
        return
    made = print_conditions("cpu" if args.tiny else "cuda")
    print(f"{args.rows} rows a step; GiB of the limit, the peak, what was reserved, and the plan")
    print(
        f"{'limit':>9} {'experts':<9} {'AdamW':<7} {'bits':<5} {'tokens/s':>9} {'step s':>8} "
        f"{'AdamW s':>7} {'peak':>6} {'reserved':>8} {'planned':>7}"
    )
    steps, inferred = [], []
    for number in range(len(CASES)) if args.cases is None else args.cases:
        if row := in_a_process(args, "--case", json.dumps(CASES[number])):
            steps.append(row)
            show(row)
    print("tokens/s, and GiB of the peak: scoring, decoding at batch 1, at batch 64")
    for quantize in ("bfloat16", "fp8", "nf4") if args.cases is None else ():
        if row := in_a_process(args, "--inference", quantize):
            inferred.append(row)
            print(f"{quantize:>9} ", *(f"{value:>9,}" for value in list(row.values())[1:]))
    results = {"rows": args.rows, "steps": steps, "inference": inferred}
    print(json.dumps({"benchmark": "small_cards", **made, **results}))


if __name__ == "__main__":
    main()
