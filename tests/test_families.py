"""Every family and every way to store it: old and new configs; experts one by one and fused;
shards, tied embeddings, FP8, layers to pass over; merging, and the memory of loading."""

import json
import subprocess
import sys
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    NATIVE,
    ROOT,
    WHOLE,
    make_oracle,
    one_by_one,
    random_config,
    write_checkpoint,
)
from safetensors.torch import load_file, save_file

import model as modeling
from adapter import load_adapter, mark_trainable, put_tensors, save_adapter, trained_parameters
from checkpoint import build_model, fingerprint, load_model, read_checkpoint
from data import pack
from fast.loss import token_losses
from generate import generate
from merge import merge
from model import Cache, Gate, ModelConfig, rope_table
from stored_tensors import StoredTensor

TOKENS = torch.randint(0, 90, (2, 70), generator=torch.Generator().manual_seed(0))
# How many random configs of each family.
FAMILIES = {"deepseek": 8, "deepseek_v2": 12, "deepseek_v3": 12}
LATER = {family: 8 for family in NATIVE if family not in FAMILIES}
CASES = [(f, seed) for f, count in (FAMILIES | LATER).items() for seed in range(count)]
STORAGE = ("one by one", "fused", "sharded", "fused and sharded")


def published_config(oracle, family: str, seed: int, new_spelling: bool) -> dict:
    """The config as transformers writes it, or as DeepSeek's own files do."""
    if family == "deepseek":
        return {"model_type": family, "hidden_act": "silu", **random_config(seed, family)}
    config = {**json.loads(oracle.config.to_json_string()), "model_type": family}
    if not new_spelling:
        text = config.get("text_config", config)
        rope = text.pop("rope_parameters")
        text["rope_theta"] = rope.pop("rope_theta")
        kind = rope.pop("rope_type")
        text["rope_scaling"] = None if kind == "default" else {**rope, "type": kind}
        for theirs, ours in OLD_NAMES.get(family, {}).items():
            text[theirs] = text.pop(ours)
        if kinds := text.pop("mlp_layer_types", None):
            text["first_k_dense_replace"] = kinds.count("dense")
    return config


# As sarvam-105b's published config.json calls them.
OLD_NAMES = {
    "sarvam_mla": {
        "num_experts": "n_routed_experts",
        "num_shared_experts": "n_shared_experts",
        "num_mtp_layers": "num_nextn_predict_layers",
    }
}


def save_variant(directory, family: str, seed: int):
    """An oracle and its checkpoint, in one of the ways to store it and to spell its config. Every
    second one of the later families has a layer for multi-token prediction, too."""
    oracle = make_oracle(seed, family)
    storage = STORAGE[seed % 4]
    tensors = dict(oracle.state_dict())
    config = published_config(oracle, family, seed, new_spelling=seed % 3 == 0)
    if family in LATER and seed % 2:
        tensors["model.layers.3.eh_proj.weight"] = torch.ones(4)
        text = config.get("text_config", config)
        text["num_mtp_layers" if "num_mtp_layers" in text else "num_nextn_predict_layers"] = 1
    if oracle.lm_head.weight is oracle.model.embed_tokens.weight and seed % 2:
        del tensors["lm_head.weight"]
    if "fused" not in storage:
        tensors = one_by_one(tensors)
    if family in WHOLE:
        tensors = {f"language_model.{name}": tensor for name, tensor in tensors.items()}
        tensors["vision_tower.patch_embed.proj.weight"] = torch.ones(4)
    write_checkpoint(directory, config, tensors, 3 if "sharded" in storage else 1)
    return oracle


@pytest.fixture(scope="module")
def variant(tmp_path_factory):
    """The oracle and the folder of a family's seed, written once for all tests that read them."""

    @cache
    def saved(family: str, seed: int):
        folder = tmp_path_factory.mktemp(family)
        return save_variant(folder, family, seed), folder

    return saved


@pytest.mark.parametrize("family, seed", CASES)
def test_logits_and_gradients_equal_the_oracle(family, seed, variant):
    oracle, folder = variant(family, seed)
    expected = oracle(TOKENS).logits
    expected.square().mean().backward()
    gradients = one_by_one({n: p.grad for n, p in oracle.named_parameters() if p.grad is not None})
    for experts in ("loop", "grouped"):
        model = load_model(folder, dtype=torch.float32, experts=experts).requires_grad_(True)
        logits = model(TOKENS)
        assert (logits - expected).abs().max() < 1e-4 * expected.abs().max()
        logits.square().mean().backward()
        assert {name for name, _ in model.named_parameters()} == gradients.keys()
        for name, parameter in model.named_parameters():
            scale = gradients[name].abs().max()
            assert (parameter.grad - gradients[name]).abs().max() <= 1e-4 * scale, name


@pytest.mark.parametrize("family, seed", [case for case in CASES if case[0] in FAMILIES])
def test_packed_under_a_document_mask_equals_the_oracle_on_each_sample_alone(
    family, seed, variant, monkeypatch
):
    oracle, folder = variant(family, seed)
    lengths = (4, 19, 1, 36)
    pieces = TOKENS[0, : sum(lengths)].split(lengths)
    samples = [(piece.tolist(), piece.tolist()) for piece in pieces]
    rows = pack(samples, 70, 0.0, pad_id=0, seed=0, document_mask=True)
    model = load_model(folder, dtype=torch.float32)
    losses, _ = token_losses(model, *rows)
    alone = [
        F.cross_entropy(oracle(piece[None]).logits[0, :-1], piece[1:], reduction="none")
        for piece in pieces
    ]
    torch.testing.assert_close(losses, torch.cat(alone), rtol=1e-4, atol=1e-4)
    assert len(losses) == sum(lengths) - len(lengths)
    seen = []
    monkeypatch.setattr(
        modeling, "rope_table", lambda config, at: seen.append(at) or rope_table(config, at)
    )
    token_losses(model, *rows)
    monkeypatch.undo()
    assert seen[0].tolist() == [[i for length in (*lengths, 10) for i in range(length)]]
    joined, _ = token_losses(model, *rows[:2])
    assert (losses - joined).abs()[3:].max() > 1e-2  # without the mask they see each other


@pytest.mark.parametrize("family, seed", CASES)
def test_decoding_with_and_without_cache_agrees(family, seed, variant):
    model = load_model(variant(family, seed)[1], dtype=torch.float32)
    prompts = [TOKENS[0, :5].tolist(), TOKENS[1, :40].tolist()]
    with torch.no_grad():
        cached = generate(model, prompts, max_new_tokens=8, eos_ids=[95])
        for prompt, completion in zip(prompts, cached):
            row = [*prompt, *completion]
            best = model(torch.tensor([row]))[0, len(prompt) - 1 :].argmax(-1).tolist()
            assert completion == best[:-1]
            assert len(completion) == 8 or best[-1] == 95  # stopped because the sequence ended


@pytest.mark.parametrize("family, seed", CASES)
def test_cached_logits_equal_uncached_ones(family, seed, variant):
    model = load_model(variant(family, seed)[1], dtype=torch.float32)
    lengths = torch.tensor([5, 60])
    with torch.no_grad():
        cache = Cache.empty(model.config, rows=2, length=70, like=model.lm_head.weight)
        model(TOKENS[:, :60], cache)  # the first row holds 5 tokens and 55 of padding
        cache.seen.copy_(lengths)
        full = model(TOKENS)
        for step in range(10):
            at = lengths + step
            logits = model(TOKENS[torch.arange(2), at][:, None], cache)[:, 0]
            expected = full[torch.arange(2), at]
            assert (logits - expected).abs().max() < 1e-4 * expected.abs().max()


def test_the_random_configs_cover_every_field():
    v3 = [random_config(seed, "deepseek_v3") for seed in range(FAMILIES["deepseek_v3"])]
    for field, values in {
        "q_lora_rank": {None, 12},
        "n_group": {1, 2, 4},
        "norm_topk_prob": {True, False},
        "attention_bias": {True, False},
        "tie_word_embeddings": {True, False},
        "rope_interleave": {True, False},
        "first_k_dense_replace": {0, 1, 2},
        "routed_scaling_factor": {1.0, 2.5},
    }.items():
        assert {config[field] for config in v3} == values, field
    assert any(config["topk_group"] < config["n_group"] for config in v3)
    assert {"rope_parameters" in config for config in v3} == {True, False}
    v2 = [random_config(seed) for seed in range(FAMILIES["deepseek_v2"])]
    assert {c["topk_method"] for c in v2} == {"greedy", "group_limited_greedy"}
    assert {c["q_lora_rank"] for c in v2} == {None, 12}
    assert {"rope_parameters" in c for c in v2} == {True, False}
    old = [random_config(seed, "deepseek") for seed in range(FAMILIES["deepseek"])]
    assert {c["num_key_value_heads"] == c["num_attention_heads"] for c in old} == {True, False}
    assert {config["rope_theta"] for config in old} == {10000.0, 500.0}


def v3_config(**changes) -> ModelConfig:
    names = ModelConfig.__dataclass_fields__
    fields = {k: v for k, v in random_config(2, "deepseek_v3").items() if k in names}
    defaults = dict(model_type="deepseek_v3", topk_method="noaux_tc", scoring_func="sigmoid")
    return ModelConfig(**{**defaults, **fields, **changes})


def test_v3_gate_by_hand():
    """Two groups of two. Biased scores: group 0 has 0.7 + 0.1, group 1 has 0.5 + 0.4, so group 1 is
    kept although it lacks the best expert; weights are the scores without the bias."""
    config = v3_config(
        hidden_size=1, n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1
    )
    config.norm_topk_prob, config.routed_scaling_factor = True, 2.5
    gate = Gate(config)
    scores = torch.tensor([0.9, 0.3, 0.2, 0.6])
    gate.weight.data = scores.logit()[:, None]
    gate.e_score_correction_bias = torch.tensor([-0.2, -0.2, 0.3, -0.2])
    weights, indices, _ = gate(torch.ones(1, 1))
    assert dict(zip(indices[0].tolist(), weights[0].tolist())) == {
        2: pytest.approx(2.5 * 0.2 / 0.8),
        3: pytest.approx(2.5 * 0.6 / 0.8),
    }
    # Masked experts never win, also where every biased score that is left is negative.
    gate.e_score_correction_bias = torch.tensor([-1.9, -1.9, -1.0, -1.0])
    assert set(gate(torch.ones(1, 1))[1][0].tolist()) == {2, 3}


def test_v3_balance_loss_by_hand():
    """Sigmoid scores count by their part of the token's sum (DeepSeek-V3, eq. 19)."""
    config = v3_config(n_routed_experts=2, num_experts_per_tok=1, n_group=1, topk_group=1)
    config.first_k_dense_replace = 0
    moe = build_model(config, dtype=torch.float32).model.layers[0].mlp
    scores = torch.tensor([[0.9, 0.1], [0.4, 0.4]])  # parts: (0.9, 0.1) and (0.5, 0.5)
    loss = moe.balance_loss(scores, torch.tensor([[0], [0]]), 1)  # f = (2, 0), P = (0.7, 0.3)
    torch.testing.assert_close(loss, torch.tensor([1.4]))


def test_the_correction_bias_stays_float32_and_is_not_trained(tmp_path):
    oracle = make_oracle(1, "deepseek_v3", first_k_dense_replace=0)
    write_checkpoint(
        tmp_path, published_config(oracle, "deepseek_v3", 1, True), oracle.state_dict()
    )
    model = load_model(tmp_path, dtype=torch.bfloat16).to(torch.bfloat16)
    bias = model.model.layers[0].mlp.gate.e_score_correction_bias
    assert torch.equal(bias, oracle.model.layers[0].mlp.gate.e_score_correction_bias)
    mark_trainable(model, {"experts": {}, "non_expert_modules": True})
    assert not bias.requires_grad


def test_layers_for_multi_token_prediction_are_passed_over(tmp_path):
    oracle = make_oracle(3, "deepseek_v3")
    config = published_config(oracle, "deepseek_v3", 3, False)
    tensors = one_by_one(oracle.state_dict())
    extra = {"model.layers.3.eh_proj.weight": torch.ones(4), "model.layers.3.norm": torch.ones(4)}
    inv_freq = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "model.layers.1.self_attn.rotary_emb.inv_freq": torch.tensor(1.0),
    }
    config["num_nextn_predict_layers"] = 1
    write_checkpoint(tmp_path, config, {**tensors, **extra, **inv_freq})
    logits = load_model(tmp_path, dtype=torch.float32)(TOKENS)
    expected = oracle(TOKENS).logits
    assert (logits - expected).abs().max() < 1e-4 * expected.abs().max()
    save_adapter(load_model(tmp_path), {"experts": {}}, tmp_path / "nothing")
    merge(tmp_path, tmp_path / "nothing", tmp_path / "merged")  # keeps what was passed over
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert all(torch.equal(merged[name], tensor) for name, tensor in (extra | inv_freq).items())
    for layer in ("4", "13"):  # beyond the one that the config announces
        more = {f"model.layers.{layer}.norm": torch.ones(4)}
        write_checkpoint(tmp_path, config, {**tensors, **extra, **more})
        with pytest.raises(ValueError, match=f"do not belong to this config: model.layers.{layer}"):
            load_model(tmp_path)


def test_a_tied_checkpoint_with_another_head_is_refused(tmp_path):
    oracle = make_oracle(5, "deepseek_v3")
    assert oracle.config.tie_word_embeddings
    tensors = {**oracle.state_dict(), "lm_head.weight": torch.ones(96, 32)}
    write_checkpoint(tmp_path, published_config(oracle, "deepseek_v3", 5, True), tensors)
    with pytest.raises(ValueError, match="lm_head.weight differs from model.embed_tokens.weight"):
        load_model(tmp_path)


# ------------------------------------------------------------------------------------------
# FP8


def quantise(tensors: dict, block: int) -> tuple[dict, dict]:
    """Linear weights in FP8 with their scales; and, by a plain loop over blocks, what they stand
    for in float32."""
    stored, values = {}, {}
    for name, tensor in tensors.items():
        plain = ("embed_tokens", "lm_head", "norm", "mlp.gate.", "bias")
        if any(part in name for part in plain):
            stored[name] = values[name] = tensor.bfloat16() if "bias" not in name else tensor
            continue
        rows, columns = tensor.shape
        scales = torch.zeros(-(-rows // block), -(-columns // block))
        weight = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
        value = torch.empty(rows, columns)
        for i in range(scales.shape[0]):
            for j in range(scales.shape[1]):
                at = slice(i * block, (i + 1) * block), slice(j * block, (j + 1) * block)
                scales[i, j] = tensor[at].abs().max() / 448
                weight[at] = (tensor[at] / scales[i, j]).to(torch.float8_e4m3fn)
                value[at] = weight[at].float() * scales[i, j]
        stored |= {name: weight, f"{name}_scale_inv": scales}
        values[name] = value
    return stored, values


def save_fp8(directory, seed: int = 2, block: int = 10, shards: int = 3):
    """A V3 checkpoint as DeepSeek publishes it; blocks of 10 leave ragged edges in every matrix.
    Returns what its weights stand for."""
    oracle = make_oracle(seed, "deepseek_v3", num_hidden_layers=2, first_k_dense_replace=1)
    stored, values = quantise(one_by_one(oracle.state_dict()), block)
    config = published_config(oracle, "deepseek_v3", seed, new_spelling=False)
    config["quantization_config"] = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [block, block],
    }
    write_checkpoint(directory, config, stored, shards)
    index = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    scales = [name for name in index if name.endswith("_scale_inv")]
    apart = [name for name in scales if index[name] != index[name.removesuffix("_scale_inv")]]
    assert len(scales) >= 40 and apart  # scales in other shards than their weights
    return values


@pytest.mark.parametrize("block", [10, 16, 128])
def test_fp8_loads_to_the_exact_values(block, tmp_path, monkeypatch):
    values = save_fp8(tmp_path, block=block)
    monkeypatch.setattr("stored_tensors.READ_BYTES", 700)  # several reads a tensor
    for dtype in (torch.float32, torch.bfloat16):
        state = load_model(tmp_path, dtype=dtype).state_dict()
        assert state.keys() == values.keys()
        for name, tensor in state.items():
            wanted = values[name].to(dtype) if "bias" not in name else values[name]
            assert torch.equal(tensor, wanted), name


@pytest.mark.parametrize("value", [float("inf"), float("nan"), -1.0])
def test_bad_scales_are_named(value, tmp_path):
    save_fp8(tmp_path)
    name = "model.layers.1.mlp.experts.3.up_proj.weight_scale_inv"
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    tensors = load_file(tmp_path / index[name])
    tensors[name][0, 1] = value
    save_file(tensors, tmp_path / index[name])
    with pytest.raises(ValueError, match=f"{name} holds a scale that is negative or not finite"):
        load_model(tmp_path)


def test_merged_fp8_is_bfloat16_and_loads_in_transformers(tmp_path):
    from transformers import DeepseekV3ForCausalLM

    values = save_fp8(tmp_path / "base")
    model = load_model(tmp_path / "base")
    cfg = {"experts": {"1": [0, 5]}}
    put_tensors(model, {name: p * 1.5 for name, p in trained_parameters(model, cfg).items()})
    save_adapter(model, cfg, tmp_path / "adapter")
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert "quantization_config" not in json.loads((tmp_path / "merged/config.json").read_text())
    merged = load_model(tmp_path / "merged", dtype=torch.float32)
    trained = trained_parameters(model, cfg)
    for name, tensor in merged.state_dict().items():
        wanted = trained[name] if name in trained else values[name]
        assert torch.equal(tensor, wanted.bfloat16().float() if "bias" not in name else wanted)
    oracle = DeepseekV3ForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    expected = oracle(TOKENS).logits
    assert (merged(TOKENS) - expected).abs().max() < 1e-4 * expected.abs().max()


# ------------------------------------------------------------------------------------------
# Merging and adapters over every way to store a base


def test_merging_a_trained_embedding_takes_a_tied_head_along(tmp_path):
    """Also where the base stores the head, too."""
    oracle = make_oracle(1, "deepseek_v3", tie_word_embeddings=True)
    config = published_config(oracle, "deepseek_v3", 1, new_spelling=True)
    tensors = one_by_one(dict(oracle.state_dict()))
    assert "lm_head.weight" in tensors
    write_checkpoint(tmp_path / "base", config, tensors)
    model = load_model(tmp_path / "base", dtype=torch.float32)
    cfg = {"experts": {}, "non_expert_modules": True}
    put_tensors(model, {name: p * 1.5 for name, p in trained_parameters(model, cfg).items()})
    save_adapter(model, cfg, tmp_path / "adapter")
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    merged = load_model(tmp_path / "merged", dtype=torch.float32)
    assert torch.equal(merged(TOKENS), model(TOKENS))


@pytest.mark.parametrize("seed", range(4))
def test_merging_over_every_storage(seed, tmp_path):
    """Fused or not, sharded or not: transformers reads the result with our logits, and the result
    is stored as the base is."""
    from transformers import DeepseekV3ForCausalLM

    save_variant(tmp_path / "base", "deepseek_v3", seed)
    for name in ("tokenizer.json", "chat_template.jinja", "LICENSE"):
        (tmp_path / "base" / name).write_text("{}")
    (tmp_path / "base" / "modeling_deepseek.py").write_text("raise SystemExit")
    model = load_model(tmp_path / "base", dtype=torch.float32)
    cfg = {"experts": {"2": [0, 5]}, "shared_experts": True}
    put_tensors(model, {name: p * 1.5 for name, p in trained_parameters(model, cfg).items()})
    save_adapter(model, cfg, tmp_path / "adapter")
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    merged = {path.name for path in (tmp_path / "merged").iterdir()}
    assert merged == {path.name for path in (tmp_path / "base").iterdir()} - {
        "modeling_deepseek.py"
    }
    again = load_model(tmp_path / "merged", dtype=torch.float32).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())
    oracle = DeepseekV3ForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    expected = oracle(TOKENS).logits
    assert (model(TOKENS) - expected).abs().max() < 1e-4 * expected.abs().max()


def test_the_fingerprint_tells_weights_and_not_storage(tmp_path):
    oracle = make_oracle(0, "deepseek_v3")
    config = published_config(oracle, "deepseek_v3", 0, True)
    fused = {name: tensor.bfloat16() for name, tensor in oracle.state_dict().items()}
    write_checkpoint(tmp_path / "fused", config, fused)
    write_checkpoint(tmp_path / "sharded", config, one_by_one(fused), 3)
    wide = {name: tensor.float() for name, tensor in fused.items()}
    write_checkpoint(tmp_path / "float32", config, wide)
    same = {fingerprint(read_checkpoint(tmp_path / d)[1]) for d in ("fused", "sharded", "float32")}
    assert len(same) == 1
    save_fp8(tmp_path / "fp8")
    model = load_model(tmp_path / "fp8")
    save_adapter(model, {"experts": {}}, tmp_path / "nothing")
    merge(tmp_path / "fp8", tmp_path / "nothing", tmp_path / "bfloat16")
    assert fingerprint(read_checkpoint(tmp_path / "bfloat16")[1]) == model.fingerprint
    for name in (
        "lm_head.weight",
        "model.norm.weight",
        "model.layers.2.mlp.experts.7.down_proj.weight",
    ):
        changed = one_by_one(fused)
        changed[name] = changed[name] * 1.01
        write_checkpoint(tmp_path / "changed", config, changed)
        assert fingerprint(read_checkpoint(tmp_path / "changed")[1]) not in same


def test_an_adapter_of_another_base_changes_nothing(tmp_path):
    for seed in (0, 4):  # the same shapes, other weights
        fields = random_config(0, "deepseek_v3")
        oracle = make_oracle(seed, "deepseek_v3", **fields)
        config = published_config(oracle, "deepseek_v3", seed, True)
        write_checkpoint(tmp_path / str(seed), config, oracle.state_dict())
    mine, other = load_model(tmp_path / "0"), load_model(tmp_path / "4")
    save_adapter(other, {"experts": {"2": [1]}}, tmp_path / "adapter")
    before = {name: p.clone() for name, p in mine.named_parameters()}
    with pytest.raises(ValueError, match="belongs to another base checkpoint"):
        load_adapter(mine, tmp_path / "adapter")
    with pytest.raises(ValueError, match="belongs to another base checkpoint"):
        merge(tmp_path / "0", tmp_path / "adapter", tmp_path / "merged")
    assert all(torch.equal(p, before[name]) for name, p in mine.named_parameters())
    assert not (tmp_path / "merged").exists()


def test_an_adapter_that_cannot_be_read_to_its_end_leaves_the_base(tmp_path, monkeypatch):
    oracle = make_oracle(0, "deepseek_v3")
    config = published_config(oracle, "deepseek_v3", 0, True)
    write_checkpoint(tmp_path, config, oracle.state_dict())
    model, before = load_model(tmp_path), load_model(tmp_path).state_dict()
    cfg = {"experts": {"2": [1, 3]}}
    put_tensors(model, {name: p + 1 for name, p in trained_parameters(model, cfg).items()})
    save_adapter(model, cfg, tmp_path / "adapter")
    model, read, reads = load_model(tmp_path), StoredTensor.read_bytes, []

    def failing(stored, memory):
        reads.append(stored.name)
        if len(reads) == 3:
            raise OSError("the disk is gone")
        return read(stored, memory)

    monkeypatch.setattr(StoredTensor, "read_bytes", failing)
    with pytest.raises(OSError, match="the disk is gone"):
        load_adapter(model, tmp_path / "adapter")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    reads.clear()
    with pytest.raises(OSError, match="the disk is gone"):
        merge(tmp_path, tmp_path / "adapter", tmp_path / "merged")
    assert not [path for path in tmp_path.iterdir() if "merged" in path.name]


def test_the_original_code_reads_our_adapters(tmp_path):
    """What it does: adapter_config["experts"][str(layer)] for every MoE layer, then a strict
    load_state_dict of all *.safetensors, where frozen parameters are not part of the state."""
    oracle = make_oracle(1, "deepseek_v2", first_k_dense_replace=1)
    write_checkpoint(
        tmp_path, published_config(oracle, "deepseek_v2", 1, True), oracle.state_dict()
    )
    model = load_model(tmp_path, dtype=torch.float32)
    save_adapter(model, {"experts": {"2": [4]}}, tmp_path / "adapter")
    cfg = json.loads((tmp_path / "adapter/expert_cfg.json").read_text())
    state = {
        f"model.layers.{layer}.mlp.experts.{e}.{half}_proj.weight"
        for layer in (1, 2)
        for e in cfg["experts"][str(layer)]
        for half in ("gate", "up", "down")
    }
    files = list((tmp_path / "adapter").glob("*.safetensors"))
    assert state == {name for file in files for name in load_file(file)} and len(state) == 3


# ------------------------------------------------------------------------------------------
# Memory

MEASURE = """
import sys, torch
from checkpoint import load_model
from merge import merge
def kib(field):
    return int(next(l for l in open("/proc/self/status") if l.startswith(field)).split()[1])
tiny, large, adapter, merged = sys.argv[1:]
load_model(tiny)
merge(tiny, adapter, merged + "-tiny")
before = kib("VmRSS")
{work}
print((kib("VmHWM") - before) / 1024)
"""


def save_large(directory, stored: torch.dtype, shards: int) -> float:
    """A checkpoint of 475 MiB in bfloat16, its largest tensor 195 MiB; returns MiB in bfloat16."""
    fields = dict(num_hidden_layers=2, first_k_dense_replace=1, vocab_size=100000, hidden_size=1024)
    fields |= dict(moe_intermediate_size=1024, intermediate_size=4096, n_routed_experts=8)
    known = ModelConfig.__dataclass_fields__
    small = {k: v for k, v in random_config(0, "deepseek_v3").items() if k in known}
    config = {"model_type": "deepseek_v3", **small, **fields}
    config |= dict(topk_method="noaux_tc", scoring_func="sigmoid")
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    model, tensors = build_model(ModelConfig(**config), "meta"), {}
    for name, tensor in model.state_dict().items():
        if stored.itemsize == 1 and tensor.dim() == 2 and "mlp.gate." not in name:
            tensors[name] = torch.zeros(tensor.shape, dtype=stored)
            blocks = [-(-size // 128) for size in tensor.shape]
            tensors[f"{name}_scale_inv"] = torch.ones(blocks)
        else:
            dtype = torch.bfloat16 if stored.itemsize == 1 else stored
            tensors[name] = torch.zeros(tensor.shape, dtype=dtype)
    write_checkpoint(directory, config, tensors, shards)
    return sum(tensor.nbytes for tensor in model.state_dict().values()) / 2**20


def peak_of(work: str, tmp_path) -> float:
    """MiB of resident memory, mapped files included, that `work` takes at its peak beyond what was
    resident before, in a process that has loaded and merged a tiny checkpoint."""
    oracle = make_oracle(0, "deepseek_v3")
    tiny = published_config(oracle, "deepseek_v3", 0, True)
    write_checkpoint(tmp_path / "tiny", tiny, oracle.state_dict())
    (tmp_path / "adapter").mkdir()
    save_file({}, tmp_path / "adapter" / "adapter.safetensors")
    (tmp_path / "adapter" / "expert_cfg.json").write_text('{"experts": {}}')
    arguments = [tmp_path / name for name in ("tiny", "large", "adapter", "merged")]
    command = [sys.executable, "-c", MEASURE.format(work=work), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return float(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("stored", [torch.float32, torch.float8_e4m3fn])
def test_loading_takes_the_model_and_one_tensor(stored, tmp_path):
    model = save_large(tmp_path / "large", stored, shards=2)
    peak = peak_of("model = load_model(large)", tmp_path)
    assert 0.9 * model < peak <= model + 195, (peak, model)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_merging_takes_one_shard(tmp_path):
    save_large(tmp_path / "large", torch.float8_e4m3fn, shards=6)
    peak = peak_of("merge(large, adapter, merged)", tmp_path)
    sizes = [path.stat().st_size / 2**20 for path in (tmp_path / "merged").glob("*.safetensors")]
    assert len(sizes) == 6
    # The half: what is converted at a time, and what the allocator keeps of smaller shards.
    assert peak <= 1.5 * max(sizes) < 0.7 * sum(sizes), (peak, sizes)
