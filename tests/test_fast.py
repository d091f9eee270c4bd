"""fast/ against model.py alone: the same results, put in from outside; experts that lie side by side;
few tokens; a run without fast/."""

import importlib
import inspect
import json
import pkgutil

import pytest
import torch
from conftest import ROOT, random_config, save_with_transformers
from test_model import small_config, small_moe

import fast
import model as plain
from adapter import mark_trainable
from checkpoint import build_model, load_model
from config import read_keys
from fast.attention import BLOCK, attend, group_documents
from fast.device import meta_as_gpu, on_gpu
from fast.experts import experts_for_few, swiglu, swiglu_backward
from fast.gate import ScoresAt, top_experts
from model import Block, MoE, checkpointed, experts_loop
from train import command_line, train
from training.config import TrainConfig

DATA = "demo/data/intent_train.jsonl"
FAMILIES = ("deepseek", "deepseek_v2", "deepseek_v3")


def two_models(family: str, seed: int = 1, **changes):
    """A config, a model of model.py alone and one with fast/, with the same random weights."""
    fields = {"model_type": family, **random_config(seed, family), **changes}
    if family == "deepseek_v3":
        fields |= {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}
    fields.pop("rope_parameters", None)
    known = plain.ModelConfig.__dataclass_fields__
    config = plain.ModelConfig(**{k: v for k, v in fields.items() if k in known})
    models = [build_model(config, dtype=torch.float32, experts=e) for e in ("loop", "grouped")]
    torch.manual_seed(seed)
    for p in models[0].parameters():
        torch.nn.init.normal_(p, std=0.3)
    for buffer in models[0].buffers():
        torch.nn.init.normal_(buffer, std=0.3)
    models[1].load_state_dict(models[0].state_dict())
    return config, models


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("head", [False, True])
def test_losses_and_gradients_are_those_of_model_py_alone(family, documents, head):
    """Losses, balance losses and all gradients; with a trained head they come another way."""
    config, models = two_models(family)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, config.vocab_size, (3, 40), generator=generator)
    labels = tokens.masked_fill(torch.rand(3, 40, generator=generator) < 0.4, -100)
    where = torch.tensor([[0] * 7 + [1] + [2] * 32, [5] * 40, [6] * 20 + [7] * 20])
    results = []
    for model, token_losses in zip(models, (plain.token_losses, fast.token_losses)):
        model.requires_grad_(True)
        model.lm_head.weight.requires_grad_(head)
        options = {} if token_losses is plain.token_losses else {"chunk": 17}
        given = tokens, labels, where if documents else None
        losses, balance = token_losses(model, *given, balance=True, **options)
        ((losses * torch.arange(1, len(losses) + 1)).sum() + balance.sum()).backward()
        found = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        results.append({"losses": losses.detach(), "balance": balance.detach(), **found})
    expected, found = results
    assert expected.keys() == found.keys() and len(expected) > 50
    for name, value in expected.items():
        assert (found[name] - value).abs().max() <= 1e-4 * value.abs().max(), name


@pytest.mark.parametrize("head", [False, True])
def test_losses_of_a_bfloat16_model_are_float32(head):
    config, models = two_models("deepseek_v2")
    tokens = torch.randint(0, config.vocab_size, (2, 20))
    for model, token_losses in zip(models, (plain.token_losses, fast.token_losses)):
        model.bfloat16().requires_grad_(True)
        model.lm_head.requires_grad_(head)
        losses, _ = token_losses(model, tokens, tokens.clone())
        assert losses.dtype == torch.float32
        assert not torch.equal(losses, losses.bfloat16().float())  # nor were they rounded before


def test_activations_are_computed_in_float32_and_rounded_once():
    generator = torch.Generator().manual_seed(0)
    h, dact = (torch.randn(64, w, generator=generator).bfloat16() for w in (32, 16))
    weight = torch.rand(64, generator=generator)
    assert torch.equal(swiglu(h, weight), swiglu(h.float(), weight).bfloat16())
    dh, dweights = swiglu_backward(h, weight, dact)
    exact_dh, exact_dweights = swiglu_backward(h.float(), weight, dact.float())
    assert torch.equal(dh, exact_dh.bfloat16()) and torch.equal(dweights, exact_dweights)


@pytest.mark.parametrize("experts", ["loop", "grouped"])
def test_a_model_without_values_has_the_shapes_of_one_with_values(experts):
    config = small_config()
    model = build_model(config, "meta", experts=experts).requires_grad_(True)
    tokens = torch.zeros(2, 7, dtype=torch.int64)
    logits = model(tokens.to("meta"))
    assert logits.shape == (2, 7, config.vocab_size)
    logits.sum().backward()
    assert all(p.grad.shape == p.shape for p in model.parameters())


def test_a_document_mask_shows_each_token_its_own_document_up_to_itself():
    mask = plain.document_mask(torch.tensor([[3, 3, 5]]), torch.device("cpu"))
    assert mask.tolist() == [[[[True, False, False], [True, True, False], [False, False, True]]]]


@pytest.mark.parametrize("length", [1, 40, 128, 300])
def test_documents_as_blocks_show_what_the_mask_shows(length):
    """300 tokens are three blocks, of which documents fill some and share others."""
    draw = torch.Generator().manual_seed(length)
    begins = (torch.rand(2, length, generator=draw) < torch.tensor([[0.002], [0.1]])).long()
    documents = 7 + begins.cumsum(1)
    q, k = (torch.randn(2, length, 2, 16, generator=draw) for _ in range(2))
    v = torch.randn(2, length, 2, 8, generator=draw)
    expected = plain.attend(q, k, v, plain.document_mask(documents, q.device))
    groups = group_documents(documents, q.device)
    torch.testing.assert_close(attend(q, k, v, groups), expected)
    torch.testing.assert_close(attend(q, k, v, groups.blocks), expected)


def test_blocks_that_no_query_sees_are_left_out():
    documents = torch.arange(4).repeat_interleave(BLOCK)[None]  # each fills a block
    blocks = group_documents(documents, documents.device).blocks
    assert blocks.kv_num_blocks.tolist() == [[[1, 1, 1, 1]]]  # its own, up to each query
    assert blocks.full_kv_num_blocks.tolist() == [[[0, 0, 0, 0]]]
    alone = group_documents(torch.zeros_like(documents), documents.device).blocks
    assert alone.full_kv_num_blocks.tolist() == [[[0, 1, 2, 3]]]


def test_the_gradient_of_chosen_scores_is_that_of_gather():
    scores = torch.randn(5, 8, requires_grad=True)
    indices, dy = torch.stack([torch.randperm(8)[:3] for _ in range(5)]), torch.randn(5, 3)
    values = ScoresAt.apply(scores, indices)
    assert torch.equal(values, scores.gather(1, indices))
    (found,) = torch.autograd.grad(values, scores, dy)
    assert torch.equal(found, torch.zeros(5, 8).scatter(1, indices, dy))


def test_meta_tensors_take_a_gpu_s_path_only_where_that_is_asked():
    meta = torch.empty(0, device="meta")
    with meta_as_gpu(True):
        with meta_as_gpu(False):
            assert not on_gpu(meta)
        assert on_gpu(meta) and not on_gpu(torch.empty(0))
    assert not on_gpu(meta)


def test_install_keeps_names_values_and_what_is_trained():
    config, (model, _) = two_models("deepseek_v2")
    model.model.layers[1].mlp.experts[3].requires_grad_(False)
    before = {n: (p.detach().clone(), p.requires_grad) for n, p in model.named_parameters()}
    logits = model(torch.arange(30)[None])
    fast.install(model)
    after = {n: (p, p.requires_grad) for n, p in model.named_parameters()}
    assert list(after) == list(before)
    for name, (value, trained) in before.items():
        assert torch.equal(after[name][0], value) and after[name][1] == trained, name
    experts = model.model.layers[1].mlp.experts
    shared = experts.gate_up.untyped_storage().data_ptr()
    assert experts[5].up_proj.weight.untyped_storage().data_ptr() == shared
    torch.testing.assert_close(model(torch.arange(30)[None]), logits, rtol=1e-4, atol=1e-4)


def test_checkpointed_runs_each_block_again_in_backward():
    config, (model, _) = two_models("deepseek_v2")
    model.requires_grad_(True)
    calls = []

    def run_block(block, *args):
        calls.append(block)
        return Block.__call__(block, *args)

    tokens = torch.arange(20)[None]
    gradients = []
    for run in (run_block, checkpointed(run_block)):
        calls.clear()
        losses, _ = plain.token_losses(model, tokens, tokens, run_block=run)
        assert len(calls) == 3
        losses.sum().backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters()})
        model.zero_grad()
    assert len(calls) == 6
    assert all(torch.equal(gradients[0][name], g) for name, g in gradients[1].items())


# ------------------------------------------------------------------------------------------
# Experts side by side


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
        assert set(moe.experts.expert_at[: len(experts)]) == set(experts)
        for name, p in model.named_parameters():
            assert p is before[name][0] and torch.equal(p, before[name][1])
        assert torch.allclose(model(tokens), logits, atol=1e-6)
    moved = [n for n, p in model.named_parameters() if p.data_ptr() != before[n][2]]
    assert moved and all(".layers.1.mlp.experts." in name for name in moved)


def test_experts_stay_views_of_their_stack_when_the_model_moves():
    config, (model,) = small_moe(["grouped"])
    mark_trainable(model, {"experts": {"1": [2]}})
    experts = model.to(torch.bfloat16).model.layers[1].mlp.experts
    assert experts.gate_up.dtype == torch.bfloat16
    assert experts[2].up_proj.weight.requires_grad
    assert not experts[3].up_proj.weight.requires_grad
    with torch.no_grad():
        experts[2].up_proj.weight.fill_(7.0)
        experts[2].down_proj.weight.fill_(8.0)
    I, place = config.moe_intermediate_size, experts.place_of[2]
    assert place == 0  # the trained one stands first
    assert (experts.gate_up[place, I:] == 7).all() and (experts.gate_up[place, :I] != 7).any()
    assert (experts.down[place] == 8).all()


# ------------------------------------------------------------------------------------------
# Few tokens


def random_moe(directory, family: str = "deepseek_v2") -> MoE:
    save_with_transformers(directory, seed=3, family=family)
    model = load_model(directory, dtype=torch.float32)
    return next(block.mlp for block in model.model.layers if isinstance(block.mlp, MoE))


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
@pytest.mark.parametrize("rows", [1, 3, 40])
@torch.no_grad()
def test_the_paths_of_few_tokens_equal_the_loop(family, rows, tmp_path):
    """As they are and as torch.compile reads them, in which the gate chooses otherwise, too; with
    experts that moved in their stacks."""
    moe = random_moe(tmp_path, family)
    moe.experts.put_first([5, 2])
    x = torch.randn(rows, moe.experts.down.shape[1], generator=torch.Generator().manual_seed(rows))
    weights, indices, _ = moe.gate(x)
    expected = experts_loop(moe, x, weights, indices)

    def few(x):
        weights, indices, _ = moe.gate(x)
        return experts_for_few(moe.experts, x, weights, moe.experts.place_of[indices]), indices

    for run in (few, torch.compile(few, backend="eager", dynamic=False)):
        got, chosen = run(x)
        torch.testing.assert_close(got, expected)
        assert torch.equal(chosen, indices)


def test_the_largest_as_the_compiler_reads_it():
    scores = torch.tensor([[1.0, 3.0, 2.0, 3.0, -torch.inf], [torch.nan] * 5])
    compile = torch.compile(top_experts, backend="eager", dynamic=False)
    values, compiled = compile(torch.arange(10.0).view(2, 5), scores, 3)
    assert values[0].tolist() == [1, 3, 2]
    assert compiled[0].tolist() == [1, 3, 2]  # of equals the first
    assert compiled[1].max() < 5  # an expert that is there


@torch.no_grad()
def test_an_expert_that_is_not_chosen_cannot_spoil_the_others(tmp_path):
    moe = random_moe(tmp_path)
    moe.experts.gate_up[2] = 1e30  # its activation overflows
    x = torch.ones(3, moe.experts.down.shape[1])
    indices, weights = torch.tensor([[0, 1]]).expand(3, -1), torch.full((3, 2), 0.5)
    expected = experts_loop(moe, x, weights, indices)
    torch.testing.assert_close(experts_for_few(moe.experts, x, weights, indices), expected)


# ------------------------------------------------------------------------------------------
# Without fast/


def functions_of_fast() -> list:
    """Every function and method that is defined in fast/."""
    found = []
    for info in pkgutil.iter_modules(fast.__path__, "fast."):
        module = importlib.import_module(info.name)
        for value in [*vars(fast).values(), *vars(module).values()]:
            inside = vars(value).values() if inspect.isclass(value) else [value]
            for function in inside:
                function = inspect.unwrap(getattr(function, "__func__", function))
                if inspect.isfunction(function) and function.__module__.startswith("fast"):
                    found.append(function)
    return list(dict.fromkeys(found))


def raising(*args, **options):
    raise AssertionError("fast/ was called")


def test_the_demo_by_the_loop_calls_nothing_of_fast(tmp_path, monkeypatch):
    """Its first steps, with evaluation, scores and selection; the losses are those of the fast
    path, to rounding."""

    def losses(experts: str) -> list[float]:
        arguments = command_line().parse_args(
            f"--experts {experts} --output_dir {tmp_path / experts} --steps 3 --eval_steps 3 "
            "--save_steps 3 --n_sample_tokens 4000 --batch_size 4 --device cpu "
            "--gradient_checkpointing false".split()  # auto rehearses a step of either kind
            + ["--eval_sets", f"exact:{evaluated}"]
        )
        arguments.model, arguments.data = str(ROOT / "demo/base"), str(ROOT / DATA)
        train(read_keys(TrainConfig, arguments, str(ROOT / "configs/demo.toml")))
        lines = (tmp_path / experts / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["loss"] for line in lines]

    evaluated = tmp_path / "few.jsonl"
    rows = (ROOT / "demo/data/general_test.jsonl").read_text().splitlines(keepends=True)
    evaluated.write_text("".join(rows[:4]))
    expected = losses("grouped")
    functions = functions_of_fast()
    assert len(functions) > 40
    for function in functions:  # whoever imported one has it with this code
        if not function.__code__.co_freevars:
            monkeypatch.setattr(function, "__code__", raising.__code__)
            monkeypatch.setattr(function, "__defaults__", None)
            monkeypatch.setattr(function, "__kwdefaults__", None)
    found = losses("loop")
    with pytest.raises(AssertionError, match="fast/ was called"):
        losses("auto")
    assert found == pytest.approx(expected, rel=1e-5)
    assert (tmp_path / "loop/results.json").exists()
