"""What a run needs in memory, without loading it: `--plan`. What a step allocates is counted in
rehearsal.py; which ranks there are comes from train_ep.py."""

import re
import sys
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from adapter import everything, read_expert_cfg
from checkpoint import build_model, local_directory
from data import micro_batches
from families import read_config
from fast.packed import QUANTIZATIONS, memory
from files import read_json
from model import ModelConfig, Transformer
from processes import SingleProcess
from select_experts import SelectionConfig
from training.cards import (
    choice_lines,
    command_lines,
    fits,
    layers_of,
    memory_here,
    need_of,
    ordered_choices,
    rank_lines,
)
from training.config import TrainConfig
from training.exchange import exchange_lines
from training.host_optimizer import host_bytes
from training.optimizer import mark_trained, own_part, wholes
from training.rehearsal import inference_bytes, step_bytes
from training.table import size_text, table_row

ASSUMED_SHARE = 0.075  # of the experts; the published selection for intent: 124 of 1,664


def planned_experts(config: TrainConfig, model_config: ModelConfig) -> tuple[dict | None, str]:
    """Returns the expert_cfg that a run would train, and where it comes from."""
    if config.method == "lora":
        return None, f"LoRA of rank {config.lora_rank}"
    if config.method == "full":
        return everything(model_config), "everything"
    path = config.expert_config or selection_of_this_run(config)
    if path:
        return read_expert_cfg(path, model_config), f"the experts of {path}"
    E = model_config.n_routed_experts
    count = max(round(ASSUMED_SHARE * E), 1)
    chosen = [i * E // count for i in range(count)]
    expert_cfg = {
        "experts": {str(layer): chosen for layer in model_config.moe_layers},
        "shared_experts": config.shared_experts,
        "non_expert_modules": config.non_expert_modules,
    }
    return expert_cfg, f"{count} of {E} experts a layer, assumed: they are not selected yet"


def selection_of_this_run(config: TrainConfig) -> Path | None:
    """Returns the file with the selection of a run with these keys, if one came so far."""
    output = Path(config.output_dir)
    if config.overwrite or not (output / "expert_cfg.json").exists():
        return None
    saved = {"model_config": [], "quantize": "", **read_json(output / "train_config.json")}
    mine = asdict(config)
    keys = {f.name for f in fields(SelectionConfig)} - {"device"} | {"method", "expert_config"}
    same = all(saved.get(name) == mine[name] for name in keys)
    return output / "expert_cfg.json" if same else None


def model_of_rank(
    config: TrainConfig, model_config: ModelConfig, expert_cfg: dict | None, ranks: SingleProcess
) -> tuple[Transformer, dict[str, Tensor]]:
    """Returns a rank's model without data, and its trained parameters."""
    dtype = getattr(torch, config.dtype)
    model = build_model(model_config, "meta", dtype, config.experts, ranks.split, config.quantize)
    return model, mark_trained(config, model, expert_cfg)


def peak_of_step(
    config: TrainConfig,
    model: Transformer,
    trained: dict[str, Tensor],
    ranks: SingleProcess,
    compute_gradients: Callable,
) -> Callable[[int], int]:
    """Returns a function: how many layers run again in backward -> bytes at the peak of a step. It
    rehearses each number once."""
    held = sum(held_bytes(config, model, trained, ranks).values())

    @cache
    def peak(layers: int) -> int:
        rehearsed = replace(config, gradient_checkpointing=layers)
        return held + step_bytes(rehearsed, model, trained, ranks, compute_gradients)

    return peak


def held_bytes(
    config: TrainConfig, model: Transformer, trained: dict[str, Tensor], ranks: SingleProcess
) -> dict[str, int]:
    """Returns the bytes that the device holds between steps."""
    count = 0 if config.optimizer_device else own_elements(trained, ranks)
    return {
        "weights": weight_bytes(model),
        "masters": 0 if config.dtype == "float32" else 4 * count,  # float32 weights are masters
        "moments": 8 * count,
        "buffers": ranks.buffers if config.device.startswith("cuda") else 0,
    }


def own_elements(trained: dict[str, Tensor], ranks: SingleProcess) -> int:
    """Returns how many elements this rank updates of what is trained."""
    return sum(p.numel() for p in own_part(wholes(trained), ranks).values())


def plan_rank(
    config: TrainConfig,
    model_config: ModelConfig,
    expert_cfg: dict | None,
    ranks: SingleProcess,
    compute_gradients: Callable,
) -> dict:
    """Returns what a rank holds and needs, in parameters and bytes."""
    model, trained = model_of_rank(config, model_config, expert_cfg, ranks)
    count = sum(p.numel() for p in trained.values())
    batches = micro_batches(config.batch_size, config.micro_batch, 0, ranks.world_size)
    layers, held = model.config.num_hidden_layers, held_bytes(config, model, trained, ranks)
    peak = peak_of_step(config, model, trained, ranks, compute_gradients)
    need = held | {
        "micro-batches": f"{len(batches)} of {len(batches[0])} rows",
        "held": sum(p.numel() for p in model.parameters()),
        "trained": count,
        "gradients": 0 if config.optimizer_device else 4 * own_elements(trained, ranks),
        "host": host_bytes(trained, ranks) if config.optimizer_device else 0,
        "layers": layers,
        "peak": peak,
    }
    fixed = sum(held.values())
    if ranks.world_size == 1:  # ranks share such a pass, and each one's part of it is small
        need["peak", "inference"] = fixed + inference_bytes(config, model)
    for checkpointing, again in ((True, layers), (False, 0)):
        need["activations", checkpointing] = max(peak(again) - fixed - need["gradients"], 0)
        need["peak", checkpointing] = peak(again)
    return need


def weight_bytes(model: Transformer) -> int:
    return sum(x.untyped_storage().nbytes() for x in memory(model))


def plan_choices(
    config: TrainConfig,
    model_config: ModelConfig,
    expert_cfg: dict | None,
    ranks: SingleProcess,
    compute_gradients: Callable,
) -> dict[tuple[str, str], dict]:
    """Returns `plan_rank` for each quantize and optimizer_device that the config can have. Steps
    are rehearsed with unpacked experts only: packed ones differ in the weights, not in the step."""
    # Beside a CPU the optimizer is in host memory anyway.
    places = ("", "cpu") if config.device.startswith("cuda") else (config.optimizer_device,)
    needs = {}
    for place in places:
        placed = replace(config, optimizer_device=place, quantize="")
        needs["", place] = plan_rank(placed, model_config, expert_cfg, ranks, compute_gradients)
    for kind in QUANTIZATIONS if config.method == "esft" else ():
        packed = replace(config, quantize=kind)
        try:
            model, _ = model_of_rank(packed, model_config, expert_cfg, ranks)
        except ValueError:  # its sizes cannot be packed so
            if kind == config.quantize:
                raise
            continue
        for place in places:
            needs[kind, place] = with_weights(needs["", place], weight_bytes(model))
    return needs


def with_weights(need: dict, weights: int) -> dict:
    more = weights - need["weights"]
    peaks = {key: need[key] + more for key in need if key[0] == "peak"}
    return need | peaks | {"weights": weights, "peak": lambda layers: need["peak"](layers) + more}


def plan(
    config: TrainConfig,
    compute_gradients: Callable,
    rehearse: Callable[[ModelConfig, dict | None], list] | None = None,
    given: dict | None = None,
) -> str:
    """Returns tables of what the run needs, from the checkpoint's config.json alone. `rehearse`
    returns the ranks of each column for the base's config and an expert_cfg; without it there is
    one process, and `given` are the flags of its command line."""
    if not re.fullmatch(r"cpu|cuda(:\d+)?", config.device):
        raise ValueError(f"device is {config.device!r}; must be cpu or cuda")
    try:
        base = local_directory(config.model, files=["config.json"])
    except FileNotFoundError as error:
        folders = "--model configs/DeepSeek-V2-Lite or configs/DeepSeek-V3"
        raise FileNotFoundError(f"{error}; a plan reads config.json alone: {folders}") from None
    only_config = base == Path(config.model) and not any(base.glob("*.safetensors"))
    model_config = read_config(base, config.model_config)
    model_config.check_row(config.seq_length, "seq_length")
    expert_cfg, what = planned_experts(config, model_config)
    said = f"rehearses steps of {model_config.num_hidden_layers} layers without data"
    print(f"{said}: this takes seconds, or minutes with large models", file=sys.stderr)
    columns = rehearse(model_config, expert_cfg) if rehearse else [SingleProcess()]
    whole = build_model(model_config, "meta")
    total = sum(p.numel() for p in whole.parameters())
    trained = mark_trained(config, whole, expert_cfg)
    if not trained:
        raise ValueError(f"{config.expert_config}: selects nothing to train")
    progress = tqdm(columns, desc="plan", unit="column", leave=False, disable=None)
    given_to_all = config, model_config, expert_cfg
    planned = [plan_choices(*given_to_all, ranks, compute_gradients) for ranks in progress]
    needs = [needs[config.quantize, config.optimizer_device] for needs in planned]
    choices = [ordered_choices(needs) for needs in planned]
    if rehearse:
        advice = rank_lines(config, columns, planned)
        advice += exchange_lines(config, model_config, columns)
        following = "torchrun --nproc-per-node RANKS train_ep.py with these keys, without --plan"
    else:
        advice = command_lines(config, planned[0], given or {})
        following = "one of the commands above"
    count = sum(p.numel() for p in trained.values())
    adapter = size_text(count * getattr(torch, config.dtype).itemsize)
    steps = f"{config.batch_size} rows of {config.seq_length} tokens"
    lines = [
        f"{config.model}, {total:,} parameters, {config.dtype}; {config.method}: {what}",
        f"steps of {steps}; device {config.device}",
        "",
        *table(config, columns, needs),
        *choice_lines(config, columns, choices),
        "* this config"
        + "; auto: its peak is between these two lines" * (config.gradient_checkpointing == "auto"),
        *advice,
        "",
        f"on disk: adapter {adapter}; each checkpoint to continue from {size_text(count * 12)}, of "
        "which two are kept and a third is written",
        f"nothing was loaded or written; next: {following}"
        + ", with a whole checkpoint as --model" * only_config,
    ]
    return "\n".join(lines)


def table(config: TrainConfig, columns: list, needs: list[dict]) -> list[str]:
    """Returns the lines of a plan that have a column for each number of ranks."""

    def gib(label: str, name) -> str:
        return table_row(label, [size_text(need[name]) for need in needs])

    lines = [
        table_row("ranks", [each.world_size for each in columns]),
        table_row("micro-batches of a step", [need["micro-batches"] for need in needs]),
        table_row("parameters held", [f"{need['held']:,}" for need in needs]),
        table_row("  trained", [f"{need['trained']:,}" for need in needs]),
        table_row("  frozen", [f"{need['held'] - need['trained']:,}" for need in needs]),
        gib(f"weights, {config.quantize or config.dtype}", "weights"),
        gib("master weights, float32", "masters"),
        gib("AdamW's moments, float32", "moments"),
        gib("gradients, float32", "gradients"),
    ]
    if any(need["buffers"] for need in needs):
        lines.append(gib("NCCL's buffers", "buffers"))
    if all(each.world_size == 1 for each in columns):
        what = "scoring, evaluation at least" if config.eval_sets else "scoring"
        lines.append(gib(f"peak of {what}", ("peak", "inference")))
    for checkpointing, said in ((True, "with"), (False, "without")):
        used = " *" if checkpointing == config.gradient_checkpointing else ""
        peaks = [need_of(need, checkpointing) for need in needs]
        lines += [
            f"{said} gradient checkpointing:{used}",
            gib("  activations and what else a step holds", ("activations", checkpointing)),
            gib("  peak of a step", ("peak", checkpointing)),
            table_row("  fits", [fits(config.device, peak) for peak in peaks]),
        ]
    if config.gradient_checkpointing == "auto":
        for size in memory_here(config.device).values():
            layers, peaks = zip(*[layers_of(need, config.device, size) for need in needs])
            lines.append(table_row("gradient_checkpointing auto, on this device: *", layers))
            lines.append(table_row("  peak of a step", map(size_text, peaks)))
    if config.optimizer_device:
        lines.append(gib("host memory of the optimizer", "host"))
    return lines
