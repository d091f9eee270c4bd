"""Does ESFT forget less? Bases of three sizes from nothing, adapted to tasks by every method.

    python benchmarks/study.py --sizes 4M 26M 118M --device cuda --jobs 12
    python benchmarks/study_report.py           # the tables and the figure of what was measured
    python benchmarks/study.py --tiny           # the same code on a CPU, in seconds

A size is a shape of base. A seed pretrains a base of that shape on demo/make_data.py's ten skills,
and draws all that the adaptations of this base draw; of 118M there is one base for all three seeds.
Each base is adapted to each task by each method: with the first seed at four learning rates, scored
on the validation files; with all seeds at the chosen rate, scored on the test files. Everything is
kept in --work: the same command goes on where one was stopped, and does nothing twice. Results are
written to benchmarks/results/study_SIZE.json.

The rule for the learning rate, the same for every method: of the rates whose task score is within
0.02 of the method's best, the one with the best general score. Scores are exact match (intent: its
own score) of greedy answers. "general" is the mean over the ten skills. "rivals" are those of them
whose inputs or whose answers' format the task shares. Full fine-tuning that ends early has the rate
of full fine-tuning, and the length with the best general score of those whose task score is within
0.02 of ESFT-Token's (of its own best, if none is). Each length has a schedule of its own.

A selection with ESFT-Token's number of parameters is compared with it seed by seed, on the same
base. It is better if the mean of the gains in the general score is above their standard deviation,
and the task score is at most 0.02 lower; worse if the mean is as far below, or the task score
lower. It beats ESFT-Token if it is better on most pairs of size and task, and worse on none."""

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from itertools import combinations_with_replacement, islice
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "demo"), str(ROOT / "benchmarks")]

from make_base import write_base  # noqa: E402
from make_data import draw_mixture, make_world, prompt  # noqa: E402
from study_report import best, of, report  # noqa: E402

from adapter import load_adapter, mark_trainable  # noqa: E402
from chat import load_tokenizer  # noqa: E402
from checkpoint import check_device, choose_dtype, load_model  # noqa: E402
from compare import leave_nothing  # noqa: E402
from data import encode_file, pack, sample_tokens  # noqa: E402
from files import read_json, write_json, write_lines, write_text  # noqa: E402
from merge import merge  # noqa: E402
from model import token_losses  # noqa: E402
from overlap import shared, top_experts  # noqa: E402
from pictures import Experts  # noqa: E402
from select_experts import (  # noqa: E402
    SelectionConfig,
    choose,
    collect_scores,
    scoring_batches,
    select,
)
from tasks import answer_file, score  # noqa: E402
from train import train  # noqa: E402
from training.config import TrainConfig  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"


class Size(NamedTuple):
    changes: dict  # to the demo's base
    steps: int  # of pretraining, of 64 rows of 512 tokens
    rate: float  # of pretraining
    bases: int  # how many, for SEEDS
    rates: tuple[float, float, float]  # the lowest tried for selected experts, LoRA, everything


SIZES = {
    "4M": Size({}, 1600, 3e-3, 3, (2e-3, 2.5e-4, 5e-5)),
    "26M": Size(
        {
            "hidden_size": 256,
            "intermediate_size": 1024,
            "moe_intermediate_size": 64,
            "num_hidden_layers": 8,
            "initializer_range": 0.035,
        },
        1800,
        1.5e-3,
        3,
        (5e-4, 1.25e-4, 2.5e-5),
    ),
    "118M": Size(
        {
            "hidden_size": 512,
            "intermediate_size": 2048,
            "moe_intermediate_size": 96,
            "num_hidden_layers": 12,
            "num_attention_heads": 8,
            "num_key_value_heads": 8,
            "kv_lora_rank": 128,
            "initializer_range": 0.025,
        },
        2000,
        1e-3,
        1,
        (2.5e-4, 1.25e-4, 1.25e-5),
    ),
    "tiny": Size(
        {"hidden_size": 16, "num_hidden_layers": 2, "n_routed_experts": 8},
        2,
        1e-3,
        1,
        (1e-3, 1e-3, 1e-3),
    ),
}
TASKS = {"intent": "intent", "order": "exact", "sum": "exact"}  # task -> metric of eval.py
SELECTED = ("token", "gate", "random", "lowest", "even", "gradient", "relative")
METHODS = (*SELECTED, "lora", "full", "early")
MIXTURE_ROWS = {"train": 1_000_000, "valid": 1000}
SEEDS = 3
STEPS, BATCH, ROW = 250, 16, 256
EARLY = (STEPS // 8, STEPS // 4, STEPS // 2, STEPS * 3 // 4)  # of full fine-tuning that ends early
SAMPLE_TOKENS = 2**15  # to score experts on
ANSWER_TOKENS = 48  # in the longest completion


class Study:
    """One size of the study, in a folder of its own. It goes to other processes as it is."""

    def __init__(self, name: str, args: argparse.Namespace):
        self.name, self.size, self.device = name, SIZES[name], args.device
        self.folder = Path(args.work, name)
        self.tiny = name == "tiny"
        self.seeds = range(args.first_seed, args.first_seed + args.seeds)
        self.mixture_rows = {"train": 200, "valid": 50} if self.tiny else MIXTURE_ROWS
        self.steps, self.early = (2, (1,)) if self.tiny else (STEPS, EARLY)
        self.answer_tokens = 2 if self.tiny else ANSWER_TOKENS

    def base(self, seed: int) -> Path:
        """Returns the base that a seed adapts: its own, as long as there are enough."""
        first = self.seeds[0]
        return self.folder / f"base-{first + (seed - first) % self.size.bases}"

    def file(self, name: str) -> Path:
        """Returns a file of demo/data; its first rows, if tiny."""
        path = ROOT / "demo" / "data" / f"{name}.jsonl"
        if not self.tiny:
            return path
        short = self.folder / path.name
        if not short.exists():
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            write_text(short, "".join(lines[:: len(lines) // 40]))
        return short

    def mixture(self, split: str) -> Path:
        """Returns a file with rows of the ten skills, to pretrain on or to validate."""
        path = self.folder / f"mixture_{split}.jsonl"
        if not path.exists():
            rows = islice(draw_mixture(split, 0, make_world(0)), self.mixture_rows[split])
            # As text, which is read in half the time of conversations.
            texts = ({"prompt": prompt(user), "completion": f" {answer}"} for user, answer in rows)
            write_lines(path, texts)
        return path

    def rates(self, method: str) -> list[float]:
        lowest = self.size.rates[{"lora": 1, "full": 2}.get(method, 0)]
        return [lowest * 2**i for i in range(1 if self.tiny else 4)]


# ------------------------------------------------------------------------------------------
# What runs in a process of its own


def quietly(function: Callable, study: Study, job: dict) -> dict:
    """Calls function(study, job), on one core, with what it prints in a log."""
    torch.set_num_threads(1)
    name = "-".join(map(str, [function.__name__, *job.values()]))
    log = study.folder / "logs" / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    try:
        with (
            open(log, "a", buffering=1, encoding="utf-8") as file,
            contextlib.redirect_stdout(file),
        ):
            return function(study, job)
    except Exception as error:
        raise RuntimeError(f"{name}: {error}; see {log}") from error


def end_with_parent() -> None:
    """Lets this process end when the study does, however that ends. Else it would go on with the
    work that waits for it, and the study, started again, would find its runs locked."""

    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def run(study: Study, output: Path, **keys) -> dict:
    """Returns the results of a finished run of train.py, whose checkpoints are then deleted."""
    config = TrainConfig(
        output_dir=str(output),
        device=study.device,
        gradient_accumulation_steps=1,
        gradient_checkpointing=False,
        save_steps=500,
        **keys,
    )
    config.check()
    results = train(config)
    leave_nothing(config)
    shutil.rmtree(output / "checkpoints", ignore_errors=True)
    return results


def pretrain(study: Study, job: dict) -> dict:
    seed, size = job["seed"], study.size
    init, output = study.folder / f"init-{seed}", study.folder / f"pretraining-{seed}"
    write_base(init, size.changes, seed)
    results = run(
        study,
        output,
        model=str(init),
        data=str(study.mixture("train")),
        validation_data=str(study.mixture("valid")),
        method="full",
        seq_length=512,
        batch_size=4 if study.tiny else 64,
        steps=size.steps,
        learning_rate=size.rate,
        warmup_steps=1 if study.tiny else 100,
        schedule="cosine",
        eval_steps=size.steps,
        log_steps=100,
        compile=study.device == "cuda",
        seed=seed,
    )
    shutil.rmtree(study.base(seed), ignore_errors=True)
    merge(init, output / "adapter", study.base(seed))
    kept = ("steps", "learning_rate", "best_validation_loss", "all_parameters", "seconds")
    return job | {name: results[name] for name in kept}


def adapt(study: Study, job: dict) -> dict:
    """Trains a job's method on its task, and evaluates it on the files of its part."""
    task, method = job["task"], job["method"]
    name = f"{task}-{method}-{job['learning_rate']:g}-{job['steps']}-{job['seed']}"
    keys = {"method": {"lora": "lora", "full": "full", "early": "full"}.get(method, "esft")}
    if keys["method"] == "esft":
        keys["expert_config"] = str(selection_folder(study, task, job["seed"]) / f"{method}.json")
    try:
        results = run(
            study,
            study.folder / "runs" / name,
            model=str(study.base(job["seed"])),
            data=str(study.file(f"{task}_train")),
            validation_fraction=0.0,
            seq_length=ROW,
            batch_size=BATCH,
            steps=job["steps"],
            learning_rate=job["learning_rate"],
            warmup_steps=max(1, job["steps"] // 25),
            schedule="linear",
            weight_decay=0.0,  # the rates differ by far, and it would be multiplied by them
            seed=job["seed"],
            **keys,
        )
    except FloatingPointError as error:
        if job["part"] == "test":
            raise
        # The rule passes over the rate.
        return job | {"task_score": 0.0, "general_score": 0.0, "diverged": str(error)}
    kept = ("trained_parameters", "all_parameters", "adapter_bytes", "seconds")
    adapter = study.folder / "runs" / name / "adapter"
    scores = evaluate(study, task, job["seed"], job["part"], adapter)
    return job | {key: results[key] for key in kept} | scores


def evaluate(study: Study, task: str, seed: int, part: str, adapter: Path | None = None) -> dict:
    """Returns the scores of the base, or of an adapter on it, on a task and on each skill."""
    base = study.base(seed)
    model = load_model(base, study.device, choose_dtype("", study.device))
    if adapter:
        load_adapter(model, adapter)
    tokenizer, means = load_tokenizer(base), []
    for metric, name in ((TASKS[task], task), ("exact", "general")):
        path = study.file(f"{name}_{part}")
        examples = answer_file(model, tokenizer, metric, path, study.answer_tokens)
        means.append([record["score"] for record in score(metric, examples).records])
    skills: dict[str, list[float]] = {}
    rows = study.file(f"general_{part}").read_text(encoding="utf-8").splitlines()
    for row, value in zip(rows, means[1], strict=True):
        skills.setdefault(json.loads(row)["skill"], []).append(value)
    return {
        "task_score": statistics.fmean(means[0]),
        "general_score": statistics.fmean(means[1]),
        "skills": {skill: statistics.fmean(values) for skill, values in skills.items()},
    }


# ------------------------------------------------------------------------------------------
# Selections


def selection_folder(study: Study, task: str, seed: int) -> Path:
    return study.folder / "selections" / f"{task}-{seed}"


def make_selections(study: Study, job: dict) -> dict:
    """Writes what each method of SELECTED selects for a task, and the scores of the experts."""
    folder = selection_folder(study, job["task"], job["seed"])
    folder.mkdir(parents=True, exist_ok=True)
    base = study.base(job["seed"])
    model = load_model(base, study.device, torch.float32, experts="loop")
    tokenizer, scores, samples = load_tokenizer(base), [], []
    files = study.file(f"{job['task']}_train"), study.mixture("valid")
    for path in files:
        samples.append(encode_file(path, tokenizer))
        sequences = sample_tokens(samples[-1], SAMPLE_TOKENS, ROW, job["seed"])
        scores.append(collect_scores(model, scoring_batches(sequences, tokenizer.pad_id)))
    write_json(folder / "task.scores.json", scores[0])
    write_json(folder / "general.scores.json", scores[1])
    random.Random(job["seed"]).shuffle(samples[0])
    rows = pack(samples[0], ROW, 0.0, tokenizer.pad_id, job["seed"])
    importance = gradient_importance(model, rows.take(slice(0, SAMPLE_TOKENS // ROW)))
    chosen = selections(*scores, importance, job["seed"])
    for method, experts in chosen.items():
        config = {"experts": experts, "shared_experts": False, "non_expert_modules": False}
        write_json(folder / f"{method}.json", config)
    return job | {"experts": chosen}


def gradient_importance(model, rows) -> dict[str, dict[str, float]]:
    """Returns the sum over micro-batches of |sum of gradient * weight| over an expert's weights:
    the first-order estimate of how much the loss changes without the expert (Molchanov et al.,
    arXiv 1906.10771, eq. 5, for groups of weights)."""
    layers, E = model.config.moe_layers, model.config.n_routed_experts
    all_experts = {str(layer): list(range(E)) for layer in layers}
    mark_trainable(model, {"experts": all_experts})
    totals = {str(layer): dict.fromkeys(map(str, range(E)), 0.0) for layer in layers}
    for part in rows.split(BATCH):
        tokens = part.tokens.to(model.lm_head.weight.device)
        token_losses(model, tokens, part.labels)[0].mean().backward()
        for layer, of_experts in totals.items():
            for expert in of_experts:
                weights = model.model.layers[int(layer)].mlp.experts[int(expert)].parameters()
                products = [(w.grad * w.detach()).sum() for w in weights if w.grad is not None]
                of_experts[expert] += abs(float(sum(products)))
        model.zero_grad(set_to_none=True)
    return totals


def selections(task: dict, general: dict, importance: dict, seed: int) -> dict[str, Experts]:
    """Returns method -> experts. All but gate have as many as token has, in all or in each layer."""
    by_token, by_gate = task["token_scores"], task["gate_scores"]
    token = select(task, "token", 0.2)
    counts = {layer: len(experts) for layer, experts in token.items()}
    control = partial(SelectionConfig, score="token", top_p=0.2, seed=seed)
    relative = {
        layer: {e: value - general["gate_scores"][layer][e] for e, value in values.items()}
        for layer, values in by_gate.items()
    }
    return {
        "token": token,
        "gate": select(task, "gate", 0.1),
        "random": choose(task, control(selection="random"))["experts"],
        "lowest": choose(task, control(selection="lowest"))["experts"],
        "even": highest(by_token, even_counts(by_token, sum(counts.values()))),
        "gradient": highest(importance, counts),
        "relative": highest(relative, counts),
    }


def highest(values: dict[str, dict[str, float]], counts: dict[str, int]) -> Experts:
    """Returns the `counts[layer]` experts of the highest value of each layer."""
    return {
        layer: [int(e) for e in sorted(of, key=lambda e: (-of[e], int(e)))[: counts[layer]]]
        for layer, of in values.items()
    }


def even_counts(scores: dict[str, dict[str, float]], total: int) -> dict[str, int]:
    """Returns the same number for every layer. What is left of `total` goes to the layers whose
    next expert has the highest score."""
    each, left = divmod(total, len(scores))
    following = {layer: sorted(of.values(), reverse=True)[each] for layer, of in scores.items()}
    more = sorted(scores, key=lambda layer: (-following[layer], int(layer)))[:left]
    return {layer: each + (layer in more) for layer in scores}


def routing(study: Study) -> dict:
    """Returns, of the first seed, how many of their 6 most used experts of a layer two tasks share,
    and what part of a task's tokens goes to these 6."""
    folders = {task: selection_folder(study, task, study.seeds[0]) for task in TASKS}
    files = {task: folder / "task.scores.json" for task, folder in folders.items()}
    files["general"] = folders["intent"] / "general.scores.json"
    files = {name: path for name, path in files.items() if path.exists()}
    top = {name: top_experts(str(path), 6, "token") for name, path in files.items()}
    held = {}
    for name, path in files.items():
        layers = read_json(path)["token_scores"]
        of_layers = [sum(layers[i][str(e)] for e in chosen) for i, chosen in top[name].items()]
        held[name] = statistics.fmean(of_layers)
    pairs = combinations_with_replacement(files, 2)
    return {
        "shared_of_6": {f"{one} {other}": shared(top[one], top[other]) for one, other in pairs},
        "share_of_tokens_of_6": held,
    }


# ------------------------------------------------------------------------------------------
# A size from nothing to its results


class Progress:
    """The results of a size, in a file, and the processes (or None) that add to them."""

    def __init__(self, study: Study, path: Path, pool: ProcessPoolExecutor | None):
        self.study, self.path, self.pool = study, path, pool
        size, seeds = study.size, study.seeds
        made_by = {
            "size": study.name,
            "base": list(size),
            "seeds": list(seeds),
            "bases": len({study.base(seed) for seed in seeds}),
            "training": [study.steps, BATCH, ROW],
        }
        made_by = json.loads(json.dumps(made_by))
        self.results = read_json(path) if path.exists() else made_by | {"stages": {}}
        if others := [name for name in made_by if self.results.get(name) != made_by[name]]:
            needed = "choose another folder for --results and --work, or delete the file"
            raise SystemExit(f"{path}: is of another {', '.join(others)}; {needed}")
        for entry in self.results.get("pretraining", []):
            if not (base := study.base(entry["seed"])).exists():
                raise SystemExit(f"{base}: is missing, but pretrained by {path}; delete the file")

    def do(self, stage: str, function: Callable, jobs: Iterable[dict]) -> list[dict]:
        """Returns the entries of all jobs. Those that the file has not are done, and added."""
        jobs, entries = list(jobs), self.results.setdefault(stage, [])
        todo = [job for job in jobs if not of(entries, **job)]
        begun, before = time.perf_counter(), self.results["stages"].get(stage, 0.0)
        for entry in tqdm(self.outcomes(function, todo), stage, len(todo), unit="run"):
            entries.append(entry)
            self.results["stages"][stage] = round(before + time.perf_counter() - begun, 1)
            self.save()
        return [of(entries, **job)[0] for job in jobs]

    def outcomes(self, function: Callable, jobs: list[dict]) -> Iterable[dict]:
        calls = [partial(quietly, function, self.study, job) for job in jobs]
        if self.pool is None:
            return (call() for call in calls)
        return (f.result() for f in as_completed([self.pool.submit(call) for call in calls]))

    def save(self) -> None:
        write_json(self.path, self.results)


def run_size(progress: Progress, tasks: list[str], methods: list[str]) -> None:
    """Pretrains, scores, selects, tunes and tests one size."""
    study = progress.study
    progress.results["device"] = study.device
    if study.device == "cuda":
        progress.results["device"] = torch.cuda.get_device_name()
    for split in study.mixture_rows:
        study.mixture(split)  # before several processes want it
    progress.do(
        "pretraining", pretrain, [{"seed": seed} for seed in study.seeds[: study.size.bases]]
    )
    parts = ("valid", "test")
    before = [{"task": t, "seed": s, "part": p} for t in tasks for s in study.seeds for p in parts]
    progress.do("before", evaluate_base, before)
    scored = [{"task": task, "seed": seed} for task in tasks for seed in study.seeds]
    progress.do("selections", make_selections, scored)
    progress.results["routing"] = routing(study)

    def jobs_of(task: str, method: str, pairs: Iterable, seeds: Iterable, part: str) -> list[dict]:
        job = {"task": task, "method": method}
        return [
            job | {"learning_rate": rate, "steps": steps, "seed": seed, "part": part}
            for rate, steps in pairs
            for seed in seeds
        ]

    def tune(chances: dict[tuple[str, str], list[tuple[float, int]]]) -> list[dict]:
        jobs = (jobs_of(*key, pairs, study.seeds[:1], "valid") for key, pairs in chances.items())
        return progress.do("tuning", adapt, sum(jobs, []))

    rated = [method for method in reversed(METHODS) if method in methods and method != "early"]
    chances = {(t, m): [(r, study.steps) for r in study.rates(m)] for m in rated for t in tasks}
    tuned = tune(chances)
    chosen = {(t, m): best(of(tuned, task=t, method=m)) for t, m in chances}
    if "early" in methods:
        chances = {(t, "early"): [(chosen[t, "full"][0], n) for n in study.early] for t in tasks}
        shorter = tune(chances)
        for task in tasks:
            rate, steps = chosen[task, "token"]
            (token,) = of(tuned, task=task, method="token", learning_rate=rate)
            runs = of(tuned, task=task, method="full", learning_rate=chosen[task, "full"][0])
            runs += of(shorter, task=task)
            chosen[task, "early"] = best(runs, least=token["task_score"])
    testing = (jobs_of(*key, [pair], study.seeds, "test") for key, pair in chosen.items())
    # What the report reads: a result of this rule, and only when all of it is there.
    progress.results["tested"] = progress.do("testing", adapt, sum(testing, []))
    progress.save()
    print(f"wrote {progress.path}")


def evaluate_base(study: Study, job: dict) -> dict:
    return job | evaluate(study, **job)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    sizes = [size for size in SIZES if size != "tiny"]
    add("--sizes", nargs="+", choices=sizes, default=sizes[:1], help="(default: 4M)")
    tasks = ["intent", "order"]
    add("--tasks", nargs="+", choices=TASKS, default=tasks, help="(default: intent and order)")
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="(default: all)")
    add("--work", default="runs/study", help="folder for bases and runs (default: runs/study)")
    add("--results", default=str(RESULTS), help="folder of study_SIZE.json (default: %(default)s)")
    said = "another one repeats the study with other bases (default: 0)"
    add("--seeds", type=int, default=SEEDS, help="how many (default: 3)")
    add("--first_seed", type=int, default=0, help=said)
    add("--device", default="cpu", choices=("cpu", "cuda"), help="(default: cpu)")
    add("--jobs", type=int, default=1, help="runs at the same time, one core each (default: 1)")
    add("--tiny", action="store_true", help="checks the code on a base of two layers")
    args = parser.parse_args()
    if "early" in args.methods and not {"full", "token"} <= set(args.methods):
        parser.error("--methods early needs full, whose rate it takes, and token, its measure")
    try:
        check_device(args.device)
    except ValueError as error:
        parser.error(str(error))
    if args.seeds < 1:
        parser.error(f"--seeds {args.seeds}: at least 1 is required")
    args.tasks = list(dict.fromkeys(args.tasks))
    with contextlib.ExitStack() as stack:
        if args.tiny:
            args.sizes, args.tasks, args.seeds = ["tiny"], args.tasks[:1], 1
            args.work = args.results = stack.enter_context(tempfile.TemporaryDirectory())
        # One core a run, so that runs side by side do not slow each other.
        # cuBLAS asks for the other before the first product, for the same bits in every run.
        os.environ |= {"OMP_NUM_THREADS": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
        pool = None
        if args.jobs > 1:
            spawn = multiprocessing.get_context("spawn")
            pool = ProcessPoolExecutor(args.jobs, spawn, initializer=end_with_parent)
            stack.callback(pool.shutdown, cancel_futures=True)
        for size in args.sizes:
            study = Study(size, args)
            study.folder.mkdir(parents=True, exist_ok=True)
            path = Path(args.results, f"study_{size}.json")
            run_size(Progress(study, path, pool), args.tasks, args.methods)
        written = report(Path(args.results), [*sizes, "tiny"])
    print(json.dumps({"benchmark": "study", "sizes": args.sizes, "wrote": written}))


if __name__ == "__main__":
    main()
