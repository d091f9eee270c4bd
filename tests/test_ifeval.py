"""IFEval: verdicts by hand for every instruction; accuracies, rows and saved answers."""

import json
import time

import pytest
from published_rows import CHAT, PLAIN, read_row, without, write_rows

from chat import load_tokenizer
from checkpoint import load_model
from eval import describe, rescore
from files import write_lines
from tasks import TASKS, answer_file, read_examples, score
from tasks.ifeval import loose_answers
from tasks.instructions import INSTRUCTIONS, NEVER_CHECKED

KEYWORDS, FORBIDDEN = {"keywords": ["sea", "b.y"]}, {"forbidden_words": ["art", "no"]}
OFTEN = {"keyword": "an ", "frequency": 4, "relation": "at least"}
SELDOM = OFTEN | {"relation": "less than"}
LETTERS = {"letter": "E", "let_frequency": 3, "let_relation": "at least"}
HASHES = {"letter": "#", "let_frequency": 2, "let_relation": "at least"}
FEW_LETTERS = LETTERS | {"let_relation": "less than"}
WORDS = {"num_words": 4, "relation": "at least"}
FEW_WORDS = {"num_words": 4, "relation": "less than"}
FIRST = {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "Then"}
DAYS = {"section_spliter": " Day ", "num_sections": 2}
P_S, P_P_S, NOTE = ({"postscript_marker": marker} for marker in ("P.S.", " P.P.S", "Note:"))
BULLETS, MARKED = {"num_bullets": 2}, {"num_highlights": 2}
VERDICTS = {  # an instruction that is checked -> kwargs, an answer, whether the answer follows it
    "keywords:existence": [
        (KEYWORDS, "The boy swims overSEAs.", True),  # within a word; "b.y" is a pattern
        (KEYWORDS, "The boy swims.", False),
        (KEYWORDS, "The sea.", False),
    ],
    "keywords:frequency": [
        (OFTEN, "AN owl and Banana", True),  # AN, and, Ban, ana: the keyword is stripped
        (OFTEN, "AN owl and Bans", False),
        (SELDOM, "AN owl and Bans", True),
        (SELDOM, "AN owl and Banana", False),
    ],
    "keywords:forbidden_words": [
        (FORBIDDEN, "A party, a nose, no_one", True),
        (FORBIDDEN, "The ART of it", False),
        (FORBIDDEN, "It is no-one.", False),
    ],
    "keywords:letter_frequency": [
        (LETTERS, "Eel, hen", True),
        (LETTERS, "Eel, hat", False),
        (FEW_LETTERS, "Eel, hat", True),
        (FEW_LETTERS, "Eel, hen", False),
        (HASHES, "#sun #sea", True),
        (HASHES, "#sun, sea: ssss", False),
    ],
    "length_constraints:number_paragraphs": [
        ({"num_paragraphs": 2}, "One.\n***\nTwo.\n\nStill two.", True),
        ({"num_paragraphs": 2}, "***One.***Two.\n***\n", True),  # nothing before and behind
        ({"num_paragraphs": 2}, "One.\n\nTwo.", False),
        ({"num_paragraphs": 2}, "One.\n***\n \n***\nTwo.", False),  # a blank one in between
        ({"num_paragraphs": 1}, "One.\n****\nTwo.", False),
    ],
    "length_constraints:number_words": [
        (WORDS, "It's a 3.", True),  # It, s, a, 3
        (WORDS, "snake_case is one", False),
        (FEW_WORDS, "snake_case - is -- one", True),
        (FEW_WORDS, "One two three-four", False),
    ],
    "length_constraints:nth_paragraph_first_word": [
        (FIRST, "First this.\n\n'\"THEN, that", True),
        (FIRST, "First.\n\nthen's that\n\n \n\n", True),  # blank ones at the end do not count
        (FIRST, "First.\n\nSo then", False),
        (FIRST, "First.\n\n\"'then", False),  # the quotation marks are taken off in one order
        (FIRST, "First.\nThen that.", False),
        (FIRST, "First.\n\nThen.\n\nLast.", False),
        (FIRST, "First.\n\n\n\nThen.", False),  # the second is the blank one
    ],
    "detectable_content:number_placeholders": [
        ({"num_placeholders": 2}, "To [name] of [[city]]", True),
        ({"num_placeholders": 2}, "[] []", True),
        ({"num_placeholders": 2}, "[name] [ci\nty]", False),
        ({"num_placeholders": 2}, "[[name]]", False),
    ],
    "detectable_content:postscript": [
        (P_S, "Bye.\np. s. I forgot", True),
        (P_S, "Bye. P.S. I forgot.\nMore.", True),
        (P_S, "Bye.\nP.S I forgot", False),
        (P_S, "Bye.\nP.P.S I forgot", False),
        (P_P_S, "Bye. P. P. S", True),
        (P_P_S, "Bye. P.S.", False),
        (NOTE, "NOTE: I forgot", True),
        (NOTE, "Notes: none", False),
    ],
    "detectable_format:number_bullet_lists": [
        (BULLETS, "So:\n* one\n  * two\n** no **", True),
        (BULLETS, "So:\n\n - one\n\n\n-- two", True),
        (BULLETS, "* one\n- two", True),
        (BULLETS, "*\none\n- two", True),  # * alone takes the next line
        (BULLETS, "*\n* one\n- two", True),
        (BULLETS, "* one\n* two\n- three", False),
        (BULLETS, "* one\nnot * two", False),
        (BULLETS, "* one\n*", False),
    ],
    "detectable_format:constrained_response": [
        ({}, "I think: My answer is no. So it is.", True),
        ({}, "My answer is no", False),
        ({}, "my answer is yes.", False),
    ],
    "detectable_format:number_highlighted_sections": [
        (MARKED, "*one* and **two**", True),
        (MARKED, "*one*two*", False),  # the second begins where none is left
        (MARKED, "*one* and ** **", False),
        (MARKED, "*one* and *tw\no*", False),
        (MARKED, "***one***", True),  # once in single, once in double asterisks
    ],
    "detectable_format:multiple_sections": [
        (DAYS, "Day 1\nwalk\nDay2: rest", True),
        (DAYS, "MonDay 12, Day\n3", True),
        (DAYS, "Day 1 and day 2", False),
        (DAYS, "Day one, Day two", False),
    ],
    "detectable_format:json_format": [
        ({}, '\n```json\n{"a": [1, null]}\n```\n', True),
        ({}, "``` 3 ```", True),
        ({}, "NaN", True),
        ({}, '{"a": 1', False),
        ({}, "Here: {}", False),
        ({}, "```js\n{}\n```", False),
    ],
    "detectable_format:title": [
        ({}, "<<A day>>\nIt rained.", True),
        ({}, "a << b >> c", True),
        ({}, "<<<<\n>>>>", False),
        ({}, "<< >> and <<>>", True),  # from the first << to the last >>
        ({}, "<<< >>>", False),
        ({}, "<A day>", False),
        ({}, ">> a <<", False),
    ],
    "combination:two_responses": [
        ({}, "Yes.\n******\nNo.", True),
        ({}, "******Yes.******No.******", True),
        ({}, "Yes.\n******\n Yes. ", False),
        ({}, "Yes.******No.******Maybe.", False),
        ({}, "Yes.************No.", False),  # a blank one in between
        ({}, "Yes.\n***\nNo.", False),
    ],
    "combination:repeat_prompt": [
        ({"prompt_to_repeat": " Say it. "}, "\n SAY IT. It.", True),
        ({"prompt_to_repeat": "Say it."}, "Sure: Say it. It.", False),
    ],
    "startend:end_checker": [
        ({"end_phrase": " The End. "}, 'Bye. "THE END." \n', True),
        ({"end_phrase": "The end."}, "The end.)", False),
        ({"end_phrase": "The end."}, "The end", False),
    ],
    "startend:quotation": [
        ({}, ' "Yes", "no"\n', True),
        ({}, '"', False),
        ({}, "'Yes'", False),
        ({}, '"Yes" she said', False),
    ],
    "punctuation:no_comma": [
        ({}, "One; two、three，four", True),
        ({}, "1,000", False),
        ({}, " \n", False),  # a blank answer follows nothing
    ],
}
UNCHECKED = {  # an instruction that needs langdetect or nltk -> kwargs
    "language:response_language": {"language": "de"},
    "length_constraints:number_sentences": {"num_sentences": 2, "relation": "less than"},
    "change_case:capital_word_frequency": {"capital_frequency": 1, "capital_relation": "at least"},
    "change_case:english_capital": {},
    "change_case:english_lowercase": {},
}


def answered(answer: str, *instructions, prompt: str = "Q") -> dict:
    """An example as the evaluator saves it. An instruction is its name and its kwargs."""
    names, kwargs = zip(*instructions)
    example = {"prompt": prompt, "raw_answers": list(names), "kwargs": list(kwargs)}
    return example | {"raw_prediction": answer}


def verdicts(answer: str, *instructions) -> tuple[list, list]:
    (record,) = score("ifeval", [answered(answer, *instructions)]).records
    return record["strict"], record["loose"]


@pytest.mark.parametrize("name", VERDICTS)
def test_verdicts_by_hand(name):
    for kwargs, answer, verdict in VERDICTS[name]:
        assert verdicts(answer, (name, kwargs))[0] == [verdict], (kwargs, answer)
    assert {verdict for _, _, verdict in VERDICTS[name]} == {True, False}


def test_all_25_instructions_are_known_and_five_never_checked():
    assert INSTRUCTIONS.keys() == VERDICTS.keys() | UNCHECKED.keys() and len(INSTRUCTIONS) == 25
    assert NEVER_CHECKED == UNCHECKED.keys()


# ------------------------------------------------------------------------------------------
# Loose verdicts and accuracies

NO_COMMA, LOWER, GERMAN = (
    ("punctuation:no_comma", {}),
    ("change_case:english_lowercase", {}),
    ("language:response_language", {"language": "de"}),
)
ENDS = ("startend:end_checker", {"end_phrase": "The end."})


def test_loose_answers_lack_lines_at_the_ends_and_asterisks():
    assert loose_answers("Sure:\n\n*a*\nb\n\nBye") == [
        *("Sure:\n\n*a*\nb\n\nBye", "Sure:\n\na\nb\n\nBye"),
        *("*a*\nb\n\nBye", "a\nb\n\nBye"),
        *("Sure:\n\n*a*\nb", "Sure:\n\na\nb"),
        *("*a*\nb", "a\nb"),
    ]
    assert loose_answers("*a*") == ["*a*", "a", *[""] * 6]


@pytest.mark.parametrize(
    "answer, instruction, strict, loose",
    [
        ("Sure, here:\nRain falls.", NO_COMMA, False, True),  # without the first line
        ("It fell. The end.\n\nAnything else?", ENDS, False, True),  # without the last
        ("Well, so:\nRain falls.\nBye, you", NO_COMMA, False, True),  # without both
        ("The *end*.", ENDS, False, True),  # without asterisks
        ("Here:\n**The end.**\nBye", ENDS, False, True),  # without all of them
        ("Rain, sun.", NO_COMMA, False, False),  # nothing is left of one line
        ("a\nb, c\nd", NO_COMMA, False, False),
        ("The end.\nx", ENDS, False, True),
        ("x\nThe end.", ENDS, True, True),
        ("", NO_COMMA, False, False),
    ],
)
def test_strict_and_loose_by_hand(answer, instruction, strict, loose):
    assert verdicts(answer, instruction) == ([strict], [loose])


def test_a_prompt_with_an_unchecked_instruction_is_not_scored():
    """Of 3 prompts, strict 1 and loose 2 are followed; of 7 instructions, strict 4 and loose 5. Not
    scored are: one that fails anyway, a blank answer, and one that follows what is checked."""
    result = score(
        "ifeval",
        [
            answered("Rain. The end.", NO_COMMA, ENDS),
            answered("Regen, Schnee", NO_COMMA, GERMAN),
            answered("", GERMAN),
            answered("Sure, so:\nrain", NO_COMMA),
            answered("rain. the end.", LOWER, ENDS),
            answered("Rain, sun. The end.", NO_COMMA, ENDS),
        ],
    )
    assert [record["score"] for record in result.records] == [1, None, None, 0, None, 0]
    assert [record["strict"] for record in result.records[1:3]] == [[False], []]
    assert result.metrics == {
        "prompt-level strict": 1 / 3,
        "instruction-level strict": 4 / 7,
        "prompt-level loose": 2 / 3,
        "instruction-level loose": 5 / 7,
    }
    assert (result.count, result.missing, result.mean) == (3, 3, 1 / 3)
    assert describe(result).endswith("over 3 prompts and 7 instructions; 3 samples not scored")


def test_the_same_prompts_and_instructions_count_whatever_the_answers():
    sets = set()
    for answer in ("", "rain", "RAIN, SUN", "Here:\nrain. The end."):
        asked = [(NO_COMMA,), (NO_COMMA, *UNCHECKED.items()), (LOWER,), (ENDS, GERMAN)]
        result = score("ifeval", [answered(answer, *instructions) for instructions in asked])
        sets.add((result.count, result.unit, result.missing))
    assert sets == {(1, "prompts and 3 instructions", 3)}


def test_the_reasoning_is_no_part_of_the_answer():
    assert verdicts("<think>Well, so</think>\nRain", NO_COMMA) == ([True], [True])
    assert verdicts("<think>Rain", NO_COMMA) == ([False], [False])  # cut off: a blank answer


# ------------------------------------------------------------------------------------------
# Rows

ROW = {
    "key": 7,
    "prompt": "Describe rain without commas, in 2 sections.",
    "instruction_id_list": ["punctuation:no_comma", "detectable_format:multiple_sections"],
    "kwargs": [{}, {"section_spliter": "Part", "num_sections": 2}],
}
NULLS = {"keywords": None, "num_sections": None, "relation": None}  # as the hub's rows have them


@pytest.mark.parametrize("ask, prompt", [(PLAIN, "{}"), (CHAT, "User: {}\n\nAssistant:")])
def test_a_row_of_both_spellings(ask, prompt, tmp_path):
    hub = ROW | {"kwargs": [NULLS, NULLS | ROW["kwargs"][1]]}
    for row in (ROW, hub):
        example = read_row(tmp_path, "ifeval", row, ask)
        assert example["prompt"] == prompt.format(ROW["prompt"])
        assert example["raw_answers"] == ROW["instruction_id_list"]
        assert example["kwargs"] == ROW["kwargs"]
    assert TASKS["ifeval"].max_new_tokens == 1280  # lm-evaluation-harness' max_gen_toks


def of(name: str, kwargs) -> dict:
    return {"instruction_id_list": [name], "kwargs": kwargs}


NTH, SECTIONS = "length_constraints:nth_paragraph_first_word", "detectable_format:multiple_sections"
BAD = [
    (
        of("punctuation:commas", [{}]),
        r"field NAMES\[0\] is 'punctuation:commas'; one of IFEval's 25",
    ),
    (of("no_comma", [{}]), r"field NAMES\[0\] is 'no_comma'; one of IFEval's 25, such as"),
    (of("punctuation:no_comma", None), "field kwargs is None; a list of 1, one object for each"),
    (of("punctuation:no_comma", [{}, {}]), r"field kwargs is \[{}, {}\]; a list of 1, one object"),
    (of("punctuation:no_comma", [3]), r"field kwargs\[0\] is 3; an object is required"),
    (of("punctuation:no_comma", ["x"]), r"field kwargs\[0\] is 'x'; an object is required"),
    (
        of("punctuation:no_comma", [{"num_words": 3}]),
        r"field kwargs\[0\]: field num_words is 3; punctuation:no_comma takes none",
    ),
    (
        of(SECTIONS, [{"num_sections": 2, "section_spliter": "Day", "days": 1}]),
        r"kwargs\[0\]: field days is 1; .* takes section_spliter, num_sections",
    ),
    (
        of(SECTIONS, [{"num_sections": 2, "section_spliter": None}]),
        r"kwargs\[0\]: field section_spliter is None; a regular expression is required",
    ),
    *(
        (
            of(SECTIONS, [{"num_sections": value, "section_spliter": "Day"}]),
            r"kwargs\[0\]: field num_sections is .*; a whole number of at least 1 is required",
        )
        for value in (0, -1, 2.0, True, "2")
    ),
    *(
        (
            of(SECTIONS, [{"num_sections": 2, "section_spliter": value}]),
            "field section_spliter is .*; a regular expression is required",
        )
        for value in ("Day (", "*", " ", "\\ ", "(?i)day", 1)
    ),
    *(
        (of("keywords:existence", [{"keywords": value}]), "field keywords is .*; a list of regular")
        for value in ([], ["a", "["], "a", ["a", None])
    ),
    *(
        (
            of("length_constraints:number_words", [{"num_words": 9, "relation": value}]),
            'field relation is .*; "less than" or "at least" is required',
        )
        for value in ("at most", None, ["at least"])
    ),
    *(
        (
            of("keywords:letter_frequency", [LETTERS | {"letter": value}]),
            "field letter is .*; one character is required",
        )
        for value in ("ab", " ", 5)
    ),
    *(
        (
            of("startend:end_checker", [{"end_phrase": value}]),
            "field end_phrase is .*; a string that is not blank is required",
        )
        for value in ("", ["x"])
    ),
    *(
        (of(name, [UNCHECKED[name] | wrong]), f"field {next(iter(wrong))} is .* is required")
        for name, wrong in [
            ("language:response_language", {"language": 5}),
            ("length_constraints:number_sentences", {"relation": "at most"}),
            ("change_case:capital_word_frequency", {"capital_frequency": 0}),
        ]
    ),
    *(
        (of(f"change_case:{name}", [{"language": "en"}]), f"is 'en'; change_case:{name} takes none")
        for name in ("english_capital", "english_lowercase")
    ),
    (
        of(NTH, [FIRST | {"nth_paragraph": 3}]),
        "field nth_paragraph is 3; at most num_paragraphs, 2, is required",
    ),
]


@pytest.mark.parametrize("fields, message", BAD)
def test_bad_rows_are_named(fields, message, tmp_path):
    data = write_rows(tmp_path / "bad.jsonl", [ROW, ROW | fields])
    message = message.replace("NAMES", "instruction_id_list")
    with pytest.raises(ValueError, match=rf"bad\.jsonl: line 2: .*{message}"):
        read_examples(data, "ifeval", PLAIN)


@pytest.mark.parametrize("name", ["prompt", "instruction_id_list", "kwargs"])
def test_a_row_without_a_field_is_named(name, tmp_path):
    data = write_rows(tmp_path / "bad.jsonl", [ROW, without(ROW, name)])
    with pytest.raises(ValueError, match=rf"bad\.jsonl: line 2: field {name} is None"):
        read_examples(data, "ifeval", PLAIN)


@pytest.mark.parametrize("name", UNCHECKED)
def test_a_file_in_which_no_prompt_can_be_scored_is_named(name, tmp_path):
    unscored = ROW | {"instruction_id_list": ["punctuation:no_comma", name]}
    unscored |= {"kwargs": [{}, UNCHECKED[name]]}
    data = write_rows(tmp_path / "data.jsonl", [unscored, unscored])
    message = rf"no prompt can be scored; one without the instructions .*{name}.* is required"
    with pytest.raises(ValueError, match=rf"/data\.jsonl: {message}"):
        read_examples(data, "ifeval", PLAIN)
    both = read_examples(write_rows(data, [unscored, ROW]), "ifeval", PLAIN)
    assert [example["kwargs"] for example in both] == [unscored["kwargs"], ROW["kwargs"]]
    alone = score("ifeval", [both[0] | {"raw_prediction": "Rain"}])  # as with --limit 1
    assert alone.mean is None and (alone.count, alone.missing) == (0, 1)


# ------------------------------------------------------------------------------------------
# Saved answers


def test_a_model_answers_and_its_answers_score_the_same_again(checkpoint, tmp_path):
    data = write_rows(tmp_path / "data.jsonl", [ROW, ROW | of("punctuation:no_comma", [{}])])
    model, tokenizer = load_model(checkpoint), load_tokenizer(checkpoint)
    examples = answer_file(model, tokenizer, "ifeval", data, max_new_tokens=3)
    more = [answered("Rain, sun", NO_COMMA), answered("rain", LOWER), answered("Rain", NO_COMMA)]
    first = score("ifeval", examples + more)
    write_lines(tmp_path / "saved.jsonl", first.records)
    assert rescore(tmp_path / "saved.jsonl", "ifeval") == (first, 5)
    rows = [json.loads(line) for line in (tmp_path / "saved.jsonl").read_text().splitlines()]
    assert [row["score"] for row in rows[2:]] == [0, None, 1]
    write_rows(tmp_path / "saved.jsonl", [*rows[:4], rows[4] | {"score": 0}])
    assert rescore(tmp_path / "saved.jsonl", "ifeval") == (first, 4)


@pytest.mark.parametrize("name", ["prompt", "raw_answers", "kwargs", "raw_prediction"])
def test_a_saved_row_without_a_field_is_named(name, tmp_path):
    good = answered("Rain", NO_COMMA)
    path = write_rows(tmp_path / "c.jsonl", [{"example": good}, {"example": without(good, name)}])
    with pytest.raises(ValueError, match=rf"c\.jsonl: line 2: field {name} is None"):
        rescore(path, "ifeval")


@pytest.mark.parametrize("fields, message", BAD)
def test_a_saved_row_with_a_wrong_field_is_named(fields, message, tmp_path):
    wrong = {"raw_answers": fields["instruction_id_list"], "kwargs": fields["kwargs"]}
    path = write_rows(tmp_path / "c.jsonl", [{"example": answered("Rain", NO_COMMA) | wrong}])
    message = message.replace("NAMES", "raw_answers")
    with pytest.raises(ValueError, match=rf"c\.jsonl: line 1: .*{message}"):
        rescore(path, "ifeval")


@pytest.mark.parametrize(
    "text",
    [
        *("\n" * 100_000, " \n" * 50_000, "[" * 100_000, "<" * 100_000, "<<a" * 33_000),
        *("*" * 100_000, "*a" * 50_000, "* \n" * 33_000, '{"a":' * 20_000, "9" * 100_000),
        *("x" + "\n" * 100_000 + "x", "p. " * 33_000, "Day" * 33_000, '"' * 100_000),
    ],
    ids=lambda text: repr(text[:6]),
)
def test_a_long_answer_is_scored_soon(text):
    instructions = [(name, VERDICTS[name][0][0]) for name in VERDICTS]
    began = time.monotonic()
    assert score("ifeval", [answered(text, *instructions)]).mean == 0
    assert time.monotonic() - began < 20  # it takes some tenths of a second
