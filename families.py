"""config.json -> a checked ModelConfig, for each family of checkpoints.

A family is one entry of FAMILIES, under its `model_type`: what model.py computes of it, and how its
files differ from DeepSeek's own. docs/families.md says what was tested of each, and how one is
added."""

import json
from collections.abc import Collection, Iterator
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path

from files import read_json
from model import ModelConfig

# ------------------------------------------------------------------------------------------
# The families

LATENT = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")


@dataclass(frozen=True)
class Family:
    """What the checkpoints of one `model_type` have of their own."""

    # The values that model.py computes of fields that name a variant. The first is the default,
    # because DeepSeek's own configuration classes leave some of these fields out.
    supported: dict[str, list]
    defaults: dict = field(default_factory=dict)  # of other fields that may be left out
    required: tuple[str, ...] = LATENT  # fields that not every family has
    names: dict[str, str] = field(default_factory=dict)  # the file's name of a field -> DeepSeek's
    yarn: tuple[str, ...] = ()  # numbers of rope_scaling that only this family has
    whole_heads: bool = False  # partial_rotary_factor is a part of a head, not of its rotary part
    # Where the language model is a part of the whole: the model_types that text_config may have,
    # and what the names of its tensors begin with.
    text: tuple[str, ...] = ()
    prefix: str = ""
    unread: tuple[str, ...] = ()  # parts of names of tensors that only a merged checkpoint needs


SIGMOID = {"scoring_func": ["sigmoid"], "topk_method": ["noaux_tc"]}
# DeepSeek's own files leave some of these out. Those of other families have all.
V3_DEFAULTS = {"norm_topk_prob": True, "routed_scaling_factor": 2.5, "n_group": 8, "topk_group": 4}
STATED = (*LATENT, *V3_DEFAULTS, "rms_norm_eps", "rope_theta")
LIKE_V3 = Family(SIGMOID, required=STATED)
# Attention is to tokens that an indexer chooses: to all, while a row has at most index_topk.
V32 = Family(
    SIGMOID | {"rope_interleave": [True]},
    required=(*STATED, "index_topk"),
    unread=(".self_attn.indexer.",),
)
MISTRAL4 = Family(
    {"scoring_func": ["softmax"], "topk_method": ["greedy"], "n_group": [1]},
    required=(*STATED, "rope_scaling"),
    yarn=("llama_4_scaling_beta",),
    whole_heads=True,
)
FAMILIES = {
    "deepseek": Family(
        {
            "scoring_func": ["softmax"],
            "topk_method": ["greedy"],
            "routed_scaling_factor": [1.0],
            "quantization_config": [None],
        },
        required=(),
    ),
    "deepseek_v2": Family(
        {
            "scoring_func": ["softmax"],
            "topk_method": ["greedy", "group_limited_greedy"],
            "quantization_config": [None],
        }
    ),
    "deepseek_v3": Family(SIGMOID, V3_DEFAULTS),
    "deepseek_v32": V32,
    "glm4_moe_lite": LIKE_V3,
    "glm_moe_dsa": V32,
    "kimi_k2": LIKE_V3,
    "kimi_k25": replace(
        LIKE_V3,
        text=("kimi_k2", "deepseek_v3"),
        prefix="language_model.",
        unread=("vision_tower.", "mm_projector."),
    ),
    "mistral3": replace(
        MISTRAL4,
        text=("mistral4",),
        prefix="language_model.",
        unread=("vision_tower.", "multi_modal_projector."),
    ),
    "mistral4": MISTRAL4,
    "sarvam_mla": replace(
        LIKE_V3,
        # Its config.json leaves them out. Its code always normalises. Its authors' pull request to
        # vLLM (56034) and transformers say that all experts are one group.
        defaults={"norm_topk_prob": True, "n_group": 1, "topk_group": 1},
        names={
            "num_experts": "n_routed_experts",
            "num_shared_experts": "n_shared_experts",
            "num_mtp_layers": "num_nextn_predict_layers",
        },
    ),
}
EVERY_FAMILY = {"hidden_act": ["silu"], "mlp_bias": [False], "attention_dropout": [0.0]}
YARN = ("yarn", "deepseek_yarn")  # two names of one method
REFUSED = {  # families that one may take for one of these
    "deepseek_v4": "its attention is not the latent one, and it has hyper-connections, layers that "
    "a hash routes, and experts in FP4",
    "kimi_linear": "most of its layers have linear attention",
    "longcat_flash": "its layers hold two attentions, and experts that compute nothing",
}


def file_prefix(config: ModelConfig) -> str:
    """Returns what the checkpoint's files write before the names of model.py's parameters."""
    return FAMILIES[config.model_type].prefix


def check_family(raw: dict) -> Family:
    """Returns the family of a config.json. Raises ValueError that says why it has none."""
    name = raw.get("model_type")
    if not isinstance(name, str):
        raise ValueError(f"model_type is {name!r}; supported: {', '.join(FAMILIES)}")
    if name in FAMILIES:
        return FAMILIES[name]
    problem = f"model_type is {name!r}; supported: {', '.join(FAMILIES)}"
    if name in REFUSED:
        raise ValueError(f"{problem}. Not this one: {REFUSED[name]}")
    for needed, what in (("kv_lora_rank", "latent attention"), ("n_routed_experts", "experts")):
        if flat(raw).get(needed) is None:
            why = f"neither config.json nor its text_config names {needed}: it has no {what}"
            raise ValueError(f"{problem}. Not this one: {why}")
    raise ValueError(f"{problem}. docs/families.md says how one is added")


# ------------------------------------------------------------------------------------------
# Reading


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
    family = check_family(raw | changed)
    supported = EVERY_FAMILY | family.supported
    raw = deepseek_names(language_model(raw, family), family) | changed
    values = {name: choices[0] for name, choices in supported.items()} | family.defaults | raw
    for name, choices in supported.items():
        if values[name] not in choices:
            shown = ", ".join(map(repr, choices))
            raise ValueError(f"{name} is {values[name]!r}; supported: {shown}")
    missing = [f.name for f in fields(ModelConfig) if f.default is MISSING and f.name not in values]
    for name in (*missing, *(name for name in family.required if values.get(name) is None)):
        raise ValueError(f"field {name} is missing")
    if values.get("index_topk") is not None and "index_topk" not in family.required:
        raise ValueError(f"index_topk is {values['index_topk']!r}; not supported in this family")
    if values.get("num_key_value_heads") is None:
        values["num_key_value_heads"] = values["num_attention_heads"]
    names = {f.name for f in fields(ModelConfig)} & values.keys()
    config = ModelConfig(**{name: values[name] for name in names})
    for problems in (field_problems, size_problems, routing_problems, rope_problems):
        for problem in problems(config):
            raise ValueError(problem)
    for problem in quantization_problems(config.quantization_config):
        raise ValueError(f"quantization_config: {problem}")
    config.rope_scaling = yarn(config.rope_scaling)
    return config


def flat(raw: dict) -> dict:
    """Returns the fields of a config.json, with those of the language model where it is a part."""
    text = raw.get("text_config")
    return raw | text | {"model_type": raw.get("model_type")} if isinstance(text, dict) else raw


def context_length(directory: Path) -> int | None:
    """Returns how many tokens a row of a checkpoint may have, as its config.json says."""
    most = flat(read_json(directory / "config.json")).get("max_position_embeddings")
    return most if isinstance(most, int) else None


def language_model(raw: dict, family: Family) -> dict:
    """Returns the fields of the language model, which may be one part of a model."""
    if not family.text:
        return raw
    text = raw.get("text_config")
    if not isinstance(text, dict) or text.get("model_type") not in family.text:
        shown = text.get("model_type") if isinstance(text, dict) else text
        raise ValueError(
            f"text_config: model_type is {shown!r}; supported: {', '.join(family.text)}"
        )
    whole = ("model_type", "tie_word_embeddings", "quantization_config")
    return text | {name: raw[name] for name in whole if raw.get(name) is not None}


def deepseek_names(raw: dict, family: Family) -> dict:
    """Returns the fields under the names that DeepSeek gives them."""
    said = {ours: (theirs, raw[theirs]) for theirs, ours in family.names.items() if theirs in raw}
    if (kinds := raw.get("mlp_layer_types")) is not None:
        kinds = kinds if isinstance(kinds, list) else []
        dense = kinds.count("dense")
        as_one = ["dense"] * dense + ["sparse"] * (len(kinds) - dense)
        if kinds != as_one or len(kinds) != raw.get("num_hidden_layers"):
            wanted = "'dense' for the first layers, then 'sparse' for all others"
            raise ValueError(
                f"mlp_layer_types is {raw['mlp_layer_types']!r}; supported: a list with {wanted}"
            )
        said["first_k_dense_replace"] = "mlp_layer_types", dense
    if (rope := raw.get("rope_parameters")) is not None:  # transformers 5
        if not isinstance(rope, dict):
            raise ValueError(f"rope_parameters is {rope!r}; must be an object")
        said["rope_scaling"] = "rope_parameters", rope
        if "rope_theta" in rope:
            said["rope_theta"] = "rope_parameters", rope["rope_theta"]
    for ours, (theirs, value) in said.items():
        if raw.get(ours, value) not in (None, value):
            raise ValueError(f"{ours} is {raw[ours]!r}, but {theirs} says {value!r}")
    raw = raw | {ours: value for ours, (_, value) in said.items()}
    part, rope = raw.get("partial_rotary_factor"), raw.get("rope_scaling") or {}
    if part is not None and isinstance(rope, dict):  # GLM-4.7-Flash states it apart
        raw["rope_scaling"] = {"partial_rotary_factor": part, **rope}
    return raw


def yarn(rope: dict | None) -> dict | None:
    """Returns the numbers of YaRN; None where the rotary settings name none."""
    rope = {name: value for name, value in (rope or {}).items() if value is not None}
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    return rope if kind in YARN else None


# ------------------------------------------------------------------------------------------
# Checks


def field_problems(config: ModelConfig) -> Iterator[str]:
    for f in fields(config):
        name, kind, value = f.name, f.type, getattr(config, f.name)
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
        if c.qk_rope_head_dim % 2:
            yield f"qk_rope_head_dim is {c.qk_rope_head_dim}; must be even"
        return
    if D % (2 * heads):
        required = f"must divide hidden_size ({D}) into heads of even size"
        yield f"num_attention_heads is {heads}; {required}"
    if heads % c.num_key_value_heads:
        yield f"num_key_value_heads is {c.num_key_value_heads}; must divide {heads} heads"


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
    rope, family = config.rope_scaling, FAMILIES[config.model_type]
    if rope is None:
        return
    if not isinstance(rope, dict):
        yield f"rope_scaling is {rope!r}; must be an object or null"
    rope = {name: value for name, value in rope.items() if value is not None}
    kind = rope.get("rope_type", rope.get("type", "default"))
    kinds = ("default",) if config.model_type == "deepseek" else ("default", *YARN)
    if kind not in kinds:
        yield f"rope_scaling: type is {kind!r}; supported: {', '.join(map(repr, kinds))}"
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    if kind in YARN:
        numbers = {"factor": 1, "original_max_position_embeddings": 1}
        given = ("beta_fast", "beta_slow", "mscale", "mscale_all_dim", *family.yarn)
        numbers |= {name: 0 for name in given if name in rope}
        for name, least in numbers.items():
            value = rope.get(name)
            usable = type(value) in (int, float) and (value == 0 or 1e-6 < value < 1e30)
            if not usable or value < least:
                yield f"rope_scaling: {name} is {value!r}; must be a number from {least}"
        known |= {*numbers, *given, "max_position_embeddings"}
    c, part = config, 1
    if family.whole_heads:
        part = c.qk_rope_head_dim / (c.qk_nope_head_dim + c.qk_rope_head_dim)
    if rope.get("partial_rotary_factor", part) != part:
        found = f"partial_rotary_factor is {rope['partial_rotary_factor']!r}"
        yield f"{found}; must be {part}, for qk_rope_head_dim {c.qk_rope_head_dim}"
    for name in rope.keys() - known:  # attention_factor, for example
        yield f"rope_scaling: {name} is {rope[name]!r}; not supported"


def quantization_problems(form: dict | None) -> Iterator[str]:
    """Supported are e4m3 in blocks (V3) or with one scale a matrix (Mistral 4), and integers of 4
    bits in groups of a row (Kimi)."""
    if form is None:
        return
    if not isinstance(form, dict):
        yield f"is {form!r}; must be an object or null"
    method = form.get("quant_method")
    if method not in ("fp8", "compressed-tensors"):
        yield f"quant_method is {method!r}; supported: 'fp8', 'compressed-tensors'"
    if method == "compressed-tensors":
        yield from int4_problems(form)
        return
    if form.get("fmt", "e4m3") != "e4m3":
        yield f"fmt is {form['fmt']!r}; supported: 'e4m3'"
    if (block := form.get("weight_block_size", "missing")) is None:
        return
    if not (isinstance(block, list) and [type(size) for size in block] == [int, int]):
        yield f"weight_block_size is {block!r}; two integers are required"
    if not all(1 <= size < 2**19 for size in block):
        yield f"weight_block_size is {block!r}; must be from 1 to 2^19 - 1"


def int4_problems(form: dict) -> Iterator[str]:
    if form.get("format") != "pack-quantized":
        yield f"format is {form.get('format')!r}; supported: 'pack-quantized'"
    groups = form.get("config_groups")
    group = [*groups.values()] if isinstance(groups, dict) else []
    if len(group) != 1 or not isinstance(group[0], dict):
        yield f"config_groups is {groups!r}; must hold one group"
    weights = group[0].get("weights")
    if not isinstance(weights, dict):
        yield f"weights is {weights!r}; must be an object"
    wanted = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group"}
    for name, value in (wanted | {"actorder": None}).items():
        if weights.get(name) != value:
            yield f"{name} is {weights.get(name)!r}; supported: {value!r}"
    for name in ("transform_config", "sparsity_config"):
        if form.get(name):
            yield f"{name} is {form[name]!r}; not supported"
    if (size := weights.get("group_size")) not in (32, 64, 128):
        yield f"group_size is {size!r}; supported: 32, 64, 128"


def block_size(form: dict) -> tuple[int, int] | None:
    """Returns the rows and columns that share a scale, from a checked quantization_config; None if
    all of a matrix do."""
    if form["quant_method"] == "fp8":
        return form["weight_block_size"] and tuple(form["weight_block_size"])
    return 1, next(iter(form["config_groups"].values()))["weights"]["group_size"]
