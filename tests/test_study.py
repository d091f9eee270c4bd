"""The study of what methods learn and forget: its rule, its selections, its tables."""

import sys

import pytest
import torch
from conftest import ROOT, save_with_transformers

sys.path[:0] = [str(ROOT / "benchmarks")]

import study
import study_report

from checkpoint import load_model
from data import IGNORE, Rows
from model import token_losses


def result(task: float, general: float, rate: float = 1.0, steps: int = 5) -> dict:
    return {
        "task_score": task,
        "general_score": general,
        "learning_rate": rate,
        "steps": steps,
    }


def test_the_rule_takes_the_best_general_score_within_the_tolerance():
    runs = [result(0.90, 0.9, 1e-3), result(0.98, 0.7, 2e-3), result(1.0, 0.6, 4e-3)]
    assert study_report.best(runs) == (2e-3, 5)
    assert study_report.best(runs[:1] + runs[2:]) == (4e-3, 5)
    # Full fine-tuning that ends early needs the task score of ESFT, not its own best one.
    early = [result(0.5, 0.9, steps=1), result(0.89, 0.8, steps=2), result(0.99, 0.7, steps=3)]
    assert study_report.best(early, least=0.9) == (1.0, 2)
    assert study_report.best(early[:1], least=0.9) == (1.0, 1)


SCORES = {
    "token_scores": {
        "1": {"0": 0.15, "1": 0.1, "2": 0.4, "3": 0.35},
        "2": {"0": 0.1, "1": 0.1, "2": 0.1, "3": 0.7},
        "3": {"0": 0.1, "1": 0.09, "2": 0.06, "3": 0.75},
    },
}
SCORES["gate_scores"] = {
    i: {e: v / 2 for e, v in s.items()} for i, s in SCORES["token_scores"].items()
}


def test_selections_have_as_many_experts_as_the_token_score_selects():
    general = {"gate_scores": {i: dict.fromkeys("0123", 0.1) for i in "123"}}
    general["gate_scores"]["1"] |= {"2": 0.5}  # what all text uses counts less
    importance = {i: {"0": 5.0, "1": 1.0, "2": 2.0, "3": 3.0} for i in "123"}
    chosen = study.selections(SCORES, general, importance, seed=0)
    assert chosen["token"] == {"1": [2], "2": [3], "3": [3]}
    assert chosen["relative"] == {"1": [3], "2": [3], "3": [3]}
    assert chosen["gradient"] == {"1": [0], "2": [0], "3": [0]}
    assert chosen["lowest"] == {"1": [1], "2": [0], "3": [2]}
    for experts in chosen.values():
        assert [len(experts[i]) for i in "123"] == [1, 1, 1]


def test_the_same_number_in_every_layer():
    """What is left over goes where the next expert has the highest score."""
    scores = SCORES["token_scores"]
    assert study.even_counts(scores, 6) == {"1": 2, "2": 2, "3": 2}
    assert study.even_counts(scores, 4) == {"1": 2, "2": 1, "3": 1}
    assert study.even_counts(scores, 5) == {"1": 2, "2": 2, "3": 1}
    assert study.highest(scores, {"1": 2, "2": 2, "3": 1}) == {"1": [2, 3], "2": [3, 0], "3": [3]}


def test_gradient_times_weight_is_how_the_loss_changes_as_an_expert_shrinks(tmp_path, monkeypatch):
    """The derivative of the loss for a factor on an expert's weights, by differences, of each
    micro-batch."""
    save_with_transformers(tmp_path, 1)
    model = load_model(tmp_path, dtype=torch.float64, experts="loop")
    monkeypatch.setattr(study, "BATCH", 1)
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.vocab_size, (2, 12), generator=draw)
    rows = Rows(tokens, tokens.clone(), torch.zeros_like(tokens))
    rows.labels[:, :6] = IGNORE
    importance = study.gradient_importance(model, rows)
    layer, expert = str(model.config.moe_layers[0]), "1"
    weights = list(model.model.layers[int(layer)].mlp.experts[int(expert)].parameters())

    def losses(factor: float) -> torch.Tensor:
        with torch.no_grad():
            for weight in weights:
                weight *= factor
            found = [token_losses(model, p.tokens, p.labels)[0].mean() for p in rows.split(1)]
            for weight in weights:
                weight /= factor
        return torch.stack(found)

    step = 1e-2  # the losses are float32
    expected = ((losses(1 + step) - losses(1 - step)) / (2 * step)).abs().sum().item()
    assert expected > 0 and importance[layer][expert] == pytest.approx(expected, rel=2e-3)


def test_the_table_tells_rivals_from_other_skills():
    skills = dict.fromkeys(
        ("parse", "json", "copy", "add", "sort", "fact", "count", "reverse", "translate"), 1.0
    )
    skills["sequence"] = 0.5
    assert study_report.mean_of_skills([{"skills": skills | {"json": 0.0}}], "intent") == (
        0.5,
        0.9375,
    )
    before = {"task": "intent", "part": "test", "skills": skills}
    runs = [
        {"task": "intent", "method": "token", "skills": skills | {"parse": 0.0, "copy": copy}}
        for copy in (0.4, 0.6)
    ]
    results = {"size": "4M", "before": [before], "testing": runs}
    (line,) = study_report.forgetting_of(results)
    # parse lost 1, copy 0.5 on average: two thirds of the loss are the rivals'
    assert line.endswith("| parse, json | 0.500 | 0.062 | 67% |")


@pytest.mark.parametrize(
    "task, general, verdict",
    [
        (0.9, [0.80, 0.82], "better"),
        (0.9, [0.71, 0.73], "as good"),
        (0.9, [0.60, 0.62], "worse"),
        (0.8, [0.80, 0.82], "worse"),
    ],
)
def test_a_selection_is_better_by_more_than_both_deviations(task, general, verdict):
    runs = [{"method": "token", "task": "sum", **result(0.9, value)} for value in (0.70, 0.72)]
    runs += [{"method": "even", "task": "sum", **result(task, value)} for value in general]
    (line,) = study_report.selections_of({"size": "4M", "testing": runs})
    assert line.split(" | ")[2] == "same number in every layer" and line.endswith(f" {verdict} |")
