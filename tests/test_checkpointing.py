"""gradient_checkpointing "auto": the fewest layers that fit, the same when a run goes on and on all
ranks. No bit depends on them."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from test_train import metrics, parse_config, settings

import train as trainer
from adapter import mark_trainable, trained_parameters
from checkpoint import load_model
from config import read_keys
from data import Rows
from fast.packed import memory
from model import Block, token_losses
from processes import SingleProcess
from train import command_line, compute_gradients, train
from training import checkpointing
from training.cards import OVERHEAD, fewest_layers
from training.checkpointing import first_checkpointed, layers_needed, memory_of_process
from training.config import TrainConfig
from training.host_optimizer import make_optimizer
from training.optimizer import mark_trained
from training.rehearsal import Allocations
from training.stopping import ending

PLENTY = 2**50
EVERYWHERE = {
    "experts": {"1": [0, 3], "2": [5]},
    "shared_experts": True,
    "non_expert_modules": True,
}


@pytest.mark.parametrize("experts", ["grouped", "loop"])
@pytest.mark.parametrize("quantize", ["", "fp8", "nf4"])
def test_no_bit_of_a_gradient_depends_on_the_number_of_layers(checkpoint, experts, quantize):
    model = load_model(checkpoint, experts=experts, quantize=quantize)
    tokens = torch.randint(0, 258, (2, 48), generator=torch.Generator().manual_seed(0))
    for cfg in (EVERYWHERE, {"experts": {"2": [1, 6]}}):
        mark_trainable(model, cfg)
        found, calls = [], []

        def run_block(block, *args):
            calls.append(block)
            return Block.__call__(block, *args)

        for count in range(4):
            calls.clear()
            run = first_checkpointed(run_block, model, count)
            losses, balance = token_losses(model, tokens, tokens, balance=True, run_block=run)
            assert calls == [*model.model.layers]
            (losses.mean() + 0.1 * balance.sum()).backward()
            if cfg is EVERYWHERE:  # the first ones, the last of them first
                assert calls[3:] == [*model.model.layers[:count]][::-1]
            gradients = trained_parameters(model, cfg).items()
            found.append({name: p.grad.clone() for name, p in gradients})
            model.zero_grad()
        assert all(torch.equal(found[0][n], g) for each in found for n, g in each.items())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gradient_accumulation_steps": 4},
        {"experts": "loop"},
        {"optimizer_device": "cpu"},
        {"dtype": "float32"},
    ],
)
def test_the_fewest_layers_that_a_real_step_needs(checkpoint, monkeypatch, changes):
    """Between the peaks of real steps with n - 1 and with n layers, n is found."""
    sizes = dict(seq_length=256, batch_size=4, gradient_accumulation_steps=2, learning_rate=1e-5)
    config = TrainConfig(**{**sizes, "device": "cpu", "dtype": "bfloat16", **changes})
    config.aux_loss_alpha = 0.0
    dtype, place = getattr(torch, config.dtype), config.optimizer_device
    tokens = torch.randint(0, 258, (4, 256), generator=torch.Generator().manual_seed(0))
    rows = Rows(tokens, tokens, torch.zeros_like(tokens))
    peaks = []
    for count in range(4):
        model = load_model(checkpoint, dtype=dtype, experts=config.experts)
        trained = mark_trained(config, model, EVERYWHERE)
        optimizer = make_optimizer(trained, config)
        known = [*memory(model), *optimizer.masters.values(), *rows]
        known += optimizer.sums if place else []
        own = replace(config, gradient_checkpointing=count)
        with Allocations(known) as allocations:
            compute_gradients(own, model, rows, 0.0, optimizer, SingleProcess())
        numbers = sum(p.numel() for p in trained.values())
        # Masters and moments beside the weights; on a CPU also where they are the host's.
        beside = (8 if config.dtype == "float32" else 12) * numbers
        if place:
            beside = checkpointing.host_bytes(trained, SingleProcess())
        peaks.append(beside + allocations.peak)
    inputs = SimpleNamespace(base_config=model.config)
    for count in range(1, 4):
        between = (peaks[count - 1] + peaks[count]) / 2
        monkeypatch.setattr(checkpointing, "available_bytes", lambda: between)
        given = config, inputs, EVERYWHERE, SingleProcess(), compute_gradients
        layers, why = layers_needed(*given)
        assert layers == count, (peaks, between)
        assert why.startswith("a step needs ") and "this machine has" in why
    monkeypatch.setattr(checkpointing, "available_bytes", lambda: PLENTY)
    assert layers_needed(*given)[0] == 0
    monkeypatch.setattr(checkpointing, "available_bytes", lambda: peaks[3] * 0.5)
    layers, why = layers_needed(*given)
    assert layers == 3 and why.startswith("even so, a step needs ") and "--plan" in why


@pytest.mark.parametrize("count", [1, 2, 27, 61])
def test_few_rehearsals_find_the_fewest_layers(count):
    peaks = [max(100 - layers, 40) for layers in range(count + 1)]
    for room in (*peaks, 101, 39):
        asked = []
        found = fewest_layers(lambda n: asked.append(n) or peaks[n], count, room)
        fitting = [n for n in range(count + 1) if peaks[n] <= room]
        assert found == (fitting or [count])[0]
        assert len(asked) <= 7 and (room < 100 or asked == [0])


def test_a_run_goes_on_with_the_number_that_it_began_with(
    checkpoint, chat_file, tmp_path, monkeypatch, capsys
):
    counts = []

    def note(run_block, model, count):
        counts.append(count)
        return first_checkpointed(run_block, model, count)

    def die(config, record):
        if record["step"] == 3:
            raise KeyboardInterrupt

    def start(**changes):
        capsys.readouterr()
        train(settings(checkpoint, chat_file, tmp_path / "run", **changes))

    train(settings(checkpoint, chat_file, tmp_path / "plain"))
    path = tmp_path / "run/checkpointed_layers.json"
    auto = {"gradient_checkpointing": "auto"}
    monkeypatch.setattr(checkpointing, "memory_of_process", lambda *_: 0)
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "print_step", die)
        with pytest.raises(KeyboardInterrupt):
            start(**auto)
    said = capsys.readouterr().out
    assert "\n3 of 3 layers run again in backward: even so, a step needs " in said
    assert path.read_text().strip() == "3"
    # The machine has more memory now.
    monkeypatch.setattr(checkpointing, "memory_of_process", lambda *_: PLENTY)
    monkeypatch.setattr(trainer, "first_checkpointed", note)
    start(**auto)
    assert counts and set(counts) == {3} and path.read_text().strip() == "3"
    assert metrics(tmp_path / "run") == metrics(tmp_path / "plain")
    names = ["adapter/adapter.safetensors", "checkpoints/step-000006/optimizer.safetensors"]
    for name in names:
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    # Anew, and where somebody edited the file, the number is settled again, and 0 is not spoken of.
    counts.clear()
    start(**auto, overwrite=True)
    assert set(counts) == {0} and path.read_text().strip() == "0"
    assert "layers:" not in capsys.readouterr().out
    for edited in ("4", "-1", "true", '"auto"', "[1]"):
        path.write_text(edited)
        (tmp_path / "run/results.json").unlink()
        start(**auto)
        assert path.read_text().strip() == "0"


@pytest.mark.parametrize("older", [True, False])
def test_a_run_with_true_or_false_goes_on_as_before_and_with_another_choice(
    checkpoint, chat_file, tmp_path, monkeypatch, older
):
    """Versions without "auto" wrote true or false into train_config.json, as a default, too."""

    def die(config, record):
        if record["step"] == 3:
            raise KeyboardInterrupt

    train(settings(checkpoint, chat_file, tmp_path / "whole"))
    for choice in (older, "auto", not older):
        config = settings(checkpoint, chat_file, tmp_path / str(choice))
        config.gradient_checkpointing = older
        with monkeypatch.context() as patch:
            patch.setattr(trainer, "print_step", die)
            with pytest.raises(KeyboardInterrupt):
                train(config)
        saved = json.loads((tmp_path / str(choice) / "train_config.json").read_text())
        assert saved["gradient_checkpointing"] is older
        assert not (tmp_path / str(choice) / "checkpointed_layers.json").exists()
        config.gradient_checkpointing = choice
        train(config)
        assert metrics(tmp_path / str(choice)) == metrics(tmp_path / "whole")
        with pytest.raises(ValueError, match=r"another config: learning_rate \(0.01, now 0.02\); "):
            train(replace(config, learning_rate=0.02))


class TwoRanks(SingleProcess):
    """This rank and one that needs `theirs`."""

    def __init__(self, theirs: int):
        self.theirs = theirs

    def from_all(self, value) -> list:
        return [value, (self.theirs, "the other") if isinstance(value, tuple) else value]


@pytest.mark.parametrize("mine, theirs", [(0, 2), (3, 1), (0, 0)])
def test_the_largest_number_of_a_rank_counts(
    checkpoint, chat_file, tmp_path, monkeypatch, capsys, mine, theirs
):
    memory = 0 if mine else PLENTY
    monkeypatch.setattr(checkpointing, "memory_of_process", lambda *_: memory)
    config = settings(checkpoint, chat_file, tmp_path / "run", steps=1, dtype="bfloat16")
    config.gradient_checkpointing = "auto"
    train(config, TwoRanks(theirs))
    largest = max(mine, theirs)
    assert json.loads((tmp_path / "run/checkpointed_layers.json").read_text()) == largest
    said = capsys.readouterr().out
    assert ("the other" in said) == (theirs > mine)
    assert (f"{largest} of 3 layers run again in backward: " in said) == bool(largest)


def test_memory_is_what_is_free_and_what_the_process_holds(checkpoint, monkeypatch):
    free, reserved, total, fraction = 50 * 2**30, 20 * 2**30, 80 * 2**30, 1.0
    for name, function in {
        "mem_get_info": lambda index: (free, total),
        "memory_reserved": lambda index: reserved,
        "get_per_process_memory_fraction": lambda index: fraction,
    }.items():
        monkeypatch.setattr(torch.cuda, name, function)
    assert memory_of_process("cuda", None) == memory_of_process("cuda:1", None) == 70 * 2**30
    fraction = 0.5
    assert memory_of_process("cuda", None) == 40 * 2**30
    model = load_model(checkpoint)
    monkeypatch.setattr(checkpointing, "available_bytes", lambda: 2**30)
    weights = 2 * sum(p.numel() for p in model.parameters())
    assert memory_of_process("cpu", model) == 2**30 + weights
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")  # all ranks of a host share it
    assert memory_of_process("cpu", model) == 2**28 + weights


def test_a_gpu_keeps_a_reserve(checkpoint, monkeypatch):
    base = load_model(checkpoint).config
    sizes = dict(seq_length=64, batch_size=4, gradient_accumulation_steps=2, learning_rate=1e-5)
    config = TrainConfig(**sizes, device="cuda", dtype="bfloat16")
    given = config, SimpleNamespace(base_config=base), EVERYWHERE, SingleProcess()
    for memory, where in ((OVERHEAD - 1, "this GPU has 0.0 MiB for it, and --plan"), (OVERHEAD + PLENTY, "")):
        monkeypatch.setattr(checkpointing, "memory_of_process", lambda *_: memory)
        layers, why = layers_needed(*given, compute_gradients)
        assert layers == (3 if where else 0) and where in why


def test_out_of_memory_names_the_keys_that_help(checkpoint, chat_file, tmp_path, monkeypatch):
    def run_out(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    for changes, said in (
        (
            {"gradient_checkpointing": "auto"},
            "with --gradient_checkpointing true (if fewer layers run again) or --optimizer_device "
            "cpu or more --gradient_accumulation_steps (in another output_dir) or --quantize "
            "(likewise)",
        ),
        (
            {"gradient_checkpointing": True, "method": "lora"},
            "with --optimizer_device cpu or more --gradient_accumulation_steps (in another "
            "output_dir)",
        ),
        (
            {"gradient_checkpointing": True, "method": "full", "gradient_accumulation_steps": 4}
            | {"optimizer_device": "cpu"},
            "with a shorter --seq_length",
        ),
    ):
        config = settings(checkpoint, chat_file, tmp_path / str(len(said)), steps=1, **changes)
        with monkeypatch.context() as patch:
            patch.setattr(trainer, "compute_gradients", run_out)
            patch.setattr(checkpointing, "layers_needed", lambda *_: (0, ""))
            with pytest.raises(torch.OutOfMemoryError) as error:
                train(config)
        message, status = ending(error.value)
        assert status == 1 and message.startswith("error: CUDA out of memory. Tried to")
        assert message.endswith(f"\n--plan shows what the run needs; a step needs less {said}")
        train(replace(config, gradient_checkpointing=True))


def test_the_key_is_true_false_or_auto(tmp_path):
    needed = ["--model", "m", "--data", "d", "--output_dir", "o"]

    def read(*flags, line=""):
        (tmp_path / "c.toml").write_text(line)
        arguments = command_line().parse_args([*needed, *flags])
        return read_keys(TrainConfig, arguments, str(tmp_path / "c.toml")).gradient_checkpointing

    assert parse_config(needed).gradient_checkpointing == "auto"
    for words, value in ((["auto"], "auto"), (["true"], True), (["false"], False), ([], True)):
        found = read("--gradient_checkpointing", *words)
        assert found == value and type(found) is type(value)
    for line, value in (('"auto"', "auto"), ("true", True), ("false", False)):
        found = read(line=f"gradient_checkpointing = {line}")
        assert found == value and type(found) is type(value)
    must = "must be true, false or auto"
    for word in ("sometimes", "1", "True", ""):
        with pytest.raises(ValueError, match=f"^gradient_checkpointing is '{word}'; {must}$"):
            read("--gradient_checkpointing", word)
    for line, shown in (('"sometimes"', "'sometimes'"), ("3", "3"), ('"true"', "'true'")):
        with pytest.raises(ValueError, match=f"c.toml: gradient_checkpointing is {shown}; {must}$"):
            read(line=f"gradient_checkpointing = {line}")
    text = command_line().format_help()
    assert "--gradient_checkpointing [true|false|auto]" in text and "(default: auto)" in text
