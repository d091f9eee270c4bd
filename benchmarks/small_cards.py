"""Training steps, scoring and decoding of the DeepSeek-V2-Lite shape with experts that rest in fewer
bits, under a hard limit of GPU memory.

    python benchmarks/small_cards.py           # a GPU with 80 GB, of which a part is used
    python benchmarks/small_cards.py --tiny    # on a CPU, in seconds: the same, without limits

Random weights; ESFT trains 124 experts (1.07 billion parameters). A step has 32 rows of 4096 tokens
in 32 micro-batches, with gradient checkpointing, compiled, gradient norm, clipping, and AdamW on
float32 masters. Each case is a process of its own. torch.cuda.set_per_process_memory_fraction lets
it have no more than the limit. The first case is the bfloat16 run that the others are compared
with. Then the same model scores 2^17 tokens, and decodes. Prints its conditions, a table, and one
JSON line."""

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
        learning_rate=1e-5,
        device=device,
        dtype="bfloat16",
        compile=not tiny,  # compiling on a CPU takes longer than a test may
        quantize=quantize,
        optimizer_device=optimizer_device,
    )
    result = {"limit_gib": limit, "quantize": quantize, "optimizer_device": optimizer_device}
    result |= {"deterministic": deterministic, "rows": rows}
    result["weights_gib"] = gib(sum(x.untyped_storage().nbytes() for x in memory(model)))
    result |= inference(model, device, length, tiny)
    empty_memory(device)
    measured = Measured(model, config)
    measured.step()
    synchronise(device)
    result["until_first_step_s"] = round(time.perf_counter() - start, 1)
    seconds = median_seconds(measured.step, device, steps, burn_in=0)
    result["step_s"] = round(seconds, 3)
    result["tokens_per_second"] = round(rows * length / seconds)
    result["peak_gib"] = round(peak_gib(device), 2)
    result["reserved_gib"] = 0.0 if tiny else gib(torch.cuda.max_memory_reserved())
    result["planned_gib"] = round(planned(config, model.config), 2)
    begin = time.perf_counter()
    measured.gradients()
    synchronise(device)
    result["gradients_s"] = round(time.perf_counter() - begin, 3)
    begin = time.perf_counter()
    measured.optimizer.step(1e-5)
    synchronise(device)
    result["optimizer_s"] = round(time.perf_counter() - begin, 3)
    return result


def gib(count: int) -> float:
    return round(count / 2**30, 2)


def inference(model, device: str, length: int, tiny: bool) -> dict:
    """Tokens per second of scoring, and of decoding at batch 1 and 64."""
    result, tokens = {}, 2**9 if tiny else 2**17
    sequences = [torch.randint(0, model.config.vocab_size, (length,)).tolist()] * (tokens // length)
    empty_memory(device)
    seconds = median_seconds(
        lambda: collect_scores(model, scoring_batches(sequences, 0)), device, 2
    )
    result["scoring"] = {"tokens_per_second": round(tokens / seconds), "peak_gib": peak_gib(device)}
    for batch in (1, 64):
        prompts = [sequence[: length // 8] for sequence in sequences[:1]] * batch
        new = 8 if tiny else 128
        empty_memory(device)
        times = {}
        for count in (1, new + 1):
            run = lambda: generate(model, prompts, count, [model.config.vocab_size], batch)  # noqa
            times[count] = median_seconds(run, device, 2)
        seconds = times[new + 1] - times[1]
        result[f"decoding_{batch}"] = {"tokens_per_second": round(batch * new / seconds)}
        result[f"decoding_{batch}"]["peak_gib"] = peak_gib(device)
    return result


def show(row: dict) -> None:
    print(
        f"{str(row['limit_gib'] or '-'):>6} {row['quantize'] or 'bfloat16':<9} "
        f"{row['optimizer_device'] or 'device':<7} {'same' if row['deterministic'] else 'any':<5} "
        f"{row['tokens_per_second']:>9,} {row['step_s']:>7} {row['optimizer_s']:>7} "
        f"{row['peak_gib']:>6} {row['reserved_gib']:>8} {row['planned_gib']:>7} "
        f"{row['scoring']['tokens_per_second']:>9,} "
        f"{row['decoding_1']['tokens_per_second']:>9,} {row['decoding_64']['tokens_per_second']:>9,}",
        flush=True,
    )


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--steps", type=int, default=2, help="timed steps (default: 2), after one")
    parser.add_argument("--rows", type=int, default=32, help="rows of a step (default: 32)")
    parser.add_argument("--case", help="measure only this one, given as JSON")
    parser.add_argument("--cases", type=int, nargs="+", help="numbers of the cases to measure")
    args = parser.parse_args()
    if args.case:
        print(json.dumps(measure(json.loads(args.case), args.tiny, args.steps, args.rows)))
        return
    made = print_conditions("cpu" if args.tiny else "cuda")
    print(f"{'':>44} a step   of it           peak              {'tokens/s of':>9}")
    print(
        f"{'limit':>6} {'experts':<9} {'AdamW':<7} {'bits':<5} {'tokens/s':>9} {'s':>7} {'AdamW':>7} "
        f"{'GiB':>6} {'reserved':>8} {'planned':>7} {'scoring':>9} {'decode 1':>9} {'64':>9}"
    )
    results = []
    for number in args.cases or range(len(CASES)):
        command = [sys.executable, __file__, "--case", json.dumps(CASES[number])]
        command += ["--steps", str(args.steps), "--rows", str(args.rows), *["--tiny"] * args.tiny]
        environment = {**os.environ, "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            print(CASES[number], done.stderr.strip().splitlines()[-1])
            continue
        results.append(json.loads(done.stdout.splitlines()[-1]))
        show(results[-1])
    print(json.dumps({"benchmark": "small_cards", **made, "results": results}))


if __name__ == "__main__":
    main()
