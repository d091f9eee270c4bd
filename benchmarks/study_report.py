"""The tables and the figure of benchmarks/study.py, from its results.

    python benchmarks/study_report.py

Mean and standard deviation (n - 1) are over the seeds."""

import argparse
import math
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
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan


def score_cell(runs: list[dict], name: str) -> str:
    mean, deviation = spread(runs, name)
    return f" {mean:.3f} |" if math.isnan(deviation) else f" {mean:.3f} ± {deviation:.3f} |"


def mean_of_skills(run: dict, task: str) -> tuple[float, float]:
    """Returns the mean score of a task's rivals, and of the other skills."""
    skills = run["skills"]
    others = [value for skill, value in skills.items() if skill not in RIVALS[task]]
    return statistics.fmean(skills[name] for name in RIVALS[task]), statistics.fmean(others)


def table_of(results: dict) -> list[str]:
    """Returns the rows of the main table for one size."""
    tasks = list(dict.fromkeys(run["task"] for run in results["tested"]))
    seeds = {run["seed"] for run in results["tested"]}
    lines = [
        f"\n### {results['size']}: seeds {', '.join(map(str, sorted(seeds)))}; "
        f"bases pretrained: {results['bases']}\n",
        "| | trained | " + " | ".join(f"{t}: rate | task | general" for t in tasks) + " |",
        "|---|---|" + "---|---|---|" * len(tasks),
    ]
    line = "| before | |"
    for task in tasks:
        runs = of(results["before"], task=task, part="test")
        line += " |" + "".join(score_cell(runs, n) for n in SCORES)
    lines.append(line)
    for method in [m for m in NAMES if of(results["tested"], method=m)]:
        runs = of(results["tested"], method=method)
        share = statistics.fmean(r["trained_parameters"] / r["all_parameters"] for r in runs)
        line = f"| {NAMES[method]} | {share:.1%} |"
        for task in tasks:
            if not (seeds := of(runs, task=task)):
                line += " | | |"
                continue
            steps = f", {seeds[0]['steps']} steps" if method == "early" else ""
            line += f" {seeds[0]['learning_rate']:.3g}{edge_of(results, seeds[0])}{steps} |"
            line += "".join(score_cell(seeds, n) for n in SCORES)
        lines.append(line)
    return lines


def edge_of(results: dict, run: dict) -> str:
    """Returns a mark for a learning rate that is the lowest or highest of those that were tried."""
    tried = of(results["tuning"], task=run["task"], method=run["method"])
    rates = {other["learning_rate"] for other in tried}
    at_edge = len(rates) > 1 and run["learning_rate"] in (min(rates), max(rates))
    return " (edge)" if at_edge else ""


def tuning_of(results: dict) -> list[str]:
    """Returns the rows that say which rate the rule chose, and its scores on validation files."""
    lines, tuned = [], results.get("tuning", [])
    for task, method in dict.fromkeys((run["task"], run["method"]) for run in tuned):
        runs = of(tuned, task=task, method=method)
        if method != "early":  # what it is chosen by is the score of another method
            (run,) = of(runs, learning_rate=best(runs)[0])
            scores = " | ".join(f"{run[name]:.3f}" for name in SCORES)
            row = f"| {results['size']} | {task} | {NAMES[method]} |"
            lines.append(f"{row} {run['learning_rate']:.3g}{edge_of(results, run)} | {scores} |")
    return lines


def forgetting_of(results: dict) -> list[str]:
    """Returns the rows that say which skills lost how much, each base compared with itself."""
    lines = []
    for task in dict.fromkeys(run["task"] for run in results["tested"]):
        for method in [m for m in NAMES if of(results["tested"], task=task, method=m)]:
            lost = []
            for run in of(results["tested"], task=task, method=method):
                (base,) = of(results["before"], task=task, seed=run["seed"], part="test")
                rivals, others = (
                    before - after
                    for before, after in zip(mean_of_skills(base, task), mean_of_skills(run, task))
                )
                lost.append({"rivals": rivals, "others": others})
            cells = "".join(score_cell(lost, name) for name in ("rivals", "others"))
            lines.append(f"| {results['size']} | {task} | {NAMES[method]} |{cells}")
    return lines


def selections_of(results: dict) -> list[tuple[str, str, str]]:
    """Returns selection, verdict and row of each comparison with ESFT-Token."""
    found = []
    for task in dict.fromkeys(run["task"] for run in results["tested"]):
        token = {run["seed"]: run for run in of(results["tested"], task=task, method="token")}
        for method in VARIANTS:
            runs = of(results["tested"], task=task, method=method)
            if len(runs) < 2 or not token:
                continue
            gains = [{n: run[n] - token[run["seed"]][n] for n in SCORES} for run in runs]
            (on_task, _), (general, deviation) = (spread(gains, n) for n in SCORES)
            verdict = "as good"
            if general > deviation:
                verdict = "better"
            if general < -deviation or on_task < -TOLERANCE - 1e-9:
                verdict = "worse"
            row = (
                f"| {results['size']} | {task} | {NAMES[method]} | {on_task:+.3f} | "
                f"{general:+.3f} ± {deviation:.3f} | {verdict} |"
            )
            found.append((method, verdict, row))
    return found


def beats(method: str, compared: list[tuple[str, str, str]]) -> str:
    """Returns what the rule says of a selection, over all sizes and tasks."""
    verdicts = [verdict for name, verdict, _ in compared if name == method]
    better, worse = verdicts.count("better"), verdicts.count("worse")
    does = "beats" if better > len(verdicts) / 2 and not worse else "does not beat"
    return f"better on {better}, worse on {worse} of {len(verdicts)}; {does} ESFT-Token"


def text_of(studies: list[dict]) -> str:
    compared = [found for results in studies for found in selections_of(results)]
    lines = [
        "## Task and general score, test files\n",
        "(edge): the lowest or highest of the learning rates that were tried",
    ]
    for results in studies:
        lines += table_of(results)
    lines += [
        "\n## Which skills are forgotten\n",
        *(f"- rivals of {task}: {', '.join(skills)}" for task, skills in RIVALS.items()),
        "",
        "| base | task | method | rivals lose | others lose |",
        "|---|---|---|---|---|",
        *(line for results in studies for line in forgetting_of(results)),
        "\n## Selections with the parameters of ESFT-Token, less ESFT-Token\n",
        "| base | task | selection | task | general | |",
        "|---|---|---|---|---|---|",
        *(row for _, _, row in compared),
        "",
        *(f"- {NAMES[method]}: {beats(method, compared)}" for method in VARIANTS),
        "\n## Routing: of the 6 most used experts of a layer, how many two tasks share\n",
    ]
    pairs = list(dict.fromkeys(pair for r in studies for pair in r["routing"]["shared_of_6"]))
    lines += [f"| base | {' | '.join(pairs)} |", "|---|" + "---|" * len(pairs)]
    for results in studies:
        values = results["routing"]["shared_of_6"]
        cells = [f"{values[pair]:.2f}" if pair in values else "" for pair in pairs]
        lines.append(f"| {results['size']} | {' | '.join(cells)} |")
    lines.append("\n## Routing: the part of a task's tokens that its 6 most used experts get\n")
    for results in studies:
        held = results["routing"]["share_of_tokens_of_6"].items()
        said = ", ".join(f"{name} {value:.0%}" for name, value in held)
        lines.append(f"- {results['size']}: {said}")
    lines.append("\n## Seconds of each stage\n")
    for results in studies:
        stages = ", ".join(f"{name} {spent:.0f}" for name, spent in results["stages"].items())
        lines.append(f"- {results['size']}, {results['device']}: {stages}")
    return "\n".join(lines) + "\n"


def draw(studies: list[dict], path: Path) -> None:
    """Draws task against general score: a row a task. A line goes from the small to the large base
    of each method; a larger dot is a larger base. On the right stands the upper end again, without
    the selections of VARIANTS and the spread of the task score."""
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(run["task"] for r in studies for run in r["tested"]))
    figure = Figure(figsize=(12, 4.6 * len(tasks)), layout="constrained")
    panels = figure.subplots(len(tasks), 2, squeeze=False, width_ratios=(2, 3))
    for task, row in zip(tasks, panels):
        for colour, method in enumerate(NAMES):
            points = [
                [30 * 2.2**i, *(spread(runs, name) for name in SCORES)]
                for i, results in enumerate(studies)
                if (runs := of(results["tested"], task=task, method=method))
            ]
            if not points:
                continue
            areas, *both = zip(*points)
            (x, dx), (y, dy) = (tuple(zip(*column)) for column in both)
            style = {"color": f"C{colour}", "alpha": 0.8}
            for axes, dx in zip(row, (dx, None)):
                if method in VARIANTS and axes is row[1]:
                    continue
                axes.errorbar(x, y, dy, dx, "-", linewidth=1, label=NAMES[method], **style)
                axes.scatter(x, y, areas, **style)
        row[0].set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), ylabel=f"{task}: general score")
        row[1].set(xlim=(0.9, 1.004), ylim=(0.45, 1.0))
        for axes in row:
            axes.set_xlabel("task score")
            axes.grid(alpha=0.3)
    sizes = ", ".join(results["size"] for results in studies)
    figure.suptitle(f"After adaptation: a larger dot is a larger base ({sizes}); bars are ± 1 sd")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5)
    with replacing(path) as part:
        figure.savefig(part, format="png", dpi=80)


def report(folder: Path, sizes: list[str]) -> list[str]:
    """Prints the tables of the sizes that have results, draws the figure of those that are whole,
    and returns its file."""
    files = [folder / f"study_{size}.json" for size in sizes]
    studies = [read_json(path) for path in files if path.exists()]
    tuned = [line for results in studies for line in tuning_of(results)]
    if not tuned:
        raise SystemExit(f"{folder}: has no study_SIZE.json with runs; see benchmarks/study.py")
    print("## Chosen learning rates: scores on the validation files, first seed\n")
    print("| base | task | method | rate | task | general |\n|---|---|---|---|---|---|")
    print("\n".join(tuned), "\n", sep="")
    studies = [results for results in studies if results.get("tested")]
    if not studies:
        print("no study is whole: run python benchmarks/study.py again, it goes on")
        return []
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
