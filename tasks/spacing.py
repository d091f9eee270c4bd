"""Where a space stands between a prompt and what follows it."""

import re

# Behind these, Chinese and Japanese have no space. Korean has one, and so have emoji.
UNSPACED = re.compile(
    "["
    "\u2e80-\u312f\u3190-\u31ff"  # CJK punctuation, kana, bopomofo; between the two is Hangul
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # ideographs
    "\ufe10-\ufe1f\ufe30-\ufe6f"  # vertical and small punctuation
    "\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65"  # full-width punctuation
    "\uff66-\uff9f\U0001aff0-\U0001b16f"  # half-width and rare kana
    "]"
)


def join_choice(prompt: str, choice: str) -> str:
    """Puts a space between them, unless the prompt ends with white space, or with what has no space
    behind it. The choice does not matter: all choices of a question are joined the same way."""
    end = prompt[-1:]
    return prompt + choice if end.isspace() or UNSPACED.match(end) else f"{prompt} {choice}"
