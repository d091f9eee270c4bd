"""The two expert paths, gate and balance loss by hand, freezing, adapters, merging; checkpoints
that transformers wrote, and wrong ones. The families against their oracles: test_families.py."""

import json

import pytest
import torch
from benchmarks.v2_lite import V2_LITE
from conftest import random_config, save_with_transformers
from safetensors.torch import load_file, save_file

from model import (
    Gate,
    ModelConfig,
    MoE,
    build_model,
    everything,
    load_adapter,
    load_model,
    mark_trainable,
    merge,
    put_tensors,
    remove_adapter,
    rope_table,
    save_adapter,
    trained_parameters,
)

TOKENS = torch.randint(
    0, 90, (2, 70), generator=torch.Generator().manual_seed(0)
)  # longer than YaRN's 64


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
def test_what_save_pretrained_writes_in_shards_gives_its_logits(family, tmp_path):
    oracle = save_with_transformers(tmp_path, seed=2, family=family, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    logits = load_model(tmp_path, dtype=torch.float32)(TOKENS)
    assert (logits - oracle(TOKENS).logits).abs().max() < 1e-4 * logits.abs().max()


def small_config(**changes) -> ModelConfig:
    fields = {**random_config(1), **changes}
    names = ModelConfig.__dataclass_fields__
    return ModelConfig(model_type="deepseek_v2", **{k: v for k, v in fields.items() if k in names})


def small_moe(paths=("loop", "grouped"), **changes):
    """A config, and for each expert path a model with the same random weights."""
    config = small_config(**changes)
    models = [build_model(config, dtype=torch.float32, experts=path) for path in paths]
    torch.manual_seed(0)
    for p in models[0].parameters():
        torch.nn.init.normal_(p, std=0.3)
    for other in models[1:]:
        put_tensors(other, dict(models[0].named_parameters()))
    return config, models


@pytest.mark.parametrize("routing", ["spread", "one expert", "one token"])
@pytest.mark.parametrize("trained", [[], [3], [0, 3, 7], list(range(8))])
def test_loop_and_grouped_agree(routing, trained):
    config, models = small_moe()
    x = torch.randn(1 if routing == "one token" else 20, config.hidden_size)
    K = config.num_experts_per_tok
    indices = (
        torch.rand(len(x), 8).topk(K, -1).indices
        if routing != "one expert"
        else torch.arange(3, 3 + K).expand(len(x), K)
    )  # most experts see no token
    weights = torch.rand(len(x), K)
    results = []
    for model in models:
        mark_trainable(model, {"experts": {"1": trained}})
        moe = model.model.layers[1].mlp
        inputs = x.clone().requires_grad_(), weights.clone().requires_grad_()
        y = moe.run_experts(moe, *inputs, indices)
        y.sin().sum().backward()
        gradients = [p.grad for e in trained for p in moe.experts[e].parameters()]
        assert all(
            p.grad is None
            for e in set(range(8)) - set(trained)
            for p in moe.experts[e].parameters()
        )
        results.append([y, inputs[0].grad, inputs[1].grad, *gradients])
    for ours, specified in zip(*results, strict=True):
        assert (ours - specified).abs().max() <= 1e-5 * specified.abs().max()


@pytest.mark.parametrize("by_hand", [False, True])
def test_loop_and_grouped_agree_for_every_subset_of_trained_experts(by_hand):
    """`by_hand`: requires_grad set without mark_trainable, so that the trained ones do not stand
    first in the stacks."""
    config, models = small_moe(n_routed_experts=6)
    x, weights = torch.randn(15, config.hidden_size), torch.rand(15, config.num_experts_per_tok)
    indices = torch.rand(15, 5).topk(config.num_experts_per_tok, -1).indices  # expert 5 has none
    for subset in range(2**6):
        trained = [e for e in range(6) if subset >> e & 1]
        gradients = []
        for model in models:
            moe = model.model.layers[1].mlp
            if by_hand:
                model.requires_grad_(False)
                for e in trained:
                    moe.experts[e].requires_grad_(True)
            else:
                mark_trainable(model, {"experts": {"1": trained}})
            inputs = x.clone().requires_grad_(), weights.clone().requires_grad_()
            moe.run_experts(moe, *inputs, indices).square().sum().backward()
            found = {n: p.grad for n, p in moe.experts.named_parameters() if p.grad is not None}
            gradients.append({"x": inputs[0].grad, "weights": inputs[1].grad, **found})
            model.zero_grad()
        loop, grouped = gradients
        assert loop.keys() == grouped.keys() and len(loop) == 2 + 3 * len(trained)
        for name in loop:
            assert (loop[name] - grouped[name]).abs().max() <= 1e-5 * loop[name].abs().max(), name


def test_experts_that_move_in_their_stacks_keep_parameters_values_and_results():
    config, (model,) = small_moe(["grouped"])
    tokens = torch.randint(0, config.vocab_size, (1, 9))
    before = {name: (p, p.clone(), p.data_ptr()) for name, p in model.named_parameters()}
    logits = model(tokens)
    moe = model.model.layers[1].mlp
    for experts in ([1, 2], [6, 2], [2, 6], [5], list(range(8)), []):
        mark_trainable(model, {"experts": {"1": experts}})
        assert set(moe.order[: len(experts)]) == set(experts)
        for name, p in model.named_parameters():
            assert p is before[name][0] and torch.equal(p, before[name][1])
        assert torch.allclose(model(tokens), logits, atol=1e-6)
    moved = [n for n, p in model.named_parameters() if p.data_ptr() != before[n][2]]
    assert moved and all(".layers.1.mlp.experts." in name for name in moved)


def test_experts_stay_views_of_their_stack_when_the_model_moves():
    config, (model,) = small_moe(["grouped"])
    mark_trainable(model, {"experts": {"1": [2]}})
    moe: MoE = model.to(torch.bfloat16).model.layers[1].mlp
    assert moe.gate_up.dtype == torch.bfloat16
    assert (
        moe.experts[2].up_proj.weight.requires_grad
        and not moe.experts[3].up_proj.weight.requires_grad
    )
    with torch.no_grad():
        moe.experts[2].up_proj.weight.fill_(7.0)
        moe.experts[2].down_proj.weight.fill_(8.0)
    I, place = config.moe_intermediate_size, moe.places[2]
    assert place == 0  # the trained one stands first
    assert (
        (moe.gate_up[place, I:] == 7).all()
        and (moe.gate_up[place, :I] != 7).any()
        and (moe.down[place] == 8).all()
    )


def gate_of(scores, **changes):
    """A gate whose softmax scores for a one-hot input are exactly `scores`."""
    fields = dict(
        n_routed_experts=len(scores), hidden_size=1, num_experts_per_tok=2, topk_method="greedy"
    )
    gate = Gate(small_config(**{**fields, **changes}))
    gate.weight.data = torch.tensor(scores).log()[:, None]
    weights, indices, _ = gate(torch.ones(1, 1))
    return sorted(zip(indices[0].tolist(), weights[0].tolist()))


def test_gate_by_hand():
    scores = [0.30, 0.05, 0.25, 0.20, 0.01, 0.19]
    assert gate_of(scores, routed_scaling_factor=2.0) == [
        (0, pytest.approx(0.6)),
        (2, pytest.approx(0.5)),
    ]  # the two highest, scaled
    assert gate_of(scores, norm_topk_prob=True, routed_scaling_factor=2.0) == [
        (0, pytest.approx(0.30 / 0.55)),
        (2, pytest.approx(0.25 / 0.55)),
    ]  # normalised instead of scaled
    assert gate_of(
        scores,
        topk_method="group_limited_greedy",
        n_group=3,
        topk_group=1,
        routed_scaling_factor=1.0,
    ) == [
        (0, pytest.approx(0.30)),
        (1, pytest.approx(0.05)),
    ]  # the group of the best expert, and only it


def test_gate_decides_in_float32():
    """Two experts whose logits differ by less than bfloat16 can hold keep their order."""
    gate = Gate(
        small_config(n_routed_experts=2, hidden_size=2, num_experts_per_tok=1, topk_method="greedy")
    )
    gate.weight.data = torch.tensor([[1.0, 0.0], [1.0, 0.0078125]], dtype=torch.bfloat16)
    _, indices, scores = gate(torch.tensor([[8.0, 1.0]], dtype=torch.bfloat16))
    assert indices.item() == 1 and scores.dtype == torch.float32


def test_which_layers_are_moe():
    config = small_config(num_hidden_layers=6, first_k_dense_replace=1, moe_layer_freq=2)
    model = build_model(config, "meta")
    moe = [i for i, block in enumerate(model.model.layers) if isinstance(block.mlp, MoE)]
    assert moe == config.moe_layers == [2, 4]


def test_tied_embeddings_equal_transformers(tmp_path):
    oracle = save_with_transformers(tmp_path, seed=1, tie_word_embeddings=True)
    model = load_model(tmp_path, dtype=torch.float32)
    expected = oracle(TOKENS).logits
    assert (model(TOKENS) - expected).abs().max() < 1e-4 * expected.abs().max()
    assert model.to(torch.bfloat16).lm_head.weight is model.model.embed_tokens.weight


def test_balance_loss_by_hand():
    config, (model,) = small_moe(["loop"], n_routed_experts=2, num_experts_per_tok=1)
    moe = model.model.layers[1].mlp
    scores = torch.tensor(
        [[0.9, 0.1], [0.7, 0.3], [0.4, 0.6], [0.4, 0.6]]
    )  # two rows of two tokens
    indices = torch.tensor([[0], [0], [0], [1]])
    # Row 0: f = (2, 0), P = (0.8, 0.2). Row 1: f = (1, 1), P = (0.4, 0.6).
    torch.testing.assert_close(moe.balance_loss(scores, indices, 2), torch.tensor([1.6, 1.0]))
    config.seq_aux = False  # all four tokens: f = (1.5, 0.5), P = (0.6, 0.4)
    torch.testing.assert_close(moe.balance_loss(scores, indices, 2), torch.tensor([1.1, 1.1]))


def test_mark_trainable_counts():
    config, (model,) = small_moe(["loop"], first_k_dense_replace=1)
    cfg = {"experts": {"1": [0, 5], "2": []}, "shared_experts": False, "non_expert_modules": False}
    mark_trainable(model, cfg)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        f"model.layers.1.mlp.experts.{e}.{p}_proj.weight"
        for e in (0, 5)
        for p in ("gate", "up", "down")
    }
    mark_trainable(model, {**cfg, "shared_experts": True})
    assert sum(".shared_experts." in n for n, p in model.named_parameters() if p.requires_grad) == 6
    mark_trainable(model, {**cfg, "non_expert_modules": True})
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert "lm_head.weight" in trained and "model.layers.1.mlp.gate.weight" in trained
    assert (
        not any(".shared_experts." in n for n in trained)
        and sum(".experts." in n for n in trained) == 6
    )
    mark_trainable(model, everything(config))
    assert all(p.requires_grad for p in model.parameters())


def test_adapters_swap_and_leave_the_base_bit_identical(checkpoint, tmp_path):
    model = load_model(checkpoint)
    base = {name: p.clone() for name, p in model.named_parameters()}
    configs = [
        {"experts": {"1": [0, 5], "2": [7]}},
        {"experts": {"2": [1]}, "shared_experts": True},
    ]
    for i, cfg in enumerate(configs):
        replaced = {name: p.clone() for name, p in trained_parameters(model, cfg).items()}
        put_tensors(model, {name: p + 1 for name, p in replaced.items()})
        save_adapter(model, cfg, tmp_path / str(i))
        put_tensors(model, replaced)
        assert load_file(tmp_path / str(i) / "adapter.safetensors").keys() == replaced.keys()
    for i in (0, 1, 0):  # one in place of the other, without taking it off first
        load_adapter(model, tmp_path / str(i))
        changed = trained_parameters(model, configs[i])
        for name, p in model.named_parameters():
            assert torch.equal(p, base[name] + 1 if name in changed else base[name])
    remove_adapter(model)
    assert all(torch.equal(p, base[name]) for name, p in model.named_parameters())


def test_version_1_adapter_names(checkpoint, tmp_path):
    model = load_model(checkpoint)
    cfg = {"experts": {"1": [3]}}
    tensors = {name: torch.full_like(p, 2.0) for name, p in trained_parameters(model, cfg).items()}
    save_file(
        {name.removeprefix("model."): t for name, t in tensors.items()},
        tmp_path / "old.safetensors",
    )
    (tmp_path / "expert_cfg.json").write_text(json.dumps(cfg))
    load_adapter(model, tmp_path)
    assert (model.model.layers[1].mlp.experts[3].up_proj.weight == 2).all()


def test_merged_checkpoint_loads_in_transformers(checkpoint, tmp_path):
    from transformers import DeepseekV2ForCausalLM

    model = load_model(checkpoint, dtype=torch.float32)
    cfg = {"experts": {"1": [0, 5], "2": [7]}}
    put_tensors(model, {name: p * 1.5 for name, p in trained_parameters(model, cfg).items()})
    save_adapter(model, cfg, tmp_path / "adapter")
    merge(checkpoint, tmp_path / "adapter", tmp_path / "merged")
    expected = (
        DeepseekV2ForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
        .eval()(TOKENS)
        .logits
    )
    assert (model(TOKENS) - expected).abs().max() < 1e-4 * expected.abs().max()
    assert (tmp_path / "merged" / "tokenizer.json").exists()
    half = load_model(checkpoint)  # an adapter in bfloat16 over a base in float32
    save_adapter(half, cfg, tmp_path / "half")
    merge(checkpoint, tmp_path / "half", tmp_path / "merged_half")
    tensors = load_file(tmp_path / "merged_half" / "model.safetensors").values()
    assert {tensor.dtype for tensor in tensors} == {torch.float32}
    with pytest.raises(FileExistsError, match="must be an empty directory"):
        merge(checkpoint, tmp_path / "adapter", tmp_path / "merged")


def test_published_v2_lite_has_its_parameters():
    config = ModelConfig(**V2_LITE)
    model = build_model(config, "meta")
    assert sum(p.numel() for p in model.parameters()) == 15_706_484_224
    assert model.model.layers[0].self_attn.scale * 192**0.5 == pytest.approx(1.59, abs=0.005)
    cos, _ = rope_table(config, torch.arange(3))
    assert cos[0, 0] == 1.0  # equal mscales cancel


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
        ModelConfig.from_json(tmp_path / "config.json")


def test_old_and_new_spelling_of_rope_give_the_same_table(checkpoint, tmp_path):
    raw = json.loads((checkpoint / "config.json").read_text())
    new = ModelConfig.from_json(checkpoint / "config.json")
    rope = raw.pop("rope_parameters")
    theta = rope.pop("rope_theta")
    raw |= {"rope_theta": theta, "rope_scaling": {**rope, "type": rope.pop("rope_type")}}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    old = ModelConfig.from_json(tmp_path / "config.json")
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


@pytest.mark.parametrize(
    "expert_cfg, message",
    [
        ({"experts": {"1": [8]}}, "layer 1 names expert 8; must be 0 to 7"),
        ({"experts": {"0": [1]}}, "layer '0' is not a MoE layer"),
        ({"experts": {"1": [2, 2]}}, "names an expert twice"),
        ({"experts": [1]}, "must be"),
        ({"experts": {}, "shared_experts": "no"}, "shared_experts is 'no'"),
    ],
)
def test_bad_expert_cfg(checkpoint, expert_cfg, message):
    with pytest.raises(ValueError, match=message):
        mark_trainable(load_model(checkpoint), expert_cfg)


def test_bad_adapters_change_nothing(checkpoint, tmp_path):
    model = load_model(checkpoint)
    base = {name: p.clone() for name, p in model.named_parameters()}
    cfg = {"experts": {"1": [3]}}
    good = {name: torch.zeros_like(p) for name, p in trained_parameters(model, cfg).items()}
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    for tensors, message in (
        ({n: t for n, t in good.items() if n != name}, "1 selected tensors are missing"),
        ({**good, name: torch.zeros(3, 3)}, r"has shape \[3, 3\]"),
        ({**good, "model.norm.weight": torch.zeros(32)}, "model.norm.weight is not selected"),
    ):
        save_file(tensors, tmp_path / "adapter.safetensors")
        (tmp_path / "expert_cfg.json").write_text(json.dumps(cfg))
        with pytest.raises(ValueError, match=message):
            load_adapter(model, tmp_path)
        assert all(torch.equal(p, base[n]) for n, p in model.named_parameters())
