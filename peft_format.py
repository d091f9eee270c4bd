"""Adapters in the format of PEFT, matrices of LoRA and their config, written and read; and how
tensors of an adapter are compared with the model. What LoRA computes is in lora.py."""

import math
import re
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from families import file_prefix
from files import read_json, replacing, write_json
from lora import Update, adaptable, linears, lora_parameters
from model import MLP, ModelConfig, MoE, Transformer
from stored_tensors import StoredTensor, open_tensors, read_header

PEFT_PREFIX = "base_model.model."


def save_lora(
    model: Transformer, directory: str | Path, trained: dict[str, Tensor] | None = None
) -> None:
    """Writes the model's LoRA as PEFT does, adapter_model.safetensors and adapter_config.json.
    `trained` is all A and B, where the model here does not hold them all.

    The metadata of the tensors name the base's fingerprint: PEFT warns of keys of
    adapter_config.json that it does not know. Raises ValueError for a model without LoRA, or with
    several ranks or scalings, as PEFT's files may have."""
    carriers = {name: m for name, m in adaptable(model).items() if hasattr(m, "lora_A")}
    if not carriers:
        raise ValueError("the model carries no LoRA; there is nothing to save")
    updates = {Update(len(m.lora_A.weight), m.lora_scaling) for m in carriers.values()}
    if len(updates) > 1:
        raise ValueError(
            "the model's LoRA has several ranks or scalings; only one of each is saved"
        )
    trained = lora_parameters(model) if trained is None else trained
    prefix = PEFT_PREFIX + file_prefix(model.config)
    tensors = {prefix + name: p.detach().cpu().clone() for name, p in trained.items()}
    # One key alone: safetensors writes several in random order.
    metadata = {"base_fingerprint": model.fingerprint} if model.fingerprint else {"format": "pt"}
    with replacing(Path(directory) / "adapter_model.safetensors") as part:
        save_file(tensors, part, metadata=metadata)
    rank, scaling = updates.pop()
    alpha = scaling * rank
    targets = sorted({name.rpartition(".")[2] for name in carriers})
    if targeted(adaptable(model), targets) != set(carriers):  # a last part says too much
        # Without "model.", they are parts of the file's names and of those of transformers' class.
        start = "model." if file_prefix(model.config) else ""
        targets = sorted(name.removeprefix(start) for name in carriers)
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
    """Returns the names that PEFT's target_modules or target_parameters select: whole, or by their
    last parts."""
    wanted, parts = set(targets), {name: name.split(".") for name in names}
    return {n for n, p in parts.items() if any(".".join(p[i:]) in wanted for i in range(len(p)))}


def own_name(name: str, config: ModelConfig) -> str:
    """Returns model.py's name of what PEFT found under `name`. Where the language model is a part,
    this is a name of the checkpoint's own code, or of transformers' class."""
    if prefix := file_prefix(config):
        name = re.sub(r"^model\.language_model\.", "model.", name.removeprefix(prefix))
    return name


# Fields of adapter_config.json that say how W x + scaling * B A x is trained, or nothing at all.
# Every other field must have a value that switches nothing on.
LORA_FIELDS = {"peft_type", "task_type", "base_model_name_or_path", "revision", "auto_mapping"}
LORA_FIELDS |= {"peft_version", "inference_mode", "r", "lora_alpha", "lora_dropout", "bias"}
LORA_FIELDS |= {"target_modules", "use_rslora", "init_lora_weights", "layers_to_transform"}
LORA_FIELDS |= {"target_parameters", "rank_pattern", "alpha_pattern"}
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

    def is_rank(value) -> bool:
        return type(value) is int and 1 <= value < 2**19

    def is_alpha(value) -> bool:
        return type(value) in (int, float) and abs(value) < 1e30

    if config.get("peft_type") != "LORA":
        yield f"peft_type is {config.get('peft_type')!r}; supported: 'LORA'"
    for field, pattern, is_right, kind in (
        ("r", "rank_pattern", is_rank, "an integer from 1 to 2^19 - 1"),
        ("lora_alpha", "alpha_pattern", is_alpha, "a finite number"),
    ):
        if not is_right(config.get(field)):
            yield f"{field} is {config.get(field)!r}; must be {kind}"
        patterns = config.get(pattern) or {}
        if not isinstance(patterns, dict) or not all(map(is_right, patterns.values())):
            yield f"{pattern} is {patterns!r}; must give each name {kind}"
        for name in patterns:
            try:
                ends_with(name, "")
            except re.error as error:
                yield f"{pattern} has {name!r}; must be a regular expression: {error}"
    targets, layers = config.get("target_modules"), config.get("layers_to_transform")
    parameters = config.get("target_parameters") or []
    if not is_list_of(str, parameters):
        yield f"target_parameters is {parameters!r}; must be a list of parameter names"
    if targets is None and parameters:
        targets = []
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


def ends_with(pattern: str, name: str) -> bool:
    """Returns whether a regular expression of PEFT's patterns matches a name, or its last parts."""
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def update_of(config: dict, name: str) -> Update:
    """Returns the rank and scaling that PEFT gives to the module or parameter of that name: those
    of the first pattern that matches."""

    def value(field: str, default):
        patterns = (config.get(field) or {}).items()
        return next((v for pattern, v in patterns if ends_with(pattern, name)), default)

    rank, alpha = value("rank_pattern", config["r"]), value("alpha_pattern", config["lora_alpha"])
    return Update(rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def selected_weights(config: dict, model: Transformer) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Returns what a PEFT config selects: the name before .lora_A and .lora_B in the file -> the
    name that patterns match, of a module or a parameter, and the shape of its weight.

    In transformers 5 the routed experts of a layer are two parameters and no Linears, so only
    target_parameters select them: gate_up_proj (E, 2I, D) and down_proj (E, D, I). Their matrices
    are named mlp.experts.lora_A and .lora_B. If both are selected these are the down_proj's, and
    mlp.experts.base_layer.lora_A and .lora_B are the gate_up_proj's."""
    targets, parameters = config.get("target_modules") or [], config.get("target_parameters") or []
    if targets != "all-linear":
        targets = [own_name(target, model.config) for target in targets]
    layers, modules = config.get("layers_to_transform"), adaptable(model)
    if parameters:
        modules = {name: m for name, m in modules.items() if ".mlp.experts." not in name}
    chosen = set(linears(model)) if targets == "all-linear" else targeted(modules, targets)
    if layers is not None:  # says nothing of parameters
        layers = [layers] if type(layers) is int else layers
        chosen = {name for name in chosen if int(name.split(".")[2]) in layers}
    chosen |= targeted((f"{name}.weight" for name in modules), parameters)
    selected = {}
    for name, module in modules.items():
        for peft_name in {name, f"{name}.weight"} & chosen:
            selected[name] = peft_name, tuple(module.weight.shape)
    c = model.config
    E, I, D = c.n_routed_experts, c.moe_intermediate_size, c.hidden_size
    for layer in c.moe_layers:
        experts = f"model.layers.{layer}.mlp.experts"
        shapes = {f"{experts}.gate_up_proj": (E, 2 * I, D), f"{experts}.down_proj": (E, D, I)}
        fused = [item for item in shapes.items() if targeted(item[:1], parameters)]
        selected |= zip((f"{experts}.base_layer", experts)[-len(fused) :], fused)
    return selected


class ExpertB(NamedTuple):
    """The B (out, r) of one expert's Linear, within that of all experts; see `split_fused`."""

    read_fused: Callable[[], Tensor]
    rows: slice
    columns: slice

    def read(self) -> Tensor:
        return self.read_fused()[self.rows, self.columns]

    def copy_to(self, target: Tensor) -> None:
        target.copy_(self.read())


def split_fused(
    parameter: str, E: int, A: StoredTensor, B: StoredTensor, read_B: Callable[[], Tensor]
) -> Iterator[tuple[str, StoredTensor, ExpertB]]:
    """Yields name, A (r, in) and B (out, r) of each Linear in a gate_up_proj or down_proj of E
    experts, from the two matrices that PEFT has for it.

    The fused A (E * r, in) holds r rows of expert 0, then r of expert 1, ... The fused B
    (out, r * E) holds the first column of each expert, then the second of each, ... Of a
    gate_up_proj's rows of B, the first half is the gate's, the second the up's; A is the same for
    both. (Older versions of PEFT exchanged in and out; such shapes are refused.)"""
    experts, _, kind = parameter.rpartition(".")
    halves = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
    rank, width, height = A.shape[0] // E, A.shape[1], B.shape[0] // len(halves)
    for e in range(E):
        A_e = A.part(e * rank * width, (rank, width))
        for i, half in enumerate(halves):
            rows = slice(i * height, (i + 1) * height)
            yield f"{experts}.{e}.{half}", A_e, ExpertB(read_B, rows, slice(e, None, E))


class StoredLora(NamedTuple):
    tensors: dict[str, StoredTensor | ExpertB]  # A and B, under the model's names
    updates: dict[str, Update]  # of each module


def read_lora(directory: Path, model: Transformer) -> StoredLora:
    """Returns the LoRA in a directory that PEFT or `save_lora` wrote: A and B of all that
    target_modules and target_parameters select, and of nothing else, trained on this base. Reads
    headers only.

    Raises FileNotFoundError, or ValueError that names file and tensor or field."""
    path = directory / "adapter_config.json"
    config = read_json(path)
    if not isinstance(config, dict):
        raise ValueError(f"{path}: must hold a JSON object, found {type(config).__name__}")
    for problem in lora_problems(config):
        raise ValueError(f"{path}: {problem}")
    selected = selected_weights(config, model)
    if not selected:
        raise ValueError(
            f"{path}: target_modules is {config.get('target_modules')!r}, target_parameters is "
            f"{config.get('target_parameters')!r}; selects nothing of this model"
        )
    prefix = file_prefix(model.config)
    updates = {name: update_of(config, prefix + of) for name, (of, _) in selected.items()}
    expected = {}
    for name, (_, (*experts, height, width)) in selected.items():
        ranks = math.prod(experts) * updates[name].rank
        expected[f"{name}.lora_A.weight"] = (ranks, width)
        expected[f"{name}.lora_B.weight"] = (height, ranks)

    path = directory / "adapter_model.safetensors"
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; other formats of PEFT are not supported")
    with open_tensors(path) as file:
        metadata = file.metadata() or {}
    check_base(metadata.get("base_fingerprint"), path, model)
    found = selected_tensors(model, [path], expected, prefix=PEFT_PREFIX)

    lora, here = StoredLora({}, {}), adaptable(model)
    # A fused B is read once for all experts: of a layer's two, both are kept.
    read_B = lru_cache(maxsize=2)(lambda name: found[f"{name}.lora_B.weight"].read())
    for name, (peft_name, (*experts, _, _)) in selected.items():
        A, B = (found[f"{name}.{half}.weight"] for half in ("lora_A", "lora_B"))
        pieces = [(name, A, B)]
        if experts:
            pieces = split_fused(peft_name, *experts, A, B, partial(read_B, name))
        for module, A, B in pieces:
            if module in here:  # and not an expert that another process holds
                lora.updates[module] = updates[name]
                lora.tensors[f"{module}.lora_A.weight"] = A
                lora.tensors[f"{module}.lora_B.weight"] = B
    return lora


def selected_tensors(
    model: Transformer, files: list[Path], expected: dict[str, tuple[int, ...]], prefix: str = ""
) -> dict[str, StoredTensor]:
    """Returns the tensors in an adapter's files under the model's names: those of `expected`, in
    these shapes, and no other. `prefix` is PEFT's, before each name. Several files may
    hold copies of a tensor, but only equal ones: the original code's expert-parallel parts have
    what all ranks train in each. Experts that another process holds (train_ep.py) are checked and
    read there. Raises ValueError that names file and tensor."""
    elsewhere = tuple(
        f"{name}.experts.{e}."
        for name, moe in model.named_modules()
        if isinstance(moe, MoE)
        for e, expert in enumerate(moe.experts)
        if not isinstance(expert, MLP)
    )
    selecting = "adapter_config.json" if prefix else "expert_cfg.json"
    is_peft, prefix = bool(prefix), prefix or file_prefix(model.config)
    found: dict[str, StoredTensor] = {}
    for path in files:
        for stored in read_header(path).values():
            name = stored.name.removeprefix(prefix)
            name = own_name(name, model.config) if is_peft else name
            if name.startswith("layers.") and not prefix:  # ESFT's version 1
                name = f"model.{name}"
            if name.startswith(elsewhere):
                continue
            if name not in expected or not stored.name.startswith(prefix):
                raise ValueError(
                    f"{path}: tensor {stored.name} is not selected by {path.parent}/{selecting}, "
                    f"which selects {prefix}{min(expected, default='nothing')} and others"
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
