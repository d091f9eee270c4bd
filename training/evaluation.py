"""A run's evaluations before and after training: what is printed of them, and kept in eval/."""

from pathlib import Path

from files import parse_json, read_json, write_lines
from model import Transformer
from tasks import answer_file, score
from training.config import TrainConfig
from training.directory import RunDirectory
from training.inputs import Inputs


def print_heading(text: str) -> None:
    """Prints what the run does next."""
    print(f"\n== {text}", flush=True)


def evaluate(
    config: TrainConfig, model: Transformer, inputs: Inputs, output: RunDirectory, when: str
) -> dict:
    """Evaluates every set and returns the means; keeps completions and means in eval/."""

    def read_means(path: Path) -> dict | None:
        means = read_json(path)
        return means if isinstance(means, dict) and means.keys() == {*config.eval_sets} else None

    def conclude(i: int, task: str, path: str, examples: list[dict]) -> dict:
        result = score(task, examples)
        write_lines(completions_file(output.path, when, i, path), result.records)
        means = {"mean": result.mean, "count": result.count, "unit": result.unit}
        return means | {"metric": next(iter(result.metrics))}

    def answer_all() -> dict:
        means = {}
        for i, entry in enumerate(config.eval_sets, 1):
            task, _, path = entry.partition(":")
            print_heading(f"evaluating {when} training: {task} on {path}")
            how = config.max_new_tokens, output.ranks
            examples = answer_file(model, inputs.tokenizer, task, path, *how)
            means[entry] = output.ranks.on_first(conclude, i, task, path, examples)
            print(f"{means[entry]['metric']} {means[entry]['mean']:.3f}", flush=True)
        return means

    return output.once(f"eval/{when}.json", answer_all, read_means)


def quality_lines(results: dict) -> list[str]:
    """Returns a table of the evaluations, and what they say was learned and forgotten."""
    if not results["before"]:
        return ["no evaluation files were named (eval_sets)"]
    lines = [f"{'evaluation':<34} {'task':<7} {'before':>7} {'after':>7}"]
    for entry, before in results["before"].items():
        task, _, path = entry.partition(":")
        after = results["after"][entry]
        better = round(after["mean"], 3) - round(before["mean"], 3)  # as they are shown
        if "loss" in before.get("metric", ""):  # older runs do not say it
            better = -better
        said = "learned" if better > 0 else "forgotten" if better < 0 else "as before"
        lines.append(
            f"{Path(path).stem:<34} {task:<11} {before['mean']:>7.3f} {after['mean']:>7.3f}   "
            f"{said:<9} ({before['count']:,} {before['unit']})"
        )
    return lines


def completions_file(output: Path, when: str, number: int, path: str) -> Path:
    """Returns where a run keeps the completions of its evaluation set `number`, from 1."""
    return output / f"eval/{when}.{number}.{Path(path).stem}.jsonl"


def answer_lines(config: TrainConfig) -> list[str]:
    """Returns a prompt of the first evaluation set with the answers before and after training: the
    first one whose score changed, else the first one."""
    if not config.eval_sets:
        return []
    path, output = config.eval_sets[0].partition(":")[2], Path(config.output_dir)
    records = []
    for when in ("before", "after"):
        file = completions_file(output, when, 1, path)
        lines = file.read_text(encoding="utf-8").split("\n")[:-1]
        records.append([parse_json(line, str(file)) for line in lines])
    scored = [pair for pair in zip(*records) if pair[0]["score"] is not None]
    before, after = next((p for p in scored if p[0]["score"] != p[1]["score"]), scored[0])
    if "raw_prediction" not in before["example"]:  # a loss
        return []
    shown = {"prompt": before["example"]["prompt"], "expected": before["example"]["raw_answers"][0]}
    shown |= {"before": before["example"]["raw_prediction"]}
    shown |= {"after": after["example"]["raw_prediction"]}
    return [f"  {name:<9} {' '.join(text.split())[:200]}" for name, text in shown.items()]
