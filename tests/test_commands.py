"""Command lines: what they say of words that they do not know, their examples, and their help."""

import ast
import difflib
import importlib
import re
import shlex
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from conftest import ROOT

from config import ELSEWHERE
from training.config import TrainConfig

FILES = sorted(path.stem for path in ROOT.glob("*.py"))
COMMANDS = [name for name in FILES if "__main__" in (ROOT / f"{name}.py").read_text()]
SCRIPTS = sorted([*ROOT.glob("benchmarks/*.py"), *ROOT.glob("demo/*.py")])


def run(monkeypatch, capsys, name: str, *words: str) -> tuple[int, str, str]:
    """Returns status, stdout and stderr of a command that ends before it does anything."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *words])
    with pytest.raises(SystemExit) as end:
        importlib.import_module(name).main()
    return end.value.code, *capsys.readouterr()


def example_in(text: str, name: str) -> list[str]:
    """Returns the words of a text's first command for a file, from the file on."""
    return shlex.split(
        re.search(rf"(?:python|torchrun) .*?\b({name}\.py .*)", text)[1], comments=True
    )


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_a_command_with_help_or_none(name, monkeypatch, capsys):
    """The example in the help, and the one of a command without flags, is understood, and names
    files of the project or of the demo's run."""
    assert (name in COMMANDS) == hasattr(importlib.import_module(name), "main")
    if name not in COMMANDS:
        return
    status, out, err = run(monkeypatch, capsys, name, "--help")
    assert status == 0 and not err and "example:\n" in out
    assert max(map(len, out.splitlines())) <= 140
    words = example_in(out.split("example:\n")[1], name)
    assert vars(importlib.import_module(name).command_line().parse_args(words[1:]))
    for word in words[1:]:
        assert "/" not in word or word.startswith("runs/") or (ROOT / word).exists(), word


@pytest.mark.parametrize("name", ["train", "train_ep", "eval", "select_experts", "merge", "data"])
def test_a_command_without_flags_shows_an_example(name, monkeypatch, capsys):
    status, out, err = run(monkeypatch, capsys, name)
    assert status == 2 and not out and err.startswith("error: no flags are given; try ")
    assert err.count("\n") == 1 and example_in(err, name)[1].startswith("--")


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_the_help_of_other_scripts_is_their_docstring_with_an_example(path):
    text = path.read_text()
    command = rf"^    (python|torchrun .*) {path.parent.name}/{path.name}"
    assert re.search(command, ast.get_docstring(ast.parse(text)), flags=re.M)
    assert "command_line(__doc__)" in text or "description=__doc__" in text


@pytest.mark.parametrize(
    "name, words, said",
    [
        ("train", "--lr 1e-3", 'unknown flag --lr; did you mean --learning_rate, "peak (def'),
        ("train", "--lr=1e-3", 'unknown flag --lr; did you mean --learning_rate, "peak (def'),
        (
            "train",
            "--learning-rate 1",
            "unknown flag --learning-rate; did you mean --learning_rate",
        ),
        ("train", "--num-train-epochs 9", "--num-train-epochs; did you mean --steps"),
        ("train_ep", "--epochs 3", 'unknown flag --epochs; did you mean --steps, "optimizer st'),
        ("train", "--max_steps 3 --b 1", "unknown flag --max_steps; did you mean --steps"),
        ("train", "--per_device_train_batch_size 1", 'did you mean --batch_size, "rows of one'),
        ("merge", "--model_name_or_path m", 'did you mean --model, "base checkpoint'),
        ("eval", "--tasks intent", 'unknown flag --tasks; did you mean --task, "tasks of'),
        ("data", "--lr 1", "unknown flag --lr (all"),
        ("eval", "--zzz", "unknown flag --zzz (all flags: python eval.py --help)"),
        (
            "train",
            "configs/demo.toml",
            "demo.toml stands without a flag; write --config configs/de",
        ),
        (
            "train",
            "--seed 1 x.toml --plan",
            "x.toml stands without a flag; write --config x.toml (",
        ),
        ("data", "x.toml", "x.toml stands without a flag (all"),
        ("select_experts", "--score token", "the following arguments are required: --output (all"),
        ("train_ep", "--plan x", "argument --plan: invalid int value: 'x' (all"),
        ("train", "--config", "argument --config: expected one argument (all flags: python train"),
        ("train_ep", "--timeout 0", "--timeout is 0.0; must be above 0 (all flags: python train_"),
    ],
)
def test_a_wrong_word_is_one_line(name, words, said, monkeypatch, capsys):
    status, out, err = run(monkeypatch, capsys, name, *words.split())
    assert status == 2 and not out and err.startswith("error: ") and err.count("\n") == 1
    assert said in err


def test_a_name_of_another_trainer_stands_in_the_table_only_where_the_nearest_is_wrong():
    keys = [f.name for f in fields(TrainConfig)]
    for name, ours in ELSEWHERE.items():
        assert ours in keys and difflib.get_close_matches(name, keys, 1) != [ours], name


@pytest.mark.parametrize("path", ["configs/demo.toml", "demo/pretrain.toml", "mine.toml"])
def test_a_missing_config_names_the_working_directory(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    status, _, err = run(monkeypatch, capsys, "train", "--config", path)
    there = f"; it is in {ROOT}: run the command there" if Path(ROOT / path).exists() else ""
    begin = f"error: {path}: no such config file in the working directory, {tmp_path}"
    assert status == 1 and err == f"{begin}{there}\n"
