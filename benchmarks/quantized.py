"""What experts that rest in 8 or 4 bits cost in quality, on the demo's base.

    python benchmarks/quantized.py           # half an hour on one core
    python benchmarks/quantized.py --tiny    # the same code in seconds

The base has 4 million trained parameters, so weights and routing are those of a real model. For
`quantize` empty (float32), fp8 and nf4 it measures

- errors of the base, each as the norm of the difference over the norm without quantisation: of the
  weights of all routed experts, of the logits at the answers of the test files; and the mean loss
  of these answers, over tokens. Before training, `intent` is a format that the base does not know;
- the demo's whole run (configs/demo.toml) for three seeds: the error of the experts' scores; how
  many experts are in both selections, over how many are in either; and the scores of the task and
  of the general skills before and after, as mean and population standard deviation. The last two
  columns evaluate the adapter over the base in float32, as most people will use it.

Prints its conditions, two tables, and one JSON line. Writes that line's content to --output."""

import argparse
import io
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Iterable
from contextlib import redirect_stdout
from pathlib import Path

import torch
from torch import Tensor
from v2_lite import print_conditions

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from adapter import load_adapter  # noqa: E402
from chat import load_tokenizer, read_rows  # noqa: E402
from chat.template import Piece  # noqa: E402
from checkpoint import load_model  # noqa: E402
from config import read_keys  # noqa: E402
from data import by_length, encode_pieces, pad  # noqa: E402
from fast import StackedExperts  # noqa: E402
from fast.packed import QUANTIZATIONS, PackedExperts  # noqa: E402
from files import read_json, write_json, write_lines  # noqa: E402
from model import Transformer  # noqa: E402
from tasks import answer_file, score  # noqa: E402
from train import command_line, train  # noqa: E402
from training.config import TrainConfig  # noqa: E402

BASE = ROOT / "demo/base"


def test_files(folder: Path, limit: int | None) -> dict[str, Path]:
    """Returns the demo's test files by name; with a limit, copies of their first rows."""
    files = {name: ROOT / f"demo/data/{name}_test.jsonl" for name in ("intent", "general")}
    if limit is None:
        return files
    for name, path in files.items():
        files[name] = folder / path.name
        write_lines(files[name], [row for _, row in read_rows(path)[:limit]])
    return files


def load(quantize: str) -> Transformer:
    return load_model(BASE, dtype=torch.float32, quantize=quantize)


def error(found: list[Tensor], exact: list[Tensor]) -> float:
    """Returns the norm of the difference over the norm of `exact`."""
    difference = sum((a - b).double().square().sum() for a, b in zip(found, exact, strict=True))
    return (difference / sum(b.double().square().sum() for b in exact)).sqrt().item()


# ------------------------------------------------------------------------------------------
# The base


@torch.no_grad()
def expert_weights(model: Transformer) -> list[Tensor]:
    """Returns the stacks of every layer's experts, unpacked."""
    weights = []
    for experts in (m for m in model.modules() if isinstance(m, StackedExperts)):
        if isinstance(experts, PackedExperts):
            experts.unpack()
        weights += [experts.gate_up.clone(), experts.down.clone()]
    return weights


@torch.no_grad()
def answer_logits(model: Transformer, path: Path) -> tuple[Tensor, Tensor]:
    """Returns the logits (tokens, V) with which the model predicts the answers of a test file, and
    the tokens (tokens,) of the answers."""
    tokenizer = load_tokenizer(BASE)
    chat, pieces = tokenizer.chat, []
    for _, row in read_rows(path):
        answer = Piece(chat.answer(row["raw_answers"][0]), True)
        pieces.append([Piece(chat.with_begin(row["prompt"])), answer])
    samples, logits, targets = encode_pieces(pieces, tokenizer), [], []
    for group in by_length([len(ids) for ids, _ in samples], 16384):
        ids, labels = zip(*(samples[i] for i in group))
        labels = pad(list(labels), -100)[:, 1:]
        learned = labels != -100
        logits.append(model(pad(list(ids), tokenizer.pad_id))[:, :-1][learned])
        targets.append(labels[learned])
    return torch.cat(logits), torch.cat(targets)


def measure_base(quantize: str, files: dict[str, Path]) -> dict:
    """Returns the errors of the base, and its losses."""
    exact, model = load(""), load(quantize)
    row = {"quantize": quantize, "weights": error(expert_weights(model), expert_weights(exact))}
    for name, path in files.items():
        logits, targets = answer_logits(model, path)
        row[f"logits_{name}"] = error([logits], [answer_logits(exact, path)[0]])
        row[f"loss_{name}"] = torch.nn.functional.cross_entropy(logits, targets).item()
    return row


# ------------------------------------------------------------------------------------------
# Runs


def run(quantize: str, seed: int, folder: Path, files: dict[str, Path], tiny: bool) -> dict:
    """Returns the results of one run of the demo, whose files go to `folder`."""
    arguments = command_line().parse_args(["--device", "cpu"])
    config = read_keys(TrainConfig, arguments, str(ROOT / "configs/demo.toml"))
    config.model, config.data = str(BASE), str(ROOT / config.data)
    config.quantize, config.seed, config.output_dir = quantize, seed, str(folder)
    config.eval_sets = [f"intent:{files['intent']}", f"exact:{files['general']}"]
    if tiny:
        rows = Path(config.data).read_text().splitlines(keepends=True)[:100]
        config.data = str(folder.with_suffix(".jsonl"))
        Path(config.data).write_text("".join(rows))
        config.steps, config.batch_size, config.n_sample_tokens = 2, 2, 1000
        config.max_new_tokens, config.validation_fraction = 4, 0.0
    with redirect_stdout(io.StringIO()):
        results = train(config)
    before, after = ([e["mean"] for e in results[when].values()] for when in ("before", "after"))
    over_exact = after
    if quantize:
        model, tokenizer = load(""), load_tokenizer(BASE)
        load_adapter(model, folder / "adapter")
        over_exact = []
        for task, path in zip(("intent", "exact"), files.values()):
            with redirect_stdout(io.StringIO()):
                answered = answer_file(model, tokenizer, task, path, config.max_new_tokens)
            over_exact.append(score(task, answered).mean)
    return {
        "quantize": quantize,
        "seed": seed,
        "trained_parameters": results["trained_parameters"],
        "before": before,
        "after": after,
        "adapter_over_float32": over_exact,
        "seconds": results["seconds"],
    }


def differences(folder: Path, exact: Path) -> dict:
    """Returns how far scores and selection of a run are from those of the run in `exact`."""

    def scores(run: Path) -> list[Tensor]:
        layers = read_json(run / "expert_cfg.scores.json")["token_scores"].values()
        return [torch.tensor(list(layer.values())) for layer in layers]

    def selection(run: Path) -> set[tuple[str, int]]:
        experts = read_json(run / "expert_cfg.json")["experts"]
        return {(layer, e) for layer, chosen in experts.items() for e in chosen}

    mine, other = selection(folder), selection(exact)
    return {
        "scores": error(scores(folder), scores(exact)),
        "same_selection": len(mine & other) / len(mine | other),
    }


# ------------------------------------------------------------------------------------------
# Tables


def spread(values: Iterable[float]) -> str:
    values = list(values)
    return f"{statistics.mean(values):.3f} ± {statistics.pstdev(values):.3f}"


def print_base(rows: list[dict]) -> None:
    print("| experts | error of weights | of logits, intent | general | loss, intent | general |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        errors = (f"{row[name]:.4f}" for name in ("weights", "logits_intent", "logits_general"))
        losses = f"{row['loss_intent']:.4f} | {row['loss_general']:.7f}"
        print(f"| {row['quantize'] or 'float32'} | {' | '.join(errors)} | {losses} |")


def print_runs(rows: list[dict]) -> None:
    columns = "error of scores", "same selection", "trained parameters", "task before"
    columns += "general before", "task after", "general after"
    columns += "task, adapter over float32", "general, adapter over float32"
    print(f"| experts | {' | '.join(columns)} |")
    print("|---" * (1 + len(columns)) + "|")
    for quantize in dict.fromkeys(row["quantize"] for row in rows):
        seeds = [row for row in rows if row["quantize"] == quantize]
        cells = [spread(row[name] for row in seeds) for name in ("scores", "same_selection")]
        counts = (row["trained_parameters"] for row in seeds)
        cells.append(f"{statistics.mean(counts):,.0f}")
        for name in ("before", "after", "adapter_over_float32"):
            cells += [spread(row[name][i] for row in seeds) for i in range(2)]
        print(f"| {quantize or 'float32'} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", metavar="FILE.json", help="write the results there, too")
    parser.add_argument("--tiny", action="store_true", help="one seed, two steps, few rows")
    args = parser.parse_args()
    made = print_conditions("cpu") | {"threads": torch.get_num_threads()}
    print(f"{made['threads']} threads, {os.cpu_count()} cores; configs/demo.toml, float32")
    settings = ["", *QUANTIZATIONS]
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        files = test_files(Path(folder), 4 if args.tiny else None)
        base = [measure_base(quantize, files) for quantize in settings]
        print_base(base)
        for seed in range(1 if args.tiny else 3):
            for quantize in settings:
                place = Path(folder, f"{quantize or 'float32'}.{seed}")
                runs.append(run(quantize, seed, place, files, args.tiny))
                runs[-1] |= differences(place, Path(folder, f"float32.{seed}"))
                print(f"ran {place.name}: {runs[-1]['seconds']} s", file=sys.stderr, flush=True)
    print_runs(runs)
    result = {"benchmark": "quantized", **made, "base": base, "runs": runs}
    if args.output:
        write_json(args.output, result, indent=1)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
