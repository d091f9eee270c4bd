"""The transformer: gate and balance loss by hand, which layers have experts, the published sizes. The
families against their oracles: test_families.py. What fast/ puts in: test_fast.py."""

import pytest
import torch
from conftest import random_config

from adapter import put_tensors
from benchmarks.v2_lite import V2_LITE
from checkpoint import build_model
from model import Gate, ModelConfig, MoE, next_tokens, rope_table


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


def test_every_label_that_is_not_negative_counts():
    places, targets = next_tokens(torch.tensor([[5, 0, -100, 7], [-1, 3, 0, 0]]))
    assert places.tolist() == [0, 2, 4, 5, 6] and targets.tolist() == [0, 7, 3, 0, 0]


def test_published_v2_lite_has_its_parameters():
    config = ModelConfig(**V2_LITE)
    model = build_model(config, "meta")
    assert sum(p.numel() for p in model.parameters()) == 15_706_484_224
    assert model.model.layers[0].self_attn.scale * 192**0.5 == pytest.approx(1.59, abs=0.005)
    cos, _ = rope_table(config, torch.arange(3))
    assert cos[0, 0] == 1.0  # equal mscales cancel


def test_rotary_table_of_the_published_v2_lite_is_transformers():
    """With its 4096 tokens YaRN keeps some pairs as they are, unlike with the short ones of
    conftest.random_config."""
    from transformers import DeepseekV2Config
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2RotaryEmbedding

    rope = {**V2_LITE["rope_scaling"], "rope_type": "yarn", "rope_theta": 10000.0}
    theirs = DeepseekV2Config(
        qk_rope_head_dim=64, max_position_embeddings=163840, rope_parameters=rope
    )
    positions = torch.arange(0, 5000, 7)
    expected = DeepseekV2RotaryEmbedding(theirs)(torch.zeros(1), positions)
    cos, sin = rope_table(ModelConfig(**V2_LITE), positions)
    torch.testing.assert_close(torch.complex(cos, sin), expected, atol=1e-3, rtol=0)
