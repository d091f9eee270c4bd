"""Tokenizers that come as a tiktoken file, against the package tiktoken: ids, decoded text, the
chat format over them, what is copied and compared with them, and what is refused."""

import base64
import json
import random

import pytest
import tiktoken
import torch
from conftest import ROOT, save_with_transformers
from tiktoken._educational import bpe_train

from adapter import save_adapter
from chat import load_tokenizer
from chat.tiktoken_file import open_tiktoken
from checkpoint import load_model
from data import IGNORE, encode_chat
from eval import EvalConfig, plan_evaluations
from merge import merge

# As Moonlight's and Kimi-K2's code has it.
PATTERN = "|".join(
    [
        r"""[\p{Han}]+""",
        r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*"""
        r"""[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?""",
        r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+"""
        r"""[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?""",
        r"""\p{N}{1,3}""",
        r""" ?[^\s\p{L}\p{N}]+[\r\n]*""",
        r"""\s*[\r\n]+""",
        r"""\s+(?!\S)""",
        r"""\s+""",
    ]
)
TEXT = """The theatre there. We'll see what they've said: it isn't THEIRS, he'd say.
print(x)    #  1234 Это только начало, потому что это она.
中文的中文是的，人工智能的人。 العربية في المدينة
हिन्दी में हिन्दी की 한국어 한국 にほんご カタカナ naïve naïveté 🙂🙂🚀🙂


\t\tx = [1, 10, 100]\r\n"""
SPECIAL = ["[BOS]", "[EOS]", "<|im_end|>", "<|im_user|>", "<|im_assistant|>", "<think>"]
OFFSETS = dict(zip(SPECIAL, range(6))) | {"<|im_system|>": 10, "<|im_middle|>": 17, "[PAD]": 255}


def settings(first: int, code: str = "tokenization_moonshot.TikTokenTokenizer") -> dict:
    """A tokenizer_config.json as published, over `first` ranked tokens."""
    added = {
        str(first + offset): {"content": text, "special": text != "<think>"}
        for text, offset in OFFSETS.items()
    }
    named = {"bos_token": "[BOS]", "eos_token": "[EOS]", "added_tokens_decoder": added}
    return named | {"auto_map": {"AutoTokenizer": [code, None]}}


def save(directory, ranks: dict[bytes, int], config: dict | None = None):
    """Writes a tiktoken file, and what stands beside it in a checkpoint."""
    directory.mkdir(exist_ok=True)
    lines = [base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()]
    (directory / "tiktoken.model").write_bytes(b"".join(lines))
    config = settings(len(ranks)) if config is None else config
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    template = (ROOT / "tests/templates/moonlight.jinja").read_text()
    (directory / "chat_template.jinja").write_text(template)
    ends = {"eos_token_id": len(ranks) + OFFSETS["<|im_end|>"]}
    (directory / "generation_config.json").write_text(json.dumps(ends))
    return directory


def oracle_of(ranks: dict[bytes, int]) -> tiktoken.Encoding:
    first = len(ranks)
    texts = {first + offset: text for text, offset in OFFSETS.items()}
    numbers = range(first, first + 256)
    special = {texts.get(i, f"<|reserved_token_{i}|>"): i for i in numbers}
    return tiktoken.Encoding("", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special)


def trained() -> dict[bytes, int]:
    return bpe_train(TEXT, 300, r"\w+|\s+|[^\w\s]+", visualise=None)


def all_pairs() -> dict[bytes, int]:
    """Ranks under which ids show where a text is split: any two bytes are merged, unless they are
    in different pieces."""
    single = [bytes([byte]) for byte in range(256)]
    tokens = single + [first + second for first in single for second in single]
    return {token: rank for rank, token in enumerate(tokens)}


@pytest.fixture(scope="module", params=[trained, all_pairs])
def opened(request, tmp_path_factory):
    """The tokenizer of a tiktoken file, and the oracle."""
    ranks = request.param()
    return load_tokenizer(save(tmp_path_factory.mktemp("base"), ranks)), oracle_of(ranks)


def mixed_text(rng: random.Random, first: int) -> str:
    """Words of the training text, letters of many scripts, special tokens and parts of them."""
    parts = [*TEXT.split(" "), *SPECIAL, f"<|reserved_token_{first + 100}|>", "<|im_", "é", "ǅ"]
    parts += [*" \t\n7", "   ", "\r\n", " \n\n ", "'s", "'LL", "'ſ", "12345", "aB", "ABc"]
    scripts = ["abcXYZ", "жщЖЩ", "中文字々〇⺀", "عربي", "नमस्ते", "\u0301\u0308\u093f"]
    scripts += ["🙂🚀👍🏽", "_-+.!«»"]
    letters = ["".join(rng.choices(rng.choice(scripts), k=rng.randint(1, 6))) for _ in range(8)]
    return "".join(rng.choices(parts + letters * 3, k=rng.randint(0, 20)))


def test_ids_and_decoded_text_are_those_of_tiktoken(opened):
    tokenizer, oracle = opened
    rng, first = random.Random(0), len(oracle._mergeable_ranks)
    texts = [mixed_text(rng, first) for _ in range(1000)]
    expected = [oracle.encode(text, allowed_special="all") for text in texts]
    assert tokenizer.encode_all(texts) == expected
    assert any(first + 100 in ids for ids in expected)  # a reserved one
    cut = [ids[rng.randint(0, 3) : -rng.randint(1, 3)] for ids in expected]  # also within a letter
    cut += [[rng.randrange(first + 256) for _ in range(5)] for _ in range(500)]
    for ids in cut:
        assert tokenizer.inner.decode(ids, skip_special_tokens=False) == oracle.decode(ids)


def test_every_id_has_its_token(opened):
    tokenizer, oracle = opened
    assert tokenizer.inner.get_vocab_size() == oracle.n_vocab
    for number in range(256, oracle.n_vocab):
        text = oracle.decode_single_token_bytes(number)
        assert tokenizer.inner.decode([number], False) == text.decode(errors="replace")
    shown = [oracle.encode(text, allowed_special="all")[0] for text in ("<think>", "a", "[PAD]")]
    assert tokenizer.decode(shown) == "<think>a"  # as its entry says, <think> is not special


@pytest.mark.parametrize("letters, count", [("a", 20), ("ab", 150), ("aбñ中", 50)])
def test_any_ranks_merge_as_in_tiktoken(letters, count, tmp_path):
    """Ranks in a random order: no training made them, so some tokens are never merged, some are
    made of later ones, and many can be made in several ways."""
    rng = random.Random(letters)
    for _ in range(count):
        sizes = [rng.randint(2, 6) for _ in range(rng.randint(1, 12))]
        words = {"".join(rng.choices(letters, k=size)) for size in sizes}
        words = {word.encode()[rng.randint(0, 1) :] for word in sorted(words)}  # also half letters
        tokens = sorted({bytes([byte]) for byte in range(256)} | words)
        rng.shuffle(tokens)
        ranks = {token: rank for rank, token in enumerate(tokens)}
        save(tmp_path, ranks)
        inner = open_tiktoken(tmp_path / "tiktoken.model", settings(len(ranks)))
        oracle = oracle_of(ranks)
        for _ in range(40):
            text = "".join(rng.choices(letters, k=rng.randint(1, 14)))
            assert inner.encode(text).ids == oracle.encode(text), (ranks, text)


def pieces(text: str) -> list[str]:
    """A text as the checkpoint's code cuts it: at 400,000 characters, and where white space or
    something else goes on for more than 25,000."""
    found = []
    for start in range(0, len(text), 400_000):
        part = text[start : start + 400_000]
        begin = length = 0
        for i, letter in enumerate(part):
            goes_on = i > 0 and part[i - 1].isspace() == letter.isspace()
            length = length + 1 if goes_on else 1
            if length > 25_000:
                found.append(part[begin:i])
                begin, length = i, 1
        found.append(part[begin:])
    return found


@pytest.mark.parametrize(
    "text",
    [" " * 30_000 + "x", "a" + "\n" * 60_000, "a" * 51_000 + " 中", "aaaaaaaa " * 50_000],
    ids=["spaces", "lines", "letters", "words"],
)
def test_very_long_texts_are_cut_as_the_checkpoint_does(text, tmp_path):
    tokens = [bytes([byte]) for byte in range(256)]
    tokens += [letter * 2**i for letter in (b" ", b"\n", b"a") for i in range(1, 5)]
    oracle = oracle_of({token: rank for rank, token in enumerate(tokens)})
    tokenizer = load_tokenizer(save(tmp_path, oracle._mergeable_ranks))
    expected = sum((oracle.encode(piece) for piece in pieces(text)), [])
    assert expected != oracle.encode(text)
    assert tokenizer.encode_all([text]) == [expected]


def test_a_conversation_over_a_tiktoken_file(opened):
    tokenizer, oracle = opened
    messages = [
        {"role": "user", "content": "Это 中文?"},
        {"role": "assistant", "content": "It isn't"},
    ]
    text = (
        "<|im_system|>system<|im_middle|>You are a helpful assistant<|im_end|>"
        "<|im_user|>user<|im_middle|>Это 中文?<|im_end|>"
        "<|im_assistant|>assistant<|im_middle|>It isn't<|im_end|>"
    )
    ids, labels = encode_chat(messages, tokenizer)
    assert ids == oracle.encode(text, allowed_special="all")
    assert oracle.decode([label for label in labels if label != IGNORE]) == "It isn't<|im_end|>"
    ends = [oracle.encode(end, allowed_special="all")[0] for end in ("[EOS]", "<|im_end|>")]
    assert tokenizer.end_ids == ends and tokenizer.bos_id is None
    said = "systemYou are a helpful assistantuserЭто 中文?assistantIt isn't"
    assert tokenizer.decode(ids) == said


@pytest.mark.parametrize("prefix", ["", "moonshotai/Kimi-K2-Instruct--"])
def test_kimi_names_its_code_otherwise(prefix, tmp_path):
    config = settings(300, f"{prefix}tokenization_kimi.TikTokenTokenizer")
    for named in (config["auto_map"]["AutoTokenizer"], config["auto_map"]["AutoTokenizer"][0]):
        config["auto_map"]["AutoTokenizer"] = named  # a list or one name
        tokenizer = load_tokenizer(save(tmp_path, trained(), config))
        assert tokenizer.encode_all([TEXT]) == [oracle_of(trained()).encode(TEXT)]


def test_a_tiktoken_file_is_merged_and_told_apart_by_evaluations(tmp_path):
    base = tmp_path / "base"
    save_with_transformers(base, seed=1, vocab_size=300 + 256, first_k_dense_replace=1)
    expected = load_tokenizer(save(base, trained())).encode_all([TEXT])
    save_adapter(
        load_model(base, dtype=torch.float32), {"experts": {"1": [0]}}, tmp_path / "adapter"
    )
    merge(base, tmp_path / "adapter", tmp_path / "merged")
    assert load_tokenizer(tmp_path / "merged").encode_all([TEXT]) == expected

    (tmp_path / "data.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    config = EvalConfig(model=str(base), task=["loss"], data=[str(tmp_path / "data.jsonl")])
    _, (before,) = plan_evaluations(config, base, "cpu")
    lines = (base / "tiktoken.model").read_text().splitlines()
    tokens = [line.split()[0] for line in lines[::-1]]
    (base / "tiktoken.model").write_text(
        "\n".join(f"{token} {i}" for i, token in enumerate(tokens))
    )
    _, (after,) = plan_evaluations(config, base, "cpu")
    assert before.identity["base's settings"] != after.identity["base's settings"]


def broken(name: str, directory) -> None:
    """Breaks one thing of a checkpoint with a tiktoken file of 300 tokens."""
    path, config_path = directory / "tiktoken.model", directory / "tokenizer_config.json"
    lines = path.read_bytes().splitlines()
    config = json.loads(config_path.read_text())
    added = config["added_tokens_decoder"]
    match name:
        case "pointer":
            lines = [b"version https://git-lfs.github.com/spec/v1"]
        case "base64":
            lines[2] = b"I? 2"
        case "letters":
            lines[3] = "中 3".encode()
        case "no rank":
            lines[4] = lines[4].split()[0]
        case "negative":
            lines[0] = lines[0].replace(b" 0", b" -1")
        case "gap":
            del lines[260]
        case "twice":
            lines[261] = lines[260]
        case "same token":
            lines[299] = lines[290].split()[0] + b" 299"
        case "byte":
            lines = [line for line in lines if not line.startswith(base64.b64encode(b"A") + b" ")]
            lines = [line.split()[0] + b" %d" % i for i, line in enumerate(lines)]
        case "empty":
            lines = []
        case "below":
            added["299"] = {"content": "<|in|>"}
        case "above":
            added["556"] = {"content": "<|out|>"}
        case "word":
            added["pad"] = {"content": "<|pad|>"}
        case "no content":
            added["310"] = {"special": True}
        case "bare":
            added["311"] = "<|text|>"
        case "two ids":
            added["320"] = {"content": "[PAD]"}
        case "reserved":
            added["321"] = {"content": "<|reserved_token_322|>"}
        case "ranked":
            added["323"] = {"content": "the"}
        case "list":
            config["added_tokens_decoder"] = [added]
        case "qwen":
            config["auto_map"]["AutoTokenizer"] = ["tokenization_qwen.QWenTokenizer", None]
            path.rename(directory / "qwen.tiktoken")
            path = directory / "qwen.tiktoken"
        case "audio":
            config["auto_map"]["AutoTokenizer"] = "tokenization_kimia.TikTokenTokenizer"
        case "unknown":
            del config["auto_map"]
        case "eos":
            config["eos_token"] = "<|end|>"
        case "rows":
            (directory / "config.json").write_text('{"vocab_size": 555}')
        case "end":
            (directory / "generation_config.json").write_text('{"eos_token_id": 556}')
    path.write_bytes(b"\n".join(lines))
    config_path.write_text(json.dumps(config))


FILE, CONFIG = r"/tiktoken.model: ", r"/tokenizer_config.json: "
ADDED = CONFIG + "added_tokens_decoder: id "


@pytest.mark.parametrize(
    "name, message",
    [
        ("pointer", FILE + "line 1 is 'version https://git-lfs.*; a token in base64 and its rank"),
        ("base64", FILE + "line 3 is 'I. 2'; a token in base64"),
        ("letters", FILE + "line 4 is '中 3'; a token in base64"),
        ("no rank", FILE + "line 5 is 'BA=='; a token in base64 and its rank are required"),
        ("negative", FILE + "line 1: rank is '-1'; must be 0"),
        ("gap", FILE + "line 261: rank is '261'; must be 260: ranks count the tokens from 0"),
        ("twice", FILE + "line 262: rank is '260'; must be 261"),
        ("same token", FILE + "line 300: token .* has rank 290, too"),
        ("byte", FILE + "has no token for byte 65; all 256 are required"),
        ("empty", FILE + "has no token for byte 0"),
        ("below", ADDED + "'299'; must be from 300, behind those of the tiktoken file, to 555"),
        ("above", ADDED + "'556'; must be from 300"),
        ("word", ADDED + "'pad'; must be from 300"),
        ("no content", ADDED + "'310': content is None; the text of a token is required"),
        ("bare", ADDED + "'311': content is None"),
        ("two ids", CONFIG + r"token 555 is '\[PAD\]', which stands for another token or text, too"),
        (
            "reserved",
            CONFIG + "token 322 is '<.reserved_token_322.>', which stands for another",
        ),
        ("ranked", CONFIG + "token 323 is 'the', which stands for another token or text, too"),
        ("list", CONFIG + "added_tokens_decoder must be an object"),
        ("qwen", r"/qwen.tiktoken: a tiktoken file does not say how text is split.*QWenTokenizer"),
        ("audio", FILE + "a tiktoken file does not.*is 'tokenization_kimia.TikTokenTokenizer'"),
        ("unknown", FILE + "a tiktoken file does not.* is None. Convert the file once"),
        ("eos", CONFIG + "eos_token is '<.end.>'; must be a token of tiktoken.model"),
        ("rows", FILE + "token '<?.*' has id 555; vocab_size is 555, so it must be below"),
        ("end", "/generation_config.json: eos_token_id is 556; ids of tokens of tiktoken.model"),
    ],
)
def test_a_bad_file_is_refused(name, message, tmp_path):
    load_tokenizer(save(tmp_path, trained()))
    broken(name, tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


def test_a_file_beside_it_that_is_missing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="/tokenizer.json: no such file, and no tiktoken"):
        load_tokenizer(tmp_path)
    save(tmp_path, {bytes([byte]): byte for byte in range(256)})
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(FileNotFoundError, match="/tokenizer_config.json: no such file"):
        load_tokenizer(tmp_path)
