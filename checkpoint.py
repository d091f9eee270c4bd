"""A Hugging Face directory or hub name -> a loaded model and its fingerprint.

Nothing from a checkpoint is executed or unpickled: only config.json (families.py) and safetensors
files are read. Adapters are in adapter.py, merged checkpoints are written in merge.py."""

import hashlib
import os
import re
import textwrap
import threading
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import huggingface_hub as hub  # imports its parts where they are used
import torch
from tqdm import tqdm

import fast
from config import PROJECT, no_such
from families import FAMILIES, block_size, read_config
from fast.packed import readers
from files import read_json
from model import ModelConfig, Transformer
from stored_tensors import READ_BYTES, StoredTensor, read_header

# ------------------------------------------------------------------------------------------
# Files

CHECKPOINT_FILES = ["*.json", "tiktoken.model", "*.safetensors", "*.jinja", "LICENSE*"]


def local_directory(
    name: str | Path, kind: str = "checkpoint", files: list[str] = CHECKPOINT_FILES
) -> Path:
    """Returns the directory `name`, or for a hub name like deepseek-ai/ESFT-vanilla-lite the
    directory of the Hugging Face cache that `files` (no code) are downloaded to, unless they are
    there. Raises FileNotFoundError that says what to do."""
    path, missing = Path(name), no_such(name, f"{kind} directory")
    if path.is_dir():
        return path
    if path.exists():
        raise NotADirectoryError(f"{name}: is a file; a {kind} directory is required")
    if path.parts[:1] == ("checkpoints",):  # where the project's pages and configs have them
        how = "the config's comments or README.md say how to download it (`hf download`)"
        raise FileNotFoundError(f"{missing}; {how}")
    # org/name, unless there is such a folder in the project, or a folder org here: then it is a
    # path from another place, or one with a typing error.
    is_path = path.parent.is_dir() or (PROJECT / path).exists()
    if is_path or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", str(name), re.ASCII):
        raise FileNotFoundError(missing)
    try:
        return Path(hub.snapshot_download(str(name), allow_patterns=files))
    except Exception as error:  # the library raises its own, its HTTP client's and the system's
        raise FileNotFoundError(f"{missing}; {no_download(str(name), error)}") from None


def no_download(name: str, error: Exception) -> str:
    """Returns why the hub did not give the repository `name`, and what to do."""
    if isinstance(error, hub.errors.GatedRepoError):  # a kind of RepositoryNotFoundError
        page = f"https://huggingface.co/{name}"
        return f"the Hugging Face hub wants consent: give it at {page}, then run `hf auth login`"
    if isinstance(error, hub.errors.RepositoryNotFoundError):
        return "no such repository on the Hugging Face hub, or a private one (`hf auth login`)"
    reason = f"({textwrap.shorten(str(error.__cause__ or error), 120, placeholder=' ...')})"
    if isinstance(
        error, hub.errors.LocalEntryNotFoundError
    ):  # it looked in the cache, as the hub failed
        fetch = f"fetch it elsewhere with `hf download {name} --local-dir DIR` and give DIR"
        return f"the Hugging Face hub cannot be reached {reason}; if this is a hub name, {fetch}"
    return f"the Hugging Face hub did not give it {reason}; the same command continues the download"


def stored_tensors(directory: Path, config: ModelConfig) -> dict[str, StoredTensor]:
    """Returns all tensors of a checkpoint, in one file or with an index, under the files' names.
    FP8 and INT4 weights come with their scales, wherever these lie. Reads headers only. Raises
    FileNotFoundError or ValueError that names file and tensor."""
    index, whole = directory / "model.safetensors.index.json", directory / "model.safetensors"
    if index.exists():
        tensors = indexed_tensors(index)
    elif whole.is_file():
        tensors = read_header(whole)
    else:
        raise FileNotFoundError(f"{directory}: no {whole.name} and no {index.name}")
    for name in [name for name in tensors if name.endswith(".weight_packed")]:
        unpack_int4(name, tensors, config)
    for name, stored in tensors.items():
        if stored.dtype == "F8_E4M3":
            add_scale(stored, f"{name}_scale_inv", tensors, config)
    used = {stored.scale.name for stored in tensors.values() if stored.scale is not None}
    if config.quantization_config is not None:  # what only products in FP8 need
        used |= {name for name in tensors if name.endswith("activation_scale")}
    return {name: stored for name, stored in tensors.items() if name not in used}


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


def add_scale(
    stored: StoredTensor, name: str, tensors: dict[str, StoredTensor], config: ModelConfig
) -> None:
    """Gives quantised weights their scales, which are the tensor of that name."""
    form = config.quantization_config
    block = block_size(form) if form else None
    dimensions = (2,) if block else (2, 3)  # a factor a matrix is known of fused experts, too
    if form is None or name not in tensors or len(stored.shape) not in dimensions:
        raise ValueError(
            f"{stored.path}: tensor {stored.name} is {stored.dtype}; required: a matrix, a tensor "
            f"{name}, and quantization_config in config.json"
        )
    *experts, rows, columns = stored.shape
    stored.block, scale = block or (rows, columns), tensors[name]
    blocks = [-(-size // side) for size, side in zip((rows, columns), stored.block)]
    stored.scale = replace(scale, shape=(1, 1)) if scale.shape in ((), (1,)) else scale
    stored.scale.check([*experts, *blocks], ("F32", "BF16"))


def unpack_int4(name: str, tensors: dict[str, StoredTensor], config: ModelConfig) -> None:
    """Puts X.weight in the place of X.weight_packed, X.weight_scale and X.weight_shape, as the
    library compressed-tensors writes them. A packed int32 holds 8 values of a row."""
    packed, weight = tensors.pop(name), name.removesuffix("_packed")
    if packed.dtype != "I32" or len(packed.shape) != 2:
        found = f"{packed.dtype} of shape {list(packed.shape)}"
        raise ValueError(f"{packed.path}: tensor {name} is {found}; an int32 matrix is required")
    tensors.pop(f"{weight}_shape", None)
    rows, columns = packed.shape
    stored = replace(packed, name=weight, dtype="I4", shape=(rows, 8 * columns))
    add_scale(stored, f"{weight}_scale", tensors, config)
    tensors[weight] = stored


FUSED = re.compile(r"(model\.layers\.(\d{1,9})\.mlp\.experts\.)(gate_up_proj|down_proj)")


def split_experts(name: str, stored: StoredTensor, config: ModelConfig) -> dict[str, StoredTensor]:
    """Returns name -> part for each expert of a tensor that holds all experts of a layer:
    gate_up_proj (E, 2I, D) or down_proj (E, D, I). A tensor of another name is returned whole."""
    if not (fused := FUSED.fullmatch(name)) or not config.is_moe(int(fused[2])):
        return {name: stored}
    prefix, _, kind = fused.groups()
    E, I, D = config.n_routed_experts, config.moe_intermediate_size, config.hidden_size
    stored.check((E, 2 * I, D) if kind == "gate_up_proj" else (E, D, I))
    names, shape = (("gate", "up"), (I, D)) if kind == "gate_up_proj" else (("down",), (D, I))
    parts = {}
    for e in range(E):
        for i, half in enumerate(names):
            part = stored.part((len(names) * e + i) * I * D, shape)
            if stored.scale is not None:  # one factor an expert
                part = replace(part, scale=stored.scale.part(e, (1, 1)), block=shape)
            parts[f"{prefix}{e}.{half}_proj.weight"] = part
    return parts


# ------------------------------------------------------------------------------------------
# Models


def read_checkpoint(
    directory: Path, changes: Collection[str] = ()
) -> tuple[Transformer, dict[str, StoredTensor]]:
    """Returns the model of a checkpoint's config on the meta device, with its fingerprint, and the
    checkpoint's tensors under the model's names. Each tensor that the model needs is there, in its
    shape, and no other. Reads headers only. `changes`: see `read_config`.

    Skips layers for multi-token prediction, tables of rotary frequencies, and what the family does
    not need. Raises FileNotFoundError, or ValueError that names file and tensor."""
    config = read_config(directory, changes)
    family, found, foreign = FAMILIES[config.model_type], {}, set()
    layers = range(config.num_hidden_layers)
    extra = range(layers.stop, layers.stop + config.num_nextn_predict_layers)
    for file_name, stored in stored_tensors(directory, config).items():
        name = file_name.removeprefix(family.prefix)
        layer = re.match(r"model\.layers\.(\d{1,9})\.", name)
        if (layer and int(layer[1]) in extra) or name.endswith(".rotary_emb.inv_freq"):
            continue
        if any(part in file_name for part in family.unread):
            continue
        if file_name.startswith(family.prefix):
            found |= split_experts(name, stored, config)
        else:
            foreign.add(file_name)

    # These two checks come first: building a model of absurd size takes long even without weights.
    for layer in layers:
        name = f"model.layers.{layer}.input_layernorm.weight"
        if name not in found:
            names = ", ".join(sorted(foreign | {*found})[:3])
            raise ValueError(
                f"{directory}: tensor {family.prefix}{name} is missing; num_hidden_layers is "
                f"{config.num_hidden_layers}, and there are {names}"
            )
    for layer in config.moe_layers:
        name = f"model.layers.{layer}.mlp.gate.weight"
        if name not in found:
            raise ValueError(f"{directory}: tensor {family.prefix}{name} is missing")
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
        ("are missing", {family.prefix + name for name in expected.keys() - found.keys()}),
        ("do not belong to this config", foreign | found.keys() - expected.keys()),
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
    or many, experts one by one or fused, float32, bfloat16, FP8 or INT4). It covers the first 64
    values of the first row of each tensor, as bfloat16. `tensors`: see `read_checkpoint`."""
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
