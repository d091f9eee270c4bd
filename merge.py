"""Base + adapter -> a complete checkpoint that other programs load.

python merge.py --model BASE --adapter DIR --output OUT
"""

import math
import os
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from adapter import read_adapter
from checkpoint import local_directory, read_checkpoint, split_experts, stored_tensors
from config import Keys, Parser, add_keys, key, read_keys
from families import FAMILIES, file_prefix, parse_changes
from files import read_json, replacing, write_json
from model import ModelConfig
from peft_format import StoredLora
from stored_tensors import DTYPES, StoredTensor

Adapter = dict[str, StoredTensor] | StoredLora


def merge(
    base: str | Path, adapter: str | Path, output: str | Path, changes: Collection[str] = ()
) -> None:
    """Writes `base` with the adapter's tensors in place, or W + scaling * B A for LoRA, as a
    complete checkpoint, in the base's dtypes, quantised ones as bfloat16. Config (with `changes`,
    see `read_config`) and tokenizer are copied, code is not. At most the tensors of one file are in
    memory. `output` appears when it is whole."""
    base, output = local_directory(base), Path(output).resolve()
    model, tensors = read_checkpoint(base, changes)
    trained = read_adapter(local_directory(adapter, "adapter"), model)
    if model.config.tie_word_embeddings and not isinstance(trained, StoredLora):
        if embedding := trained.get("model.embed_tokens.weight"):
            trained["lm_head.weight"] = embedding
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"{output}: must be an empty directory or not exist")
    part = output.with_name(f".{output.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        write_tensors(base, model.config, trained, part)
        write_settings(base, model.config, parse_changes(changes), part)
        os.replace(part, output)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def write_tensors(base: Path, config: ModelConfig, trained: Adapter, part: Path) -> None:
    """Writes the merged safetensors files, and their index, into the directory `part`."""
    by_file: dict[Path, list[StoredTensor]] = {}
    for stored in stored_tensors(base, config).values():
        by_file.setdefault(stored.path, []).append(stored)
    weight_map, total = {}, 0
    for path in tqdm(sorted(by_file), desc="merge", unit="file", disable=None):
        merged = {s.name: merged_tensor(s, trained, config) for s in by_file[path]}
        weight_map |= {name: path.name for name in merged}
        total += sum(tensor.nbytes for tensor in merged.values())
        with replacing(part / path.name) as target:
            save_file(merged, target, metadata={"format": "pt"})
        del merged
    if (base / "model.safetensors.index.json").exists():
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(part / "model.safetensors.index.json", index, indent=2)


def write_settings(base: Path, config: ModelConfig, changed: dict, part: Path) -> None:
    """Copies all other files that a checkpoint needs. config.json says what was changed."""
    for path in sorted(base.iterdir()):
        kept = path.suffix in (".json", ".jinja", ".txt", ".model") or path.name.startswith(
            "LICENSE"
        )
        if kept and path.is_file() and not (part / path.name).exists():
            shutil.copyfile(path, part / path.name)
    if config.quantization_config is None and not changed:
        return
    raw = read_json(base / "config.json")
    family = FAMILIES[config.model_type]
    text = raw["text_config"] if family.text else raw
    for fields in (raw, text):
        if fields.pop("quantization_config", None) is not None:
            fields["dtype" if "dtype" in fields else "torch_dtype"] = "bfloat16"
    text |= changed
    for theirs, ours in {**family.names, "mlp_layer_types": "first_k_dense_replace"}.items():
        if ours in changed:
            text.pop(theirs, None)
    if changed.keys() & {"rope_theta", "rope_scaling"} and "rope_parameters" in text:
        for name in ("rope_theta", "rope_scaling"):
            text.pop(name, None)
        kind = {"rope_type": "yarn" if config.rope_scaling else "default"}
        text["rope_parameters"] = {**(config.rope_scaling or {}), **kind}
        text["rope_parameters"]["rope_theta"] = config.rope_theta
    write_json(part / "config.json", raw, indent=2)


def merged_tensor(stored: StoredTensor, trained: Adapter, config: ModelConfig) -> Tensor:
    """Returns a base's tensor, with the adapter over it. One that holds all experts of a layer is
    put together from theirs."""
    quantised = stored.scale is not None
    dtype = torch.bfloat16 if quantised else DTYPES.get(stored.dtype)
    if dtype is None:
        raise ValueError(f"{stored.path}: tensor {stored.name} is {stored.dtype}; not supported")
    tensor = torch.empty(stored.shape, dtype=dtype)
    pieces = split_experts(stored.name.removeprefix(file_prefix(config)), stored, config)
    for name, piece in pieces.items():
        start = (piece.offset - stored.offset) // DTYPES[stored.dtype].itemsize
        target = tensor.view(-1)[start : start + math.prod(piece.shape)].view(piece.shape)
        copy_merged(name, piece, trained, target)
    return tensor


def copy_merged(name: str, stored: StoredTensor, trained: Adapter, target: Tensor) -> None:
    """Fills `target` with the base's tensor of that name, or with the adapter's, or with
    W + scaling * B A, computed in float32 and rounded once."""
    if not isinstance(trained, StoredLora):
        trained.get(name, stored).copy_to(target)
        return
    module = name.removesuffix(".weight")
    if module not in trained.updates:
        stored.copy_to(target)
        return
    A, B = (trained.tensors[f"{module}.{half}.weight"].read() for half in ("lora_A", "lora_B"))
    weight = torch.empty(target.shape)
    stored.copy_to(weight)
    target.copy_(weight.addmm_(B.float(), A.float(), alpha=trained.updates[module].scaling))


@dataclass
class MergeConfig(Keys):
    model: str = key("", "base checkpoint: a directory or a hub name")
    adapter: str = key("", "a directory in ESFT's format or in that of PEFT's LoRA, or a hub name")
    output: str = key("", "directory to write; must not hold anything yet")
    model_config: list[str] = key((), "FIELD=VALUE ...: changes of config.json, values in JSON")


def command_line() -> Parser:
    parser = Parser(
        "Write a complete checkpoint, base and adapter in one, for use anywhere.",
        "python merge.py --model demo/base --adapter runs/demo/adapter --output runs/merged"
        "  # after the demo's run",
    )
    add_keys(parser, MergeConfig)
    return parser


def main() -> None:
    try:
        config = read_keys(MergeConfig, command_line().parse_args())
        for name in ("model", "adapter", "output"):
            if not getattr(config, name):
                raise ValueError(f"--{name} is required")
        merge(config.model, config.adapter, config.output, config.model_config)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    print(f"wrote the merged checkpoint to {config.output}")
    print(f"next: python eval.py --model {config.output} --task exact --data FILE --output FILE")


if __name__ == "__main__":
    main()
