"""The tables and the figure of benchmarks/study.py, from its results.

    python benchmarks/study_report.py

Mean and standard deviation (n - 1) are over the seeds."""

import argparse
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from files import read_json, replacing  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
TOLERANCE = 0.02  # of the task score
# Skills whose inputs or whose answers' format a task shares.
RIVALS = {"intent": ("parse", "json"), "order": ("translate",), "sum": ("add",)}
NAMES = {
    "token": "ESFT-Token, p = 0.2",
    "gate": "ESFT-Gate, p = 0.1",
    "random": "random experts",
    "lowest": "lowest experts",
    "even": "same number in every layer",
    "gradient": "gradient times weight",
    "relative": "gate, relative to general data",
    "lora": "LoRA, rank 8, scaling 2",
    "full": "full fine-tuning",
    "early": "full, ended early",
}
SCORES = ("task_score", "general_score")
VARIANTS = ("even", "gradient", "relative")  # with the parameters of token


def of(entries: list[dict], **fields) -> list[dict]:
    return [e for e in entries if all(e[name] == value for name, value in fields.items())]


def best(runs: list[dict], least: float = 1.0) -> tuple[float, int]:
    """Returns the learning rate and steps of the run with the best general score, of those whose
    task score is within TOLERANCE of the best one, or of `least` if that is lower."""
    floor = min(least, max(run["task_score"] for run in runs)) - TOLERANCE
    good = [run for run in runs if run["task_score"] >= floor - 1e-9]
    run = max(good, key=lambda run: run["general_score"])
    return run["learning_rate"], run["steps"]


def spread(runs: list[dict], name: str) -> tuple[float, float]:
    """Returns mean and standard deviation of a score."""
    values = [run[name] for run in runs]
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def score_cell(runs: list[dict], name: str) -> str:
    mean, deviation = spread(runs, name)
    return f" {mean:.3f} ± {deviation:.3f} |"


def mean_of_skills(runs: list[dict], task: str) -> tuple[float, float]:
    """Returns the mean score of a task's rivals, and of the other skills."""
    pairs = [(skill in RIVALS[task], v) for run in runs for skill, v in run["skills"].items()]
    rivals, others = ([v for is_rival, v in pairs if is_rival == kind] for kind in (True, False))
    return statistics.fmean(rivals), statistics.fmean(others)


def table_of(results: dict) -> list[str]:
    """Returns the rows of the main table for one size."""
    tasks = list(dict.fromkeys(run["task"] for run in results["testing"]))
    seeds = {run["seed"] for run in results["testing"]}
    lines = [
        f"\n### {results['size']}, {len(seeds)} seeds, {results['bases']} bases\n",
        "| | trained | " + " | ".join(f"{t}: rate | task | general" for t in tasks) + " |",
        "|---|---|" + "---|---|---|" * len(tasks),
    ]
    line = "| before | |"
    for task in tasks:
        runs = of(results["before"], task=task, part="test")
        line += " |" + "".join(score_cell(runs, n) for n in SCORES)
    lines.append(line)
    for method in [m for m in NAMES if of(results["testing"], method=m)]:
        runs = of(results["testing"], method=method)
        share = statistics.fmean(r["trained_parameters"] / r["all_parameters"] for r in runs)
        line = f"| {NAMES[method]} | {share:.1%} |"
        for task in tasks:
            seeds = of(runs, task=task)
            run = seeds[0]
            steps = f", {run['steps']} steps" if method == "early" else ""
            line += f" {run['learning_rate']:.2g}{steps} |"
            line += "".join(score_cell(seeds, n) for n in SCORES)
        lines.append(line)
    return lines


def forgetting_of(results: dict) -> list[str]:
    """Returns the rows that say which skills lost how much."""
    lines = []
    for task in dict.fromkeys(run["task"] for run in results["testing"]):
        bases = of(results["before"], task=task, part="test")
        before = mean_of_skills(bases, task)
        for method in ("token", "full", "lora"):
            runs = of(results["testing"], task=task, method=method)
            if not runs:
                continue
            lost = [b - after for b, after in zip(before, mean_of_skills(runs, task))]
            count = len(RIVALS[task])
            total = lost[0] * count + lost[1] * (10 - count)
            part = f"{lost[0] * count / total:.0%}" if total > 0.05 else "-"
            lines.append(
                f"| {results['size']} | {task} | {NAMES[method]} | {', '.join(RIVALS[task])} | "
                f"{lost[0]:.3f} | {lost[1]:.3f} | {part} |"
            )
    return lines


def selections_of(results: dict) -> list[str]:
    """Returns the rows that compare each selection with ESFT-Token's."""
    lines = []
    for task in dict.fromkeys(run["task"] for run in results["testing"]):
        for method in VARIANTS:
            if not of(results["testing"], task=task, method=method):
                continue
            ours, theirs = (
                {n: spread(of(results["testing"], task=task, method=m), n) for n in SCORES}
                for m in ("token", method)
            )
            gains = {n: theirs[n][0] - ours[n][0] for n in ours}
            noise = ours["general_score"][1] + theirs["general_score"][1]
            verdict = "as good"
            if gains["general_score"] > noise and gains["task_score"] >= -TOLERANCE:
                verdict = "better"
            if gains["general_score"] < -noise or gains["task_score"] < -TOLERANCE:
                verdict = "worse"
            lines.append(
                f"| {results['size']} | {task} | {NAMES[method]} | {gains['task_score']:+.3f} | "
                f"{gains['general_score']:+.3f} | {noise:.3f} | {verdict} |"
            )
    return lines


def text_of(studies: list[dict]) -> str:
    lines = ["## Task and general score, test files"]
    for results in studies:
        lines += table_of(results)
    lines += [
        "\n## Which skills are forgotten\n",
        "| base | task | method | rivals | they lose | others lose | rivals' part of the loss |",
        "|---|---|---|---|---|---|---|",
        *(line for results in studies for line in forgetting_of(results)),
        "\n## Selections with the parameters of ESFT-Token, less ESFT-Token\n",
        "| base | task | selection | task | general | both deviations | |",
        "|---|---|---|---|---|---|---|",
        *(line for results in studies for line in selections_of(results)),
        "\n## Routing: of the 6 most used experts of a layer, how many two tasks share\n",
    ]
    pairs = list(studies[0]["routing"]["shared_of_6"])
    lines += [f"| base | {' | '.join(pairs)} |", "|---|" + "---|" * len(pairs)]
    for results in studies:
        values = results["routing"]["shared_of_6"].values()
        lines.append(f"| {results['size']} | {' | '.join(f'{v:.2f}' for v in values)} |")
    lines.append("\n## Seconds of each stage\n")
    for results in studies:
        stages = ", ".join(f"{name} {spent:.0f}" for name, spent in results["stages"].items())
        lines.append(f"- {results['size']}, {results['device']}: {stages}")
    return "\n".join(lines) + "\n"


def draw(studies: list[dict], path: Path) -> None:
    """Draws task against general score: a panel a task, a line from the small to the large base for
    each method, a larger dot for a larger base."""
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(run["task"] for run in studies[0]["testing"]))
    figure = Figure(figsize=(5 * len(tasks), 5.6), layout="constrained")
    panels = figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0]
    for task, axes in zip(tasks, panels):
        for colour, method in enumerate(NAMES):
            points = [
                [spread(runs, name) for name in SCORES]
                for results in studies
                if (runs := of(results["testing"], task=task, method=method))
            ]
            if not points:
                continue
            (x, dx), (y, dy) = (tuple(zip(*column)) for column in zip(*points))
            style = {"color": f"C{colour}", "alpha": 0.8}
            axes.errorbar(x, y, dy, dx, "-", linewidth=1, label=NAMES[method], **style)
            axes.scatter(x, y, [30 * 2.2**i for i in range(len(x))], **style)
        axes.set(title=task, xlabel="task score", xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("general score")
    sizes = ", ".join(results["size"] for results in studies)
    figure.suptitle(f"After adaptation: a larger dot is a larger base ({sizes})")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5)
    with replacing(path) as part:
        figure.savefig(part, format="png", dpi=100)


def report(folder: Path, sizes: list[str]) -> list[str]:
    """Prints the tables of the sizes that have results, draws the figure, and returns its file."""
    files = [folder / f"study_{size}.json" for size in sizes]
    studies = [read_json(path) for path in files if path.exists()]
    studies = [results for results in studies if results.get("testing")]
    if not studies:
        raise SystemExit(f"{folder}: has no study_SIZE.json; run python benchmarks/study.py")
    print(text_of(studies))
    draw(studies, folder / "study.png")
    print(f"wrote {folder / 'study.png'}")
    return [str(folder / "study.png")]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", default=str(RESULTS), help="folder of study_SIZE.json")
    folder = Path(parser.parse_args().results)
    report(folder, ["4M", "26M", "118M"])


if __name__ == "__main__":
    main()
