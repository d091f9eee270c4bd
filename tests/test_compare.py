"""The rows of compare.py are those of runs of train.py alone, also after kills. Mistakes in any
method are found before the first one runs."""

import json
import os
import signal
import sys
import weakref
from pathlib import Path

import pytest

import compare
import train as trainer
from training import report as reporting

TIMES = {"seconds"}


class Killed(BaseException):
    """As a kill: nothing handles it."""


@pytest.fixture
def config_file(checkpoint, chat_file, tmp_path, monkeypatch) -> Path:
    """A config of two steps and three evaluation sets; a run's picture is for other tests."""
    monkeypatch.setattr(reporting, "draw_report", lambda *args: None)
    for name, words in {"task": ("abc", "fed"), "other": ("bad", "face")}.items():
        rows = [{"prompt": f"Repeat: {word}\n", "raw_answers": [word]} for word in words]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "run.toml"
    path.write_text(f"""
        model = "{checkpoint}"
        data = "{chat_file}"
        output_dir = "{tmp_path}/out"
        eval_sets = [
            "loss:{chat_file}", "exact:{tmp_path}/task.jsonl", "exact:{tmp_path}/other.jsonl",
        ]
        max_new_tokens = 2
        seq_length = 64
        batch_size = 4
        gradient_accumulation_steps = 2
        steps = 2
        save_steps = 1
        learning_rate = 1e-2
        validation_fraction = 0.1
        device = "cpu"
        gradient_checkpointing = false
    """)
    return path


def run(module, config_file: Path, *words: str) -> None:
    """Runs the command line of compare.py or train.py in this process."""
    arguments = [f"{module.__name__}.py", "--config", str(config_file), *words]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", arguments)
        module.main()


def rows(output: Path) -> dict:
    """compare.json without the times."""
    found = json.loads((output / "compare.json").read_text())
    return {name: {k: v for k, v in row.items() if k not in TIMES} for name, row in found.items()}


def test_rows_are_those_of_runs_alone(config_file, tmp_path, monkeypatch, capsys):
    models = []

    def load_alone(*args, **kwargs):
        assert all(model() is None for model in models), "the model before is still in memory"
        model = load_model(*args, **kwargs)
        model.itself = [model]  # a circle, which needs a collection
        models.append(weakref.ref(model))
        return model

    load_model = trainer.load_model
    monkeypatch.setattr(trainer, "load_model", load_alone)
    names = ["esft", "lora:1e-3", "gate", "full"]
    run(compare, config_file, "--methods", *names, "--lora_rank", "4")
    said = capsys.readouterr().out
    assert len(models) == 4
    monkeypatch.setattr(trainer, "load_model", load_model)
    found = rows(tmp_path / "out")
    assert list(found) == ["base", "esft", "lora", "gate", "full"]
    alone = {
        "esft": [],
        "lora": "--method lora --learning_rate 1e-3 --lora_rank 4".split(),
        "gate": "--score gate".split(),
        "full": "--method full --learning_rate 3e-5".split(),
    }
    for name, words in alone.items():
        run(trainer, config_file, *words, "--output_dir", str(tmp_path / "alone" / name))
        pair = [tmp_path / folder / name for folder in ("out", "alone")]
        for file in ("train_config.json", "expert_cfg.scores.json", "scores_after.json"):
            assert len({(path / file).read_bytes() for path in pair}) == 1, (name, file)
        adapters = [next(path.glob("adapter/*.safetensors")).read_bytes() for path in pair]
        assert adapters[0] == adapters[1], name
        results = json.loads((pair[1] / "results.json").read_text())
        assert results["before"] == json.loads((pair[0] / "results.json").read_text())["before"]
        assert found["base"] == {"scores": {k: v["mean"] for k, v in results["before"].items()}}
        expected = {"scores": {k: v["mean"] for k, v in results["after"].items()}}
        expected |= {k: results[k] for k in compare.KEPT if k not in TIMES}
        assert found[name] == expected, name
        assert (pair[0] / "report.txt").exists()
    text = (tmp_path / "out/compare.txt").read_text()
    table = text.split("\n\n")[1]
    assert table in said and text.startswith(f"{tmp_path}/train.jsonl, from ")
    assert [line.split()[0] for line in table.splitlines()[1:]] == list(found)
    assert (tmp_path / "out/compare.png").read_bytes().startswith(b"\x89PNG")
    assert f"--adapter {tmp_path}/out/esft/adapter {tmp_path}/out/lora/adapter" in said


def test_a_killed_comparison_goes_on_to_the_same_rows(config_file, tmp_path, monkeypatch):
    words = ["--eval_sets", f"loss:{tmp_path}/train.jsonl", "--methods", "esft", "lora", "random"]
    run(compare, config_file, *words, "--output_dir", str(tmp_path / "whole"))
    expected = rows(tmp_path / "whole")
    for module, name in ((trainer, "print_step"), (compare, "report")):  # within, and after lora

        def killed(config, *args, inner=getattr(module, name)):
            if config.method == "lora":
                raise Killed
            return inner(config, *args)

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(module, name, killed)
            run(compare, config_file, *words)
        assert not (tmp_path / "out/compare.json").exists()
    begun = []
    inner = trainer.load_model
    monkeypatch.setattr(trainer, "load_model", lambda *a, **k: begun.append(1) or inner(*a, **k))
    run(compare, config_file, *words)
    assert len(begun) == 1  # random alone
    assert rows(tmp_path / "out") == expected
    run(compare, config_file, *words, "shared")  # a row more
    assert len(begun) == 2
    later = rows(tmp_path / "out")
    assert list(later) == ["base", "esft", "lora", "random", "shared"]
    assert {name: later[name] for name in expected} == expected


def test_ctrl_c_ends_all_and_says_what_is_kept(config_file, tmp_path, monkeypatch, capsys):
    inner = trainer.compute_gradients

    def interrupted(config, *args):
        if config.selection == "random":
            os.kill(os.getpid(), signal.SIGINT)
        return inner(config, *args)

    monkeypatch.setattr(trainer, "compute_gradients", interrupted)
    with pytest.raises(SystemExit) as ended:
        run(compare, config_file, "--methods", "gate", "lora", "random", "esft")
    assert ended.value.code == 130
    said = capsys.readouterr().err
    assert "random did not finish; finished methods: gate, lora\n" in said
    assert f"stopped: SIGINT after step 1; kept: {tmp_path}/out/random/checkpoints/step" in said
    assert not (tmp_path / "out/esft").exists()


def test_overwrite_is_for_all_methods_at_once(config_file, tmp_path, monkeypatch):
    """A comparison of another config; then one with --overwrite that is killed goes on without."""
    words = ["--eval_sets", f"loss:{tmp_path}/train.jsonl", "--methods", "esft", "full:1e-2"]
    run(compare, config_file, *words)
    old = rows(tmp_path / "out")
    words += ["--steps", "1"]
    with pytest.raises(SystemExit):
        run(compare, config_file, *words)
    with monkeypatch.context() as patch, pytest.raises(Killed):

        def killed(config):
            raise Killed

        patch.setattr(compare, "report", killed)
        run(compare, config_file, *words, "--overwrite")
    assert not (tmp_path / "out/compare.json").exists()
    run(compare, config_file, *words)
    new = rows(tmp_path / "out")
    assert new["base"] == old["base"] and new["full"] != old["full"]
    run(compare, config_file, *words, "--output_dir", str(tmp_path / "fresh"))
    assert rows(tmp_path / "fresh") == new


@pytest.mark.parametrize(
    "words, message",
    [
        ("--methods esft lora:fast", "method lora: learning_rate is 'fast'; must be a number"),
        ("--methods esft lora:", "method lora: learning_rate is ''; must be a number"),
        ("--methods esft full:0", "method full: learning_rate is 0.0; must be above 0"),
        ("--methods esft random:nan", "method random: learning_rate is nan; must be above 0"),
        ("--methods esft lorra", "--methods has 'lorra'; NAME or NAME:RATE is required"),
        ("--methods esft ESFT:1e-3", "--methods has 'ESFT:1e-3'; NAME or NAME:RATE"),
        ("--methods lora:1e-3 lora:1e-4", "--methods has lora twice"),
        ("--methods esft gate --score gate", "method gate: is the same as esft"),
        ("--methods random esft --selection random", "method esft: is the same as random"),
        ("--methods esft full --lora_rank 4", "lora_rank is 4; no effect, since method is esft"),
        ("--methods lora full --shared_experts", "shared_experts is True; no effect, since method"),
        ("--methods esft gate --expert_config c.json", "method gate: expert_config is 'c.json'; "),
        ("--methods esft lowest --expert_config c.json", "since expert_config is given"),
        ("--quantize nf4", "method lora: quantize is 'nf4'; cannot be with method lora"),
        ("--method dora", "method is 'dora'; must be one of esft, full, lora"),
        ("--methods lora esft --expert_config c.json", "c.json: no such file"),
        ("--eval_sets exact:none.jsonl", "none.jsonl: no such"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_runs(
    config_file, tmp_path, capsys, words, message
):
    with pytest.raises(SystemExit) as ended:
        run(compare, config_file, *words.split())
    assert ended.value.code == 1 and not (tmp_path / "out").exists()
    said = capsys.readouterr().err
    assert said.startswith("error: ") and message in said and said.count("\n") == 1


def test_a_directory_of_something_else_is_refused_before_anything_runs(
    config_file, tmp_path, capsys
):
    (tmp_path / "out/full").mkdir(parents=True)
    (tmp_path / "out/full/notes.txt").write_text("mine")
    with pytest.raises(SystemExit):
        run(compare, config_file, "--methods", "esft", "full", "--overwrite")
    assert "holds files that no run of train.py wrote" in capsys.readouterr().err
    (tmp_path / "out/train_config.json").write_text("{}")
    with pytest.raises(SystemExit):
        run(compare, config_file, "--methods", "esft")
    assert f"output_dir is {tmp_path}/out; holds a run of train.py" in capsys.readouterr().err
    assert not (tmp_path / "out/esft").exists()
    with pytest.raises(SystemExit):
        run(compare, config_file, "--output_dir", str(config_file))
    assert f"output_dir is {config_file}; it is a file" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, expected",
    [
        ("", {"esft": (1e-2, "run.toml"), "lora": (1e-4, "the paper's for lora")}),
        (
            "--learning_rate 2e-3",
            {"random": (2e-3, "--learning_rate"), "full": (3e-5, "the paper")},
        ),
        ("--method lora", {"lora": (1e-2, "run.toml"), "random": (1e-5, "the paper's for esft")}),
        ("--methods shared gate:3e-4", {"shared": (1e-2, "run.toml"), "gate": (3e-4, "--methods")}),
    ],
)
def test_where_a_learning_rate_is_from(config_file, words, expected):
    arguments = ["--config", str(config_file), *words.split()]
    configs, sources = compare.read_configs(compare.command_line().parse_args(arguments))
    for name, (rate, source) in expected.items():
        assert configs[name].learning_rate == rate and source in sources[name]


def test_a_key_goes_to_the_methods_that_it_has_an_effect_on(config_file):
    words = "--methods esft lora full --lora_rank 4 --shared_experts --top_p 0.4".split()
    arguments = compare.command_line().parse_args(["--config", str(config_file), *words])
    configs, _ = compare.read_configs(arguments)
    assert [c.lora_rank for c in configs.values()] == [8, 4, 8]
    assert [c.shared_experts for c in configs.values()] == [True, False, False]
    assert [c.top_p for c in configs.values()] == [0.4, 0.4, 0.4]


def test_the_table_and_the_figure(tmp_path):
    scores = [{"intent:a/x.jsonl": t, "exact:b/y.jsonl": g} for t, g in ((0, 1), (0.5, 0.25))]
    row = {"learning_rate": 3e-4, "trained_parameters": 1_500_000, "all_parameters": 6_000_000}
    row |= {"adapter_bytes": 3 * 2**19, "seconds": 90, "scores": scores[1]}
    shown = compare.table({"base": {"scores": scores[0]}, "non_expert": row})
    assert shown == (
        "            x (intent)  y (exact)  trained  share  adapter  minutes  learning rate\n"
        "base             0.000      1.000\n"
        "non_expert       0.500      0.250    1.50M  25.0%  1.5 MiB      1.5         0.0003\n"
    )
    assert compare.table({"base": {"scores": {}}, "full": row | {"scores": {}}}).count("\n") == 3
    assert "two eval_sets" in compare.no_figure(["exact:b"])
    assert "no common mean" in compare.no_figure(["exact:b", "loss:c", "intent:d"])
    assert "no common mean" in compare.no_figure(["exact:b", "summary:c", "intent:d"])
    assert not compare.no_figure(["loss:c", "exact:b", "intent:d"])
