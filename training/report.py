"""What a run prints, and the report at its end: the start's table, a line a step, report.txt and
report.png. Nothing here changes a run."""

import importlib.util
import resource
import shlex
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from data import first_sample
from files import read_json, replacing, write_text
from pictures import Scores, draw_scores, heat_map_text
from select_experts import read_scores
from training.config import TrainConfig
from training.directory import read_metrics
from training.evaluation import answer_lines, print_heading, quality_lines
from training.inputs import Inputs

KINDS = {  # part of a parameter's name -> what it belongs to; the first that fits counts
    ".lora_": "low-rank updates",
    ".mlp.experts.": "routed experts",
    ".mlp.shared_experts.": "shared experts",
    ".mlp.gate.": "router",
    ".self_attn.": "attention",
    ".mlp.": "dense layers",
    "norm": "norms",
    "": "embedding and head",
}


def print_start(
    config: TrainConfig,
    inputs: Inputs,
    expert_cfg: dict | None,
    trained: dict[str, Tensor],
    step: int,
) -> None:
    """Prints what is trained, and on how much data. `trained` are parameters of inputs.whole, to
    which LoRA's matrices were added."""
    print_heading("training")
    counts: dict[str, list[int]] = {}
    parameters = {n: p for n, p in inputs.whole.named_parameters() if ".lora_" not in n} | trained
    for name, p in parameters.items():
        kind = next(kind for part, kind in KINDS.items() if part in name)
        count = counts.setdefault(kind, [0, 0])
        count[0] += p.numel()
        count[1] += p.numel() if name in trained else 0
    print(f"{'':<20} {'parameters':>15} {'trained':>15}")
    for kind, (total, of_them) in counts.items():
        print(f"{kind:<20} {total:>15,} {of_them:>15,}{'' if of_them else '   frozen'}")
    what = f"LoRA of rank {config.lora_rank}"
    if expert_cfg is not None:
        chosen = sum(map(len, expert_cfg["experts"].values()))
        experts = len(inputs.base_config.moe_layers) * inputs.base_config.n_routed_experts
        what = f"{chosen} of {experts} routed experts"
    count, total = sum(p.numel() for p in trained.values()), inputs.base_parameters
    print(f"trains {count:,} parameters, {count / total:.1%} of the base's {total:,}; {what}")
    alpha = config.balance_weight(inputs.base_config)
    source = "the checkpoint's config" if config.aux_loss_alpha is None else "aux_loss_alpha"
    print(f"load balance loss x {alpha:g} ({source})" + ("" if alpha else ": none"))
    print(
        f"data: {len(inputs.rows.tokens):,} rows of {config.seq_length} tokens, and "
        f"{len(inputs.held_out.tokens) if inputs.held_out else 0} for validation; "
        f"{config.steps} steps of {config.batch_size} rows are "
        f"{config.steps * config.batch_size / len(inputs.rows.tokens):,.3g} epochs"
    )
    first = tuple(part[-config.seq_length :] for part in inputs.samples[0])  # as `pack` cuts it
    print(first_sample([first], inputs.tokenizer))
    if step:
        print(f"continues after step {step}")
    if config.compile and step < config.steps:
        print("the first step compiles the layers, for 10 to 60 seconds", flush=True)


def print_step(config: TrainConfig, record: dict) -> None:
    step, validated = record["step"], "validation_loss" in record
    if step % config.log_steps and step not in (1, config.steps) and not validated:
        return
    line = (
        f"step {step:>5}/{config.steps}  loss {record['loss']:.4f}  "
        f"lr {record['learning_rate']:.1e}  norm {record['grad_norm']:.2f}  "
        f"{record['tokens_per_second']:,} tokens/s  {record['memory_gib']:.2f} GiB  "
        f"{record['seconds_left'] / 60:.1f} min left"
    )
    if validated:
        line += f"  validation {record['validation_loss']:.4f}"
    print(line, flush=True)


class Clock:
    """Measures what a step took, and estimates what is left to do. Steps count from 1; `first` is
    the first one of this process."""

    def __init__(self, config: TrainConfig, first: int):
        self.config, self.first, self.begun = config, first, time.perf_counter()

    def measure(self, step: int, step_begun: float) -> dict:
        """Returns tokens_per_second of the step alone, memory_gib, the peak so far, and
        seconds_left, which includes validation and checkpoints."""
        config, now = self.config, time.perf_counter()
        tokens = config.batch_size * config.seq_length
        left = (config.steps - step) * (now - self.begun) / max(step - self.first, 1)
        if step == self.first:  # it compiles and warms up: it says nothing of the others
            self.begun = now
        return {
            "tokens_per_second": round(tokens / (now - step_begun)),
            "memory_gib": round(peak_memory(config.device) / 2**30, 2),
            "seconds_left": round(left, 2),
        }


def peak_memory(device: str) -> int:
    """Returns bytes: the most that tensors took on a GPU; on a CPU, the most of the process."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def report(config: TrainConfig) -> list[str]:
    """Writes report.txt, and report.png where matplotlib is installed, from what the finished run
    left in output_dir. Returns what it wrote."""
    output = Path(config.output_dir)
    results = read_json(output / "results.json")
    metrics = read_metrics(output / "metrics.jsonl", results["steps"])
    files = ("expert_cfg.scores.json", "scores_after.json")
    scores = [read_scores(output / name, config.score) for name in files]
    experts = {}
    if config.method != "lora":
        experts = read_json(output / "expert_cfg.json")["experts"]
    write_text(output / "report.txt", report_text(config, results, metrics, scores, experts))
    if importlib.util.find_spec("matplotlib") is None:
        print(f"\n{heat_map_text(scores[0], config.score, experts)}")
        again = "the same command without --overwrite" if config.overwrite else "the same command"
        print(f"for a picture: pip install matplotlib, and run {again} again")
        return ["report.txt"]
    draw_report(config, metrics, scores, experts, output / "report.png")
    return ["report.txt", "report.png"]


def report_text(
    config: TrainConfig, results: dict, metrics: list[dict], scores: list[Scores], experts: dict
) -> str:
    trained, total = results["trained_parameters"], results["all_parameters"]
    lines = [
        f"{config.method} on {config.data}, from {config.model}: {config.steps} steps, learning "
        f"rate {results['learning_rate']:g}, seed {config.seed}",
        "",
        f"trained    {trained:,} of {total:,} parameters ({trained / total:.1%})",
        f"on disk    adapter {results['adapter_bytes'] / 2**20:.1f} MiB",
        f"time       {results['seconds'] / 60:.1f} minutes",
        "",
        *quality_lines(results),
        "",
        f"{'step':>6} {'training loss':>14} {'validation':>11}",
    ]
    since: list[float] = []
    for record in metrics:
        since.append(record["loss"])
        validated = record.get("validation_loss")
        if validated is not None or record is metrics[-1]:
            shown = f"{validated:>11.4f}" if validated is not None else ""
            best = "  the adapter" if validated == results["best_validation_loss"] else ""
            mean = sum(since) / len(since)
            lines.append(f"{record['step']:>6} {mean:>14.4f} {shown}{best if shown else ''}")
            since = []
    what, columns = "", ""
    if experts:  # LoRA selects none
        what = ", what the selected experts have of it before and after training"
        columns = f" {'selected':>9} {'before':>7} {'after':>7}"
    lines += ["", f"routing on at most {config.scored_tokens:,} tokens of the task:"]
    lines += [f"a layer's {config.score} score{what},"]
    lines += ["and how much of it training moved from some experts to others"]
    lines += [f"{'layer':>5}{columns} {'moved':>7}"]
    before, after = (s[f"{config.score}_scores"] for s in scores)
    for layer in sorted(before, key=int):
        chosen = [str(e) for e in experts.get(layer, [])]
        moved = sum(abs(after[layer][e] - score) for e, score in before[layer].items()) / 2
        held = [f"{sum(s[layer][e] for e in chosen):>7.3f}" for s in (before, after)]
        shown = f" {len(chosen):>9} {' '.join(held)}" if experts else ""
        lines.append(f"{layer:>5}{shown} {moved:>7.3f}")
    lines += ["", heat_map_text(scores[0], config.score, experts)]
    return "\n".join(lines) + "\n"


def draw_report(
    config: TrainConfig, metrics: list[dict], scores: list[Scores], experts: dict, path: Path
) -> None:
    """Draws the losses, the scores with the selected experts marked, and their change."""
    from matplotlib.figure import Figure

    before, after = (s[f"{config.score}_scores"] for s in scores)
    layers = sorted(before, key=int)
    figure = Figure(figsize=(12, 8 + 0.3 * len(layers)), layout="constrained")
    losses, map_before, change = figure.subplots(3, 1, height_ratios=[3, 2, 2])
    steps = [record["step"] for record in metrics]
    losses.plot(steps, [record["loss"] for record in metrics], label="training")
    validated = [record for record in metrics if "validation_loss" in record]
    if validated:
        points = [[r["step"] for r in validated], [r["validation_loss"] for r in validated]]
        losses.plot(*points, "o-", label="validation")
    losses.set(xlabel="step", ylabel="loss", title=f"{config.method} on {config.data}")
    losses.legend()
    draw_scores(map_before, scores[0], config.score, experts)
    changes = [[after[i][e] - before[i][e] for e in sorted(before[i], key=int)] for i in layers]
    most = max(abs(value) for row in changes for value in row) or 1.0
    image = change.imshow(changes, aspect="auto", cmap="RdBu", vmin=-most, vmax=most)
    change.set_yticks(range(len(layers)), layers)
    change.set(xlabel="expert", ylabel="layer", title="change of the score by training")
    figure.colorbar(image, ax=change)
    with replacing(path) as part:
        figure.savefig(part, format="png", dpi=120)


def print_results(config: TrainConfig, results: dict, reports: list[str]) -> None:
    output = Path(config.output_dir)
    trained, size = results["trained_parameters"], results["adapter_bytes"] / 2**20
    share, minutes = trained / results["all_parameters"], results["seconds"] / 60
    print_heading("results")
    print("\n".join([*quality_lines(results), *answer_lines(config)]))
    losses = [r["loss"] for r in read_metrics(output / "metrics.jsonl", results["steps"])]
    part = max(len(losses) // 10, 1)
    first, last = sum(losses[:part]) / part, sum(losses[-part:]) / part
    if len(losses) > 1 and last > 0.95 * first:
        rate = f"a larger learning_rate than {results['learning_rate']:g}, or more steps, may help"
        print(f"the training loss hardly fell, from {first:.3f} to {last:.3f}: {rate}")
    cost = f"adapter {size:.1f} MiB, {minutes:.1f} minutes"
    print(f"{results['method']}: trained {trained:,} parameters ({share:.1%}), {cost}")
    print(f"wrote {output}/: adapter/, {', '.join(reports)}, metrics.jsonl, eval/, results.json")
    changes = ["--model_config", *config.model_config] if config.model_config else []
    files = shlex.join(["--model", config.model, "--adapter", f"{output}/adapter", *changes])
    form = f" --chat_format {config.chat_format}" if config.chat_format else ""
    print(f"next: python generate.py {files}{form}    # talk to it")
    print(f"      {output}/{reports[-1]}    # look at it")
    print(f"      python merge.py {files} --output MERGED    # for other programs")
