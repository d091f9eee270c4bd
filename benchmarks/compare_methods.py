"""The demo's tasks, trained by every method: ESFT in its variants, its controls (as many random or
lowest scored experts), LoRA, and full fine-tuning.

    python benchmarks/compare_methods.py tune    # each method's rate, on the validation files
    python benchmarks/compare_methods.py test    # three seeds at these rates, on the test files

Every run is configs/demo.toml but for the keys of its method, task, learning rate and seed. The
rule for the learning rate, the same for every method: of the rates whose task score is within 0.02
of the method's best, the one that keeps most of the general skills. Each finished run is added to
benchmarks/results/, so that a second call goes on where the first stopped (delete the file after a
change of config or code); the last line printed is JSON."""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from files import read_json, write_json  # noqa: E402

RATES = [2e-3, 4e-3, 8e-3]
METHODS = {  # name -> keys of train.py, learning rates to try
    "esft": ({}, RATES),
    "gate": ({"score": "gate", "top_p": 0.2}, RATES),  # the paper: 0.1
    "random": ({"selection": "random"}, RATES),
    "lowest": ({"selection": "lowest"}, RATES),
    "shared": ({"shared_experts": True}, RATES),
    "non_expert": ({"non_expert_modules": True}, [1e-4, 3e-4, 1e-3]),
    "lora": ({"method": "lora"}, [5e-4, 1e-3, 2e-3]),
    "full": ({"method": "full"}, [1e-4, 2e-4, 4e-4]),
}
TASKS = {"intent": "intent", "order": "exact", "sum": "exact"}  # task -> metric of eval.py


def run(job: dict, part: str, device: str, tiny: bool) -> dict:
    """One training run in a process of its own, on one core; adds its scores to the job."""
    with tempfile.TemporaryDirectory() as folder:
        keys = {
            "learning_rate": job["learning_rate"],
            "seed": job["seed"],
            "output_dir": f"{folder}/run",
            "device": device,
            "dtype": "float32",
            **METHODS[job["method"]][0],
        }
        names = f"{job['task']}_train", f"{job['task']}_{part}", f"general_{part}"
        files = [f"demo/data/{name}.jsonl" for name in names]
        if tiny:
            keys |= {"steps": 2, "batch_size": 2, "n_sample_tokens": 1000, "max_new_tokens": 2}
            for i, file in enumerate(files):
                files[i] = f"{folder}/{i}.jsonl"
                first = (ROOT / file).read_text().splitlines(keepends=True)[:40]
                Path(files[i]).write_text("".join(first))
        command = [
            sys.executable,
            "train.py",
            "--config",
            "configs/demo.toml",
            "--data",
            files[0],
            "--eval_sets",
            f"{TASKS[job['task']]}:{files[1]}",
            f"exact:{files[2]}",
        ]
        for key, value in keys.items():
            command += [f"--{key}", json.dumps(value) if type(value) is bool else str(value)]
        done = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
        results = read_json(Path(folder, "run", "results.json"))
    (task_before, general_before), (task, general) = (
        [entry["mean"] for entry in results[when].values()] for when in ("before", "after")
    )
    return {
        **job,
        "task_score": task,
        "general_score": general,
        "task_before": task_before,
        "general_before": general_before,
        "trained_share": results["trained_parameters"] / results["all_parameters"],
        "trained_parameters": results["trained_parameters"],
        "adapter_bytes": results["adapter_bytes"],
        "seconds": results["seconds"],
        "cores_of_machine": os.cpu_count(),
        "device": device,
    }


def best_rate(runs: list[dict]) -> float:
    best = max(r["task_score"] for r in runs)
    return max(
        (r for r in runs if r["task_score"] >= best - 0.02), key=lambda r: r["general_score"]
    )["learning_rate"]


def of(runs: list[dict], **fields) -> list[dict]:
    return [r for r in runs if all(r[name] == value for name, value in fields.items())]


def tuning_table(runs: list[dict], tasks: list[str], methods: list[str]) -> str:
    lines = [
        "| task | method | learning rate | task score | general skills | |",
        "|---|---|---|---|---|---|",
    ]
    for task in tasks:
        for method in methods:
            tried = of(runs, task=task, method=method)
            for r in sorted(tried, key=lambda r: r["learning_rate"]):
                mark = "chosen" if r["learning_rate"] == best_rate(tried) else ""
                lines.append(
                    f"| {task} | {method} | {r['learning_rate']:.0e} | {r['task_score']:.3f} | "
                    f"{r['general_score']:.3f} | {mark} |"
                )
    return "\n".join(lines)


def test_table(runs: list[dict], tasks: list[str], methods: list[str]) -> str:
    lines = [
        "| task | method | learning rate | trained | adapter | minutes | task | general skills |",
        "|---|---|---|---|---|---|---|---|",
    ]

    def spread(values: Iterable[float]) -> str:
        values = list(values)
        return f"{statistics.mean(values):.3f} ± {statistics.pstdev(values):.3f}"

    for task in tasks:
        first = of(runs, task=task)[0]
        lines.append(
            f"| {task} | before | | | | | {first['task_before']:.3f} | "
            f"{first['general_before']:.3f} |"
        )
        for method in methods:
            seeds = of(runs, task=task, method=method)
            trained, size, seconds = (
                statistics.mean(r[name] for r in seeds)
                for name in ("trained_parameters", "adapter_bytes", "seconds")
            )
            lines.append(
                f"| {task} | {method} | {seeds[0]['learning_rate']:.0e} | {trained:,.0f} | "
                f"{size / 2**20:.1f} MiB | {seconds / 60:.1f} | "
                f"{spread(r['task_score'] for r in seeds)} | "
                f"{spread(r['general_score'] for r in seeds)} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "stage",
        choices=("tune", "test"),
        help="tune first; test uses the rates that tune found best",
    )
    parser.add_argument(
        "--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="(default: all three)"
    )
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=list(METHODS), help="(default: all)"
    )
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count(), help="runs at the same time, one core each"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument(
        "--tiny",
        action="store_true",
        help="one task, rate and seed, two steps, few rows, results in a scratch folder",
    )
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp()) if args.tiny else ROOT / "benchmarks" / "results"
    tasks = args.tasks[:1] if args.tiny else args.tasks
    paths = {stage: folder / f"demo_{stage}.json" for stage in ("tune", "test")}
    runs = read_json(paths[args.stage]) if paths[args.stage].exists() else []
    jobs = []
    for task in tasks:
        for method in args.methods:
            rates = METHODS[method][1]
            if args.stage == "tune" or args.tiny:
                jobs += [
                    {"task": task, "method": method, "learning_rate": rate, "seed": 0}
                    for rate in (rates[:1] if args.tiny else rates)
                ]
            else:
                tried = of(read_json(paths["tune"]), task=task, method=method)
                if not tried:
                    raise SystemExit(
                        f"{paths['tune']}: no run of {method} on {task}; tune it first"
                    )
                rate = best_rate(tried)
                jobs += [
                    {"task": task, "method": method, "learning_rate": rate, "seed": seed}
                    for seed in range(3)
                ]
    todo = [job for job in jobs if not of(runs, **job)]
    todo.sort(key=lambda job: job["method"] not in ("lora", "full"))  # the longest first

    part = "valid" if args.stage == "tune" else "test"
    with ThreadPoolExecutor(args.jobs) as pool:
        started = [pool.submit(run, job, part, args.device, args.tiny) for job in todo]
        for done in tqdm(as_completed(started), total=len(todo), unit="run"):
            runs.append(done.result())
            write_json(paths[args.stage], runs, indent=1)
    runs = [of(runs, **job)[0] for job in jobs]
    print(f"{len(runs)} runs of configs/demo.toml on the {part} files, {args.device}")
    table = tuning_table if args.stage == "tune" else test_table
    print(table(runs, tasks, args.methods))
    print(f"wrote {paths[args.stage]}")
    if args.stage == "tune":
        print("next: python benchmarks/compare_methods.py test")
    print(
        json.dumps(
            {"benchmark": f"demo_{args.stage}", "runs": len(runs), "file": str(paths[args.stage])}
        )
    )


if __name__ == "__main__":
    main()
