"""Kills training runs at random moments and compares what they end with to an uninterrupted run.

    python benchmarks/kills.py             # 30 kills, a few minutes on two CPU cores
    python benchmarks/kills.py --kills 2   # a look

Each run is configs/demo.toml, shortened, with a checkpoint every two steps. It is started, killed
with SIGKILL, started again, and so on until it ends; then come other runs until all kills are used
up. Moments are random (seeded): half of the kills come after some time, half while a checkpoint is
written. Compared bit for bit: adapter, optimizer state, selection, scores,
report; metrics.jsonl but for its timings. Prints one line a kill, and one JSON line last."""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
TIMINGS = ("tokens_per_second", "memory_gib", "seconds_left")
KEYS = {
    "eval_sets": [],
    "steps": 16,
    "save_steps": 2,
    "eval_steps": 4,
    "seq_length": 128,
    "batch_size": 8,
    "gradient_accumulation_steps": 2,
    "n_sample_tokens": 4000,
    "warmup_steps": 0,
    "device": "cpu",
}


def start(output: Path) -> subprocess.Popen:
    command = [sys.executable, "train.py", "--config", "configs/demo.toml"]
    for key, value in {**KEYS, "output_dir": output}.items():
        command += [f"--{key}", *([str(value)] if value != [] else [])]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, **pipes)


def finish(process: subprocess.Popen) -> None:
    _, errors = process.communicate()
    if process.returncode:
        raise SystemExit(f"a run failed:\n{errors}")


def result(output: Path) -> dict[str, bytes | list]:
    """What must not depend on kills."""
    newest = f"checkpoints/step-{KEYS['steps']:06d}/optimizer.safetensors"
    files = ["adapter/adapter.safetensors", "adapter/expert_cfg.json", "expert_cfg.json"]
    files += [newest, "expert_cfg.scores.json", "scores_after.json"]
    lines = (output / "metrics.jsonl").read_text().splitlines()
    metrics = [{k: v for k, v in json.loads(line).items() if k not in TIMINGS} for line in lines]
    return {"metrics.jsonl": metrics} | {name: (output / name).read_bytes() for name in files}


def where(output: Path) -> str:
    """How far a run that was killed had come."""
    if any(output.glob("checkpoints/.*.part")):
        return "while a checkpoint was written"
    if (output / "scores_after.json").exists():
        return "after the last step"
    if (output / "metrics.jsonl").exists():
        steps = len((output / "metrics.jsonl").read_text().splitlines())
        return f"after {steps} lines of metrics"
    return "before the first step"


def end_or_kill(process: subprocess.Popen, output: Path, draw: random.Random, whole: float) -> bool:
    """Waits for a random moment within the `whole` time of a run, and kills the process, at once or
    in the next checkpoint that it begins to write. False if the process ended before."""
    until = time.monotonic() + draw.uniform(0.2, 1) * whole
    in_write, delay = draw.random() < 0.5, draw.uniform(0, 0.01)
    while process.poll() is None:
        if time.monotonic() > until and (not in_write or any(output.glob("checkpoints/.*.part"))):
            time.sleep(delay)
            process.kill()
            process.communicate()
            return process.returncode < 0
        time.sleep(0.0005)
    return False


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=30, help="(default: 30)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    args = parser.parse_args()
    draw = random.Random(args.seed)
    kills = runs = during_write = 0
    different: set[str] = set()
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        finish(start(Path(folder, "whole")))
        whole = time.perf_counter() - began
        expected = result(Path(folder, "whole"))
        print(f"torch {torch.__version__}, CPU; an uninterrupted run takes {whole:.1f} s")
        while kills < args.kills:
            runs += 1
            output = Path(folder, f"run{runs}")
            while kills < args.kills:
                process = start(output)
                if not end_or_kill(process, output, draw, whole):
                    break
                kills += 1
                during_write += "written" in where(output)
                print(f"kill {kills:>3}, run {runs}: {where(output)}", flush=True)
            else:
                process = start(output)
            finish(process)
            got = result(output)
            different |= {name for name in expected if got[name] != expected[name]}
            print(f"run {runs} ends {'otherwise' if different else 'the same'}", flush=True)
    summary = {
        "benchmark": "kills",
        "kills": kills,
        "while_a_checkpoint_was_written": during_write,
        "runs": runs,
        "different": sorted(different),
        "torch": torch.__version__,
    }
    print(json.dumps(summary))
    if different:
        raise SystemExit(f"differs from the uninterrupted run: {', '.join(sorted(different))}")


if __name__ == "__main__":
    main()
