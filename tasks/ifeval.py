"""IFEval (arXiv 2311.07911): each prompt gives instructions that a rule can check, such as to write
no commas. The rules are in instructions.py. A prompt is scored if all its instructions are checked.
This does not depend on the answer, so the same prompts count for every model."""

from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from statistics import fmean

from chat import text_field
from tasks.common import Ask, Result, Task, by_row, stated, text_list
from tasks.instructions import INSTRUCTIONS, NEVER_CHECKED
from tasks.reasoning import answer_in


def loose_answers(answer: str) -> list[str]:
    """Returns the answer whole, without its first line, its last and both, and each of these
    without asterisks. So talk around an answer and Markdown do no harm."""
    lines = answer.split("\n")
    cut = ["\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1])]
    return [shown for text in (answer, *cut) for shown in (text, text.replace("*", ""))]


def verdicts(texts: list[str], example: dict) -> list[bool]:
    """Returns for each instruction that is checked whether one of the texts follows it. A blank
    text follows none."""
    texts = [text for text in texts if text.strip()]
    return [
        any(INSTRUCTIONS[name].follows(text, **kwargs) for text in texts)
        for name, kwargs in zip(example["raw_answers"], example["kwargs"])
        if name not in NEVER_CHECKED
    ]


def is_scored(example: dict) -> bool:
    return NEVER_CHECKED.isdisjoint(example["raw_answers"])


def check_scored(examples: list[dict], where: str | Path) -> None:
    if not any(map(is_scored, examples)):
        needed = f"one without the instructions {', '.join(sorted(NEVER_CHECKED))} is required"
        raise ValueError(f"{where}: no prompt can be scored; {needed}")


@dataclass(frozen=True)
class Instructed(Task):
    max_new_tokens: int = 1280  # as in lm-evaluation-harness

    def result_of(self, examples: list[dict], judge=None) -> Result:
        """Returns the four published accuracies, over the prompts that are scored and over all
        instructions that are checked. They are None where --limit leaves none of these."""
        records, metrics = [], {}
        for example in examples:
            answer = answer_in(example)
            strict = verdicts([answer], example)
            loose = verdicts(loose_answers(answer), example)
            score = int(all(strict)) if is_scored(example) else None
            records.append({"example": example, "score": score, "strict": strict, "loose": loose})
        scored = [record for record in records if is_scored(record["example"])]
        for how in ("strict", "loose"):
            followed = list(chain(*(record[how] for record in records)))
            prompts = [all(record[how]) for record in scored]
            metrics[f"prompt-level {how}"] = fmean(prompts) if prompts else None
            metrics[f"instruction-level {how}"] = fmean(followed) if followed else None
        unit = f"prompts and {sum(len(r['strict']) for r in records)} instructions"
        return Result(metrics, len(scored), unit, records, len(records) - len(scored))


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


def read_file(path: str | Path, ask: Ask) -> list[dict]:
    """Reads a file of such rows. Raises ValueError if no prompt can be scored."""
    examples = by_row(read_ifeval)(path, ask)
    check_scored(examples, path)
    return examples


def check_ifeval(example: dict, where: str) -> None:
    text_field(example, "prompt", where)
    read_instructions(example, "raw_answers", where)


TASKS = {
    "ifeval": Instructed("the published rows", read_file, check=check_ifeval),
}
