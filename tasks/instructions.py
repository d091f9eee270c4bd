"""IFEval's 25 instructions (arXiv 2311.07911): whether an answer follows one, as the published
checkers decide it.

Five published checkers ask langdetect for the language, or nltk for sentences or tokens. Nothing
here stands in for these packages, so these five instructions are never checked. Published numbers
rest on the checkers as they are, so their oddities are kept: a keyword is a regular expression and
may lie within a word, the heading of a section may stand anywhere, a postscript need not stand at
the end.
"""

import json
import operator
import re
from collections.abc import Callable
from typing import NamedTuple

from chat import is_text

RELATIONS = {"less than": operator.lt, "at least": operator.ge}
OPTIONS = "My answer is yes.", "My answer is no.", "My answer is maybe."
POSTSCRIPTS = {"P.S.": r"p\.\s?s\.", "P.P.S": r"p\.\s?p\.\s?s"}

# ------------------------------------------------------------------------------------------
# Words and letters


def has_keywords(text: str, keywords: list[str]) -> bool:
    return all(re.search(keyword, text, re.IGNORECASE) for keyword in keywords)


def has_keyword_often(text: str, keyword: str, frequency: int, relation: str) -> bool:
    found = re.findall(keyword.strip(), text, re.IGNORECASE)
    return RELATIONS[relation](len(found), frequency)


def lacks_words(text: str, forbidden_words: list[str]) -> bool:
    return not any(re.search(rf"\b{word}\b", text, re.IGNORECASE) for word in forbidden_words)


def has_letter_often(text: str, letter: str, let_frequency: int, let_relation: str) -> bool:
    """Counts whatever character is asked for. For one that is no letter (# and ! in two published
    prompts), the published checker counts a letter that it draws at random."""
    return RELATIONS[let_relation](text.lower().count(letter.lower()), let_frequency)


def has_words(text: str, num_words: int, relation: str) -> bool:
    return RELATIONS[relation](len(re.findall(r"\w+", text)), num_words)


# ------------------------------------------------------------------------------------------
# Parts of the answer


def filled(parts: list[str]) -> list[str]:
    """Returns the parts that are not blank. Returns [] if one between the first and last is."""
    return [] if any(not p.strip() for p in parts[1:-1]) else [p for p in parts if p.strip()]


def has_paragraphs(text: str, num_paragraphs: int) -> bool:
    return len(filled(re.split(r"\s?\*\*\*\s?", text))) == num_paragraphs


def has_two_responses(text: str) -> bool:
    responses = filled(text.split("******"))
    return len(responses) == 2 and responses[0].strip() != responses[1].strip()


def has_first_word(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """Blank paragraphs do not count, but they do where the nth is looked up, as published."""
    paragraphs = text.split("\n\n")
    count = sum(bool(p.strip()) for p in paragraphs)
    if count != num_paragraphs or not paragraphs[nth_paragraph - 1].strip():
        return False
    word = paragraphs[nth_paragraph - 1].split()[0].lstrip("'").lstrip('"')
    word = re.split(r"[.,?!'\"]", word)[0]
    return "".join(map(str.lower, word)) == first_word.lower()  # a last Σ differs, as published


def has_sections(text: str, section_spliter: str, num_sections: int) -> bool:
    return len(re.split(rf"\s?{section_spliter.strip()}\s?\d+\s?", text)) > num_sections


# ------------------------------------------------------------------------------------------
# Marks. An answer may be a hundred thousand brackets, so no pattern looks twice at a line.


def has_bullets(text: str, num_bullets: int) -> bool:
    """A line with * alone is a bullet together with the line below, as published."""
    stars = re.findall(r"^[^\S\n]*\*[^*].*$", text, re.MULTILINE)
    dashes = re.findall(r"^[^\S\n]*-", text, re.MULTILINE)
    return len(stars) + len(dashes) == num_bullets


def has_highlights(text: str, num_highlights: int) -> bool:
    inside = re.findall(r"\*([^\n*]*)\*", text) + re.findall(r"\*\*([^\n*]*)\*\*", text)
    return sum(bool(part.strip()) for part in inside) >= num_highlights


def has_placeholders(text: str, num_placeholders: int) -> bool:
    return re.findall(r"\[[^]\n]*(]?)", text).count("]") >= num_placeholders


def has_title(text: str) -> bool:
    """A title stands between the first << and the last >> of a line."""
    titles = [line.partition("<<")[2].rpartition(">>")[0] for line in text.split("\n")]
    return any(title.lstrip("<").rstrip(">").strip() for title in titles)


def has_postscript(text: str, postscript_marker: str) -> bool:
    marker = postscript_marker.strip()
    return bool(re.search(POSTSCRIPTS.get(marker, marker.lower()), text.lower()))


# ------------------------------------------------------------------------------------------
# The answer as a whole


def is_json(text: str) -> bool:
    text = text.strip()
    for fence in ("```json", "```Json", "```JSON", "```"):
        text = text.removeprefix(fence)
    try:
        json.loads(text.removesuffix("```").strip())
    except (ValueError, RecursionError):
        return False
    return True


def is_option(text: str) -> bool:
    return any(option in text for option in OPTIONS)


def is_quoted(text: str) -> bool:
    text = text.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


def begins_with(text: str, prompt_to_repeat: str) -> bool:
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


def ends_with(text: str, end_phrase: str) -> bool:
    return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


# ------------------------------------------------------------------------------------------
# The instructions


class Kind(NamedTuple):
    """What a field of an instruction's kwargs must be."""

    needed: str
    fits: Callable[[object], bool]


def is_pattern(value) -> bool:
    try:
        for pattern in (value, value.strip().lower()):  # a checker may change it so
            re.compile(rf"\b{pattern}")
    except (re.error, OverflowError, RecursionError):
        return False
    return True


def is_filled(value) -> bool:
    return is_text(value) and bool(value.strip())


COUNT = Kind("a whole number of at least 1", lambda v: type(v) is int and v > 0)
RELATION = Kind('"less than" or "at least"', lambda v: isinstance(v, str) and v in RELATIONS)
TEXT = Kind("a string that is not blank", is_filled)
LETTER = Kind("one character", lambda v: is_filled(v) and len(v) == 1)
PATTERN = Kind("a regular expression", lambda v: is_filled(v) and is_pattern(v))
PATTERNS = Kind(
    "a list of regular expressions",
    lambda v: isinstance(v, list) and len(v) > 0 and all(map(PATTERN.fits, v)),
)


class Instruction(NamedTuple):
    follows: Callable[..., bool] | None  # of a text that is not blank, and the kwargs
    kwargs: dict[str, Kind] = {}


INSTRUCTIONS = {
    "keywords:existence": Instruction(has_keywords, {"keywords": PATTERNS}),
    "keywords:frequency": Instruction(
        has_keyword_often, {"keyword": PATTERN, "frequency": COUNT, "relation": RELATION}
    ),
    "keywords:forbidden_words": Instruction(lacks_words, {"forbidden_words": PATTERNS}),
    "keywords:letter_frequency": Instruction(
        has_letter_often, {"letter": LETTER, "let_frequency": COUNT, "let_relation": RELATION}
    ),
    "language:response_language": Instruction(None, {"language": TEXT}),  # needs langdetect
    "length_constraints:number_sentences": Instruction(  # needs nltk
        None, {"num_sentences": COUNT, "relation": RELATION}
    ),
    "length_constraints:number_paragraphs": Instruction(has_paragraphs, {"num_paragraphs": COUNT}),
    "length_constraints:number_words": Instruction(
        has_words, {"num_words": COUNT, "relation": RELATION}
    ),
    "length_constraints:nth_paragraph_first_word": Instruction(
        has_first_word, {"num_paragraphs": COUNT, "nth_paragraph": COUNT, "first_word": TEXT}
    ),
    "detectable_content:number_placeholders": Instruction(
        has_placeholders, {"num_placeholders": COUNT}
    ),
    "detectable_content:postscript": Instruction(has_postscript, {"postscript_marker": PATTERN}),
    "detectable_format:number_bullet_lists": Instruction(has_bullets, {"num_bullets": COUNT}),
    "detectable_format:constrained_response": Instruction(is_option),
    "detectable_format:number_highlighted_sections": Instruction(
        has_highlights, {"num_highlights": COUNT}
    ),
    "detectable_format:multiple_sections": Instruction(
        has_sections, {"section_spliter": PATTERN, "num_sections": COUNT}
    ),
    "detectable_format:json_format": Instruction(is_json),
    "detectable_format:title": Instruction(has_title),
    "combination:two_responses": Instruction(has_two_responses),
    "combination:repeat_prompt": Instruction(begins_with, {"prompt_to_repeat": TEXT}),
    "startend:end_checker": Instruction(ends_with, {"end_phrase": TEXT}),
    "startend:quotation": Instruction(is_quoted),
    "change_case:capital_word_frequency": Instruction(  # needs nltk
        None, {"capital_frequency": COUNT, "capital_relation": RELATION}
    ),
    "change_case:english_capital": Instruction(None),  # needs langdetect: it must be English
    "change_case:english_lowercase": Instruction(None),  # needs langdetect, too
    "punctuation:no_comma": Instruction(lambda text: "," not in text),
}
NEVER_CHECKED = {name for name, kind in INSTRUCTIONS.items() if kind.follows is None}
