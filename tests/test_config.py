"""A key is one line: flag, file, type and bounds follow from it."""

import argparse
import re
from dataclasses import dataclass

import pytest
from conftest import ROOT

from config import add_keys, key, read_keys
from train import command_line
from training.config import TrainConfig


@dataclass
class Config(TrainConfig):
    top_k: int | None = key(None, "experts of a layer", at_least=1, below=9)
    names: list[str] = key((), "some names")


def read(*flags: str, path=None) -> Config:
    parser = argparse.ArgumentParser()
    add_keys(parser, Config)
    parser.add_argument("--ranks", help="of the command line alone")
    needed = ["--model", "m", "--data", "d", "--output_dir", "o"]
    return read_keys(Config, parser.parse_args([*needed, *flags]), path)


def test_a_new_key_is_one_line(tmp_path):
    assert read().top_k is None
    top_k = read("--top_k", "5").top_k
    assert top_k == 5 and type(top_k) is int
    path = tmp_path / "c.toml"
    path.write_text('top_k = 3\nnames = ["a"]\n')
    assert (read(path=str(path)).top_k, read("--top_k", "4", path=str(path)).top_k) == (3, 4)
    assert read("--names", "b", "c", "--names", "d", path=str(path)).names == ["b", "c", "d"]
    assert read("--names", path=str(path)).names == []
    for text, message in (
        ("5.0", "top_k is '5.0'; must be an integer"),
        ("9", "top_k is 9; must be at least 1 and below 9"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            read("--top_k", text, path=str(path))
    for line, message in (
        ("top_k = 5.0", "top_k is 5.0; must be an integer"),
        ("top_k = 0", "top_k is 0; must be at least 1"),
        ("top_kk = 1", 'unknown key top_kk; did you mean top_k, "experts of a layer"'),
        ("zzz = 1", "unknown key zzz$"),
        ("ranks = 1", "ranks is no key of the file; give --ranks to the command$"),
        ("names = 'a'", "names is 'a'; must be a list of strings"),
        ("lr = 1e-3", 'unknown key lr; did you mean learning_rate, "peak .def'),
        ("max_steps = 9", 'unknown key max_steps; did you mean steps, "optimizer steps"'),
    ):
        path.write_text(line)
        with pytest.raises(ValueError, match=f"^{path}: {message}"):
            read(path=str(path))


def test_help_shows_the_defaults_that_say_something():
    parser = argparse.ArgumentParser()
    add_keys(parser, Config)
    texts = {action.dest: action.help for action in parser._actions}
    assert texts["validation_fraction"].endswith("(default: 0.02)")
    assert texts["seed"].endswith("(default: 0)")
    assert texts["overwrite"].endswith("(default: false)")
    assert "(default" not in texts["top_k"] + texts["names"] + texts["output_dir"]


def test_help_has_groups_of_keys():
    text = command_line().format_help()
    heads = re.findall(r"^(\S.*):$", text, flags=re.M)
    assert heads[0] == "options" and heads[1:3] == ["Base, data and selection", "Run"]
    assert {"Optimization", "Machine"} < set(heads) and len(heads) == len(set(heads))
    for head, key_ in (("LoRA", "lora_rank"), ("Optimization", "batch_size")):
        assert f"\n{head}:\n  --{key_} " in text


def test_a_switch_alone_means_true():
    assert read("--overwrite").overwrite and read("--overwrite", "true").overwrite
    assert not read("--overwrite", "false").overwrite and not read().overwrite
    with pytest.raises(ValueError, match="overwrite is 'yes'; must be true or false"):
        read("--overwrite", "yes")


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.toml")), ids=lambda p: p.stem)
def test_the_score_decides_how_much_is_selected_in_the_projects_own_configs(path):
    for score, top_p in (("token", 0.2), ("gate", 0.1)):
        arguments = command_line().parse_args(["--score", score, "--device", "cpu"])
        assert read_keys(TrainConfig, arguments, str(path)).top_p == top_p
