"""What a row says: layouts, roles, keys that change what is learned, begin and end of sequence; and
files, rows and steps from which nothing is learned."""

import json
import random
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, SHARED
from test_train import settings

import data
import train
from chat import load_tokenizer
from chat.template import ENVIRONMENT
from checkpoint import load_model
from data import IGNORE, encode_file, shown
from tasks import Ask, answer_file, read_examples
from training.config import TrainConfig
from training.inputs import prepare_rows

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(ROOT / "demo/base")


def read(rows, tokenizer, path):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return encode_file(path, tokenizer)


def text(row, tokenizer, tmp_path) -> str:
    (sample,) = read([row], tokenizer, tmp_path / "rows.jsonl")
    return shown(sample, tokenizer)


def user(content, **more):
    return {"role": "user", "content": content, **more}


def answer(content, **more):
    return {"role": "assistant", "content": content, **more}


PLAIN = f"{BOS}User: Copy: ring\n\nAssistant:« ring{EOS}»"


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [user("Copy: ring"), answer("ring")], "id": "7", "source": {"file": "a"}},
        {"messages": [user("Copy: ring", id=3), answer("ring", name=None, tool_calls=[])]},
        {
            "conversations": [
                {"from": "human", "value": "Copy: ring"},
                {"from": "gpt", "value": "ring"},
            ]
        },
        {"conversations": [user("Copy: ring"), answer("ring")], "system": "", "tools": None},
        {"instruction": "Copy: ring", "input": "", "output": "ring"},
        {"instruction": "Copy: ring", "output": "ring", "history": [], "messages": None},
        {"prompt": "User: Copy: ring\n\nAssistant:", "completion": " ring"},
        # a begin and an end of sequence that are there already
        {"prompt": f"{BOS}User: Copy: ring\n\nAssistant:", "completion": f" ring{EOS}"},
        {"messages": [user(f"{BOS}Copy: ring"), answer(f"ring{EOS}")]},
        {"messages": [user("Copy: ring"), answer(f" ring {EOS}\n{EOS} ")]},
        {"messages": [user(f" {BOS}Copy: ring"), answer("ring")]},
        {"prompt": "User: Copy: ring\n\nAssistant:", "completion": f" ring{EOS}{EOS}\n"},
        {"instruction": f"{BOS}Copy: ring", "output": f"ring{EOS}"},
    ],
)
def test_layouts_of_the_same_conversation_give_the_same_sample(row, tokenizer, tmp_path):
    assert text(row, tokenizer, tmp_path) == PLAIN


@pytest.mark.parametrize(
    "row, expected",
    [
        (
            {"instruction": "Sort", "input": "b a", "output": "a b", "system": "Brief."},
            f"{BOS}Brief.\n\nUser: Sort\nb a\n\nAssistant:« a b{EOS}»",
        ),
        (
            {"system": "French.", "messages": [user("Hello"), answer("Bonjour")]},
            f"{BOS}French.\n\nUser: Hello\n\nAssistant:« Bonjour{EOS}»",
        ),
        (
            {"conversations": [{"from": "system", "value": "s"}, {"from": "gpt", "value": "a"}]},
            f"{BOS}s\n\nAssistant:« a{EOS}»",
        ),
        (
            {"messages": [user("a"), user("b"), answer("c")]},
            f"{BOS}User: a\n\nUser: b\n\nAssistant:« c{EOS}»",
        ),
        (
            {"messages": [answer("a"), answer("b"), user("c"), answer("d")]},
            f"{BOS}Assistant:« a{EOS}»Assistant:« b{EOS}»User: c\n\nAssistant:« d{EOS}»",
        ),
        ({"prompt": f"  {BOS}q", "completion": "a"}, f"  {BOS}q«a{EOS}»"),  # as V2.5's template
        (
            {"messages": [user("q"), answer("no", weight=0, loss=True), user("r"), answer("ok")]},
            f"{BOS}User: q\n\nAssistant: no{EOS}User: r\n\nAssistant:« ok{EOS}»",
        ),
        (
            {"messages": [user("q"), answer("bad", weight=0), user("r"), answer("good", weight=1)]},
            f"{BOS}User: q\n\nAssistant: bad{EOS}User: r\n\nAssistant:« good{EOS}»",
        ),
        (
            {
                "messages": [
                    user("q", loss=False),
                    answer("bad", loss=False),
                    user("r", mask=0),
                    answer("ok", loss=True, mask=0),
                ]
            },
            f"{BOS}User: q\n\nAssistant: bad{EOS}User: r\n\nAssistant:« ok{EOS}»",
        ),
    ],
)
def test_what_a_row_says_is_what_is_learned(row, expected, tokenizer, tmp_path):
    assert text(row, tokenizer, tmp_path) == expected


TURN = [user("q"), answer("a")]


@pytest.mark.parametrize(
    "row, message",
    [
        ({"messages": TURN, "weight": 0}, "field weight is 0; it is not read"),
        ({"messages": TURN, "weight": 0.5}, r"field weight is 0.5; it is not read"),
        ({"messages": TURN, "tools": [{"name": "f"}]}, "field tools is .*; it is not read"),
        (
            {"messages": TURN, "sytem": "Brief."},
            r"field sytem is 'Brief.'; it is not read \(did you mean system",
        ),
        ({"messages": TURN, "prompt": "q"}, "field prompt is 'q'; it is not read"),
        (
            {"messages": [user("q"), answer("a", tool_calls=[{"id": 1}])]},
            r"messages\[1\]: field tool_calls is",
        ),
        (
            {"messages": [user("q"), answer("a", reasoning_content="r")]},
            r"messages\[1\]: field reasoning_content is 'r'",
        ),
        (
            {"messages": [user("q", name="Ann"), answer("a")]},
            r"messages\[0\]: field name is 'Ann'; it is not read",
        ),
        (
            {"messages": [user("q"), answer("a", weight=0.5)]},
            r"messages\[1\]: field weight is 0.5; must be 0 or 1",
        ),
        (
            {"messages": [user("q"), answer("a", loss="no")]},
            r"messages\[1\]: field loss is 'no'; must be 0 or 1",
        ),
        (
            {"messages": [user("q"), answer("a", mask=[1])]},
            r"messages\[1\]: field mask is \[1\]; must be 0 or 1",
        ),
        (
            {"messages": [user("q", weight=1), answer("a")]},
            r"messages\[0\]: field weight is 1; only answers",
        ),
        (
            {"messages": [{"role": "tool", "content": "x"}, answer("a")]},
            r"messages\[0\]: field role is 'tool'; must be",
        ),
        (
            {"conversations": [{"from": "observation", "value": "x"}]},
            r"conversations\[0\]: field from is 'observation'; must be",
        ),
        (
            {"conversations": [{"from": "human", "value": None}]},
            r"conversations\[0\]: field value is None; a string",
        ),
        (
            {"system": "a", "messages": [{"role": "system", "content": "b"}, *TURN]},
            r"messages\[0\]: field role is 'system'; only",
        ),
        ({"instruction": "q", "output": ["a"]}, "field output is .*; a string"),
        ({"instruction": "q", "output": "a", "input": 3}, "field input is 3; a string"),
        ({"prompt": "q", "completion": "a", "mask": 1}, "field mask is 1; it is not read"),
        ({"messages": [user("q"), answer(EOS)]}, r"messages\[1\]: field content is empty"),
        ({"prompt": "q", "completion": f" {EOS}"}, "field completion is empty"),
        ({"instruction": "q", "output": ""}, "field output is empty"),
        ({"conversations": []}, r"field conversations is \[\]"),
        (
            {"system": "s", "messages": [user("q"), answer("")]},
            r"messages\[1\]: field content is empty",
        ),
        (
            {"messages": [user("q", reasoning_content="r"), answer("a")]},
            r"messages\[0\]: field reas",
        ),
        (
            {"messages": [user("q"), answer("a", weight=1, loss=True, mask=2)]},
            r"messages\[1\]: field mask is 2",
        ),
        ({"chosen": "a", "rejected": "b"}, "field messages is missing"),
    ],
)
def test_what_would_be_passed_over_is_refused(row, message, tokenizer, tmp_path):
    with pytest.raises(ValueError, match=f"rows.jsonl: line 2: {message}"):
        read([{"messages": TURN}, row], tokenizer, tmp_path / "rows.jsonl")


def test_an_answer_that_is_not_learned_leaves_nothing_of_its_sample_to_learn(tokenizer, tmp_path):
    masked = {"messages": [user("q"), answer("a", mask=1)]}
    (first, labels), _ = read([masked, {"messages": TURN}], tokenizer, tmp_path / "rows.jsonl")
    assert first[0] == tokenizer.bos_id and set(labels) == {IGNORE}
    with pytest.raises(ValueError, match="rows.jsonl: holds no answer to learn from"):
        read([masked, masked], tokenizer, tmp_path / "rows.jsonl")


def test_data_py_shows_what_is_learned(tmp_path, monkeypatch, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": [user("Copy: ring"), answer("ring")]}) + "\n" * 2)
    arguments = ["--model", str(ROOT / "demo/base"), "--data", str(path), "--show", "2"]
    monkeypatch.setattr(sys, "argv", ["data.py", *arguments])
    data.main()
    out = capsys.readouterr().out
    assert PLAIN in out and "samples: 1, with nothing to learn: 0; tokens: " in out
    assert "chat format: deepseek_v2" in out and "next: python train.py" in out
    path.write_text("{}")
    with pytest.raises(SystemExit, match="rows.jsonl: line 1: field messages is missing"):
        data.main()


def test_mutated_rows_end_in_samples_or_in_errors_that_name_the_line(tokenizer, tmp_path):
    """500 rows. What is learned of a row that passes stands in the row."""
    draw, path = random.Random(0), tmp_path / "rows.jsonl"
    rows = [
        {"messages": [user("a"), answer("b"), user("c"), answer("d", weight=1)], "id": 1},
        {"conversations": [{"from": "human", "value": "e"}, {"from": "gpt", "value": "f"}]},
        {"instruction": "g", "input": "h", "output": "i", "system": "j"},
        {"prompt": "k", "completion": "l"},
    ]
    values = [None, "", "x", 0, 1, 0.5, True, [], {}, ["x"], {"x": 1}, "\ud800", EOS, BOS, "user"]
    names = ["messages", "role", "content", "from", "value", "weight", "loss", "mask", "system"]
    names += ["tool_calls", "completion", "output", "id", "other"]

    def mutate(value):
        if isinstance(value, dict) and value and draw.random() < 0.7:
            name = draw.choice([*value, draw.choice(names)])
            return value | {name: mutate(value.get(name))}
        if isinstance(value, list) and value and draw.random() < 0.7:
            at = draw.randrange(len(value))
            return [*value[:at], mutate(value[at]), *value[at + draw.choice([0, 1, 1, 2]) :]]
        return draw.choice(values)

    passed = 0
    for _ in range(500):
        row = mutate(draw.choice(rows))
        line = json.dumps(row)
        path.write_text(draw.choice([line] * 9 + [line[: draw.randrange(len(line))] + "\n{"]))
        try:
            ((ids, labels),) = encode_file(path, tokenizer)
        except ValueError as error:
            assert "rows.jsonl: " in str(error)
            continue
        learned = tokenizer.decode([label for label in labels[1:] if label != IGNORE])
        assert all(letter in line for letter in learned) and len(ids) == len(labels)
        passed += 1
    assert 100 < passed < 450


@pytest.mark.skipif(not (SHARED.parent / "cases").exists(), reason="the shared cases are not here")
def test_reported_rows(tokenizer):
    cases = SHARED.parent / "cases"
    assert encode_file(cases / "double_bos/rendered_train.jsonl", tokenizer) == encode_file(
        cases / "double_bos/messages_train.jsonl", tokenizer
    )
    with pytest.raises(ValueError, match=r"line 3: messages\[1\]: field tool_calls"):
        encode_file(cases / "ignored_keys/rows.jsonl", tokenizer)
    with pytest.raises(ValueError, match="all_masked.jsonl: holds no answer to learn from"):
        encode_file(cases / "masked/all_masked.jsonl", tokenizer)


def test_rows_with_nothing_to_learn_are_left_out_and_long_samples_are_said(
    tokenizer, tmp_path, capsys
):
    """Each sample fills a row of its own; the masked ones would be steps that learn nothing."""
    path, long = tmp_path / "rows.jsonl", "ring knife " * 40
    rows = [{"messages": [user(long), answer("ring", mask=n % 2)]} for n in range(8)]
    samples = read(rows, tokenizer, path)
    config = SimpleNamespace(data=str(path), seq_length=32, seed=0, random_concat_ratio=0.2)
    config.validation_data, config.validation_fraction = "", 0.0
    for config.document_mask in (False, True):
        kept, _ = prepare_rows(config, samples, tokenizer)
        assert len(kept.tokens) == 4 and (kept.learned == 2).all()
        out = capsys.readouterr().out
        cut = sum(len(ids) - 32 for ids, _ in samples)
        assert f"8 of 8 samples are longer than a row of 32 tokens; they lose {cut} of" in out
        assert f"{path}: 4 of 8 rows hold nothing to learn; left out" in out
    config.validation_data = str(tmp_path / "held.jsonl")
    (tmp_path / "held.jsonl").write_text(json.dumps(rows[1]))
    with pytest.raises(ValueError, match="held.jsonl: holds no answer to learn from"):
        prepare_rows(config, samples, tokenizer)
    longer = {"messages": [user("q"), answer("a"), user(long), answer("b", mask=1)]}
    samples = read([longer], tokenizer, path)  # what is learned does not fit into a row
    with pytest.raises(ValueError, match="rows.jsonl: holds no answer to learn from in rows"):
        prepare_rows(config, samples, tokenizer)


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({}, 100_000),
        ({"n_sample_tokens": 10}, 10),
        ({"expert_config": "cfg.json"}, 2**13),
        ({"method": "lora"}, 2**13),
        ({"method": "full", "n_sample_tokens": 10}, 10),
    ],
)
def test_scores_that_select_nothing_take_few_tokens(changes, expected):
    assert TrainConfig(**{"n_sample_tokens": 100_000} | changes).scored_tokens == expected


def test_text_that_begins_or_ends_already_is_asked_and_scored_as_if_it_did_not(tokenizer, tmp_path):
    """In decoding, choices and judged tasks: a begin of sequence in the prompt, an end in the
    reference answer."""
    model = load_model(ROOT / "demo/base", dtype=torch.float32)
    prompt = "User: Copy: ring knife\n\nAssistant:"
    rows = {
        "exact": {"prompt": prompt, "raw_answers": ["ring knife"]},
        "choice": {"prompt": prompt, "choices": ["ring knife", "cloud"], "answer": 0},
        "summary": {"prompt": prompt, "raw_answers": ["ring knife"]},
        "loss": {"prompt": prompt, "completion": " ring knife"},
    }
    path = tmp_path / "rows.jsonl"
    for task, row in rows.items():
        carries = row | {"prompt": BOS + prompt}
        if task == "summary":
            carries |= {"raw_answers": [f"ring knife{EOS}"]}
        if task == "loss":
            carries |= {"completion": f" ring knife{EOS}"}
        path.write_text(f"{json.dumps(row)}\n{json.dumps(carries)}\n")
        plain, carried = answer_file(model, tokenizer, task, path, max_new_tokens=8)
        for name in plain.keys() - {"prompt", "raw_answers"}:
            assert carried[name] == pytest.approx(plain[name]), (task, name)


CHATML = (
    "{% for m in messages %}{{ '[' + m.role + ']' + m.content + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def test_a_run_on_a_template_shows_its_first_sample_and_belongs_to_its_rows(
    tmp_path, capsys, monkeypatch
):
    base, rows = tmp_path / "base", tmp_path / "rows.jsonl"
    shutil.copytree(ROOT / "demo/base", base)
    (base / "chat_template.jinja").write_text(CHATML)
    rows.write_text(json.dumps({"messages": [user("Copy: ring"), answer("ring")]}))
    changes = {"validation_data": str(rows), "batch_size": 1, "gradient_accumulation_steps": 1}
    config = settings(base, rows, tmp_path / "run", **changes, steps=1, save_steps=1)
    train.train(config)
    out = capsys.readouterr().out
    assert f"chat format: template ({base}/chat_template.jinja); the first sample" in out
    assert f"[user]Copy: ring{EOS}[assistant]«ring{EOS}»" in out
    (base / "chat_template.jinja").write_text(CHATML.replace("[", "<"))
    with pytest.raises(
        ValueError, match="holds a run of another config: rows by the chat template"
    ):
        train.train(config)
    (base / "chat_template.jinja").write_text(CHATML + "{{ strftime_now('%d') }}")
    config = settings(base, rows, tmp_path / "dated", **changes, steps=1, save_steps=1)
    for day, refused in (("1", False), ("1", False), ("2", True)):
        monkeypatch.setitem(ENVIRONMENT.globals, "strftime_now", lambda form, day=day: day)
        if refused:
            with pytest.raises(ValueError, match="another config: rows by the chat template"):
                train.train(config)
        else:
            train.train(config)
    long = [(list(range(2, 900)), [IGNORE] * 898)]
    text = data.first_sample(long, load_tokenizer(base, "deepseek_v2"))
    assert text.startswith("chat format: deepseek_v2; the first") and 900 < len(text) < 1100


def test_a_run_with_given_experts_scores_few_tokens_for_its_report(tmp_path, monkeypatch, capsys):
    rows, cfg, asked = tmp_path / "rows.jsonl", tmp_path / "cfg.json", []
    rows.write_text(json.dumps({"messages": TURN}) + "\n")
    cfg.write_text(json.dumps({"experts": {"1": [3]}}))
    draw = train.sample_tokens
    monkeypatch.setattr(train, "sample_tokens", lambda *a: asked.append(a[1]) or draw(*a))
    changes = {"validation_data": str(rows), "batch_size": 1, "gradient_accumulation_steps": 1}
    for name, given in (("own", {}), ("given", {"expert_config": str(cfg)})):
        run = settings(ROOT / "demo/base", rows, tmp_path / name, **changes, **given, steps=1)
        train.train(run)
    assert asked == [131_072, 131_072, 8_192, 8_192]  # before and after training
    out, length = capsys.readouterr().out, len(encode_file(rows, load_tokenizer(run.model))[0][0])
    assert out.count(f"== scoring on {length} tokens of {rows}") == 4


def test_the_first_token_of_joined_samples_is_kept_where_no_begin_of_sequence_stands(tmp_path):
    """With a format that writes none, the first token is a part of a header."""
    shutil.copytree(ROOT / "demo/base", tmp_path / "base")
    (tmp_path / "base/chat_template.jinja").write_text(CHATML)
    tokenizer = load_tokenizer(tmp_path / "base")
    samples = read([{"messages": TURN}] * 40, tokenizer, tmp_path / "rows.jsonl")
    config = SimpleNamespace(data="rows", seq_length=len(samples[0][0]) * 40, seed=0)
    config.validation_data, config.validation_fraction, config.document_mask = "", 0.0, False
    config.random_concat_ratio = 0.9
    rows, _ = prepare_rows(config, samples, tokenizer)
    assert rows.tokens.tolist() == [samples[0][0] * 40]


def test_the_task_loss_leaves_out_rows_without_an_answer(tokenizer, tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    rows = [{"messages": [user("q"), answer("a", mask=n % 2)]} for n in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(read_examples(path, "loss", Ask(tokenizer))) == 2
    assert f"{path}: 2 of 4 rows have no answer to score; left out" in capsys.readouterr().out


def test_choices_need_something_before_them(tmp_path):
    shutil.copytree(ROOT / "demo/base", tmp_path / "base")
    (tmp_path / "base/chat_template.jinja").write_text(CHATML)
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "", "choices": ["ring", "a map"], "answer": 0}))
    model = load_model(ROOT / "demo/base", dtype=torch.float32)
    with pytest.raises(ValueError, match="a prompt is empty, and nothing begins a sequence"):
        answer_file(model, load_tokenizer(tmp_path / "base"), "choice", path)
