"""What a conversation looks like as text, and where its answers stand in that text.

A chat format is a template in Jinja's language, which most checkpoints publish. It is rendered as
transformers does, in Jinja's immutable sandbox: a template can read what it is given, and nothing
else.
"""

import json
import os
from contextlib import suppress
from datetime import datetime
from typing import NamedTuple

from jinja2 import nodes
from jinja2.exceptions import TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
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
        f"{{% if m.role == 'user' %}}{{{{ '{USER}' + m.content | trim }}}}"
        "{% elif m.role == 'assistant' %}"
        f"{{{{ '{ASSISTANT}' + m.content | trim + eos_token }}}}"
        "{% else %}{{ m.content | trim }}{% endif %}{% endfor %}"
        f"{{% if add_generation_prompt %}}{ASSISTANT}{{% endif %}}"
    ),
}
OWN = "template"  # the checkpoint's own


class Piece(NamedTuple):
    """A part of a sample."""

    text: str
    is_learned: bool = False


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


def first_of(tokens: list[str], text: str) -> str:
    """Returns the token that stands first in the text; "" if none is there."""
    return min((t for t in tokens if t in text), key=text.index, default="")


class Chat:
    """A chat format of a checkpoint.

    name      template, or a key of CHAT_FORMATS
    text      the template
    source    where it is from: a file, or the name
    bos       the text that begins a sequence; "" if the format begins without
    end       the token that ends an answer
    lead      what stands between a prompt and the answer's content: deepseek_v2 has a space
    """

    def __init__(
        self, name: str, template: str, source: str, tokens: dict[str, str], special: list[str]
    ):
        """`tokens` are what the template may name, bos_token and eos_token among them; `special`
        the texts of all special tokens. Raises ValueError that names `source`."""
        self.name, self.text, self.source, self.tokens = name, template, source, tokens
        try:
            self.template = ENVIRONMENT.from_string(template)
        except Exception as error:  # TemplateError, or what Python makes of the template's code
            raise ValueError(f"{source}: the chat template is wrong: {error}") from None
        self.lacking = ""
        if name == "deepseek_v3":
            self.lacking = next((mark for mark in (USER, ASSISTANT) if mark not in special), "")
        question = {"role": "user", "content": "question"}
        talk = [question, {"role": "assistant", "content": "answer"}]
        prompt, turn = self.render([question], True), self.render(talk)
        before, found, self.tail = turn.rpartition("answer")
        longer = self.render([*talk, question])
        if not found or not longer.startswith(before + found):
            raise ValueError(f"{source}: the chat template does not show an answer where it stands")
        following = longer[len(before + found) :].rpartition("question")[0]
        self.end = first_of(special, following) or tokens["eos_token"]
        self.ending = following.partition(self.end)[0] + self.end
        self.lead = before[len(prompt) :] if before.startswith(prompt) else ""
        bos = tokens.get("bos_token", "")
        self.bos = bos if turn.startswith(bos) else ""

    def render(self, messages: list[dict], generation_prompt: bool = False) -> str:
        """Returns the text of a conversation, begin and end of sequence included. With
        `generation_prompt`, what asks for the next answer follows. Raises ValueError."""
        given = {"messages": messages, "tools": None, "documents": None, **self.tokens}
        try:
            return self.template.render(add_generation_prompt=generation_prompt, **given)
        except Exception as error:  # a template is a program: it may divide by zero
            said = f"{type(error).__name__}: {error}"
            raise ValueError(f"the chat template ({self.source}) refuses it: {said}") from None

    def prompt(self, question: str) -> str:
        """Returns the text that asks for an answer to a question, without a begin of sequence.
        Raises ValueError."""
        self.check_tokens("questions")
        asked = self.render([{"role": "user", "content": question}], generation_prompt=True)
        return asked.removeprefix(self.bos)

    def begun(self, text: str) -> str:
        """Returns a text that begins as this format begins, once."""
        return text if text.lstrip().startswith(self.bos) else self.bos + text

    def answer(self, content: str) -> str:
        """Returns what follows a prompt: the answer and its end."""
        return self.lead + self.ended(content)

    def ended(self, text: str) -> str:
        """Returns an answer that ends as this format ends it, once."""
        ends = (self.end, self.tokens["eos_token"])
        return text if text.rstrip().endswith(ends) else text + self.end

    def check_tokens(self, what: str) -> None:
        if self.lacking:
            raise ValueError(
                f"{what} in chat_format {self.name} need the token {self.lacking}, which this "
                "tokenizer lacks; set another chat_format, or give text that carries its own"
            )

    def pieces(self, messages: list[dict], learned: list[bool], where: str) -> list[Piece]:
        """Returns a conversation as alternating text and answers. An answer is what the model has
        to write, its end included; `learned` says of each message whether it is learned.

        Answers are found by rendering the conversation up to each of them, so the text must begin
        in the same way however long the conversation is. Raises ValueError that names the row."""
        self.check_tokens(f"{where}: messages")
        messages = [self.bare(message) for message in messages]
        try:
            whole, pieces, done = self.render(messages), [], 0
            check_kept(messages, whole)
            for i in (i for i, message in enumerate(messages) if message["role"] == "assistant"):
                until = self.render(messages[: i + 1])
                if not whole.startswith(until):
                    said = "is rendered in another way where the conversation goes on"
                    raise ValueError(f"messages[{i}]: this answer {said}, so it cannot be learned")
                start, content_end = self.answer_start(messages[: i + 1], until), len(until)
                if until.endswith(self.tail):
                    content_end -= len(self.tail)
                if not done <= start <= content_end:
                    raise ValueError(f"messages[{i}]: no text of its own is rendered for it")
                text, stop = whole[start:content_end], content_end
                if whole.startswith(self.ending, content_end):
                    text, stop = text + self.ending, content_end + len(self.ending)
                elif i + 1 == len(messages):  # GLM's ends with the header of the next message
                    text, stop = whole[start:] + self.end, len(whole)
                pieces += [Piece(whole[done:start]), Piece(text, learned[i])]
                done = stop
            return [*pieces, Piece(whole[done:])] if whole[done:] else pieces
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None

    def bare(self, message: dict) -> dict:
        """Returns a message without a begin or end of sequence, which the template writes."""
        content = message["content"].removeprefix(self.tokens.get("bos_token", ""))
        if message["role"] == "assistant":
            while (shorter := content.rstrip()).endswith((self.end, self.tokens["eos_token"])):
                content = shorter.removesuffix(self.end).removesuffix(self.tokens["eos_token"])
        return message | {"content": content}

    def answer_start(self, messages: list[dict], until: str) -> int:
        """Returns where the last message's answer begins in `until`, its rendering: behind what
        asks for it. Some formats ask in other words than they record (R1 asks with <think>): there
        it is where the texts of two other answers begin to differ."""
        with suppress(ValueError):  # some templates want a message to answer
            prompt = self.render(messages[:-1], generation_prompt=True)
            if until.startswith(prompt):
                return len(prompt)
        fields = [name for name in ("content", "reasoning_content") if messages[-1].get(name)]
        others = [messages[-1] | dict.fromkeys(fields, letter) for letter in "01"]
        common = os.path.commonprefix([self.render([*messages[:-1], m]) for m in others])
        if not until.startswith(common):
            raise ValueError(f"messages[{len(messages) - 1}]: its header depends on its content")
        return len(common)


def check_kept(messages: list[dict], whole: str) -> None:
    """Raises ValueError for a text that the template leaves out or changes, white space apart."""
    rest = "".join(whole.split())
    for i, message in enumerate(messages):
        for name in ("reasoning_content", "content"):
            text = "".join((message.get(name) or "").split())
            _, found, after = rest.partition(text) if text else ("", True, rest)
            if not found:
                said = f"messages[{i}]: field {name} is {message[name]!r:.60}"
                raise ValueError(f"{said}; the chat format leaves it out, or a part of it")
            rest = after
