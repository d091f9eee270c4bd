"""The tasks of the evaluator, one file a kind of task.

To add a task, add a file here that holds its tasks, as

    TASKS = {"reverse": Task("rows of prompt and raw_answers", by_row(read_answers), score_reverse)}

and eval.py, train.py's eval_sets and `--help` know it. It takes `--shots`, if its reader gives
`ask` the answer that an example shows, and the task says takes_shots=True.
"""

import importlib
import pkgutil
from pathlib import Path

from chat import Tokenizer
from model import ModelConfig, Transformer
from processes import SingleProcess
from tasks.common import Ask, Result, Task
from tasks.judge import Judge

__all__ = ["TASKS", "Ask", "Judge", "Result", "Task"]


def find_tasks() -> dict[str, Task]:
    """Returns the tasks of every file of this folder."""
    tasks: dict[str, Task] = {}
    for file in pkgutil.iter_modules(__path__):
        found = getattr(importlib.import_module(f"{__name__}.{file.name}"), "TASKS", {})
        if twice := tasks.keys() & found.keys():
            raise ValueError(f"tasks/{file.name}.py: another file has a task {min(twice)}, too")
        tasks |= found
    return tasks


TASKS = find_tasks()


def read_examples(path: str | Path, task: str, ask: Ask) -> list[dict]:
    """Returns the examples of a file or folder. Raises ValueError that names file, line, field."""
    return TASKS[task].read(path, ask)


def check_lengths(
    path: str | Path,
    task: str,
    examples: list[dict],
    ask: Ask,
    config: ModelConfig,
    max_new_tokens: int = 0,
) -> None:
    """Raises ValueError that names the file, if an example is too long (`ModelConfig.check_row`)
    with `max_new_tokens`; 0: the task's. Prints how many are longer than the model's context. A
    question with choices counts with its longest one."""
    kind = TASKS[task]
    new = (max_new_tokens or kind.max_new_tokens) if kind.decodes else 0
    lengths = [len(row) for row in kind.rows(ask, examples)]
    longest = max(lengths, default=0) + new
    config.check_row(longest, f"{path}: the longest row with its {new} new tokens")
    if too_long := sum(length > (ask.context or length) for length in lengths):
        most = f"the {ask.context} tokens of max_position_embeddings"
        print(f"{path}: {too_long} of {len(lengths)} prompts are longer than {most}", flush=True)


def answer_file(
    model: Transformer,
    tokenizer: Tokenizer,
    task: str,
    path: str | Path,
    max_new_tokens: int = 0,
    ranks: SingleProcess = SingleProcess(),
) -> list[dict]:
    """Returns a data file's examples with the model's answers. `max_new_tokens` 0: the task's. The
    replicas of the model on `ranks` share the examples."""
    ask = Ask(tokenizer)
    examples = read_examples(path, task, ask)
    new = max_new_tokens or TASKS[task].max_new_tokens
    mine = examples[ranks.replica :: ranks.replicas]
    for i, answered in TASKS[task].predict(model, ask, mine, new):
        mine[i] = answered
    # Ranks of one replica have the same answers.
    for replica, theirs in enumerate(ranks.from_all(mine)[:: ranks.world_size // ranks.replicas]):
        examples[replica :: ranks.replicas] = theirs
    return examples


def score(task: str, examples: list[dict], judge: Judge | None = None) -> Result:
    """Scores answered examples."""
    return TASKS[task].result_of(examples, judge)
