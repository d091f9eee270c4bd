"""Programs: completions of every shape become the program that they mean."""

import time

import pytest
from published_rows import HUMAN_EVAL, MBPP, MBPP_SANITIZED, PLAIN, read_row

from chat import read_rows
from files import write_lines
from tasks import read_examples, score
from tasks.program import program
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


def in_prose(i: int, row: dict) -> str:
    """Without a fence, with words that are no Python, and with one that is."""
    before = ["Here is the function (as you asked):\n\n", "python\n", "It's easy.\n"][i % 3]
    after = ["\n\nIt doesn't need more (I think.\n", "\n\nDone", "\n```\nThat's all."][i % 3]
    return f"{before}{whole_function(row)}{after}"


def corrected(i: int, row: dict) -> str:
    """The first try would end the program: its annotation is undefined."""
    draft = f"def {row['entry_point']}(x: Undefined):\n    return None\n"
    between = ["No, that is wrong.\n", "</think>\n\n"][i % 2]
    return f"```python\n{draft}\n```\n{between}```python\n{whole_function(row)}\n```\n"


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
        (in_prose, True),
        (corrected, True),
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


# ------------------------------------------------------------------------------------------
# By hand: what a model says around its code and in it

ADD = {"prompt": "", "code": 'def add(x):\n    """Adds one."""\n', "entry_point": "add"}
ADD_TEST = "assert add(1) == 2"
WITHOUT_PROMPT = {
    "prompt": "",
    "code": "",
    "entry_point": "",
    "test": ADD_TEST,
}  # as MBPP's examples
RIGHT, WRONG = "def add(x):\n    return x + 1", "def add(x):\n    return x + 3"
HELPER, WITH_HELPER = "def one():\n    return 1", "def add(x):\n    return x + one()"
IN_DOCSTRING = 'def add(x):\n{0}"""As in\n\n{0}{1}\n{0}add(1)\n{0}{1}\n{0}"""\n{0}return x + 1'


def fenced(code: str, language: str = "python", fence: str = "```") -> str:
    return f"{fence}{language}\n{code}\n{fence}\n"


SHAPES = {  # of an answer; each means RIGHT
    # CommonMark's fences: three or more of either mark, more words behind, an indent
    "tildes": f"So:\n{fenced(RIGHT, fence='~~~')}Good.",
    "four backticks": fenced(IN_DOCSTRING.format("  ", "```"), fence="````"),
    "tildes around backticks": fenced(f'"""\n```\n"""\n{RIGHT}', fence="~~~~"),
    "a longer closing fence": f"```python\n{RIGHT}\n`````\nGood.",
    "more words behind": fenced(RIGHT, 'python title="add.py"'),
    "in a list": "1. So:\n\n   ```python\n   def add(x):\n       return x + 1\n   ```\n2. Good.",
    "another block in a list": f"- Do\n   ```sh\n   pip install x\n   ```\n- So\n{fenced(RIGHT)}",
    "fences in another block": fenced(RIGHT) + fenced(f"```\nNo\n```\n{WRONG}", "md", "````"),
    "other line ends": fenced(RIGHT).replace("\n", "\r\n"),
    "no closing fence": f"~~~ py\n{RIGHT}\n",
    "cut off": f"```python\n{RIGHT}\n\ndef other(x):\n    return (",
    # a fence inside a docstring
    "two spaces": fenced(IN_DOCSTRING.format("  ", "```")) + fenced("add(2)", ""),
    "tildes in tildes": fenced(IN_DOCSTRING.format("   ", "~~~"), fence="~~~") + "Good.",
    "at the margin": fenced('def add(x):\n    """As\n```\nadd(1)\n```\n"""\n    return x + 1'),
    # several blocks
    "helper": f"First\n{fenced(HELPER)}then\n{fenced(WITH_HELPER)}",
    "helper after": f"{fenced(WITH_HELPER)}with\n{fenced(HELPER, '')}",
    "imports": fenced("import operator") + fenced("def add(x):\n    return operator.add(x, 1)"),
    "constant": fenced("ONE = int('1')") + fenced("def add(x):\n    return x + ONE"),
    "corrected": f"{fenced(WRONG)}No:\n{fenced(RIGHT)}",
    "corrected but for the helper": fenced(f"{HELPER}\n\n{WRONG}") + fenced(WITH_HELPER),
    "corrected header": fenced("def add(x: No):\n    return x") + fenced(RIGHT),
    "examples of use": fenced("total = add(1)\nprint(no)") + fenced(RIGHT) + fenced("print(no)"),
    "example that imports": fenced(RIGHT) + fenced("from add import add\nprint(add(1))"),
    "import of the answer": fenced(RIGHT) + fenced("from add import add"),
    "shell and output": f"{fenced('pip install x', 'sh')}{fenced(RIGHT)}{fenced('2', '')}",
    "wrong test in the block": fenced(f"{RIGHT}\n\nassert add(1) == 3\nadd(input())"),
    "reads its input": fenced(f"{RIGHT}\n\nx = int(input())\nprint(add(x))"),
    "formula": fenced("sum = x + one", "") + fenced(RIGHT),
    "unit tests": fenced(RIGHT)
    + fenced(
        "import unittest\nfrom solution import add\n\nclass T(unittest.TestCase):\n    a = add(1)"
    ),
    "a main of its own": fenced(RIGHT)
    + fenced("from __main__ import add\n\ndef main():\n    print(add(1))\n\nmain()"),
    "a variant that cannot be loaded": fenced(RIGHT)
    + fenced("import pandas\n\ndef add_frame(x: List[Foo], y=numbers):\n    return x"),
    "a trace that names builtins": fenced(WITH_HELPER.replace("x + ", "sum([x]) + "))
    + fenced(HELPER)
    + fenced("sum = 0\nlen = 3", ""),
    "an alias": fenced(RIGHT.replace("add", "plus") + "\n\nadd = plus"),
    "a lambda": fenced(f"{HELPER}\n\n{HELPER.replace('one', 'two')}\n\nadd = lambda x: x + one()"),
    "a lambda corrects": fenced(WRONG) + fenced("add = lambda x: x + 1"),
    "a method": fenced("class S:\n    def add(self, x):\n        return x + 1\n\nadd = S().add"),
    "a named tuple": fenced("from collections import namedtuple\nP = namedtuple('P', 'n')")
    + fenced("def add(x):\n    return P(x).n + 1"),
    "a setting": fenced(
        f"import sys\nsys.setrecursionlimit(5000)\n{RIGHT}".replace(
            "1", "sys.getrecursionlimit() // 5000"
        )
    ),
    "a deep recursion": fenced(
        "import sys\nsys.setrecursionlimit(5000)\ndef add(x, n=3000):\n"
        "    return add(x, n - 1) if n else x + 1"
    ),
    "everything of a module": fenced("from math import *\ndef add(x):\n    return x + floor(1.5)"),
    "a table": fenced(
        "T = {}\nfor i in range(9):\n    T[i] = i + 1\n\ndef add(x):\n    return T[x]"
    ),
    "a value of its name": fenced(RIGHT) + fenced("add = 2", "") + "\nadd = [1, 2]\n",
    "a counter": fenced("n = 0\n\ndef add(x):\n    global n\n    n += 1\n    return x + n"),
    "an example before": fenced("def add(x):\n    return y\n\nprint(add(1))\n\n" + RIGHT),
    # no fences
    "prose": f"It's simple (really):\n\n{RIGHT}\n\nThis doesn't need more.",
    "long prose": "It's easy.\n" * 60 + RIGHT,
    "words that parse": f"Solution\n\n{RIGHT}\n\nDone",
    "prose between": f"First\n\n{HELPER}\n\nNow it's easy:\n\n{WITH_HELPER}\n\nThat's it.",
    "corrected prose": f"{WRONG}\n\nThat's wrong.\n\n{RIGHT}\n\nGood.",
    "decorated": f"So:\n\nimport functools\n\n@functools.cache\n{RIGHT}\n\nIt's fast.",
    "a lone closing fence": f"{RIGHT}\n```\nThis adds one.",
    "a lone closing fence and an example": f"{RIGHT}\n```\nSo:\n{fenced('def t(): add(1)')}",
    # what comes first, and what does not count
    "future": fenced("from __future__ import annotations\n\n" + RIGHT.replace("x)", "x: No)")),
    "long future": fenced(f"from __future__ import (\n    annotations,\n)\n{RIGHT}"),
    "reasoning": f"<think>\nPerhaps\n{fenced(WRONG)}</think>\n\n{fenced(RIGHT)}",
    "reasoning without its mark": f"{fenced(WRONG)}No.</think> {RIGHT}",
}
CONTINUATIONS = {  # of the prompt
    "prose behind": "    return x + 1\n\nThis doesn't need more (I think.",
    "reasoning": "I go on.\n</think>\n    return x + 1\n",
    "a fence behind": "    return x + 1\n~~~\nGood.",
    "a loop behind": "    return x + 1\n\nfor i in range(int(input())):\n    print(add(i))\n",
    "a test behind": "    return x + 1\n\nassert add(1) == 5\n",
    "body in an indented fence": "- So:\n\n  ```python\n      return x + 1\n  ```\n",
}


def test_what_every_shape_means(verdicts):
    asked = {(name, "humaneval"): ADD | {"raw_prediction": said} for name, said in SHAPES.items()}
    for name, said in SHAPES.items():
        asked[name, "mbpp"] = WITHOUT_PROMPT | {"raw_prediction": said}
    for name, said in CONTINUATIONS.items():
        asked[name, "continuation"] = ADD | {"raw_prediction": said}
    said = verdicts([(program(example), ADD_TEST) for example in asked.values()])
    assert {name: line for name, line in zip(asked, said) if line != "passed"} == {}


@pytest.mark.parametrize(
    "prompt, indent",
    [
        ('def add(x):\n\t"""Adds one."""\n', "\t"),
        ('def add(x):\n  """Adds one.\n  """\n', "  "),
        ("def add(x):\n", "   "),
        ("def add(x):\n\t# Adds one.\n", "\t"),
        ("def add(x):\n\tfor _ in [1]:\n\t\t# Adds one.\n", "\t\t"),
    ],
)
def test_prompts_of_any_indent(prompt, indent, verdicts):
    completions = [RIGHT, fenced(RIGHT), RIGHT.replace("    ", "\t"), f"{indent}return x + 1\n"]
    example = {"prompt": "", "code": prompt, "entry_point": "add"}
    programs = [program(example | {"raw_prediction": said}) for said in completions]
    assert verdicts([(solution, ADD_TEST) for solution in programs]) == ["passed"] * 4


@pytest.mark.parametrize(
    "completion",
    [
        f"<think>\n{fenced(RIGHT)}",  # cut off before the answer
        f"{fenced(RIGHT)}</think>\nI cannot.",
        f"{fenced(RIGHT)}No:\n{fenced(WRONG)}",
        fenced(RIGHT, "text"),
        fenced("x = add(1)\nassert x == 2"),
    ],
)
def test_what_is_no_answer_does_not_pass(completion, verdicts):
    examples = [e | {"raw_prediction": completion} for e in (ADD, WITHOUT_PROMPT)]
    assert "passed" not in verdicts([(program(example), ADD_TEST) for example in examples])


@pytest.mark.parametrize(
    "text",
    [
        "```\n" * 25_000,
        fenced("(") * 6_000,
        "```\n'''\n" + "x = 1\n" * 10_000 + "```\n" * 9_000,
        "from x import y is\n" * 5_000,
        "def f(x):\n    return (\n" * 4_000,
        "(" * 100_000,
        "+a" * 50_000,
        "-" * 100_000,
        "    " * 25_000,
        "    if x:\n" * 10_000,
        "from __future__ import (" * 4_000,
        "``` " * 25_000,
        "```" + "a" * 100_000 + "`",
        "\0" * 100_000,
        f"x = '\ud800'\n{RIGHT}",  # no text at all
    ],
    ids=lambda text: repr(text[:12]),
)
def test_no_text_takes_long(text):
    began = time.monotonic()
    assert isinstance(program(ADD | {"raw_prediction": text}), str)  # MBPP's way is a part of this
    assert time.monotonic() - began < 60  # it takes some seconds, but the machine may be busy


# ------------------------------------------------------------------------------------------
# MBPP

NODE = "class Node:\n    def __init__(self, value):\n        self.value = value\n\n"
TOTAL = NODE + "def total(n):\n    return n.value"
ROOT = "def root(x):\n    return x ** 0.5"


@pytest.mark.parametrize(
    "row, completion, passes",
    [
        (MBPP, TOTAL, True),
        (MBPP, f"{TOTAL}\n[DONE]\n\nYou are an expert", True),
        (MBPP, f"[BEGIN]\n{TOTAL}\n```\nThis adds.\n[DONE]\ndef total(n): no", True),
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


@pytest.mark.parametrize("code", ["", "\n", "# Adds.\n", "x = (\n"])
@pytest.mark.parametrize(
    "said", ["    x\nimport os\n", "    return 1\n\ndef add(x):\n    return 2", ""]
)
def test_a_saved_prompt_may_be_anything(code, said):
    example = {"prompt": "", "code": code, "entry_point": "add", "test": ""}
    assert isinstance(program(example | {"raw_prediction": said}), str)
