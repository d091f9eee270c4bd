"""A conversation with a base and its adapters: prompts in the chat format, once; answers as they
are written; what is said on a terminal and in a pipe. How a model chooses its tokens is in
generate.py."""

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import BinaryIO, TextIO

from chat import Tokenizer
from chat.template import Message

HELP = """\
/adapter NAME   talks to that one alone; /adapter base is the base alone
/adapter        talks to all again, and lists their names
/reset          begins anew: what was said is forgotten
/help           lists these
Ctrl-C ends an answer, Ctrl-D ends the talk."""
CARRIED = "carries the chat format already, which is not written twice"

Stream = Callable[[str, list[int], int], Iterator[int]]  # name, prompt, most new tokens -> tokens


def note(text: str) -> None:
    """Prints what is no answer. On stdout are answers only."""
    print(text, file=sys.stderr, flush=True)


def user(question: str) -> Message:
    return Message("question", "user", question)


@dataclass
class Prompts:
    """Turns what a user writes into the tokens that a model reads. Raises ValueError if the chat
    format refuses the system message, or leaves it out."""

    tokenizer: Tokenizer
    system: str  # a system message, or ""
    plain: bool  # texts stand as they are, without the chat format
    limit: int  # tokens of a prompt with its answer
    limited_by: str  # the field of config.json that says so

    def __post_init__(self):
        self.begin = [Message("system", "system", self.system)] if self.system else []
        if not self.plain:
            messages = [*self.begin, user("question")]
            self.tokenizer.chat.check_kept(messages, self.in_format(messages))

    def in_format(self, messages: list[Message]) -> str:
        self.tokenizer.chat.check_tokens("questions")
        return self.tokenizer.chat.render(messages, generation_prompt=True)

    def of_messages(self, messages: list[Message]) -> list[int]:
        """Returns the tokens that ask for the next answer of a conversation. With `plain`, returns
        those of the last message alone."""
        text = messages[-1].content if self.plain else self.in_format([*self.begin, *messages])
        return self.tokenizer.encode_prompts([text])[0]

    def of_texts(self, texts: dict[str, str]) -> list[list[int]]:
        """Returns the tokens of texts, place -> text, each a prompt of its own. Says which of them
        carry the chat format already. Raises ValueError that names the place."""
        rows, carried = [], []
        for where, text in texts.items():
            question = self.question_in(text)
            if question is not None and not question.strip():
                raise ValueError(f"{where} is empty; a question is required")
            if question != text:
                carried.append(where)
            if question is not None:
                rows.append(self.of_messages([user(question)]))
            elif not self.system:
                rows += self.tokenizer.encode_prompts([text])
            else:
                raise ValueError(f"{where} {CARRIED}; with --system, it must be a question alone")
            self.room(rows[-1], where)
        if carried:
            more = f" (and {len(carried) - 1} more)" if carried[1:] else ""
            note(f"{carried[0]}{more} {CARRIED}")
        return rows

    def question_in(self, text: str) -> str | None:
        """Returns the question in a text; None for a text that is a whole prompt already."""
        return text if self.plain else self.tokenizer.chat.question_in(text)

    def room(self, row: list[int], where: str) -> int:
        """Returns how many tokens the answer to a prompt may have. Raises ValueError for none."""
        if len(row) < self.limit:
            return self.limit - len(row)
        needed = f"must be fewer than {self.limited_by}, {self.limit:,}"
        raise ValueError(f"{where} has {len(row):,} tokens; {needed}")


def pieces_of(tokens: Iterable[int], decode: Callable[[list[int]], str]) -> Iterator[str]:
    """Yields a piece of text for each token, and a last one; together they are the text of all. A
    character whose bytes are in several tokens comes with the last of them, so that no text changes
    after it was printed."""
    ids, shown = [], 0
    for token in tokens:
        ids.append(token)
        whole = decode(ids).rstrip("\ufffd")  # which stands for a part of a character
        yield whole[shown:]
        shown = max(shown, len(whole))
    yield decode(ids)[shown:]


# ------------------------------------------------------------------------------------------
# On a terminal


class Conversation:
    """What was said to each model, by name, and to whom the user talks. Answers go to `out`: behind
    the models' names, if there are several."""

    def __init__(
        self, prompts: Prompts, names: list[str], stream: Stream, max_new_tokens: int, out: TextIO
    ):
        self.prompts, self.names, self.stream = prompts, names, stream
        self.max_new_tokens, self.out = max_new_tokens, out
        self.width = max(map(len, names)) + 2 if len(names) > 1 else 0
        self.asked = names
        self.reset()

    def reset(self) -> None:
        self.history: dict[str, list[Message]] = {name: [] for name in self.names}

    def run(self) -> None:
        """Talks until Ctrl-D."""
        with suppress(ImportError):
            import readline  # noqa: F401 - with it, input() edits lines
        sys.stdin.reconfigure(errors="replace")  # a terminal may send half a character
        while True:
            try:
                line = input("> " if sys.stdout.isatty() else "").strip()
            except KeyboardInterrupt:
                note("\nCtrl-D ends the talk.")
                continue
            except EOFError:
                note("")
                return
            try:
                if line.startswith("/"):
                    self.command(*line.split(maxsplit=1))
                elif line:
                    self.ask(line)
            except ValueError as error:
                note(str(error))
            except KeyboardInterrupt:
                note("")

    def command(self, word: str, name: str = "") -> None:
        """Does what a line says that begins with "/"."""
        if word == "/adapter" and name in ("", *self.names):
            self.asked = [name] if name else self.names
            note(f"You talk to {', '.join(self.asked)}.")
        elif word == "/adapter":
            note(f"There is no {name}; /adapter needs one of {', '.join(self.names)}.")
        elif word == "/reset":
            self.reset()
            note("What was said is forgotten.")
        elif word == "/help":
            note(HELP)
        else:
            note(f"There is no command {word}; /help lists those that there are.")

    def ask(self, text: str) -> None:
        """Asks the models one after the other; each sees its own answers. Ctrl-C ends an answer,
        and the next models are not asked. Raises ValueError if one of them cannot be asked."""
        question = self.prompts.question_in(text)
        if question is None:
            raise ValueError("This line carries a conversation of its own; one question is needed.")
        if question != text:
            note(f"The line {CARRIED}.")
        said = {name: [*self.history[name], user(question)] for name in self.asked}
        rows = {name: self.prompts.of_messages(said[name]) for name in self.asked}
        for name, row in rows.items():
            self.prompts.room(row, f"/reset begins anew. The conversation with {name}")
        for name, row in rows.items():
            answer, stopped = self.write_answer(name, row)
            self.history[name] = [*said[name], Message("answer", "assistant", answer)]
            if stopped:
                return

    def write_answer(self, name: str, row: list[int]) -> tuple[str, bool]:
        """Writes the answer of the model `name` to a prompt as it comes. Returns it, and whether
        Ctrl-C ended it."""
        room = self.prompts.room(row, "the prompt")
        most, pieces, stopped = min(self.max_new_tokens, room), [], False
        if self.width:
            print(name.ljust(self.width), end="", file=self.out, flush=True)
        try:
            for piece in pieces_of(self.stream(name, row, most), self.prompts.tokenizer.decode):
                pieces.append(piece)
                indented = piece.replace("\n", "\n" + " " * self.width)
                print(indented, end="", file=self.out, flush=True)
        except KeyboardInterrupt:
            stopped = True
        print(file=self.out, flush=True)
        if len(pieces) > most:  # one for each token, and the last
            why = "max_new_tokens" if most < room else self.prompts.limited_by
            note(f"({name} ends after {most:,} tokens, because of {why})")
        return "".join(pieces), stopped


# ------------------------------------------------------------------------------------------
# In a pipe


def read_lines(stdin: BinaryIO) -> dict[str, str]:
    """Returns the prompts of a pipe, one a line: place -> text. Raises ValueError that names a line
    that is no text."""
    content = stdin.read()
    try:
        text = content.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ValueError(f"standard input: line {line}: not UTF-8 text") from None
    lines = enumerate(text.rstrip("\n").split("\n"), 1)
    return {f"standard input: line {i}": line for i, line in lines}


def answer_line(prompt: str, answers: dict[str, str]) -> str:
    """Returns one line of answers, by name. A single one stands there alone, with a backslash, n or
    r for what would end the line; of several the line is a JSON object, with the prompt."""
    if len(answers) > 1:
        return json.dumps({"prompt": prompt, **answers}, ensure_ascii=False)
    (answer,) = answers.values()
    return answer.replace("\\", r"\\").replace("\n", r"\n").replace("\r", r"\r")
