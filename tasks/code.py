"""HumanEval and MBPP: a completion becomes a program (program.py), which sandbox.py runs with its
test."""

from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from chat import read_rows, text_field
from tasks.common import Ask, Result, Task, by_row, text_list
from tasks.program import program
from tasks.sandbox import missing_guards, run_programs


@dataclass(frozen=True)
class Code(Task):
    max_new_tokens: int = 512

    def result_of(self, examples: list[dict], judge=None) -> Result:
        if lacking := ", ".join(missing_guards()):
            print(f"sandbox: this system lacks {lacking}; programs run without", flush=True)
        records = []
        for e, said in zip(examples, run_programs([(program(e), e["test"]) for e in examples])):
            records.append({"example": e, "score": int(said == "passed"), "result": said})
        metrics = {"pass@1": fmean([r["score"] for r in records])}
        return Result(metrics, len(records), "programs", records)

    def check_answer(self, example: dict, where: str) -> None:
        for name in ("code", "entry_point", "test"):
            text_field(example, name, where)


def read_humaneval(row: dict, where: str, ask: Ask) -> dict:
    """Reads {"prompt", "canonical_solution", "test", "entry_point"}."""
    names = "prompt", "canonical_solution", "test", "entry_point"
    code, solution, test, entry = (text_field(row, name, where) for name in names)
    asked = (
        "Complete this Python function. Answer with the whole function, in one block of code.\n\n"
        f"```python\n{code.strip()}\n```"
    )
    example = {"prompt": ask(asked, code), "raw_answers": [solution], "code": code}
    return example | {"entry_point": entry, "test": f"{test}\n\ncheck({entry})\n"}


def read_mbpp(path: str | Path, ask: Ask) -> list[dict]:
    """The published files hold all splits: the test's rows have task_id 11 to 510, the shots 1 to
    10, of which 2, 3 and 4 are the usual ones, so they come first."""
    first, last, split = (1, 10, "prompt") if ask.collects else (11, 510, "test")
    rows = read_rows(path)
    rows = [(at, row) for at, row in rows if row.get("task_id", last) in range(first, last + 1)]
    if not rows:
        said = f"no row has a task_id from {first} to {last}, the published {split}"
        raise ValueError(f"{path}: {said}")
    if ask.collects:
        rows.sort(key=lambda found: found[1].get("task_id") == 1)
    return [read_mbpp_row(row, where, ask) for where, row in rows]


def read_mbpp_row(row: dict, where: str, ask: Ask) -> dict:
    """Reads {"text", "code", "test_list", "test_setup_code"}; the sanitized file has "prompt" and
    "test_imports" instead of the first and last."""
    task = text_field(row, "prompt" if "prompt" in row else "text", where)
    tests = text_list(row, "test_list", where)
    setup = [text_field(row, "test_setup_code", where)] if row.get("test_setup_code") else []
    imports = text_list(row, "test_imports", where, least=0) if "test_imports" in row else []
    asked = (
        f"You are an expert Python programmer, and here is your task: {task} Your code should pass "
        "these tests:\n\n" + "\n".join(tests)
    )
    code, test = text_field(row, "code", where), "\n".join([*imports, *setup, *tests, ""])
    answers = f"```python\n{code}\n```", f"{code}\n[DONE]"
    prompt = ask(asked, f"{asked}\n[BEGIN]\n", where, *answers)
    return {"prompt": prompt, "raw_answers": [code], "code": "", "entry_point": "", "test": test}


TASKS = {
    "humaneval": Code("the published rows", by_row(read_humaneval)),
    "mbpp": Code("the published rows", read_mbpp, takes_shots=True),
}
