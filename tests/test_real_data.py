"""ESFT's published intent data with DeepSeek's tokenizer, through the whole job on a small random
checkpoint."""

import json

import pytest
from conftest import SHARED, save_with_transformers
from test_data import deepseek_tokenizer

from chat import load_tokenizer
from data import IGNORE, encode_file
from train import train
from training.config import TrainConfig

pytestmark = pytest.mark.skipif(not SHARED.exists(), reason="the published data is not here")


def test_published_intent_data_end_to_end(tmp_path):
    base = tmp_path / "base"
    save_with_transformers(
        base,
        seed=1,
        vocab_size=129_280,
        first_k_dense_replace=1,
        num_experts_per_tok=2,
        n_routed_experts=64,
    )
    deepseek_tokenizer(base)
    rows = (SHARED / "esft/eval_intent.jsonl").read_text().splitlines()
    (tmp_path / "eval.jsonl").write_text("\n".join(rows[:3]))
    config = TrainConfig(
        model=str(base),
        data=str(SHARED / "esft/train_intent.jsonl"),
        output_dir=str(tmp_path / "run"),
        seq_length=256,
        batch_size=2,
        gradient_accumulation_steps=2,
        steps=3,
        learning_rate=1e-2,
        n_sample_tokens=2048,
        eval_steps=100,
        validation_fraction=0.002,
        dtype="float32",
        eval_sets=[f"intent:{tmp_path / 'eval.jsonl'}"],
        max_new_tokens=4,
        device="cpu",
    )
    config.check()
    results = train(config)
    scores = json.loads((tmp_path / "run/expert_cfg.scores.json").read_text())
    assert scores["token_scores"].keys() == {"1", "2"}
    assert all(sum(layer.values()) == pytest.approx(1) for layer in scores["token_scores"].values())
    losses = [
        json.loads(line)["loss"]
        for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    ]
    assert losses[-1] < losses[0]
    completions = [
        json.loads(line)
        for line in (tmp_path / "run/eval/after.1.eval.jsonl").read_text().splitlines()
    ]
    assert (
        len(completions) == 3
        and completions[0]["example"]["prompt"] == json.loads(rows[0])["prompt"]
    )
    assert [c["score"] for c in completions] == [0, 0, 0]  # weights are random
    assert results["after"][config.eval_sets[0]]["count"] == 3


def test_ids_and_labels_of_the_published_data_by_hand(tmp_path):
    """The paper's format written out: the begin of sequence, the question, the answer and the end of
    sequence, each encoded alone, as the original code does."""
    tokenizer = load_tokenizer(deepseek_tokenizer(tmp_path), "deepseek_v2")
    path = SHARED / "esft/train_intent.jsonl"
    rows = [json.loads(line)["messages"] for line in path.read_text().splitlines()]
    asked = [f"User: {question['content'].strip()}\n\nAssistant:" for question, _ in rows]
    answered = [f" {answer['content'].strip()}" for _, answer in rows]
    bos, eos = map(
        tokenizer.inner.token_to_id, ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>")
    )
    expected = [
        ([bos, *asked, *answer, eos], [bos] + [IGNORE] * len(asked) + [*answer, eos])
        for asked, answer in zip(tokenizer.encode_all(asked), tokenizer.encode_all(answered))
    ]
    assert len(rows) == 7280 and encode_file(path, tokenizer) == expected
