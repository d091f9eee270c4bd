"""JSON lines -> token ids and labels -> packed rows -> the rows of a step; and padded batches for
scoring and evaluation. The tasks of evaluations are in tasks/.

A sample is a pair (input_ids, labels) of equally long lists. A label stands at the position of its
own token (the loss shifts them by one). It is IGNORE where nothing is learned.
"""

import gzip
import math
import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import tokenizers
import torch
from torch import Tensor

from files import parse_json, read_json

IGNORE = -100  # the label that torch.nn.functional.cross_entropy passes over

Sample = tuple[list[int], list[int]]


@dataclass
class ChatFormat:
    """What surrounds the contents of a conversation. An end of sequence follows each answer."""

    system: str
    user: str  # ends with the words that ask for the answer
    answer: str
    special_tokens: tuple[str, ...] = ()


USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
CHAT_FORMATS = {  # model_type -> its format; the paper and DeepSeekMoE-16B-chat use V2's, R1 V3's
    "deepseek_v2": ChatFormat("{}\n\n", "User: {}\n\nAssistant:", " {}"),
    "deepseek_v3": ChatFormat("{}", USER + "{}" + ASSISTANT, "{}", (USER, ASSISTANT)),
}


@dataclass
class Tokenizer:
    """A checkpoint's tokenizer, the ids of its begin and end of sequence, and a key of
    CHAT_FORMATS."""

    inner: tokenizers.Tokenizer
    bos_id: int
    eos_id: int
    chat_format: str

    def encode_all(self, texts: list[str]) -> list[list[int]]:
        return [e.ids for e in self.inner.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: list[int]) -> str:
        return self.inner.decode(ids, skip_special_tokens=True)


def load_tokenizer(directory: str | Path, chat_format: str = "") -> Tokenizer:
    """Returns the tokenizer of a checkpoint. tokenizer_config.json says which tokens begin and end
    a sequence. If `chat_format` is empty, the model_type in config.json decides. Raises
    FileNotFoundError or ValueError that names file and field."""
    directory = Path(directory)
    path, config_path = directory / "tokenizer.json", directory / "tokenizer_config.json"
    tiktoken = sorted(directory.glob("*tiktoken*"))
    if tiktoken and not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file; {tiktoken[0].name} is a tiktoken file, which is not read. "
            "Convert it once, with the pattern and special tokens of the checkpoint's own "
            "tokenizer code: transformers.integrations.tiktoken.convert_tiktoken_to_fast("
            f"tiktoken.Encoding(...), {str(directory)!r})"
        )
    for needed in (path, config_path):
        if not needed.is_file():
            raise FileNotFoundError(f"{needed}: no such file")
    try:
        inner = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception for a file that it cannot read
        raise ValueError(f"{path}: not a tokenizer file: {error}") from None
    inner.no_padding()
    inner.no_truncation()
    config = read_json(config_path)
    if not isinstance(config, dict):
        raise ValueError(f"{config_path}: must be a JSON object")
    ids = []
    for field in ("bos_token", "eos_token"):
        token = config.get(field)
        token = token.get("content") if isinstance(token, dict) else token
        number = inner.token_to_id(token) if isinstance(token, str) else None
        if number is None:
            found = f"{field} is {config.get(field)!r}"
            raise ValueError(f"{config_path}: {found}; must be a token of {path.name}")
        ids.append(number)
    raw = read_json(directory / "config.json") if (directory / "config.json").is_file() else {}
    count, most = inner.get_vocab_size(), raw.get("vocab_size", math.inf)
    if count > most:
        raise ValueError(f"{path}: has {count} tokens; vocab_size is {most}")
    family = raw.get("model_type", "deepseek")
    chat_format = chat_format or {"deepseek": "deepseek_v2"}.get(family, family)
    if chat_format not in CHAT_FORMATS:
        raise ValueError(f"chat_format is {chat_format!r}; must be {', '.join(CHAT_FORMATS)}")
    return Tokenizer(inner, *ids, chat_format)


def read_rows(path: str | Path) -> list[tuple[str, dict]]:
    """Returns (where, row) for every row of a file of JSON lines or of one JSON array, plain or
    compressed with gzip (NAME.gz). `where` names file and line. Raises OSError or ValueError."""
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path}: is a folder; a data file is required")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such data file")
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
        text = content.decode("utf-8-sig")  # some editors put a byte order mark first
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: not a gzip file: {error}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text: {error}") from None
    if text.lstrip().startswith("["):
        rows = [(f"{path}: row {i}", row) for i, row in enumerate(parse_json(text, str(path)), 1)]
    else:
        lines = [(f"{path}: line {i}", line) for i, line in enumerate(text.split("\n"), 1)]
        rows = [(where, parse_json(line, where)) for where, line in lines if line.strip()]
    if not rows:
        raise ValueError(f"{path}: the file is empty; at least one row is required")
    for where, row in rows:
        if not isinstance(row, dict):
            raise ValueError(f"{where}: must be a JSON object, found {row!r:.60}")
    return rows


def is_text(value) -> bool:
    """Returns whether a value is a string that can be written, without half a surrogate pair."""
    return isinstance(value, str) and not any("\ud800" <= letter <= "\udfff" for letter in value)


class Piece(NamedTuple):
    """A part of a sample."""

    text: str
    is_answer: bool = False  # then an end of sequence follows
    is_learned: bool = False


def text_field(row: dict, field: str, where: str) -> str:
    if not is_text(row.get(field)):
        raise ValueError(f"{where}: field {field} is {row.get(field)!r:.60}; a string is required")
    return row[field]


def chat_pieces(messages: list[dict], chat_format: str, where: str = "messages") -> list[Piece]:
    """Returns a piece for each message, with contents stripped. A system message may come first;
    then come questions and answers. `"mask": 1` leaves an answer out of the loss. Raises ValueError
    that names row and field."""
    form = CHAT_FORMATS[chat_format]
    if not isinstance(messages, list) or not messages:
        found = f"field messages is {messages!r:.60}"
        raise ValueError(f"{where}: {found}; a list of messages is required")
    pieces = []
    for i, message in enumerate(messages):
        here = f"{where}: messages[{i}]"
        if not isinstance(message, dict):
            found = f"{here} is {message!r:.60}"
            raise ValueError(f"{found}; an object with role and content is required")
        role, content = message.get("role"), text_field(message, "content", here).strip()
        if role == "user":
            pieces.append(Piece(form.user.format(content)))
        elif role == "system":
            if i > 0:
                raise ValueError(f"{here}: field role is 'system'; only the first message may be")
            pieces.append(Piece(form.system.format(content)))
        elif role == "assistant":
            if not content:
                raise ValueError(f"{here}: field content is empty; an answer is required")
            if message.get("mask", 0) not in (0, 1):
                raise ValueError(f"{here}: field mask is {message['mask']!r}; must be 0 or 1")
            pieces.append(Piece(form.answer.format(content), True, message.get("mask", 0) != 1))
        else:
            raise ValueError(f"{here}: field role is {role!r}; must be system, user or assistant")
    if not pieces[-1].is_answer:
        end = f"messages end with role {messages[-1]['role']}"
        raise ValueError(f"{where}: {end}; the answer, role assistant, is missing")
    return pieces


def check_chat_tokens(tokenizer: Tokenizer, what: str) -> None:
    """Raises ValueError if the tokenizer lacks a token of its chat format."""
    for token in CHAT_FORMATS[tokenizer.chat_format].special_tokens:
        if tokenizer.inner.token_to_id(token) is None:
            raise ValueError(
                f"{what} in chat_format {tokenizer.chat_format} need the token {token}, which this "
                "tokenizer lacks; set another chat_format, or give text that carries its own"
            )


def row_pieces(row: dict, tokenizer: Tokenizer, where: str) -> list[Piece]:
    """Returns the pieces of a row of `messages`, or of `prompt` and `completion`, which are taken
    as they are."""
    if "messages" in row:
        check_chat_tokens(tokenizer, f"{where}: messages")
        return chat_pieces(row["messages"], tokenizer.chat_format, where)
    if "prompt" not in row:
        raise ValueError(f"{where}: field messages (or prompt and completion) is missing")
    if "raw_answers" in row:
        raise ValueError(f"{where}: field completion is missing: looks like an evaluation file")
    prompt, completion = text_field(row, "prompt", where), text_field(row, "completion", where)
    if not completion.strip():
        raise ValueError(f"{where}: field completion is empty; an answer is required")
    return [Piece(prompt), Piece(completion, True, True)]


def encode_chat(messages: list[dict], tokenizer: Tokenizer) -> Sample:
    """Returns (input_ids, labels) of a conversation; see `chat_pieces` for format and errors."""
    return encode_pieces([chat_pieces(messages, tokenizer.chat_format)], tokenizer)[0]


def encode_file(path: str | Path, tokenizer: Tokenizer) -> list[Sample]:
    """Returns all rows of a data file as samples. Checks every row before it encodes the first."""
    rows = [row_pieces(row, tokenizer, where) for where, row in read_rows(path)]
    return encode_pieces(rows, tokenizer)


def encode_pieces(rows: list[list[Piece]], tokenizer: Tokenizer) -> list[Sample]:
    """Returns a sample for each row of pieces. The begin of sequence is learned, as in the original
    code: it is predicted where the sample stands behind another one in a packed row."""
    all_ids = iter(tokenizer.encode_all([piece.text for pieces in rows for piece in pieces]))
    samples = []
    for pieces in rows:
        input_ids, labels = [tokenizer.bos_id], [tokenizer.bos_id]
        for piece in pieces:
            ids = next(all_ids) + ([tokenizer.eos_id] if piece.is_answer else [])
            input_ids += ids
            labels += ids if piece.is_learned else [IGNORE] * len(ids)
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
