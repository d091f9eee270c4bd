"""Bad files: every mutant of a good checkpoint or adapter either loads to the right numbers or ends
in a ValueError or OSError that names the file, soon, with nothing read outside the directory and
nothing half-loaded.

A mutant is one changed file in a copy of a tiny DeepSeek-V3 checkpoint (in one file, in shards with
an index, or in FP8) or of an adapter, and follows from its seed. The right numbers come from code
that is not the project's: safetensors' own loader and a plain formula for the parameters, and for
mutants of config.json also transformers' logits."""

import json
import math
import random
import re
import shutil
import sys
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import transformers
from conftest import one_by_one
from safetensors.torch import load, save
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from adapter import load_adapter, save_adapter
from checkpoint import load_model
from model import ModelConfig

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
SHARD, ADAPTER, EXPERTS = "first shard", "adapter.safetensors", "expert_cfg.json"
TOKENS = torch.arange(24)[None] * 7 % 32
SECONDS = 10  # for one mutant; it takes some hundredths, but the machine may be busy

# ------------------------------------------------------------------------------------------
# The good files


@pytest.fixture(scope="module", autouse=True)
def quiet():
    """Without transformers' warnings about the configs that it is given here."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    yield
    transformers.logging.set_verbosity(verbosity)
    transformers.logging.enable_progress_bar()


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A directory with plain/, sharded/, fp8/, adapter/ and another adapter, other/; beside them a
    decoy that holds every tensor, for whoever follows an index out of its directory."""
    root = tmp_path_factory.mktemp("mutants").resolve()
    yarn = dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, mscale=0.7, mscale_all_dim=1.0)
    yarn |= dict(original_max_position_embeddings=64, beta_fast=32, beta_slow=1)
    widths = dict(vocab_size=32, hidden_size=16, intermediate_size=24, moe_intermediate_size=8)
    heads = dict(num_attention_heads=2, num_key_value_heads=2, kv_lora_rank=8, q_lora_rank=12)
    heads |= dict(qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, rope_parameters=yarn)
    routing = dict(n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2, n_group=2)
    routing |= dict(topk_group=1, norm_topk_prob=True, routed_scaling_factor=2.5)
    config = DeepseekV3Config(
        num_hidden_layers=2, first_k_dense_replace=1, **widths, **heads, **routing
    )
    torch.manual_seed(0)
    oracle = DeepseekV3ForCausalLM(config)
    with torch.no_grad():
        for name, parameter in oracle.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.4)
        for name, buffer in oracle.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.uniform_(0.0, 0.5)
    for name, size in (("plain", "1GB"), ("sharded", "10KB")):
        oracle.save_pretrained(root / name, max_shard_size=size)
        raw = json.loads((root / name / CONFIG).read_text())
        raw = {field: raw[field] for (field,) in READ[:-2] if field in raw}
        raw["rope_parameters"] = yarn  # and no field that only transformers reads
        (root / name / CONFIG).write_text(json.dumps(raw, indent=2))
    shutil.copyfile(root / "plain" / SINGLE, root / "decoy.safetensors")

    raw["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3"}
    raw["quantization_config"] |= {"activation_scheme": "dynamic", "weight_block_size": [8, 8]}
    tensors = load((root / "plain" / SINGLE).read_bytes())
    for name, tensor in list(tensors.items()):
        if tensor.ndim == 2 and not re.search("embed_tokens|lm_head|norm|gate.weight", name):
            blocks = [math.ceil(size / 8) for size in tensor.shape]
            tensors[f"{name}_scale_inv"] = torch.rand(blocks) + 0.5
            tensors[name] = tensor.to(torch.float8_e4m3fn)
    (root / "fp8").mkdir()
    (root / "fp8" / CONFIG).write_text(json.dumps(raw))
    (root / "fp8" / SINGLE).write_bytes(save(tensors))

    model = load_model(root / "plain", dtype=torch.float32)
    for name, chosen in (("adapter", [1, 2]), ("other", [0, 1])):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.5)
        save_adapter(model, {"experts": {"1": chosen}, "shared_experts": True}, root / name)
    return root


# ------------------------------------------------------------------------------------------
# Mutators: from a random.Random and a file's bytes, what was done and the new bytes

VALUES = [0, -1, 1, 2, 3, 2**18, 2**31, 10**18, 1e308, math.nan, math.inf, 0.5, "7", "", None, True]
VALUES += [False, [], {}, [1], {"a": 1}, 10**400, "é" * 300]
READ = [[field.name] for field in fields(ModelConfig)] + [["rope_parameters"], ["index_topk"]]
YARN = "rope_type rope_theta factor mscale mscale_all_dim original_max_position_embeddings"
YARN += " beta_fast beta_slow attention_factor"
ROPE = [["rope_parameters", name] for name in YARN.split()]
FP8 = ["quant_method", "fmt", "activation_scheme", "weight_block_size", "weight_block_size"]
FILES = ["../decoy.safetensors", "ROOT/decoy.safetensors", "x/../../decoy.safetensors"]
FILES += ["/etc/passwd", "", ".", "a" * 5000 + ".safetensors", "\u4e00" * 200 + ".safetensors"]
FILES += [None, 7, [], "decoy.safetensors\0", CONFIG, "missing.safetensors", "\ud800"]
NAMES = ["", "model", "model.layers.0.mlp.gate.weight", "model.layers.2.mlp.gate.weight", "é\0"]
NAMES += [f"model.layers.{i}.mlp.experts.down_proj" for i in (0, 1, 99, "9" * 11, "9" * 5000, "٣")]
HEADER = "length text dtype shape offsets swap swap rename rename drop again metadata".split()
DTYPES = ["F32", "BF16", "F16", "F64", "I32", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "f32", 7, None]


def neighbours(value) -> list:
    if type(value) is bool:
        return [not value]
    if isinstance(value, list):
        return [[draw, *value[1:]] for draw in (9, 10, 12, 16, 0)] + [value[:1], value[::-1]]
    return [value + 1, value * 2, value / 2, value - 1] if isinstance(value, (int, float)) else []


def text(draw, good: bytes):
    """The bytes of any file: cut, changed, extended."""
    at, end = draw.randrange(len(good)), draw.randrange(len(good))
    byte = draw.randrange(256)
    return draw.choice(
        [
            (f"cut at {at}", good[:at]),
            (f"byte {at} is {byte}", good[:at] + bytes([byte]) + good[at + 1 :]),
            (f"bit of byte {at}", good[:at] + bytes([good[at] ^ 1 << byte % 8]) + good[at + 1 :]),
            (f"byte {byte} put in at {at}", good[:at] + bytes([byte]) + good[at:]),
            (f"{at} to {end} are missing", good[:at] + good[max(at, end) :]),
            (f"brackets at {at}", good[:at] + b"[" * 100_000 + good[at:]),
            ("bytes appended", good + bytes(draw.choice([[0], [10], [32, 10], [255]]))),
            ("empty", b""),
        ]
    )


def set_field(draw, value: dict, path: list[str]) -> str:
    """Changes one entry of a nested dictionary, or takes it out."""
    *parents, name = path
    for parent in parents:
        value = value[parent]
    if draw.random() < 0.1:
        value.pop(name, None)
        return f"{'.'.join(path)} is missing"
    near = neighbours(value.get(name))
    value[name] = draw.choice(near if near and draw.random() < 0.4 else VALUES)
    return f"{'.'.join(path)} is {value[name]!r:.50}"


def config_field(draw, good: bytes, paths=READ + 3 * ROPE):
    config = json.loads(good)
    path = draw.choice(paths)
    if draw.random() < 0.05:  # the same name again, first or last
        again = json.dumps(path[0]) + ": " + json.dumps(draw.choice(VALUES))
        body = good.decode().strip()[1:-1]
        both = draw.choice([f"{{{again}, {body}}}", f"{{{body}, {again}}}"])
        return f"{path[0]} again, {again:.50}", both.encode()
    return set_field(draw, config, path), json.dumps(config).encode()


def fp8_config(draw, good: bytes):
    paths = [["quantization_config", name] for name in FP8] + [["quantization_config"]]
    return config_field(draw, good, paths)


def index_entry(draw, good: bytes):
    index = json.loads(good)
    weight_map = index["weight_map"]
    name, other = draw.sample(sorted(weight_map), 2)
    file = draw.choice([*FILES, weight_map[other]])
    kind = draw.choice("one one one all renamed dropped added map metadata".split())
    if kind == "one":
        weight_map[name] = file
    elif kind == "all":
        index["weight_map"] = dict.fromkeys(weight_map, file)
    elif kind == "renamed":
        weight_map[draw.choice(NAMES)] = weight_map.pop(name)
    elif kind == "dropped":
        del weight_map[name]
    elif kind == "added":
        weight_map[draw.choice(NAMES)] = file
    else:
        index["weight_map" if kind == "map" else kind] = draw.choice(VALUES)
    return f"{kind}: {name} in {file!r:.50}", json.dumps(index).encode()


def header(draw, good: bytes):
    """The header of a safetensors file: its length, an entry, or its text."""
    length = int.from_bytes(good[:8], "little")
    content, data = json.loads(good[8 : 8 + length]), good[8 + length :]
    name, other = draw.sample(sorted(content.keys() - {"__metadata__"}), 2)
    entry, offsets = content[name], content[name]["data_offsets"]
    kind = draw.choice(HEADER)
    what = ""
    if kind == "length":
        length = draw.choice([0, 1, length - 1, length + 1, length + 8, 2**31, 2**63, 2**64 - 1])
        return f"length {length}", length.to_bytes(8, "little") + good[8:]
    if kind == "text":
        what, encoded = text(draw, good[8 : 8 + length])
    elif kind == "dtype":
        entry["dtype"] = what = draw.choice(DTYPES)
    elif kind == "shape":
        shape = entry["shape"]
        near = [shape[::-1], [1, *shape], [math.prod(shape)], [], [0], [2**31, 2**31], [2**64 + 1]]
        entry["shape"] = what = draw.choice([*near, [-1, *shape[1:]], [*shape[1:], 0.5], "7", None])
    elif kind == "offsets":
        begin, end = offsets
        near = [[begin - 4, end], [begin, end + 4], [end, begin], [-8, -4], [begin], [begin, 2**63]]
        entry["data_offsets"] = what = draw.choice([*near, [begin + 4, end + 4], [0, 2**64], None])
    elif kind == "swap":  # of equal size, if there is one
        alike = [n for n in content if n != name and content[n].get("shape") == entry["shape"]]
        other = draw.choice(alike or [other])
        content[name], content[other] = content[other], content[name]
        what = other
    elif kind == "rename":
        what = draw.choice([*NAMES, other])
        content[what] = content.pop(name)
    elif kind == "drop":
        del content[name]
    elif kind == "again":
        what = draw.choice(NAMES)
        content[what] = dict(entry)
    else:
        content["__metadata__"] = what = draw.choice([*VALUES, {"format": 7}, {"format": "np"}])
    if kind != "text":
        encoded = json.dumps(content).encode()
    return f"{kind} {name} {what!r:.50}", len(encoded).to_bytes(8, "little") + encoded + data


def scales(draw, good: bytes):
    """The factors of an FP8 weight: their values, shape, dtype, or where they are."""
    tensors = load(good)
    name = draw.choice(sorted(name for name in tensors if name.endswith("_scale_inv")))
    scale = tensors[name]
    kind = draw.choice(["value"] * 5 + "shape dtype missing moved weight".split())
    what = ""
    if kind == "value":
        what = draw.choice([math.inf, -math.inf, math.nan, -1.0, -1e-30, 0.0, 1e-40, 1e38, 3.0])
        scale.view(-1)[draw.randrange(scale.numel())] = what
    elif kind == "shape":
        ways = [scale.T, scale[:1], scale.view(-1), scale[None], scale.repeat(2, 1), scale[:0]]
        tensors[name] = draw.choice(ways).contiguous().clone()
        what = list(tensors[name].shape)
    elif kind == "dtype":
        what = draw.choice([torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.int32])
        tensors[name] = scale.to(what)
    elif kind == "weight":  # no FP8, but its scales are still there
        weight = name.removesuffix("_scale_inv")
        what = draw.choice([torch.float32, torch.float8_e5m2, torch.bfloat16])
        tensors[weight] = tensors[weight].float().to(what)
    else:
        del tensors[name]
        if kind == "moved":
            tensors[draw.choice([name.removesuffix("_inv"), *NAMES])] = scale
    return f"{kind} {name} {what}", save(tensors)


def expert_cfg(draw, good: bytes):
    value = json.loads(good)
    experts = draw.choice([[4], [1, 1], [-1], [1.0], [True], ["1"], [[1]], [2**70], [2, 1], [1]])
    key = draw.choice(["1", "1", "1", "0", "2", "-1", "01", "", "1 ", "٣", "9" * 5000])
    if draw.random() < 0.5:
        value["experts"][key] = draw.choice([experts, experts, experts, *VALUES])
        return f"layer {key:.20} is {value['experts'][key]!r:.50}", json.dumps(value).encode()
    names = ["experts", "shared_experts", "non_expert_modules", "base_fingerprint", "unknown"]
    path = draw.choice([*([name] for name in names), ["experts", "1"]])
    return set_field(draw, value, path), json.dumps(value).encode()


# ------------------------------------------------------------------------------------------
# The verdict

OPENED: list[str] | None = None  # what Python opened since the start of a mutant


def note_open(event: str, args: tuple) -> None:
    if event == "open" and OPENED is not None and isinstance(args[0], (str, Path)):
        OPENED.append(str(args[0]))


sys.addaudithook(note_open)  # cannot be taken back, but does nothing between mutants


@contextmanager
def mutants(directory: Path, file: str, mutate, count: int):
    """Yields an iterator over the mutants' descriptions, each in place while it is the current one;
    a failure says which one it was."""
    path, seen = directory / file, []
    good = path.read_bytes()

    def each():
        for seed in range(count):
            what, changed = mutate(random.Random(f"{file} {seed}"), good)
            changed = changed.replace(b"ROOT", str(directory.parent).encode())
            seen.append(f"{mutate.__name__} of {path}, seed {seed}: {what}")
            path.write_bytes(changed)
            yield what

    try:
        yield each()
    except BaseException as error:
        error.add_note(f"in {seen[-1] if seen else path}")
        raise
    finally:
        path.write_bytes(good)


def attempt(load, directory: Path):
    """What `load` returns, or the error that it ends in, which must name a path in `directory`."""
    global OPENED
    OPENED, start = [], time.monotonic()
    try:
        result = load()
    except (ValueError, OSError) as error:
        result = error
        assert str(directory) in str(error), f"names no file: {error!r}"
    finally:
        opened, OPENED = OPENED, None
    assert time.monotonic() - start < SECONDS
    for name in map(Path, opened):
        ours = name.suffix in (".json", ".safetensors") or directory.parent in name.parents
        assert not ours or name.resolve().parent == directory, f"{name} was read"
    return result


def stored_parameters(directory: Path) -> dict[str, torch.Tensor]:
    """The float32 parameters of a checkpoint, with safetensors' own loader; FP8 by its formula.
    Layers after the last, of which the config speaks, are for multi-token prediction."""
    config = json.loads((directory / CONFIG).read_text())
    first, extra = config["num_hidden_layers"], config.get("num_nextn_predict_layers", 0)
    if (directory / INDEX).exists():
        weight_map = json.loads((directory / INDEX).read_text())["weight_map"]
        files = {file: load((directory / file).read_bytes()) for file in {*weight_map.values()}}
        tensors = {name: files[file][name] for name, file in weight_map.items()}
    else:
        tensors = load((directory / SINGLE).read_bytes())
    parameters = {}
    for name, tensor in tensors.items():
        if tensor.dtype == torch.float8_e4m3fn:
            height, width = config["quantization_config"]["weight_block_size"]
            row, column = (torch.arange(size) for size in tensor.shape)
            scale = tensors[f"{name}_scale_inv"]
            assert (scale.isfinite() & (scale >= 0)).all(), f"a bad scale of {name} was taken"
            scale = scale[row // height][:, column // width]
            tensor = tensor.float() * scale
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        if name.endswith("_scale_inv") or (layer and first <= int(layer[1]) < first + extra):
            continue
        parameters[name] = tensor.float()
    return one_by_one(parameters)


def assert_equal(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor.view(torch.int32), expected[name].view(torch.int32)), name


def transformers_differs(config: dict) -> str:
    """Why transformers is no oracle for a config that loads; empty where it is one."""
    rope = config.get("rope_parameters") or {}
    mscales = rope.get("mscale") and rope.get("mscale_all_dim")
    if rope.get("rope_type") == "yarn" and not mscales:
        return "DeepSeek's own code divides by mscale(factor, 0) = 1; transformers ignores both"
    if config["num_experts_per_tok"] == 1 and config.get("norm_topk_prob", True):
        return "DeepSeek's own code does not normalise the weight of a single expert"
    if config.get("num_key_value_heads") != config["num_attention_heads"]:
        return "latent attention has no such heads; transformers fails in attention"
    if config.get("head_dim", config["qk_rope_head_dim"]) != config["qk_rope_head_dim"]:
        return "only transformers has this field for the rotary part; it fails, or turns less"
    if any(type(config.get(name)) is int for name in ("rms_norm_eps", "routed_scaling_factor")):
        return "transformers asks for a decimal point"
    return ""


def check_logits(directory: Path, model) -> bool:
    """Whether transformers takes the config; then its logits are ours."""
    if transformers_differs(json.loads((directory / CONFIG).read_text())):
        return False
    oracle = DeepseekV3ForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        expected, logits = oracle(TOKENS).logits, model(TOKENS)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    return True


# ------------------------------------------------------------------------------------------
# Tests

CHECKPOINTS = [  # directory, file, mutator, how many; at least so many are refused, and loaded
    ("plain", CONFIG, config_field, 500, 250, 100),
    ("plain", CONFIG, text, 150, 80, 15),
    ("sharded", INDEX, index_entry, 150, 100, 5),
    ("sharded", INDEX, text, 80, 40, 5),
    ("sharded", SHARD, header, 100, 60, 5),
    ("plain", SINGLE, header, 300, 200, 15),
    ("plain", SINGLE, text, 60, 30, 5),
    ("fp8", CONFIG, fp8_config, 80, 40, 8),
    ("fp8", SINGLE, header, 100, 60, 5),
    ("fp8", SINGLE, scales, 120, 60, 15),
]
ADAPTERS = [
    (ADAPTER, header, 150, 90, 8),
    (ADAPTER, text, 40, 20, 3),
    (EXPERTS, expert_cfg, 150, 90, 8),
    (EXPERTS, text, 80, 40, 8),
]


def test_there_are_a_thousand_mutants():
    assert sum(row[-3] for row in CHECKPOINTS + ADAPTERS) >= 1000


@pytest.mark.parametrize("base, file, mutate, count, refused, loaded", CHECKPOINTS)
def test_mutated_checkpoints(root, base, file, mutate, count, refused, loaded):
    directory, outcomes = root / base, Counter()
    if file == SHARD:
        file = min(path.name for path in directory.glob("model-*.safetensors"))
    good = load_model(directory, dtype=torch.float32)
    assert_equal(good.state_dict(), stored_parameters(directory))
    with mutants(directory, file, mutate, count) as each:
        for what in each:
            result = attempt(lambda: load_model(directory, dtype=torch.float32), directory)
            if isinstance(result, Exception):
                outcomes["refused"] += 1
                if mutate in (config_field, fp8_config):  # which names the field, or a tensor
                    field = re.match(r"[\w.]+", what)[0].split(".")[-1].removeprefix("rope_")
                    assert re.search(f"{field}|rope_scaling|tensor", str(result)), str(result)
                continue
            outcomes["loaded"] += 1
            assert_equal(result.state_dict(), stored_parameters(directory))
            if directory.name == "plain" and file == CONFIG:
                outcomes["compared"] += check_logits(directory, result)
    print(base, file, mutate.__name__, dict(outcomes))
    assert outcomes["refused"] >= refused and outcomes["loaded"] >= loaded
    if directory.name == "plain" and file == CONFIG:
        assert outcomes["compared"] >= outcomes["loaded"] / 2


@pytest.fixture(scope="module")
def adapted(root):
    """A model under the adapter other/, and its tensors without and with it."""
    model = load_model(root / "plain", dtype=torch.float32)
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    load_adapter(model, root / "other")
    return model, base, {name: tensor.clone() for name, tensor in model.state_dict().items()}


def selected(name: str, cfg: dict) -> bool:
    """Whether an expert_cfg selects a parameter."""
    if expert := re.search(r"layers\.(\d+)\.mlp\.experts\.(\d+)\.", name):
        return int(expert[2]) in cfg["experts"].get(expert[1], [])
    return cfg.get("shared_experts" if "shared_experts" in name else "non_expert_modules", False)


def load_in_place_of_other(root: Path, adapted) -> bool:
    """Whether root/adapter loads: then its tensors are over the base and no others; if it is
    refused, nothing has changed."""
    model, base, before = adapted
    directory = root / "adapter"
    if isinstance(attempt(lambda: load_adapter(model, directory), directory), Exception):
        assert_equal(model.state_dict(), before)
        return False
    cfg = json.loads((directory / EXPERTS).read_text())
    stored = load((directory / ADAPTER).read_bytes())
    assert stored.keys() == {name for name, _ in model.named_parameters() if selected(name, cfg)}
    assert_equal(model.state_dict(), base | {name: t.float() for name, t in stored.items()})
    load_adapter(model, root / "other")
    assert_equal(model.state_dict(), before)
    return True


@pytest.mark.parametrize("file, mutate, count, refused, loaded", ADAPTERS)
def test_mutated_adapters(root, adapted, file, mutate, count, refused, loaded):
    assert load_in_place_of_other(root, adapted)
    with mutants(root / "adapter", file, mutate, count) as each:
        outcomes = Counter(load_in_place_of_other(root, adapted) for _ in each)
    print(file, mutate.__name__, dict(outcomes))
    assert outcomes[False] >= refused and outcomes[True] >= loaded


@pytest.mark.parametrize("base", ["plain", "sharded", "fp8", "adapter"])
def test_missing_and_strange_files(root, adapted, base):
    """Each file in turn is missing, is a directory, is a link to nowhere; then one too many."""
    directory, kept = root / base, root / "kept"

    def loads() -> bool:
        if base == "adapter":
            return load_in_place_of_other(root, adapted)
        result = attempt(lambda: load_model(directory, dtype=torch.float32), directory)
        return not isinstance(result, Exception)

    read = [path for path in directory.iterdir() if path.name != "generation_config.json"]
    for path in [*read, directory / "extra.safetensors"]:
        extra = path not in read
        if not extra:
            path.rename(kept)
            assert not loads(), f"without {path}"
        path.mkdir()
        assert loads() == (extra and base != "adapter"), f"{path} is a directory"
        path.rmdir()
        path.symlink_to("nowhere")
        assert loads() == (extra and base != "adapter"), f"{path} is a link to nowhere"
        path.unlink()
        if not extra:
            kept.rename(path)
    assert loads()
