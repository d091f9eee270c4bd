"""The demo's data keeps train and evaluation apart; benchmarks still run."""

import json
import subprocess
import sys

import pytest
import tokenizers
from conftest import ROOT
from rank_pool import run_command_on_ranks

DATA = ROOT / "demo/data"


def prompts(name: str) -> set[str]:
    rows = [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text().splitlines()]
    return {
        row["prompt"] if "prompt" in row else f"User: {row['messages'][0]['content']}\n\nAssistant:"
        for row in rows
    }


@pytest.mark.parametrize("task", ["intent", "order", "sum"])
def test_train_and_evaluation_files_are_apart(task):
    train, valid, test = (prompts(f"{task}_{part}") for part in ("train", "valid", "test"))
    assert len(train) > 2000 and len(valid) == len(test) == 200
    assert not train & valid and not train & test and not valid & test


def test_general_files_hold_ten_skills_and_none_of_the_tasks():
    for part in ("valid", "test"):
        rows = [
            json.loads(line) for line in (DATA / f"general_{part}.jsonl").read_text().splitlines()
        ]
        skills = [row["skill"] for row in rows]
        assert {skill: skills.count(skill) for skill in set(skills)} == dict.fromkeys(
            set(skills), 40
        ) and len(rows) == 400
    general = prompts("general_test")
    for task in ("intent", "order", "sum"):
        instruction = next(iter(prompts(f"{task}_test"))).split(" ")[1:4]
        assert not any(prompt.split(" ")[1:4] == instruction for prompt in general)


def test_the_generator_gives_the_files_of_the_repository(tmp_path):
    """make_data.py writes beside itself, so a copy of it writes into the scratch folder."""
    (tmp_path / "demo").mkdir()
    for name in ("make_data.py", "words.txt"):
        (tmp_path / "demo" / name).write_bytes((ROOT / "demo" / name).read_bytes())
    subprocess.run(
        [sys.executable, "demo/make_data.py"], cwd=tmp_path, check=True, capture_output=True
    )
    for path in sorted((tmp_path / "demo").rglob("*.json*")):
        assert path.read_bytes() == (ROOT / path.relative_to(tmp_path)).read_bytes(), path.name


def test_the_untrained_base_has_the_shape_of_the_trained_one(tmp_path):
    command = [sys.executable, "demo/make_base.py", "--output", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert (tmp_path / "config.json").read_bytes() == (ROOT / "demo/base/config.json").read_bytes()
    assert (tmp_path / "model.safetensors").stat().st_size == (
        ROOT / "demo/base/model.safetensors"
    ).stat().st_size


BENCHMARKS = [
    "v2_lite.py --steps 1",
    "lora.py --steps 1",
    "scoring.py",
    "growth.py",
    "agreement.py",
    "decode.py",
    "evaluation.py",
    "load.py",
    "families.py --only gigachat",
    "demo_step.py",
    "quantized.py",
    "full_path.py",
    "saving.py",
    "small_cards.py --rows 1 --steps 1 --cases 3",
    "study.py --methods token relative full early",
]
# One process runs them all: to import torch and transformers takes longer than most of them.
RUN_ALL = """
import contextlib, io, json, runpy, sys, traceback
sys.path.insert(0, "benchmarks")
for command in json.loads(sys.argv[1]):
    sys.argv, said, error = [*command.split(), "--tiny"], io.StringIO(), None
    try:
        with contextlib.redirect_stdout(said):
            runpy.run_path("benchmarks/" + sys.argv[0], run_name="__main__")
    except BaseException:
        error = traceback.format_exc()
    print(json.dumps([said.getvalue(), error]), flush=True)
"""


@pytest.fixture(scope="module")
def said() -> dict[str, list]:
    """What each benchmark printed, and the error that ended it or None."""
    command = [sys.executable, "-c", RUN_ALL, json.dumps(BENCHMARKS)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    return dict(zip(BENCHMARKS, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("command", BENCHMARKS)
def test_benchmarks_run(said, command):
    printed, error = said[command]
    assert error is None, error
    assert "benchmark" in json.loads(printed.splitlines()[-1])


def test_the_benchmark_of_ranks_runs(tmp_path):
    done = run_command_on_ranks(2, tmp_path, "benchmarks/expert_parallel.py", "--tiny")
    assert [rank["status"] for rank in done] == [0, 0]
    assert "benchmark" in json.loads(done[0]["stdout"].splitlines()[-1])


def test_the_tokenizer_opens_in_older_libraries_too():
    """Before 0.20, tokenizers read merges as strings alone. Pairs mean the same ids."""
    content = json.loads((ROOT / "demo/base/tokenizer.json").read_text())
    merges = content["model"]["merges"]
    assert merges and all(isinstance(merge, str) for merge in merges)
    content["model"]["merges"] = [merge.split(" ") for merge in merges]
    as_pairs = tokenizers.Tokenizer.from_str(json.dumps(content))
    as_strings = tokenizers.Tokenizer.from_file(str(ROOT / "demo/base/tokenizer.json"))
    for path in sorted((ROOT / "demo/data").glob("*_test.jsonl")):
        for line in path.read_text().splitlines()[:50]:
            assert as_strings.encode(line).ids == as_pairs.encode(line).ids
