"""The demo's tasks, trained by ESFT, by full fine-tuning, and with as many random experts.

    python benchmarks/compare_methods.py tune    # each method's learning rate, on the validation files
    python benchmarks/compare_methods.py test    # three seeds at these rates, on the test files

Every run is configs/demo.toml but for the keys of its method, task, learning rate and seed. The rule for the
learning rate, the same for every method: of the rates whose task score is within 0.02 of the method's best, the
one that keeps most of the general skills. Results go to benchmarks/results/; the last line printed is JSON.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
METHODS = {  # name -> keys of train.py, learning rates to try
    "esft": ({}, ["3e-4", "1e-3", "3e-3", "1e-2"]),
    "random": ({"selection": "random"}, ["3e-4", "1e-3", "3e-3", "1e-2"]),
    "full": ({"method": "full"}, ["3e-5", "1e-4", "3e-4", "1e-3"]),
}
TASKS = {"intent": "intent", "order": "exact", "sum": "exact"}  # task -> metric of eval.py


def run(job: dict, part: str, steps: int | None) -> dict:
    """One training run in a process of its own, on one core; adds its scores to the job."""
    data = "demo/data"
    with tempfile.TemporaryDirectory() as folder:
        keys = {"data": f"{data}/{job['task']}_train.jsonl", "learning_rate": job["learning_rate"], "seed": job["seed"],
                "output_dir": f"{folder}/run", "device": "cpu", **METHODS[job["method"]][0]}
        if steps:
            keys |= {"steps": steps}
        command = [sys.executable, "train.py", "--config", "configs/demo.toml", "--eval_sets",
                   f"{TASKS[job['task']]}:{data}/{job['task']}_{part}.jsonl", f"exact:{data}/general_{part}.jsonl"]
        for key, value in keys.items():
            command += [f"--{key}", str(value)]
        done = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
                              capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
        results = json.loads(Path(folder, "run", "results.json").read_text())
    after, before = ([entry["mean"] for entry in results[when].values()] for when in ("after", "before"))
    tqdm.write(" ".join(map(str, [*job.values(), *after, results["seconds"]])))  # hours of runs: show each
    return {**job, "task_score": after[0], "general_score": after[1], "before": before, "seconds": results["seconds"],
            "trained_parameters": results["trained_parameters"], "adapter_bytes": results["adapter_bytes"]}


def run_all(jobs: list[dict], part: str, args: argparse.Namespace) -> list[dict]:
    jobs = sorted(jobs, key=lambda job: job["method"] != "full")  # the longest first
    with ThreadPoolExecutor(args.jobs) as pool:
        return list(tqdm(pool.map(lambda job: run(job, part, args.steps), jobs), total=len(jobs), unit="run"))


def best_rate(runs: list[dict]) -> str:
    best = max(r["task_score"] for r in runs)
    return max((r for r in runs if r["task_score"] >= best - 0.02), key=lambda r: r["general_score"])["learning_rate"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("tune", "test"), help="tune first; test reads what tune wrote")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="(default: all three)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at the same time, one core each")
    parser.add_argument("--steps", type=int, help="steps of a run (default: as in configs/demo.toml)")
    parser.add_argument("--tiny", action="store_true", help="one rate, one seed, two steps: to see that the script works")
    args = parser.parse_args()
    if args.tiny:
        args.steps = 2
    tuned_path = RESULTS / "demo_tuning.json"
    if args.stage == "tune":
        jobs = [{"task": task, "method": method, "learning_rate": rate, "seed": 0} for task in args.tasks
                for method, (_, rates) in METHODS.items() for rate in (rates[:1] if args.tiny else rates)]
        runs = run_all(jobs, "valid", args)
    else:
        tuned = json.loads(tuned_path.read_text())["chosen"]
        jobs = [{"task": task, "method": method, "learning_rate": tuned[task][method], "seed": seed}
                for task in args.tasks for method in METHODS for seed in range(1 if args.tiny else 3)]
        runs = run_all(jobs, "test", args)

    conditions = {"config": tomllib.loads((ROOT / "configs" / "demo.toml").read_text()), "steps": args.steps,
                  "cores": os.cpu_count(), "jobs": args.jobs}
    result = {"benchmark": f"demo_{args.stage}", "conditions": conditions, "runs": runs}
    if args.stage == "tune":
        result["chosen"] = {task: {method: best_rate([r for r in runs if (r["task"], r["method"]) == (task, method)])
                                   for method in METHODS} for task in args.tasks}
        print(f"{'task':<8} {'method':<8} {'rate':>6} {'task':>7} {'general':>8}")
        for r in sorted(runs, key=lambda r: (r["task"], r["method"], float(r["learning_rate"]))):
            mark = "  <- chosen" if result["chosen"][r["task"]][r["method"]] == r["learning_rate"] else ""
            print(f"{r['task']:<8} {r['method']:<8} {r['learning_rate']:>6} {r['task_score']:>7.3f} "
                  f"{r['general_score']:>8.3f}{mark}")
    else:
        print("| task | method | learning rate | trained | task | general skills |\n|---|---|---|---|---|---|")
        for task in args.tasks:
            before = next(r["before"] for r in runs if r["task"] == task)
            print(f"| {task} | before | | | {before[0]:.3f} | {before[1]:.3f} |")
            for method in METHODS:
                chosen = [r for r in runs if (r["task"], r["method"]) == (task, method)]
                cells = []
                for score in ("task_score", "general_score"):
                    values = [r[score] for r in chosen]
                    spread = statistics.stdev(values) if len(values) > 1 else 0.0
                    cells.append(f"{statistics.mean(values):.3f} ± {spread:.3f}")
                trained = statistics.mean(r["trained_parameters"] for r in chosen)
                print(f"| | {method} | {chosen[0]['learning_rate']} | {trained / 4_075_200:.1%} | {' | '.join(cells)} |")
    if not args.tiny:
        path = tuned_path if args.stage == "tune" else RESULTS / "demo_methods.json"
        RESULTS.mkdir(exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(f"wrote {path.relative_to(ROOT)}")
        if args.stage == "tune":
            print("next: python benchmarks/compare_methods.py test")
    print(json.dumps({"benchmark": result["benchmark"], "runs": len(runs), "chosen": result.get("chosen")}))


if __name__ == "__main__":
    main()
