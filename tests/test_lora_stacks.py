"""A and B of a layer's experts lie in four stacks: how many parameters the optimizer has, what
fills the stacks up, how their parts move, and that files do not know of them. Results:
test_lora.py."""

import pytest
import torch
from test_host_optimizer import step_config
from test_lora import TOKENS, lora_gradients, randomise, with_lora
from test_model import small_config

from benchmarks.v2_lite import V2_LITE
from checkpoint import build_model, load_model
from data import Rows
from fast.decoding import can_be_captured
from fast.device import meta_as_gpu
from lora import add_lora, lora_parameters, remove_lora, whole
from model import ModelConfig
from processes import SingleProcess
from train import compute_gradients
from training.host_optimizer import make_optimizer
from training.optimizer import part_like, wholes

ROWS = Rows(TOKENS, TOKENS, torch.zeros_like(TOKENS))
TWO_ROWS = {"batch_size": 2, "gradient_accumulation_steps": 2}


def test_v2_lite_has_a_few_hundred_parameters_with_lora():
    """27 layers of four Linears in attention; in 26, three Linears of shared experts and four
    stacks; in one, three of a dense layer."""
    model = build_model(ModelConfig(**V2_LITE), "meta")
    add_lora(model, rank=8, scaling=2.0)
    parameters = wholes(lora_parameters(model))
    assert len(parameters) == 2 * (27 * 4 + 27 * 3) + 26 * 4
    assert set(parameters.values()) == {p for p in model.parameters() if p.requires_grad}


@pytest.mark.parametrize("rank", [1, 3, 8, 12])
def test_what_fills_the_stacks_up_stays_zero_and_is_not_counted(rank, checkpoint):
    model = load_model(checkpoint, dtype=torch.float32)
    config = step_config(method="lora", **TWO_ROWS, lora_rank=rank, weight_decay=0.5)
    add_lora(model, rank, 2.0)
    trained = lora_parameters(model)
    optimizer = make_optimizer(trained, config)
    before = {name: p.detach().clone() for name, p in trained.items()}
    for _ in range(3):
        compute_gradients(config, model, ROWS, 0.0, optimizer, SingleProcess())
        optimizer.step(0.1)
    assert all(not torch.equal(p, before[name]) for name, p in trained.items() if "_B" in name)
    stacks = [p for name, p in model.named_parameters() if ".experts.lora_" in name]
    assert len(stacks) == 2 * 4 and {p.shape[2] for p in stacks[1::2]} == {-(-rank // 8) * 8}
    c = model.config
    of_experts = [p for name, p in trained.items() if ".mlp.experts." in name]
    count = sum(p.numel() for p in of_experts)
    assert count == 2 * 8 * 3 * rank * (c.hidden_size + c.moe_intermediate_size)
    with torch.no_grad():
        for part in of_experts:
            part.zero_()
    assert not any(stack.any() for stack in stacks)


@pytest.mark.parametrize("device", ["", "cpu"])
def test_the_optimizers_state_has_the_same_names_and_values_with_and_without_stacks(
    device, checkpoint
):
    """As `--experts loop` has none, and what it saves is what was saved before there were any."""
    config = step_config(method="lora", **TWO_ROWS, optimizer_device=device)
    optimizers = []
    for experts in ("grouped", "loop"):
        model = load_model(checkpoint, dtype=torch.float32, experts=experts)
        add_lora(model, 3, 2.0)
        optimizers.append(make_optimizer(lora_parameters(model), config))
        compute_gradients(config, model, ROWS, 0.0, optimizers[-1], SingleProcess())
        assert optimizers[-1].gradients
        optimizers[-1].step(0.01)
    stacked, apart = (optimizer.state() for optimizer in optimizers)
    assert stacked.keys() == apart.keys() and len(optimizers[0].masters) < len(apart) / 6
    for name, tensor in stacked.items():
        assert tensor.is_contiguous()
        torch.testing.assert_close(tensor, apart[name], rtol=1e-3, atol=1e-4)
    saved = {name: torch.rand_like(tensor) for name, tensor in apart.items()}
    for optimizer in optimizers:
        optimizer.restore(saved, 5)
        again = optimizer.state()
        assert all(torch.equal(again[name], tensor) for name, tensor in saved.items())
        for name, p in optimizer.trained.items():
            assert torch.equal(p, saved[f"master.{name}"])


@pytest.mark.parametrize("rank", [3, 16])
def test_a_gpu_is_not_waited_for_and_gets_the_strides_that_it_takes(rank):
    """Tensors on the meta device have no values to wait for, and its grouped products refuse
    strides that a GPU's refuse."""
    config = small_config(hidden_size=64, moe_intermediate_size=24)
    model = build_model(config, "meta")
    add_lora(model, rank, 2.0)
    with meta_as_gpu(True):
        model(TOKENS.to("meta")).sum().backward()
    gradients = lora_gradients(model)
    assert gradients.keys() == lora_parameters(model).keys()
    assert all(
        g.shape == p.shape for g, p in zip(gradients.values(), lora_parameters(model).values())
    )


def test_parts_move_with_their_experts_and_with_the_model(checkpoint):
    model = with_lora(checkpoint)
    values = {name: p.clone() for name, p in lora_parameters(model).items()}
    expected, experts = model(TOKENS), model.model.layers[1].mlp.experts
    for module in experts[3].children():
        module.lora_scaling = 4 / 3  # bfloat16 has no such number
    experts.index_places()
    assert (model(TOKENS) - expected).abs().max() > 0.01
    expected = model(TOKENS)
    experts.put_first([7, 3])
    assert experts.lora_scalings[experts.expert_at.index(3)].tolist() == pytest.approx([4 / 3] * 3)
    torch.testing.assert_close(model(TOKENS), expected)
    for name, p in lora_parameters(model).items():
        assert torch.equal(p, values[name])
    model.to(torch.float64).to(torch.float32)
    assert experts.lora_scalings.dtype == torch.float32
    torch.testing.assert_close(model(TOKENS), expected)
    assert all(torch.equal(p, values[name]) for name, p in lora_parameters(model).items())


def test_removing_takes_the_stacks_off_and_lora_can_be_added_again(checkpoint):
    model = with_lora(checkpoint)
    first = model(TOKENS)
    remove_lora(model)
    plain = load_model(checkpoint, dtype=torch.float32)
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert torch.equal(model(TOKENS), plain(TOKENS))
    add_lora(model, 5, 1.5)
    assert torch.equal(model(TOKENS), plain(TOKENS))  # B is zero
    remove_lora(model)
    add_lora(model, 3, 1.5)
    randomise(model)
    assert torch.equal(model(TOKENS), first)
    part = lora_parameters(model)["model.layers.2.mlp.experts.0.gate_proj.lora_B.weight"]
    assert part_like(part, whole(part)).data_ptr() == part.data_ptr()


@pytest.mark.parametrize(
    "options, captured",
    [
        ({"dtype": torch.bfloat16}, True),
        ({"dtype": torch.float32}, False),  # grouped products are a loop, which waits for the GPU
        ({"dtype": torch.bfloat16, "experts": "loop"}, False),
    ],
)
def test_which_decoding_steps_can_be_captured(options, captured, checkpoint):
    model = with_lora(checkpoint, **options)
    assert can_be_captured(model, rows=2) is captured
    remove_lora(model)
    assert can_be_captured(model, rows=2) is ("experts" not in options)
