"""Compare methods: train them one after another from one config, and put them into one table.

    python compare.py --config configs/demo.toml --methods esft lora:5e-4 --output_dir runs/compare

Each method is a run of train.py in output_dir/NAME. A new method is an entry of METHODS.
"""

import argparse
import gc
import importlib.util
import io
import shlex
import signal
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from statistics import fmean

import torch

from config import Keys, Parser, read_keys, read_toml
from files import locked, replacing, write_json, write_text
from processes import SingleProcess
from tasks import TASKS
from train import train
from training.config import METHODS as PAPER_RATES
from training.config import TrainConfig, config_parser
from training.directory import RunDirectory
from training.inputs import read_inputs
from training.report import report
from training.stopping import ENDINGS, ending

METHODS = {  # name -> method of train.py, more of its keys, and what is trained
    "esft": ("esft", {}, "the experts that the config selects"),
    "gate": ("esft", {"score": "gate"}, "the experts selected by the gate score"),
    "lora": ("lora", {}, "low-rank updates of the linear layers"),
    "full": ("full", {}, "everything"),
    "random": ("esft", {"selection": "random"}, "as many experts as esft, drawn by the seed"),
    "lowest": ("esft", {"selection": "lowest"}, "as many experts, those of the lowest scores"),
    "shared": ("esft", {"shared_experts": "true"}, "esft, and the shared experts"),
    "non_expert": ("esft", {"non_expert_modules": "true"}, "esft, and what belongs to no expert"),
}
DEFAULT = ["esft", "lora", "full", "random"]
ABOUT = """\
Train methods one after another from one config, each in OUTPUT_DIR/NAME as train.py would, and
compare them in one table and one figure. The same command continues a comparison that was stopped
or killed; to add a method, name it behind the others. --overwrite starts all that are named anew.
NAME:RATE sets a method's learning rate, and esft:RATE that of its variants, too. Without RATE, the
config's learning_rate is for the config's own method (esft, with its variants, if it names none).
Other methods take the paper's.
All other keys go to every method on which they have an effect."""
EXAMPLE = (
    "python compare.py --config configs/demo.toml --output_dir runs/compare --methods esft "
    "lora:5e-4 full:1e-4 random"
)
# What a row of compare.json has of a run's results.json, beside the scores.
KEPT = ("learning_rate", "trained_parameters", "all_parameters", "adapter_bytes", "seconds")


# ------------------------------------------------------------------------------------------
# Before the first run


def read_rates(entries: list[str]) -> dict[str, str | None]:
    """Returns the methods that --methods names, each with its RATE, or None where there is none.
    Raises ValueError for an unknown method, and for one that is named twice."""
    rates: dict[str, str | None] = {}
    for entry in entries:
        name, colon, rate = entry.partition(":")
        if name not in METHODS:
            needed = f"NAME or NAME:RATE is required, with a NAME of {', '.join(METHODS)}"
            raise ValueError(f"--methods has {entry!r}; {needed}")
        if name in rates:
            raise ValueError(f"--methods has {name} twice; a comparison has one run of a method")
        rates[name] = rate if colon else None
    return rates


def read_configs(arguments: argparse.Namespace) -> tuple[dict[str, TrainConfig], dict[str, str]]:
    """Returns the checked config of each method, and where its learning rate is from. A key without
    effect on a method keeps its default there, if it has an effect on another one. Raises
    ValueError that names the method."""
    rates = read_rates(arguments.methods)
    keys = TrainConfig.__dataclass_fields__
    meanings = {name: field.metadata["help"] for name, field in keys.items()}
    given = read_toml(arguments.config, meanings, arguments) if arguments.config else {}
    given |= {name: value for name, value in vars(arguments).items() if name in keys}
    own = given.get("method", "esft")  # the method that the config's learning rate is for
    Keys.check(TrainConfig(method=own))
    idle = {name: set(TrainConfig(method=METHODS[name][0]).without_effect()) for name in rates}
    idle_in_all = set.intersection(*idle.values())  # read_keys refuses these

    configs: dict[str, TrainConfig] = {}
    sources = {}
    for name, rate in rates.items():
        method, more, _ = METHODS[name]
        flags = {**vars(arguments), "method": method, **more}
        flags |= {key: str(keys[key].default).lower() for key in idle[name] - idle_in_all}
        sources[name] = f"the paper's for {method}"
        if rate is not None:
            flags["learning_rate"], sources[name] = rate, "--methods"
        elif method == "esft" and rates.get("esft"):  # controls compare at the same rate
            flags["learning_rate"], sources[name] = rates["esft"], "esft's, by --methods"
        elif method != own:
            flags["learning_rate"] = PAPER_RATES[method]
        elif "learning_rate" in given:
            by_flag = "learning_rate" in arguments
            sources[name] = "--learning_rate" if by_flag else arguments.config
        try:
            config = read_keys(TrainConfig, argparse.Namespace(**flags), arguments.config)
            if config.expert_config and name != "esft":
                said = f"expert_config is {config.expert_config!r}"
                raise ValueError(f"{said}; only esft trains the experts of a file")
            config.output_dir = str(Path(config.output_dir, name))
            for other, theirs in configs.items():
                if replace(theirs, output_dir=config.output_dir) == config:
                    raise ValueError(f"is the same as {other} with this config; leave one out")
        except ValueError as error:
            raise ValueError(f"method {name}: {error}") from None
        configs[name] = config
    return configs, sources


def check(configs: dict[str, TrainConfig], folder: Path) -> list[RunDirectory]:
    """Returns the directories of all runs. Raises ValueError or OSError if an input of a run is
    wrong, or if its directory is of another run."""
    if folder.is_file():
        raise ValueError(f"output_dir is {folder}; it is a file")
    if (folder / "train_config.json").exists():
        raise ValueError(f"output_dir is {folder}; holds a run of train.py, choose another")
    directories = []
    for config in configs.values():
        with redirect_stdout(io.StringIO()):  # `train` says it again
            inputs = read_inputs(replace(config))  # it settles keys, which `train` does itself
        directories.append(RunDirectory(config, inputs, SingleProcess()))
    return directories


# ------------------------------------------------------------------------------------------
# The runs


def compare(configs: dict[str, TrainConfig]) -> dict[str, dict]:
    """Trains each method whose run is not finished. Returns a row for the base and each method."""
    rows: dict[str, dict] = {}
    for name, config in configs.items():
        print(f"\n{name}: {config.output_dir}", flush=True)
        try:
            results = train(config)
            report(config)
        except ENDINGS:
            done = ", ".join(list(rows)[1:]) or "none"
            print(f"\n{name} did not finish; finished methods: {done}", file=sys.stderr)
            raise
        leave_nothing(config)
        rows.setdefault("base", {"scores": means(results["before"])})
        rows[name] = {"scores": means(results["after"])} | {key: results[key] for key in KEPT}
    return rows


def means(evaluations: dict) -> dict[str, float]:
    return {entry: result["mean"] for entry, result in evaluations.items()}


def leave_nothing(config: TrainConfig) -> None:
    """Frees what a run left in this process, so that the next one is as if it were alone."""
    gc.collect()  # a model may hold itself in a circle
    if config.compile:
        torch.compiler.reset()  # graphs of the model
    if config.device.startswith("cuda"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(config.device)


# ------------------------------------------------------------------------------------------
# The table and the figure


def table(rows: dict[str, dict]) -> str:
    """Returns the lines of the table: a row for the base and each method."""
    head = [*map(title, rows["base"]["scores"]), "trained", "share", "adapter", "minutes"]
    lines = [["", *head, "learning rate"]]
    longest = max(map(len, rows))
    for name, row in rows.items():
        cells = [f"{score:.3f}" for score in row["scores"].values()]
        if name != "base":
            trained = row["trained_parameters"]
            cells += [f"{trained / 1e6:,.2f}M", f"{trained / row['all_parameters']:.1%}"]
            cells += [f"{row['adapter_bytes'] / 2**20:.1f} MiB", f"{row['seconds'] / 60:.1f}"]
            cells += [f"{row['learning_rate']:g}"]
        lines.append([name.ljust(longest), *cells])
    widths = [max(map(len, column)) for column in zip_longest(*lines, fillvalue="")]
    return "".join("  ".join(map(str.rjust, line, widths)).rstrip() + "\n" for line in lines)


def title(entry: str) -> str:
    task, _, path = entry.partition(":")
    return f"{Path(path).stem} ({task})"


def is_loss(entry: str) -> bool:
    task = entry.partition(":")[0]
    return task == "loss" or TASKS[task].is_judged  # there is no judge in training


def no_figure(entries: list[str]) -> str:
    """Returns why there cannot be a figure; empty if there can."""
    if len(entries) < 2:
        return "it needs two eval_sets"
    if len(set(map(is_loss, entries[1:]))) > 1:
        return "losses and scores have no common mean"
    if importlib.util.find_spec("matplotlib") is None:
        return "pip install matplotlib, and run the command again without --overwrite"
    return ""


def draw(rows: dict[str, dict], path: Path) -> None:
    """Draws a point for the base and each method: the first evaluation set is the task, the mean of
    the others is general ability."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    for name, row in rows.items():
        task, *others = row["scores"].values()
        point = task, fmean(others)
        style = {"markersize": 10, "fillstyle": "none", "markeredgewidth": 2, "label": name}
        axes.plot(*point, "k*" if name == "base" else "o", **style)
    task, *others = (title(e) + ", less is better" * is_loss(e) for e in rows["base"]["scores"])
    mean = "mean of " * (len(others) > 1) + ", ".join(others)
    axes.set(xlabel=f"task: {task}", ylabel=f"general ability: {mean}")
    axes.legend()
    with replacing(path) as part:
        figure.savefig(part, format="png", dpi=120)


# ------------------------------------------------------------------------------------------
# Command line


def command_line() -> Parser:
    parser = config_parser(ABOUT, EXAMPLE)
    listed = "; ".join(f"{name}: {about}" for name, (_, _, about) in METHODS.items())
    said = f"what to compare (default: {' '.join(DEFAULT)}), of {listed}"
    options = {"nargs": "+", "metavar": "NAME[:RATE]", "default": DEFAULT}
    parser.add_argument("--methods", help=said, **options)
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Runs the command: checks everything, trains, writes the table and the figure."""
    configs, sources = read_configs(arguments)
    for name, config in configs.items():
        print(f"{name:<11} learning rate {config.learning_rate:g} ({sources[name]})")
    folder = Path(config.output_dir).parent
    directories = check(configs, folder)
    with locked(folder):
        if config.overwrite:
            # All of them now, so that after a kill the same command without --overwrite goes on.
            for directory in directories:
                with directory.locked():
                    directory.begin()
            for name in ("compare.txt", "compare.json", "compare.png"):
                (folder / name).unlink(missing_ok=True)
        rows = compare(configs)
        text = table(rows)
        what = f"{config.data}, from {config.model}: {config.steps} steps, seed {config.seed}"
        write_text(folder / "compare.txt", f"{what}\n\n{text}")
        write_json(folder / "compare.json", rows, indent=2)
        reason = no_figure(config.eval_sets)
        if not reason:
            draw(rows, folder / "compare.png")
    figure = f"no compare.png ({reason})" if reason else "compare.png"
    print(f"\n{text}\nwrote {folder}/: compare.txt, compare.json, {figure}; a run for each method")
    words = ["--model", config.model, "--adapter"]
    words += [f"{config.output_dir}/adapter" for config in configs.values()]
    words += ["--model_config", *config.model_config] if config.model_config else []
    words += ["--chat_format", config.chat_format] if config.chat_format else []
    print(f"next: python generate.py {shlex.join(words)}    # talk to all of them")


def main() -> None:
    arguments = command_line().parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends a run as Ctrl-C does
    try:
        run(arguments)
    except ENDINGS as error:
        message, status = ending(error)
        print(message, file=sys.stderr)
        raise SystemExit(status) from None


if __name__ == "__main__":
    main()
