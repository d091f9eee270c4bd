"""Which experts several tasks share: selections -> a table, and the figure of the ESFT paper.

python overlap.py runs/intent/expert_cfg.json runs/order/expert_cfg.json --plot overlap.png
"""

import argparse
import importlib.util
from pathlib import Path
from statistics import fmean

from config import Parser
from files import check_output_file, read_json, replacing
from pictures import Experts
from select_experts import read_scores


def top_experts(path: str, count: int, score: str) -> Experts:
    """Returns the `count` experts of the highest score of each layer of a score file."""
    layers = read_scores(path, score)[f"{score}_scores"]
    return {
        layer: sorted(map(int, values), key=lambda e: (-values[str(e)], e))[:count]
        for layer, values in layers.items()
    }


def read_selection(path: str) -> Experts:
    """Returns the experts of an expert_cfg.json. Raises ValueError that names file and field."""
    path = Path(path) / "expert_cfg.json" if Path(path).is_dir() else path
    expert_cfg = read_json(path)
    experts = expert_cfg.get("experts") if isinstance(expert_cfg, dict) else None
    if not isinstance(experts, dict) or not experts:
        needed = 'must be {"LAYER": [EXPERT, ...]}; score files need --top'
        raise ValueError(f"{path}: field experts {needed}")
    for layer, chosen in experts.items():
        are_ids = isinstance(chosen, list) and all(type(e) is int and e >= 0 for e in chosen)
        if not are_ids or len(set(chosen)) < len(chosen):
            raise ValueError(f"{path}: experts: layer {layer!r} must be a list of expert ids")
    return experts


def shared(one: Experts, other: Experts) -> float:
    """Returns how many experts of a layer both select, on average over the layers."""
    return fmean(len({*chosen} & {*other[layer]}) for layer, chosen in one.items())


def short_names(paths: list[str]) -> list[str]:
    """Returns what the files' paths differ in."""
    parts = [Path(path).with_suffix("").parts for path in paths]
    parts = [(*path[:-1], path[-1].removesuffix(".scores").removesuffix("_cfg")) for path in parts]
    while len({path[0] for path in parts}) == 1 and all(len(path) > 1 for path in parts):
        parts = [path[1:] for path in parts]
    while len({path[-1] for path in parts}) == 1 and all(len(path) > 1 for path in parts):
        parts = [path[:-1] for path in parts]
    return ["/".join(path).replace("//", "/") for path in parts]


def table(names: list[str], counts: list[list[float]]) -> str:
    width = max(8, *map(len, names)) + 2
    lines = [" " * width + "".join(f"{name:>{width}}" for name in names)]
    lines += [
        f"{name:<{width}}" + "".join(f"{count:>{width}.2f}" for count in row)
        for name, row in zip(names, counts)
    ]
    return "\n".join(lines)


def draw(names: list[str], counts: list[list[float]], path: str) -> None:
    """Draws the counts as a matrix, as figure 3 of the paper."""
    from matplotlib.figure import Figure

    size = 3 + 0.7 * len(names)
    figure = Figure(figsize=(size + 1, size), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(counts, cmap="viridis", vmin=0)
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(names)), names)
    most = max(map(max, counts))
    for i, row in enumerate(counts):
        for j, count in enumerate(row):
            colour = "black" if count > most / 2 else "white"
            axes.text(j, i, f"{count:.2f}", ha="center", va="center", color=colour)
    axes.set_title("experts of a layer that two tasks share")
    figure.colorbar(image, ax=axes)
    with replacing(path) as part:
        figure.savefig(part, format="png", dpi=120)


def command_line() -> Parser:
    parser = Parser(
        "Show how many experts of a layer each two tasks share, on average over the layers. On the "
        "diagonal is how many a task has.",
        "python overlap.py runs/demo/expert_cfg.json runs/order/expert_cfg.json --plot overlap.png"
        "    # after two runs",
    )
    said = "expert_cfg.json files, or folders with one; with --top score files (NAME.scores.json)"
    parser.add_argument("files", nargs="+", metavar="FILE", help=said)
    said = "take the N experts of the highest score instead (6 in the paper's figure)"
    parser.add_argument("--top", type=int, default=0, metavar="N", help=said)
    said = "the score that --top looks at: token or gate (default: token)"
    parser.add_argument("--score", default="token", metavar="NAME", help=said)
    said = "also draw it (needs matplotlib)"
    parser.add_argument("--plot", metavar="FILE.png", help=said)
    return parser


def run(arguments: argparse.Namespace) -> None:
    files, top = arguments.files, arguments.top
    if len(files) < 2:
        raise ValueError("at least two files are required, one a task")
    if arguments.score != "token" and not top:
        raise ValueError(f"--score is {arguments.score}; no effect without --top")
    if top < 0:
        raise ValueError(f"--top is {top}; a number of experts is required")
    if arguments.plot:
        check_output_file(arguments.plot, files)
        if not importlib.util.find_spec("matplotlib"):
            raise ValueError("--plot needs matplotlib: pip install matplotlib")
    experts = [top_experts(f, top, arguments.score) if top else read_selection(f) for f in files]
    for file, other in zip(files, experts):
        if other.keys() != experts[0].keys():
            raise ValueError(f"{file}: has other layers than {files[0]}; one base is required")
    names = short_names(files)
    counts = [[shared(one, other) for other in experts] for one in experts]
    print(f"experts of a layer that two tasks share, mean of {len(experts[0])} layers:")
    print(table(names, counts))
    if arguments.plot:
        draw(names, counts, arguments.plot)
        print(f"wrote {arguments.plot}")


def main() -> None:
    try:
        run(command_line().parse_args())
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
