"""IFEval (arXiv 2311.07911): each prompt gives instructions that a rule can check, such as to write
no commas. The rules are in instructions.py."""

from dataclasses import dataclass
from itertools import chain
from statistics import fmean

from chat import text_field
from tasks.common import Ask, Result, Task, by_row, stated, text_list
from tasks.instructions import INSTRUCTIONS
from tasks.reasoning import answer_in

Verdict = bool | None  # None: undecided


def all_of(verdicts: list[Verdict]) -> Verdict:
    return False if False in verdicts else None if None in verdicts else True


def any_of(verdicts: list[Verdict]) -> Verdict:
    return True if True in verdicts else None if None in verdicts else False


def loose_answers(answer: str) -> list[str]:
    """Returns the answer whole, without its first line, its last and both, and each of these
    without asterisks. So talk around an answer and Markdown do no harm."""
    lines = answer.split("\n")
    cut = ["\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1])]
    return [shown for text in (answer, *cut) for shown in (text, text.replace("*", ""))]


def follows(answer: str, name: str, kwargs: dict) -> Verdict:
    """Returns whether an answer follows an instruction; a blank one follows none."""
    return INSTRUCTIONS[name].follows(answer, **kwargs) if answer.strip() else False


def verdicts_of(example: dict) -> dict[str, list[Verdict]]:
    """Returns the strict and the loose verdict on each instruction."""
    answer, strict, loose = answer_in(example), [], []
    for name, kwargs in zip(example["raw_answers"], example["kwargs"]):
        strict.append(follows(answer, name, kwargs))
        loose.append(any_of([follows(text, name, kwargs) for text in loose_answers(answer)]))
    return {"strict": strict, "loose": loose}


@dataclass(frozen=True)
class Instructed(Task):
    max_new_tokens: int = 1280  # as in lm-evaluation-harness

    def result_of(self, examples: list[dict], judge=None) -> Result:
        """Returns the four published accuracies, each the mean over what is decided."""
        records, metrics, counts = [], {}, {}
        for example in examples:
            verdicts = verdicts_of(example)
            score = all_of(verdicts["strict"])
            score = None if score is None else int(score)
            records.append({"example": example, "score": score, **verdicts})
        for how in ("strict", "loose"):
            of_prompts = [record[how] for record in records]
            levels = {
                "prompt": [all_of(verdicts) for verdicts in of_prompts],
                "instruction": list(chain(*of_prompts)),
            }
            for level, verdicts in levels.items():
                decided = [v for v in verdicts if v is not None]
                metrics[f"{level}-level {how}"] = fmean(decided) if decided else None
                counts[level, how] = len(decided)
        count = counts["prompt", "strict"]
        instructions = sum(len(record["strict"]) for record in records)
        unit = (
            f"prompts and {counts['instruction', 'strict']} of {instructions} instructions"
            f" (loose: {counts['prompt', 'loose']} and {counts['instruction', 'loose']})"
        )
        return Result(metrics, count, unit, records, len(records) - count)


# ------------------------------------------------------------------------------------------
# Reading


def read_kwargs(name: str, given, where: str) -> dict:
    """Returns an instruction's arguments. null is absent, as in the hub's rows."""
    if not isinstance(given, dict):
        raise ValueError(f"{where} is {given!r:.60}; an object is required")
    given = {field: value for field, value in given.items() if value is not None}
    kinds = INSTRUCTIONS[name].kwargs
    if unknown := sorted(given.keys() - kinds.keys()):
        takes = f"{name} takes {', '.join(kinds) or 'none'}"
        raise ValueError(f"{where}: {stated(given, unknown[0])}; {takes}")
    for field, kind in kinds.items():
        if not kind.fits(given.get(field)):
            raise ValueError(f"{where}: {stated(given, field)}; {kind.needed} is required")
    if given.get("nth_paragraph", 1) > given.get("num_paragraphs", 1):
        needed = f"at most num_paragraphs, {given['num_paragraphs']}, is required"
        raise ValueError(f"{where}: {stated(given, 'nth_paragraph')}; {needed}")
    return given


def read_instructions(row: dict, names_field: str, where: str) -> dict:
    """Returns the names of a row's instructions as raw_answers, and the kwargs of each."""
    names, kwargs = text_list(row, names_field, where), row.get("kwargs")
    for i, name in enumerate(names):
        if name not in INSTRUCTIONS:
            needed = f"one of IFEval's {len(INSTRUCTIONS)}, such as punctuation:no_comma,"
            raise ValueError(
                f"{where}: field {names_field}[{i}] is {name!r:.60}; {needed} is required"
            )
    if not isinstance(kwargs, list) or len(kwargs) != len(names):
        needed = f"a list of {len(names)}, one object for each instruction,"
        raise ValueError(f"{where}: {stated(row, 'kwargs')}; {needed} is required")
    read = [
        read_kwargs(name, given, f"{where}: field kwargs[{i}]")
        for i, (name, given) in enumerate(zip(names, kwargs))
    ]
    return {"raw_answers": names, "kwargs": read}


def read_ifeval(row: dict, where: str, ask: Ask) -> dict:
    """Reads {"prompt", "instruction_id_list", "kwargs"}."""
    prompt = text_field(row, "prompt", where)
    example = {"prompt": ask(prompt, prompt)}
    return example | read_instructions(row, "instruction_id_list", where)


def check_ifeval(example: dict, where: str) -> None:
    text_field(example, "prompt", where)
    read_instructions(example, "raw_answers", where)


TASKS = {
    "ifeval": Instructed("the published rows", by_row(read_ifeval), check=check_ifeval),
}
