"""Likelihoods of choices and of reference answers, against transformers."""

import json
import string

import pytest
import tokenizers
import torch
from conftest import save_tokenizer, save_with_transformers
from published_rows import BOS, EOS, write_rows

from chat import load_tokenizer
from checkpoint import load_model
from tasks import TASKS, Ask, answer_file, read_examples, score
from tasks.choice import choice_likelihoods


@pytest.fixture(autouse=True)
def one_thread():
    """So small models gain nothing from a second thread, and wait for it on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=[1, 2])
def base(request, tmp_path_factory):
    """A random base's folder and transformers' model of it."""
    path = tmp_path_factory.mktemp("base")
    oracle = save_with_transformers(path, request.param, vocab_size=258)
    save_tokenizer(path)
    return path, oracle


@torch.no_grad()
def answer_logits(oracle, given: list[int], answer: list[int]) -> torch.Tensor:
    """transformers' log-probabilities (tokens of the answer, vocabulary), of this sequence alone,
    and each before its own token."""
    logits = oracle(torch.tensor([given + answer])).logits[0]
    return logits.double().log_softmax(-1)[len(given) - 1 : -1]


def log_likelihood(oracle, given: list[int], answer: list[int]) -> float:
    return answer_logits(oracle, given, answer)[range(len(answer)), answer].sum().item()


# prompt, choices, how each goes on behind the prompt, which one is right
CHOICES = [
    ("2 + 2 =\nA. 3\nB. 4\nAnswer:", ["A", "B", "C", "D"], [" A", " B", " C", " D"], 1),
    ("The cat", ["sat on the mat.", "is", "ate it"], [" sat on the mat.", " is", " ate it"], 0),
    ("It ends with a space: ", ["x", "xyz", "Xyz"], ["x", "xyz", "Xyz"], 1),
    ("马克打了他。\n答案：", ["是", "不是"], ["是", "不是"], 0),
    ("中文, then Latin：", ["right", "一二三"], ["right", "一二三"], 1),
    ("Go", ["left", "on and on and on and on"], [" left", " on and on and on and on"], 1),
]


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_choices_score_as_transformers_has_them(base, batch_size, tmp_path):
    path, oracle = base
    encode = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json")).encode
    expected, hits, normalised_hits = [], 0, 0
    for prompt, choices, texts, right in CHOICES:
        given = [BOS, *encode(prompt).ids]
        logs = [log_likelihood(oracle, given, encode(text).ids) for text in texts]
        by_letter = [log / len(choice) for log, choice in zip(logs, choices)]
        expected.append(logs)
        hits += max(logs) == logs[right]
        normalised_hits += max(by_letter) == by_letter[right]
    assert hits != normalised_hits  # or the test could not tell them apart
    rows = [{"prompt": p, "choices": c, "answer": right} for p, c, _, right in CHOICES]
    data = write_rows(tmp_path / "choices.jsonl", rows)
    model, ask = load_model(path, dtype=torch.float32), Ask(load_tokenizer(path))
    examples = read_examples(data, "choice", ask)
    answered = [e for _, e in TASKS["choice"].predict(model, ask, examples, 0, batch_size)]
    result = score("choice", answered)
    for record, logs, (_, choices, _, _) in zip(result.records, expected, CHOICES):
        example = record["example"]
        assert example["loglikelihoods"] == pytest.approx(logs, rel=1e-4)
        assert example["raw_prediction"] == choices[logs.index(max(logs))]
    assert result.metrics == {
        "accuracy": pytest.approx(hits / len(CHOICES)),
        "normalised": pytest.approx(normalised_hits / len(CHOICES)),
    }


def test_a_choice_that_merges_with_the_prompt_counts_from_the_merged_token(tmp_path):
    """The last byte of 题 and the first of 是 are one token of this tokenizer: what differs from
    the prompt's own tokens begins one token earlier, for both choices."""
    oracle = save_with_transformers(tmp_path, 1, vocab_size=259)
    save_tokenizer(tmp_path)
    file = tmp_path / "tokenizer.json"
    (last, first) = (tokenizers.Tokenizer.from_file(str(file)).encode(c).tokens for c in "题是")
    raw = json.loads(file.read_text())
    raw["model"]["vocab"][last[-1] + first[0]] = 258
    raw["model"]["merges"] = [[last[-1], first[0]]]
    file.write_text(json.dumps(raw))
    encode = tokenizers.Tokenizer.from_file(str(file)).encode
    prompt, merged, plain = (encode(text).ids for text in ("问题", "问题是", "问题不是"))
    assert merged[: len(prompt)] != prompt and merged[len(prompt) - 1] == 258
    assert plain[: len(prompt)] == prompt
    given, known = [BOS, *prompt[:-1]], len(prompt) - 1
    expected = [log_likelihood(oracle, given, ids[known:]) for ids in (merged, plain)]
    example = {"prompt": "问题", "choices": ["是", "不是"]}
    model = load_model(tmp_path, dtype=torch.float32)
    (found,) = choice_likelihoods(model, load_tokenizer(tmp_path), [example])
    assert found == pytest.approx(expected, rel=1e-4)


def half_likely(oracle, tokenizer, given: list[int], space: str) -> str:
    """Two letters of which greedy decoding would choose the second, or an accuracy would be 0."""
    for letter in string.ascii_letters:
        answer = tokenizer.encode(space + letter).ids
        likeliest = answer_logits(oracle, given, [*answer, EOS])[-1].argmax().item()
        if (second := tokenizer.decode([likeliest])) in string.ascii_letters:
            return letter + second


@pytest.mark.parametrize("chat_format, space", [("deepseek_v2", " "), ("deepseek_v3", "")])
def test_without_a_judge_loss_and_accuracy_of_references_are_transformers(
    base, chat_format, space, tmp_path
):
    path, oracle = base
    tokenizer = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    rows, loss, hits, count = [], 0.0, 0, 0
    for question, rest in (("Sum up: ab", ""), ("翻译", ", a longer one"), ("?", "。")):
        prompt = f"User: {question}\n\nAssistant:"
        given = [BOS, *tokenizer.encode(prompt).ids]
        text = half_likely(oracle, tokenizer, given, space) + rest
        answer = [*tokenizer.encode(space + text).ids, EOS]
        logs = answer_logits(oracle, given, answer)
        loss -= logs[range(len(answer)), answer].sum().item()
        hits += (logs.argmax(1) == torch.tensor(answer)).sum().item()
        count += len(answer)
        rows.append({"prompt": prompt, "raw_answers": [text, "not this one"]})
    assert 3 <= hits < count
    model, tokenizer = load_model(path, dtype=torch.float32), load_tokenizer(path, chat_format)
    data = write_rows(tmp_path / "summary.jsonl", rows)
    result = score("summary", answer_file(model, tokenizer, "summary", data, max_new_tokens=1))
    assert result.metrics == {
        "reference loss": pytest.approx(loss / count, rel=1e-4),
        "reference accuracy": pytest.approx(hits / count),
    }
    assert (result.missing, [record["score"] for record in result.records]) == (3, [None] * 3)
