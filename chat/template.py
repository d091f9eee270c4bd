"""What a conversation looks like as text, and where its answers stand in that text.

A chat format is a template in Jinja's language, which most checkpoints publish. It is rendered as
transformers does, in Jinja's immutable sandbox: a template can read what it is given, and nothing
else.
"""

import json
import os
from collections.abc import Iterable
from contextlib import suppress
from datetime import datetime
from typing import NamedTuple

from jinja2 import nodes
from jinja2.exceptions import TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

CHAT_FORMATS = {  # name -> template, for checkpoints without one; the paper's is deepseek_v2
    "deepseek_v2": (
        "{{ bos_token }}{% for m in messages %}"
        "{% if m.role == 'user' %}{{ 'User: ' + m.content | trim + '\\n\\n' }}"
        "{% elif m.role == 'assistant' %}{{ 'Assistant: ' + m.content | trim + eos_token }}"
        "{% else %}{{ m.content | trim + '\\n\\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
    ),
    "deepseek_v3": (
        "{{ bos_token }}{% for m in messages %}"
        "{% if m.role == 'user' %}{{ '<｜User｜>' + m.content | trim }}"
        "{% elif m.role == 'assistant' %}{{ '<｜Assistant｜>' + m.content | trim + eos_token }}"
        "{% else %}{{ m.content | trim }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"
    ),
}
MARKS = {"deepseek_v3": ("<｜User｜>", "<｜Assistant｜>")}  # tokens that a format needs
OWN = "template"  # the checkpoint's own
FORMATS = (OWN, *CHAT_FORMATS)
QUESTION, ANSWER = "Xq7question", "Xq8answer"  # words that no template has


class Piece(NamedTuple):
    """A part of a sample."""

    text: str
    is_learned: bool = False


class Message(NamedTuple):
    """A message of a conversation."""

    name: str  # its place in the row, for errors: messages[1]
    role: str  # system, user or assistant
    content: str
    reasoning_content: str = ""
    is_learned: bool = False

    def fields(self) -> dict[str, str]:
        """Returns the message as templates read it."""
        reasoning = {"reasoning_content": self.reasoning_content} if self.reasoning_content else {}
        return {"role": self.role, "content": self.content} | reasoning


class Generation(Extension):
    """The tag {% generation %}, which marks an answer. Its text is rendered like any other."""

    tags = {"generation"}

    def parse(self, parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("text_of"), [], [], body).set_lineno(line)

    def text_of(self, caller) -> str:
        return caller()


def raise_exception(message: str):
    raise TemplateError(message)


def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    options = {"indent": indent, "separators": separators, "sort_keys": sort_keys}
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


ENVIRONMENT = ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
)
ENVIRONMENT.filters["tojson"] = tojson
ENVIRONMENT.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}


def up_to_first(tokens: list[str], text: str) -> tuple[str, str]:
    """Returns what stands before the first of these tokens in a text, and the token; twice "" if
    none is there."""
    token = min((t for t in tokens if t in text), key=text.index, default="")
    return (text.partition(token)[0], token) if token else ("", "")


class Chat:
    """A chat format of a checkpoint.

    name      template, or a key of CHAT_FORMATS
    source    where the template is from: a file, or what chose it
    bos       the text that begins a sequence; "" if the format begins without
    end       the token that ends an answer
    ends      this, and the one that ends the last answer of a conversation
    """

    def __init__(
        self, name: str, template: str, source: str, tokens: dict[str, str], special: list[str]
    ):
        """`tokens` are what the template may name, bos_token and eos_token among them; `special`
        the texts of all special tokens. Raises ValueError that names `source`."""
        self.name, self.source, self.tokens, self.special = name, source, tokens, special
        self.shown: dict[tuple[Message, ...], str] = {}  # of `check_kept`
        try:
            self.template = ENVIRONMENT.from_string(template)
        except Exception as error:  # TemplateError, or what Python makes of the template's code
            line = f"line {error.lineno}: " if hasattr(error, "lineno") else ""
            raise ValueError(f"{source}: the chat template is wrong: {line}{error}") from None
        question, answer = Message("", "user", QUESTION), Message("", "assistant", ANSWER)
        turn, longer = self.render([question, answer]), self.render([question, answer, question])
        if ANSWER not in turn or QUESTION not in longer.partition(ANSWER)[2]:
            said = "the chat template does not show an answer and the next question"
            raise ValueError(f"{source}: {said}; chat_format chooses another format")
        self.tail = turn.partition(ANSWER)[2]  # what follows an answer's content: at the end,
        between = longer.partition(ANSWER)[2].rpartition(QUESTION)[0]  # and before a question
        before, token = up_to_first(special, between)
        self.ending, self.end = before + token, token or tokens["eos_token"]
        self.ends = {self.end, up_to_first(special, self.tail)[1] or self.end}
        bos = tokens.get("bos_token", "")
        self.bos = bos if turn.startswith(bos) else ""

    def render(self, messages: list[Message], generation_prompt: bool = False) -> str:
        """Returns the text of a conversation, begin and end of sequence included. With
        `generation_prompt`, what asks for the next answer follows. Raises ValueError."""
        given = {"messages": [m.fields() for m in messages], "tools": None, "documents": None}
        try:
            return self.template.render(
                add_generation_prompt=generation_prompt, **given, **self.tokens
            )
        except Exception as error:  # a template is a program: it may divide by zero
            said = f"{type(error).__name__}: {error}"
            raise ValueError(f"the chat template ({self.source}) refuses it: {said}") from None

    def prompt(self, question: str, earlier: Iterable[tuple[str, str]] = ()) -> str:
        """Returns the text that asks for an answer to a question, without a begin of sequence.
        `earlier` questions and their answers are the turns before it. Raises ValueError."""
        self.check_tokens("questions")
        roles = "user", "assistant"
        turns = [Message("turn", *said) for pair in earlier for said in zip(roles, pair)]
        asked = [*turns, Message("question", "user", question)]
        text = self.render(asked, generation_prompt=True)
        if turns:
            self.check_kept(asked, text)
        return text.removeprefix(self.bos)

    def question_in(self, text: str) -> str | None:
        """Returns the question in a text that may carry this format already, without what the
        format writes before and behind a question ("User: ", "Assistant:"). Another text is
        returned unchanged. The result is None for a text that has more of the format inside, as a
        whole conversation has: it is no question, but can be a prompt as it stands."""
        before, _, behind = self.prompt(QUESTION).partition(QUESTION)
        begin, end, text = before.strip(), behind.strip(), self.without_begin(text)
        question = text.strip().removeprefix(begin).removesuffix(end).strip()
        # A special token is a mark wherever it stands, but behind the question only the first one
        # is: a user may ask what <think> is. A word is a mark at the beginning of a line, and only
        # in a text that begins or ends with such a word.
        marks = [token for token in self.special if token in before]
        marks += [up_to_first(self.special, behind)[1]]
        if question != text.strip():
            marks += [f"\n{begin}", f"\n{end}"]
        if any(mark.strip() and mark in f"\n{question}" for mark in marks):
            return None
        return question if question != text.strip() else text

    def answer(self, content: str) -> str:
        """Returns what follows a prompt: the answer and its end, as in training."""
        answer = Message("answer", "assistant", self.without_ends(content), is_learned=True)
        pieces = self.pieces([Message("question", "user", QUESTION), answer])
        return next(piece.text for piece in pieces if piece.is_learned)

    def with_begin(self, text: str) -> str:
        """Returns a text that begins as this format begins, once."""
        return text if text.lstrip().startswith(self.bos) else self.bos + text

    def without_begin(self, content: str) -> str:
        """Returns a message's content without a begin of sequence, which the template writes."""
        bos, bare = self.tokens.get("bos_token"), content.lstrip()
        return bare.removeprefix(bos) if bos and bare.startswith(bos) else content

    def without_ends(self, content: str) -> str:
        """Returns an answer without ends of sequence, one of which follows anyway."""
        while (bare := content.rstrip()).endswith((self.end, self.tokens["eos_token"])):
            content = bare.removesuffix(self.end).removesuffix(self.tokens["eos_token"])
        return content

    def check_tokens(self, what: str) -> None:
        for mark in MARKS.get(self.name, ()):
            if mark not in self.special:
                raise ValueError(
                    f"{what} in chat_format {self.name} need the token {mark}, which this "
                    "tokenizer lacks; set another chat_format, or give text that carries its own"
                )

    def pieces(self, messages: list[Message]) -> list[Piece]:
        """Returns a conversation as alternating text and answers. An answer is what the model has
        to write, its end included.

        Answers are found by rendering the conversation up to each of them, so the text must begin
        in the same way however long the conversation is. Raises ValueError that names the
        message."""
        if not self.ending:
            said = f"has {self.tail!r:.40} behind an answer, which is no special token"
            needed = "one must end it, in the template and in the tokenizer; or set chat_format"
            raise ValueError(f"the chat template ({self.source}) {said}; {needed}")
        whole, pieces, done = self.render(messages), [], 0
        self.check_kept(messages, whole)
        for i, message in enumerate(messages):
            if message.role != "assistant":
                continue
            until = whole if message is messages[-1] else self.render(messages[: i + 1])
            if not whole.startswith(until):
                said = "the chat template renders this answer in another way where more follows"
                raise ValueError(f"{message.name}: {said}, so it cannot be learned")
            start = self.answer_start(messages[: i + 1], until)
            stop, ending = len(until) - len(self.tail), ""
            rest = whole[stop:]
            if rest.startswith(self.ending):
                ending = self.ending
            elif i + 1 == len(messages):  # GLM's last answer has no end: the next header ends one
                ending = "".join(up_to_first(self.special, rest)) or rest + self.end
            if not (until.endswith(self.tail) and done <= start <= stop and ending):
                said = "the chat template does not show this answer, or its end, as it does others"
                raise ValueError(f"{message.name}: {said}")
            text = whole[start:stop] + ending
            pieces += [Piece(whole[done:start]), Piece(text, message.is_learned)]
            done = stop + len(ending)
        return [*pieces, Piece(whole[done:])] if whole[done:] else pieces

    def answer_start(self, messages: list[Message], until: str) -> int:
        """Returns where the last message's answer begins in `until`, its rendering: behind what
        asks for it. Some formats ask in other words than they record (R1 asks with <think>): there
        it is where the texts of two other answers begin to differ."""
        with suppress(ValueError):  # some templates want a message to answer
            prompt = self.render(messages[:-1], generation_prompt=True)
            if until.startswith(prompt):
                return len(prompt)
        *before, last = messages
        reasoning = bool(last.reasoning_content)
        others = [
            last._replace(content=letter, reasoning_content=letter * reasoning) for letter in "01"
        ]
        common = os.path.commonprefix([self.render([*before, other]) for other in others])
        if not until.startswith(common):
            said = "what the chat template writes before this answer depends on the answer"
            raise ValueError(f"{last.name}: {said}")
        return len(common)

    def check_kept(self, messages: list[Message], whole: str) -> None:
        """Raises ValueError for a text that the template leaves out or changes, white space apart.
        Words in its place show whether it is rendered at all."""
        marked = tuple(
            Message("", m.role, f"Xq{i}c", f"Xq{i}r" * bool(m.reasoning_content))
            for i, m in enumerate(messages)
        )
        if marked not in self.shown:  # rows are alike, and rendering takes most of their time
            self.shown[marked] = self.render(marked)
        shown, rest = self.shown[marked], "".join(whole.split())
        for message, mark in zip(messages, marked):
            for name in ("reasoning_content", "content"):
                text = "".join(getattr(message, name).split())
                _, found, after = rest.partition(text) if text else ("", True, rest)
                if not found or getattr(mark, name) not in shown:
                    said = f"{message.name}: field {name} is {getattr(message, name)!r:.60}"
                    raise ValueError(f"{said}; the chat format leaves it out, or a part of it")
                rest = after
