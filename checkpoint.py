"""A Hugging Face directory or hub name -> a checked config -> a loaded model and its fingerprint.

Nothing from a checkpoint is executed or unpickled: only config.json and safetensors files are read.
Adapters are in adapter.py, merged checkpoints are written in merge.py."""

import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import MISSING, fields
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from tqdm import tqdm

import fast
from fast.packed import readers
from files import read_json
from model import ModelConfig, Transformer
from stored_tensors import READ_BYTES, StoredTensor, read_header

# ------------------------------------------------------------------------------------------
# config.json

# The values that a family supports of the fields that name a variant. The first one is the default,
# because DeepSeek's own configuration classes leave some of these fields out.
FAMILIES = {
    "deepseek": {
        "scoring_func": ["softmax"],
        "topk_method": ["greedy"],
        "routed_scaling_factor": [1.0],
        "quantization_config": [None],
    },
    "deepseek_v2": {
        "scoring_func": ["softmax"],
        "topk_method": ["greedy", "group_limited_greedy"],
        "quantization_config": [None],
    },
    "deepseek_v3": {"scoring_func": ["sigmoid"], "topk_method": ["noaux_tc"]},
}
V3_DEFAULTS = {"norm_topk_prob": True, "routed_scaling_factor": 2.5, "n_group": 8, "topk_group": 4}
EVERY_FAMILY = {
    "model_type": list(FAMILIES),
    "hidden_act": ["silu"],
    "mlp_bias": [False],
    "attention_dropout": [0.0],
}


def read_config(directory: str | Path, changes: Collection[str] = ()) -> ModelConfig:
    """Returns the checked config of a checkpoint, from both spellings of the rotary settings.
    `changes` are texts FIELD=VALUE, with VALUE in JSON, that replace fields of the file. Raises
    FileNotFoundError, or ValueError that names field, value and what is supported."""
    path = Path(directory) / "config.json"
    raw = read_json(path)
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: must hold a JSON object, found {type(raw).__name__}")
    changed = parse_changes(changes)
    try:
        return config_from_dict(raw, changed)
    except ValueError as error:
        after = f" (after model_config changed {', '.join(changed)})" if changed else ""
        raise ValueError(f"{path}: {error}{after}") from None


def parse_changes(changes: Collection[str]) -> dict:
    """["num_experts_per_tok=4"] -> {"num_experts_per_tok": 4}. Raises ValueError."""
    known, values = [field.name for field in fields(ModelConfig)], {}
    for text in changes:
        name, _, value = text.partition("=")
        if name not in known:
            raise ValueError(
                f"model_config: {text!r} must be FIELD=VALUE with a field of {', '.join(known)}"
            )
        try:
            values[name] = json.loads(value)
        except ValueError:
            raise ValueError(
                f"model_config: the value of {text!r} must be JSON, as in norm_topk_prob=true or "
                'topk_method="greedy"'
            ) from None
    return values


def config_from_dict(raw: dict, changed: dict) -> ModelConfig:
    """`read_config` for the content of the file."""
    for name in ("index_topk", "index_n_heads"):  # V3.2 and later
        if raw.get(name) is not None:
            raise ValueError(f"{name} is {raw[name]!r}; sparse attention is not supported")
    rope = raw.get("rope_parameters")
    if rope is not None:  # transformers 5 moved rope_theta and rope_scaling in here
        if not isinstance(rope, dict):
            raise ValueError(f"rope_parameters is {rope!r}; must be an object")
        if raw.get("rope_scaling", rope) not in (None, rope):
            raise ValueError("rope_scaling and rope_parameters differ; one is required")
        theta = {"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {}
        raw = {**raw, **theta, "rope_scaling": rope}
    raw = {**raw, **changed}
    family = raw.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise ValueError(f"model_type is {family!r}; supported: {', '.join(FAMILIES)}")
    values = {name: supported[0] for name, supported in FAMILIES[family].items()}
    if family == "deepseek_v3":
        values |= V3_DEFAULTS
    for field in fields(ModelConfig):
        if field.name in raw:
            values[field.name] = raw[field.name]
        elif field.default is MISSING:
            raise ValueError(f"field {field.name} is missing")
    config = ModelConfig(**values)
    check_config(config)
    return config


def check_config(config: ModelConfig) -> None:
    """Raises ValueError for the first field with a value that model.py does not support."""
    for problems in (field_problems, size_problems, routing_problems, rope_problems, fp8_problems):
        for problem in problems(config):
            raise ValueError(problem)


def field_problems(config: ModelConfig) -> Iterator[str]:
    for name, values in (EVERY_FAMILY | FAMILIES.get(config.model_type, {})).items():
        if getattr(config, name) not in values:
            shown = ", ".join(map(repr, values))
            yield f"{name} is {getattr(config, name)!r}; supported: {shown}"
    for field in fields(config):
        name, kind, value = field.name, field.type, getattr(config, field.name)
        if value is None and kind in (int, float, bool, str):
            yield f"{name} is null; a value is required"
        if value is not None and kind in (int, int | None):
            least = 0 if name in ("first_k_dense_replace", "num_nextn_predict_layers") else 1
            if type(value) is not int or not least <= value < 2**19:
                yield f"{name} is {value!r}; must be an integer from {least} to 2^19 - 1"
        if kind is float and (type(value) not in (int, float) or not abs(value) < 1e30):
            yield f"{name} is {value!r}; must be a finite number"
        if kind is bool and type(value) is not bool:
            yield f"{name} is {value!r}; must be true or false"


def size_problems(config: ModelConfig) -> Iterator[str]:
    c, layers, E = config, config.num_hidden_layers, config.n_routed_experts
    D, heads = c.hidden_size, c.num_attention_heads
    if E >= 2**15:
        yield f"n_routed_experts is {E}; must be below 2^15"
    if layers * E > 2**17:
        several = f"num_hidden_layers is {layers} and n_routed_experts is {E}"
        yield f"{several}; at most {2**17} experts are supported"
    if c.rms_norm_eps < 0:
        yield f"rms_norm_eps is {c.rms_norm_eps}; must be at least 0"
    if c.rope_theta <= 1:
        yield f"rope_theta is {c.rope_theta}; must be above 1"
    if c.model_type != "deepseek":
        for name in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
            if getattr(c, name) is None:
                yield f"field {name} is missing"
        if c.qk_rope_head_dim % 2:
            yield f"qk_rope_head_dim is {c.qk_rope_head_dim}; must be even"
        return
    if D % (2 * heads):
        required = f"must divide hidden_size ({D}) into heads of even size"
        yield f"num_attention_heads is {heads}; {required}"
    if heads % c.key_value_heads:
        yield f"num_key_value_heads is {c.key_value_heads}; must divide {heads} heads"
    if c.head_dim not in (None, D // heads):
        supported = f"hidden_size / num_attention_heads, {D // heads}"
        yield f"head_dim is {c.head_dim}; supported: {supported}"


def routing_problems(config: ModelConfig) -> Iterator[str]:
    E = reachable = config.n_routed_experts
    method, groups, kept = config.topk_method, config.n_group, config.topk_group
    if method != "greedy":
        least = 2 if method == "noaux_tc" else 1  # experts that rank a group
        if not groups or E % groups or E // groups < least:
            equal = f"n_routed_experts ({E}) in groups of equal size, at least {least} in each"
            yield f"n_group is {groups}; {method} needs {equal}"
        if not kept or kept > groups:
            yield f"topk_group is {kept}; must be 1 to n_group ({groups})"
        reachable = E // groups * kept
    if config.num_experts_per_tok > reachable:
        reached = f"a token can reach only {reachable} experts"
        yield f"num_experts_per_tok is {config.num_experts_per_tok}; {reached}"


def rope_problems(config: ModelConfig) -> Iterator[str]:
    rope = config.rope_scaling
    if rope is None:
        return
    if not isinstance(rope, dict):
        yield f"rope_scaling is {rope!r}; must be an object or null"
    rope = {name: value for name, value in rope.items() if value is not None}
    kind = rope.get("rope_type", rope.get("type", "default"))
    kinds = ("default",) if config.model_type == "deepseek" else ("default", "yarn")
    if kind not in kinds:
        yield f"rope_scaling: type is {kind!r}; supported: {', '.join(map(repr, kinds))}"
    known = {"rope_type", "type", "rope_theta"}
    if kind == "yarn":
        numbers = {"factor": 1, "original_max_position_embeddings": 1}
        given = ("beta_fast", "beta_slow", "mscale", "mscale_all_dim")
        numbers |= {name: 0 for name in given if name in rope}
        for name, least in numbers.items():
            value = rope.get(name)
            usable = type(value) in (int, float) and (value == 0 or 1e-6 < value < 1e30)
            if not usable or value < least:
                yield f"rope_scaling: {name} is {value!r}; must be a number from {least}"
        known |= {*numbers, *given}
    for name in rope.keys() - known:  # attention_factor or partial_rotary_factor, for example
        yield f"rope_scaling: {name} is {rope[name]!r}; not supported"


def fp8_problems(config: ModelConfig) -> Iterator[str]:
    """V3's quantisation is supported: e4m3 weights in blocks."""
    fp8, name = config.quantization_config, "quantization_config"
    if fp8 is None:
        return
    if not isinstance(fp8, dict):
        yield f"{name} is {fp8!r}; must be an object or null"
    if fp8.get("quant_method") != "fp8":
        yield f"{name}: quant_method is {fp8.get('quant_method')!r}; supported: 'fp8'"
    if fp8.get("fmt", "e4m3") != "e4m3":
        yield f"{name}: fmt is {fp8['fmt']!r}; supported: 'e4m3'"
    block = fp8.get("weight_block_size")
    if not (isinstance(block, list) and [type(size) for size in block] == [int, int]):
        yield f"{name}: weight_block_size is {block!r}; two integers are required"
    if not all(1 <= size < 2**19 for size in block):
        yield f"{name}: weight_block_size is {block!r}; must be from 1 to 2^19 - 1"


# ------------------------------------------------------------------------------------------
# Files

CHECKPOINT_FILES = ["*.json", "*.safetensors", "*.jinja", "LICENSE*"]


def local_directory(
    name: str | Path, kind: str = "checkpoint", files: list[str] = CHECKPOINT_FILES
) -> Path:
    """Returns the directory `name`, or for a hub name like deepseek-ai/ESFT-vanilla-lite the
    directory of the Hugging Face cache that `files` (no code) are downloaded to, unless they are
    there. Raises FileNotFoundError that says what to do."""
    path = Path(name)
    if path.is_dir():
        return path
    if path.exists():
        raise NotADirectoryError(f"{name}: is a file; a {kind} directory is required")
    # org/name, unless there is a folder org here: then it is a path with a typing error.
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", str(name), re.ASCII) or path.parent.is_dir():
        raise FileNotFoundError(f"{name}: no such {kind} directory")
    try:
        return Path(snapshot_download(str(name), allow_patterns=files))
    except Exception as error:  # the library raises its own, its HTTP client's and the system's
        reason = " ".join(str(error).split())
        raise FileNotFoundError(
            f"{name}: no such {kind} directory, and the Hugging Face hub did not give it "
            f"({type(error).__name__}: {reason:.300}). Check the name; for a gated one, log in "
            f"with `hf auth login`; without a network, fetch it elsewhere with `hf download {name} "
            "--local-dir DIR` and give DIR"
        ) from None


def stored_tensors(directory: Path, config: ModelConfig) -> dict[str, StoredTensor]:
    """Returns all tensors of a checkpoint, in one file or with an index, under the files' names.
    FP8 weights come with their scales, wherever these lie. Reads headers only. Raises
    FileNotFoundError or ValueError that names file and tensor."""
    index, whole = directory / "model.safetensors.index.json", directory / "model.safetensors"
    if index.exists():
        tensors = indexed_tensors(index)
    elif whole.is_file():
        tensors = read_header(whole)
    else:
        raise FileNotFoundError(f"{directory}: no {whole.name} and no {index.name}")
    for name, stored in tensors.items():
        if stored.dtype == "F8_E4M3":
            add_scale(stored, tensors, config)
    scales = {stored.scale.name for stored in tensors.values() if stored.scale is not None}
    return {name: stored for name, stored in tensors.items() if name not in scales}


def indexed_tensors(index: Path) -> dict[str, StoredTensor]:
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: field weight_map must map tensor names to files")
    headers: dict[str, dict[str, StoredTensor]] = {}
    for name, file in weight_map.items():
        if not (isinstance(file, str) and re.fullmatch(r"[\w.-]{1,200}\.safetensors", file)):
            raise ValueError(
                f"{index}: {name} is in {file!r}; must be a .safetensors file in the same directory"
            )
        path = index.parent / file
        if file not in headers:
            if not path.is_file():
                raise FileNotFoundError(f"{path}: missing shard (it holds {name})")
            headers[file] = read_header(path)
        if name not in headers[file]:
            raise ValueError(f"{path}: tensor {name} is missing")
    return {name: headers[file][name] for name, file in weight_map.items()}


def add_scale(stored: StoredTensor, tensors: dict[str, StoredTensor], config: ModelConfig) -> None:
    name = f"{stored.name}_scale_inv"
    if config.quantization_config is None or name not in tensors or len(stored.shape) != 2:
        raise ValueError(
            f"{stored.path}: tensor {stored.name} is F8_E4M3; required: a matrix, a tensor {name}, "
            "and quantization_config in config.json"
        )
    stored.block = tuple(config.quantization_config["weight_block_size"])
    blocks = [-(-size // block) for size, block in zip(stored.shape, stored.block)]
    tensors[name].check(blocks, ("F32",))
    stored.scale = tensors[name]


FUSED = re.compile(r"(model\.layers\.(\d+)\.mlp\.experts\.)(gate_up_proj|down_proj)")


def split_experts(stored: StoredTensor, config: ModelConfig) -> dict[str, StoredTensor]:
    """Returns name -> part for each expert of a tensor that holds all experts of a layer:
    gate_up_proj (E, 2I, D) or down_proj (E, D, I)."""
    prefix, _, kind = FUSED.fullmatch(stored.name).groups()
    E, I, D = config.n_routed_experts, config.moe_intermediate_size, config.hidden_size
    stored.check((E, 2 * I, D) if kind == "gate_up_proj" else (E, D, I))
    if kind == "down_proj":
        return {f"{prefix}{e}.down_proj.weight": stored.part(e * D * I, (D, I)) for e in range(E)}
    return {
        f"{prefix}{e}.{half}_proj.weight": stored.part((2 * e + i) * I * D, (I, D))
        for e in range(E)
        for i, half in enumerate(("gate", "up"))
    }


# ------------------------------------------------------------------------------------------
# Models


def read_checkpoint(
    directory: Path, changes: Collection[str] = ()
) -> tuple[Transformer, dict[str, StoredTensor]]:
    """Returns the model of a checkpoint's config on the meta device, with its fingerprint, and the
    checkpoint's tensors under the model's names. Each tensor that the model needs is there, in its
    shape, and no other. Reads headers only. `changes`: see `read_config`.

    Skips layers for multi-token prediction and tables of rotary frequencies. Raises
    FileNotFoundError, or ValueError that names file and tensor."""
    config = read_config(directory, changes)
    found: dict[str, StoredTensor] = {}
    layers = range(config.num_hidden_layers)
    extra = range(layers.stop, layers.stop + config.num_nextn_predict_layers)
    for name, stored in stored_tensors(directory, config).items():
        layer = re.match(r"model\.layers\.(\d{1,9})\.", name)
        if (layer and int(layer[1]) in extra) or name.endswith(".rotary_emb.inv_freq"):
            continue
        fused = layer and FUSED.fullmatch(name) and config.is_moe(int(layer[1]))
        found |= split_experts(stored, config) if fused else {name: stored}

    # These two checks come first: building a model of absurd size takes long even without weights.
    for layer in layers:
        if f"model.layers.{layer}.input_layernorm.weight" not in found:
            raise ValueError(
                f"{directory}: tensors of layer {layer} are missing; num_hidden_layers is "
                f"{config.num_hidden_layers}"
            )
    for layer in config.moe_layers:
        name = f"model.layers.{layer}.mlp.gate.weight"
        if name not in found:
            raise ValueError(f"{directory}: tensor {name} is missing")
        found[name].check((config.n_routed_experts, config.hidden_size))
    with torch.device("meta"):
        model = Transformer(config).requires_grad_(False)
    expected = {name: t.shape for name, t in model.state_dict().items()}
    if config.tie_word_embeddings:
        del expected["lm_head.weight"]
        head, embedding = found.pop("lm_head.weight", None), found.get("model.embed_tokens.weight")
        # A missing embedding is reported below, with the rest.
        if head and embedding and not torch.equal(head.read(), embedding.read()):
            raise ValueError(
                f"{head.path}: tensor lm_head.weight differs from model.embed_tokens.weight, but "
                "tie_word_embeddings is true in config.json"
            )
    for problem, names in (
        ("are missing", expected.keys() - found.keys()),
        ("do not belong to this config", found.keys() - expected.keys()),
    ):
        if names:
            raise ValueError(
                f"{directory}: {len(names)} tensors {problem}: {', '.join(sorted(names)[:5])}"
            )
    for name, shape in expected.items():
        found[name].check(shape)
    model.fingerprint = fingerprint(found)
    return model, found


def fingerprint(tensors: dict[str, StoredTensor]) -> str:
    """Returns a hash that says which weights a checkpoint holds, however it stores them (one file
    or many, experts one by one or fused, float32, bfloat16 or FP8). It covers the first 64 values
    of the first row of each tensor, rounded to bfloat16. `tensors`: see `read_checkpoint`."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        stored = tensors[name]
        count = min(64, stored.shape[-1])
        values = stored.part(0, (count,)).read().float()
        if stored.scale is not None:
            width = stored.block[1]
            factors = stored.scale.part(0, (-(-count // width),)).read()
            values = values * factors.repeat_interleave(width)[:count]
        digest.update(f"{name} {list(stored.shape)} ".encode())
        digest.update(values.bfloat16().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


EXPERTS = ("auto", "loop", "grouped")  # auto is grouped
Split = Callable[[Transformer], None]


def build_model(
    config: ModelConfig,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    experts: str = "auto",
    split: Split | None = None,
    quantize: str = "",
) -> Transformer:
    """Returns a Transformer with uninitialised weights on `device`, everything frozen. With
    `experts` "loop" it is model.py alone; otherwise fast/ is installed. `split` takes out of the
    model, while it is on the meta device, what other processes hold. `quantize` is how experts
    rest in memory: see `fast.quantize`.

    Raises ValueError for another value of `experts`, and for what cannot be quantised."""
    with torch.device("meta"):
        model = Transformer(config).requires_grad_(False)
    model.fingerprint = None
    return materialise(model, device, dtype, experts, split, quantize)


def materialise(
    model: Transformer, device, dtype, experts: str, split: Split | None, quantize: str
) -> Transformer:
    """`build_model` for a model on the meta device."""
    if experts not in EXPERTS:
        raise ValueError(f"experts is {experts!r}; must be {', '.join(EXPERTS)}")
    if split is not None:
        split(model)
    model.to(dtype)
    if experts != "loop":
        fast.install(model)
    if quantize:
        fast.quantize(model, quantize)
    return model if device == "meta" else model.to_empty(device=device)


def check_device(device: str) -> None:
    """Raises ValueError for a device that does not exist, or is not here."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device is {device!r}; not available here: {reason}") from None


def choose_dtype(name: str, device: str) -> torch.dtype:
    """Returns the dtype of that name. If the name is empty, this is bfloat16 on a GPU, and float32
    on a CPU, where bfloat16 takes ten times as long: each number of rows prepares its product."""
    return getattr(torch, name or ("float32" if device == "cpu" else "bfloat16"))


def load_model(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    experts: str = "auto",
    split: Split | None = None,
    changes: Collection[str] = (),
    quantize: str = "",
) -> Transformer:
    """Returns the checkpoint in directory `path` or of that hub name, everything frozen, with its
    fingerprint. `experts`, `split`, `quantize`: see `build_model`. `changes`: see `read_config`.

    Names and shapes are compared with the config before memory is taken. Then each tensor is read
    once, straight to its place. Raises OSError and ValueError that name file, tensor and shape."""
    check_device(device)
    model, stored = read_checkpoint(local_directory(path), changes)
    materialise(model, device, dtype, experts, split, quantize)
    targets, packed = model.state_dict(), readers(model) if quantize else {}
    if model.config.tie_word_embeddings:
        targets.pop("lm_head.weight")
    local = threading.local()

    def load(name: str) -> int:
        if not hasattr(local, "buffer"):  # pinned: the GPU's copy engine reads it directly
            pinned = model.lm_head.weight.is_cuda
            local.buffer = torch.empty(READ_BYTES, dtype=torch.uint8, pin_memory=pinned)
        if name in packed:
            packed[name](stored[name], local.buffer)
        else:
            stored[name].copy_to(targets[name], local.buffer)
        return targets[name].nbytes

    total = sum(tensor.nbytes for tensor in targets.values())
    with (
        ThreadPoolExecutor(min(8, os.cpu_count())) as pool,
        tqdm(total=total, desc="load", unit="B", unit_scale=True, leave=False, disable=None) as bar,
    ):
        for count in pool.map(load, targets):
            bar.update(count)
    return model
