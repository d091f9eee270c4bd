"""Scores and selection against a table worked out by hand and against the published selections."""

import json

import pytest
import torch
from conftest import SHARED
from rank_pool import run_command_on_ranks
from test_model import small_moe

import select_experts
from chat import load_tokenizer
from checkpoint import load_model
from data import encode_file, sample_tokens
from model import MoE
from select_experts import (
    SelectionConfig,
    choose,
    collect_scores,
    describe,
    read_scores,
    scoring_batches,
    select,
)


class FixedGate(torch.nn.Module):
    """Routes token t as the table says; the weights are scaled, the scores must not be."""

    table = {  # token: [(expert, gate), (expert, gate)]
        1: [(0, 0.50), (1, 0.30)],
        2: [(0, 0.60), (2, 0.20)],
        3: [(2, 0.40), (3, 0.30)],
    }

    def forward(self, tokens):
        routes = [self.table[t] for t in tokens.flatten().tolist()]
        indices = torch.tensor([[e for e, _ in route] for route in routes])
        scores = torch.zeros(len(routes), 4)
        for row, route in zip(scores, routes):
            for expert, gate in route:
                row[expert] = gate
        return 2.5 * scores.gather(1, indices), indices, scores


@pytest.fixture
def table_model(monkeypatch):
    """A model of one MoE layer whose gate reads the tokens themselves."""
    config, (model,) = small_moe(
        ["loop"],
        n_routed_experts=4,
        num_experts_per_tok=2,
        num_hidden_layers=1,
        first_k_dense_replace=0,
        topk_method="greedy",
        routed_scaling_factor=2.5,
    )
    model.model.layers[0].mlp.gate = FixedGate()
    gate = model.model.layers[0].mlp.gate
    monkeypatch.setattr(model, "hidden_states", lambda tokens, watch: watch(0, gate(tokens)[:2]))
    return model


# Sample A is the token 1; sample B is 2, 3, 3, and padding of token 1 that must not count.
BATCHES = [(torch.tensor([[1, 1, 1, 1], [2, 3, 3, 1]]), torch.tensor([1, 3]))]


def test_scores_by_hand_over_tokens(table_model):
    scores = collect_scores(table_model, BATCHES, "tokens")
    # four tokens: 1, 2, 3, 3; eight slots: expert 0 twice, 1 once, 2 three times, 3 twice
    assert scores["token_scores"]["0"] == {"0": 2 / 8, "1": 1 / 8, "2": 3 / 8, "3": 2 / 8}
    expected = {
        "0": (0.5 + 0.6) / 4,
        "1": 0.3 / 4,
        "2": (0.2 + 0.4 + 0.4) / 4,
        "3": (0.3 + 0.3) / 4,
    }
    assert scores["gate_scores"]["0"] == pytest.approx(expected)


def test_scores_by_hand_over_samples(table_model):
    scores = collect_scores(table_model, BATCHES, "samples")
    # A: slots (1/2, 1/2, 0, 0); B: (1/6, 0, 3/6, 2/6)
    assert scores["token_scores"]["0"] == pytest.approx(
        {"0": 1 / 3, "1": 1 / 4, "2": 1 / 4, "3": 1 / 6}
    )
    expected = {"0": (0.5 + 0.6 / 3) / 2, "1": 0.3 / 2, "2": 1.0 / 3 / 2, "3": 0.6 / 3 / 2}
    assert scores["gate_scores"]["0"] == pytest.approx(expected)


def test_scores_do_not_depend_on_how_samples_are_batched(checkpoint):
    model = load_model(checkpoint, dtype=torch.float32)
    draw = torch.Generator().manual_seed(0)
    samples = [torch.randint(0, 250, (n,), generator=draw).tolist() for n in (3, 9, 5)]
    for average in ("tokens", "samples"):
        together = collect_scores(model, select_experts.scoring_batches(samples, 1), average)
        alone = collect_scores(
            model, [(torch.tensor([s]), torch.tensor([len(s)])) for s in samples], average
        )
        for name in together:
            assert together[name].keys() == {"1", "2"}  # layer 0 is dense
            for layer in together[name]:
                assert together[name][layer] == pytest.approx(alone[name][layer], abs=1e-6)
                if name == "token_scores":
                    assert sum(together[name][layer].values()) == pytest.approx(1)
    assert not any(m.gate._forward_hooks for m in model.modules() if isinstance(m, MoE))


def scores_of(*values):
    layer = {"1": {str(e): v for e, v in enumerate(values)}}
    return {"token_scores": layer, "gate_scores": layer}


@pytest.mark.parametrize(
    "values, top_p, expected",
    [
        ([0.1, 0.4, 0.2, 0.3], 0.4, [1]),
        ([0.1, 0.4, 0.2, 0.3], 0.41, [1, 3]),
        ([0.2, 0.3, 0.2, 0.3], 0.7, [1, 3, 0]),  # ties go to the lower id
        ([0.1, 0.1, 0.1, 0.7], 0.9, [3, 0, 1]),
        ([0.1] * 10, 0.3, [0, 1, 2]),  # 0.1 + 0.1 + 0.1 is not 0.3 in binary, yet three suffice
        ([0.2, 0.1], 1.0, [0, 1]),  # gate scores need not sum to 1: all are taken
    ],
)
def test_selection_by_hand(values, top_p, expected):
    assert select(scores_of(*values), "token", top_p) == {"1": expected}


@pytest.mark.skipif(not SHARED.exists(), reason="the published score files are not here")
@pytest.mark.parametrize("task, total", [("intent", 124), ("translation", 83)])
def test_published_selections(task, total, tmp_path, monkeypatch, capsys):
    output = tmp_path / "expert_cfg.json"
    monkeypatch.setattr(
        "sys.argv",
        [
            "select_experts.py",
            "--scores",
            str(SHARED / f"esft/scores_{task}.json"),
            "--output",
            str(output),
        ],
    )
    select_experts.main()
    published = json.loads((SHARED / f"esft/expert_cfg_{task}.json").read_text())
    mine = json.loads(output.read_text())
    assert mine == published and len(mine["experts"]) == 26
    assert f"selected {total} of 1664 experts" in capsys.readouterr().out


def test_layers_are_described_in_their_order():
    scores = {"token_scores": {"10": {"0": 0.25, "1": 0.75}, "9": {"0": 0.5, "1": 0.5}}}
    text = describe(select(scores, "token", 0.6), scores, "token")
    rows = [line.split() for line in text.split("\n")]
    assert rows[1:3] == [["9", "2", "1.000", "0", "1"], ["10", "1", "0.750", "1"]]


def test_controls_have_the_same_number_in_every_layer():
    rows = {"1": [0.1, 0.4, 0.1, 0.4], "2": [0.7, 0.1, 0.2, 0.0]}
    scores = {
        "token_scores": {i: {str(e): v for e, v in enumerate(row)} for i, row in rows.items()}
    }

    def chosen(selection: str, seed: int = 0) -> dict:
        config = SelectionConfig(score="token", top_p=0.5, selection=selection, seed=seed)
        return choose(scores, config)["experts"]

    assert chosen("highest") == {"1": [1, 3], "2": [0]}
    assert chosen("lowest") == {"1": [0, 2], "2": [3]}
    drawn = [chosen("random", seed) for seed in range(20)]
    assert all(len(set(d["1"])) == 2 and len(d["2"]) == 1 for d in drawn)
    assert drawn[0] == chosen("random", 0)
    assert {e for d in drawn for e in d["1"]} == {0, 1, 2, 3}


def test_command_line_from_a_model(checkpoint, chat_file, tmp_path, monkeypatch, capsys):
    output = tmp_path / "cfg.json"
    arguments = [
        "select_experts.py",
        "--output",
        str(output),
        "--score",
        "gate",
        "--average",
        "samples",
        "--top_p",
        "0.15",
        "--shared_experts",
    ]
    monkeypatch.setattr(
        "sys.argv",
        [
            *arguments,
            "--model",
            str(checkpoint),
            "--data",
            str(chat_file),
            "--dtype",
            "float32",
            "--plot",
            str(tmp_path / "scores.png"),
        ],
    )
    select_experts.main()
    first = json.loads(output.read_text())
    assert first["shared_experts"] and not first["non_expert_modules"]
    assert (tmp_path / "scores.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "wrote" in printed and "next: python train.py" in printed
    # the saved scores give the same selection again
    monkeypatch.setattr("sys.argv", [*arguments, "--scores", str(tmp_path / "cfg.scores.json")])
    select_experts.main()
    assert json.loads(output.read_text()) == first


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["--scores", "x.json", "--output", "o", "--top_p", "0"],
            "top_p is 0.0; must be above 0 and at most 1",
        ),
        (["--scores", "x.json", "--output", "o", "--top_p", "2"], "top_p is 2.0"),
        (["--model", "m", "--output", "o"], "give --model and --data, or --scores alone"),
        (["--scores", "x.json", "--output", "x.json"], "x.json: this command reads it"),
    ],
)
def test_impossible_arguments(arguments, message, monkeypatch):
    monkeypatch.setattr("sys.argv", ["select_experts.py", *arguments])
    with pytest.raises(SystemExit, match=f"^error: {message}"):
        select_experts.main()


def test_bad_score_files(tmp_path):
    path = tmp_path / "scores.json"
    for value, message in (
        ({}, "field token_scores"),
        ({"token_scores": {"1": {"0": "high"}}}, "layer '1'"),
        ({"token_scores": {"1": {"0": 1.0}, "2": {"0": 0.5, "1": 0.5}}}, "layer '2'"),
        ({"gate_scores": {"1": {"0": 1.0}}}, "field token_scores"),
    ):
        path.write_text(json.dumps(value))
        with pytest.raises(ValueError, match=f"scores.json: .*{message}"):
            read_scores(path, "token")
    assert read_scores(path, "gate") == value  # a score that is not used may be missing


def test_processes_that_share_the_samples_give_the_scores_of_one(tmp_path, checkpoint, monkeypatch):
    """Three processes and two batches, so that one has nothing to do."""
    rows = [{"prompt": f"{i} " * 20, "completion": str(i * i)} for i in range(400)]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    samples = encode_file(data, load_tokenizer(checkpoint))
    sequences = sample_tokens(samples, 30000, 4096, seed=0)
    assert len(list(scoring_batches(sequences, 0))) == 2
    command = ["select_experts.py", "--model", str(checkpoint), "--data", str(data)]
    command += ["--n_sample_tokens", "30000", "--output"]
    monkeypatch.setattr("sys.argv", [*command, str(tmp_path / "1.json")])
    select_experts.main()
    done = run_command_on_ranks(3, tmp_path, *command, str(tmp_path / "3.json"))
    assert all(rank["status"] == 0 for rank in done), done
    assert [rank["stdout"].count("wrote") for rank in done] == [1, 0, 0]
    assert (tmp_path / "1.json").read_bytes() == (tmp_path / "3.json").read_bytes()
    alone, shared = (json.loads((tmp_path / f"{n}.scores.json").read_text()) for n in (1, 3))
    assert alone["token_scores"] == shared["token_scores"]  # sums of whole numbers
    for layer, scores in alone["gate_scores"].items():
        assert shared["gate_scores"][layer] == pytest.approx(scores, rel=1e-12)
