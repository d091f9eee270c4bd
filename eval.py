"""The evaluator: tasks x (base, adapters) -> one table. The command can be stopped and continued.

    python eval.py --model BASE --adapter A --adapter B --base \
        --task intent --data intent.jsonl --task humaneval --data HumanEval.jsonl.gz --output DIR

Completions are saved one a line in the published shape: {"example": {"prompt", "raw_prediction",
"raw_answers"}, "score"}, with what else their score needs. What a task asks and how it scores is in
tasks/. Each rank appends its answers to FILE.rankR.part; at the end the first rank puts them in
order into FILE. results.json says for each file what made it.
"""

import glob
import hashlib
import json
import math
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import fmean

import torch

from adapter import checked_adapters, load_adapter
from chat import FORMATS, load_tokenizer, read_rows
from checkpoint import check_device, choose_dtype, load_model, local_directory, read_checkpoint
from config import Keys, Parser, add_keys, key, one_of, read_keys, refusal
from families import context_length
from fast.packed import QUANTIZATIONS
from files import check_output_file, locked, read_json, write_json, write_lines
from model import Transformer
from processes import SingleProcess, meet
from tasks import TASKS, Ask, Judge, Result, check_lengths, read_examples, score

SECONDS_BETWEEN_WORDS = 60.0  # on how far a run is, where no progress bar shows it
# What decides prompts and ends beside the weights. Those that a checkpoint lacks do not count.
SETTINGS = ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"]
SETTINGS += ["tiktoken.model", "chat_template.jinja"]
WEEK = 7 * 24 * 3600.0  # seconds; a rank waits as long as another one decodes


@dataclass
class EvalConfig(Keys):
    model: str = key("", "base checkpoint: a directory or a hub name")
    rescore: str = key("", "a file of completions to score again, without a model")
    adapter: list[str] = key((), "adapters over the base: directories or hub names")
    base: bool = key(False, "with adapters: evaluate the base alone, too")
    task: list[str] = key((), "tasks of the list below; may be given several times")
    data: list[str] = key((), "a file or folder for each task")
    output: str = key("", "a folder, or NAME.jsonl for the completions of a single evaluation")
    max_new_tokens: int = key(0, "longest completion; 0: the task's own, 32 to 1280", at_least=1)
    batch_size: int = key(0, "most prompts decoded together; 0: as many as fit", at_least=0)
    limit: int | None = key(None, "only the first examples; a larger limit continues", at_least=1)
    chat_format: str = key(
        "",
        "of questions; empty: the checkpoint's own, or its family's",
        choices=FORMATS,
    )
    plain: bool = key(False, "questions without the chat format, for models not trained to chat")
    shots: list[str] = key((), "examples before a question: a number for all tasks, or for each")
    shots_data: list[str] = key((), "for each task with shots, the file whose first rows they are")
    model_config: list[str] = key((), "FIELD=VALUE ...: changes to config.json; VALUE is JSON")
    overwrite: bool = key(False, "replace what other settings, adapters or data made of output")
    judge_url: str = key("", "an OpenAI-compatible endpoint, as https://HOST/v1")
    judge_model: str = key("", "the judge's name there")
    device: str = key("", "cpu, cuda, cuda:1 ...; empty: cuda where there is one")
    dtype: str = key("", "empty: bfloat16 on a GPU, else float32", choices=("bfloat16", "float32"))
    quantize: str = key(
        "", "frozen experts rest in 8 or 4 bits, to save memory", choices=QUANTIZATIONS
    )

    def check(self) -> None:
        """Raises ValueError for an impossible value, and for keys that do not go together."""
        super().check()
        for name in self.task:
            if name not in TASKS:
                raise refusal("task", name, one_of(TASKS, name))
        model, rescored, url, tasks = self.model, self.rescore, self.judge_url, self.task
        judged = any(TASKS[name].is_judged for name in tasks)
        counts = f"{len(tasks)} --task, {len(self.data)} --data"
        rules = {
            "either --model or --rescore is required": bool(model) == bool(rescored),
            "--model needs --data and --output": model and not (self.data and self.output),
            f"{counts}; each task needs its data": model and len(self.data) != len(tasks),
            "--rescore needs one --task": rescored and len(tasks) != 1,
            "--rescore needs --judge_url and --judge_model here": rescored and judged and not url,
            "--judge_url and --judge_model go together": bool(url) != bool(self.judge_model),
            "--judge_url: no task is judged": url and not judged,
        }
        of_models = "data adapter base limit plain chat_format max_new_tokens model_config device"
        for name in f"{of_models} dtype quantize shots shots_data".split():
            rules[f"--rescore takes no --{name}"] = rescored and getattr(self, name)
        for message, broken in rules.items():
            if broken:
                raise ValueError(message)
        self.check_shots()

    def check_shots(self) -> None:
        for number in self.shots:
            if not number.isdecimal():
                raise refusal("shots", number, "a number of examples, 0 or more")
        shots, tasks, files = self.shots_of_tasks(), len(self.task), len(self.shots_data)
        if len(shots) != tasks:
            needed = "one for all tasks, or one for each, is required"
            raise ValueError(f"{tasks} --task, {len(shots)} --shots; {needed}")
        for name, count in zip(self.task, shots):
            if count and not TASKS[name].takes_shots:
                takers = ", ".join(name for name, task in TASKS.items() if task.takes_shots)
                raise ValueError(f"--shots {count}: task {name} takes no examples; {takers} do")
        if (shown := sum(map(bool, shots))) != files:
            said = f"{shown} tasks with examples (--shots), {files} --shots_data"
            raise ValueError(f"{said}; each such task needs --shots_data, the file of its examples")

    def shots_of_tasks(self) -> list[int]:
        """Returns how many examples stand before the questions of each task."""
        shots = [int(number) for number in self.shots] or [0]
        return shots * len(self.task) if len(shots) == 1 else shots


# ------------------------------------------------------------------------------------------
# One evaluation


@dataclass
class Evaluation:
    """One task on one model."""

    variant: str  # its row in the table
    column: str
    adapter: Path | None
    task: str
    data: Path
    examples: list[dict]
    config: EvalConfig
    file: Path  # where the completions go
    identity: dict  # what must be the same for it to be continued
    result: Result | None = None

    @property
    def name(self) -> str:
        return f"{self.variant} {self.column}"

    def parts(self) -> list[Path]:
        return sorted(self.file.parent.glob(f"{glob.escape(self.file.name)}.rank*.part"))

    def answered(self) -> dict[int, dict]:
        """Returns what the file and the parts hold: number of the example -> the example with its
        answer. Lines that a kill cut off or somebody spoiled are passed over."""
        rows = list(enumerate(objects_in(self.file)))
        for part in self.parts():
            rows += [(row.get("number"), row) for row in objects_in(part)[1:]]
        found = {}
        for number, row in rows:
            with suppress(ValueError):
                example = TASKS[self.task].saved_example(row, "")
                if number in range(len(self.examples)) and all(
                    self.examples[number].get(name) == example.get(name)
                    for name in ("prompt", "raw_answers", "choices", "place", "test", "kwargs")
                ):
                    found[number] = example
        return found

    def wanted(self) -> range:
        """Returns which examples are evaluated: the first `limit`, or as many as the file holds."""
        everything = len(self.examples)
        wanted = max(self.config.limit or everything, len(objects_in(self.file)))
        return range(min(wanted, everything))

    def missing(self) -> list[int]:
        """Returns which wanted examples have no answer yet."""
        wanted, answered = self.wanted(), self.answered()
        missing = [n for n in wanted if n not in answered]
        if before := len(wanted) - len(missing):
            print(f"{self.name}: {before} of {len(wanted)} answered before", flush=True)
        return missing

    def difference(self, entry: dict | None) -> str:
        """Returns what differs from the settings or data that made the files that are there, or "".
        `entry` is what results.json says of the file."""
        if self.file.exists() and not entry:
            return f"{self.file}: was not written by such a command"
        made = [entry.get("identity", {})] if entry else []
        for theirs in [*made, *(objects_in(part)[0] for part in self.parts())]:
            for name in {**self.identity, **theirs}:
                old, new = theirs.get(name), self.identity.get(name)
                if old != new:
                    values = f"({old!r:.60}, now {new!r:.60})"
                    return f"{self.file}: was made with another {name} {values}"
        return ""

    def answer(self, numbers: list[int], model: Transformer, ask: Ask, rank: int) -> None:
        """Lets the model answer these examples, and appends each answer to this rank's part."""
        if not numbers:
            return
        with open(f"{self.file}.rank{rank}.part", "a", encoding="utf-8") as out:
            if out.tell() == 0:
                out.write(json.dumps(self.identity))
            out.write("\n")  # ends the first line, or one that a kill cut off
            out.flush()
            examples, spoken = [self.examples[n] for n in numbers], time.monotonic()
            sizes = self.identity["max_new_tokens"], self.config.batch_size
            answers = TASKS[self.task].predict(model, ask, examples, *sizes)
            for count, (i, example) in enumerate(answers, 1):
                row = {"number": numbers[i], "example": example}
                out.write(json.dumps(row, allow_nan=False) + "\n")
                out.flush()
                if time.monotonic() > spoken + SECONDS_BETWEEN_WORDS:
                    spoken = time.monotonic()
                    print(f"{self.name}: {count} of {len(numbers)} answered", flush=True)


def objects_in(path: Path) -> list[dict]:
    """Returns the JSON object of each line, {} for a line that somebody spoiled. A last line that a
    kill cut off is left out. Without the file the list is empty."""
    text, rows = path.read_text("utf-8", errors="replace") if path.exists() else "", []
    for line in text.split("\n")[:-1]:
        row = None
        with suppress(ValueError):
            row = json.loads(line)
        rows.append(row if isinstance(row, dict) else {})
    return rows


# ------------------------------------------------------------------------------------------
# What the command line asks for


def hash_files(paths: Iterable[Path]) -> str:
    """Returns a digest of names and contents."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            digest.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}".encode())
    return digest.hexdigest()


def hash_value(value) -> str:
    """Returns a digest of a value that JSON has."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def plan_evaluations(config: EvalConfig, base: Path, device: str) -> tuple[Ask, list[Evaluation]]:
    """Returns what turns questions into prompts, and every evaluation of the command line, with its
    examples read and its adapter checked. No weights are loaded. Raises ValueError and OSError."""
    meta, _ = read_checkpoint(base, config.model_config)
    ask = Ask(load_tokenizer(base, config.chat_format), config.plain, context_length(base))
    settings = [base / name for name in SETTINGS if (base / name).is_file()]
    made_by = {"base": meta.fingerprint, "base's settings": hash_files(settings)}
    for name in ("model_config", "quantize"):
        made_by |= {name: getattr(config, name)} if getattr(config, name) else {}
    variants = [("base", None, None)] if config.base or not config.adapter else []
    for name, adapter in checked_adapters(config.adapter, meta, config.quantize).items():
        named = ("expert_cfg.json", "adapter_config.json")
        held = [p for p in adapter.iterdir() if p.name in named or p.suffix == ".safetensors"]
        variants.append((name, adapter, hash_files(sorted(held))))
    names = [(task, Path(data)) for task, data in zip(config.task, config.data)]
    if len(set(names)) < len(names):
        raise ValueError("--task and --data: the same is given twice")
    tasks, shots_data = [], iter(config.shots_data)
    for (task, data), count in zip(names, config.shots_of_tasks()):
        stems = [other.stem for name, other in names if name == task]
        short = data.stem if stems.count(data.stem) == 1 else data
        column = f"{task}:{short}" if len(stems) > 1 else task
        shown = ask.with_shots(TASKS[task].read, next(shots_data), count) if count else ask
        examples = read_examples(data, task, shown)
        of_data = {
            "shots": count or None,  # older runs do not have it
            "examples of shots": hash_value([shot[:2] for shot in shown.shots]) if count else None,
            "data or prompts": hash_value(examples),
        }
        some = examples[: config.limit]
        check_lengths(data, task, some, ask, meta.config, config.max_new_tokens)
        tasks.append((column, task, data, examples, of_data))
    evaluations, output = [], Path(config.output)
    for variant, (column, task, data, examples, of_data) in product(variants, tasks):
        name, adapter, weights = variant
        identity = made_by | {
            "adapter": weights,
            "task": task,
            **of_data,
            "chat_format": ask.tokenizer.chat.name,
            "max_new_tokens": config.max_new_tokens or TASKS[task].max_new_tokens,
            "dtype": str(choose_dtype(config.dtype, device)),
        }
        file = output / f"{name}.{column}.jsonl".replace("/", "-").replace(":", ".")
        file = output if output.suffix == ".jsonl" else file
        what = name, column, adapter, task, data, examples, config, file, identity
        evaluations.append(Evaluation(*what))
    return ask, evaluations


def check_output(config: EvalConfig) -> Path:
    """Returns where the results go: results.json in the folder --output, or NAME.results.json
    beside the file --output, NAME.jsonl. Raises ValueError where they cannot."""
    output = Path(config.output)
    if output.suffix != ".jsonl":
        if output.is_file():
            raise ValueError(f"{output}: is a file; a folder, or NAME.jsonl, is required")
        return output / "results.json"
    check_output_file(output, [*config.data, *config.shots_data])
    if max(len(config.adapter) + config.base, 1) * len(config.task) > 1:
        raise ValueError(f"--output is {output}; for several evaluations, name a folder")
    of_folder = output.with_name("results.json")
    if of_folder.exists() and output.name in read_json(of_folder):
        raise ValueError(f"{output}: belongs to {of_folder}; give that folder")
    return output.with_name(f"{output.stem}.results.json")


# ------------------------------------------------------------------------------------------
# Results


def judge_beside(file: Path, url: str, model: str) -> Judge:
    """Returns the judge whose replies are in the folder of a file of completions or results."""
    return Judge(url, model, os.environ.get("OPENAI_API_KEY", ""), file.parent / "judge.jsonl")


def read_results(file: Path) -> dict[str, dict]:
    """Returns what results.json says of each file of completions; without results.json, {}."""
    saved = read_json(file) if file.exists() else {}
    if not (isinstance(saved, dict) and all(isinstance(entry, dict) for entry in saved.values())):
        raise ValueError(f"{file}: not a results file of eval.py; name another folder")
    return saved


def begin(results_file: Path, evaluations: list[Evaluation], config: EvalConfig) -> None:
    """Checks what earlier commands left. Raises ValueError if other settings or data made it; with
    --overwrite it is deleted. Raises JudgeError if the judge refuses."""
    saved, differing = read_results(results_file), []
    for e in evaluations:
        check_output_file(e.file, [*config.data, *config.shots_data])
        for part in e.parts():
            if not any(objects_in(part)[:1]):  # killed before the first answer
                part.unlink()
        if difference := e.difference(saved.get(e.file.name)):
            differing.append(e)
            if not config.overwrite:
                raise ValueError(f"{difference}; name another --output, or give --overwrite")
    if config.judge_url:
        judge_beside(results_file, config.judge_url, config.judge_model).check()
    for e in differing:  # its entry goes first: it would say that the next file is of another one
        saved.pop(e.file.name, None)
        write_json(results_file, saved, indent=2)
        for path in (*e.parts(), e.file):
            path.unlink(missing_ok=True)


def conclude(results_file: Path, e: Evaluation, start: float) -> None:
    """Scores and writes an evaluation. Raises OSError if answers are missing."""
    saved, wanted, done = read_results(results_file), e.wanted(), e.answered()
    if lost := [n for n in wanted if n not in done]:
        missing = f"{len(lost)} answers of other ranks are missing beside it"
        raise OSError(f"{e.file}: {missing}; all ranks must write to the same folder")
    judge = None
    if TASKS[e.task].is_judged:  # without --judge_url, the judge's earlier replies count
        model = e.config.judge_model or saved.get(e.file.name, {}).get("judge")
        judge = judge_beside(results_file, e.config.judge_url, model) if model else None
    result = e.result = score(e.task, [done[n] for n in wanted], judge)
    entry = {"variant": e.variant, "adapter": e.adapter and str(e.adapter)}
    entry |= {"task": e.task, "data": str(e.data)}
    entry |= {name: getattr(result, name) for name in ("metrics", "count", "unit", "missing")}
    entry |= {"identity": e.identity}
    entry |= {"judge": judge.model} if judge else {}
    entry |= {"subjects": result.groups} if result.groups else {}
    write_json(results_file, saved | {e.file.name: entry}, indent=2)  # so that the file is known
    write_lines(e.file, result.records)
    if done.keys() <= set(wanted):  # else a larger --limit needs the parts
        for part in e.parts():
            part.unlink()
    print(f"{e.name}: {describe(result)}, {time.perf_counter() - start:,.1f} s", flush=True)


def finish(results_file: Path, evaluations: list[Evaluation]) -> None:
    """Prints the table, what it lacks, what was written and what to do next."""
    if len(evaluations) > 1:
        print(f"\n{table(evaluations)}")
    judged = [e.result for e in evaluations if TASKS[e.task].is_judged]
    if any("points" not in result.metrics for result in judged):
        print("no judge was asked: judged tasks have the reference answers' loss (--judge_url)")
    print(f"wrote {results_file} and the completions beside it, as {evaluations[0].file.name}")
    for e in evaluations:
        if TASKS[e.task].has_completions and not TASKS[e.task].is_judged:
            print(f"next: python eval.py --rescore {shlex.quote(str(e.file))} --task {e.task}")
            return


def describe(result: Result) -> str:
    values = [f"{name} {show(value)}" for name, value in result.metrics.items()]
    if "loss" in result.metrics:
        values.append(f"perplexity {math.exp(min(result.metrics['loss'], 700)):.3f}")
    missing = f"; {result.missing} samples not scored" if result.missing and result.count else ""
    return f"{', '.join(values)} over {result.count:,} {result.unit}{missing}"


def show(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def table(evaluations: list[Evaluation]) -> str:
    """Returns the table's lines: a row for the base and each adapter, a column for each task. A
    column has the main metric of its first row. The average leaves losses out."""
    metrics, rows = {}, {}
    for e in evaluations:
        metric = metrics.setdefault(e.column, next(iter(e.result.metrics)))
        rows.setdefault(e.variant, []).append(e.result.metrics.get(metric))
    averaged = [place for place, metric in enumerate(metrics.values()) if "loss" not in metric]
    lines = [["", *(f"{column} ({metric})" for column, metric in metrics.items())]]
    longest = max(map(len, rows))
    lines += [[variant.ljust(longest), *map(show, values)] for variant, values in rows.items()]
    if len(averaged) > 1:
        lines[0].append("average")
        for line, values in zip(lines[1:], rows.values()):
            points = [values[place] for place in averaged]
            line.append(show(None if None in points else fmean(points)))
    columns = [[cell.rjust(max(map(len, column))) for cell in column] for column in zip(*lines)]
    return "\n".join("  ".join(line) for line in zip(*columns))


# ------------------------------------------------------------------------------------------
# Commands


def evaluate(config: EvalConfig, ranks: SingleProcess) -> None:
    """Runs all evaluations of the command line. Ranks share the examples of each."""
    results_file = check_output(config)
    first_gpu = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    device = config.device or (first_gpu if torch.cuda.is_available() else "cpu")
    check_device(device)
    base = local_directory(config.model)
    ask, evaluations = plan_evaluations(config, base, device)
    print(f"chat format: {ask.tokenizer.chat.name}, from {ask.tokenizer.chat.source}")
    with ExitStack() as stack:
        ranks.on_first(stack.enter_context, locked(results_file.parent))
        ranks.on_first(begin, results_file, evaluations, config)
        model = present = None
        for e in evaluations:
            start = time.perf_counter()
            if missing := ranks.on_first(e.missing):
                if model is None:
                    dtype = choose_dtype(config.dtype, device)
                    how = {"changes": config.model_config, "quantize": config.quantize}
                    model = load_model(base, device, dtype, **how)
                if e.adapter != present:  # the base comes first, without one
                    load_adapter(model, e.adapter)
                    present = e.adapter
                mine = missing[ranks.rank :: ranks.world_size]
                ranks.on_all(e.answer, mine, model, ask, ranks.rank)
            ranks.on_first(conclude, results_file, e, start)
        ranks.on_first(finish, results_file, evaluations)


def rescore(path: str | Path, task: str, judge: Judge | None = None) -> tuple[Result, int]:
    """Returns the result of saved completions, and how many scores equal the saved ones. Raises
    ValueError that names line and field."""
    rows = read_rows(path)
    result = score(task, [TASKS[task].saved_example(row, where) for where, row in rows], judge)
    return result, sum(r["score"] == row.get("score") for r, (_, row) in zip(result.records, rows))


def rescore_command(config: EvalConfig) -> None:
    path, output, task = Path(config.rescore), config.output, config.task[0]
    if output:
        check_output_file(output, [path])
        if Path(output).exists() and not config.overwrite:
            raise ValueError(f"{output}: is there already; name another, or give --overwrite")
    judge = judge_beside(path, config.judge_url, config.judge_model) if config.judge_url else None
    result, equal = rescore(path, task, judge)
    print(f"{task}: {describe(result)}")
    print(f"{equal} of {len(result.records)} scores equal the saved ones")
    if output:
        write_lines(output, result.records)
        print(f"wrote {output}")


def command_line() -> Parser:
    listed = "\n".join(f"  {name:<12} {task.about}" for name, task in TASKS.items())
    parser = Parser(
        "Evaluate a base checkpoint and adapters on tasks, or score saved completions again. A "
        "command that is run again continues; under torchrun, ranks share the examples.",
        "python eval.py --model demo/base --task intent --data demo/data/intent_test.jsonl "
        "--output runs/base",
    )
    parser.epilog += (
        f"\n\ntasks, and what their --data is:\n{listed}\n\nA judge, a language model, grades "
        "summary, law and translation. OPENAI_API_KEY is its key.\nWithout a judge, the loss of "
        "the reference answers is reported.\nhumaneval and mbpp run generated code in a sandbox."
    )
    add_keys(parser, EvalConfig)
    return parser


def main() -> None:
    arguments = command_line().parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    ranks = SingleProcess()
    try:
        config = read_keys(EvalConfig, arguments)
        if config.rescore:
            rescore_command(config)
        else:
            ranks = meet(WEEK)
            evaluate(config, ranks)
    except (ValueError, OSError, RuntimeError, FloatingPointError) as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        print("stopped; the same command continues", file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        ranks.leave()


if __name__ == "__main__":
    main()
