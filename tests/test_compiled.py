"""Layers through torch.compile: the same results, one graph for all layers of a kind, and where it
is refused. The compiler's back end is left out (it takes half a minute): what is run is what it
would be given."""

from functools import partial

import pytest
import torch
from test_model import small_config
from test_train import settings
from torch._dynamo.testing import CompileCounterWithBackend

from adapter import mark_trainable, put_tensors
from benchmarks.v2_lite import V2_LITE
from checkpoint import build_model
from fast import compiled_blocks
from fast.lora import experts_with_lora
from fast.loss import token_losses
from files import read_json
from lora import add_lora, lora_parameters
from model import Block, Cache, ModelConfig
from select_experts import collect_scores
from train import train
from training import config as training_config
from training.checkpointing import first_checkpointed
from training.config import TrainConfig, settle_compile

V2_LITE_CONFIG = ModelConfig(**V2_LITE)
# Of five MoE layers: none, one, several, all but one, all.
SELECTION = {"1": [], "2": [6], "3": [0, 3, 7], "4": list(range(1, 8)), "5": list(range(8))}


@pytest.fixture
def graphs(monkeypatch):
    """Counts the graphs that blocks are compiled to."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    block = torch.compile(Block.forward, dynamic=False, backend=counter, fullgraph=True)
    monkeypatch.setattr("fast.compiled.compiled_block", lambda tuned: block)
    monkeypatch.setattr(training_config, "compiler_error", lambda device: "")
    yield counter
    torch._dynamo.reset()


def random_models(count: int = 2, **changes):
    config = small_config(num_hidden_layers=6, hidden_size=64, moe_intermediate_size=32, **changes)
    models = [build_model(config) for _ in range(count)]
    torch.manual_seed(0)
    for name, p in models[0].named_parameters():
        p.data.fill_(1.0) if "norm" in name else p.data.normal_(std=0.05)
    for other in models[1:]:
        put_tensors(other, dict(models[0].named_parameters()))
    return config, models


def add_random_lora(model, rank: int) -> None:
    add_lora(model, rank, 2.0)
    generator = torch.Generator().manual_seed(rank)
    with torch.no_grad():
        for p in lora_parameters(model).values():
            p.copy_(torch.empty(p.shape).normal_(std=0.05, generator=generator).bfloat16())


def gradients(model, tokens, compiled=False, checkpointing=False) -> dict[str, torch.Tensor]:
    run_block = compiled_blocks(model) if compiled else Block.__call__
    count = model.config.num_hidden_layers if checkpointing is True else int(checkpointing)
    options = {"run_block": first_checkpointed(run_block, model, count)}
    losses, balance = token_losses(model, tokens, tokens, balance=True, chunk=100, **options)
    (losses.mean() + balance.sum()).backward()
    found = {"losses": losses.detach(), "balance": balance.detach()}
    return found | {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("checkpointing", [False, True, 3])
def test_compiled_layers_give_the_gradients_in_as_few_graphs_as_there_are_kinds_of_layer(
    graphs, checkpointing
):
    config, (compiled,) = random_models(1)
    exact = build_model(config, dtype=torch.float32)
    put_tensors(exact, dict(compiled.named_parameters()))
    tokens = torch.randint(0, config.vocab_size, (4, 96))
    for model in (exact, compiled):
        mark_trainable(model, {"experts": SELECTION})
    options = {"checkpointing": checkpointing}
    expected = gradients(exact, tokens, **options)
    found = gradients(compiled, tokens, compiled=True, **options)
    assert expected.keys() == found.keys() and len(found) == 2 + 3 * 19
    # In bfloat16 a token near a tie may go to another expert; one tensor alone may differ more.
    errors = {n: (found[n].float() - value).norm() for n, value in expected.items()}
    assert all(error <= 0.6 * expected[name].norm() for name, error in errors.items()), errors
    norm = sum(value.norm() ** 2 for value in expected.values()).sqrt()
    assert sum(error**2 for error in errors.values()).sqrt() < 0.04 * norm
    # Dense; before anything is trained; the first with trained experts, whose input wants no
    # gradient; the three others.
    assert graphs.frame_count == 4
    gradients(compiled, tokens + 0, compiled=True, **options)
    assert graphs.frame_count == 4


@pytest.mark.parametrize("rank, checkpointing", [(3, False), (8, True)])
def test_compiled_layers_with_lora_are_one_graph_for_all_with_experts(graphs, rank, checkpointing):
    config, (compiled,) = random_models(1)
    exact = build_model(config, dtype=torch.float32)
    put_tensors(exact, dict(compiled.named_parameters()))
    tokens = torch.randint(0, config.vocab_size, (4, 96))
    for model in (exact, compiled):
        add_random_lora(model, rank)
    options = {"checkpointing": checkpointing}
    expected = gradients(exact, tokens, **options)
    found = gradients(compiled, tokens, compiled=True, **options)
    # Of a layer: four Linears of attention, and three of the dense layer or of shared experts, have
    # an A and a B of their own; its experts have four stacks.
    assert expected.keys() == found.keys() and len(found) == 2 + 6 * 2 * (4 + 3) + 5 * 4
    errors = {n: (found[n].float() - value).norm() for n, value in expected.items()}
    assert all(error <= 0.6 * expected[name].norm() for name, error in errors.items()), errors
    norm = sum(value.norm() ** 2 for value in expected.values()).sqrt()
    assert sum(error**2 for error in errors.values()).sqrt() < 0.04 * norm
    assert graphs.frame_count == 2  # dense, with experts
    gradients(compiled, tokens + 0, compiled=True, **options)
    assert graphs.frame_count == 2


def test_compiled_decoding_with_lora_gives_the_logits_of_a_whole_pass(graphs):
    config, (model,) = random_models(1)
    add_random_lora(model, 3)
    tokens = torch.randint(0, config.vocab_size, (2, 10))
    with torch.no_grad():
        whole = model(tokens)
        cache = Cache.empty(config, rows=2, length=10, like=whole)
        model(tokens[:, :8], cache)
        for at in (8, 9):
            step = {"cache": cache, "run_block": compiled_blocks(model, tokens=2)}
            states, _ = model.hidden_states(tokens[:, at : at + 1], **step)
            error = (model.lm_head(states)[:, 0] - whole[:, at]).abs().max()
            assert error < 0.03 * whole.abs().max()
    assert graphs.frame_count == 2


def test_compiled_lora_over_trained_experts_is_refused(monkeypatch):
    _, (model,) = random_models(1)
    add_lora(model, 8, 2.0)
    block = model.model.layers[3]
    block.mlp.experts[2].requires_grad_(True)
    # Without attention, so that it takes no time.
    compiled = torch.compile(
        lambda block, *args: experts_with_lora(block.mlp, *args), backend="eager"
    )
    monkeypatch.setattr("fast.compiled.compiled_block", lambda tuned: compiled)
    x = torch.randn(4, 64, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match='needs experts "loop"'):
        compiled_blocks(model)(block, x, torch.rand(4, 2), torch.tensor([[0, 1]] * 4))


def test_compiled_scores_are_the_scores(graphs, monkeypatch):
    config, (model,) = random_models(1)
    batches = [(torch.randint(0, config.vocab_size, (2, 48)), torch.tensor([48, 20]))]
    expected = collect_scores(model, batches)
    monkeypatch.setattr(
        model, "hidden_states", partial(model.hidden_states, run_block=compiled_blocks(model))
    )
    found = collect_scores(model, batches)
    assert graphs.frame_count == 2
    for name in expected:
        for layer, values in expected[name].items():
            assert found[name][layer] == pytest.approx(values, abs=0.01)


@pytest.mark.parametrize("method", ["esft", "lora"])
def test_a_compiled_run_has_the_losses_of_a_plain_one(
    method, graphs, checkpoint, chat_file, tmp_path, capsys
):
    losses = {}
    for compiled in (False, True):
        changes = dict(dtype="bfloat16", compile=compiled, steps=3, save_steps=3, eval_steps=3)
        changes["method"] = method
        result = train(settings(checkpoint, chat_file, tmp_path / str(compiled), **changes))
        losses[compiled] = result["best_validation_loss"]
        assert bool(graphs.frame_count) == compiled
        assert ("compiles the layers" in capsys.readouterr().out) == compiled
        assert read_json(tmp_path / str(compiled) / "train_config.json")["compile"] is compiled
    assert losses[True] == pytest.approx(losses[False], rel=0.01)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"dtype": "float32"}, "dtype float32, since"),
        ({"experts": "loop"}, "experts loop, which"),
        ({"document_mask": True, "device": "cpu"}, "document_mask on a CPU"),
    ],
)
def test_what_cannot_be_compiled_is_refused_and_left_out_by_itself(changes, message):
    keys = dict(model="m", data="d", output_dir="o", device="cuda", dtype="bfloat16") | changes
    with pytest.raises(ValueError, match=f"compile is true; cannot be with {message}"):
        TrainConfig(**keys, compile=True).check()
    open_ = TrainConfig(**keys)
    open_.check()
    settle_compile(open_, small_config(), 15_000_000_000)
    assert open_.compile is False


@pytest.mark.parametrize(
    "changes, parameters, compiled",
    [
        ({}, 15_000_000_000, True),
        ({"steps": 24}, 15_000_000_000, False),  # 192 micro-batches
        ({"steps": 25}, 15_000_000_000, True),
        ({}, 4_000_000, False),
        ({"device": "cpu"}, 15_000_000_000, False),
        ({"compile": False}, 15_000_000_000, False),
        ({"compile": True, "device": "cpu"}, 4_000_000, True),
    ],
)
def test_layers_are_compiled_where_that_pays(changes, parameters, compiled, monkeypatch):
    monkeypatch.setattr(training_config, "compiler_error", lambda device: "")  # the GPU is not here
    config = TrainConfig(**(dict(device="cuda", dtype="bfloat16") | changes))
    settle_compile(config, V2_LITE_CONFIG, parameters)
    assert config.compile is compiled


def test_a_machine_without_a_compiler_is_noticed_before_the_work(monkeypatch, capsys):
    def no_compiler(function):
        raise RuntimeError("no working C++ compiler\nand a long story")

    monkeypatch.setattr(torch, "compile", no_compiler)
    config = TrainConfig(device="cpu", dtype="bfloat16", compile=True)
    with pytest.raises(ValueError, match="does not work here: no working C\\+\\+ compiler$"):
        settle_compile(config, V2_LITE_CONFIG, 15_000_000_000)
    config.compile, config.device = None, "cuda"
    settle_compile(config, V2_LITE_CONFIG, 15_000_000_000)
    assert config.compile is False
    assert "not compiled, as torch.compile does not work here: no work" in capsys.readouterr().out


def test_sizes_that_grouped_products_do_not_take_are_refused_before_the_work():
    odd = small_config(moe_intermediate_size=12)
    config = TrainConfig(device="cuda", dtype="bfloat16", compile=True)
    with pytest.raises(
        ValueError, match="compile is true; cannot be with moe_intermediate_size 12"
    ):
        settle_compile(config, odd, 15_000_000_000)
    config.compile = None
    settle_compile(config, odd, 15_000_000_000)
    assert config.compile is False
