"""The config.json of real models, in configs and tests/published: each is read, and its model has as many
values as transformers' and as the published files. Small models with its other fields have
transformers' logits."""

import json
from dataclasses import replace
from functools import cache

import pytest
import torch
import transformers
from conftest import NATIVE, ROOT, one_by_one
from torch import nn

from checkpoint import build_model
from families import read_config
from model import Transformer

FILES = [*ROOT.glob("configs/*/config.json"), *ROOT.glob("tests/published/*/config.json")]
FOLDERS = {path.parent.name: path.parent for path in sorted(FILES)}
NAMES = list(FOLDERS)


def read(name: str) -> dict:
    return json.loads((FOLDERS[name] / "config.json").read_text())


def language_model(raw: dict) -> dict:
    return raw.get("text_config", raw)


def native(raw: dict) -> nn.Module:
    """Returns transformers' model of the fields of a language model."""
    given = {name: value for name, value in raw.items() if name != "quantization_config"}
    config, model = (getattr(transformers, name) for name in NATIVE[given.pop("model_type")])
    return model(config(**given))


def count(module: nn.Module) -> int:
    """Returns the number of values in a checkpoint of `module`. Correction biases count, too."""
    return sum(tensor.numel() for tensor in module.state_dict().values())


class Built:
    """A published model on the meta device. Only its first MoE layer is built, because all those of
    DeepSeek-V3 take ten seconds."""

    def __init__(self, name: str):
        self.fields = language_model(read(name))
        self.config = read_config(FOLDERS[name])
        self.mtp = self.config.num_nextn_predict_layers
        layers = self.config.first_k_dense_replace + 1
        model = build_model(replace(self.config, num_hidden_layers=layers), "meta")
        *self.dense, self.moe = model.model.layers
        self.values = count(model) + (len(self.config.moe_layers) - 1) * count(self.moe)


built = cache(Built)  # for two tests


@pytest.mark.parametrize("name", NAMES)
def test_a_model_has_as_many_values_as_transformers(name):
    with torch.device("meta"):
        theirs = native(language_model(read(name))).state_dict()
    expected = sum(t.numel() for n, t in theirs.items() if ".indexer." not in n)
    assert built(name).values == expected


# ------------------------------------------------------------------------------------------
# What the published files hold beside the model's own values


def mtp_layers(model: Built) -> int:
    """A MoE layer; the matrix that joins two states; the norms of both, and one before the head."""
    D = model.config.hidden_size
    return model.mtp * (count(model.moe) + 2 * D * D + 3 * D)


def mtp_copies(model: Built) -> int:
    """Of embedding and head."""
    return model.mtp * 2 * model.config.vocab_size * model.config.hidden_size


def indexer_count(model: Built) -> int:
    """One a layer, those for multi-token prediction included. GLM-5.2's layers share some."""
    kinds = model.fields.get("indexer_types", ["full"] * model.config.num_hidden_layers)
    return kinds.count("full") + model.mtp


def indexers(model: Built) -> int:
    """wq_b, wk, weights_proj; weight and bias of k_norm."""
    c, D = model.fields, model.config.hidden_size
    width, heads = c["index_head_dim"], c["index_n_heads"]
    one = heads * width * c["q_lora_rank"] + width * D + heads * D + 2 * width
    return indexer_count(model) * one


def blocks(rows: int, columns: int) -> int:
    return -(-rows // 128) * -(-columns // 128)


def scales(model: Built) -> int:
    """One for each block of a matrix in a layer; the router has none."""

    def of_layer(layer: nn.Module) -> int:
        tensors = layer.state_dict().items()
        return sum(blocks(*t.shape) for n, t in tensors if t.dim() == 2 and n != "mlp.gate.weight")

    moe_layers = len(model.config.moe_layers) + model.mtp
    return sum(map(of_layer, model.dense)) + moe_layers * of_layer(model.moe)


def indexer_scales(model: Built) -> int:
    """Of wq_b and wk."""
    c, D = model.fields, model.config.hidden_size
    width = c["index_head_dim"]
    one = blocks(c["index_n_heads"] * width, c["q_lora_rank"]) + blocks(width, D)
    return indexer_count(model) * one


def rotary_tables(model: Built) -> int:
    """inv_freq of each layer. Its length is that of a head without latent attention."""
    c = model.config
    return c.num_hidden_layers * (c.hidden_size // c.num_attention_heads // 2)


def packing(model: Built) -> int:
    """Routed experts are eight values to an int32, with a scale for 32 values, and two sizes."""
    c = model.config
    matrices = len(c.moe_layers) * c.n_routed_experts * 3
    size = c.hidden_size * c.moe_intermediate_size
    return matrices * (size // 8 + size // 32 + 2 - size)


def tensor_scales(model: Built) -> int:
    """Of the weights and of the inputs: 5 matrices of attention, 3 of the shared expert, and for
    each routed expert gate with up, and down."""
    c = model.config
    return len(c.moe_layers) * 2 * (5 + 3 + 2 * c.n_routed_experts)


def vision(model: Built) -> int:
    """What transformers' model has beside the language model, with transformers' defaults."""
    names = {"kimi_k2": NATIVE["kimi_k25"], "mistral4": NATIVE["mistral3"]}
    config, whole = (getattr(transformers, n) for n in names[model.fields["model_type"]])
    text = {name: v for name, v in model.fields.items() if name != "quantization_config"}
    with torch.device("meta"):
        tensors = whole(config(text_config=text)).state_dict()
    language = ("model.language_model.", "lm_head.")
    return sum(t.numel() for name, t in tensors.items() if not name.startswith(language))


V3 = 684_531_386_000, (mtp_layers, mtp_copies, scales)
GLM_5 = (indexers, mtp_layers)
STORED = {  # tests/published/README.md says where the numbers come from
    "DeepSeek-V2-Lite": (15_706_484_224, ()),
    "DeepSeek-V3": V3,
    "DeepSeek-V3.1": V3,
    "DeepSeek-V3.2": (685_396_921_376, (*V3[1], indexers, indexer_scales)),
    "GLM-4.7-Flash": (31_221_488_576, (mtp_layers, mtp_copies)),
    "GLM-5": (753_864_139_008, GLM_5),
    "GLM-5-FP8": (753_910_024_032, (*GLM_5, scales, indexer_scales)),
    "GLM-5.2": (753_329_940_480, GLM_5),
    "GigaChat3.1-10B-A1.8B": (11_479_750_784, (mtp_layers, mtp_copies)),
    "Kimi-K2-Instruct": (1_026_470_731_056, (scales, rotary_tables)),
    "Kimi-K2.5": (170_738_182_128, (packing, vision)),
    "Mistral-Small-4-119B": (119_401_317_952, (tensor_scales, vision)),
    "Moonlight-16B-A3B-Instruct": (15_960_111_936, (rotary_tables,)),
}


@pytest.mark.parametrize("name", STORED)
def test_the_published_files_hold_the_models_values_and_what_is_not_read(name):
    stored, others = STORED[name]
    model = built(name)
    assert model.values == stored - sum(other(model) for other in others)


# ------------------------------------------------------------------------------------------
# Routing and positions

SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 40,
    "moe_intermediate_size": 8,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "n_routed_experts": 32,
    "num_experts": 32,
    "q_lora_rank": 12,
    "kv_lora_rank": 16,
    "pad_token_id": 0,
}


def shrunk(raw: dict) -> dict:
    """Returns published fields with small sizes. All that is not a size stays."""
    if "text_config" in raw:
        return raw | {"text_config": shrunk(raw["text_config"])}
    layers = raw["first_k_dense_replace"] + 2
    small = {name: value for name, value in SMALL.items() if raw.get(name) is not None}
    lists = ("mlp_layer_types", "indexer_types")
    small |= {name: raw[name][:layers] for name in lists if name in raw}
    return raw | small | {"num_hidden_layers": layers}


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_small_models_have_transformers_logits(name, tmp_path):
    raw = shrunk(read(name))
    (tmp_path / "config.json").write_text(json.dumps(raw))
    torch.manual_seed(0)
    theirs = native(language_model(raw)).eval()
    for key, tensor in theirs.state_dict().items():
        tensor.normal_(1.0 if "norm" in key else 0.0, 0.2)
    tensors = {n: t for n, t in theirs.state_dict().items() if ".indexer." not in n}
    ours = Transformer(read_config(tmp_path))
    ours.load_state_dict(one_by_one(tensors))
    tokens = torch.randint(0, 96, (2, 70))
    expected = theirs(tokens).logits
    assert (ours(tokens) - expected).abs().max() < 1e-4 * expected.abs().max()
