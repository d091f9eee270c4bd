"""What a run tells: headings, what was learned and forgotten, and what a frozen head cannot write."""

import importlib.util
import json
import os
import signal
import threading
import time

import pytest
import torch
from conftest import ROOT
from test_train import settings

import train
from chat import load_tokenizer
from data import IGNORE, Rows, encode_file
from processes import SingleProcess
from training import stopping
from training.evaluation import quality_lines
from training.head import alike_rows, first_losses, unlikely
from training.report import print_results, report

SMALL = {"batch_size": 1, "gradient_accumulation_steps": 1, "steps": 3, "seq_length": 64}
SMALL |= {"max_new_tokens": 3, "learning_rate": 1e-3, "n_sample_tokens": 200}


def write(path, rows: list[dict]):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def chat(question: str, answer: str) -> dict:
    turns = ("user", question), ("assistant", answer)
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def test_a_run_tells_its_story(tmp_path, monkeypatch, capsys):
    rows = write(tmp_path / "rows.jsonl", [chat("Copy: dog cat", "dog cat")] * 12)
    sets = [f"exact:{write(tmp_path / 'easy.jsonl', [chat('Copy: red cow', 'red cow')] * 2)}"]
    sets += [f"loss:{rows}"]
    config = settings(ROOT / "demo/base", rows, tmp_path / "run", **SMALL, eval_sets=sets)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    results = train.train(config)
    print_results(config, results, report(config))
    out = capsys.readouterr().out
    headings = [line.removeprefix("== ") for line in out.splitlines() if line.startswith("==")]
    evaluating = [f"evaluating {{}} training: {entry.replace(':', ' on ')}" for entry in sets]
    tokens = sum(len(ids) for ids, _ in encode_file(rows, load_tokenizer(config.model)))
    scoring = f"scoring on {tokens} tokens of {rows}"
    assert headings == [
        *(line.format("before") for line in evaluating),
        f"{scoring}, for expert_cfg.scores.json",
        "selecting",
        "training",
        f"{scoring}, for scores_after.json",
        *(line.format("after") for line in evaluating),
        "results",
    ]
    assert "3 steps of 1 rows are 1.5 epochs" in out
    assert "  prompt    User: Copy: red cow Assistant:\n  expected  red cow\n  before " in out
    text = (tmp_path / "run/report.txt").read_text()
    for where in (out, text):  # without matplotlib
        assert "token scores of 64 experts, from 0 to" in where and "; ^ selected" in where
    assert "pip install matplotlib" in out and not (tmp_path / "run/report.png").exists()
    adapter = f"--model {ROOT}/demo/base --adapter {tmp_path}/run/adapter"
    assert f"next: python generate.py {adapter}" in out and f"merge.py {adapter}" in out


def test_what_is_learned_and_forgotten():
    def result(before: float, after: float, metric: str) -> tuple[dict, dict]:
        return tuple(dict(mean=m, metric=metric, count=9, unit="x") for m in (before, after))

    cases = {
        "exact:a.jsonl": (*result(0.1, 0.4, "accuracy"), "learned"),
        "exact:b.jsonl": (*result(0.4, 0.1, "accuracy"), "forgotten"),
        "exact:c.jsonl": (*result(0.4, 0.4001, "accuracy"), "as before"),
        "loss:d.jsonl": (*result(2.0, 1.0, "loss"), "learned"),  # less is better
        "law:e.jsonl": (*result(1.0, 2.0, "reference loss"), "forgotten"),
    }
    results = {"before": {}, "after": {}}
    for entry, (before, after, _) in cases.items():
        results["before"][entry], results["after"][entry] = before, after
    lines = quality_lines(results)[1:]
    for line, (_, _, said) in zip(lines, cases.values(), strict=True):
        assert line.endswith(f"   {said:<9} (9 x)"), line


# ------------------------------------------------------------------------------------------
# A frozen head


def test_tokens_that_are_hardly_expected_the_frequent_ones_first():
    losses = torch.tensor(
        [3.0, 0.1, 2.5, 2.2, 9.0, 0.2]
    )  # token 7: 2.56 on average; 4: 0.1, 5: 0.2
    tokens = torch.tensor([7, 4, 7, 7, 2, 5])
    assert unlikely(losses, tokens).tolist() == [7, 2]  # -log 0.1 is 2.30


def test_rows_of_a_head_that_point_the_same_way():
    """30 rows lie along one axis, at different lengths; the others are random."""
    head = torch.randn(60, 16, generator=torch.Generator().manual_seed(0))
    head[:30] = torch.eye(16)[3] * torch.linspace(1, 5, 30)[:, None]
    assert alike_rows(head, torch.tensor([40, 3, 29])) == {3: 29, 29: 29}
    head[:15] *= -1  # 15 and 15: too few to say so
    assert alike_rows(head, torch.tensor([40, 3, 29])) == {}


def test_losses_of_the_first_step_stand_beside_their_labels():
    labels = torch.tensor([[5, IGNORE, 6, 7], [IGNORE, 8, IGNORE, 9]])
    rows = Rows(torch.zeros_like(labels), labels, torch.zeros_like(labels))

    def losses_of(config, model, part):
        wanted = part.labels[:, 1:]
        return wanted[wanted != IGNORE].float() * 10, None

    config = type("Config", (), {"micro_batch": 1})
    losses, tokens = first_losses(config, None, rows, losses_of)
    assert tokens.tolist() == [6, 7, 8, 9] and losses.tolist() == [60, 70, 80, 90]


@pytest.mark.parametrize(
    "answer, changes, said",
    [
        ("ñandú ñandú", {}, True),
        ("cow dog", {}, False),
        ("ñandú ñandú", {"method": "lora"}, True),
        ("ñandú ñandú", {"method": "full"}, False),
        ("ñandú ñandú", {"non_expert_modules": True}, False),
    ],
)
def test_what_a_frozen_head_cannot_write_is_said(answer, changes, said, tmp_path, capsys):
    rows = write(tmp_path / "rows.jsonl", [chat("Copy it:", answer)] * 12)
    given = SMALL | {"steps": 1, **changes}
    config = settings(ROOT / "demo/base", rows, tmp_path / "run", **given)
    train.train(config)
    out = capsys.readouterr().out
    assert ("the frozen head can hardly write" in out) == said
    if said:
        assert "can hardly write 'ñ', 'ú'" in out and "--method full" in out
        assert ("--non_expert_modules" in out) == (changes == {})


# ------------------------------------------------------------------------------------------
# Rows that are too long, and steps that do not end


def test_rows_longer_than_the_context_are_said_before_the_first_step(tmp_path, capsys):
    rows = write(tmp_path / "rows.jsonl", [chat("Copy: dog", "dog")] * 200)
    long = write(tmp_path / "long.jsonl", [chat("Copy:" + " dog" * 1100, "dog"), chat("a", "b")])
    given = SMALL | {"seq_length": 1100, "steps": 1, "eval_sets": [f"exact:{long}"]}
    train.train(settings(ROOT / "demo/base", rows, tmp_path / "run", **given))
    out = capsys.readouterr().out.partition("== training")[0]
    assert "seq_length is 1100: rows are longer than the 1024 tokens of max_position" in out
    assert f"{long}: 1 of 2 prompts are longer than the 1024 tokens of max_position" in out


def test_a_second_signal_ends_a_step_that_does_not_end(monkeypatch, capfd):
    """A long operation of torch keeps Python's handlers waiting: here one that holds the main
    thread, while the signals come from another one."""
    ends, monkey = [], threading.Event()
    monkeypatch.setattr(stopping, "PATIENCE", 0.2)
    monkeypatch.setattr(os, "_exit", lambda status: ends.append(status) or monkey.set())

    def two_signals() -> None:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)

    with pytest.raises(KeyboardInterrupt):
        with stopping.signals_noted(SingleProcess()):
            sender = threading.Thread(target=two_signals)
            sender.start()
            values = torch.randn(300, 300)
            while not ends:  # the second one reaches the main thread between two operations
                try:
                    values = torch.linalg.svd(values)[0]
                except KeyboardInterrupt:
                    monkey.wait(5)
                    raise
    sender.join()
    said = capfd.readouterr().err
    assert ends == [130] and "finishes the step" in said and "stopped within a step" in said
