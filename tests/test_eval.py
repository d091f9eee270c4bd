"""The evaluator's command line: what it writes, and what it refuses."""

import importlib
import json
import shutil

import pytest
import torch
from conftest import save_tokenizer, save_with_transformers

import eval as evaluation
import tasks.common
from chat import load_tokenizer
from checkpoint import load_model
from data import encode_file
from tasks import answer_file, read_examples, score


@pytest.fixture
def eval_file(tmp_path):
    path = tmp_path / "eval.jsonl"
    rows = [
        {"idx": i, "prompt": f"User: Repeat: {w}\n\nAssistant:", "raw_answers": [w]}
        for i, w in enumerate(("ab", "cd", "e"))
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def test_command_line_writes_the_published_shape_and_rescores_it(
    checkpoint, eval_file, tmp_path, monkeypatch, capsys
):
    output = tmp_path / "completions.jsonl"
    monkeypatch.setattr(
        "sys.argv",
        [
            "eval.py",
            "--model",
            str(checkpoint),
            "--task",
            "exact",
            "--data",
            str(eval_file),
            "--output",
            str(output),
            "--max_new_tokens",
            "4",
        ],
    )
    evaluation.main()
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["example"]["raw_answers"] for row in rows] == [["ab"], ["cd"], ["e"]]
    assert set(rows[0]) == {"example", "score"} and set(rows[0]["example"]) == {
        "prompt",
        "raw_prediction",
        "raw_answers",
    }
    rows[1]["example"]["raw_prediction"] = " cd "  # as if the model had known it
    output.write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setattr("sys.argv", ["eval.py", "--rescore", str(output), "--task", "exact"])
    evaluation.main()
    printed = capsys.readouterr().out
    assert "exact: accuracy 0.3333 over 3 samples" in printed and "2 of 3 scores equal" in printed


def test_prompts_begin_with_the_begin_of_sequence(checkpoint, eval_file, monkeypatch):
    seen = []

    def echo(model, prompts, *_):
        seen.extend(prompts)
        yield from enumerate(prompts)

    monkeypatch.setattr(tasks.common, "generate_each", echo)
    tokenizer = load_tokenizer(checkpoint)
    model = load_model(checkpoint)
    examples = answer_file(model, tokenizer, "exact", eval_file)
    result = score("exact", examples)
    assert [prompt[0] for prompt in seen] == [tokenizer.bos_id] * 3
    assert [tokenizer.decode(p) for p in seen] == [r["example"]["prompt"] for r in result.records]


def test_an_output_that_cannot_be_written_is_refused_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "taken").write_text("")
    (tmp_path / "folder.jsonl").mkdir()
    for output, message in (
        ("taken", "is a file; a folder, or NAME.jsonl, is required"),
        ("folder.jsonl", "is a directory; a file name is required"),
    ):
        arguments = ["--model", "none", "--task", "exact", "--data", "none"]
        arguments += ["--output", str(tmp_path / output)]
        monkeypatch.setattr("sys.argv", ["eval.py", *arguments])
        with pytest.raises(SystemExit, match=message):
            evaluation.main()


def test_an_output_that_is_an_input_is_refused(eval_file, monkeypatch):
    before = eval_file.read_bytes()
    monkeypatch.chdir(eval_file.parent)  # one file, by two names
    for source in (["--model", "none", "--data"], ["--rescore"]):
        arguments = [*source, eval_file.name, "--task", "exact", "--output", str(eval_file)]
        monkeypatch.setattr("sys.argv", ["eval.py", *arguments])
        with pytest.raises(SystemExit, match="this command reads it"):
            evaluation.main()
    assert eval_file.read_bytes() == before


def test_loss_task_equals_transformers(tmp_path, chat_file):
    oracle = save_with_transformers(tmp_path, seed=1, vocab_size=258)
    save_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    total, count = 0.0, 0
    for ids, labels in encode_file(chat_file, tokenizer):
        learned = sum(label >= 0 for label in labels[1:])
        total += oracle(torch.tensor([ids]), labels=torch.tensor([labels])).loss.item() * learned
        count += learned
    model = load_model(tmp_path, dtype=torch.float32)
    result = score("loss", answer_file(model, tokenizer, "loss", chat_file))
    assert result.count == count and result.mean == pytest.approx(total / count, rel=1e-5)
    assert (
        result.records[0]["example"]["raw_answers"][0].strip()
        in result.records[0]["example"]["prompt"]
    )


@pytest.mark.parametrize(
    "row, task, message",
    [
        ({"prompt": "x"}, "exact", "line 1: field raw_answers is None; a list of strings"),
        ({"prompt": "x", "raw_answers": []}, "exact", "line 1: field raw_answers is"),
        ({"raw_answers": ["x"]}, "exact", "line 1: field prompt is None"),
        (
            {"prompt": "x", "raw_answers": ['{"intent": "a", "slots": null}']},
            "intent",
            r"line 1: field raw_answers\[0\] is .* an object \"slots\"",
        ),
        ({"prompt": "\ud800", "raw_answers": ["x"]}, "exact", "line 1: field prompt is"),
        (
            {"prompt": "x", "raw_answers": ["free text"]},
            "intent",
            r"line 1: field raw_answers\[0\] is 'free text'; JSON",
        ),
    ],
)
def test_bad_rows(row, task, message, tmp_path):
    (tmp_path / "bad.jsonl").write_text(json.dumps(row))
    with pytest.raises(ValueError, match=f"bad.jsonl: {message}"):
        read_examples(tmp_path / "bad.jsonl", task, ask=None)


@pytest.mark.parametrize("field, value", [("model_type", "deepseek_v4"), ("vocab_size", None)])
@pytest.mark.parametrize("command", ["eval", "select_experts"])
def test_commands_refuse_a_config_by_field(
    command, field, value, checkpoint, chat_file, tmp_path, monkeypatch
):
    base = tmp_path / "base"
    shutil.copytree(checkpoint, base)
    raw = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**raw, field: value}))
    arguments = ["--model", str(base), "--data", str(chat_file), "--output", str(tmp_path / "out")]
    if command == "eval":
        arguments += ["--task", "loss"]
    monkeypatch.setattr("sys.argv", [command, *arguments])
    with pytest.raises(SystemExit, match=f"error: .*config.json: {field} is"):
        importlib.import_module(command).main()
