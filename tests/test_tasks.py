"""Tasks: a published row becomes the prompt written here by hand, an answer its score, and what is
saved scores the same again."""

import json
import random
import re
import time
from decimal import Decimal
from types import SimpleNamespace

import pytest
from conftest import SHARED
from published_rows import (
    ARC_FILE,
    ARC_HUB,
    ARC_TEXTS,
    CHAT,
    CIRCLE,
    CLUEWSC,
    FUNCTION,
    GENERIC,
    GSM8K,
    HELLASWAG,
    MBPP,
    PLAIN,
    TRIVIA,
    TRIVIA_HUB,
    read_row,
    without,
    write_rows,
)

import tasks
from chat import load_tokenizer
from checkpoint import load_model
from eval import rescore
from files import write_lines
from processes import SingleProcess
from tasks import TASKS, Ask, answer_file, find_tasks, read_examples, score
from tasks.judge import read_points
from tasks.reasoning import without_reasoning
from tasks.text import final_number, score_exact, score_intent, score_number, score_trivia

CASES = SHARED.parent / "cases"
NEW_TASK = """
from tasks.common import Task, by_row, read_answers

def score_reverse(prediction, answers):
    return int(prediction.strip()[::-1] in answers)

TASKS = {"reverse": Task("rows of prompt and raw_answers", by_row(read_answers), score_reverse)}
"""


def test_a_task_is_added_with_one_file(checkpoint, tmp_path, monkeypatch):
    (tmp_path / "task_of_a_test.py").write_text(NEW_TASK)
    monkeypatch.setattr(tasks, "__path__", [*tasks.__path__, str(tmp_path)])
    found = find_tasks()
    assert [*TASKS, "reverse"] == sorted(found, key=[*TASKS, "reverse"].index)
    monkeypatch.setitem(TASKS, "reverse", found["reverse"])
    row = {"prompt": "User: ab\n\nAssistant:", "raw_answers": ["ba"]}
    data = write_rows(tmp_path / "data.jsonl", [row])
    model, tokenizer = load_model(checkpoint), load_tokenizer(checkpoint)
    (example,) = answer_file(model, tokenizer, "reverse", data, max_new_tokens=3)
    assert example.keys() == {"prompt", "raw_answers", "raw_prediction"}
    result = score("reverse", [example | {"raw_prediction": said} for said in (" ab", "ba")])
    assert (result.mean, [record["score"] for record in result.records]) == (0.5, [1, 0])
    write_lines(tmp_path / "saved.jsonl", result.records)
    assert rescore(tmp_path / "saved.jsonl", "reverse") == (result, 2)


def test_replicas_share_the_examples_of_a_file(checkpoint, tmp_path):
    """Four ranks hold two replicas: this one, of the second, answers every second example."""

    class Rank(SingleProcess):
        world_size, replica, replicas = 4, 1, 2

        def from_all(self, value: list) -> list:
            self.answered = value
            others = [{"raw_answers": [str(i)], "raw_prediction": "theirs"} for i in (0, 2, 4)]
            return [others, others, value, value]

    rows = [{"prompt": f"User: {i}\n\nAssistant:", "raw_answers": [str(i)]} for i in range(5)]
    data, rank = write_rows(tmp_path / "data.jsonl", rows), Rank()
    model, tokenizer = load_model(checkpoint), load_tokenizer(checkpoint)
    alone = answer_file(model, tokenizer, "exact", data, 2)
    together = answer_file(model, tokenizer, "exact", data, 2, rank)
    assert rank.answered == alone[1::2]
    assert together[1::2] == alone[1::2]
    assert [e["raw_answers"] for e in together] == [row["raw_answers"] for row in rows]


def test_two_tasks_of_one_name_are_refused(tmp_path, monkeypatch):
    (tmp_path / "second_task_of_a_test.py").write_text('TASKS = {"exact": None}')
    monkeypatch.setattr(tasks, "__path__", [*tasks.__path__, str(tmp_path)])
    with pytest.raises(ValueError, match="another file has a task exact, too"):
        find_tasks()


@pytest.mark.parametrize(
    "task, row, message",
    [
        ("hellaswag", without(HELLASWAG, "ctx_b"), "field ctx_b is None; a string is required"),
        ("hellaswag", HELLASWAG | {"label": ""}, "field label is ''; it must be one of the 4"),
        ("hellaswag", HELLASWAG | {"endings": ["one"]}, "field endings is .* of at least 2"),
        ("hellaswag", HELLASWAG | {"endings": ["[x]", "y", "", ""]}, "a choice is ''; it must not"),
        ("arc", ARC_FILE | {"answerKey": "E"}, "field answerKey is 'E'; it must be one of the 4"),
        ("arc", without(ARC_HUB, "question"), "field question is None"),
        ("arc", without(ARC_HUB, "choices"), "field choices is None"),
        ("arc", ARC_HUB | {"choices": {"text": ARC_TEXTS}}, "choices: field label is None"),
        (
            "arc",
            ARC_HUB | {"choices": {"text": ARC_TEXTS, "label": ["A", "B"]}},
            "choices: 4 of text, 2 of label",
        ),
        ("cluewsc", without(CLUEWSC, "target"), "field target is None; an object is required"),
        ("cluewsc", CLUEWSC | {"target": {"span1_text": "马克"}}, "field span2_text is None"),
        ("cluewsc", CLUEWSC | {"label": "1"}, "field label is '1'; it must be one of the 2"),
        ("choice", without(GENERIC, "prompt"), "field prompt is None"),
        ("choice", without(GENERIC, "answer"), "field answer is None; it must be one of the 2"),
        ("choice", GENERIC | {"answer": "red"}, "field answer is 'red'; it must be one of the 2"),
        ("choice", GENERIC | {"answer": 2}, "field answer is 2; it must be one of the 2"),
        ("choice", GENERIC | {"answer": -1}, "field answer is -1; it must be one of the 2"),
        ("choice", GENERIC | {"answer": True}, "field answer is True; it must be one of the 2"),
        ("choice", GENERIC | {"choices": ["a", 1]}, "field choices is .*; a list of strings"),
        ("gsm8k", {"question": "q", "answer": "12"}, "field answer is '12'; it must end with ####"),
        ("gsm8k", {"question": "q", "answer": "#### x"}, "field answer is '#### x'; it must end"),
        ("triviaqa", {"question": "q"}, "field answers is None; a list of strings"),
        ("triviaqa", {"question": "q", "answer": {"value": "v"}}, "field answer: field aliases is"),
        ("humaneval", {"prompt": "def f():\n"}, "field canonical_solution is None"),
        ("mbpp", {"text": "t", "code": "c", "test_list": "x"}, "field test_list is 'x'; a list"),
    ],
)
def test_bad_rows_are_named(task, row, message, tmp_path):
    good = {"choice": GENERIC, "arc": ARC_HUB, "hellaswag": HELLASWAG, "cluewsc": CLUEWSC}
    rows = [good[task], row] if task in good else [row]
    data = write_rows(tmp_path / "bad.jsonl", rows)
    with pytest.raises(ValueError, match=rf"bad\.jsonl: line {len(rows)}: {message}"):
        read_examples(data, task, PLAIN)


# ------------------------------------------------------------------------------------------
# Short answers


@pytest.mark.parametrize(
    "prediction, score",
    [
        (' {"intent": "A", "slots": {"x": "1", "y": ["p", "q"]}}。\n\nmore', 1),
        ('{"intent": "A", "slots": {"y": ["q", "p"], "x": "1"}}', 1),  # order does not matter
        (
            '```json\n{"intent": "A", "slots": {"x": " 1", "y": ["p ", "q"]}}\n```',
            1,
        ),  # spaces are dropped
        ('{"intent": "B", "slots": {"x": "1", "y": ["p", "q"]}}', 0),
        ('{"intent": "A", "slots": {"x": "1"}}', 0),
        ('{"intent": "A", "slots": {"x": "1", "y": ["p", "q"], "z": "2"}}', 0),
        ('{"intent": "A", "slots": {"x": 1, "y": ["p", "q"]}}', 0),
        ('{"intent": "A", "slots": 5}', 0),
        ('["A"]', 0),
        ("A", 0),
        ("", 0),
        ("```json", 0),
        ("[" * 100_000, 0),
    ],
)
def test_intent_by_hand(prediction, score):
    assert (
        score_intent(prediction, ['{"intent": "A", "slots": {"x": "1", "y": ["p", "q"]}}']) == score
    )


def test_exact_by_hand():
    assert score_exact(" 42\n", ["41", "42"]) == 1
    assert score_exact("42 is it", ["42"]) == 0


@pytest.mark.skipif(not SHARED.exists(), reason="the published completions are not here")
def test_published_completions_get_their_published_scores():
    result, equal = rescore(SHARED / "esft/completions_token_intent.jsonl", "intent")
    assert (equal, result.count, result.mean) == (500, 500, 0.76)


@pytest.mark.parametrize(
    "text, number",
    [
        ("so he has 7 * 2 = 14\n#### 1,234", 1234),
        ("Thus 3 + 9 = 12, that is \\boxed{12}. It took 5 steps.", 12),
        ("First \\boxed{1}, no: \\boxed{\\text{2 apples}}", 2),
        ("#### Step 3: the sum\nIt is \\boxed{\\$18}.", 18),  # a heading, not the answer
        ("The answer is $18.", 18),
        ("She sells 9 eggs at 2 dollars and has 18.", 18),
        ("It is -5 degrees", -5),
        ("a loss of -$1,000,000.50!", -1000000.5),
        ("70000.00", 70000),
        ("I do not know.", None),
        ("", None),
        ("3 and 4 are\n#### none", 4),
        ("\\boxed{7}\n\n#### Step 2: check", 7),
        ("in all \\boxed{1{,}234} or \\boxed{70,\\!000}", 70000),
        ("\\boxed{1{,}234}", 1234),
        ("between 10-15", 15),
        ("#### \\$18 in 2 days", 18),
        ("It fell to \u22125", -5),
        ("\nQuestion: what is left?\nAnswer: 3", 3),
        (" 3 + 4 = 7\n#### 7\n\nQuestion: Tom has 2 cats.\nAnswer: #### 2", 7),
        # TeX's spaces and narrow ones; MATH's rules drop \! and spaces
        ("in all \\boxed{2\\,400}", 2400),
        ("\\boxed{1\\;000\\:000\\ 000~000}", 10**12),
        ("#### 3\\,600 of them", 3600),
        ("12\u202f500 in all", 12500),
        ("in 5~6 days", 6),
        ("\\boxed{36 000}", 36000),
        ("\\boxed{- 7}", -7),
        ("\\boxed{4\\ \\text{h}~30}", 4),
        # a leading point: MATH's rules put a 0 before it
        ("#### .75", 0.75),
        ("it costs -$.25", -0.25),
        ("\\boxed{.4}", 0.4),
        ("it makes...8", 8),
        # an equation in a box
        ("\\boxed{9 \\times 7 = 63}", 63),
        ("\\boxed{x = 5}", 5),
        ("\\boxed{48 = 6 \\times 8}", 48),
        ("\\boxed{100 / 3 \\approx 33.3}", 33.3),
        ("\\boxed{3 \\text{ boxes} = 36 \\text{ pens in 2 days}}", 36),
        ("\\boxed{60 \\text{ km in 2 h}}", 60),  # MATH's remove_right_units
        # MATH's last_boxed_only_string: the last \boxed or \fbox, whose braces nest
        ("\\boxed{\\text{a \\textbf{b} and } 21} of 50", 21),
        ("\\fbox{3} or \\boxed {\\frac{}{} 4}", 4),
        ("\\boxed{6 \\boxed{}} and 9", 6),
        ("\\boxed{13}. So the answer is \\boxed{}.", 13),
        ("\\boxed{} in 8 days", 8),
        ("\\boxed{15 and no more", 15),  # cut off
        ("\\boxed{\\text{ 16}}\nIt took 3 days", 16),
        # lm-evaluation-harness' strict-match: the first "#### number" counts
        ("6 + 6 = 12\n#### 12\n\nProblem: 3 pens.\n#### 3", 12),
        ("#### 1,050.\nAnd:\n#### 4\n#### 5", 1050),
        ("#### Sum\n#### 20 dollars\n\nA new one:\n#### 30", 20),
    ],
)
def test_final_numbers_by_hand(text, number):
    assert final_number(text) == (None if number is None else Decimal(str(number)))
    expected = 0 if number is None else 1
    assert score_number(text, [f"because\n#### {number or 0}"]) == expected
    assert score_number(text, ["because\n#### 99"]) == 0


@pytest.mark.skipif(not GSM8K.exists(), reason="GSM8K is not here")
def test_gsm8k_reference_answers_are_right_and_altered_ones_wrong():
    examples = read_examples(GSM8K, "gsm8k", PLAIN)
    for change, accuracy in (("", 1.0), ("1", 0.0)):  # 18 becomes 118
        answered = [
            e | {"raw_prediction": e["raw_answers"][0].replace("#### ", f"#### {change}")}
            for e in examples
        ]
        result = score("gsm8k", answered)
        assert (result.mean, result.count) == (accuracy, 1319)


MBPP_ASKED = (
    "You are an expert Python programmer, and here is your task: Write a function to add up a "
    "tree. Your code should pass these tests:\n\nassert total(root) == 3\nassert total(Node(4)) "
    "== 4"
)


@pytest.mark.parametrize(
    "task, row, plain, chat",
    [
        (
            "gsm8k",
            {"question": "Two and two?", "answer": "2+2=4\n#### 4"},
            "Question: Two and two?\nAnswer:",
            "Two and two?\nPlease reason step by step, and put your final answer within \\boxed{}.",
        ),
        *(
            (
                "triviaqa",
                row,
                "Question: Who wrote Macbeth?\nAnswer:",
                "Who wrote Macbeth?\nAnswer with a name or a few words, without a sentence.",
            )
            for row in (TRIVIA, TRIVIA_HUB)
        ),
        (
            "humaneval",
            CIRCLE,
            FUNCTION,
            "Complete this Python function. Answer with the whole function, in one block of code."
            '\n\n```python\nimport math\n\n\ndef area(r):\n    """Of a circle."""\n```',
        ),
        ("mbpp", MBPP, f"{MBPP_ASKED}\n[BEGIN]\n", MBPP_ASKED),
    ],
)
def test_prompts_by_hand(task, row, plain, chat, tmp_path):
    assert read_row(tmp_path, task, row)["prompt"] == plain
    assert read_row(tmp_path, task, row, CHAT)["prompt"] == f"User: {chat}\n\nAssistant:"


def test_trivia_answers_of_both_spellings(tmp_path):
    for row in (TRIVIA, TRIVIA_HUB):
        answers = read_row(tmp_path, "triviaqa", row)["raw_answers"]
        assert answers == ["Shakespeare", "The Bard"]


@pytest.mark.parametrize(
    "prediction, right",
    [
        ("Shakespeare", True),
        (" shakespeare.\n", True),
        ("the BARD", True),
        ("A bard!", True),  # articles do not count
        ("An bard", True),
        ("“Shakespeare”", False),  # of quotation marks, those of the published script
        ("‘Shakespeare’", True),
        ("Shakespeare\nQuestion: Who else?", True),
        ("I think:\nShakespeare", False),
        ("William Shakespeare", False),
        ("Shakes peare", False),
        ("Another", False),
        ("", False),
        ("\n", False),
    ],
)
def test_trivia_by_hand(prediction, right):
    assert score_trivia(prediction, ["Shakespeare", "The Bard"]) == right


# ------------------------------------------------------------------------------------------
# The judge


@pytest.mark.parametrize(
    "reply, points",
    [
        ("Total score: 7", 0.7),
        ("Score: 7.", 0.7),
        ("8/10", 0.8),
        ("Accuracy score: 7, brevity score: 8", None),
        ("Total score: -3", None),
        ("Total score (out of 10): 7", 0.7),
        ("总分（满分10分）：7", 0.7),
        ("Total score [0-10]: 6", 0.6),
        ("The total score is 6.", 0.6),
        ("Total score out of 10: 7", None),
        ("Total score from 0 to 10: 6", None),
        ("Good.\ntotal score: 7.5 points", 0.75),
        ("**Total score**: **7**", 0.7),
        ("总分是：8分", 0.8),
        ("Accuracy: 3\nTotal score: 0/10", 0.0),
        ("Total score: 10", 1.0),
        ("Total score: 11", None),
        ("Accuracy: 7", None),
        ("no idea", None),
        ("", None),
        (None, None),
    ],
)
def test_points_by_hand(reply, points):
    assert read_points(reply) == points


@pytest.mark.parametrize(
    "task, candidate", [("translation", "One.\nTwo."), ("summary", "One.\nTwo.\n\nTalk {x}.")]
)
def test_judge_reads_the_first_paragraph_of_a_translation_alone(task, candidate):
    example = {"prompt": "p", "raw_answers": ["The {right} one", "no"]}
    prompt = TASKS[task].judge_prompt(example | {"raw_prediction": " One.\nTwo.\n\nTalk {x}.\n"})
    _, between, end = re.split("Reference:|Candidate:", re.sub("\n=====.*", "", prompt))
    assert between.strip() == "The {right} one"
    assert end.strip().startswith(f"{candidate}\n\nReply with one line")
    assert TASKS[task].grades in prompt and all(c in prompt for c in TASKS[task].criteria)
    assert "\n(nothing)\n" in TASKS[task].judge_prompt(example | {"raw_prediction": " "})


# ------------------------------------------------------------------------------------------
# Saved completions


class StubJudge:
    """Gives 0.7 where the candidate is "good", else no points."""

    def points(self, texts: list[str]) -> list[float | None]:
        return [0.7 if "\ngood\n" in text else None for text in texts]


INTENT = '{"intent": "A", "slots": {}}'
ANSWERED = {  # task -> a right and a wrong example, as the evaluator saves them
    "exact": [{"prompt": "p", "raw_answers": ["good"], "raw_prediction": p} for p in ("good", "x")],
    "intent": [{"prompt": "p", "raw_answers": [INTENT], "raw_prediction": p} for p in (INTENT, "")],
    "gsm8k": [{"prompt": "p", "raw_answers": ["#### 5"], "raw_prediction": p} for p in ("5.0", "")],
    "triviaqa": [{"prompt": "p", "raw_answers": ["A b"], "raw_prediction": p} for p in ("B", "c")],
    "choice": [
        {
            "prompt": "p",
            "raw_answers": ["yes"],
            "choices": ["yes", "no"],
            "loglikelihoods": logs,
            "raw_prediction": p,
        }
        for p, logs in (("yes", [-1.5, -2.0]), ("no", [-2.0, -1.5]))
    ],
    "humaneval": [
        {
            "prompt": FUNCTION,
            "raw_answers": ["    return math.pi * r * r\n"],
            "code": FUNCTION,
            "entry_point": "area",
            "test": f"{CIRCLE['test']}\n\ncheck(area)\n",
            "raw_prediction": p,
        }
        for p in ("    return math.pi * r * r\n", "    return r\n")
    ],
    "summary": [{"prompt": "p", "raw_answers": ["r"], "raw_prediction": p} for p in ("good", "x")],
    "loss": [
        {"prompt": "p", "raw_answers": ["r"], "loss": 0.5, "accuracy": 1.0, "tokens": 2},
        {"prompt": "p", "raw_answers": ["r"], "loss": 2.0, "accuracy": 0.5, "tokens": 6},
    ],
}
SCORES = {"summary": [0.7, None], "loss": [0.5, 2.0]}  # others: 1 and 0
REFERENCE = {"reference_loss": 1.0, "reference_accuracy": 0.5, "reference_tokens": 2}


@pytest.mark.parametrize("task", ANSWERED)
def test_saved_completions_score_the_same_again(task, tmp_path):
    judge = StubJudge()
    first = score(task, ANSWERED[task], judge)
    assert [record["score"] for record in first.records] == SCORES.get(task, [1, 0])
    path = tmp_path / "completions.jsonl"
    write_lines(path, first.records)
    again, equal = rescore(path, task, judge)
    assert (equal, again) == (2, first)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    write_rows(path, [rows[0], rows[1] | {"score": 0.123}])
    assert rescore(path, task, judge)[1] == 1


def test_the_token_of_number_0_is_scored_too(monkeypatch):
    monkeypatch.setattr(tasks.loss, "encode_file", lambda *_: [([5, 0, 7, 0], [-100, 0, 7, -100])])
    (example,) = tasks.loss.read_chat("file", Ask(SimpleNamespace(decode=str)))
    assert example["learned"] == [1, 2] and example["raw_answers"] == ["[0, 7]"]


def test_losses_are_means_over_all_tokens():
    """2 tokens of 0.5 and 6 of 2.0: 13 / 8; of the 8 tokens 2 + 3 are right."""
    result = score("loss", ANSWERED["loss"])
    assert (result.metrics, result.count) == ({"loss": 1.625, "token accuracy": 0.625}, 8)


@pytest.mark.parametrize(
    "task, name",
    [
        *((task, name) for task in ANSWERED for name in ("prompt", "raw_answers")),
        *((task, "raw_prediction") for task in ANSWERED if task != "loss"),
        *(("loss", name) for name in ("loss", "accuracy", "tokens")),
        *(("summary", name) for name in ("reference_loss", "reference_accuracy")),
        *(("choice", name) for name in ("choices", "loglikelihoods")),
        *(("humaneval", name) for name in ("code", "entry_point", "test")),
    ],
)
def test_a_saved_row_without_a_field_is_named(task, name, tmp_path):
    good = ANSWERED[task][0] | (REFERENCE if task == "summary" else {})
    path = write_rows(tmp_path / "c.jsonl", [{"example": good}, {"example": without(good, name)}])
    with pytest.raises(ValueError, match=rf"c\.jsonl: line 2: field {name} is None"):
        rescore(path, task, StubJudge())


@pytest.mark.parametrize(
    "task, row, message",
    [
        ("exact", {"score": 1}, "field example is None; an object is required"),
        ("gsm8k", {"raw_answers": ["none"]}, r"field raw_answers\[0\] has no number"),
        ("intent", {"raw_answers": ["none"]}, r"field raw_answers\[0\] is 'none'; JSON"),
        ("choice", {"loglikelihoods": [-1.0]}, r"field loglikelihoods is \[-1.0\]; 2 numbers"),
        ("choice", {"loglikelihoods": [-1.0, "x"]}, "field loglikelihoods is .*; 2 numbers"),
        ("choice", {"raw_answers": ["maybe"]}, r"field raw_answers\[0\] is none of the choices"),
    ],
)
def test_a_saved_row_with_a_wrong_field_is_named(task, row, message, tmp_path):
    row = row if "score" in row else {"example": ANSWERED[task][0] | row}
    path = write_rows(tmp_path / "c.jsonl", [row])
    with pytest.raises(ValueError, match=rf"c\.jsonl: line 1: {message}"):
        rescore(path, task)


# ------------------------------------------------------------------------------------------
# Whatever a model says


@pytest.mark.parametrize(
    "text, answer",
    [
        ("<think>\nIs it 3?\n</think>\n\n4", "\n\n4"),
        ("It may be 3.</think>4", "4"),  # the prompt ended with <think>
        ("<think>3</think>5</think> 4", " 4"),
        ("<think>\nIs it 3? Or 4", ""),  # cut off
        ("The mark <think> opens it: 4", "The mark <think> opens it: 4"),
        ("4", "4"),
        ("", ""),
    ],
)
def test_reasoning_is_no_answer(text, answer):
    assert without_reasoning(text) == answer


@pytest.mark.parametrize("task", ["exact", "intent", "gsm8k", "triviaqa", "humaneval"])
def test_in_every_task_the_answer_follows_the_reasoning(task):
    right, wrong = ANSWERED[task]
    said = [
        right | {"raw_prediction": f"<think>{wrong['raw_prediction']}</think>\n\n{r}"}
        for r in (right["raw_prediction"], wrong["raw_prediction"])
    ]
    said.append(right | {"raw_prediction": f"{right['raw_prediction']}</think>"})
    cut_off = {"prompt": "Q<think>\n", "raw_prediction": f"{right['raw_prediction']}\nWait,"}
    said.append(right | cut_off)  # R1's prompts open the reasoning
    result = score(task, said)
    assert [record["score"] for record in result.records] == [1, 0, 0, 0]
    assert [record["example"] for record in result.records] == said  # the reasoning is kept


@pytest.mark.parametrize("task", ["gsm8k", "humaneval"])
@pytest.mark.skipif(not CASES.exists(), reason="the cases are not here")
def test_saved_scores_of_the_cases(task):
    result, equal = rescore(CASES / task / "completions.jsonl", task)
    assert equal == result.count > 0


SPLICES = [
    *("```", "```python\n", "\n```\n", "~~~", '"""', "'''", "<think>", "</think>", "[DONE]"),
    *("\\boxed{", "\\fbox {", "{", "}", "\\,", "~", "{,}", "\\text{ ", "=", "####", "$", ".", "-"),
    *("def f(x):\n", "from __future__ import (", "@", "import a\n", "x = ", "\n    ", "\\", "{{["),
    *(
        "\0",
        "\x0c",
        "\x1b",
        "\r",
        "\t",
        "\u2028",
        "\u00a0",
        "\ufeff",
        "é",
        "中",
        "😀",
        "٣",
        "²",
        "−",
    ),
    *("null", "NaN", "1e999", "9" * 5000, "(" * 300, '{"slots": [', "\ndef area(r):\n    return 1"),
]


def mutant(text: str, draw: random.Random) -> str:
    """The text after one to six cuts, repetitions and insertions."""
    for _ in range(draw.randint(1, 6)):
        a, b = sorted(draw.randint(0, len(text)) for _ in range(2))
        change = ("", text[a:b] * 2, text[a:b] + draw.choice(SPLICES), draw.choice(SPLICES) * 9)
        text = text[:a] + draw.choice(change) + text[b:]
    return text


MUTATED = {
    "gsm8k": "<think>9?</think>\nIt is $9 - .5 = 1\\,250$.\n#### 5\n\\boxed{\\text{a } 2 = 5}",
    "intent": f"Sure:\n```json\n{INTENT}\n```\n{INTENT}。",
    "humaneval": 'So:\n```python\ndef area(r):\n    """\n    ```\n    """\n    return r\n```\n',
}


@pytest.mark.parametrize("seed", range(500))
def test_a_mutated_completion_has_a_score_or_a_named_error(seed, monkeypatch):
    draw = random.Random(seed)
    task = draw.choice([*MUTATED])
    text = draw.choice([MUTATED[task], *(e["raw_prediction"] for e in ANSWERED[task])])
    example = ANSWERED[task][0] | {"raw_prediction": mutant(text, draw)}
    # Programs are put together, but not run.
    monkeypatch.setattr(tasks.code, "missing_guards", list)
    monkeypatch.setattr(tasks.code, "run_programs", lambda pairs: [type(p[0]) for p in pairs])
    (record,) = score(task, [example]).records
    assert record["score"] in (0, 1)
    assert record.get("result") == (str if task == "humaneval" else None)


@pytest.mark.parametrize(
    "text",
    [
        *("9" * 100_000, "1," * 50_000, "1\\," * 33_000, "." * 100_000, "-$" * 50_000),
        *("####" + " " * 100_000, "#" * 100_000, "\\boxed{" * 14_000, "{" * 100_000),
        *("\\boxed{" + "1=2 3=" * 16_000, "\\boxed" + " " * 100_000, "\n" * 100_000),
        *("<think>" * 14_000, "[" * 100_000, '{"a":' * 20_000, "```json" * 14_000),
    ],
    ids=lambda text: repr(text[:12]),
)
def test_a_long_answer_is_scored_soon(text):
    began = time.monotonic()
    for task in ("gsm8k", "intent", "triviaqa", "exact"):
        assert score(task, [ANSWERED[task][0] | {"raw_prediction": text}]).mean == 0
    assert time.monotonic() - began < 20  # it takes some hundredths of a second
