"""The study of what methods learn and forget: its rule, its selections, its tables."""

import argparse
import sys

import pytest
import torch
from conftest import ROOT, save_with_transformers

sys.path[:0] = [str(ROOT / "benchmarks")]

import study
import study_report

from checkpoint import load_model
from data import IGNORE, Rows
from files import write_json
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
    run = {"skills": skills | {"json": 0.0}}
    assert study_report.mean_of_skills(run, "intent") == (0.5, 0.9375)
    before = {"task": "intent", "part": "test", "seed": 3, "skills": skills}
    other = before | {"seed": 4, "skills": skills | {"parse": 0.5}}  # each base with itself
    runs = [
        {"task": "intent", "method": "token", "seed": seed, "skills": skills | lost}
        for seed, lost in ((3, {"parse": 0.2, "copy": 0.2}), (4, {"parse": 0.5, "copy": 1.0}))
    ]
    results = {"size": "4M", "before": [before, other], "tested": runs}
    (line,) = study_report.forgetting_of(results)
    # parse loses 0.8 and nothing, one of two rivals; copy the same, one of eight others
    assert line.endswith("| ESFT-Token, p = 0.2 | 0.200 ± 0.283 | 0.050 ± 0.071 |")


def compared(task: float, general: list[float]) -> tuple[str, str, str]:
    """The comparison of a selection with ESFT-Token on two bases, of which one forgets more."""
    runs = []
    for seed, (value, theirs) in enumerate(zip(general, (0.4, 0.8))):
        runs.append({"method": "token", "task": "sum", "seed": seed, **result(0.92, theirs)})
        runs.append({"method": "even", "task": "sum", "seed": seed, **result(task, value)})
    (found,) = study_report.selections_of({"size": "4M", "tested": runs})
    return found


@pytest.mark.parametrize(
    "task, general, verdict",
    [
        (0.92, [0.50, 0.86], "better"),  # gains 0.1 and 0.06: the bases themselves do not count
        (0.90, [0.50, 0.86], "better"),
        (0.92, [0.50, 0.78], "as good"),
        (0.92, [0.35, 0.70], "worse"),
        (0.89, [0.50, 0.86], "worse"),
    ],
)
def test_a_selection_is_better_by_more_than_its_gains_vary(task, general, verdict):
    method, found, row = compared(task, general)
    assert (method, found) == ("even", verdict) and row.endswith(f" {verdict} |")


def test_a_selection_beats_another_if_it_is_never_worse():
    better, worse = ("even", "better", ""), ("even", "worse", "")
    as_good = ("even", "as good", "")
    assert "; beats" in study_report.beats("even", [better, better, as_good])
    assert "does not beat" in study_report.beats("even", [better, better, worse])
    assert "does not beat" in study_report.beats("even", [better, as_good])
    assert "does not beat" in study_report.beats("even", [])
    assert "; beats" in study_report.beats("even", [better, ("gradient", "worse", "")])


def test_a_rate_at_the_edge_of_those_tried_is_marked():
    tuning = [{"task": "sum", "method": "full", "learning_rate": rate} for rate in (1, 2, 4)]
    others = [{"task": "sum", "method": "lora"}, {"task": "order", "method": "full"}]
    results = {"tuning": tuning + [other | {"learning_rate": 8} for other in others]}
    marks = [study_report.edge_of(results, run) for run in tuning]
    assert marks == [" (edge)", "", " (edge)"]


def test_a_study_that_was_cut_off_says_what_was_tuned(tmp_path, capsys):
    with pytest.raises(SystemExit, match="has no study_SIZE.json with runs"):
        study_report.report(tmp_path, ["4M"])
    tuning = [
        {"task": "sum", "method": method, "steps": 9, **result(*scores, rate)}
        for method, rate, scores in (
            ("full", 1.0, (0.95, 0.9)),
            ("full", 2.0, (0.99, 0.7)),
            ("full", 4.0, (1.0, 0.6)),
            ("lora", 1.0, (0.5, 0.9)),
        )
    ]
    write_json(tmp_path / "study_4M.json", {"size": "4M", "tuning": tuning})
    assert study_report.report(tmp_path, ["4M", "26M"]) == []
    said = capsys.readouterr().out
    assert "| 4M | sum | full fine-tuning | 2 | 0.990 | 0.700 |" in said
    assert "| 4M | sum | LoRA, rank 8, scaling 2 | 1 | 0.500 | 0.900 |" in said


def of_size(tmp_path, **changes) -> study.Study:
    given = {"work": str(tmp_path), "device": "cpu", "first_seed": 0, "seeds": 3} | changes
    return study.Study(given.pop("name", "4M"), argparse.Namespace(**given))


def test_results_of_other_seeds_or_bases_are_not_mixed(tmp_path):
    path = tmp_path / "study_4M.json"
    study.Progress(of_size(tmp_path), path, None).save()
    study.Progress(of_size(tmp_path), path, None)
    with pytest.raises(SystemExit, match="study_4M.json: is of another seeds; choose another"):
        study.Progress(of_size(tmp_path, first_seed=3), path, None)
    progress = study.Progress(of_size(tmp_path), path, None)
    progress.results["pretraining"] = [{"seed": 1}]
    progress.save()
    with pytest.raises(SystemExit, match="base-1: is missing, but pretrained"):
        study.Progress(of_size(tmp_path), path, None)
    last = of_size(tmp_path, name="118M", first_seed=5)
    assert {last.base(seed).name for seed in (5, 6, 7)} == {"base-5"}
