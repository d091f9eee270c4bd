"""Answers that a frozen head can hardly write. Pretraining pushes the rows of the head that belong
to tokens it never sees into one direction. Such tokens get the same logit, whatever the experts
learn."""

import math
from collections.abc import Callable, Collection, Set

import tokenizers
import torch
from torch import Tensor

from data import IGNORE, Rows, rows_of_step
from model import Transformer
from training.config import TrainConfig
from training.inputs import Inputs

LIKELY = 0.1  # a token that the model gives this probability, on average, can be written
ALIKE = 0.95  # the cosine of two rows of the head that point the same way
MANY = 20  # so many such rows are no chance
LOOKED_AT = 2**14  # tokens of the first step, at most
MOST = 256  # tokens that are looked at, the most frequent ones


def say_what_cannot_be_learned(
    config: TrainConfig,
    model: Transformer,
    inputs: Inputs,
    trained: Collection[str],
    losses_of: Callable,
) -> None:
    """Prints which tokens of the first step's answers a frozen head can hardly write, and the keys
    that help. `trained` names the trained parameters; `losses_of` is train.py's."""
    if "lm_head.weight" in trained:
        return
    numbers = rows_of_step(len(inputs.rows.tokens), config.batch_size, config.seed, 0)
    rows = inputs.rows.take(numbers[: max(LOOKED_AT // config.seq_length, 1)])
    rows = Rows(*(column[:, :LOOKED_AT] for column in rows))
    losses, tokens = first_losses(config, model, rows, losses_of)
    if found := alike_rows(model.lm_head.weight, unlikely(losses, tokens)):
        names = named(found.keys(), tokens, inputs.tokenizer.inner) or ["parts of characters"]
        keys = "--method full"
        if "non_expert_modules" not in config.without_effect():
            keys = f"--non_expert_modules or {keys}"
        more = f" and {len(names) - 8} more" if len(names) > 8 else ""
        print(
            f"the frozen head can hardly write {', '.join(names[:8])}{more}, which stand in the "
            f"first step's answers: its rows of up to {max(found.values()):,} other tokens point "
            f"the same way, as pretraining never saw them. What helps: {keys}, which "
            "trains the head, in another output_dir; or other words in the answers"
        )


def named(found: Set[int], tokens: Tensor, inner: tokenizers.Tokenizer) -> list[str]:
    """Returns the texts of the tokens found. Of those that are parts of a character, the characters
    of the answers, whose tokens are `tokens`, that have them."""
    texts = [inner.decode([token]) for token in found]
    answers = dict.fromkeys(inner.decode(tokens.tolist()))
    parts = [c for c in answers if ord(c) > 127 and found & {*inner.encode(c).ids}]
    return [repr(text) for text in [*parts, *(text for text in texts if "\ufffd" not in text)]]


@torch.no_grad()
def first_losses(
    config: TrainConfig, model: Transformer, rows: Rows, losses_of: Callable
) -> tuple[Tensor, Tensor]:
    """Returns the losses of the labels that count, and these labels (M,), on the CPU."""
    losses = [losses_of(config, model, part)[0].cpu() for part in rows.split(config.micro_batch)]
    targets = rows.labels[:, 1:]
    return torch.cat(losses), targets[targets != IGNORE]


def unlikely(losses: Tensor, tokens: Tensor) -> Tensor:
    """Returns the tokens (n,) that the model hardly expects where they stand, the most frequent
    ones first."""
    different, places, counts = tokens.unique(return_inverse=True, return_counts=True)
    means = torch.zeros(len(different)).index_add_(0, places, losses) / counts
    order = counts.argsort(descending=True, stable=True)
    return different[order[means[order] > -math.log(LIKELY)]][:MOST]


def alike_rows(head: Tensor, tokens: Tensor) -> dict[int, int]:
    """Returns, of these tokens (n,), those whose row of the head (V, D) has many other rows that
    point the same way: token -> how many."""
    tokens = tokens.to(head.device)
    lengths = torch.linalg.vector_norm(head, dim=1, dtype=torch.float32)
    cosines = (head @ head[tokens].T).float() / lengths[:, None] / lengths[tokens]  # (V, n)
    alike = (cosines > ALIKE).sum(0) - 1
    return {t: n for t, n in zip(tokens.tolist(), alike.tolist()) if n >= MANY}
