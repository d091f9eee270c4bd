"""The families beside DeepSeek's own: what transformers writes loads here and the other way round,
rows that are too long, the forms that only they are published in, and what is refused."""

import dataclasses
import json
import re

import pytest
import torch
import transformers
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from conftest import (
    NATIVE,
    WHOLE,
    TextPart,
    make_oracle,
    one_by_one,
    save_tokenizer,
    write_checkpoint,
)
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from test_bad_input import VALUES
from test_families import LATER, TOKENS, published_config, quantise
from test_train import settings

import eval as evaluator
from adapter import load_adapter, put_tensors, remove_adapter, save_adapter, trained_parameters
from chat import load_tokenizer
from checkpoint import load_model
from families import FAMILIES, read_config
from generate import generate, likelihoods
from lora import add_lora, lora_parameters
from merge import merge
from model import Cache, ModelConfig
from peft_format import save_lora
from train import train

SPARSE = ("deepseek_v32", "glm_moe_dsa")


def test_every_family_is_compared_with_one_that_nobody_here_wrote():
    assert FAMILIES.keys() == NATIVE.keys() | {"deepseek"}


def close(mine, oracle) -> bool:
    expected = oracle(TOKENS).logits
    return (mine(TOKENS) - expected).abs().max() < 1e-4 * expected.abs().max()


def save_pretrained(oracle, family: str, directory) -> None:
    """Lets transformers write the checkpoint."""
    getattr(oracle, "whole", oracle).save_pretrained(directory)
    config = json.loads((directory / "config.json").read_text())
    if family == "kimi_k2":  # is no class of transformers
        (directory / "config.json").write_text(json.dumps({**config, "model_type": family}))
    if family == "kimi_k25":  # transformers 5.24 writes its layers as "blocks", as no one else does
        tensors = load_file(directory / "model.safetensors")
        names = {name: name.replace("model.blocks.", "model.layers.") for name in tensors}
        tensors = {names[name]: tensor for name, tensor in tensors.items()}
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def load_native(directory, family: str):
    if family == "kimi_k2":
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps({**config, "model_type": "deepseek_v3"}))
    loaded = getattr(transformers, NATIVE[family][1]).from_pretrained(
        directory, dtype=torch.float32
    )
    return (TextPart(loaded) if family in WHOLE else loaded).eval()


@pytest.mark.parametrize("family, seed", [(f, seed) for f in LATER for seed in range(8)])
def test_what_transformers_writes_loads_here_and_merged_loads_there(family, seed, tmp_path):
    oracle = make_oracle(seed, family)
    save_pretrained(oracle, family, tmp_path / "base")
    model = load_model(tmp_path / "base", dtype=torch.float32)
    assert close(model, oracle)
    cfg = {"experts": {"2": [1, 5]}, "shared_experts": True}
    trained = trained_parameters(model, cfg)
    put_tensors(model, {name: p * 1.5 for name, p in trained.items()})
    save_adapter(model, cfg, tmp_path / "adapter")
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert close(model, load_native(tmp_path / "merged", family))
    base = one_by_one(load_file(tmp_path / "base" / "model.safetensors"))
    merged = one_by_one(load_file(tmp_path / "merged" / "model.safetensors"))
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    assert base.keys() == merged.keys()
    assert changed == load_file(tmp_path / "adapter" / "adapter.safetensors").keys()
    assert len(changed) == len(trained) == 2 * 3 + 3 * len(model.config.moe_layers)


@pytest.mark.parametrize("family", SPARSE)
def test_a_row_longer_than_index_topk_is_refused(family, tmp_path, monkeypatch):
    """One of index_topk tokens, 70, equals transformers in test_families.py."""
    save_pretrained(make_oracle(0, family, vocab_size=258), family, tmp_path)
    save_tokenizer(tmp_path)
    model, longer = load_model(tmp_path, dtype=torch.float32), [[5] * 71]
    model(torch.tensor([[5] * 70]))
    generate(model, [[5] * 60], 10, [95])
    said = "is 71; must be at most index_topk, 70: beyond it attention is sparse"
    with pytest.raises(ValueError, match="the length of the cache is 71"):
        Cache.empty(model.config, 1, 71, model.lm_head.weight)
    for run in (
        lambda: model(torch.tensor(longer)),
        lambda: generate(model, [[5] * 60], 11, [95]),
        lambda: list(likelihoods(model, longer, [[(3, 5)]])),
    ):
        with pytest.raises(ValueError, match=said):
            run()
    with pytest.raises(ValueError, match="seq_length is 71; must be at most index_topk, 70"):
        train(settings(tmp_path, tmp_path / "no.jsonl", tmp_path / "run", seq_length=71))
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "a" * 66, "raw_answers": ["b"]}))
    monkeypatch.setattr(evaluator, "load_model", None)  # refused before
    command = f"eval --model {tmp_path} --task exact --data {tmp_path}/rows.jsonl --chat_format"
    command += f" deepseek_v2 --output {tmp_path}/answers.jsonl --max_new_tokens"
    for new, said in (("8", "rows.jsonl: the longest row with its 8 new tokens is 75"), ("3", "")):
        monkeypatch.setattr("sys.argv", [*command.split(), new])
        with pytest.raises(SystemExit if said else TypeError, match=said):
            evaluator.main()
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**raw, "index_topk": None}))
    with pytest.raises(ValueError, match="field index_topk is missing"):
        read_config(tmp_path)


@pytest.mark.parametrize("family", LATER)
def test_a_run_of_each_family(family, tmp_path, chat_file):
    """Scores, selection, ESFT and LoRA, evaluation. The adapter has the checkpoint's own names."""
    oracle = make_oracle(1, family, vocab_size=258, first_k_dense_replace=1)
    save_pretrained(oracle, family, tmp_path / "base")
    save_tokenizer(tmp_path / "base")
    stored = one_by_one(load_file(tmp_path / "base" / "model.safetensors")).keys()
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "Repeat: ab", "raw_answers": ["ab"]}))
    for method, prefix in (("esft", ""), ("lora", "base_model.model.")):
        changes = {"method": method, "steps": 2, "chat_format": "deepseek_v2", "top_p": 0.3}
        changes |= {"eval_sets": [f"loss:{chat_file}", f"exact:{rows}"], "max_new_tokens": 2}
        run = tmp_path / method
        results = train(settings(tmp_path / "base", chat_file, run, **changes))
        assert len(results["before"]) == len(results["after"]) == 2
        (file,) = (run / "adapter").glob("*.safetensors")
        trained = load_file(file)
        suffix = r"\.lora_[AB]\.weight$" if method == "lora" else "$"
        names = {re.sub(suffix, ".weight" if method == "lora" else "", n) for n in trained}
        assert names and {name.removeprefix(prefix) for name in names} <= stored
        model = load_model(tmp_path / "base", dtype=torch.float32)
        before = model(TOKENS)
        load_adapter(model, run / "adapter")
        with torch.no_grad():
            after = model(TOKENS)
        assert not torch.equal(before, after)
        merge(tmp_path / "base", run / "adapter", tmp_path / f"{method}-merged")
        merged = load_model(tmp_path / f"{method}-merged", dtype=torch.float32)
        torch.testing.assert_close(merged(TOKENS), after, rtol=1e-4, atol=1e-4)
        remove_adapter(model)
        assert torch.equal(model(TOKENS), before)


# ------------------------------------------------------------------------------------------
# Quantised


def quantise_int4(tensors: dict, group: int) -> tuple[dict, dict]:
    """Routed experts in integers of 4 bits, packed by the library that Kimi's files name; and what
    they stand for in float32."""
    stored, values = {}, {}
    for name, tensor in tensors.items():
        if ".mlp.experts." not in name:
            stored[name] = values[name] = tensor
            continue
        groups = tensor.unflatten(1, (-1, group))
        scale = (groups.abs().amax(-1) / 7).bfloat16()
        integers = (groups / scale.float()[..., None]).round().clamp(-8, 7)
        values[name] = (integers * scale.float()[..., None]).flatten(1)
        stored[f"{name}_packed"] = pack_to_int32(integers.flatten(1).to(torch.int8), 4)
        stored[f"{name}_scale"] = scale
        stored[f"{name}_shape"] = torch.tensor(tensor.shape, dtype=torch.int32)
    return stored, values


INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
INT4 = {"config_groups": {"group_0": {"weights": INT4, "targets": ["Linear"]}}}
INT4 |= {"format": "pack-quantized", "quant_method": "compressed-tensors"}


def save_int4(directory, family: str, shards: int = 1) -> dict:
    oracle = make_oracle(2, family, moe_intermediate_size=64, first_k_dense_replace=1)
    stored, values = quantise_int4(one_by_one(oracle.state_dict()), 32)
    config = published_config(oracle, family, 2, new_spelling=False)
    config.get("text_config", config)["quantization_config"] = INT4
    prefix = FAMILIES[family].prefix
    write_checkpoint(directory, config, {prefix + n: t for n, t in stored.items()}, shards)
    return values


@pytest.mark.parametrize("family", ["kimi_k2", "kimi_k25"])
def test_int4_loads_to_the_exact_values_and_merges_to_bfloat16(family, tmp_path, monkeypatch):
    values = save_int4(tmp_path / "base", family, shards=3)
    monkeypatch.setattr("stored_tensors.READ_BYTES", 100)  # several reads a tensor
    model = load_model(tmp_path / "base", dtype=torch.float32)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, values[name]), name
    save_adapter(model, {"experts": {}}, tmp_path / "nothing")
    merge(tmp_path / "base", tmp_path / "nothing", tmp_path / "merged")
    merged = load_model(tmp_path / "merged", dtype=torch.float32)
    assert merged.fingerprint == model.fingerprint
    for name, tensor in merged.state_dict().items():
        wanted = values[name].bfloat16().float() if ".mlp.experts." in name else values[name]
        assert torch.equal(tensor, wanted), name
    assert "quantization_config" not in (tmp_path / "merged" / "config.json").read_text()
    assert close(merged, load_native(tmp_path / "merged", family))
    for kind in ("fp8", "nf4"):
        load_model(tmp_path / "base", dtype=torch.float32, quantize=kind)(TOKENS)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"num_bits": 8}, "num_bits is 8; supported: 4"),
        ({"symmetric": False}, "symmetric is False; supported: True"),
        ({"group_size": -1}, "group_size is -1; supported: 32, 64, 128"),
        ({"actorder": "group"}, "actorder is 'group'; supported: None"),
    ],
)
def test_other_integers_are_refused(change, said, tmp_path):
    save_int4(tmp_path, "kimi_k25")
    raw = json.loads((tmp_path / "config.json").read_text())
    raw["text_config"]["quantization_config"]["config_groups"]["group_0"]["weights"] |= change
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=f"config.json: quantization_config: {said}"):
        read_config(tmp_path)


@pytest.mark.parametrize("family", ["kimi_k2", "kimi_k25"])
@pytest.mark.parametrize("method", ["esft", "lora"])
def test_an_adapter_over_int4_merges_to_bfloat16(family, method, tmp_path):
    save_int4(tmp_path / "base", family, shards=2)
    model = load_model(tmp_path / "base", dtype=torch.float32)
    if method == "esft":
        cfg = {"experts": {"2": [1, 5]}}
        put_tensors(model, {n: p * 2 for n, p in trained_parameters(model, cfg).items()})
        save_adapter(model, cfg, tmp_path / "adapter")
    else:
        add_lora(model, rank=2, scaling=2.0, seed=0)
        for parameter in lora_parameters(model).values():
            parameter.data.normal_(std=0.1)
        save_lora(model, tmp_path / "adapter")
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    merged, expected = load_model(tmp_path / "merged", dtype=torch.float32)(TOKENS), model(TOKENS)
    assert (merged - expected).norm() < 0.03 * expected.norm()  # rounded to bfloat16
    assert (merged - load_model(tmp_path / "base", dtype=torch.float32)(TOKENS)).norm() > (
        0.1 * expected.norm()
    )


def test_fp8_with_one_scale_a_matrix(tmp_path):
    """As Mistral-Small-4 is published: fused experts with a scale each, and scales of activations."""
    oracle = make_oracle(2, "mistral3", first_k_dense_replace=1)
    stored, values = {}, {}
    for name, tensor in oracle.state_dict().items():
        if not name.startswith("model.layers.") or "norm" in name or "mlp.gate." in name:
            stored[name] = values[name] = tensor
            continue
        scale = tensor.abs().amax((-2, -1), keepdim=True).div(448).bfloat16()
        stored[name] = (tensor / scale.float()).to(torch.float8_e4m3fn)
        values[name] = stored[name].float() * scale.float()
        fused = tensor.dim() == 3
        stored[f"{name}_scale_inv"] = scale if fused else scale.view(())
        activation = name.removesuffix("weight") + ("_" if fused else "") + "activation_scale"
        stored[activation] = torch.tensor(1.0)
    config = published_config(oracle, "mistral3", 2, new_spelling=True)
    fp8 = {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}
    config["quantization_config"] = fp8
    stored = {f"language_model.{name}": tensor for name, tensor in stored.items()}
    write_checkpoint(tmp_path / "base", config, stored, 2)
    model = load_model(tmp_path / "base", dtype=torch.float32)
    values = one_by_one(values)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, values[name]), name
    save_adapter(model, {"experts": {}}, tmp_path / "nothing")
    merge(tmp_path / "base", tmp_path / "nothing", tmp_path / "merged")
    merged = load_model(tmp_path / "merged", dtype=torch.float32)
    assert close(merged, load_native(tmp_path / "merged", "mistral3"))
    load_model(tmp_path / "base", dtype=torch.float32, quantize="fp8")(TOKENS)  # by its own blocks


@pytest.mark.parametrize("family", ["deepseek_v32", "glm_moe_dsa", "kimi_k2"])
def test_fp8_in_blocks_as_these_are_published(family, tmp_path):
    """An indexer stays in the merged checkpoint."""
    oracle = make_oracle(2, family, first_k_dense_replace=1)
    stored, values = quantise(one_by_one(oracle.state_dict()), 16)
    config = published_config(oracle, family, 2, new_spelling=False)
    fp8 = {"quant_method": "fp8", "fmt": "e4m3", "scale_fmt": "ue8m0"}
    config["quantization_config"] = {**fp8, "weight_block_size": [16, 16]}
    write_checkpoint(tmp_path / "base", config, stored, 2)
    model = load_model(tmp_path / "base", dtype=torch.float32)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, values[name].float()), name
    save_adapter(model, {"experts": {}}, tmp_path / "nothing")
    merge(tmp_path / "base", tmp_path / "nothing", tmp_path / "merged")
    merged = {}
    for file in (tmp_path / "merged").glob("*.safetensors"):
        merged |= load_file(file)
    indexer = [name for name in values if ".indexer." in name]
    assert len(indexer) == 3 * 5 * (family in SPARSE) and merged.keys() == values.keys()
    assert all(torch.equal(merged[n], values[n].bfloat16()) for n in indexer if "norm" not in n)
    again = load_model(tmp_path / "merged", dtype=torch.float32)
    assert close(again, load_native(tmp_path / "merged", family))


# ------------------------------------------------------------------------------------------
# A language model that is a part


@pytest.mark.parametrize("family", ["mistral3", "mistral4", "kimi_k25", "glm4_moe_lite"])
@pytest.mark.parametrize("change", ["rope_theta=500.0", "num_experts_per_tok=4"])
def test_a_changed_field_is_merged_in_the_file_s_spelling(family, change, tmp_path):
    save_pretrained(make_oracle(1, family), family, tmp_path / "base")
    model = load_model(tmp_path / "base", dtype=torch.float32, changes=[change])
    save_adapter(model, {"experts": {}}, tmp_path / "nothing")
    merge(tmp_path / "base", tmp_path / "nothing", tmp_path / "merged", [change])
    assert close(model, load_native(tmp_path / "merged", family))
    assert torch.equal(load_model(tmp_path / "merged", dtype=torch.float32)(TOKENS), model(TOKENS))


@pytest.mark.parametrize("family", WHOLE)
def test_peft_files_of_transformers_class_are_read(family, tmp_path):
    """It calls the layers model.language_model.layers."""
    save_pretrained(make_oracle(1, family), family, tmp_path / "base")
    whole = getattr(transformers, NATIVE[family][1])
    whole = whole.from_pretrained(tmp_path / "base", dtype=torch.float32).eval()
    where = [f"model.language_model.layers.{i}.self_attn.o_proj" for i in (0, 2)]
    tuned = get_peft_model(whole, LoraConfig(r=4, target_modules=where, init_lora_weights=False))
    tuned.save_pretrained(tmp_path / "adapter")
    model = load_model(tmp_path / "base", dtype=torch.float32)
    load_adapter(model, tmp_path / "adapter")
    assert close(model, tuned)
    save_lora(model, tmp_path / "again")
    targets = json.loads((tmp_path / "again" / "adapter_config.json").read_text())["target_modules"]
    assert targets == [f"layers.{i}.self_attn.o_proj" for i in (0, 2)]
    again = load_model(tmp_path / "base", dtype=torch.float32)
    load_adapter(again, tmp_path / "again")
    assert torch.equal(again(TOKENS), model(TOKENS))


@pytest.mark.parametrize("family", WHOLE)
def test_the_tokenizer_knows_the_language_model_s_fields(family, tmp_path):
    save_pretrained(make_oracle(1, family), family, tmp_path)
    save_tokenizer(tmp_path)  # 258 tokens; the model has 96
    with pytest.raises(ValueError, match="vocab_size is 96"):
        load_tokenizer(tmp_path, "deepseek_v2")
    raw = json.loads((tmp_path / "config.json").read_text())
    raw["text_config"] |= {"vocab_size": 258, "eos_token_id": [7]}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert 7 in load_tokenizer(tmp_path, "deepseek_v2").end_ids


# ------------------------------------------------------------------------------------------
# Refused


@pytest.mark.parametrize(
    "family, change, said",
    [
        (
            "deepseek_v3",
            {"model_type": "deepseek_v4"},
            "Not this one: its attention is not the latent",
        ),
        (
            "deepseek_v3",
            {"model_type": "kimi_linear"},
            "Not this one: most of its layers have linear",
        ),
        ("deepseek_v3", {"model_type": "axk9"}, "docs/families.md says how one is added"),
        (
            "deepseek_v3",
            {"model_type": "qwen3_moe", "kv_lora_rank": None},
            "names kv_lora_rank: it has no latent attention",
        ),
        (
            "kimi_k25",
            {"model_type": "qwen3_vl_moe", "text_config": {"model_type": "qwen3_vl_moe_text"}},
            "neither config.json nor its text_config names kv_lora_rank",
        ),
        ("deepseek_v3", {"index_topk": 64}, "index_topk is 64; not supported in this family"),
        ("kimi_k25", {"text_config": None}, "text_config: model_type is None; supported: kimi_k2"),
        (
            "mistral3",
            {"text_config": {"model_type": "ministral3"}},
            "text_config: model_type is 'minis",
        ),
        (
            "glm4_moe_lite",
            {"mlp_layer_types": ["dense", "sparse", "dense"]},
            r"mlp_layer_types is \['dense', 'sparse', 'dense'\]; supported: a list with 'dense' for",
        ),
        (
            "glm4_moe_lite",
            {"mlp_layer_types": ["dense", "sparse"]},
            "supported: a list with 'dense'",
        ),
        (
            "glm4_moe_lite",
            {"first_k_dense_replace": 3},
            "first_k_dense_replace is 3, but mlp_layer_ty",
        ),
        ("glm4_moe_lite", {"n_group": None}, "field n_group is missing"),
        ("sarvam_mla", {"num_experts": 4}, "n_routed_experts is 8, but num_experts says 4"),
        ("glm_moe_dsa", {"rope_interleave": False}, "rope_interleave is False; supported: True"),
        ("mistral4", {"n_group": 2}, "n_group is 2; supported: 1"),
        ("mistral4", {"rope_parameters": None}, "field rope_theta is missing"),
        ("kimi_k2", {"rms_norm_eps": None}, "field rms_norm_eps is missing"),
        (
            "glm4_moe_lite",
            {"partial_rotary_factor": 0.5},
            "partial_rotary_factor is 0.5; must be 1",
        ),
        (
            "mistral4",
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4}},
            "rope_scaling: original_max_position_embeddings is None",
        ),
    ],
)
def test_refused_by_field_name(family, change, said, tmp_path):
    config = published_config(make_oracle(0, family), family, 0, new_spelling=True)
    (tmp_path / "config.json").write_text(json.dumps(config))
    read_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ValueError, match=f"config.json: .*{said}"):
        read_config(tmp_path)


@pytest.mark.parametrize("family", LATER)
def test_a_mutated_config_is_read_or_refused(family, tmp_path):
    """Every field that is read, at any depth, with values of every type."""
    config = published_config(make_oracle(0, family), family, 0, new_spelling=True)
    text = config.get("text_config", config)
    text |= {"quantization_config": INT4, "index_topk": text.get("index_topk")}
    good = json.dumps(config)

    def places(value, at=()) -> list[tuple]:
        inner = value.items() if isinstance(value, dict) else ()
        return [at, *(place for name, part in inner for place in places(part, (*at, name)))]

    read = {f.name for f in dataclasses.fields(ModelConfig)} | {"rope_parameters", "text_config"}
    read |= {"mlp_layer_types", "quantization_config", *FAMILIES[family].names}
    for *parents, name in places(config)[1:]:
        if not {*parents, name} & read:
            continue
        for value in VALUES:
            changed = json.loads(good)
            part = changed
            for parent in parents:
                part = part[parent]
            part[name] = value
            (tmp_path / "config.json").write_text(json.dumps(changed))
            try:
                read_config(tmp_path)
            except ValueError as error:
                assert str(tmp_path / "config.json") in str(error)


def test_growing_queries_are_mistrals_alone(tmp_path):
    config = published_config(make_oracle(1, "deepseek_v3"), "deepseek_v3", 1, new_spelling=True)
    config["rope_parameters"]["llama_4_scaling_beta"] = 0.1
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="llama_4_scaling_beta is 0.1; not supported"):
        read_config(tmp_path)


def test_the_part_that_rotates_must_be_that_of_the_sizes(tmp_path):
    for family, right, wrong in (("mistral4", None, 1.0), ("glm4_moe_lite", 1, 0.5)):
        config = published_config(make_oracle(0, family), family, 0, new_spelling=True)
        sizes = config["qk_rope_head_dim"], config["qk_nope_head_dim"]
        right = right or sizes[0] / sum(sizes)
        for value in (right, wrong):
            config["rope_parameters"]["partial_rotary_factor"] = value
            (tmp_path / "config.json").write_text(json.dumps(config))
            if value == right:
                read_config(tmp_path)
        with pytest.raises(ValueError, match=f"partial_rotary_factor is {wrong}; must be {right}"):
            read_config(tmp_path)


def test_a_language_model_without_its_prefix_is_refused(tmp_path):
    oracle = make_oracle(0, "kimi_k25")
    config = published_config(oracle, "kimi_k25", 0, new_spelling=True)
    write_checkpoint(tmp_path, config, one_by_one(oracle.state_dict()))
    said = (
        "tensor language_model.model.layers.0.input_layernorm.weight is missing; .* lm_head.weight"
    )
    with pytest.raises(ValueError, match=said):
        load_model(tmp_path)
    named = {f"language_model.{n}": t for n, t in one_by_one(oracle.state_dict()).items()}
    write_checkpoint(tmp_path, config, {**named, "model.norm.weight": torch.ones(32)})
    with pytest.raises(ValueError, match="do not belong to this config: model.norm.weight"):
        load_model(tmp_path)
