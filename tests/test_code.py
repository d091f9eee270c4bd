"""Programs: completions of every shape become the program that they mean."""

import pytest
from published_rows import HUMAN_EVAL, MBPP, MBPP_SANITIZED, PLAIN, read_row

from chat import read_rows
from files import write_lines
from tasks import read_examples, score
from tasks.code import program
from tasks.sandbox import run_programs

JUNK = [  # what base models go on with; each would break the program
    "\n\ndef other(x):\n    return (",
    "\n\nprint(undefined_name)\n",
    "\n# Tests\nassert False\n",
    "\nif __name__ == '__main__':\n    main(",
    "\n\nclass Other:\n    x = (",
    "\n\n@undefined_name\ndef other(x):\n    return x\n",
    "\n```\n\nThis solves it:\n```python\nx = (\n```\n",
    "\n\ndef {entry}(x):\n    return (",  # the same function again, cut off
]


def continuation(i: int, row: dict) -> str:
    return row["canonical_solution"]


def with_junk(i: int, row: dict) -> str:
    return row["canonical_solution"] + JUNK[i % len(JUNK)].replace("{entry}", row["entry_point"])


def whole_function(row: dict) -> str:
    """Without the imports and helpers that the prompt has before it."""
    return row["prompt"][row["prompt"].index(f"def {row['entry_point']}(") :] + (
        row["canonical_solution"].rstrip()
    )


def in_a_fence(i: int, row: dict) -> str:
    before = ["", "First:\n```bash\npip install numpy\n```\nThen:\n\n", "```\n>>> x = (\n```\n"]
    language = ["python", "Python", "py", "", "python3"]
    return (
        f" Sure! {before[i % 3]}```{language[i % 5]}\n{whole_function(row)}\n```\n\nIt is called "
        "so:\n\n```python\nprint(undefined_name)\n```\nGood luck!"
    )


def unended(i: int, row: dict) -> str:
    """In a fence that does not end, or without one; a space comes first, as in the chat format."""
    return [" ", " ```python\n"][i % 2] + whole_function(row)


def body_in_a_fence(i: int, row: dict) -> str:
    example = ["", "\n\nprint(undefined_name)"][i % 2]
    body = row["canonical_solution"].rstrip() + example
    return f"The body is\n```python\n{body}\n```\nas asked."


def empty(i: int, row: dict) -> str:
    return ""


def without_code(i: int, row: dict) -> str:
    return ["\n", "    ", "```python\n", "I cannot.", " ```\nno\n```"][i % 5]


@pytest.fixture(scope="module")
def verdicts():
    """Runs programs with their tests; equal ones run once, as many shapes lead to one program."""
    known = {}

    def run(pairs: list[tuple[str, str]]) -> list[str]:
        pairs = [(solution.rstrip(), test) for solution, test in pairs]
        new = list(dict.fromkeys(pair for pair in pairs if pair not in known))
        known.update(zip(new, run_programs(new)))
        return [known[pair] for pair in pairs]

    return run


@pytest.mark.skipif(not HUMAN_EVAL.exists(), reason="HumanEval is not here")
@pytest.mark.parametrize(
    "complete, passing",
    [
        (continuation, True),
        (with_junk, True),
        (in_a_fence, True),
        (unended, True),
        (body_in_a_fence, True),
        (empty, False),
        (without_code, False),
    ],
)
def test_humaneval_solutions_in_every_shape(complete, passing, verdicts):
    rows = [row for _, row in read_rows(HUMAN_EVAL)]
    examples = read_examples(HUMAN_EVAL, "humaneval", PLAIN)
    examples = [
        e | {"raw_prediction": complete(i, row)} for i, (e, row) in enumerate(zip(examples, rows))
    ]
    said = verdicts([(program(e), e["test"]) for e in examples])
    wrong = {r["task_id"]: line for r, line in zip(rows, said) if (line == "passed") != passing}
    assert (len(rows), wrong) == (164, {})


NODE = "class Node:\n    def __init__(self, value):\n        self.value = value\n\n"
TOTAL = NODE + "def total(n):\n    return n.value"
ROOT = "def root(x):\n    return x ** 0.5"


@pytest.mark.parametrize(
    "row, completion, passes",
    [
        (MBPP, TOTAL, True),
        (MBPP, f"{TOTAL}\n[DONE]\n\nYou are an expert", True),
        (MBPP, f" {TOTAL}", True),  # the space of the chat format
        (MBPP, f"Here:\n```python\n{TOTAL}\n```\nDone. [DONE]", True),
        (MBPP, f"```\npip install x\n```\n```python\n{TOTAL}\n```", True),
        (MBPP, "def total(n):\n    return n.value", False),  # the set-up needs Node
        (MBPP, TOTAL.replace("n.value", "4"), False),  # of two tests one fails
        (MBPP, "", False),
        (MBPP_SANITIZED, ROOT, True),  # the test imports math
        (MBPP_SANITIZED, f"```python\n{ROOT}\n```\n[DONE]", True),
        (MBPP_SANITIZED, ROOT.replace("0.5", "2"), False),
    ],
)
def test_mbpp_by_hand(row, completion, passes, tmp_path):
    example = read_row(tmp_path, "mbpp", row) | {"raw_prediction": completion}
    result = score("mbpp", [example])
    assert (result.mean, result.records[0]["result"] == "passed") == (passes, passes)


def test_of_mbpp_the_published_test_split_is_read(tmp_path):
    path = tmp_path / "mbpp.jsonl"
    rows = [{**MBPP, "task_id": n, "code": str(n)} for n in (10, 11, 510, 511)]
    write_lines(path, rows)
    examples = read_examples(path, "mbpp", PLAIN)
    assert [example["raw_answers"] for example in examples] == [["11"], ["510"]]
