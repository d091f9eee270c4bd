"""The task `math`: rows and folders as published, the last box of an answer, and the equality of
answers by MATH's rules."""

import json

import pytest
from published_rows import CHAT, PLAIN, read_row, write_rows

from eval import rescore
from files import write_lines
from tasks import TASKS, read_examples, score
from tasks.competition import are_equal, last_box, score_math, simplified

HALF = {
    "problem": "What is half of $3$?",
    "level": "Level 1",
    "type": "Prealgebra",
    "solution": "Half of it is $\\boxed{\\frac{3}{2}}$.",
}
FIVE_HUNDRED = {
    "problem": "Find $2^3$.",
    "solution": "It is $\\boxed{08}$ or so.",
    "answer": "8",
    "subject": "Number Theory",
    "level": 2,
    "unique_id": "test/number_theory/7.json",
}


def test_rows_by_hand(tmp_path):
    assert read_row(tmp_path, "math", HALF) == {
        "prompt": "Problem:\nWhat is half of $3$?\n\nSolution:",
        "raw_answers": ["\\frac{3}{2}"],
        "subject": "Prealgebra",
    }
    assert read_row(tmp_path, "math", FIVE_HUNDRED, CHAT) == {
        "prompt": "User: Find $2^3$.\nPlease reason step by step, and put your final answer within "
        "\\boxed{}.\n\nAssistant:",
        "raw_answers": ["8"],
        "subject": "Number Theory",
    }
    bare = {"problem": "1?", "solution": "\\boxed 1"}
    assert read_row(tmp_path, "math", bare).keys() == {"prompt", "raw_answers"}


def write_problems(folder, problems: dict[str, str]):
    for name, problem in problems.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        row = HALF | {"problem": problem, "type": name.split("/")[-2].title()}
        (folder / name).write_text(json.dumps(row, indent=4))


def test_the_published_folder_is_read_in_order(tmp_path):
    """Numbers are sorted as numbers. Of the whole folder, the test's split is evaluated, and the
    examples are of the train's."""
    names = ["geometry/10.json", "geometry/9.json", "algebra/200.json"]
    write_problems(tmp_path, {f"test/{name}": f"test {name}" for name in names})
    write_problems(tmp_path, {f"train/{name}": f"train {name}" for name in names})
    for folder in (tmp_path, tmp_path / "test"):
        examples = read_examples(folder, "math", PLAIN)
        asked = [e["prompt"].split("\n")[1] for e in examples]
        assert asked == ["test algebra/200.json", "test geometry/9.json", "test geometry/10.json"]
        assert [e["subject"] for e in examples] == ["Algebra", "Geometry", "Geometry"]
    for folder in (tmp_path, tmp_path / "train"):
        shots = PLAIN.with_shots(TASKS["math"].read, folder, 2).shots
        assert [shot.question.split("\n")[1][:7] for shot in shots] == ["train a", "train g"]


@pytest.mark.parametrize(
    "row, message",
    [
        (HALF | {"problem": None}, "field problem is None; a string"),
        (
            HALF | {"solution": "It is $2$."},
            r"field solution ends with 'It is \$2\$\.'; its answer",
        ),
        (HALF | {"solution": "It is \\boxed{2."}, r"field solution ends .*within \\boxed{} is req"),
        (FIVE_HUNDRED | {"answer": 8}, "field answer is 8; a string"),
    ],
)
def test_bad_problems_are_named(row, message, tmp_path):
    path = write_rows(tmp_path / "bad.jsonl", [HALF, row])
    with pytest.raises(ValueError, match=rf"bad\.jsonl: line 2: {message}"):
        read_examples(path, "math", PLAIN)


@pytest.mark.parametrize(
    "text, message",
    [
        ("[]", "must be a JSON object, found"),
        ('{"problem": "p"}', "field solution is None"),
        ("{", ""),
    ],
)
def test_bad_files_of_a_folder_are_named(text, message, tmp_path):
    write_problems(tmp_path, {"test/algebra/1.json": "fine"})
    (tmp_path / "test/algebra/2.json").write_text(text)
    with pytest.raises(ValueError, match=rf"test/algebra/2\.json: .*{message}"):
        read_examples(tmp_path, "math", PLAIN)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty: holds no test/TYPE/N\.json"):
        read_examples(tmp_path / "empty", "math", PLAIN)


@pytest.mark.parametrize(
    "text, inside",
    [
        ("so $\\boxed{4}$, no: $\\boxed{5}$.", "5"),
        ("\\boxed{\\frac{1}{\\sqrt{2}}} is it", "\\frac{1}{\\sqrt{2}}"),
        ("\\fbox{7} alone", "7"),
        ("\\boxed{6} and \\fbox{7}", "6"),
        ("\\boxed {8}", "8"),
        ("$\\boxed 9$ eggs for $3", "9"),
        ("\\boxed{1} then \\boxed{2", None),  # cut off
        ("\\boxed{}", ""),
        ("no box, 3", None),
        ("", None),
    ],
)
def test_last_boxes_by_hand(text, inside):
    assert last_box(text) == inside


@pytest.mark.parametrize(
    "one, other, equal",
    [
        # from MATH's own test of its rules, and more of the same kind
        ("\\tfrac{1}{2} +\\! x", "\\frac12+x", True),
        ("10\\text{ units}", "10 ", True),
        ("10\\text{units}", "10", False),  # a unit has a space before it
        ("3\\text{ ft} 2\\text{ in}", "3", False),
        ("\\left(1,\\, 2\\right)", "(1,\\,2)", True),
        (".5", "1/2", True),
        ("x = 0.5", "\\frac{1}{2}", True),
        ("xyz=3", "3", False),
        ("a=b=3", "3", False),
        ("\\frac1{72}", "\\dfrac{1}{72}", True),
        ("\\frac{72}1", "\\frac{72}{1}", False),
        ("\\sqrt3+\\sqrt{x}", "\\sqrt{3}+\\sqrt{x}", True),
        ("\\$18.90", "18.90", True),
        ("30^\\circ", "30^{\\circ}", True),
        ("45\\%", "45", True),
        ("45%", "45", False),
        ("-3/4", "\\frac{-3}{4}", True),
        ("03/4", "\\frac{03}{4}", False),
        ("a / b", "a/b", True),
        ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\begin{pmatrix}1\\2\\end{pmatrix}", True),
        ("{.5}", "{0.5}", True),
        ("\\frac", "\\frac", True),  # not to be read: equal if the texts are
        ("\\frac", "\\frac ", False),
        ("\\sqrt", "\\sqrt", True),
        ("1,000", "1000", False),
        ("2", "2.0", False),
    ],
)
def test_equal_answers_by_hand(one, other, equal):
    assert are_equal(one, other) == are_equal(other, one) == equal


def test_the_simplified_form_by_hand():
    assert simplified("k = \\dfrac12 \\text{ cm}") == "\\frac{1}{2}"
    assert simplified("\\frac{\\frac12}3x") == "\\frac{\\frac{1}{2}}3x"
    assert simplified(" 7/8 ") == "\\frac{7}{8}"


@pytest.mark.parametrize(
    "said, right",
    [
        ("Half is $\\boxed{3/2}$.", 1),
        ("$\\boxed{1.5}$", 0),
        ("3/2", 0),
        (" So $\\boxed{\\dfrac32}$.\n\nProblem:\nWhat is $1$?\n\nSolution: $\\boxed{1}$", 1),
        ("\nProblem: it says half, so \\boxed{3/2}", 1),
    ],
)
def test_completions_by_hand(said, right):
    assert score_math(said, ["\\frac{3}{2}"]) == right


def test_the_result_has_each_type_and_scores_again(tmp_path):
    rows = [HALF, HALF | {"type": "Algebra"}, HALF | {"type": "Algebra", "problem": "Again?"}]
    examples = read_examples(write_rows(tmp_path / "rows.jsonl", rows), "math", PLAIN)
    said = ["\\boxed{3/2}", "\\boxed{3/2}", "<think>\\boxed{3/2}</think> 3"]
    answered = [e | {"raw_prediction": text} for e, text in zip(examples, said)]
    result = score("math", answered)
    assert (result.mean, result.count) == (pytest.approx(2 / 3), 3)
    assert result.groups == {"Prealgebra": 1.0, "Algebra": 0.5}
    write_lines(tmp_path / "saved.jsonl", result.records)
    assert rescore(tmp_path / "saved.jsonl", "math") == (result, 3)
    wrong = {"example": answered[0] | {"subject": 3}}
    with pytest.raises(ValueError, match="line 1: field subject is 3; a string is required"):
        rescore(write_rows(tmp_path / "wrong.jsonl", [wrong]), "math")
