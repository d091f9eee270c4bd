"""expert_cfg -> which parameters are trained -> what is saved, loaded and swapped.

An adapter is a directory in the published ESFT format: expert_cfg.json, and safetensors with the
trained tensors under the checkpoint's names. Adapters in PEFT's format are read by lora.py, and are
swapped here."""

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from checkpoint import local_directory
from families import file_prefix
from fast import StackedExperts
from fast.packed import PackedExperts
from files import read_json, replacing, write_json
from lora import attach_lora, lora_parameters, remove_lora
from model import ModelConfig, Transformer
from peft_format import StoredLora, check_base, read_lora, selected_tensors
from stored_tensors import StoredTensor


def read_expert_cfg(path: str | Path, config: ModelConfig) -> dict:
    """Returns an expert_cfg.json, checked against the model's config. Raises ValueError that names
    the file."""
    expert_cfg = read_json(path)
    try:
        check_expert_cfg(expert_cfg, config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return expert_cfg


def check_expert_cfg(expert_cfg: dict, config: ModelConfig) -> None:
    """Raises ValueError unless all layers are MoE layers of the model that have these experts."""
    if not isinstance(expert_cfg, dict) or not isinstance(expert_cfg.get("experts"), dict):
        raise ValueError(
            'must be {"experts": {"LAYER": [EXPERT, ...]}, "shared_experts": BOOL, '
            '"non_expert_modules": BOOL}'
        )
    for name in ("shared_experts", "non_expert_modules"):
        if type(expert_cfg.get(name, False)) is not bool:
            raise ValueError(f"{name} is {expert_cfg[name]!r}; must be true or false")
    layers, E = list(map(str, config.moe_layers)), config.n_routed_experts
    for layer, experts in expert_cfg["experts"].items():
        where = f"experts: layer {layer}"
        if layer not in layers:
            these = ", ".join(layers) or "none"
            raise ValueError(
                f"experts: layer {layer!r} is not a MoE layer of this model; these are {these}"
            )
        if not isinstance(experts, list):
            raise ValueError(f"{where} is {experts!r}; must be a list of expert ids")
        for expert in experts:
            if type(expert) is not int or not 0 <= expert < E:
                raise ValueError(f"{where} names expert {expert!r}; must be 0 to {E - 1}")
        if len(set(experts)) != len(experts):
            raise ValueError(f"{where} names an expert twice: {experts}")


def everything(config: ModelConfig) -> dict:
    """Returns the expert_cfg of full fine-tuning."""
    experts = {str(layer): list(range(config.n_routed_experts)) for layer in config.moe_layers}
    return {"experts": experts, "shared_experts": True, "non_expert_modules": True}


def trained_parameters(model: Transformer, expert_cfg: dict) -> dict[str, nn.Parameter]:
    """Returns name -> parameter of all that `expert_cfg` selects, in the model's order."""
    check_expert_cfg(expert_cfg, model.config)
    selected = {
        f"model.layers.{layer}.mlp.experts.{expert}."
        for layer, experts in expert_cfg["experts"].items()
        for expert in experts
    }

    def is_trained(name: str) -> bool:
        if ".lora_" in name:  # no part of the checkpoint
            return False
        if ".mlp.experts." in name:
            return name[: name.index(".", name.index(".mlp.experts.") + 13) + 1] in selected
        if ".mlp.shared_experts." in name:
            return expert_cfg.get("shared_experts", False)
        return expert_cfg.get("non_expert_modules", False)

    return {name: p for name, p in model.named_parameters() if is_trained(name)}


def mark_trainable(model: Transformer, expert_cfg: dict) -> None:
    """Sets requires_grad of every parameter: true for what `expert_cfg` selects, false for the
    rest, LoRA included.

    In a fast model the selected experts move to the front of their layer's stacks, where a weight
    gradient costs no copy. Whatever shares memory with their parameters must be made afterwards."""
    check_expert_cfg(expert_cfg, model.config)
    for layer, selected in expert_cfg["experts"].items():
        experts = model.model.layers[int(layer)].mlp.experts
        if isinstance(experts, StackedExperts):
            experts.put_first(selected)
    trained = trained_parameters(model, expert_cfg)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)


def save_adapter(
    model: Transformer,
    expert_cfg: dict,
    directory: str | Path,
    trained: dict[str, Tensor] | None = None,
) -> None:
    """Writes the selected tensors in the published ESFT format, adapter.safetensors and
    expert_cfg.json, which also names the base. `trained` is these tensors, where the model here
    does not hold them all."""
    trained = trained_parameters(model, expert_cfg) if trained is None else trained
    prefix = file_prefix(model.config)
    tensors = {prefix + name: p.detach().cpu().clone() for name, p in trained.items()}
    with replacing(Path(directory) / "adapter.safetensors") as part:
        save_file(tensors, part, metadata={"format": "pt"})
    # The original code asks for every MoE layer, also for one in which nothing is selected.
    experts = {str(i): expert_cfg["experts"].get(str(i), []) for i in model.config.moe_layers}
    named = {**expert_cfg, "experts": experts, "base_fingerprint": model.fingerprint}
    write_json(Path(directory) / "expert_cfg.json", named)


def read_adapter(directory: Path, model: Transformer) -> dict[str, StoredTensor] | StoredLora:
    """Returns where an adapter's tensors are, under the model's names, compared with its
    expert_cfg.json and with the model: exactly what is selected, in its shapes, trained on this
    base (which released adapters do not name). For PEFT's format see `read_lora`. Reads headers,
    and tensors that several files hold.

    It takes every *.safetensors file of the directory, as the original code does. Its
    expert-parallel parts, put into one directory, hold copies of shared experts. Adapters of
    version 1 lack the prefix "model.". Raises FileNotFoundError, or ValueError that names file and
    tensor or field."""
    if (directory / "adapter_config.json").exists():
        if (directory / "expert_cfg.json").exists():
            raise ValueError(
                f"{directory}: holds both expert_cfg.json and adapter_config.json; one is required"
            )
        return read_lora(directory, model)
    expert_cfg = read_expert_cfg(directory / "expert_cfg.json", model.config)
    check_base(expert_cfg.get("base_fingerprint"), directory / "expert_cfg.json", model)
    expected = {name: p.shape for name, p in trained_parameters(model, expert_cfg).items()}
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{directory}: an adapter needs a .safetensors file")
    return selected_tensors(model, files, expected)


def name_adapters(paths: list[str]) -> list[str]:
    """Returns a short name for each: its directory, or the one above where that is "adapter". Where
    two would share a name, or a name would be "base" or "prompt", it is the whole path, without the
    first slash."""
    whole = [Path(path).absolute() for path in paths]
    short = [p.parent.name if p.name == "adapter" else p.name for p in whole]
    taken = ["", "base", "prompt"]
    return [
        name if (taken + short).count(name) == 1 else str(path).strip("/")
        for name, path in zip(short, whole)
    ]


def checked_adapters(paths: list[str], model: Transformer, quantize: str = "") -> dict[str, Path]:
    """Returns name -> directory of adapters, directories or hub names, each compared with the model
    (see `read_adapter`), which may be on the meta device. Raises OSError and ValueError."""
    names, adapters = name_adapters(paths), {}
    if len(set(names)) < len(names):
        raise ValueError("--adapter: the same is given twice")
    for name, path in zip(names, paths):
        adapters[name] = local_directory(path, "adapter")
        if isinstance(read_adapter(adapters[name], model), StoredLora) and quantize:
            why = f"LoRA, which changes all experts ({adapters[name]})"
            raise ValueError(f"quantize is {quantize!r}; cannot be with {why}")
    return adapters


def load_adapter(model: Transformer, directory: str | Path) -> None:
    """Puts the adapter in a directory or of a hub name, ESFT's or PEFT's LoRA, over the base, in
    place of the adapter that is over it, if any. LoRA comes frozen, like the rest.

    Nothing changes unless the whole adapter is right. If reading it fails all the same, the base
    stands there, whole."""
    stored = read_adapter(local_directory(directory, "adapter"), model)
    remove_adapter(model)
    try:
        if isinstance(stored, StoredLora):
            attach_lora(model, stored.updates)
            stored, kept = stored.tensors, []
        else:
            kept = list(stored)
            hold_exactly(model, kept)
        parameters = dict(model.named_parameters()) | lora_parameters(model)
        model.replaced = {name: parameters[name].detach().to("cpu", copy=True) for name in kept}
        with torch.no_grad():
            for name, tensor in stored.items():
                tensor.copy_to(parameters[name])
    except BaseException:
        remove_adapter(model)
        hold_exactly(model, [])  # also where reading ended before anything was replaced
        raise


def remove_adapter(model: Transformer) -> None:
    """Puts the base's own tensors back, bit for bit, and takes LoRA off."""
    if replaced := getattr(model, "replaced", {}):
        put_tensors(model, replaced)
        hold_exactly(model, [])
    model.replaced = {}
    remove_lora(model)


def hold_exactly(model: Transformer, names: Iterable[str]) -> None:
    """Where experts rest packed (fast/packed.py): gives those with parameters of these names memory
    of their own, and packs the others again."""
    names = set(names)
    for prefix, module in model.named_modules():
        if isinstance(module, PackedExperts):
            chosen = [e for e in module.expert_at if f"{prefix}.{e}.up_proj.weight" in names]
            module.put_first(chosen)


def put_tensors(model: Transformer, tensors: dict[str, Tensor]) -> None:
    """Copies tensors into the parameters of the same names, in the parameters' dtype."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in tensors.items():
            parameters[name].copy_(tensor)
