"""`gradient_checkpointing`: which layers run again in backward, so that their activations need not
be kept. "auto": as few as let a step fit the device. These are the first ones: when backward comes
to them, the activations of the later ones are freed, and running them again costs nothing at the
peak. The number changes no bit of a result."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from files import read_json
from model import RunBlock, Transformer, checkpointed
from processes import SingleProcess
from training.cards import beside, fewest_layers
from training.config import TrainConfig
from training.directory import RunDirectory
from training.host_optimizer import available_bytes, host_bytes
from training.inputs import Inputs
from training.plan import model_of_rank, peak_of_step, weight_bytes
from training.table import size_text


def first_checkpointed(run_block: RunBlock, model: Transformer, count: int) -> RunBlock:
    """Returns a `run_block` that runs the first `count` blocks again in backward."""
    first, again = set(model.model.layers[:count]), checkpointed(run_block)
    return lambda block, *args: (again if block in first else run_block)(block, *args)


def settle_checkpointing(
    config: TrainConfig,
    inputs: Inputs,
    expert_cfg: dict | None,
    output: RunDirectory,
    compute_gradients: Callable,
) -> TrainConfig:
    """Returns the config with a number of layers in place of "auto". It is the largest that a rank
    needs, and is kept in a file, so that a run goes on with it."""
    if config.gradient_checkpointing != "auto":
        return config
    base, ranks = inputs.base_config, output.ranks

    def settle() -> int:
        found = ranks.on_all(layers_needed, config, inputs, expert_cfg, ranks, compute_gradients)
        layers, why = max(ranks.from_all(found))
        if layers or config.device.startswith("cuda"):
            count = base.num_hidden_layers
            print(f"{layers} of {count} layers run again in backward: {why}", flush=True)
        return layers

    def read(path: Path) -> int | None:
        layers = read_json(path)
        return layers if type(layers) is int and 0 <= layers <= base.num_hidden_layers else None

    layers = output.once("checkpointed_layers.json", settle, read)
    return replace(config, gradient_checkpointing=layers)


def layers_needed(
    config: TrainConfig,
    inputs: Inputs,
    expert_cfg: dict | None,
    ranks: SingleProcess,
    compute_gradients: Callable,
) -> tuple[int, str]:
    """Returns how many layers must run again so that this rank's step fits, and why; all if it does
    not fit."""
    model, trained = model_of_rank(config, inputs.base_config, expert_cfg, ranks)
    peak = peak_of_step(config, model, trained, ranks, compute_gradients)
    host = host_bytes(trained, ranks) if config.optimizer_device else 0
    room = memory_of_process(config.device, model) - beside(config.device, host)
    count = inputs.base_config.num_hidden_layers
    layers = fewest_layers(peak, count, room)
    where = "GPU" if config.device.startswith("cuda") else "machine"
    need = f"a step needs {size_text(peak(layers))}; this {where} has {size_text(max(room, 0))}"
    if peak(layers) > room:
        return layers, f"even so, {need} for it, and --plan shows what makes it less"
    more = f" (all layers: {size_text(peak(count))})" if 0 < layers < count else ""
    return layers, f"{need} for it{more}"


def memory_of_process(device: str, model: Transformer) -> float:
    """Returns the bytes of the device that this process may fill: what is free and what it holds,
    on a CPU this model's weights."""
    if device.startswith("cuda"):
        index = torch.device(device).index
        free, total = torch.cuda.mem_get_info(index)
        allowed = torch.cuda.get_per_process_memory_fraction(index) * total
        return min(free + torch.cuda.memory_reserved(index), allowed)
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return available_bytes() / ranks + weight_bytes(model)
