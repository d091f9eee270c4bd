"""Heat maps in text, and which experts tasks share."""

import json
import sys

import pytest
from conftest import ROOT

import overlap
from pictures import heat_map_text

SCORES = {"token_scores": {"10": {"0": 0.0, "1": 0.4, "2": 0.1}, "9": {"0": 0.2, "1": 0.0, "2": 0}}}


def test_a_heat_map_in_text_by_hand():
    """0.4 is the highest; a quarter of it is one shade of four. Layers are in order of numbers."""
    assert heat_map_text(SCORES, "token", {"9": [0, 2], "10": []}).split("\n") == [
        "token scores of 3 experts, from 0 to █ 0.400; ^ selected",
        "layer",
        "    9 ▒",
        "      ^ ^",
        "   10  █░",
    ]
    assert "selected" not in heat_map_text(SCORES, "token", {})
    many = {"token_scores": {"1": {str(e): e / 200 for e in range(130)}}}
    lines = heat_map_text(many, "token", {"1": [63, 65]}).split("\n")[2:]
    assert [line[:6] for line in lines] == ["    1 ", "      ", "  +64 ", "      ", " +128 "]
    assert lines[1].index("^") == 6 + 63 and lines[3].index("^") == 6 + 1 and lines[4][6:] == "██"
    zero = {"token_scores": {"1": {"0": 0.0, "1": 0.0}}}
    assert heat_map_text(zero, "token", {}).endswith("\n    1")


def run(monkeypatch, capsys, *words) -> list[list[str]]:
    """Returns the words of each line that overlap.py prints."""
    monkeypatch.setattr(sys, "argv", ["overlap.py", *map(str, words)])
    overlap.main()
    return [line.split() for line in capsys.readouterr().out.splitlines()]


def test_experts_that_tasks_share_by_hand(tmp_path, monkeypatch, capsys):
    """Layer 1 shares two experts, layer 2 none."""
    selections = {"law": {"1": [3, 5, 7], "2": [0]}, "code": {"1": [7, 3], "2": [1, 2]}}
    files = []
    for name, experts in selections.items():
        (tmp_path / name).mkdir()
        files.append(tmp_path / name / "expert_cfg.json")
        files[-1].write_text(json.dumps({"experts": experts}))
    plot = tmp_path / "plot.png"
    said = run(monkeypatch, capsys, *files, "--plot", plot)
    assert said[0][-3:] == ["of", "2", "layers:"] and said[-1] == ["wrote", str(plot)]
    table = [["law", "code"], ["law", "2.00", "1.00"], ["code", "1.00", "2.00"]]
    assert said[1:4] == table and plot.read_bytes().startswith(b"\x89PNG")

    scores = [tmp_path / "a.scores.json", tmp_path / "b.scores.json"]
    scores[0].write_text(json.dumps(SCORES))  # the two highest: 1 and 2 of layer 10, 0 and 1 of 9
    other = {layer: {"0": 0.5, "1": 0.1, "2": 0.4} for layer in ("9", "10")}
    scores[1].write_text(json.dumps({"token_scores": other}))
    assert run(monkeypatch, capsys, *scores, "--top", 2)[1:] == [
        ["a", "b"],
        ["a", "2.00", "1.00"],
        ["b", "1.00", "2.00"],
    ]


@pytest.mark.parametrize(
    "content, more, said",
    [
        ('{"experts": {"2": [1]}}', [], "b.json: has other layers than "),
        (
            '{"experts": {"1": ["1"]}}',
            [],
            "b.json: experts: layer '1' must be a list of expert ids",
        ),
        ('{"experts": {"1": [-1]}}', [], "b.json: experts: layer '1' must be a list of expert ids"),
        ('{"experts": {"1": [2, 2]}}', [], "b.json: experts: layer '1' must be a list of exper"),
        ('{"token_scores": {}}', [], "b.json: field experts must be"),
        ("[]", [], "b.json: field experts must be"),
        ('{"experts": {"1": [1]}}', ["--top", "-1"], "--top is -1; a number of experts"),
        (
            '{"experts": {"1": [1]}}',
            ["--score", "gate"],
            "--score is gate; no effect without --top",
        ),
        ('{"experts": {"1": [1]}}', ["--top", "1"], "a.json: field token_scores must be"),
    ],
)
def test_wrong_selections_are_named(content, more, said, tmp_path, monkeypatch, capsys):
    (tmp_path / "a.json").write_text('{"experts": {"1": [1]}}')
    (tmp_path / "b.json").write_text(content)
    with pytest.raises(SystemExit, match=said):
        run(monkeypatch, capsys, tmp_path / "a.json", tmp_path / "b.json", *more)


def test_the_published_selections_hardly_overlap(monkeypatch, capsys):
    files = [
        ROOT.parent / f"shared/data/esft/expert_cfg_{t}.json" for t in ("intent", "translation")
    ]
    if not files[0].exists():
        pytest.skip("the published files are not here")
    diagonal, off = ("4.77", "3.19"), "0.38"  # 124 and 83 experts of 26 layers
    rows = run(monkeypatch, capsys, *files)[2:]
    assert (rows[0][1], rows[1][2]) == diagonal and rows[0][2] == rows[1][1] == off
