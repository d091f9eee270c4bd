"""Numbers that are not finite end a command with one line that names their place in the model; none
is averaged, selected from, or written."""

import json
import shutil
import sys

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file

import eval as evaluation
import select_experts
import train
from checkpoint import load_model
from files import write_json, write_lines
from generate import Decoder, generate, likelihoods
from tasks import TASKS

BASE = ROOT / "demo/base"


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """demo/base with one NaN in a norm, or an infinity in the head."""

    def spoil(name: str, value: float):
        path = tmp_path_factory.mktemp("broken")
        shutil.copytree(BASE, path, dirs_exist_ok=True)
        tensors = load_file(BASE / "model.safetensors")
        tensors[name].view(-1)[3] = value
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        return path

    return spoil


PLACES = [
    ("model.layers.2.input_layernorm.weight", torch.nan, "layer 2 gives numbers"),
    ("model.layers.0.mlp.down_proj.weight", torch.inf, "layer 0 gives numbers"),
    ("model.norm.weight", torch.nan, "the last norm or head gives numbers"),
]


@pytest.mark.parametrize("name, value, message", PLACES)
def test_decoding_and_likelihoods_name_the_layer(name, value, message, broken):
    model, good = load_model(broken(name, value), dtype=torch.float32), [[5, 6, 7], [8, 9]]
    with pytest.raises(FloatingPointError, match=message):
        generate(model, good, 4, [1])
    with pytest.raises(FloatingPointError, match=message):
        list(likelihoods(model, good, [[(1, 6)], [(1, 9)]]))


@pytest.mark.parametrize("steps", [1, 3])
def test_a_row_that_has_ended_and_idle_rows_do_not_count(steps, broken, monkeypatch):
    """A NaN of one token's embedding spoils the rows with that token, and no other."""
    decode = Decoder.run

    def run(decoder):
        decoder.steps_between_looks = steps
        return decode(decoder)

    monkeypatch.setattr(Decoder, "run", run)
    path = broken("model.embed_tokens.weight", 0.0)
    model = load_model(path, dtype=torch.float32)
    ends = generate(model, [[5, 6]], 1, [0])[0]  # the first new token ends the row
    model.model.embed_tokens.weight[ends[0]] = torch.nan  # what would come after it is spoiled
    assert generate(model, [[5, 6]], 8, ends) == [[]]
    assert generate(model, [[5, 6], [9, 9]], 8, ends)[0] == []  # the other goes on
    mixed = [[5, 6], [9], [5, 6], [9, 8, 4]]  # in places that others leave, and with padding
    for batch_size in (1, 2, 4):
        assert generate(model, mixed, 8, ends, batch_size)[::2] == [[], []]
    model.model.embed_tokens.weight[7] = torch.nan
    with pytest.raises(FloatingPointError, match=r"the embedding gives .* begins with \[7, 8"):
        generate(model, [[5, 6], [7, 8]], 8, ends)


TASK_FILES = {
    "exact": {"prompt": "User: Copy: ring\n\nAssistant:", "raw_answers": ["ring"]},
    "choice": {"prompt": "User: Copy: ring\n\nAssistant:", "choices": ["ring", "map"], "answer": 0},
    "loss": {"prompt": "User: Copy: ring\n\nAssistant:", "completion": " ring"},
    "summary": {"prompt": "User: Copy: ring\n\nAssistant:", "raw_answers": ["ring"]},
}


@pytest.mark.parametrize("task", TASK_FILES)
def test_an_evaluation_ends_with_the_layer_and_writes_no_score(task, broken, tmp_path, monkeypatch):
    data, out = tmp_path / "data.jsonl", tmp_path / "out"
    data.write_text(json.dumps(TASK_FILES[task]) + "\n")
    base = broken(*PLACES[0][:2])
    given = ["--model", str(base), "--task", task, "--data", str(data), "--output", str(out)]
    monkeypatch.setattr(sys, "argv", ["eval.py", *given])
    with pytest.raises(SystemExit, match="error: layer 2 gives numbers that are not finite"):
        evaluation.main()
    assert not list(out.glob("*.jsonl"))


def test_scoring_ends_with_the_layer_and_selects_nothing(broken, tmp_path, monkeypatch):
    data, out = tmp_path / "data.jsonl", tmp_path / "cfg.json"
    data.write_text(json.dumps(TASK_FILES["loss"]) + "\n")
    for (name, value, _), layer in zip(PLACES, (2, 1)):  # layer 0 has no router
        given = ["--model", str(broken(name, value)), "--data", str(data), "--output", str(out)]
        monkeypatch.setattr(sys, "argv", ["select_experts.py", *given])
        with pytest.raises(SystemExit, match=f"error: layer {layer}: the router's gates are not"):
            select_experts.main()
    assert not list(tmp_path.glob("cfg*"))


def test_validation_ends_the_run_with_step_and_layer(tmp_path, monkeypatch):
    from test_train import settings

    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps(TASK_FILES["loss"]) + "\n")
    rows = {"validation_data": str(data), "eval_steps": 1, "batch_size": 1}
    config = settings(BASE, data, tmp_path / "run", **rows, gradient_accumulation_steps=1)
    step = train.MasterAdamW.step

    def spoil(optimizer, learning_rate):
        step(optimizer, learning_rate)
        with torch.no_grad():
            next(p for n, p in optimizer.parameters.items() if ".layers.3." in n).fill_(torch.nan)

    monkeypatch.setattr(train.MasterAdamW, "step", spoil)
    with pytest.raises(
        FloatingPointError, match="step 1: the validation loss is nan: layer 3 gives"
    ):
        train.train(config)
    assert not (tmp_path / "run/adapter").exists()


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_json_holds_finite_numbers_alone(number, tmp_path):
    path = tmp_path / "x.json"
    for write, value in ((write_json, {"a": [number]}), (write_lines, [{"a": number}])):
        with pytest.raises(ValueError, match="x.json: .*not JSON compliant"):
            write(path, value)
    assert not path.exists()


def test_saved_numbers_that_are_not_finite_have_no_score():
    row = {
        "example": {"prompt": "p", "raw_answers": ["a"], "loss": 1e999, "accuracy": 1, "tokens": 2}
    }
    with pytest.raises(ValueError, match="line 1: field loss is inf; a finite number is required"):
        TASKS["loss"].saved_example(row, "line 1")
