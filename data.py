"""JSON lines -> token ids and labels -> packed rows -> batches that are a pure function of (data,
seed, step).

A sample is a pair (input_ids, labels) of equally long lists. Labels stand at the position of their
own token (the loss shifts them by one) and are IGNORE where nothing is learned."""

import gzip
import json
import random
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import tokenizers
import torch
from torch import Tensor

IGNORE = -100  # the label that torch.nn.functional.cross_entropy passes over

Sample = tuple[list[int], list[int]]


@dataclass
class ChatFormat:
    """What surrounds the contents of a conversation. An end of sequence follows each answer."""

    system: str
    user: str  # with what asks for the answer
    answer: str
    special_tokens: tuple[str, ...] = ()


# V2's is the paper's, too, and that of DeepSeekMoE-16B-chat; V3's is that of V3 and R1.
CHAT_FORMATS = {
    "deepseek_v2": ChatFormat("{}\n\n", "User: {}\n\nAssistant:", " {}"),
    "deepseek_v3": ChatFormat(
        "{}", "<｜User｜>{}<｜Assistant｜>", "{}", ("<｜User｜>", "<｜Assistant｜>")
    ),
}
FORMAT_OF_MODEL_TYPE = {
    "deepseek": "deepseek_v2",
    "deepseek_v2": "deepseek_v2",
    "deepseek_v3": "deepseek_v3",
}


@dataclass
class Tokenizer:
    """A checkpoint's tokenizer with the ids of its begin and end of sequence, and the format of its
    conversations, a key of CHAT_FORMATS."""

    inner: tokenizers.Tokenizer
    bos_id: int
    eos_id: int
    chat_format: str

    def encode_all(self, texts: list[str]) -> list[list[int]]:
        return [e.ids for e in self.inner.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: list[int]) -> str:
        return self.inner.decode(ids, skip_special_tokens=True)


def load_tokenizer(directory: str | Path, chat_format: str = "") -> Tokenizer:
    """Reads tokenizer.json, and from tokenizer_config.json which tokens begin and end a sequence
    (strings or objects with "content"). `chat_format`: a key of CHAT_FORMATS; empty: that of the
    model_type in config.json. Raises FileNotFoundError or ValueError that names file and field."""
    directory = Path(directory)
    path, config_path = directory / "tokenizer.json", directory / "tokenizer_config.json"
    if tiktoken := [p for p in sorted(directory.glob("*")) if "tiktoken" in p.name]:
        if not path.is_file():
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
    config = parse_json(config_path.read_text(encoding="utf-8"), str(config_path))
    if not isinstance(config, dict):
        raise ValueError(f"{config_path}: must be a JSON object")
    ids = []
    for field in ("bos_token", "eos_token"):
        token = config.get(field)
        token = token.get("content") if isinstance(token, dict) else token
        number = inner.token_to_id(token) if isinstance(token, str) else None
        if number is None:
            raise ValueError(
                f"{config_path}: {field} is {config.get(field)!r}; must be a token of {path.name}"
            )
        ids.append(number)
    model_config = directory / "config.json"
    if model_config.is_file():
        raw = parse_json(model_config.read_text(encoding="utf-8"), str(model_config))
        if inner.get_vocab_size() > raw["vocab_size"]:
            raise ValueError(
                f"{path}: has {inner.get_vocab_size()} tokens; vocab_size is {raw['vocab_size']}"
            )
        chat_format = chat_format or FORMAT_OF_MODEL_TYPE[raw["model_type"]]
    return Tokenizer(inner, *ids, chat_format or "deepseek_v2")


# ------------------------------------------------------------------------------------------
# Rows


def parse_json(text: str, where: str):
    """The value of a JSON text. Raises ValueError that starts with `where`."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}: " if error.lineno > 1 else ""
        raise ValueError(f"{where}: {line}not valid JSON: {error.msg}") from None
    except (ValueError, RecursionError) as error:  # a number too long, brackets too deep
        raise ValueError(f"{where}: not valid JSON: {error}") from None


def read_rows(path: str | Path) -> list[tuple[str, dict]]:
    """(where, row) for every row of a file of JSON lines or of one JSON array, as it is or with
    gzip (NAME.gz); `where` names file and line for error messages. Raises FileNotFoundError, or
    ValueError for a row that is not an object."""
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
    """Whether a value is a string that can be written; JSON can carry half a surrogate pair."""
    return isinstance(value, str) and not any("\ud800" <= letter <= "\udfff" for letter in value)


def text_field(row: dict, field: str, where: str) -> str:
    if not is_text(row.get(field)):
        raise ValueError(f"{where}: field {field} is {row.get(field)!r:.60}; a string is required")
    return row[field]


def chat_pieces(
    messages: list[dict], chat_format: str, where: str = "messages"
) -> list[tuple[str, bool, bool]]:
    """(text, is it an answer, is it learned) for each message: a system message, if there is one,
    then questions and answers; contents stripped. `"mask": 1` on an answer leaves it out of the
    loss. Raises ValueError that names row and field."""
    form = CHAT_FORMATS[chat_format]
    if not isinstance(messages, list) or not messages:
        raise ValueError(
            f"{where}: field messages is {messages!r:.60}; a list of messages is required"
        )
    pieces = []
    for i, message in enumerate(messages):
        here = f"{where}: messages[{i}]"
        if not isinstance(message, dict):
            raise ValueError(
                f"{here} is {message!r:.60}; an object with role and content is required"
            )
        role, content = message.get("role"), text_field(message, "content", here).strip()
        if role == "user":
            pieces.append((form.user.format(content), False, False))
        elif role == "system":
            if i > 0:
                raise ValueError(f"{here}: field role is 'system'; only the first message may be")
            pieces.append((form.system.format(content), False, False))
        elif role == "assistant":
            if not content:
                raise ValueError(f"{here}: field content is empty; an answer is required")
            if message.get("mask", 0) not in (0, 1):
                raise ValueError(f"{here}: field mask is {message['mask']!r}; must be 0 or 1")
            pieces.append((form.answer.format(content), True, message.get("mask", 0) != 1))
        else:
            raise ValueError(f"{here}: field role is {role!r}; must be system, user or assistant")
    if not pieces[-1][1]:
        raise ValueError(
            f"{where}: messages end with role {messages[-1]['role']}; the answer, role assistant, "
            "is missing"
        )
    return pieces


def check_chat_tokens(tokenizer: Tokenizer, what: str) -> None:
    """Raises ValueError if the tokenizer lacks a token of its chat format."""
    for token in CHAT_FORMATS[tokenizer.chat_format].special_tokens:
        if tokenizer.inner.token_to_id(token) is None:
            raise ValueError(
                f"{what} in chat_format {tokenizer.chat_format} need the token {token}, which this "
                "tokenizer lacks; set another chat_format, or give text that carries its own"
            )


def row_pieces(row: dict, tokenizer: Tokenizer, where: str) -> list[tuple[str, bool, bool]]:
    """The pieces of a row of `messages`, or of `prompt` and `completion`: text that stands as it
    is, in whatever format it carries, of which the completion is learned."""
    if "messages" in row:
        check_chat_tokens(tokenizer, f"{where}: messages")
        return chat_pieces(row["messages"], tokenizer.chat_format, where)
    if "prompt" not in row:
        raise ValueError(f"{where}: field messages (or prompt and completion) is missing")
    if "raw_answers" in row:
        raise ValueError(
            f"{where}: field completion is missing; this looks like an evaluation file"
        )
    prompt, completion = text_field(row, "prompt", where), text_field(row, "completion", where)
    if not completion.strip():
        raise ValueError(f"{where}: field completion is empty; an answer is required")
    return [(prompt, False, False), (completion, True, True)]


def join_pieces(
    pieces: list[tuple[str, bool, bool]], ids: Iterable[list[int]], tokenizer: Tokenizer
) -> Sample:
    """The begin of sequence is learned (as in the original code; alone in a row it predicts
    nothing, but packed behind another sample it is predicted)."""
    input_ids, labels = [tokenizer.bos_id], [tokenizer.bos_id]
    for (_, is_answer, is_learned), piece in zip(pieces, ids, strict=True):
        piece = piece + [tokenizer.eos_id] if is_answer else piece
        input_ids += piece
        labels += piece if is_learned else [IGNORE] * len(piece)
    return input_ids, labels


def encode_chat(messages: list[dict], tokenizer: Tokenizer) -> Sample:
    """(input_ids, labels) of one conversation: see `chat_pieces` for the format and the errors."""
    pieces = chat_pieces(messages, tokenizer.chat_format)
    return join_pieces(pieces, tokenizer.encode_all([text for text, *_ in pieces]), tokenizer)


def encode_file(path: str | Path, tokenizer: Tokenizer) -> list[Sample]:
    """All rows of a data file as samples. Every row is checked before the first is encoded."""
    rows = [row_pieces(row, tokenizer, where) for where, row in read_rows(path)]
    ids = iter(tokenizer.encode_all([text for pieces in rows for text, *_ in pieces]))
    return [join_pieces(pieces, [next(ids) for _ in pieces], tokenizer) for pieces in rows]


# ------------------------------------------------------------------------------------------
# Packed rows for training


def pack(
    samples: list[Sample],
    seq_length: int,
    random_concat_ratio: float,
    pad_id: int,
    seed: int,
    document_mask: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Samples, in their order, joined into rows: tokens, labels and documents, int64 (rows,
    seq_length). A token's document is the number of its sample in `samples`; padding comes last and
    is document len(samples).

    The paper's way: a sample that does not fit into what is left of a row loses its head, not its
    tail; with probability `random_concat_ratio` a sample that joins others loses its first token;
    samples see those before them in the row; the last row is padded. With `document_mask`, for
    samples that do not see each other, the first token of each is not learned: nothing before it
    could predict it."""
    draw = random.Random(seed)
    rows: list[tuple[list[int], list[int], list[int]]] = []
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
            rows.append((tokens, labels, documents))
            tokens, labels, documents = [], [], []
    if tokens:
        padding = seq_length - len(tokens)
        rows.append(
            (
                tokens + [pad_id] * padding,
                labels + [IGNORE] * padding,
                documents + [len(samples)] * padding,
            )
        )
    return tuple(torch.tensor(column) for column in zip(*rows))


@lru_cache(maxsize=2)
def epoch_order(n_rows: int, seed: int, epoch: int) -> list[int]:
    order = list(range(n_rows))
    random.Random(f"{seed} {epoch}").shuffle(order)
    return order


def rows_of_step(n_rows: int, batch_size: int, seed: int, step: int) -> list[int]:
    """The row numbers of step `step` (from 0): each epoch goes once through all rows, in its own
    order."""
    places = range(step * batch_size, (step + 1) * batch_size)
    return [epoch_order(n_rows, seed, place // n_rows)[place % n_rows] for place in places]


# ------------------------------------------------------------------------------------------
# Padded rows for scoring and evaluation


def pad(sequences: list[list[int]], value: int) -> Tensor:
    """int64 (B, longest), padded at the end."""
    longest = max(map(len, sequences))
    return torch.tensor([sequence + [value] * (longest - len(sequence)) for sequence in sequences])


def by_length(lengths: list[int], max_tokens: int) -> Iterator[list[int]]:
    """Groups of indices, longest first, each of at most `max_tokens` with its padding (or of one
    index)."""
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
    """The input_ids of randomly drawn samples, each cut to its first `max_length` tokens, until
    they hold `n_tokens` or none is left."""
    order = list(range(len(samples)))
    random.Random(seed).shuffle(order)
    drawn, total = [], 0
    for i in order:
        if total >= n_tokens:
            break
        drawn.append(samples[i][0][:max_length])
        total += len(drawn[-1])
    return drawn
