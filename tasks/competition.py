"""The task `math`: the competition problems of MATH (Hendrycks et al., 2021)."""

import re
from pathlib import Path

from chat import read_rows, text_field
from files import read_json
from tasks.common import Ask, Task
from tasks.text import STEP_BY_STEP, closing_brace

# What MATH's rules replace, before and behind the units on the right.
REPLACED = [("\n", ""), ("\\!", ""), ("\\\\", "\\"), ("tfrac", "frac"), ("dfrac", "frac")]
REPLACED += [("\\left", ""), ("\\right", ""), ("^{\\circ}", ""), ("^\\circ", ""), ("\\$", "")]
REPLACED_LATER = [("\\%", ""), (" .", " 0."), ("{.", "{0.")]
INTEGER = "(0|-?[1-9][0-9]*)"


def math_rows(path: str | Path, split: str) -> list[tuple[str, object]]:
    """Returns (where, row) of a file of rows, or of a folder of files TYPE/N.json, which may stand
    in a folder of the split's name."""
    if not Path(path).is_dir():
        return read_rows(path)
    folder = Path(path) / split
    files = (folder if folder.is_dir() else Path(path)).rglob("*.json")
    files = sorted(files, key=lambda file: (file.parent, len(file.name), file.name))  # 2 before 10
    if not files:
        raise FileNotFoundError(f"{path}: holds no {split}/TYPE/N.json, as the published folder")
    return [(str(file), read_json(file)) for file in files]


def read_math(path: str | Path, ask: Ask) -> list[dict]:
    """Reads {"problem", "solution"} and maybe {"type"}, or as in MATH-500 {"answer", "subject"}.
    Without an answer, it is what stands in the solution's last box."""
    rows = math_rows(path, "train" if ask.collects else "test")
    return [read_problem(row, where, ask) for where, row in rows]


def read_problem(row: object, where: str, ask: Ask) -> dict:
    if not isinstance(row, dict):
        raise ValueError(f"{where}: must be a JSON object, found {row!r:.60}")
    problem, solution = (text_field(row, name, where) for name in ("problem", "solution"))
    answer = text_field(row, "answer", where) if "answer" in row else last_box(solution)
    if answer is None:
        found = f"field solution ends with {solution[-60:]!r}"
        raise ValueError(f"{where}: {found}; its answer within \\boxed{{}} is required")
    plain = f"Problem:\n{problem}\n\nSolution:"
    prompt = ask(f"{problem}\n{STEP_BY_STEP}", plain, where, solution)
    kind = next((row[name] for name in ("type", "subject") if name in row), None)
    subject = {"subject": kind} if isinstance(kind, str) else {}
    return {"prompt": prompt, "raw_answers": [answer]} | subject


def last_box(text: str) -> str | None:
    """Returns what stands in the last \\boxed{}, or without one in the last \\fbox{}; None if it is
    not closed. Some solutions have no braces, as $\\boxed 5$."""
    _, found, rest = text.rpartition("\\boxed" if "\\boxed" in text else "\\fbox")
    if not found:
        return None
    brace = re.match(r"\s*\{", rest)
    if not brace:
        return rest[1:].split("$")[0] if rest.startswith(" ") else None
    rest = rest[brace.end() :]
    end = closing_brace(rest)
    return rest[:end] if end < len(rest) else None


def simplified(text: str) -> str:
    """Returns an answer in the form in which MATH's rules compare answers (math_equivalence.py of
    its repository). Raises ValueError or IndexError for what they cannot read."""
    for old, new in REPLACED:
        text = text.replace(old, new)
    text, *units = text.split("\\text{ ")
    if len(units) > 1:
        raise ValueError("units stand in two places")
    for old, new in REPLACED_LATER:
        text = text.replace(old, new)
    text = f"0{text}" if text.startswith(".") else text
    if text.count("=") == 1 and text.index("=") <= 2:  # x = 5
        text = text.partition("=")[2]
    whole, *roots = text.split("\\sqrt")
    for root in roots:
        whole += f"\\sqrt{root}" if root[0] == "{" else f"\\sqrt{{{root[0]}}}{root[1:]}"
    text = with_braces(whole.replace(" ", ""))
    if text == "0.5":
        return "\\frac{1}{2}"
    return re.sub(rf"^{INTEGER}/{INTEGER}$", r"\\frac{\1}{\2}", text)


def with_braces(text: str) -> str:
    """Returns \\frac12 and \\frac1{72} as \\frac{1}{2} and \\frac{1}{72}."""
    whole, *fractions = text.split("\\frac")
    for rest in fractions:
        if rest[0] != "{":
            if len(rest) < 2:
                return text
            below = rest[1:] if rest[1] == "{" else f"{{{rest[1]}}}{rest[2:]}"
            rest = f"{{{rest[0]}}}{below}"
        whole += f"\\frac{rest}"
    return whole


def are_equal(one: str, other: str) -> bool:
    try:
        return simplified(one) == simplified(other)
    except (ValueError, IndexError):
        return one == other


def score_math(prediction: str, answers: list[str]) -> int:
    """Returns 1 if the last box holds the answer. A base model goes on with other problems; they do
    not count."""
    said = last_box(prediction.lstrip().split("\nProblem:")[0])
    return int(said is not None and are_equal(said, answers[0]))


TASKS = {
    "math": Task(
        "rows of problem and solution, or the published folder",
        read_math,
        score_math,
        1024,
        takes_shots=True,
    )
}
