"""Rows of a data file -> conversations -> the text of a sample, with what is learned of it.

A key that changes what is learned is honoured, and an unknown one refused: nothing that a row says
is passed over, metadata apart.
"""

import difflib
import gzip
import re
import zlib
from pathlib import Path

from chat.template import Chat, Message, Piece
from chat.tokenizer import Tokenizer
from config import no_such
from files import parse_json

# Fields of rows and messages that say where they are from, or how long they are, and no more.
METADATA = set(
    """
id idx index uid uuid key prompt_id conversation_id message_id source data_source dataset subset
split category topic tag tags task task_type skill type subject difficulty lang language license url
model generator created created_at timestamp date length num_tokens num_turns title quality rating
score metadata meta
""".split()
)
LAYOUTS = {  # the field that names a layout -> the fields of such a row
    "messages": ("messages", "system"),
    "conversations": ("conversations", "system"),  # ShareGPT's
    "instruction": ("instruction", "input", "output", "system"),  # Alpaca's
    "prompt": ("prompt", "completion"),
}
ROLES = {name: name for name in ("system", "user", "assistant")}
ROLES |= {"human": "user", "gpt": "assistant"}  # ShareGPT's
# How a message says whether it is learned: ESFT has mask, OpenAI and others weight, others loss.
SAYS_LEARNED = {"mask": {0: True, 1: False}, "weight": {0: False, 1: True}}
SAYS_LEARNED["loss"] = {False: False, True: True}
NOTHING = (None, "", [], {})  # a field with such a value says nothing


def read_rows(path: str | Path) -> list[tuple[str, dict]]:
    """Returns (where, row) for every row of a file of JSON lines or of one JSON array, plain or
    compressed with gzip (NAME.gz). `where` names file and line. Raises OSError or ValueError."""
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path}: is a folder; a data file is required")
    if not path.is_file():
        raise FileNotFoundError(no_such(path, "data file"))
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
        try:
            rows = [(where, parse_json(line, where)) for where, line in lines if line.strip()]
        except ValueError as error:
            raise ValueError(f"{error}; one JSON object a line is required, or one array") from None
    if not rows:
        raise ValueError(f"{path}: the file is empty; at least one row is required")
    for where, row in rows:
        if not isinstance(row, dict):
            raise ValueError(f"{where}: must be a JSON object, found {row!r:.60}")
    return rows


def is_text(value) -> bool:
    """Returns whether a value is a string that can be written, without half a surrogate pair."""
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


def text_field(row: dict, field: str, where: str) -> str:
    if not is_text(row.get(field)):
        raise ValueError(f"{where}: field {field} is {row.get(field)!r:.60}; a string is required")
    return row[field]


def check_known(values: dict, known: tuple[str, ...], where: str) -> None:
    """Raises ValueError for a field that says something, and is neither known nor metadata."""
    for name, value in values.items():
        if name in known or name in METADATA or value in NOTHING:
            continue
        close = difflib.get_close_matches(name, known, 1)
        meant = f" (did you mean {close[0]}?)" if close else ""
        found = f"field {name} is {value!r:.60}; it is not read{meant}, so it must be removed"
        raise ValueError(f"{where}: {found}; read are {', '.join(known)}, and metadata such as id")


def read_pieces(path: str | Path, tokenizer: Tokenizer) -> list[list[Piece]]:
    """Returns the pieces of each row of a training file. Raises OSError, and ValueError that names
    file, line and field."""
    return [row_pieces(row, tokenizer, where) for where, row in read_rows(path)]


def row_pieces(row: dict, tokenizer: Tokenizer, where: str) -> list[Piece]:
    """Returns the pieces of a row in one of LAYOUTS: of a conversation, in the checkpoint's chat
    format; of a prompt and its completion, as they are."""
    return pieces_and_answers(row, tokenizer.chat, where)[0]


def is_training_row(row: dict) -> bool:
    """Returns whether a row has one of LAYOUTS. A prompt alone may belong to an evaluation."""
    return "completion" in row or any(name in row for name in LAYOUTS if name != "prompt")


def prompt_and_answer(row: dict, tokenizer: Tokenizer, where: str) -> tuple[str, str] | None:
    """Returns the last learned answer of a row, without its reasoning and end, behind the text that
    stands before it in training, without a begin of sequence. None if no answer is learned."""
    pieces, answers = pieces_and_answers(row, tokenizer.chat, where)
    learned = [n for n, answer in enumerate(answers) if answer.is_learned]
    if not learned:
        return None
    before = pieces[: 2 * learned[-1] + 1]  # each answer is a piece behind a piece of other text
    prompt = "".join(piece.text for piece in before)
    return prompt.removeprefix(tokenizer.chat.bos), answers[learned[-1]].content


def pieces_and_answers(row: dict, chat: Chat, where: str) -> tuple[list[Piece], list[Message]]:
    """Returns the pieces of a row, and its answers."""
    said = [name for name in LAYOUTS if name in row]
    layout = next((name for name in said if row[name] not in NOTHING), said[0] if said else None)
    if layout is None:
        needed = f"field messages is missing (or another of {', '.join(LAYOUTS)})"
        raise ValueError(f"{where}: {needed}; the row has {', '.join(map(str, row)) or 'none'}")
    if layout == "prompt" and "completion" not in row and "raw_answers" in row:
        raise ValueError(f"{where}: field completion is missing: looks like an evaluation file")
    check_known(row, LAYOUTS[layout], where)
    if layout == "prompt":
        prompt = chat.with_begin(text_field(row, "prompt", where))
        text = answer_field(row, "completion", where, chat)
        answer = Message("completion", "assistant", text, is_learned=True)
        return [Piece(prompt), Piece(text + chat.end, True)], [answer]
    messages = conversation(row, layout, where, chat)
    try:
        chat.check_tokens("messages")
        return chat.pieces(messages), [m for m in messages if m.role == "assistant"]
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def conversation(row: dict, layout: str, where: str, chat: Chat) -> list[Message]:
    """Returns the messages of a row. A system message may come first; then come questions and
    answers in any order, an answer last. Raises ValueError that names row and field."""
    if layout == "instruction":
        names = ["instruction", *(["input"] if row.get("input") else [])]
        asked = "\n".join(text_field(row, name, where) for name in names)
        answer = answer_field(row, "output", where, chat)
        messages = [Message("instruction", "user", chat.without_begin(asked))]
        messages += [Message("output", "assistant", answer, is_learned=True)]
    else:
        if not isinstance(row[layout], list) or not row[layout]:
            found = f"field {layout} is {row[layout]!r:.60}"
            raise ValueError(f"{where}: {found}; a list of messages is required")
        numbered = enumerate(row[layout])
        messages = [read_message(m, f"{layout}[{i}]", where, chat) for i, m in numbered]
    if row.get("system"):
        messages.insert(0, Message("system", "system", text_field(row, "system", where)))
    for message in messages[1:]:
        if message.role == "system":
            said = "field role is 'system'; only the first message may be"
            raise ValueError(f"{where}: {message.name}: {said}")
    if messages[-1].role != "assistant":
        end = f"{layout} end with role {messages[-1].role}"
        raise ValueError(f"{where}: {end}; the answer, role assistant, is missing")
    return messages


def answer_field(values: dict, name: str, where: str, chat: Chat) -> str:
    """Returns the text of an answer, without ends of sequence."""
    answer = chat.without_ends(text_field(values, name, where))
    if not answer.strip():
        raise ValueError(f"{where}: field {name} is empty; an answer is required")
    return answer


def read_message(message: dict, name: str, where: str, chat: Chat) -> Message:
    """Returns a message of the list in a row. `name` is its place there."""
    here = f"{where}: {name}"
    if not isinstance(message, dict):
        raise ValueError(f"{here} is {message!r:.60}; an object with role and content is required")
    fields = ("from", "value") if "from" in message else ("role", "content")
    check_known(message, (*fields, "reasoning_content", *SAYS_LEARNED), here)
    role = message.get(fields[0])
    if not isinstance(role, str) or role not in ROLES:
        found = f"field {fields[0]} is {role!r:.60}"
        raise ValueError(f"{here}: {found}; must be system, user or assistant")
    role, reasoning = ROLES[role], message.get("reasoning_content") or ""
    if role == "assistant":
        content = answer_field(message, fields[1], here, chat)
    else:
        content = chat.without_begin(text_field(message, fields[1], here))
    if reasoning:
        text_field(message, "reasoning_content", here)
        if role != "assistant":
            raise ValueError(f"{here}: field reasoning_content is {reasoning!r:.60}; for answers")
    return Message(name, role, content, reasoning, says_learned(message, role, here))


def says_learned(message: dict, role: str, here: str) -> bool:
    """Returns whether a message is learned: an answer, unless one of SAYS_LEARNED says no."""
    learned = role == "assistant"
    for name, meanings in SAYS_LEARNED.items():
        if (value := message.get(name)) is None:
            continue
        if not isinstance(value, int | float) or value not in meanings:
            raise ValueError(f"{here}: field {name} is {value!r:.60}; must be 0 or 1")
        if meanings[value] and role != "assistant" and name != "mask":
            raise ValueError(f"{here}: field {name} is {value!r}; only answers can be learned")
        learned = learned and meanings[value]
    return learned
