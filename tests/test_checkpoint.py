"""Checkpoints that transformers wrote, and wrong ones; fields changed for one command."""

import json

import pytest
import torch
from conftest import random_config, save_with_transformers
from safetensors.torch import load_file, save_file

from checkpoint import build_model, load_model
from families import read_config
from model import rope_table

TOKENS = torch.randint(
    0, 90, (2, 70), generator=torch.Generator().manual_seed(0)
)  # longer than YaRN's 64


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
def test_what_save_pretrained_writes_in_shards_gives_its_logits(family, tmp_path):
    oracle = save_with_transformers(tmp_path, seed=2, family=family, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    logits = load_model(tmp_path, dtype=torch.float32)(TOKENS)
    assert (logits - oracle(TOKENS).logits).abs().max() < 1e-4 * logits.abs().max()


def test_tied_embeddings_equal_transformers(tmp_path):
    oracle = save_with_transformers(tmp_path, seed=1, tie_word_embeddings=True)
    model = load_model(tmp_path, dtype=torch.float32)
    expected = oracle(TOKENS).logits
    assert (model(TOKENS) - expected).abs().max() < 1e-4 * expected.abs().max()
    assert model.to(torch.bfloat16).lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize(
    "field, value, message",
    [
        (
            "model_type",
            "llama",
            "model_type is 'llama'; supported: deepseek, deepseek_v2, deepseek_v3",
        ),
        ("hidden_act", "gelu", "hidden_act is 'gelu'"),
        ("num_experts_per_tok", 9, "num_experts_per_tok is 9; a token can reach only 8"),
        ("n_routed_experts", 2**15, r"n_routed_experts is 32768; must be below 2\^15"),
        ("hidden_size", "32", "hidden_size is '32'; must be an integer"),
        ("rms_norm_eps", None, "rms_norm_eps is null; a value is required"),
        ("kv_lora_rank", None, "field kv_lora_rank is missing"),
        (
            "rope_parameters",
            {"rope_type": "longrope"},
            "rope_scaling: type is 'longrope'; supported",
        ),
        ("quantization_config", {"quant_method": "fp8"}, "quantization_config is"),
    ],
)
def test_unsupported_configs_are_refused_by_field(checkpoint, tmp_path, field, value, message):
    raw = {**json.loads((checkpoint / "config.json").read_text()), field: value}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=message):
        read_config(tmp_path)


def test_a_token_cannot_use_more_experts_than_its_groups_hold(checkpoint):
    changes = ['topk_method="group_limited_greedy"', "n_group=4", "topk_group=1"]
    assert read_config(checkpoint, [*changes, "num_experts_per_tok=2"]).topk_group == 1
    with pytest.raises(ValueError, match="num_experts_per_tok is 3; a token can reach only 2"):
        read_config(checkpoint, [*changes, "num_experts_per_tok=3"])


def test_fields_that_a_v3_config_leaves_out_are_transformers(tmp_path):
    from transformers import DeepseekV3Config

    names = ("norm_topk_prob", "routed_scaling_factor", "n_group", "topk_group")
    fields = {**random_config(0, "deepseek_v3"), "n_routed_experts": 16}
    fields = {name: value for name, value in fields.items() if name not in names}
    (tmp_path / "config.json").write_text(json.dumps({**fields, "model_type": "deepseek_v3"}))
    config, theirs = read_config(tmp_path), DeepseekV3Config()
    assert all(getattr(config, name) == getattr(theirs, name) for name in names)


def test_old_and_new_spelling_of_rope_give_the_same_table(checkpoint, tmp_path):
    raw = json.loads((checkpoint / "config.json").read_text())
    raw["rope_parameters"]["rope_theta"] = 500.0
    (tmp_path / "config.json").write_text(json.dumps(raw))
    new = read_config(tmp_path)
    assert new.rope_theta == 500
    rope = raw.pop("rope_parameters")
    theta = rope.pop("rope_theta")
    raw |= {"rope_theta": theta, "rope_scaling": {**rope, "type": rope.pop("rope_type")}}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    old = read_config(tmp_path)
    for a, b in zip(rope_table(new, torch.arange(9)), rope_table(old, torch.arange(9))):
        assert torch.equal(a, b)


def broken_copy(checkpoint, tmp_path, change):
    tensors = load_file(checkpoint / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    return tmp_path


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda t: t.update({"model.norm.weight": torch.ones(31)}),
            r"tensor model.norm.weight has shape \[31\]; the config asks for \[32\]",
        ),
        (lambda t: t.pop("model.norm.weight"), "1 tensors are missing: model.norm.weight"),
        (
            lambda t: t.update({"model.extra": torch.ones(1)}),
            "do not belong to this config: model.extra",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=torch.int64)}),
            "model.norm.weight is I64",
        ),
    ],
)
def test_wrong_tensors_are_named(checkpoint, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        load_model(broken_copy(checkpoint, tmp_path, change))


def test_missing_and_truncated_shards_are_named(tmp_path):
    save_with_transformers(tmp_path, seed=2, max_shard_size="20KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    data = shard.read_bytes()
    shard.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=shard.name):
        load_model(tmp_path)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=f"{shard.name}: missing shard"):
        load_model(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())
    weight_map["weight_map"]["lm_head.weight"] = "../other.safetensors"
    index.write_text(json.dumps(weight_map))
    with pytest.raises(ValueError, match="must be a .safetensors file in the same directory"):
        load_model(tmp_path)


# ------------------------------------------------------------------------------------------
# Fields changed for one command


def test_changed_fields_give_the_model_of_a_checkpoint_that_has_them(checkpoint, tmp_path):
    raw = json.loads((checkpoint / "config.json").read_text())
    changed = {**raw, "num_experts_per_tok": 3, "norm_topk_prob": True}
    (tmp_path / "config.json").write_text(json.dumps(changed))
    (tmp_path / "model.safetensors").write_bytes((checkpoint / "model.safetensors").read_bytes())
    expected = load_model(tmp_path, dtype=torch.float32)
    changes = ["num_experts_per_tok=3", "norm_topk_prob=true"]
    model = load_model(checkpoint, dtype=torch.float32, changes=changes)
    assert model.config == expected.config and model.fingerprint == expected.fingerprint
    assert torch.equal(model(TOKENS), expected(TOKENS))
    assert not torch.equal(model(TOKENS), load_model(checkpoint, dtype=torch.float32)(TOKENS))
    assert read_config(checkpoint, ["rope_theta=500"]).rope_theta == 500


@pytest.mark.parametrize(
    "change, message",
    [
        ("experts_per_tok=3", "model_config: 'experts_per_tok=3' must be FIELD=VALUE with a field"),
        ("num_experts_per_tok", "the value of 'num_experts_per_tok' must be JSON"),
        ("topk_method=greedy", "the value of 'topk_method=greedy' must be JSON, as in"),
        ("num_experts_per_tok=9", "can reach only 8 experts .after model_config changed num_exp"),
        ("vocab_size=9", "embed_tokens.weight has shape"),
    ],
)
def test_changes_that_do_not_fit_are_refused(checkpoint, change, message):
    with pytest.raises(ValueError, match=message):
        load_model(checkpoint, changes=[change])


def test_another_kind_of_experts_is_refused(checkpoint):
    with pytest.raises(ValueError, match="experts is 'fast'; must be auto, loop, grouped"):
        build_model(read_config(checkpoint), experts="fast")
