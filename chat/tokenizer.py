"""A checkpoint's tokenizer: its tokens, what begins and ends a sequence, and its chat format."""

import math
from dataclasses import dataclass
from pathlib import Path

import tokenizers

from chat.template import CHAT_FORMATS, OWN, Chat
from chat.tiktoken_file import open_tiktoken
from families import flat
from files import read_json

FORMAT_OF_FAMILY = {"deepseek": "deepseek_v2"}  # others have a format of the model_type's name


@dataclass
class Tokenizer:
    """A checkpoint's tokenizer, the id that begins a sequence (None: nothing does), the ids that
    end an answer, the one of tokenizer_config.json first, and the chat format."""

    inner: tokenizers.Tokenizer
    bos_id: int | None
    end_ids: list[int]
    chat: Chat

    @property
    def pad_id(self) -> int:
        return self.end_ids[0]

    def encode_all(self, texts: list[str]) -> list[list[int]]:
        return [e.ids for e in self.inner.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_prompts(self, prompts: list[str]) -> list[list[int]]:
        """Returns the ids of each prompt, with the begin of sequence."""
        return self.encode_all([self.chat.with_begin(prompt) for prompt in prompts])

    def decode(self, ids: list[int]) -> str:
        return self.inner.decode(ids, skip_special_tokens=True)


def load_tokenizer(directory: str | Path, chat_format: str = "") -> Tokenizer:
    """Returns the tokenizer of a checkpoint. If `chat_format` is empty, it is the checkpoint's own
    template, or without one that of the model_type in config.json. Raises FileNotFoundError or
    ValueError that names file and field."""
    directory = Path(directory)
    path, config_path = tokenizer_file(directory), directory / "tokenizer_config.json"
    config = read_config(config_path)
    inner, tokens = read_tokenizer(path, config), named_tokens(config)
    ids = {name: inner.token_to_id(text) for name, text in tokens.items()}
    for field in ("bos_token", "eos_token"):
        optional = field == "bos_token" and config.get(field) is None
        if ids.get(field) is None and not optional:
            found = f"{field} is {config.get(field)!r}"
            raise ValueError(f"{config_path}: {found}; must be a token of {path.name}")
    settings = read_settings(directory)
    check_ids(inner, config, path, settings["config.json"])
    chat = read_chat(directory, chat_format, config, settings["config.json"], tokens, inner)
    ends = [ids["eos_token"], *map(inner.token_to_id, sorted(chat.ends))]
    for name, values in settings.items():
        ends += end_ids(values.get("eos_token_id"), inner, directory / name, path)
    bos_id = ids["bos_token"] if chat.bos else None
    return Tokenizer(inner, bos_id, list(dict.fromkeys(ends)), chat)


def tokenizer_file(directory: Path) -> Path:
    """Returns the file that holds a checkpoint's tokens: tokenizer.json, else a tiktoken file."""
    path = directory / "tokenizer.json"
    tiktoken = [directory / "tiktoken.model", *sorted(directory.glob("*.tiktoken"))]
    found = [file for file in (path, *tiktoken) if file.is_file()]
    if not found:
        raise FileNotFoundError(f"{path}: no such file, and no tiktoken.model beside it")
    return found[0]


def read_config(path: Path) -> dict:
    """Returns what tokenizer_config.json holds; added_tokens_decoder is {} if it says nothing."""
    config = read_json(path)
    if not isinstance(config, dict):
        raise ValueError(f"{path}: must be a JSON object")
    config["added_tokens_decoder"] = config.get("added_tokens_decoder") or {}
    if not isinstance(config["added_tokens_decoder"], dict):
        raise ValueError(f"{path}: added_tokens_decoder must be an object")
    return config


def read_tokenizer(path: Path, config: dict) -> tokenizers.Tokenizer:
    if path.name != "tokenizer.json":
        return open_tiktoken(path, config)
    try:
        inner = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception for a file that it cannot read
        raise ValueError(f"{path}: not a tokenizer file: {error}") from None
    inner.no_padding()
    inner.no_truncation()
    return inner


def named_tokens(config: dict) -> dict[str, str]:
    """Returns the texts of bos_token, eos_token and others like them in a tokenizer_config.json,
    which writes them as strings or as objects with "content"."""
    named = {name: value for name, value in config.items() if name.endswith("_token")}
    texts = {n: v.get("content") if isinstance(v, dict) else v for n, v in named.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str) and text}


def read_settings(directory: Path) -> dict[str, dict]:
    """Returns what config.json and generation_config.json hold; {} for one that is not there."""
    settings = {}
    for name in ("generation_config.json", "config.json"):
        path = directory / name
        settings[name] = read_json(path) if path.is_file() else {}
        if not isinstance(settings[name], dict):
            raise ValueError(f"{path}: must be a JSON object")
        settings[name] = flat(settings[name])
    return settings


def check_ids(inner: tokenizers.Tokenizer, config: dict, path: Path, model: dict) -> None:
    """Raises ValueError for a token whose id the model has no row for, or for which
    tokenizer_config.json says another id than the tokenizer's file `path`."""
    rows = model.get("vocab_size", math.inf)
    token, number = max(inner.get_vocab().items(), key=lambda item: item[1])
    if isinstance(rows, int | float) and number >= rows:
        said = f"token {token!r} has id {number}"
        raise ValueError(f"{path}: {said}; vocab_size is {rows}, so it must be below")
    for said, token in config["added_tokens_decoder"].items():
        text = token.get("content") if isinstance(token, dict) else None
        number = inner.token_to_id(text) if isinstance(text, str) else None
        if str(number) != said:
            found = f"added_tokens_decoder says {said!r} for token {text!r}"
            where = path.with_name("tokenizer_config.json")
            raise ValueError(f"{where}: {found}; in {path.name} it is {number}")


def end_ids(value, inner: tokenizers.Tokenizer, where: Path, path: Path) -> list[int]:
    """Returns the ids of a field eos_token_id in the file `where`: a number, a list of numbers, or
    null. `path` is the tokenizer's file."""
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for number in ids:
        if type(number) is not int or not 0 <= number < 2**31 or inner.id_to_token(number) is None:
            said = f"eos_token_id is {value!r}"
            raise ValueError(f"{where}: {said}; ids of tokens of {path.name} are required")
    return ids


def read_chat(
    directory: Path,
    chat_format: str,
    config: dict,
    model: dict,
    tokens: dict[str, str],
    inner: tokenizers.Tokenizer,
) -> Chat:
    """Returns the chat format of that name; of an empty one, the checkpoint's own template, else
    that of the family."""
    template, source = own_template(directory, config) if chat_format in ("", OWN) else (None, "")
    if template is None and chat_format == OWN:
        files = "tokenizer_config.json with a chat_template, or chat_template.jinja"
        raise ValueError(f"chat_format is {OWN!r}; {directory} has no {files}")
    name = OWN
    if template is None:
        family = str(model.get("model_type", "deepseek"))
        name = chat_format or FORMAT_OF_FAMILY.get(family, family)
        source = "chat_format" if chat_format else "the model's family"
        if name not in CHAT_FORMATS:
            said = f"is {chat_format!r}; must be"
            if not chat_format:
                said = f"is not set, and {directory} has no chat template; {family} needs"
            raise ValueError(f"chat_format {said} one of {', '.join(CHAT_FORMATS)}")
        template = CHAT_FORMATS[name]
    special = [token.content for token in inner.get_added_tokens_decoder().values()]
    return Chat(name, template, source, tokens, special)


def own_template(directory: Path, config: dict) -> tuple[str | None, str]:
    """Returns a checkpoint's own template, and the file that holds it. A file of its own counts
    before the field, as in transformers. The field is a string or a list of name and template."""
    path = directory / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8"), str(path)
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 text: {error}") from None
    path, template = directory / "tokenizer_config.json", config.get("chat_template")
    if isinstance(template, list):
        named = [t for t in template if isinstance(t, dict) and t.get("name") == "default"]
        template = named[0].get("template") if named else None
        if template is None:
            raise ValueError(f"{path}: chat_template has no template of the name 'default'")
    if not isinstance(template, str | None):
        raise ValueError(f"{path}: chat_template must be a string, or a list of name and template")
    return template or None, str(path)
