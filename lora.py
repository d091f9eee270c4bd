"""LoRA (arXiv 2106.09685), the method that ESFT is compared with: y = W x + scaling * B A x in the
linear layers of a model, and files as PEFT writes and reads them."""

import hashlib
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import MethodType
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fast.experts import experts_grouped
from fast.lora import experts_with_lora
from files import read_json, replacing, write_json
from model import LatentAttention, MoE, Transformer
from stored_tensors import StoredTensor, open_tensors, read_header


def linears(model: Transformer) -> dict[str, nn.Linear]:
    """Returns name -> Linear of all that LoRA may adapt: attention, dense layers, shared and routed
    experts, but neither the head nor the router."""
    modules = model.model.named_modules(prefix="model")
    return {n: m for n, m in modules if isinstance(m, nn.Linear) and ".lora_" not in n}


def add_lora_product(linear: nn.Linear, inputs: tuple[Tensor], output: Tensor) -> Tensor:
    """The forward hook of a Linear with LoRA: W x -> W x + scaling * B A x."""
    return output + linear.lora_scaling * linear.lora_B(linear.lora_A(*inputs))


def up_projection_with_lora(attention: LatentAttention) -> Tensor:
    """W + scaling * B A, in place of `LatentAttention.up_projection`: the attention uses the weight
    without calling the Linear, so the hook does not run."""
    linear = attention.kv_b_proj
    A, B = linear.lora_A.weight, linear.lora_B.weight
    return torch.addmm(linear.weight, B, A, alpha=linear.lora_scaling)


def attach_lora(model: Transformer, names: set[str], rank: int, scaling: float) -> None:
    """Gives the Linears of these names an uninitialised, frozen A (rank, in) and B (out, rank)."""
    for name, linear in linears(model).items():
        if name not in names:
            continue
        sizes = (("lora_A", linear.in_features, rank), ("lora_B", rank, linear.out_features))
        for half, width, height in sizes:
            # On the meta device: its own start would draw from torch's global generator.
            product = nn.Linear(width, height, bias=False, device="meta")
            values = linear.weight.new_empty(height, width)
            product.weight = nn.Parameter(values, requires_grad=False)
            linear.add_module(half, product)
        linear.lora_scaling = scaling
        linear.lora_hook = linear.register_forward_hook(add_lora_product)
    for module in model.modules():
        if isinstance(module, LatentAttention) and hasattr(module.kv_b_proj, "lora_A"):
            module.up_projection = MethodType(up_projection_with_lora, module)
        elif isinstance(module, MoE) and module.run_experts is experts_grouped:
            if any(hasattr(m, "lora_A") for m in module.experts.modules()):
                module.run_experts = experts_with_lora


def add_lora(model: Transformer, rank: int, scaling: float, seed: int = 0) -> None:
    """Adds LoRA to every Linear but head and router, routed and shared experts included (the paper:
    rank 8, scaling 2). A and B are trained, in W's dtype. Everything else is frozen.

    B starts at zero, and A uniform within 1 / sqrt(in), as in PEFT. A is drawn by seed and name, so
    it is the same on every device and whatever else the model holds. Raises ValueError for a rank
    below 1, a scaling that is not finite, or a model that carries LoRA."""
    if type(rank) is not int or rank < 1:
        raise ValueError(f"rank is {rank!r}; must be an integer from 1")
    if not math.isfinite(scaling):
        raise ValueError(f"scaling is {scaling!r}; must be a finite number")
    if lora_parameters(model):
        raise ValueError("the model carries LoRA already; remove_lora takes it off")
    model.requires_grad_(False)
    attach_lora(model, set(linears(model)), rank, scaling)
    for name, parameter in lora_parameters(model).items():
        parameter.requires_grad_(True)
        if parameter.is_meta:
            continue
        start = torch.zeros(parameter.shape)
        if name.endswith("lora_A.weight"):
            own = hashlib.sha256(f"{seed} {name}".encode()).digest()[:8]
            generator = torch.Generator().manual_seed(int.from_bytes(own, "little"))
            nn.init.kaiming_uniform_(start, a=math.sqrt(5), generator=generator)
        with torch.no_grad():
            parameter.copy_(start)


def remove_lora(model: Transformer) -> None:
    """Takes all LoRA off. The base's own tensors were never touched."""
    for module in model.modules():
        if isinstance(module, MoE) and module.run_experts is experts_with_lora:
            module.run_experts = experts_grouped
        elif isinstance(module, LatentAttention):
            vars(module).pop("up_projection", None)
    for linear in linears(model).values():
        if hasattr(linear, "lora_A"):
            linear.lora_hook.remove()
            del linear.lora_A, linear.lora_B, linear.lora_scaling, linear.lora_hook


def lora_parameters(model: Transformer) -> dict[str, nn.Parameter]:
    """Returns name -> parameter of every A and B, in the model's order, with names like
    model.layers.0.self_attn.q_proj.lora_A.weight."""
    return {name: p for name, p in model.named_parameters() if ".lora_" in name}


PEFT_PREFIX = "base_model.model."


def save_lora(
    model: Transformer, directory: str | Path, trained: dict[str, Tensor] | None = None
) -> None:
    """Writes the model's LoRA as PEFT does, adapter_model.safetensors and adapter_config.json.
    `trained` is all A and B, where the model here does not hold them all.

    The metadata of the tensors name the base's fingerprint: PEFT warns of keys of
    adapter_config.json that it does not know. Raises ValueError for a model without LoRA."""
    carriers = {name: m for name, m in linears(model).items() if hasattr(m, "lora_A")}
    if not carriers:
        raise ValueError("the model carries no LoRA; there is nothing to save")
    trained = lora_parameters(model) if trained is None else trained
    tensors = {PEFT_PREFIX + name: p.detach().cpu().clone() for name, p in trained.items()}
    # One key alone: safetensors writes several in random order.
    metadata = {"base_fingerprint": model.fingerprint} if model.fingerprint else {"format": "pt"}
    with replacing(Path(directory) / "adapter_model.safetensors") as part:
        save_file(tensors, part, metadata=metadata)
    linear = next(iter(carriers.values()))
    rank, alpha = linear.lora_A.out_features, linear.lora_scaling * linear.lora_A.out_features
    targets = sorted({name.rpartition(".")[2] for name in carriers})
    if targeted(linears(model), targets) != set(carriers):  # the last part of a name says too much
        targets = sorted(carriers)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": targets,
        "inference_mode": True,
    }
    write_json(Path(directory) / "adapter_config.json", config, indent=2)


def targeted(names: Iterable[str], targets: list[str]) -> set[str]:
    """Returns the names that PEFT's target_modules select: whole, or by their last parts."""
    wanted, parts = set(targets), {name: name.split(".") for name in names}
    return {n for n, p in parts.items() if any(".".join(p[i:]) in wanted for i in range(len(p)))}


# Fields of adapter_config.json that say how W x + scaling * B A x is trained, or nothing at all.
# Every other field must have a value that switches nothing on.
LORA_FIELDS = {"peft_type", "task_type", "base_model_name_or_path", "revision", "auto_mapping"}
LORA_FIELDS |= {"peft_version", "inference_mode", "r", "lora_alpha", "lora_dropout", "bias"}
LORA_FIELDS |= {"target_modules", "use_rslora", "init_lora_weights", "layers_to_transform"}
LORA_FIELDS |= {"megatron_core", "qalora_group_size"}  # read only where others switch them on
LORA_VALUES = {  # the first is the default
    "bias": ["none"],
    "use_rslora": [False, True],
    # Other starts change the base, and the adapter is the rest of it.
    "init_lora_weights": [True, False, "gaussian", "orthogonal", "eva"],
}


def lora_problems(config: dict) -> Iterator[str]:
    """Yields what makes a PEFT config another thing than plain LoRA, field by field."""

    def is_list_of(kind: type, value) -> bool:
        return isinstance(value, list) and all(type(item) is kind for item in value)

    if config.get("peft_type") != "LORA":
        yield f"peft_type is {config.get('peft_type')!r}; supported: 'LORA'"
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if type(rank) is not int or not 1 <= rank < 2**19:
        yield f"r is {rank!r}; must be an integer from 1 to 2^19 - 1"
    if type(alpha) not in (int, float) or not abs(alpha) < 1e30:
        yield f"lora_alpha is {alpha!r}; must be a finite number"
    targets, layers = config.get("target_modules"), config.get("layers_to_transform")
    if targets != "all-linear" and not is_list_of(str, targets):
        yield f"target_modules is {targets!r}; must be a list of module names or 'all-linear'"
    if layers is not None and type(layers) is not int and not is_list_of(int, layers):
        yield f"layers_to_transform is {layers!r}; must be a list of layers"
    for name, values in LORA_VALUES.items():
        if (value := config.get(name, values[0])) not in values:
            yield f"{name} is {value!r}; supported: {', '.join(map(repr, values))}"
    for name, value in config.items():
        if name not in LORA_FIELDS and value not in (None, False, [], {}):
            yield f"{name} is {value!r}; not supported"


class StoredLora(NamedTuple):
    tensors: dict[str, StoredTensor]  # A and B, under the model's names
    rank: int
    scaling: float


def read_lora(directory: Path, model: Transformer) -> StoredLora:
    """Returns the LoRA in a directory that PEFT or `save_lora` wrote: A and B of every Linear that
    target_modules selects, and of no other, trained on this base. Reads headers only.

    Raises FileNotFoundError, or ValueError that names file and tensor or field."""
    path = directory / "adapter_config.json"
    config = read_json(path)
    if not isinstance(config, dict):
        raise ValueError(f"{path}: must hold a JSON object, found {type(config).__name__}")
    for problem in lora_problems(config):
        raise ValueError(f"{path}: {problem}")
    modules, rank = linears(model), config["r"]
    targets, layers = config["target_modules"], config.get("layers_to_transform")
    selected = set(modules) if targets == "all-linear" else targeted(modules, targets)
    if layers is not None:
        layers = [layers] if type(layers) is int else layers
        selected = {name for name in selected if int(name.split(".")[2]) in layers}
    if not selected:
        raise ValueError(f"{path}: target_modules is {targets!r}; selects nothing of this model")
    expected = {}
    for name, linear in modules.items():
        if name in selected:
            expected[f"{name}.lora_A.weight"] = (rank, linear.in_features)
            expected[f"{name}.lora_B.weight"] = (linear.out_features, rank)

    path = directory / "adapter_model.safetensors"
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; other formats of PEFT are not supported")
    with open_tensors(path) as file:
        metadata = file.metadata() or {}
    check_base(metadata.get("base_fingerprint"), path, model)
    found = selected_tensors(model, [path], expected, prefix=PEFT_PREFIX)
    scaling = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return StoredLora(found, rank, scaling)


def selected_tensors(
    model: Transformer, files: list[Path], expected: dict[str, tuple[int, ...]], prefix: str = ""
) -> dict[str, StoredTensor]:
    """Returns the tensors in an adapter's files under the model's names: those of `expected`, in
    these shapes, and no other. `prefix` stands before each name. Several files may hold copies of a
    tensor, but only equal ones: the original code's expert-parallel parts have what all ranks train
    in each. Experts that another process holds (train_ep.py) are checked and read there. Raises
    ValueError that names file and tensor."""
    elsewhere = tuple(
        f"{name}.experts.{e}."
        for name, moe in model.named_modules()
        if isinstance(moe, MoE)
        for e, expert in enumerate(moe.experts)
        if isinstance(expert, nn.Identity)
    )
    found: dict[str, StoredTensor] = {}
    for path in files:
        for stored in read_header(path).values():
            name = stored.name.removeprefix(prefix)
            if name.startswith("layers.") and not prefix:  # ESFT's version 1
                name = f"model.{name}"
            if name.startswith(elsewhere):
                continue
            if name not in expected or not stored.name.startswith(prefix):
                selecting = "adapter_config.json" if prefix else "expert_cfg.json"
                raise ValueError(
                    f"{path}: tensor {stored.name} is not selected by {path.parent}/{selecting}"
                )
            stored.check(expected[name])
            first = found.setdefault(name, stored)
            if first is not stored and not same_bytes(first, stored):
                raise ValueError(f"{path}: tensor {stored.name} differs from that in {first.path}")
    if missing := [prefix + name for name in expected if name not in found]:
        raise ValueError(
            f"{files[0]}: {len(missing)} selected tensors are missing: {', '.join(missing[:5])}"
        )
    return found


def same_bytes(one: StoredTensor, other: StoredTensor) -> bool:
    """Returns whether two tensors of the same shape hold the same, NaN included."""
    return one.dtype == other.dtype and torch.equal(
        one.read().view(torch.uint8), other.read().view(torch.uint8)
    )


def check_base(named: str | None, path: Path, model: Transformer) -> None:
    """Raises ValueError if the adapter file `path` names another base than the model's."""
    if named is not None and model.fingerprint is not None and named != model.fingerprint:
        raise ValueError(
            f"{path}: base_fingerprint is {named!r}; the adapter belongs to another base "
            f"checkpoint than this one, whose fingerprint is {model.fingerprint!r}"
        )
