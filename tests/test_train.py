"""What is trained and what is not, the optimizer by hand, continuing, and configs that must be
refused."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, load_with_adapter
from safetensors.torch import load_file

import train as trainer
from adapter import load_adapter
from chat import load_tokenizer
from checkpoint import load_model
from config import read_keys
from data import encode_file, pack, sample_tokens
from families import read_config
from fast import token_losses
from merge import merge
from select_experts import collect_scores, scoring_batches
from train import command_line, train
from training.config import TrainConfig
from training.inputs import prepare_rows
from training.optimizer import MasterAdamW, learning_rate_at


def parse_config(argv: list[str]) -> TrainConfig:
    """The config of a command line of train.py."""
    arguments = command_line().parse_args(argv)
    return read_keys(TrainConfig, arguments, arguments.config)


def settings(checkpoint, chat_file, output, **changes) -> TrainConfig:
    config = TrainConfig(
        model=str(checkpoint),
        data=str(chat_file),
        output_dir=str(output),
        seq_length=64,
        batch_size=4,
        gradient_accumulation_steps=2,
        steps=6,
        learning_rate=1e-2,
        eval_steps=2,
        save_steps=2,
        validation_fraction=0.1,
        dtype="float32",
        device="cpu",
        gradient_checkpointing=False,
        aux_loss_alpha=0.1,
    )
    for name, value in changes.items():
        setattr(config, name, value)
    config.check()
    return config


TIMINGS = ("tokens_per_second", "memory_gib", "seconds_left")


def metrics(output) -> list[dict]:
    """metrics.jsonl without the timings."""
    rows = [json.loads(line) for line in (Path(output) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in TIMINGS} for row in rows]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dtype": "bfloat16"},
        {"experts": "loop"},
        {"gradient_checkpointing": True},
        {"shared_experts": True},
        {"score": "gate"},
        {"selection": "random"},
        {"selection": "lowest"},
        {"non_expert_modules": True},
        {"document_mask": True},
        {"method": "full"},
    ],
)
def test_only_the_selection_changes_and_the_adapter_holds_exactly_it(
    checkpoint, chat_file, tmp_path, changes
):
    config = settings(checkpoint, chat_file, tmp_path / "run", **changes)
    results = train(config)
    cfg = json.loads((tmp_path / "run/expert_cfg.json").read_text())
    base = load_model(checkpoint, dtype=getattr(torch, config.dtype))
    trained = load_with_adapter(
        checkpoint, tmp_path / "run/adapter", dtype=getattr(torch, config.dtype)
    )
    selected = {
        f"model.layers.{layer}.mlp.experts.{e}.{p}_proj.weight"
        for layer, experts in cfg["experts"].items()
        for e in experts
        for p in ("gate", "up", "down")
    }
    if cfg["shared_experts"]:
        selected |= {n for n, _ in base.named_parameters() if ".shared_experts." in n}
    if cfg["non_expert_modules"]:
        selected |= {n for n, _ in base.named_parameters() if "experts." not in n}
    assert load_file(tmp_path / "run/adapter/adapter.safetensors").keys() == selected
    changed = set()
    for (name, before), (_, after) in zip(base.named_parameters(), trained.named_parameters()):
        if torch.equal(before, after):
            continue
        changed.add(name)
    assert changed == selected
    total = sum(p.numel() for p in base.parameters())
    assert (results["trained_parameters"] == total) == (config.method == "full")
    assert metrics(tmp_path / "run")[-1]["loss"] < metrics(tmp_path / "run")[0]["loss"]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"experts": "loop"},
        {"shared_experts": True},
        {"non_expert_modules": True},
        {"method": "lora"},
        {"method": "lora", "experts": "loop", "dtype": "bfloat16"},
    ],
)
def test_the_model_in_memory_is_the_base_outside_what_is_trained(
    checkpoint, chat_file, tmp_path, monkeypatch, changes
):
    """The adapter could hide a frozen tensor that moved: look at the trained model itself."""
    seen = []
    monkeypatch.setattr(
        trainer, "load_model", lambda *a, **k: seen.append(load_model(*a, **k)) or seen[0]
    )
    config = settings(checkpoint, chat_file, tmp_path / "run", eval_steps=100, **changes)
    train(config)
    selected = set()
    for path in (tmp_path / "run/adapter").glob("*.safetensors"):
        selected |= {name for name in load_file(path) if ".lora_" not in name}
    assert bool(selected) == (config.method == "esft")
    trained = dict(seen[0].named_parameters())
    base = load_model(checkpoint, dtype=getattr(torch, config.dtype))
    for name, before in base.named_parameters():
        assert torch.equal(trained[name], before) == (name not in selected), name


@pytest.mark.parametrize("changes", [{}, {"experts": "loop"}, {"gradient_checkpointing": True}])
def test_lora_trains_what_peft_would_and_continues(checkpoint, chat_file, tmp_path, changes):
    """The run's adapter is PEFT's format, over every linear layer; its loss falls; the merged
    checkpoint is the trained model; and continued, or begun anew, the run ends the same."""
    from peft import PeftConfig

    config = settings(checkpoint, chat_file, tmp_path / "run", method="lora", **changes)
    results = train(config)
    assert metrics(tmp_path / "run")[-1]["loss"] < metrics(tmp_path / "run")[0]["loss"] - 0.1
    peft = PeftConfig.from_pretrained(tmp_path / "run/adapter")
    assert (peft.peft_type, peft.r, peft.lora_alpha) == ("LORA", 8, 16)
    assert not (tmp_path / "run/expert_cfg.json").exists()
    merge(checkpoint, tmp_path / "run/adapter", tmp_path / "merged")
    tokens = torch.arange(60)[None]
    logits = [
        load_with_adapter(checkpoint, tmp_path / "run/adapter", dtype=torch.float32)(tokens),
        load_model(tmp_path / "merged", dtype=torch.float32)(tokens),
    ]
    base = load_model(checkpoint, dtype=torch.float32)(tokens)
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-4)
    assert (logits[0] - base).abs().max() > 0.1
    linears = sum(m.in_features + m.out_features for m in linear_layers(checkpoint))
    assert results["trained_parameters"] == 8 * linears
    names = ["adapter/adapter_model.safetensors", "checkpoints/step-000006/optimizer.safetensors"]
    before = [(tmp_path / "run" / name).read_bytes() for name in names]
    expected = metrics(tmp_path / "run")
    for kept in ("step-000004", None):  # continued, and begun anew
        for path in (tmp_path / "run/checkpoints").iterdir():
            if path.name != kept:
                shutil.rmtree(path)
        if kept is None:  # what was best before the checkpoint belongs to it
            shutil.rmtree(tmp_path / "run/adapter")
        (tmp_path / "run/results.json").unlink()
        train(config)
        assert [(tmp_path / "run" / name).read_bytes() for name in names] == before
        assert metrics(tmp_path / "run") == expected


def linear_layers(checkpoint):
    modules = load_model(checkpoint).model.modules()
    return [module for module in modules if isinstance(module, torch.nn.Linear)]


def test_files_of_results_that_somebody_edited(checkpoint, chat_file, tmp_path):
    config = settings(checkpoint, chat_file, tmp_path / "run", eval_sets=[f"loss:{chat_file}"])
    expected = train(config)
    (tmp_path / "run/results.json").write_text("[]")
    with pytest.raises(ValueError, match="run/results.json: is no run's"):
        train(config)
    (tmp_path / "run/results.json").unlink()
    for when in ("before", "after"):  # evaluated again
        (tmp_path / f"run/eval/{when}.json").write_text("[]")
    results = train(config)
    assert (results["before"], results["after"]) == (expected["before"], expected["after"])


def test_paths_and_checkpointing_give_the_same_run(checkpoint, chat_file, tmp_path):
    runs = []
    for i, changes in enumerate(
        [
            {},
            {"experts": "loop"},
            {"gradient_checkpointing": True},
            {"gradient_accumulation_steps": 1},
            {"gradient_accumulation_steps": 4},
        ]
    ):
        train(settings(checkpoint, chat_file, tmp_path / str(i), **changes))
        runs.append([row["loss"] for row in metrics(tmp_path / str(i))])
    for run in runs[1:]:
        assert run == pytest.approx(runs[0], rel=1e-4)


@pytest.mark.parametrize("stop_at", [1, 3, 4])
def test_a_run_that_is_stopped_and_started_again_ends_the_same(
    checkpoint, chat_file, tmp_path, monkeypatch, stop_at
):
    train(settings(checkpoint, chat_file, tmp_path / "whole", dtype="bfloat16"))

    class Stopped(Exception):
        pass

    def stop(config, record):
        if record["step"] == stop_at:
            raise Stopped

    config = settings(checkpoint, chat_file, tmp_path / "parts", dtype="bfloat16")
    monkeypatch.setattr(trainer, "print_step", stop)
    with pytest.raises(Stopped):
        train(config)
    monkeypatch.undo()
    train(config)
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "parts")
    for name in (
        "adapter/adapter.safetensors",
        "checkpoints/step-000006/optimizer.safetensors",
        "expert_cfg.json",
    ):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()
    kept = sorted(path.name for path in (tmp_path / "parts/checkpoints").iterdir())
    assert kept == ["step-000004", "step-000006"]


def test_a_finished_run_is_not_trained_again_and_another_config_is_refused(
    checkpoint, chat_file, tmp_path, monkeypatch
):
    config = settings(checkpoint, chat_file, tmp_path / "run")
    results = train(config)
    monkeypatch.setattr(trainer, "load_model", None)  # must not be called
    assert train(config) == results
    with pytest.raises(
        ValueError,
        match=r"another config: learning_rate \(0.01, now 0.02\), steps \(6, now 7\); choose",
    ):
        train(settings(checkpoint, chat_file, tmp_path / "run", learning_rate=0.02, steps=7))
    monkeypatch.undo()
    train(settings(checkpoint, chat_file, tmp_path / "run", steps=7, overwrite=True))
    assert len(metrics(tmp_path / "run")) == 7
    (tmp_path / "other").mkdir()
    (tmp_path / "other/thesis.txt").write_text("mine")
    for overwrite in (False, True):  # what train.py did not write it does not delete
        with pytest.raises(ValueError, match="holds files that no run of train.py wrote"):
            train(settings(checkpoint, chat_file, tmp_path / "other", overwrite=overwrite))
    assert (tmp_path / "other/thesis.txt").exists()


def test_the_adapter_is_the_best_validated_state(checkpoint, chat_file, tmp_path, monkeypatch):
    other = (
        tmp_path / "other.jsonl"
    )  # what is learned on one file does harm on this one, sooner or later
    other.write_text(
        "\n".join(json.dumps({"prompt": "", "completion": f"{i} {i}"}) for i in range(40))
    )
    config = settings(
        checkpoint,
        chat_file,
        tmp_path / "run",
        steps=40,
        learning_rate=3e-2,
        method="full",
        validation_data=str(other),
    )
    results = train(config)
    losses = [
        row["validation_loss"] for row in metrics(tmp_path / "run") if "validation_loss" in row
    ]
    assert results["best_validation_loss"] == min(losses) != losses[-1]  # it did get worse again
    model = load_model(checkpoint, dtype=torch.float32)
    load_adapter(model, tmp_path / "run/adapter")
    tokenizer = load_tokenizer(checkpoint)
    rows = pack(encode_file(other, tokenizer), 64, 0.0, tokenizer.pad_id, 0)[:2]
    assert token_losses(model, *rows)[0].mean().item() == pytest.approx(min(losses), rel=1e-5)
    # What is reported of the trained model is of that state, too.
    sizes = config.n_sample_tokens, config.seq_length, config.seed
    sequences = sample_tokens(encode_file(chat_file, tokenizer), *sizes)
    after = collect_scores(model, scoring_batches(sequences, tokenizer.pad_id))
    assert json.loads((tmp_path / "run/scores_after.json").read_text()) == after

    # A run that continues after its best state does not take a worse one for better.
    class Stopped(Exception):
        pass

    def stop(config, record):
        if record["step"] == 38:
            raise Stopped

    monkeypatch.setattr(trainer, "print_step", stop)
    config.output_dir = str(tmp_path / "parts")
    with pytest.raises(Stopped):
        train(config)
    monkeypatch.undo()
    train(config)
    adapters = [tmp_path / name / "adapter/adapter.safetensors" for name in ("run", "parts")]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()


def test_with_a_document_mask_a_step_learns_each_sample_alone(checkpoint, chat_file, tmp_path):
    config = settings(checkpoint, chat_file, tmp_path / "run", steps=1, document_mask=True)
    inputs = trainer.read_inputs(config)
    train(config)
    model = load_model(checkpoint, dtype=torch.float32)
    losses = []
    for row in trainer.rows_of_step(len(inputs.rows.tokens), 4, config.seed, 0):
        documents = inputs.rows.documents[row]
        assert len(documents.unique()) > 1
        for document in documents.unique():
            alone = documents == document
            labels = inputs.rows.labels[row][alone][None]
            losses.append(token_losses(model, inputs.rows.tokens[row][alone][None], labels)[0])
    record = metrics(tmp_path / "run")[0]
    assert record["loss"] == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)
    load_adapter(model, tmp_path / "run/adapter")
    held_out = [
        token_losses(model, *(x[None] for x in (tokens, labels, documents)))[0]
        for tokens, labels, documents in zip(
            inputs.held_out.tokens, inputs.held_out.labels, inputs.held_out.documents
        )
    ]
    expected = torch.cat(held_out).mean().item()
    assert record["validation_loss"] == pytest.approx(expected, rel=1e-5)


def test_loss_equals_transformers(tmp_path):
    from conftest import save_with_transformers

    oracle = save_with_transformers(tmp_path, seed=2)
    tokens = torch.randint(0, 90, (3, 20), generator=torch.Generator().manual_seed(0))
    labels = tokens.masked_fill(
        torch.rand(3, 20, generator=torch.Generator().manual_seed(1)) < 0.5, -100
    )
    expected = oracle(tokens, labels=labels).loss
    model = load_model(tmp_path, dtype=torch.float32)
    for chunk in (2048, 7):
        losses, _ = token_losses(model, tokens, labels, chunk=chunk)
        assert len(losses) == (labels[:, 1:] >= 0).sum()
        torch.testing.assert_close(losses.mean(), expected)


def test_gradients_under_a_frozen_head_are_those_under_a_trained_one(checkpoint):
    """Where the head is frozen, they are formed in forward, chunk by chunk."""
    model = load_model(checkpoint, dtype=torch.float32)
    tokens = torch.randint(0, model.config.vocab_size, (2, 15))
    weights = torch.rand(28)  # of each token's loss: gradients are linear in them
    gradients = []
    for head in (False, True):
        model.requires_grad_(False)
        model.model.norm.weight.requires_grad_(True)
        model.lm_head.weight.requires_grad_(head)
        losses, _ = token_losses(model, tokens, tokens, chunk=11)
        (losses * weights).sum().backward()
        gradients.append(model.model.norm.weight.grad)
        model.zero_grad()
    torch.testing.assert_close(*gradients)


def test_thirty_steps_of_the_demo_have_the_same_losses_on_both_paths(tmp_path):
    """Smaller steps than the demo's. To rounding, which thirty steps magnify and which sends a token
    near a tie to another expert."""
    losses = []
    for experts in ("loop", "grouped"):
        config = replace(
            parse_config(["--config", str(ROOT / "configs/demo.toml")]),
            output_dir=str(tmp_path / experts),
            experts=experts,
            steps=30,
            seq_length=128,
            gradient_checkpointing=False,
            batch_size=2,
            eval_sets=[],
            eval_steps=30,
            save_steps=30,
            n_sample_tokens=2000,
        )
        train(config)
        losses.append([record["loss"] for record in metrics(tmp_path / experts)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert sum(losses[0][-5:]) < 0.7 * sum(losses[0][:5])  # it learns


def test_one_step_of_adamw_by_hand():
    p = torch.nn.Parameter(torch.tensor([[0.5, -0.25]], dtype=torch.bfloat16))
    config = TrainConfig(learning_rate=0.1, weight_decay=0.1)
    optimizer = MasterAdamW({"w": p}, config)
    for gradient in ([[0.5, 1.0]], [[0.5, 1.0]]):  # two micro-batches
        p.grad = torch.tensor(gradient, dtype=torch.bfloat16)
        optimizer.accumulate()
    assert p.grad is None and optimizer.gradients["w"].tolist() == [[1.0, 2.0]]
    optimizer.step(0.1)
    # The first step's moments are g and g^2 after bias correction: w (1 - lr decay) - lr g / |g|.
    expected = torch.tensor([[0.5 * 0.99 - 0.1, -0.25 * 0.99 - 0.1]])
    torch.testing.assert_close(optimizer.masters["w"], expected)
    assert torch.equal(p, expected.to(torch.bfloat16))


def test_masters_move_where_bfloat16_would_not():
    p = torch.nn.Parameter(torch.full((1, 1), 0.02, dtype=torch.bfloat16))
    start = p.item()
    optimizer = MasterAdamW({"w": p}, TrainConfig(learning_rate=1e-5, weight_decay=0.0))
    values = []
    for _ in range(20):
        p.grad = torch.ones_like(p)
        optimizer.accumulate()
        optimizer.step(1e-5)
        values.append(p.item())
    assert values[0] == start and values[-1] < start - 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_gradient_of_many_reaches_its_master(dtype):
    parameters = {str(i): torch.nn.Parameter(torch.zeros(2, dtype=dtype)) for i in range(70)}
    optimizer = MasterAdamW(parameters, TrainConfig(learning_rate=1.0))
    for factor in (1.0, 2.0):  # two micro-batches
        for i, p in enumerate(parameters.values()):
            p.grad = torch.full_like(p, factor * i)
        optimizer.accumulate()
        assert all(p.grad is None for p in parameters.values())
    assert [g.tolist() for g in optimizer.gradients.values()] == [[3.0 * i] * 2 for i in range(70)]


def test_norms_and_biases_do_not_decay():
    parameters = {
        "w": torch.nn.Parameter(torch.ones(1, 1)),
        "norm": torch.nn.Parameter(torch.ones(1)),
    }
    optimizer = MasterAdamW(parameters, TrainConfig(learning_rate=0.5, weight_decay=0.1))
    assert all(gradient.item() == 0 for gradient in optimizer.gradients.values())
    optimizer.step(0.5)
    assert parameters["w"].item() == pytest.approx(0.95) and parameters["norm"].item() == 1


def test_gradients_are_clipped_to_the_norm_of_the_whole_step(checkpoint, chat_file, tmp_path):
    train(settings(checkpoint, chat_file, tmp_path / "run", steps=1, max_grad_norm=1e-3))
    state = load_file(tmp_path / "run/checkpoints/step-000001/optimizer.safetensors")
    moments = [tensor for name, tensor in state.items() if name.startswith("exp_avg.")]
    # after one step the first moment is 1 - beta1 of the gradient
    assert torch.nn.utils.get_total_norm(moments).item() == pytest.approx(0.1 * 1e-3, rel=1e-3)
    assert metrics(tmp_path / "run")[0]["grad_norm"] > 1e-3


def test_the_balance_loss_reaches_what_is_trained(checkpoint, chat_file, tmp_path):
    for alpha in (0.0, 0.1, 10.0):
        config = settings(
            checkpoint,
            chat_file,
            tmp_path / str(alpha),
            aux_loss_alpha=alpha,
            steps=1,
            method="full",
        )
        train(config)
    norms = [metrics(tmp_path / str(alpha))[0]["grad_norm"] for alpha in (0.0, 0.1, 10.0)]
    losses = [metrics(tmp_path / str(alpha))[0]["loss"] for alpha in (0.0, 0.1, 10.0)]
    assert norms[2] > 2 * norms[0] and norms[1] != norms[0]
    assert losses[0] == losses[1] == losses[2]  # what is reported is the cross-entropy alone


def test_held_out_rows_are_not_trained_on(checkpoint, chat_file, tmp_path):
    config = settings(checkpoint, chat_file, tmp_path, validation_fraction=0.3)
    tokenizer = load_tokenizer(checkpoint)
    samples = encode_file(chat_file, tokenizer)
    rows, held_out = prepare_rows(config, samples, tokenizer)
    everything, *_ = pack(samples, 64, 0.2, tokenizer.pad_id, config.seed)
    together = torch.cat([rows.tokens, held_out.tokens]).tolist()
    assert sorted(together) == sorted(everything.tolist()) and len(held_out.tokens) == 6
    assert not any(row in rows.tokens.tolist() for row in held_out.tokens.tolist())


def test_learning_rate_by_hand():
    config = TrainConfig(learning_rate=1.0, warmup_steps=2, steps=6, schedule="linear")
    assert [learning_rate_at(config, step) for step in range(6)] == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    config.schedule = "cosine"
    assert learning_rate_at(config, 4) == pytest.approx(0.5)
    config.schedule = "constant"
    assert learning_rate_at(config, 5) == 1.0


def test_precedence_of_settings(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text(
        'model = "m"\ndata = "d"\noutput_dir = "o"\nsteps = 7\nscore = "gate"\nmethod = "full"\n'
    )
    config = parse_config(
        [
            "--config",
            str(path),
            "--steps",
            "9",
            "--overwrite",
            "true",
            "--eval_sets",
            "loss:a",
            "exact:b",
        ]
    )
    assert (config.steps, config.score, config.seq_length, config.overwrite) == (
        9,
        "gate",
        4096,
        True,
    )
    assert (config.top_p, config.learning_rate) == (0.1, 3e-5)  # follow score and method
    assert config.eval_sets == ["loss:a", "exact:b"]


def test_the_defaults_of_each_method_are_the_papers():
    def config(**keys):
        config = TrainConfig(model="m", data="d", output_dir="o", **keys)
        config.check()
        return config

    settings = config()
    assert (settings.method, settings.score, settings.top_p) == ("esft", "token", 0.2)
    assert config(score="gate").top_p == 0.1
    assert (settings.batch_size, settings.seq_length, settings.steps) == (32, 4096, 500)
    assert (settings.eval_steps, settings.n_sample_tokens) == (100, 32 * 4096)
    rates = {method: config(method=method).learning_rate for method in ("esft", "full", "lora")}
    assert rates == {"esft": 1e-5, "full": 3e-5, "lora": 1e-4}
    assert (settings.lora_rank, settings.lora_scaling) == (8, 2.0)
    assert settings.random_concat_ratio == 0.2
    assert config(document_mask=True).random_concat_ratio == 0.0


def test_sources_of_experts(checkpoint, chat_file, tmp_path):
    """Highest, lowest and random choose as many experts of each layer; a file is taken as it is."""
    chosen = {}
    for selection in ("highest", "lowest", "random"):
        run = tmp_path / selection
        train(settings(checkpoint, chat_file, run, steps=1, top_p=0.6, selection=selection))
        chosen[selection] = json.loads((run / "expert_cfg.json").read_text())["experts"]
        scores = json.loads((run / "expert_cfg.scores.json").read_text())["token_scores"]
    for layer, highest in chosen["highest"].items():
        ranked = sorted(range(8), key=lambda e: (-scores[layer][str(e)], e))
        assert highest == ranked[: len(highest)] and len(highest) > 1
        values = [scores[layer][str(e)] for e in chosen["lowest"][layer]]
        assert values == sorted(scores[layer].values())[: len(highest)]
        assert len(set(chosen["random"][layer])) == len(highest)
    given = {"experts": {"2": [6]}, "shared_experts": True, "non_expert_modules": False}
    (tmp_path / "cfg.json").write_text(json.dumps(given))
    train(
        settings(checkpoint, chat_file, tmp_path / "file", expert_config=str(tmp_path / "cfg.json"))
    )
    adapter = load_file(tmp_path / "file/adapter/adapter.safetensors")
    assert {name.split(".mlp.")[1].split("_proj")[0] for name in adapter} == {
        *(f"experts.6.{kind}" for kind in ("gate", "up", "down")),
        *(f"shared_experts.{kind}" for kind in ("gate", "up", "down")),
    }


@pytest.mark.parametrize(
    "line, message",
    [
        ("learning_rte = 1", "unknown key learning_rte; did you mean learning_rate"),
        ("top_p = 0", "top_p is 0; must be above 0 and at most 1"),
        ("top_p = 2", "top_p is 2; must be above 0"),
        ("top_p = true", "top_p is True; must be a number"),
        ('steps = "many"', "steps is 'many'; must be an integer"),
        ("eval_sets = [1]", r"eval_sets is \[1\]; must be a list of strings"),
        ("steps = 0", "steps is 0; must be at least 1"),
        ('method = "dora"', "method is 'dora'; must be one of esft, full, lora"),
        (
            "gradient_accumulation_steps = 5",
            r"gradient_accumulation_steps is 5; must divide batch_size \(32\)",
        ),
        ('eval_sets = ["intent"]', r"eval_sets is \['intent'\]; each entry must be TASK:FILE"),
        (
            "shared_experts = true\nmethod = 'full'",
            "shared_experts is True; no effect, since method is full",
        ),
        ("lora_rank = 4", "lora_rank is 4; no effect, since method is esft"),
        ("lora_rank = 0\nmethod = 'lora'", "lora_rank is 0; must be at least 1"),
        ("seed = 9223372036854775808", "seed is 9223372036854775808; must be at least 0 and below"),
        ("lora_scaling = 0\nmethod = 'lora'", "lora_scaling is 0; must be above 0"),
        (
            "selection = 'lowest'\nmethod = 'lora'",
            "selection is 'lowest'; no effect, since method is lora",
        ),
        (
            "selection = 'lowest'\nexpert_config = 'cfg.json'",
            "selection is 'lowest'; no effect, since expert_config is given",
        ),
        (
            "document_mask = true\nrandom_concat_ratio = 0.2",
            "random_concat_ratio is 0.2; must be 0 with document_mask",
        ),
        ("learning_rate = nan", "learning_rate is nan; must be above 0"),
        ("[section]", "unknown key section"),
        ("steps = ", "not valid TOML"),
    ],
)
def test_impossible_configs_are_refused_by_key(tmp_path, line, message):
    path = tmp_path / "config.toml"
    path.write_text('model = "m"\ndata = "d"\noutput_dir = "o"\n' + line + "\n")
    with pytest.raises(ValueError, match=f"config.toml: {message}"):
        parse_config(["--config", str(path)])


def test_bad_files_are_refused_before_the_model_is_loaded(
    checkpoint, chat_file, tmp_path, monkeypatch
):
    monkeypatch.setattr(trainer, "load_model", None)  # must not be called
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"messages": [{"role": "user", "content": "a"}]}')
    cfg = tmp_path / "cfg.json"
    cfg.write_text('{"experts": {"1": [64]}}')
    for changes, error, message in (
        ({"data": str(bad)}, ValueError, "bad.jsonl: line 1: .*the answer"),
        ({"validation_data": str(bad)}, ValueError, "bad.jsonl: line 1"),
        ({"eval_sets": [f"exact:{bad}"]}, ValueError, "bad.jsonl: line 1: messages end"),
        ({"data": "nowhere.jsonl"}, FileNotFoundError, "nowhere.jsonl: no such data file"),
        ({"model": "nowhere"}, FileNotFoundError, "nowhere: no such checkpoint directory"),
        (
            {"expert_config": str(cfg)},
            ValueError,
            "cfg.json: experts: layer 1 names expert 64; must be 0 to 7",
        ),
    ):
        with pytest.raises(error, match=message):
            train(settings(checkpoint, chat_file, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_deleted_before_the_new_one_can_start(checkpoint, chat_file, tmp_path):
    run = tmp_path / "run"
    train(settings(checkpoint, chat_file, run))
    files = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    broken = tmp_path / "base"
    broken.mkdir()
    for path in checkpoint.iterdir():
        (broken / path.name).write_bytes(
            path.read_bytes()[: 5000 if path.suffix != ".json" else None]
        )
    with pytest.raises(ValueError, match="model.safetensors"):
        train(settings(broken, chat_file, run, overwrite=True))
    with pytest.raises(ValueError, match="it holds .*expert_cfg.json, which this run reads"):
        cfg = str(run / "expert_cfg.json")
        train(settings(checkpoint, chat_file, run, overwrite=True, expert_config=cfg))
    with pytest.raises(ValueError, match="device is 'cude'; not available here"):
        train(settings(checkpoint, chat_file, run, overwrite=True, device="cude"))
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == files
    chat_file.write_text('{"prompt": "a", "completion": "another file"}\n' * 40)
    with pytest.raises(ValueError, match=r"holds a run of another config: sha256 of .*train.jsonl"):
        train(settings(checkpoint, chat_file, run))


def test_command_line_reports_errors_without_a_traceback(tmp_path):
    def call(*arguments):
        return subprocess.run(
            [sys.executable, "train.py", *arguments], cwd=ROOT, capture_output=True, text=True
        )

    done = call("--config", str(tmp_path / "none.toml"))
    assert (
        done.returncode == 1
        and done.stderr == f"error: {tmp_path}/none.toml: no such config file\n"
    )
    done = call("--help")
    assert (
        done.returncode == 0
        and "--learning_rate" in done.stdout
        and "default: 1e-5 for esft" in done.stdout
    )


def test_every_config_of_the_repository_is_valid():
    for path in [*ROOT.glob("configs/*.toml"), ROOT / "demo/pretrain.toml"]:
        parse_config(["--config", str(path)])


def test_every_option_is_read():
    """Outside check(), which looks at options as `self.NAME`."""
    paths = [ROOT / "train.py", ROOT / "select_experts.py", *ROOT.glob("training/*.py")]
    source = "".join(path.read_text() for path in paths)
    for name in TrainConfig.__dataclass_fields__:
        assert re.search(rf"\bconfig\.{name}\b", source), name


def test_demo_base_is_a_published_format_checkpoint():
    config = read_config(ROOT / "demo/base")
    model = load_model(ROOT / "demo/base")
    assert sum(p.numel() for p in model.parameters()) == 4_337_344 and config.n_routed_experts == 64
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, prompt = load_tokenizer(ROOT / "demo/base"), "User: Copy: cup\n\nAssistant:"
    theirs = AutoTokenizer.from_pretrained(ROOT / "demo/base")(prompt).input_ids
    assert theirs == [tokenizer.bos_id, *tokenizer.encode_all([prompt])[0]]
    oracle = AutoModelForCausalLM.from_pretrained(ROOT / "demo/base", dtype=torch.float32)
    tokens = torch.arange(50)[None]
    expected = oracle(tokens).logits
    assert (
        load_model(ROOT / "demo/base", dtype=torch.float32)(tokens) - expected
    ).abs().max() < 1e-4 * expected.abs().max()
