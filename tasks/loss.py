"""The task `loss`: the mean loss over the answers of any training file."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from tqdm import tqdm

from data import encode_file, has_answer
from generate import Rows, likelihoods
from model import Transformer
from tasks.common import Ask, Predictions, Result, Task, say_unanswered, typed_field

NUMBERS = ("loss", "accuracy", "tokens")


def read_chat(path: str | Path, ask: Ask) -> list[dict]:
    """Reads any training file: what is learned there is what is scored here."""
    decode, examples, samples = ask.tokenizer.decode, [], encode_file(path, ask.tokenizer)
    answered = [sample for sample in samples if has_answer(sample)]
    say_unanswered(path, len(samples), len(answered))
    for ids, labels in answered:
        learned = [n for n in range(1, len(ids)) if labels[n] >= 0]
        prompt = decode([token for token, label in zip(ids, labels) if label < 0])
        answers = [decode([ids[n] for n in learned])]
        examples.append({"prompt": prompt, "raw_answers": answers, "ids": ids, "learned": learned})
    return examples


def answer_losses(model: Transformer, rows: Rows, learned: Iterable) -> Iterator[tuple]:
    """Yields (number of the row, mean loss, accuracy, number of tokens) over the tokens that stand
    at the row's places in `learned`. Accuracy is the part that greedy decoding would choose."""
    wanted = [[(n, ids[n]) for n in places] for ids, places in zip(rows, learned)]
    for i, logs, hits in likelihoods(model, rows, wanted):
        yield i, -logs.double().mean().item(), hits.double().mean().item(), len(logs)


@dataclass(frozen=True)
class Loss(Task):
    has_completions = decodes = False

    def rows(self, ask, examples) -> list[list[int]]:
        return [example["ids"] for example in examples]

    def predict(self, model, ask, examples, max_new_tokens, batch_size=0) -> Predictions:
        """Adds loss (mean over the answer's tokens), accuracy and tokens to each example."""
        rows, learned = self.rows(ask, examples), [e["learned"] for e in examples]
        found = answer_losses(model, rows, learned)
        for i, *values in tqdm(found, "score", len(rows), leave=False, disable=None):
            kept = {name: examples[i][name] for name in ("prompt", "raw_answers")}
            yield i, kept | dict(zip(NUMBERS, values))

    def result_of(self, examples: list[dict], judge=None) -> Result:
        """Means over all tokens; a record's score is the mean loss of its sample."""
        tokens = [e["tokens"] for e in examples]
        loss = fmean([e["loss"] for e in examples], tokens)
        metrics = {"loss": loss, "token accuracy": fmean([e["accuracy"] for e in examples], tokens)}
        records = [{"example": e, "score": e["loss"]} for e in examples]
        return Result(metrics, sum(tokens), "tokens", records)

    def check_answer(self, example: dict, where: str) -> None:
        for name in NUMBERS:
            typed_field(example, name, float | int, where)


TASKS = {"loss": Loss("any training file", read_chat)}
