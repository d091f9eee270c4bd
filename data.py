"""Rows of text -> token ids and labels -> packed rows -> the rows of a step; and padded batches for
scoring and evaluation. What a row's text is, is in chat/; the tasks of evaluations are in tasks/.

    python data.py --model BASE --data FILE --show 3

prints samples as the model gets them, with what is learned marked.

A sample is a pair (input_ids, labels) of equally long lists. A label stands at the position of its
own token (the loss shifts them by one). It is IGNORE where nothing is learned.
"""

import math
import random
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from chat import FORMATS, OWN, Piece, Tokenizer, load_tokenizer, read_pieces, row_pieces
from checkpoint import local_directory
from config import Keys, Parser, add_keys, key, read_keys

IGNORE = -100  # the label that torch.nn.functional.cross_entropy passes over

Sample = tuple[list[int], list[int]]


def encode_chat(messages: list[dict], tokenizer: Tokenizer) -> Sample:
    """Returns (input_ids, labels) of a conversation. Raises ValueError that names the message."""
    pieces = row_pieces({"messages": messages}, tokenizer, "conversation")
    return encode_pieces([pieces], tokenizer)[0]


def encode_file(path: str | Path, tokenizer: Tokenizer) -> list[Sample]:
    """Returns all rows of a data file as samples. Checks every row before it encodes the first.
    Raises OSError, and ValueError that names file, line and field."""
    samples = encode_pieces(read_pieces(path, tokenizer), tokenizer)
    if not any(has_answer(sample) for sample in samples):
        raise ValueError(f"{path}: holds no answer to learn from; every one is masked")
    return samples


def has_answer(sample: Sample) -> bool:
    """Returns whether anything of a sample is learned."""
    return any(label != IGNORE for label in sample[1])


def encode_pieces(rows: list[list[Piece]], tokenizer: Tokenizer) -> list[Sample]:
    """Returns a sample for each row of pieces. Where an answer is learned, so is the begin of
    sequence, as in the original code: it is predicted where the sample stands behind another one in
    a packed row."""
    all_ids = iter(tokenizer.encode_all([piece.text for pieces in rows for piece in pieces]))
    samples = []
    for pieces in rows:
        input_ids, labels = [], []
        for piece in pieces:
            ids = next(all_ids)
            input_ids += ids
            labels += ids if piece.is_learned else [IGNORE] * len(ids)
        if has_answer((input_ids, labels)) and input_ids[0] == tokenizer.bos_id:
            labels[0] = tokenizer.bos_id
        samples.append((input_ids, labels))
    return samples


class Rows(NamedTuple):
    """Packed rows, int64 (rows, seq_length) each. A token's document is the number of its sample;
    padding comes last and has the number of samples as its document."""

    tokens: Tensor
    labels: Tensor
    documents: Tensor

    def take(self, rows) -> "Rows":
        return Rows(*(column[rows] for column in self))

    def split(self, size: int) -> list["Rows"]:
        return [Rows(*part) for part in zip(*(column.split(size) for column in self))]

    def unlearned(self) -> "Rows":
        """Returns the same rows with nothing to learn from them."""
        return self._replace(labels=torch.full_like(self.labels, IGNORE))

    @property
    def learned(self) -> Tensor:
        """How many labels of each row count (rows,). The first of a row never does: no token stands
        before it to predict it."""
        return (self.labels[:, 1:] != IGNORE).sum(1)


def pack(
    samples: list[Sample],
    seq_length: int,
    random_concat_ratio: float,
    pad_id: int,
    seed: int,
    document_mask: bool = False,
) -> Rows:
    """Returns the samples, in their order, joined into rows, the paper's way. A sample that does
    not fit into what is left of a row loses its head, not its tail. With probability
    `random_concat_ratio` a sample that joins others loses its first token. The last row is padded.

    With `document_mask` samples do not see each other. Then the first token of each is not learned:
    nothing before it could predict it."""
    draw, rows = random.Random(seed), []
    tokens, labels, documents = [], [], []
    for number, (input_ids, targets) in enumerate(samples):
        room = seq_length - len(tokens)
        input_ids, targets = input_ids[-room:], targets[-room:]
        if tokens and draw.random() < random_concat_ratio:
            input_ids, targets = input_ids[1:], targets[1:]
        if document_mask:
            targets = [IGNORE, *targets[1:]][: len(input_ids)]
        tokens, labels = tokens + input_ids, labels + targets
        documents = documents + [number] * len(input_ids)
        if len(tokens) == seq_length:
            rows.append(torch.tensor([tokens, labels, documents]))
            tokens, labels, documents = [], [], []
    if tokens:
        rest = seq_length - len(tokens)
        tokens, labels = tokens + [pad_id] * rest, labels + [IGNORE] * rest
        documents = documents + [len(samples)] * rest
        rows.append(torch.tensor([tokens, labels, documents]))
    return Rows(*torch.stack(rows, dim=1))


@lru_cache(maxsize=2)
def epoch_order(n_rows: int, seed: int, epoch: int) -> list[int]:
    order = list(range(n_rows))
    random.Random(f"{seed} {epoch}").shuffle(order)
    return order


def rows_of_step(n_rows: int, batch_size: int, seed: int, step: int) -> list[int]:
    """Returns the row numbers of step `step` (from 0). Each epoch has its own order of all rows."""
    places = range(step * batch_size, (step + 1) * batch_size)
    return [epoch_order(n_rows, seed, place // n_rows)[place % n_rows] for place in places]


def micro_batches(count: int, size: int, rank: int, world_size: int) -> list[range]:
    """Returns which of a step's `count` rows belong to a rank: every world_size-th row, in
    micro-batches of up to `size`. All ranks have as many micro-batches, so some may be empty."""
    mine, most = range(rank, count, world_size), math.ceil(count / world_size)
    return [mine[first : first + size] for first in range(0, most, size)]


def pad(sequences: list[list[int]], value: int) -> Tensor:
    """Returns the sequences as int64 (B, longest), padded at the end."""
    longest = max(map(len, sequences))
    return torch.tensor([sequence + [value] * (longest - len(sequence)) for sequence in sequences])


def by_length(lengths: list[int], max_tokens: int) -> Iterator[list[int]]:
    """Yields groups of indices, the longest sequences first. A group has at most `max_tokens` with
    its padding, or it is a single index."""
    group: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if group and (len(group) + 1) * lengths[group[0]] > max_tokens:
            yield group
            group = []
        group.append(i)
    if group:
        yield group


def sample_tokens(
    samples: list[Sample], n_tokens: int, max_length: int, seed: int
) -> list[list[int]]:
    """Returns the input_ids of randomly drawn samples, each cut to its first `max_length` tokens,
    until they hold `n_tokens` tokens or no sample is left."""
    order = list(range(len(samples)))
    random.Random(seed).shuffle(order)
    drawn, total = [], 0
    for i in order:
        if total >= n_tokens:
            break
        drawn.append(samples[i][0][:max_length])
        total += len(drawn[-1])
    return drawn


# ------------------------------------------------------------------------------------------
# Command line: what a run would learn


def shown(sample: Sample, tokenizer: Tokenizer) -> str:
    """Returns a sample's text, special tokens included, with what is learned between « and ». The
    first token is not marked: it is learned only where another sample stands before it in a row."""
    ids, labels, parts = sample[0], [IGNORE, *sample[1][1:]], []
    for learned, pairs in groupby(zip(ids, labels), key=lambda pair: pair[1] != IGNORE):
        text = tokenizer.inner.decode([token for token, _ in pairs], skip_special_tokens=False)
        parts.append(f"«{text}»" if learned else text)
    return "".join(parts)


def first_sample(samples: list[Sample], tokenizer: Tokenizer) -> str:
    """Returns what a run says of its data: the chat format, and the first sample, shortened."""
    chat, text = tokenizer.chat, shown(samples[0], tokenizer)
    source = f" ({chat.source})" if chat.name == OWN else ""
    text = text if len(text) < 1000 else f"{text[:600]} [...] {text[-300:]}"
    return f"chat format: {chat.name}{source}; the first sample, what is learned in « »:\n{text}"


@dataclass
class ShowConfig(Keys):
    model: str = key("", "checkpoint whose tokenizer and chat format count: directory or hub name")
    data: str = key("", "a training file, as for train.py")
    chat_format: str = key("", "as for train.py", choices=FORMATS)
    show: int = key(3, "samples to print", at_least=1)


def command_line() -> Parser:
    parser = Parser(
        "Print samples of a training file as the model gets them. What is learned stands between "
        "« and ». Look here first when a run does not learn.",
        "python data.py --model demo/base --data demo/data/intent_train.jsonl --show 1",
    )
    add_keys(parser, ShowConfig)
    return parser


def main() -> None:
    try:
        config = read_keys(ShowConfig, command_line().parse_args())
        for name in ("model", "data"):
            if not getattr(config, name):
                raise ValueError(f"--{name} is required")
        base = local_directory(config.model, files=["*.json", "*.jinja", "tiktoken.model"])
        tokenizer = load_tokenizer(base, config.chat_format)
        samples = encode_file(config.data, tokenizer)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    lengths = [len(ids) for ids, _ in samples]
    learned = [sum(label != IGNORE for label in labels[1:]) for _, labels in samples]
    for i, sample in enumerate(samples[: config.show]):
        print(f"sample {i + 1}: {lengths[i]} tokens, {learned[i]} learned")
        print(f"{shown(sample, tokenizer)}\n")
    print(f"chat format: {tokenizer.chat.name}, from {tokenizer.chat.source}")
    print(
        f"samples: {len(samples):,}, with nothing to learn: {sum(n == 0 for n in learned):,}; "
        f"tokens: {sum(lengths):,}, learned: {sum(learned):,}, in the longest: {max(lengths):,}"
    )
    given = ["--model", config.model, "--data", config.data]
    given += ["--chat_format", config.chat_format] if config.chat_format else []
    print(f"next: python train.py {shlex.join(given)} --output_dir DIR")


if __name__ == "__main__":
    main()
