"""The command that talks to a base and its adapters: on a terminal, with --prompt, and in a pipe.
The base is the demo's."""

import io
import json
import os
import pty
import random
import select
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, save_with_transformers
from tokenizers import Tokenizer, decoders, models

import generate as command
from adapter import load_adapter, save_adapter
from chat import load_tokenizer
from chat.template import Message
from checkpoint import load_model
from generate import generate, stream
from talk import Conversation, Prompts, answer_line, pieces_of

BASE = ROOT / "demo/base"
CPU = ["--model", str(BASE), "--device", "cpu"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """A step of so small a model takes longer on several threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory) -> dict[str, Path]:
    """Adapters over the base: "other" says something else, "endless" never ends."""
    folder, paths = tmp_path_factory.mktemp("runs"), {}
    for name in ("other", "endless"):
        model = load_model(BASE, dtype=torch.float32)
        cfg = {"experts": {"1": [*range(64)]}, "non_expert_modules": name == "endless"}
        if name == "endless":
            model.lm_head.weight[1] = 0  # the end of sequence has logit 0
        else:
            for expert in model.model.layers[1].mlp.experts:
                expert.down_proj.weight *= -2
        paths[name] = folder / name / "adapter"
        save_adapter(model, cfg, paths[name])
    return paths


@pytest.fixture(scope="module")
def answer(adapters):
    """Returns a function: the answer to a conversation, by `generate` in models of their own."""
    tokenizer = load_tokenizer(BASE)
    loaded = {name: load_model(BASE, dtype=torch.float32) for name in ("base", "other")}
    load_adapter(loaded["other"], adapters["other"])

    def of(name: str, *said: str) -> str:
        roles = ["user", "assistant"] * len(said)
        messages = [Message("", role, text) for role, text in zip(roles, said)]
        text = tokenizer.chat.render(messages, generation_prompt=True)
        rows = tokenizer.encode_prompts([text])
        return tokenizer.decode(generate(loaded[name], rows, 400, tokenizer.end_ids)[0])

    return of


def run(monkeypatch, capsys, *arguments, stdin: bytes | None = None) -> tuple[str, str]:
    """Runs the command in this process. Returns what is on stdout and on stderr."""
    monkeypatch.setattr(sys, "argv", ["generate.py", *CPU, *map(str, arguments)])
    if stdin is not None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
    capsys.readouterr()
    command.main()
    return capsys.readouterr()


# ------------------------------------------------------------------------------------------
# Tokens and their text


@pytest.mark.parametrize(
    "seed, family", [(1, "deepseek_v2"), (2, "deepseek_v3"), (3, "deepseek_v32")]
)
def test_the_streamed_tokens_are_those_of_generate(seed, family, tmp_path):
    save_with_transformers(tmp_path, seed, family=family)
    model = load_model(tmp_path, dtype=torch.float32)
    draw = random.Random(seed)
    for length in (1, 5, 40):
        prompt = [draw.randrange(96) for _ in range(length)]
        (endless,) = generate(model, [prompt], 12, [])
        assert len(endless) == 12
        for most, ends in ((12, []), (1, []), (12, [endless[7]]), (12, [endless[0], 5])):
            expected = generate(model, [prompt], most, ends)[0]
            assert list(stream(model, prompt, most, ends)) == expected


def test_a_token_is_there_before_the_next_is_chosen(monkeypatch):
    model, steps = load_model(BASE, dtype=torch.float32), []
    step = command.Decoder.step
    monkeypatch.setattr(command.Decoder, "step", lambda self: (steps.append(1), step(self)))
    for count, _ in enumerate(stream(model, [0, 5, 6], 6, []), 1):
        assert len(steps) == count
    assert len(steps) == 6


BYTES = {f"<0x{byte:02X}>": byte + 2 for byte in range(256)}


def with_bytes_of_their_own() -> Tokenizer:
    """A tokenizer whose tokens are letters, and bytes for what it has no letter for."""
    vocab = {"a": 0, "b": 1, **BYTES}
    tokenizer = Tokenizer(models.BPE(vocab, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


@pytest.mark.parametrize("text", ["naïve 中文", "🙂🙃 é", "한국어\n\n العربية!", "plain"])
@pytest.mark.parametrize("inner", [load_tokenizer(BASE).inner, with_bytes_of_their_own()])
def test_text_comes_in_whole_characters(inner, text):
    ids = inner.encode(text, add_special_tokens=False).ids
    assert inner.decode(ids) == text
    pieces = list(pieces_of(iter(ids), inner.decode))
    assert "".join(pieces) == text and len(pieces) == len(ids) + 1
    assert "\ufffd" not in "".join(pieces)
    if not text.isascii():
        assert "" in pieces[:-1]  # a character of several tokens
    cut = "".join(pieces_of(ids[:-1], inner.decode))  # it ends within a character
    assert text.startswith(cut.rstrip("\ufffd"))


def test_bytes_that_are_no_character_end_in_what_decode_gives():
    inner, draw = load_tokenizer(BASE).inner, random.Random(1)
    for _ in range(50):
        ids = [draw.randrange(2, 1024) for _ in range(draw.randint(0, 12))]
        assert "".join(pieces_of(ids, inner.decode)) == inner.decode(ids)


# ------------------------------------------------------------------------------------------
# Prompts


@pytest.mark.parametrize("question", ["Copy: cat lamp", "Which role is 'User:' here?"])
def test_the_chat_format_is_written_once(question, capsys):
    tokenizer = load_tokenizer(BASE)
    prompts = Prompts(tokenizer, "", False, 1024, "max_position_embeddings")
    (expected,) = tokenizer.encode_prompts([f"User: {question}\n\nAssistant:"])
    assert prompts.of_texts({"a": question}) == [expected] and not capsys.readouterr().err
    begin = tokenizer.chat.bos
    texts = [f"User: {question}\n\nAssistant:", f"{begin}User: {question}\n\nAssistant:"]
    texts += [f"{question}\n\nAssistant:", f"User: {question}", f"User: {question}\nAssistant: "]
    for text in texts:
        assert prompts.of_texts({"line 7": text}) == [expected], text
        assert capsys.readouterr().err.startswith("line 7 carries the chat format already")
    assert prompts.of_texts(dict(enumerate([question, *texts]))) == [expected] * 6
    assert capsys.readouterr().err.startswith("1 (and 4 more) carries the chat format already")
    whole = (
        f"Be short.\n\nUser: {question}\n\nAssistant: a{tokenizer.chat.end}User: b\n\nAssistant:"
    )
    assert prompts.of_texts({"a": whole}) == tokenizer.encode_prompts([whole])
    assert "a carries the chat format already" in capsys.readouterr().err


def test_a_system_message_and_plain_text():
    tokenizer = load_tokenizer(BASE)
    system = Prompts(tokenizer, "Be short.", False, 1024, "max_position_embeddings")
    expected = tokenizer.encode_prompts(["Be short.\n\nUser: Hi\n\nAssistant:"])
    assert system.of_texts({"a": "Hi"}) == expected == system.of_texts({"a": "User: Hi"})
    with pytest.raises(ValueError, match="^prompt carries the chat format already.* --system"):
        system.of_texts({"prompt": "User: a\n\nAssistant: b\n\nUser: c\n\nAssistant:"})
    plain = Prompts(tokenizer, "", True, 1024, "max_position_embeddings")
    for text in ("Once upon ", "User: Hi\n\nAssistant:"):
        assert plain.of_texts({"a": text}) == tokenizer.encode_prompts([text])


def test_a_system_message_that_the_template_leaves_out_is_refused(tmp_path):
    for file in BASE.glob("*.json"):
        (tmp_path / file.name).write_text(file.read_text())
    template = (
        "{% for m in messages if m.role != 'system' %}{{ m.content + eos_token }}{% endfor %}"
    )
    (tmp_path / "chat_template.jinja").write_text(template)
    tokenizer = load_tokenizer(tmp_path)
    Prompts(tokenizer, "", False, 1024, "")
    with pytest.raises(ValueError, match="system: field content is 'Be short.*leaves it out"):
        Prompts(tokenizer, "Be short.", False, 1024, "")


# ------------------------------------------------------------------------------------------
# A conversation, whose models say what the test wants


class Scripted:
    """Models whose answers are given. One that is None is stopped by Ctrl-C after two tokens."""

    def __init__(self, answers: dict[str, list[str | None]], limit: int = 1024, most: int = 50):
        self.tokenizer, self.answers, self.heard = load_tokenizer(BASE), answers, []
        self.out = io.StringIO()
        prompts = Prompts(self.tokenizer, "", False, limit, "max_position_embeddings")
        self.talk = Conversation(prompts, list(answers), self.stream, most, self.out)

    def stream(self, name: str, row: list[int], most: int):
        self.heard.append((name, self.tokenizer.decode(row)))
        answer = self.answers[name].pop(0)
        ids = self.tokenizer.encode_all(["xyz" if answer is None else answer])[0]
        yield from ids[: 2 if answer is None else most]
        if answer is None:
            raise KeyboardInterrupt


def test_each_model_sees_its_own_answers():
    models = Scripted({"base": ["A", "B"], "first": ["C\nD", "E"]})
    models.talk.ask("one")
    models.talk.ask("two")
    heard = [text for _, text in models.heard]
    one, two = "User: one\n\nAssistant:", "User: two\n\nAssistant:"
    assert heard == [one, one, f"{one} A{two}", f"{one} C\nD{two}"]
    assert models.out.getvalue() == "base   A\nfirst  C\n       D\nbase   B\nfirst  E\n"
    models.talk.command("/adapter", "first")
    models.answers["first"] += ["F", "G", "H"]
    models.talk.ask("three")
    assert models.heard[-1] == ("first", f"{one} C\nD{two} EUser: three\n\nAssistant:")
    models.talk.command("/reset")
    models.talk.ask("one")
    assert models.heard[-1] == ("first", one)
    models.talk.command("/adapter")
    models.answers["base"].append("I")
    models.talk.ask("two")
    assert models.heard[-2:] == [("base", two), ("first", f"{one} G{two}")]


def test_plain_lines_stand_alone():
    models = Scripted({"base": ["A", "B"]})
    models.talk.prompts.plain = True
    models.talk.ask("User: one")
    models.talk.ask("two")
    assert models.heard == [("base", "User: one"), ("base", "two")]


def test_a_single_model_needs_no_name():
    models = Scripted({"base": ["A\nB"]})
    models.talk.ask("one")
    assert models.out.getvalue() == "A\nB\n"


def test_a_stopped_answer_is_kept_and_the_next_models_are_not_asked():
    models = Scripted({"base": [None, "B"], "first": ["C"]})
    models.talk.ask("one")
    assert models.out.getvalue() == "base   xy\n"
    models.talk.ask("two")
    one, two = "User: one\n\nAssistant:", "User: two\n\nAssistant:"
    assert models.heard[1:] == [("base", f"{one} xy{two}"), ("first", two)]


def test_a_line_that_carries_the_chat_format(capsys):
    models = Scripted({"base": ["A"]})
    models.talk.ask("User: one\n\nAssistant:")
    assert models.heard == [("base", "User: one\n\nAssistant:")]
    assert "The line carries the chat format already" in capsys.readouterr().err
    with pytest.raises(ValueError, match="a conversation of its own"):
        models.talk.ask("User: one\n\nAssistant: two\n\nUser: three")
    assert len(models.heard) == 1


def test_a_conversation_that_is_too_long(capsys):
    models = Scripted({"base": ["A B C", "D E F G", "H"], "first": ["a b c", "d e f g", "h"]})
    (begin,) = models.talk.prompts.of_texts({"": "one"})
    end = models.tokenizer.chat.end
    second = f"User: one\n\nAssistant: A B C{end}User: one\n\nAssistant:"
    (second,) = models.tokenizer.encode_prompts([second])
    models.talk.prompts.limit = len(second) + 3
    models.talk.ask("one")
    assert not capsys.readouterr().err
    models.talk.ask("one")
    assert "(base ends after 3 tokens, because of max_position_emb" in capsys.readouterr().err
    said = f"/reset begins anew. The conversation with base has .* {len(second) + 3}$"
    with pytest.raises(ValueError, match=said):
        models.talk.ask("one")
    assert len(models.heard) == 4
    models.talk.reset()
    models.talk.ask("one")
    assert models.heard[-1] == ("first", models.tokenizer.decode(begin))


def test_an_answer_of_max_new_tokens_is_cut_off(capsys):
    models = Scripted({"base": ["xyxyxy", "xy"]}, most=3)
    models.talk.ask("one")
    assert models.out.getvalue() == "xyx\n"
    assert "(base ends after 3 tokens, because of max_new_tokens)" in capsys.readouterr().err
    models.talk.ask("two")
    assert not capsys.readouterr().err


# ------------------------------------------------------------------------------------------
# The command


def test_one_prompt_to_base_and_adapter(adapters, answer, monkeypatch, capsys):
    question = "Reverse: cat dog"
    base, other = answer("base", question), answer("other", question)
    assert base != other
    out, err = run(monkeypatch, capsys, "--adapter", adapters["other"], "--prompt", question)
    assert out == f"base   {base}\nother  {other}\n"
    assert "chat format: deepseek_v2" in err and err.endswith("is a conversation\n")
    doubled = f"User: {question}\n\nAssistant:"
    assert run(monkeypatch, capsys, "--prompt", doubled)[0] == f"{base}\n"


def test_a_pipe_has_an_answer_a_line_in_order(adapters, answer, monkeypatch, capsys):
    lines = ["Copy: cat", "Repeat these words: basket star map cloud", "Sort: d a c", "Copy: 中文"]
    stdin = "\ufeff" + "\r\n".join(lines) + "\n"
    out, err = run(monkeypatch, capsys, stdin=stdin.encode())
    assert out == "".join(answer("base", line) + "\n" for line in lines)
    assert "decoded 4 prompts" in err
    stdin = "\r\n".join(lines).encode()
    out, _ = run(monkeypatch, capsys, "--adapter", adapters["other"], stdin=stdin)
    expected = [
        {"prompt": line, "base": answer("base", line), "other": answer("other", line)}
        for line in lines
    ]
    assert [json.loads(line) for line in out.splitlines()] == expected
    out, err = run(monkeypatch, capsys, "--max_new_tokens", 2, stdin=stdin)
    assert len(out.splitlines()) == 4 and "of 4 answers of base are cut off" in err


def test_an_answer_in_a_pipe_is_one_line():
    for answer in ("a\nb\\c", "\\n\r\n"):
        line = answer_line("?", {"base": answer})
        assert len(line.splitlines()) == 1
        assert line.encode().decode("unicode_escape") == answer
    several = answer_line("é\n", {"base": "a\nb", "other": "中"})
    assert several == '{"prompt": "é\\n", "base": "a\\nb", "other": "中"}'


@pytest.mark.parametrize(
    "arguments, stdin, message",
    [
        (["--model", ""], b"", r"--model is required, as in: python generate.py --model demo/base"),
        (["--model", "demo/bas"], b"", "demo/bas: no such checkpoint directory"),
        (["--adapter", "runs/no"], b"", "runs/no: no such adapter directory"),
        (["--adapter", BASE], b"", "expert_cfg.json"),
        (["--device", "cuda:99"], b"", "device is 'cuda:99'; not available here"),
        (["--plain", "--system", "x"], b"", "--system needs the chat format"),
        (["--max_new_tokens", "0"], b"", "max_new_tokens is 0; must be at least 1"),
        (["--prompt", "  "], b"", "prompt is empty; a question is required"),
        (["--prompt", "User: "], b"", "prompt is empty; a question is required"),
        (["--prompt", "a\udc80"], b"", "prompt is 'a.udc80'; must be text"),
        (
            ["--prompt", "x " * 2000],
            b"",
            r"prompt has 2,007.* must be fewer than max_position_emb.* 1,024",
        ),
        ([], b"", "standard input: line 1 is empty; a question is required"),
        ([], b"a\n \nb\n", "standard input: line 2 is empty; a question"),
        ([], b"a\nb\n\xff\n", "standard input: line 3: not UTF-8 text"),
        ([], b"a\n" + b"x " * 2000, r"standard input: line 2 has 2,007 tokens"),
    ],
)
def test_mistakes_end_before_weights_are_loaded(arguments, stdin, message, monkeypatch, capsys):
    monkeypatch.setattr(command, "load_model", lambda *a, **k: pytest.fail("loaded"))
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        run(monkeypatch, capsys, *arguments, stdin=stdin)


def test_an_adapter_of_another_base_is_refused(adapters, tmp_path, monkeypatch, capsys):
    path = tmp_path / "changed"
    path.mkdir()
    for file in adapters["other"].iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    cfg = json.loads((path / "expert_cfg.json").read_text())
    (path / "expert_cfg.json").write_text(json.dumps(cfg | {"base_fingerprint": "0" * 32}))
    monkeypatch.setattr(command, "load_model", lambda *a, **k: pytest.fail("loaded"))
    again = adapters["other"].parent / "." / "adapter"
    for second, said in ((path, "changed/expert_cfg.json"), (again, "the same is given twice")):
        with pytest.raises(SystemExit, match=said):
            run(monkeypatch, capsys, "--adapter", adapters["other"], second, "--prompt", "a")


def test_ctrl_c_ends_the_answer_to_a_prompt(adapters, monkeypatch, capsys):
    def stopped(*args):
        yield 5
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "stream", stopped)
    with pytest.raises(SystemExit, match="130"):
        run(monkeypatch, capsys, "--adapter", adapters["other"], "--prompt", "a")
    assert "other" not in capsys.readouterr().out


class Terminal:
    """The command on a terminal of its own."""

    def __init__(self, *arguments):
        words = [sys.executable, str(ROOT / "generate.py"), *CPU, *map(str, arguments)]
        self.shown, self.seen = b"", 0
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "dumb"}
            os.execvpe(words[0], words, environment)

    def until(self, mark: str, seconds: float = 60) -> str:
        """Returns what is shown up to this mark, which must come."""
        end = time.monotonic() + seconds
        while mark.encode() not in self.shown[self.seen :]:
            ready, _, _ = select.select([self.fd], [], [], max(end - time.monotonic(), 0))
            assert ready, f"{mark!r} did not come after {self.shown[self.seen :]!r}"
            self.shown += os.read(self.fd, 4096)
        start, self.seen = self.seen, self.shown.index(mark.encode(), self.seen) + len(mark)
        return self.shown[start : self.seen].decode().replace("\r\n", "\n")

    def say(self, line: str) -> str:
        """Returns what is shown between a line that is typed and the next prompt."""
        os.write(self.fd, f"{line}\n".encode())
        return self.until("\n> ").removeprefix(f"{line}\n").removesuffix("> ")


def test_a_conversation_on_a_terminal(adapters, answer):
    terminal = Terminal("--adapter", *adapters.values(), "--max_new_tokens", "400")
    first = terminal.until("\n> ")
    assert "You talk to base, other, endless." in first and "/help" in first
    assert "one of base, other, endless" in terminal.say("/adapter no")
    assert "There is no command /nothing" in terminal.say("/nothing here")
    assert "/reset " in terminal.say("/help")
    assert terminal.say("") == ""

    assert terminal.say("/adapter other") == "You talk to other.\n"
    one, two = "Copy: cat lamp", "Copy: star"
    said = answer("other", one)
    then = answer("other", one, said, two)
    assert then != answer("other", two)  # the history counts
    assert terminal.say(one) == f"other    {said}\n"
    assert terminal.say(two) == f"other    {then}\n"
    assert terminal.say("/adapter base") == "You talk to base.\n"
    assert terminal.say(two) == f"base     {answer('base', two)}\n"  # whole, with its own history
    assert "forgotten" in terminal.say("/reset")
    terminal.say("/adapter other")
    assert terminal.say(two) == f"other    {answer('other', two)}\n"

    terminal.say("/adapter endless")
    os.write(terminal.fd, f"{one}\n".encode())
    terminal.until("endless  ")
    terminal.until(" ")
    os.write(terminal.fd, b"\x03")
    assert "400 tokens" not in terminal.until("\n> ")
    os.write(terminal.fd, b"half a line")
    terminal.until("half a line")
    time.sleep(0.3)  # a signal that comes while readline reads a key waits for the next key
    os.write(terminal.fd, b"\x03")
    assert "Ctrl-D ends the talk." in terminal.until("\n> ")
    assert "base, other, endless" in terminal.say("/adapter")
    os.write(terminal.fd, b"\x04")
    assert os.waitstatus_to_exitcode(os.waitpid(terminal.pid, 0)[1]) == 0
