"""Decoding against transformers and against itself, metrics by hand, rescoring of published
completions."""

import json

import pytest
import torch
from conftest import SHARED, save_with_transformers

import eval as evaluation
from data import load_tokenizer
from eval import Decoder, generate, read_examples, rescore, score_exact, score_intent
from model import MoE, experts_for_few, experts_loop, largest, load_model


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_greedy_decoding_equals_transformers_for_any_batch(seed, family, tmp_path, monkeypatch):
    oracle = save_with_transformers(tmp_path, seed, family=family)
    model = load_model(tmp_path, dtype=torch.float32)
    draw = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(0, 96, (n,), generator=draw).tolist() for n in (1, 4, 9, 30, 4, 17)]

    def transformers_greedy(prompt, eos_id):
        out = oracle.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt)),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=eos_id,
            pad_token_id=0,
        )
        new = out[0, len(prompt) :].tolist()
        return new[: new.index(eos_id)] if eos_id in new else new

    endless = [transformers_greedy(prompt, eos_id=95) for prompt in prompts]
    eos_id = endless[2][3]  # a token that ends some of the rows early
    expected = [transformers_greedy(prompt, eos_id) for prompt in prompts]
    assert len({len(row) for row in expected}) > 1
    for batch_size in (1, 3, 6):
        assert generate(model, prompts, 12, eos_id, batch_size) == expected
    monkeypatch.setattr(
        evaluation, "PREFILL_TOKENS", 40
    )  # the prompts of a batch in several passes
    assert generate(model, prompts, 12, eos_id) == expected


@torch.inference_mode()
def test_a_decoder_serves_batch_after_batch_and_stops_early(tmp_path):
    save_with_transformers(tmp_path, seed=1)
    model = load_model(tmp_path, dtype=torch.float32)
    prompts = [[5, 6, 7], [8], [9, 10]]
    alone = [generate(model, [prompt], 12, 95)[0] for prompt in prompts]
    decoder = Decoder(model, rows=3, length=3 + 12, max_new_tokens=12, eos_id=95)
    assert decoder(prompts) == alone
    for _ in range(2):  # with idle rows
        assert decoder(prompts[1:2]) == alone[1:2] and decoder(prompts) == alone
    eos_id = alone[0][3]
    ending = Decoder(model, rows=2, length=3 + 12, max_new_tokens=12, eos_id=eos_id)
    assert ending(prompts[:1]) == [alone[0][: alone[0].index(eos_id)]]
    assert ending.count == alone[0].index(eos_id) + 1 < 12


def random_moe(directory, family: str = "deepseek_v2") -> MoE:
    save_with_transformers(directory, seed=3, family=family)
    model = load_model(directory, dtype=torch.float32)
    return next(block.mlp for block in model.model.layers if isinstance(block.mlp, MoE))


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
@pytest.mark.parametrize("rows", [1, 3, 40])
@torch.no_grad()
def test_the_paths_of_few_tokens_equal_the_loop(family, rows, tmp_path):
    """As they are and as torch.compile reads them, in which the gate chooses otherwise, too; with
    experts that moved in their stacks."""
    moe = random_moe(tmp_path, family)
    moe.put_first([5, 2])
    x = torch.randn(rows, moe.down.shape[1], generator=torch.Generator().manual_seed(rows))
    weights, indices, _ = moe.gate(x)
    expected = experts_loop(moe, x, weights, indices)

    def few(x):
        weights, indices, _ = moe.gate(x)
        return experts_for_few(moe, x, weights, moe.places[indices]), indices

    for run in (few, torch.compile(few, backend="eager", dynamic=False)):
        got, chosen = run(x)
        torch.testing.assert_close(got, expected)
        assert torch.equal(chosen, indices)


def test_the_largest_as_the_compiler_reads_it():
    scores = torch.tensor([[1.0, 3.0, 2.0, 3.0, -torch.inf], [torch.nan] * 5])
    compiled = torch.compile(largest, backend="eager", dynamic=False)(scores, 3)
    assert compiled[0].tolist() == [1, 3, 2]  # of equals the first
    assert compiled[1].max() < 5  # an expert that is there


@torch.no_grad()
def test_an_expert_that_is_not_chosen_cannot_spoil_the_others(tmp_path):
    moe = random_moe(tmp_path)
    moe.gate_up[2] = 1e30  # its activation overflows
    x = torch.ones(3, moe.down.shape[1])
    indices, weights = torch.tensor([[0, 1]]).expand(3, -1), torch.full((3, 2), 0.5)
    expected = experts_loop(moe, x, weights, indices)
    torch.testing.assert_close(experts_for_few(moe, x, weights, indices), expected)


def test_an_empty_prompt_is_refused(checkpoint):
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        generate(load_model(checkpoint), [[1], []], 3, eos_id=1)


@pytest.mark.parametrize(
    "prediction, score",
    [
        (' {"intent": "A", "slots": {"x": "1", "y": ["p", "q"]}}。\n\nmore', 1),
        ('{"intent": "A", "slots": {"y": ["q", "p"], "x": "1"}}', 1),  # order does not matter
        (
            '```json\n{"intent": "A", "slots": {"x": " 1", "y": ["p ", "q"]}}\n```',
            1,
        ),  # spaces are dropped
        ('{"intent": "B", "slots": {"x": "1", "y": ["p", "q"]}}', 0),
        ('{"intent": "A", "slots": {"x": "1"}}', 0),
        ('{"intent": "A", "slots": {"x": "1", "y": ["p", "q"], "z": "2"}}', 0),
        ('{"intent": "A", "slots": {"x": 1, "y": ["p", "q"]}}', 0),
        ('{"intent": "A", "slots": 5}', 0),
        ('["A"]', 0),
        ("A", 0),
        ("", 0),
        ("```json", 0),
        ("[" * 100_000, 0),
    ],
)
def test_intent_by_hand(prediction, score):
    assert (
        score_intent(prediction, ['{"intent": "A", "slots": {"x": "1", "y": ["p", "q"]}}']) == score
    )


def test_exact_by_hand():
    assert score_exact(" 42\n", ["41", "42"]) == 1
    assert score_exact("42 is it", ["42"]) == 0


@pytest.mark.skipif(not SHARED.exists(), reason="the published completions are not here")
def test_published_completions_get_their_published_scores():
    result, equal = rescore(SHARED / "esft/completions_token_intent.jsonl", "intent")
    assert (equal, result.count, result.mean) == (500, 500, 0.76)


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
        yield range(len(prompts)), prompts

    monkeypatch.setattr(evaluation, "generate_batches", echo)
    tokenizer = load_tokenizer(checkpoint)
    model = load_model(checkpoint)
    examples = evaluation.answer_file(model, tokenizer, "exact", eval_file)
    result = evaluation.score("exact", examples)
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
    for source in (["--model", "none", "--data"], ["--rescore"]):
        arguments = [*source, str(eval_file), "--task", "exact", "--output", str(eval_file)]
        monkeypatch.setattr("sys.argv", ["eval.py", *arguments])
        with pytest.raises(SystemExit, match="is read by this command"):
            evaluation.main()
    assert eval_file.read_bytes() == before


def test_loss_task_equals_transformers(tmp_path, chat_file):
    from conftest import save_tokenizer
    from data import encode_file

    oracle = save_with_transformers(tmp_path, seed=1, vocab_size=258)
    save_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    total, count = 0.0, 0
    for ids, labels in encode_file(chat_file, tokenizer):
        learned = sum(label >= 0 for label in labels[1:])
        total += oracle(torch.tensor([ids]), labels=torch.tensor([labels])).loss.item() * learned
        count += learned
    model = load_model(tmp_path, dtype=torch.float32)
    result = evaluation.score("loss", evaluation.answer_file(model, tokenizer, "loss", chat_file))
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


@pytest.mark.parametrize("field, value", [("model_type", "deepseek_v32"), ("vocab_size", None)])
@pytest.mark.parametrize("command", ["eval", "select_experts"])
def test_commands_refuse_a_config_by_field(
    command, field, value, checkpoint, chat_file, tmp_path, monkeypatch
):
    import importlib
    import shutil

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
