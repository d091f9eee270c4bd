"""Chat formats: published templates against transformers' apply_chat_template, what is learned, ends
of sequence against transformers' generate, and what is refused."""

import json
import random

import pytest
import torch
from conftest import ROOT, save_tokenizer, save_with_transformers
from test_data import deepseek_tokenizer

from chat import load_tokenizer
from chat.template import CHAT_FORMATS, Message
from checkpoint import load_model
from data import IGNORE, encode_chat, encode_file, shown
from generate import generate

TEMPLATES = {path.stem: path for path in sorted((ROOT / "tests/templates").glob("*.jinja"))}
BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
KIMI = ["[BOS]", "[EOS]", "<|im_end|>", "<|im_user|>", "<|im_assistant|>", "<|im_system|>"]
KIMI += ["<|im_middle|>"]
GLM = ["<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<think>"]
GLM += ["</think>", "<|observation|>"]
# template -> begin and end of sequence in tokenizer_config.json, further ends in
# generation_config.json, special tokens, and what ends an answer
V3 = ["<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"]
TOKENS = {name: (BOS, EOS, [], V3, EOS) for name in TEMPLATES}
for name in ("moonlight", "kimi_k2", "kimi_k2_0905"):
    TOKENS[name] = "[BOS]", "[EOS]", ["<|im_end|>"], KIMI, "<|im_end|>"
glm = "<|endoftext|>"
TOKENS["glm_4_7"] = None, glm, [glm, "<|user|>", "<|observation|>"], GLM, "<|user|>"


def talk(*contents: str, first: str = "user") -> list[dict]:
    """Messages whose roles take turns; a system message if `first` says so."""
    roles = ["user", "assistant"] * len(contents)
    roles = {"user": roles, "assistant": roles[1:], "system": ["system", *roles]}[first]
    return [{"role": role, "content": content} for role, content in zip(roles, contents)]


CONVERSATIONS = [
    talk("Hi", "Hello!"),
    talk("你好", "你好！有什么可以帮你？"),
    talk("1+1?", "2", "and 2+2?", "4"),
    talk("Be brief.", "Who are you?", "A model.", first="system"),
    talk("用中文回答。", "a", "b", "c", "d", "e", "f", first="system"),
    talk("Write code", "```python\nprint(1)\n```", "Shorter", "print(1)"),
    talk("tabs\tand  spaces", "line\n\nline", "{{ braces }}", "{% if x %}"),
    talk("quotes \" ' \\", '{"intent": "on", "slots": {"room": ["a", "b"]}}'),
    talk("ünïcödé 🙂", "한국어 العربية"),
    talk("a" * 300, "b" * 300, "c", "d", "e", "f", "g", "h"),
]


def checkpoint(directory, name):
    """A directory with the files of a checkpoint that has this template: its special tokens over
    the vocabulary of the demo's tokenizer, for V3 of DeepSeek's own."""
    import tokenizers

    bos, eos, ends, special, _ = TOKENS[name]
    base = deepseek_tokenizer(directory) if name == "deepseek_v3" else ROOT / "demo/base"
    inner = tokenizers.Tokenizer.from_file(str(base / "tokenizer.json"))
    inner.add_special_tokens(special)
    inner.save(str(directory / "tokenizer.json"))
    config = {"bos_token": bos, "eos_token": eos}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "chat_template.jinja").write_text(TEMPLATES[name].read_text())
    ids = [inner.token_to_id(end) for end in ends]
    generation = {"eos_token_id": ids if len(ids) != 1 else ids[0]} if ids else {}
    (directory / "generation_config.json").write_text(json.dumps(generation))
    return directory


def oracle_of(directory, name):
    from transformers import PreTrainedTokenizerFast

    named = {"bos_token": TOKENS[name][0], "eos_token": TOKENS[name][1]}
    file = str(directory / "tokenizer.json")
    oracle = PreTrainedTokenizerFast(tokenizer_file=file, **named)
    oracle.chat_template = TEMPLATES[name].read_text()
    return oracle


@pytest.fixture(scope="module", params=TEMPLATES)
def published(request, tmp_path_factory):
    directory = checkpoint(tmp_path_factory.mktemp(request.param), request.param)
    return request.param, load_tokenizer(directory), oracle_of(directory, request.param)


def test_published_templates_give_the_ids_of_transformers(published):
    name, tokenizer, oracle = published
    end = TOKENS[name][-1]
    for messages in CONVERSATIONS:
        ids, labels = encode_chat(messages, tokenizer)
        expected = oracle.apply_chat_template(messages)["input_ids"]
        if name in ("glm_4_7", "kimi_k2_0905"):  # they end the last answer with nothing
            expected = [*expected, tokenizer.inner.token_to_id(end)]
        assert ids == expected
        learned = [label for label in labels[1:] if label != IGNORE]
        text = tokenizer.inner.decode(learned, skip_special_tokens=False)
        answers = [m["content"] for m in messages if m["role"] == "assistant"]
        space = " " if name == "deepseek_v2_lite_chat" else ""  # "Assistant: ..."
        assert text == "".join(f"{space}{answer}{end}" for answer in answers)


def test_published_templates_ask_as_transformers_does(published):
    _, tokenizer, oracle = published
    for question in ("Hi", "你好", "a\n\nb "):
        (ids,) = tokenizer.encode_prompts([tokenizer.chat.prompt(question)])
        asked = [{"role": "user", "content": question}]
        assert ids == oracle.apply_chat_template(asked, add_generation_prompt=True)["input_ids"]


@pytest.mark.parametrize("question", ["Hi", "What is <think>?\n\nSay: it"])
def test_a_text_that_carries_the_format_gives_its_question(question, published):
    chat = published[1].chat
    prompt, asked = chat.prompt(question), Message("", "user", question)
    for text in (question, prompt, prompt.rstrip(), chat.bos + prompt, f" {prompt}\n"):
        assert chat.question_in(text) == question
    answered = Message("", "assistant", "Hello!")
    whole = chat.render([asked, answered, asked], generation_prompt=True)
    assert chat.question_in(whole) is None is chat.question_in(whole.removeprefix(chat.bos))


@pytest.mark.parametrize(
    "text, found",
    [
        ("User: a", "a"),
        ("a\n\nAssistant:", "a"),
        ("User:a\nAssistant: ", "a"),
        (" Sum up:\nUser: a\nAssistant: b", " Sum up:\nUser: a\nAssistant: b"),
        ("Is Assistant: a word?", "Is Assistant: a word?"),
        ("User: is Assistant: a word?", "is Assistant: a word?"),
        ("Be brief.\n\nUser: a\n\nAssistant:", None),
        ("User: a\n\nAssistant: b", None),  # the answer has begun
        ("<｜User｜>a", "<｜User｜>a"),  # another format
    ],
)
def test_words_of_the_format_count_where_lines_begin(text, found):
    assert load_tokenizer(ROOT / "demo/base").chat.question_in(text) == found


def test_any_end_that_the_checkpoint_names_ends_an_answer(published):
    name, tokenizer, _ = published
    _, eos, ends, _, end = TOKENS[name]
    assert {tokenizer.inner.id_to_token(i) for i in tokenizer.end_ids} == {eos, *ends, end}
    assert tokenizer.inner.id_to_token(tokenizer.end_ids[0]) == eos


@pytest.mark.parametrize(
    "name, like", [("deepseek_v2_lite_chat", "deepseek_v2"), ("deepseek_v3", "deepseek_v3")]
)
def test_the_formats_for_checkpoints_without_a_template_equal_the_published_ones(
    name, like, tmp_path
):
    """Also two questions in a row, two answers, an answer first, and one after a system message."""
    checkpoint(tmp_path, name)
    ours, published = load_tokenizer(tmp_path, like), load_tokenizer(tmp_path)
    assert (ours.chat.name, published.chat.name) == (like, "template")
    odd = [
        talk("a", first="assistant"),
        [*talk("a"), *talk("b", "c")],
        [*talk("a", "b"), *talk("c", first="assistant")],
        [*talk("s", first="system"), *talk("a", first="assistant")],
    ]
    for messages in CONVERSATIONS + odd:
        assert encode_chat(messages, ours) == encode_chat(messages, published)
    assert ours.chat.prompt("x") == published.chat.prompt("x")


def write_chat(directory, template, **config):
    """A checkpoint with a small tokenizer and this template."""
    save_tokenizer(directory)
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template} | config))
    return directory


CHATML = (
    "{% for m in messages %}{{ '[' + m.role + ']' + m.content + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def test_a_template_is_a_string_a_named_one_or_a_file_of_its_own(tmp_path):
    for template in (
        CHATML,
        [{"name": "tools", "template": "x"}, {"name": "default", "template": CHATML}],
    ):
        chat = load_tokenizer(write_chat(tmp_path, template)).chat
        assert (chat.name, chat.prompt("q")) == ("template", f"[user]q{EOS}\n[assistant]")
    (tmp_path / "chat_template.jinja").write_text(CHATML.replace("[", "<"))
    assert load_tokenizer(tmp_path).chat.prompt("q").startswith("<user]q")
    assert load_tokenizer(tmp_path, "deepseek_v2").chat.prompt("q") == "User: q\n\nAssistant:"


def test_what_ends_an_answer_is_learned_and_what_follows_the_end_is_not(tmp_path):
    tokenizer = load_tokenizer(write_chat(tmp_path, CHATML))
    sample = encode_chat(talk("a", "b", "c", "d"), tokenizer)
    assert shown(sample, tokenizer) == (
        f"[user]a{EOS}\n[assistant]«b{EOS}»\n[user]c{EOS}\n[assistant]«d{EOS}»\n"
    )
    assert tokenizer.bos_id is None  # the format has none


def test_what_templates_call(tmp_path):
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}"
        "{% if m.content == 'no' %}{{ raise_exception('Not that.') }}{% endif %}"
        "{{ {'é': m.content} | tojson }}{{ strftime_now('%Y')[:2] }}"
        "{% else %}A:{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}{% endif %}"
        "{% if loop.index > 9 %}{% break %}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}A:{% endif %}"
    )
    tokenizer = load_tokenizer(write_chat(tmp_path, template))
    sample = encode_chat(talk("q", "a"), tokenizer)
    assert shown(sample, tokenizer) == f'{{"é": "q"}}20A:«a{EOS}»'
    with pytest.raises(ValueError, match=r"conversation: .*tokenizer_config.json.* Not that\."):
        encode_chat(talk("no", "a"), tokenizer)


@pytest.mark.parametrize(
    "template, contents, message",
    [
        # earlier answers are shortened: the text so far is no prefix of the longer one
        (
            "{% for m in messages %}{{ m.role[0] + m.content if loop.last or m.role == 'user' else "
            "m.role[0] + m.content.split('#')[0] }}{{ eos_token }}{% endfor %}",
            ("a", "b#c", "d", "e"),
            "field content is 'b#c'; the chat format leaves it out",
        ),
        (
            "{% for m in messages %}{{ m.role[0] + m.content }}{{ '!' if loop.last }}{{ eos_token }}{% endfor %}",
            ("a", "b", "c", "d"),
            r"messages\[1\]: the chat template renders this answer in another way",
        ),
        # a system message that the format has no place for
        (
            "{% for m in messages if m.role != 'system' %}{{ m.role[0] + m.content + eos_token }}{% endfor %}",
            ("Be brief.", "a", "b"),
            r"messages\[0\]: field content is 'Be brief.'; the chat format leaves it out",
        ),
    ],
)
def test_a_template_that_hides_or_changes_what_a_row_says_is_refused(
    template, contents, message, tmp_path
):
    first = "system" if len(contents) % 2 else "user"
    tokenizer = load_tokenizer(write_chat(tmp_path, template))
    with pytest.raises(ValueError, match=message):
        encode_chat(talk(*contents, first=first), tokenizer)


def test_reasoning_is_learned_where_the_template_shows_it_and_refused_elsewhere(tmp_path):
    message = {"role": "assistant", "content": "51", "reasoning_content": "17 * 3 = 51"}
    row = [{"role": "user", "content": "17 * 3?"}, message]
    for name in ("glm_4_7", "deepseek_r1"):
        (tmp_path / name).mkdir()
        checkpoint(tmp_path / name, name)
    glm, r1 = (load_tokenizer(tmp_path / name) for name in ("glm_4_7", "deepseek_r1"))
    said = "[gMASK]<sop><|user|>17 * 3?<|assistant|><think>«17 * 3 = 51</think>51<|user|>»"
    assert shown(encode_chat(row, glm), glm) == said
    with pytest.raises(ValueError, match=r"messages\[1\]: field reasoning_content is '17 \* 3"):
        encode_chat(row, r1)
    thought = [row[0], {"role": "assistant", "content": "<think>17 * 3 = 51</think>51"}]
    assert shown(encode_chat(thought, glm), glm) == said
    with pytest.raises(ValueError, match="field content is '<think>17"):  # R1's drops it
        encode_chat(thought, r1)


@pytest.mark.parametrize(
    "config, message",
    [
        ({"chat_template": "{% for m in"}, "tokenizer_config.json: the chat template is wrong"),
        ({"chat_template": "{{ 1 / 0 }}"}, "refuses it: ZeroDivisionError"),
        ({"chat_template": "no messages"}, "does not show an answer and the next question"),
        ({"chat_template": 3}, "chat_template must be a string"),
        (
            {"chat_template": [{"name": "rag", "template": "x"}]},
            "no template of the name 'default'",
        ),
        ({"chat_template": "{{ messages.append(1) }}"}, "refuses it: SecurityError"),
        ({"chat_template": "{{ ''.__class__.__mro__ }}"}, "refuses it: SecurityError"),
        ({"added_tokens_decoder": {"7": {"content": EOS}}}, "says '7' for token .* it is 1"),
        ({"added_tokens_decoder": {"9": {"content": "<new>"}}}, "token '<new>'; .* it is None"),
        ({"eos_token": "<none>"}, "eos_token is '<none>'; must be a token"),
    ],
)
def test_what_a_tokenizer_config_says_wrongly_is_named(config, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_tokenizer(write_chat(tmp_path, None, **config))


def test_a_template_that_is_asked_for_must_be_there(tmp_path):
    save_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="chat_format is 'template'; .* has no tokenizer_config"):
        load_tokenizer(tmp_path, "template")


@pytest.mark.parametrize("value", [99999, -1, "1", [1, None], True])
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_ends_that_are_no_tokens_are_refused(file, value, tmp_path):
    save_tokenizer(tmp_path)
    (tmp_path / file).write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(ValueError, match=f"{file}: eos_token_id is"):
        load_tokenizer(tmp_path)


def test_the_largest_id_counts_not_the_number_of_tokens(tmp_path):
    save_tokenizer(tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    largest = max(content["model"]["vocab"].values())
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": largest + 3}))
    load_tokenizer(tmp_path)
    for gap, refused in ((2, False), (3, True), (300, True)):
        added = {**content["added_tokens"][0], "content": "<pad>", "id": largest + gap}
        vocab = content["model"]["vocab"] | {"<pad>": largest + gap}
        changed = {**content, "model": {**content["model"], "vocab": vocab}}
        path.write_text(json.dumps(changed | {"added_tokens": [*content["added_tokens"], added]}))
        if refused:
            with pytest.raises(ValueError, match=f"'<pad>' has id {largest + gap}; vocab_size is"):
                load_tokenizer(tmp_path)
        else:
            load_tokenizer(tmp_path)


def test_generation_ends_where_that_of_transformers_does(tmp_path):
    """Ends in a list of generation_config.json, and of config.json alone, on a random model."""
    from transformers import AutoModelForCausalLM

    save_with_transformers(tmp_path, seed=1, vocab_size=300)
    save_tokenizer(tmp_path)
    oracle = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    model = load_model(tmp_path, dtype=torch.float32)
    prompts = [[5, 6, 7], [8], [9, 10]]
    endless = generate(model, prompts, 12, [299])
    config = json.loads((tmp_path / "config.json").read_text())
    ends = [row[len(row) // 2] for row in endless]
    for in_generation, in_config in (([1, *ends], 1), (ends[0], 1), (None, ends[1:])):
        generation = {} if in_generation is None else {"eos_token_id": in_generation}
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
        (tmp_path / "config.json").write_text(json.dumps(config | {"eos_token_id": in_config}))
        tokenizer = load_tokenizer(tmp_path)
        found = generate(model, prompts, 12, tokenizer.end_ids)
        eos = in_config if in_generation is None else in_generation
        for prompt, row in zip(prompts, found):
            given = dict(max_new_tokens=12, do_sample=False, eos_token_id=eos, pad_token_id=0)
            new = oracle.generate(torch.tensor([prompt]), **given)[0, len(prompt) :].tolist()
            stop = next((i for i, token in enumerate(new) if token in tokenizer.end_ids), None)
            assert row == new[:stop]


def test_mutated_templates_and_settings_end_in_right_ids_or_in_our_errors(tmp_path):
    """500 each. Where a mutated template passes, the text is what the template renders."""
    save_tokenizer(tmp_path)
    draw = random.Random(0)
    sources = [path.read_text() for path in TEMPLATES.values()] + list(CHAT_FORMATS.values())
    marks = ["{{", "}}", "{%", "%}", "'", "|", "m", "messages", "content", "+", "not ", "loop", "]"]
    passed = 0
    for _ in range(500):
        text = draw.choice(sources)
        for _ in range(draw.randint(1, 3)):
            at, size = draw.randrange(len(text)), draw.choice([1, 1, 3, 20])
            text = text[:at] + draw.choice(["", draw.choice(marks)]) + text[at + size :]
        (tmp_path / "chat_template.jinja").write_text(text)
        messages = draw.choice(CONVERSATIONS)
        try:
            tokenizer = load_tokenizer(tmp_path)
            ids, labels = encode_chat(messages, tokenizer)
        except ValueError as error:
            assert "template" in str(error) or "messages[" in str(error)
            continue
        whole = tokenizer.chat.render([Message("", m["role"], m["content"]) for m in messages])
        said = tokenizer.inner.decode(ids, skip_special_tokens=False)
        assert said in (whole, whole + tokenizer.chat.end)
        assert any(label != IGNORE for label in labels)
        passed += 1
    assert 50 < passed < 450
    (tmp_path / "chat_template.jinja").unlink()
    path = tmp_path / "tokenizer_config.json"
    config, names = json.loads(path.read_text()), ["bos_token", "eos_token", "pad_token", "content"]
    names += ["chat_template", "added_tokens_decoder", "name", "template", "1"]
    odd = [None, "", EOS, CHATML, 1, True, [], {}, ["x"], "default", [{"name": ["x"]}]]
    odd += [{"1": {"content": EOS}}, {"content": EOS}, [{"name": "default", "template": CHATML}]]
    passed = 0
    for _ in range(300):
        changed = {key: draw.choice(odd) for key in draw.sample(names, draw.randint(1, 4))}
        inner = {key: draw.choice(odd) for key in draw.sample(names, 2)}
        changed |= draw.choice([{}, {"chat_template": [inner]}, {"added_tokens_decoder": inner}])
        path.write_text(json.dumps(config | changed))
        try:
            assert EOS in load_tokenizer(tmp_path).chat.ends
            passed += 1
        except ValueError as error:
            assert "tokenizer_config.json" in str(error)
    assert 30 < passed < 270
    path.write_text(json.dumps(config))
    values = [0, 1, 2, 95, 10**6, -1, 1.5, True, None, "1", [], [1], [0, 1], [[1]], {}, {"a": 1}]
    for _ in range(500):
        keys = ["eos_token_id", "bos_token_id", "max_length", "pad_token_id"]
        content = {key: draw.choice(values) for key in draw.sample(keys, draw.randint(1, 4))}
        text = json.dumps(draw.choice([content, content, content, [content], 3]))
        cut = draw.choice([len(text)] * 4 + [draw.randrange(len(text))])
        (tmp_path / "generation_config.json").write_text(text[:cut])
        try:
            ends = load_tokenizer(tmp_path).end_ids
        except ValueError as error:
            assert "generation_config.json" in str(error)
            continue
        given = json.loads(text[:cut]).get("eos_token_id")
        assert set(ends) == {1, *(given if isinstance(given, list) else [given])} - {None}


IN_WORDS = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


@pytest.mark.parametrize(
    "template, contents, expected",
    [
        # one end for all, behind the last answer
        (IN_WORDS + "{{ eos_token }}", "qa", None),
        # another end behind the last answer than behind the others
        (
            "{% for m in messages %}[{{ m.role }}]{{ m.content }}"
            "{{ bos_token if loop.last else eos_token }}{% endfor %}"
            "{% if add_generation_prompt %}[assistant]{% endif %}",
            "qa",
            f"[user]q{EOS}[assistant]«a{BOS}»",
        ),
        # earlier answers change, as those of thinking models do
        (
            "{% for m in messages %}[{{ m.role }}]{{ '<t></t>' if loop.last and m.role != 'user' }}"
            "{{ m.content + eos_token }}{% endfor %}"
            "{% if add_generation_prompt %}[assistant]{% endif %}",
            "qa",
            f"[user]q{EOS}[assistant]«<t></t>a{EOS}»",
        ),
        # words of the template are those of a conversation
        (
            "{% for m in messages %}<{{ m.role }}><answer>{{ m.content | trim }}</answer>"
            "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}",
            "qa",
            f"<user><answer>q</answer>{EOS}<assistant>«<answer>a</answer>{EOS}»",
        ),
    ],
)
def test_ends_and_beginnings_that_are_not_plain(template, contents, expected, tmp_path):
    tokenizer = load_tokenizer(write_chat(tmp_path, template))
    if expected is None:  # no special token ends an answer that another question follows
        with pytest.raises(ValueError, match="behind an answer, which is no special token"):
            encode_chat(talk(*contents), tokenizer)
        return
    sample = encode_chat(talk(*contents), tokenizer)
    assert shown(sample, tokenizer) == expected
    answer = expected.partition("«")[2].rstrip("»")
    assert tokenizer.chat.answer("a") == answer
    ends = {EOS, BOS} if "bos_token" in template else {EOS}
    assert set(tokenizer.end_ids) == set(map(tokenizer.inner.token_to_id, ends))
    assert load_tokenizer(ROOT / "demo/base").chat.answer("a \n") == f" a{EOS}"  # as in training


def test_an_end_that_the_tokenizer_lacks_is_refused_for_conversations_alone(tmp_path):
    chatml = CHATML.replace("eos_token", "'<|im_end|>'")
    tokenizer = load_tokenizer(write_chat(tmp_path, chatml))
    with pytest.raises(ValueError, match=r"has '<\|im_end\|>\\n' behind an answer"):
        encode_chat(talk("a", "b"), tokenizer)
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "a", "completion": "b"}))
    assert shown(encode_file(path, tokenizer)[0], tokenizer) == f"a«b{EOS}»"


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "content": "a", "reasoning_content": "s"},  # as in "assistant"
        {"role": "assistant", "content": "a", "reasoning_content": "user a"},
    ],
)
def test_a_text_that_stands_elsewhere_by_chance_is_missed(message, tmp_path):
    tokenizer = load_tokenizer(write_chat(tmp_path, CHATML))
    with pytest.raises(ValueError, match=r"messages\[1\]: field reasoning_content is"):
        encode_chat([*talk("q"), message], tokenizer)


def test_the_header_of_an_answer_must_not_depend_on_it(tmp_path):
    """Here the prompt asks in other words, so the header is searched for."""
    template = (
        "{% for m in messages %}[{{ m.role }} {{ m.content | length }}]{{ m.content + eos_token }}"
        "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    tokenizer = load_tokenizer(write_chat(tmp_path, template))
    assert shown(encode_chat(talk("q", "a"), tokenizer), tokenizer).endswith(f"1]«a{EOS}»")
    with pytest.raises(ValueError, match=r"messages\[1\]: what the chat template writes before"):
        encode_chat(talk("q", "answer"), tokenizer)


@pytest.mark.parametrize(
    "end",
    [
        "{{ eos_token + ('!' if m.content == 'b' else '') }}",  # another text behind some answers
        "{{ eos_token if m.content != 'b' or loop.last }}",  # an answer without its end
        "{{ '' if m.content == 'b' else eos_token }}",
    ],
)
def test_an_answer_that_ends_otherwise_than_others_is_refused(end, tmp_path):
    template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}" + end + "{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    tokenizer = load_tokenizer(write_chat(tmp_path, template))
    assert shown(encode_chat(talk("q", "a"), tokenizer), tokenizer).endswith(f"«a{EOS}»")
    with pytest.raises(ValueError, match=r"messages\[1\]: the chat template (does|renders)"):
        encode_chat(talk("q", "b", "r", "c"), tokenizer)


def test_reasoning_is_learned_also_where_the_prompt_asks_in_other_words(tmp_path):
    template = (
        "{% for m in messages %}[{{ m.role }}]{{ '(' + m.reasoning_content + ')' if "
        "m.reasoning_content }}{{ m.content + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]<think>{% endif %}"
    )
    tokenizer = load_tokenizer(write_chat(tmp_path, template))
    row = [*talk("q"), {"role": "assistant", "content": "a", "reasoning_content": "r"}]
    assert shown(encode_chat(row, tokenizer), tokenizer) == f"[user]q{EOS}[assistant](«r)a{EOS}»"
