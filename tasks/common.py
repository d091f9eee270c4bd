"""What the kinds of task share: `Task`, what it asks a model and what it concludes, and the readers
of fields. No task of its own is here.

An example is a dict: the prompt as the model sees it, the accepted answers, and what else its score
needs. Readers raise ValueError that names file, line and field.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import ClassVar, NamedTuple

from chat import Tokenizer, is_text, is_training_row, prompt_and_answer, read_rows, text_field
from generate import generate_each
from model import Transformer
from tasks.judge import Judge
from tasks.reasoning import answer_in, without_reasoning
from tasks.spacing import join_choice

ANSWERS = "rows of prompt (in its chat format) and raw_answers, or of a training file"

Predictions = Iterator[tuple[int, dict]]  # number of an example, and the example with its answer
Reader = Callable[[str | Path, "Ask"], list[dict]]  # of a file or folder


class Shot(NamedTuple):
    """A question with its answer, as an example before other questions."""

    question: str
    answer: str
    where: str  # its file and line


@dataclass
class Ask:
    """Turns a question into a prompt: in the chat format, or for a base model `plain`."""

    tokenizer: Tokenizer
    plain: bool = False
    context: int | None = None  # tokens that the model was made for
    shots: list[Shot] = field(default_factory=list)  # stand before each question
    collects: bool = False  # whether questions become shots, and no prompts

    def __call__(
        self, chat: str, plain: str, where: str = "", answer: str = "", plain_answer: str = ""
    ) -> str:
        """Returns the prompt. The reader of a task that takes shots gives the place of its row and
        the answer that an example shows, and another one for `plain` where that differs."""
        if self.plain:
            return self.text(plain, where, plain_answer or answer)
        shots = self.shots_before(chat, where, answer)
        return "" if self.collects else self.tokenizer.chat.prompt(chat, (s[:2] for s in shots))

    def text(self, question: str, where: str, answer: str) -> str:
        """Returns the prompt as plain text, as multiple choice has it always. Blank lines are
        between the shots, as in lm-evaluation-harness."""
        shots = self.shots_before(question, where, answer)
        return "".join(f"{join_choice(s.question, s.answer)}\n\n" for s in shots) + question

    def shots_before(self, question: str, where: str, answer: str) -> list[Shot]:
        """Returns the shots. Raises ValueError if the question is one of theirs."""
        if self.collects:
            self.shots.append(Shot(question, answer, where))
            return []
        for shot in self.shots:
            if shot.question == question:
                raise ValueError(f"{where}: the question is also an example, {shot.where}")
        return self.shots

    def with_shots(self, read: Reader, path: str | Path, count: int) -> "Ask":
        """Returns the same with the first `count` questions of a file as shots."""
        collector = replace(self, shots=[], collects=True)
        read(path, collector)
        if len(collector.shots) < count:
            held = f"holds {len(collector.shots)} examples"
            raise ValueError(f"{path}: {held}; {count} are required (--shots)")
        return replace(self, shots=collector.shots[:count])


@dataclass
class Result:
    """What an evaluation gives."""

    metrics: dict[str, float | None]  # the main one first; None: nothing could be scored
    count: int  # what the metrics are means over
    unit: str  # ... samples, tokens
    records: list[dict]  # one a sample: {"example", "score"}
    missing: int = 0  # samples that could not be scored
    groups: dict[str, float] = field(default_factory=dict)  # the main metric of each subject

    @property
    def mean(self) -> float | None:
        return next(iter(self.metrics.values()))


def by_subject(examples: list[dict], scores: list[int]) -> dict[str, float]:
    """Returns the mean score of each subject, of the examples that have one."""
    groups: dict[str, list[int]] = {}
    for example, score in zip(examples, scores):
        if "subject" in example:
            groups.setdefault(example["subject"], []).append(score)
    return {name: fmean(scores) for name, scores in groups.items()}


def by_row(read: Callable[[dict, str, Ask], dict | None]) -> Reader:
    """Returns a reader of files from a reader of rows, which may return None for a row that has no
    answer to score."""

    def read_file(path: str | Path, ask: Ask) -> list[dict]:
        examples = [read(row, where, ask) for where, row in read_rows(path)]
        answered = [example for example in examples if example]
        say_unanswered(path, len(examples), len(answered))
        return answered

    return read_file


def say_unanswered(path: str | Path, rows: int, answered: int) -> None:
    """Prints how many rows are left out. Raises ValueError if none has an answer."""
    if not answered:
        raise ValueError(f"{path}: holds no answer to score; every one is masked")
    if masked := rows - answered:
        print(f"{path}: {masked:,} of {rows:,} rows have no answer to score; left out")


def stated(row: dict, name: str) -> str:
    return f"field {name} is {row.get(name)!r:.60}"


def typed_field(row: dict, name: str, kind, where: str):
    """Returns a field of a row: an object (dict) or a finite number (float | int)."""
    value = row.get(name)
    if not isinstance(value, kind) or isinstance(value, float) and not math.isfinite(value):
        needed = "an object" if kind is dict else "a finite number"
        raise ValueError(f"{where}: {stated(row, name)}; {needed} is required")
    return value


def text_list(row: dict, name: str, where: str, least: int = 1) -> list[str]:
    value = row.get(name)
    if not isinstance(value, list) or len(value) < least or not all(map(is_text, value)):
        many = f" of at least {least}" if least > 1 else ""
        raise ValueError(f"{where}: {stated(row, name)}; a list of strings{many} is required")
    return value


def read_answers(row: dict, where: str, ask: Ask | None = None) -> dict | None:
    """Reads {"prompt", "raw_answers"}; the prompt already carries its chat format. With `ask`, also
    reads rows of a training file: the last learned answer is the expected one, and all before it is
    the prompt. Returns None if no answer is learned."""
    if ask and row.get("raw_answers") is None and is_training_row(row):
        found = prompt_and_answer(row, ask.tokenizer, where)
        if found is None:
            return None
        prompt, answer = found[0], without_reasoning(found[1])
        if not answer.strip():
            raise ValueError(f"{where}: the last answer is reasoning alone; an answer is required")
        return {"prompt": prompt, "raw_answers": [answer]}
    answers = text_list(row, "raw_answers", where)
    return {"prompt": text_field(row, "prompt", where), "raw_answers": answers}


@dataclass(frozen=True)
class Task:
    """How a task's file is read, how the model answers, and what the answers are worth.

    This class is for text: `score` compares what the model says with the accepted answers. Other
    kinds of answer override the methods."""

    about: str  # what --data is
    read: Reader
    score: Callable[[str, list[str]], int] | None = None  # of a completion and the answers
    max_new_tokens: int = 128
    check: Callable[[dict, str], object] = read_answers  # raises for a saved row that has no score
    takes_shots: bool = False  # whether `read` gives `ask` the answers that examples show

    decodes: ClassVar[bool] = True  # whether the model writes new tokens
    is_judged: ClassVar[bool] = False  # whether a language model gives the points
    has_completions: ClassVar[bool] = True

    def rows(self, ask: Ask, examples: list[dict]) -> list[list[int]]:
        """Returns the tokens that the model reads of each example."""
        return ask.tokenizer.encode_prompts([example["prompt"] for example in examples])

    def predict(
        self, model: Transformer, ask: Ask, examples: list[dict], max_new_tokens: int, batch_size=0
    ) -> Predictions:
        """Adds raw_prediction to each example."""
        tokenizer, prompts = ask.tokenizer, self.rows(ask, examples)
        ends = tokenizer.end_ids
        for i, row in generate_each(model, prompts, max_new_tokens, ends, batch_size):
            yield i, examples[i] | {"raw_prediction": tokenizer.decode(row)}

    def result_of(self, examples: list[dict], judge: Judge | None = None) -> Result:
        """Scores answered examples."""
        answers = [answer_in(e) for e in examples]
        scores = [self.score(answer, e["raw_answers"]) for answer, e in zip(answers, examples)]
        records = [{"example": e, "score": score} for e, score in zip(examples, scores)]
        groups = by_subject(examples, scores)
        return Result({"accuracy": fmean(scores)}, len(records), "samples", records, groups=groups)

    def saved_example(self, row: dict, where: str) -> dict:
        """Returns the example of a saved row, if it has what its score needs. Raises ValueError."""
        example = typed_field(row, "example", dict, where)
        self.check(example, where)
        if self.has_completions:
            text_field(example, "raw_prediction", where)
        if not isinstance(example.get("subject", ""), str):
            raise ValueError(f"{where}: {stated(example, 'subject')}; a string is required")
        self.check_answer(example, where)
        return example

    def check_answer(self, example: dict, where: str) -> None:
        """Raises ValueError if a saved example lacks a field that other kinds of answer need."""
