"""A tiktoken file of Moonlight or Kimi, opened as a tokenizer of the package tokenizers.

Such a file holds tokens and their ranks. How text is split, and which tokens follow those of the
file, stands in the checkpoint's own code: tokenization_moonshot.py (Moonlight) and
tokenization_kimi.py (Kimi-K2). They agree, RESERVED apart. They are never run: what they say is
written down here.
"""

import base64
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

# The module counts, too: Kimi-Audio's class has the same name, but splits in another way.
CODE = ("tokenization_moonshot.TikTokenTokenizer", "tokenization_kimi.TikTokenTokenizer")
# pat_str in that code. A word ends where a capital follows a small letter, and before Chinese.
BEFORE, SUFFIX = r"[^\r\n\p{L}\p{N}]?", "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
CAPITAL = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
SMALL = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
PATTERN = "|".join(
    [
        r"[\p{Han}]+",
        f"{BEFORE}{CAPITAL}*{SMALL}+{SUFFIX}",
        f"{BEFORE}{CAPITAL}+{SMALL}*{SUFFIX}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
# That code cuts a text before it splits it (encode): every 400,000 characters, and every 25,000
# within a run of white space or of anything else. \G is where the last cut was.
CUTS = [
    (r"\G(?m:.{80000}){5}", "isolated"),
    (r"(?:\G|(?<!\S))\S{25000}(?=\S)|(?:\G|(?<!\s))\s{25000}(?=\s)", "merged_with_previous"),
]
# Moonlight's code has 258, two more than its vocab_size has room for; Kimi-K2.5's has 256.
RESERVED = 256


def open_tiktoken(path: Path, config: dict) -> Tokenizer:
    """Returns the tokenizer of a tiktoken file. `config` is what tokenizer_config.json holds.
    Raises ValueError that names file and line, or field."""
    check_code(path, config)
    ranks = read_ranks(path)
    inner = Tokenizer(models.BPE(ranks, find_merges(ranks), ignore_merges=True))
    splits = [Split(Regex(pattern), behavior) for pattern, behavior in CUTS]
    splits += [Split(Regex(PATTERN), "isolated")]
    inner.pre_tokenizer = Sequence([*splits, ByteLevel(add_prefix_space=False, use_regex=False)])
    inner.decoder = decoders.ByteLevel()
    config_path = path.with_name("tokenizer_config.json")
    special = special_tokens(config["added_tokens_decoder"], len(ranks), config_path)
    inner.add_tokens(special)
    for number, token in enumerate(special, len(ranks)):
        shown = inner.decode([number], skip_special_tokens=False)
        if inner.token_to_id(token.content) != number or shown != token.content:
            found = f"token {number} is {token.content!r:.60}"
            raise ValueError(f"{config_path}: {found}, which stands for another token or text, too")
    return inner


def check_code(path: Path, config: dict) -> None:
    """Raises ValueError unless tokenizer_config.json names one of CODE."""
    code = config.get("auto_map")
    code = code.get("AutoTokenizer") if isinstance(code, dict) else None
    names = code if isinstance(code, list) else [code]  # a class; or a slow one and a fast one
    if not any(str(name).split("--")[-1] in CODE for name in names):  # "hub name--class"
        raise ValueError(
            f"{path}: a tiktoken file does not say how text is split. This is known for {CODE[0]} "
            f"and {CODE[1]}; auto_map.AutoTokenizer of tokenizer_config.json is {code!r:.80}. "
            "Convert the file once, with the pattern and special tokens of the checkpoint's own "
            "tokenizer code: transformers.integrations.tiktoken.convert_tiktoken_to_fast("
            f"tiktoken.Encoding(...), {str(path.parent)!r})"
        )


def byte_letters() -> dict[int, str]:
    """Returns the letter that stands for each byte in a byte-level vocabulary: its own if that can
    be printed, else the next of the further ones."""
    letters = sorted(ByteLevel.alphabet())
    further = iter(letter for letter in letters if ord(letter) > 255)
    return {byte: chr(byte) if chr(byte) in letters else next(further) for byte in range(256)}


def read_ranks(path: Path) -> dict[str, int]:
    """Returns token -> rank, the tokens in the letters of byte_letters()."""
    letters, ranks = byte_letters(), {}
    for i, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        where = f"{path}: line {i}"
        try:
            text, rank = line.split()
            token = base64.b64decode(text, validate=True).decode("latin-1").translate(letters)
        except ValueError:  # also base64's own error
            found = f"{where} is {line.decode(errors='replace')!r:.60}"
            raise ValueError(f"{found}; a token in base64 and its rank are required") from None
        if rank != b"%d" % len(ranks):
            found = f"{where}: rank is {rank.decode(errors='replace')!r:.60}"
            raise ValueError(f"{found}; must be {len(ranks)}: ranks count the tokens from 0")
        if token in ranks:
            raise ValueError(f"{where}: token {text.decode()} has rank {ranks[token]}, too")
        ranks[token] = len(ranks)
    missing = [byte for byte, letter in letters.items() if letter not in ranks]
    if missing:
        raise ValueError(f"{path}: has no token for byte {missing[0]}; all 256 are required")
    return ranks


def find_merges(ranks: dict[str, int]) -> list[tuple[str, str]]:
    """Returns all pairs of tokens that make a token, in the order in which tiktoken merges them.

    tiktoken merges whatever two neighbours make the token of the lowest rank, the leftmost of them
    first. Of several pairs that make one token, no more than one ever comes up: until a token is
    made, nothing is merged across its ends, so what happens between them depends on its own bytes
    alone. The order among such pairs is thus of no consequence."""
    cuts = ((token[:i], token[i:]) for token in ranks for i in range(1, len(token)))
    return [(left, right) for left, right in cuts if left in ranks and right in ranks]


def special_tokens(added: dict, first: int, path: Path) -> list[AddedToken]:
    """Returns the tokens of the ids from `first`: those that added_tokens_decoder of the file
    `path` names, and reserved ones in the gaps."""
    numbers = [str(number) for number in range(first, first + RESERVED)]
    named = {number: {"content": f"<|reserved_token_{number}|>"} for number in numbers} | added
    tokens = []
    for number, token in named.items():
        where = f"{path}: added_tokens_decoder: id {number!r:.60}"
        if number not in numbers:
            needed = f"from {first}, behind those of the tiktoken file, to {numbers[-1]}"
            raise ValueError(f"{where}; must be {needed}")
        text = token.get("content") if isinstance(token, dict) else None
        if not isinstance(text, str) or not text:
            raise ValueError(f"{where}: content is {text!r:.60}; the text of a token is required")
        # Decoded text shows a token that is not special (<think>). In text all are found alike:
        # tiktoken looks for them at once, before anything else, so none may be normalized.
        special = token.get("special") is not False
        tokens.append(AddedToken(text, special=special, normalized=False))
    return tokens
