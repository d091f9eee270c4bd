"""Held-out rows of a training file, evaluated as they are: the prompt is what stands before the
answer in training."""

import json
import shutil

import pytest
import torch
from conftest import ROOT

from chat import load_tokenizer
from checkpoint import load_model
from data import IGNORE, encode_file
from eval import main
from tasks import TASKS, Ask, answer_file, read_examples, score

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
REASONS = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ 'Q: ' + m.content + ' A:' }}"
    "{% else %}{% if m.reasoning_content %}{{ '<think>' + m.reasoning_content + '</think>' }}"
    "{% endif %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(ROOT / "demo/base")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def user(content):
    return {"role": "user", "content": content}


def answer(content, **more):
    return {"role": "assistant", "content": content, **more}


TALK = [user("Name a tree."), answer("oak"), user("Another?"), answer(" beech\n")]
TALK_PROMPT = f"User: Name a tree.\n\nAssistant: oak{EOS}User: Another?\n\nAssistant:"


@pytest.mark.parametrize(
    "row, prompt, expected",
    [
        ({"messages": TALK[:2]}, "User: Name a tree.\n\nAssistant:", "oak"),
        ({"messages": TALK, "idx": 4}, TALK_PROMPT, " beech\n"),
        ({"messages": TALK, "system": "Be brief."}, f"Be brief.\n\n{TALK_PROMPT}", " beech\n"),
        (
            {
                "conversations": [
                    {"from": "system", "value": "Be brief."},
                    {"from": "human", "value": f"{BOS}Name a bird."},
                    {"from": "gpt", "value": f"wren{EOS}"},
                ]
            },
            "Be brief.\n\nUser: Name a bird.\n\nAssistant:",
            "wren",
        ),
        (
            {"instruction": "Add.", "input": "2 and 5", "output": "7"},
            "User: Add.\n2 and 5\n\nAssistant:",
            "7",
        ),
        ({"prompt": f"{BOS}Sea or", "completion": f" land{EOS}"}, "Sea or", " land"),
        ({"prompt": "Night and", "completion": " day"}, "Night and", " day"),
        # the last answer that is learned
        ({"messages": [*TALK, user("And?"), answer("x", mask=1)]}, TALK_PROMPT, " beech\n"),
        ({"messages": [user("Why?"), answer("<think>a b</think>So.")]}, None, "So."),
    ],
)
def test_rows_of_a_training_file_by_hand(row, prompt, expected, tokenizer, tmp_path):
    path = write(tmp_path / "held.jsonl", [row])
    for ask in (Ask(tokenizer), Ask(tokenizer, plain=True)):
        (example,) = read_examples(path, "exact", ask)
        prompt = prompt or "User: Why?\n\nAssistant:"
        assert example == {"prompt": prompt, "raw_answers": [expected]}
    (ids, labels), *_ = encode_file(path, tokenizer)
    (read,) = tokenizer.encode_prompts([example["prompt"]])
    assert read == ids[: len(read)] and labels[len(read) - 1] in (IGNORE, tokenizer.bos_id)
    assert read.count(tokenizer.bos_id) == 1 and labels[len(read)] == ids[len(read)]


def test_reasoning_is_not_expected_and_stands_in_earlier_turns(tmp_path):
    shutil.copytree(ROOT / "demo/base", tmp_path / "base")
    (tmp_path / "base/chat_template.jinja").write_text(REASONS)
    talk = [user("3 + 4?"), answer("7", reasoning_content="by hand")]
    talk += [user("5 + 4?"), answer("9", reasoning_content="as before")]
    path = write(tmp_path / "held.jsonl", [{"messages": talk}, {"messages": talk[:2]}])
    examples = read_examples(path, "exact", Ask(load_tokenizer(tmp_path / "base")))
    assert examples == [
        {
            "prompt": f"Q: 3 + 4? A:<think>by hand</think>7{EOS}Q: 5 + 4? A:",
            "raw_answers": ["9"],
        },
        {"prompt": "Q: 3 + 4? A:", "raw_answers": ["7"]},
    ]
    answered = [examples[0] | {"raw_prediction": "<think>as before</think>9"}]
    assert score("exact", answered).mean == 1.0


@pytest.mark.parametrize("task", ["intent", "summary", "law", "translation"])
def test_other_tasks_of_prompts_and_answers_read_them(task, tokenizer, tmp_path):
    said = '{"intent": "play", "slots": {"song": "Valse"}}'
    path = write(
        tmp_path / "held.jsonl", [{"messages": [user("Intent: play Valse"), answer(said)]}]
    )
    (example,) = read_examples(path, task, Ask(tokenizer))
    assert example == {"prompt": "User: Intent: play Valse\n\nAssistant:", "raw_answers": [said]}
    answered = example | {"raw_prediction": "x"}
    assert TASKS[task].saved_example({"example": answered}, "") == answered


@pytest.mark.parametrize("said", ["<think>only thoughts", "<think>a</think>", "b</think> "])
def test_an_answer_that_is_reasoning_alone_is_named(said, tokenizer, tmp_path):
    path = write(
        tmp_path / "held.jsonl", [{"messages": TALK}, {"messages": [user("q"), answer(said)]}]
    )
    with pytest.raises(ValueError, match="held.jsonl: line 2: the last answer is reasoning alone"):
        read_examples(path, "exact", Ask(tokenizer))


def test_rows_without_a_learned_answer_are_left_out(tokenizer, tmp_path, capsys):
    masked = {"messages": [user("q"), answer("a", weight=0)]}
    path = write(tmp_path / "held.jsonl", [masked, {"messages": TALK}, masked])
    for task in ("exact", "loss"):
        assert len(read_examples(path, task, Ask(tokenizer))) == 1
        said = capsys.readouterr().out
        assert said == f"{path}: 2 of 3 rows have no answer to score; left out\n"
    with pytest.raises(ValueError, match="held.jsonl: holds no answer to score; every one is mask"):
        read_examples(write(path, [masked]), "exact", Ask(tokenizer))


@pytest.mark.parametrize(
    "task, row, message",
    [
        ("exact", {"messages": TALK[:1]}, "messages end with role user; the answer"),
        ("exact", {"messages": [user("q"), answer("")]}, r"messages\[1\]: field content is empty"),
        ("law", {"messages": "hello"}, "field messages is 'hello'; a list of messages"),
        ("exact", {"prompt": "q", "completion": 3}, "field completion is 3; a string"),
        ("exact", {"prompt": "q", "compl": "a"}, "field raw_answers is None; a list of strings"),
        ("exact", {"instruction": "q", "outptu": "a"}, "field outptu is 'a'; .*mean output"),
        ("intent", {"messages": TALK}, r"field raw_answers\[0\] is ' beech\\n'; JSON with"),
    ],
)
def test_bad_rows_are_named_as_for_training(task, row, message, tokenizer, tmp_path):
    path = write(tmp_path / "held.jsonl", [{"prompt": "q", "raw_answers": ['{"slots": {}}']}, row])
    with pytest.raises(ValueError, match=rf"held\.jsonl: line 2: {message}"):
        read_examples(path, task, Ask(tokenizer))


def test_both_kinds_of_row_get_the_same_completions(checkpoint, tmp_path, monkeypatch):
    """By the command line, and as train.py answers its eval_sets."""
    words = ["stone", "a hat", "rain"]
    chat = [{"messages": [user(f"Repeat: {w}"), answer(w)]} for w in words]
    prompts = [{"prompt": f"User: Repeat: {w}\n\nAssistant:", "raw_answers": [w]} for w in words]
    files = write(tmp_path / "chat.jsonl", chat), write(tmp_path / "prompts.jsonl", prompts)
    named = [word for file in files for word in ("--task", "exact", "--data", str(file))]
    arguments = ["eval.py", "--model", str(checkpoint), *named, "--max_new_tokens", "4"]
    monkeypatch.setattr("sys.argv", [*arguments, "--output", str(tmp_path / "out")])
    main()
    saved = [(tmp_path / f"out/base.exact.{file.name}").read_text() for file in files]
    assert saved[0] == saved[1] and len(saved[0].splitlines()) == 3
    model, tokenizer = load_model(checkpoint, dtype=torch.float32), load_tokenizer(checkpoint)
    one, other = (answer_file(model, tokenizer, "exact", file, 4) for file in files)
    assert one == other == [json.loads(line)["example"] for line in saved[0].splitlines()]
