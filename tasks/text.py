"""Tasks whose answer is a short text that a rule can check: exact, intent, gsm8k, triviaqa."""

import json
import re
import string
from decimal import Decimal

from chat import text_field
from tasks.common import ANSWERS, Ask, Task, by_row, read_answers, text_list


def score_exact(prediction: str, answers: list[str]) -> int:
    """Returns 1 if the prediction is one of the answers, white space at the ends apart."""
    return int(prediction.strip() in [answer.strip() for answer in answers])


def read_intent(row: dict, where: str, ask: Ask | None = None) -> dict | None:
    example = read_answers(row, where, ask)
    if example is None:
        return None
    answer = example["raw_answers"][0]
    try:
        json.loads(answer)["slots"].items()
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        needed = 'JSON with an object "slots" is required'
        raise ValueError(f"{where}: field raw_answers[0] is {answer!r:.60}; {needed}") from None
    return example


def score_intent(prediction: str, answers: list[str]) -> int:
    """Returns 1 if intent and slots agree with the first answer. The first non-empty line of the
    prediction, or of its ```json fence, is read as JSON. Lists compare as sorted, and spaces inside
    predicted values are dropped, as in the original's benchmarks.py, which gives the published
    scores."""
    text = prediction.strip().strip(".。")
    if "```json" in text:
        fenced = text.split("```json", 1)[1].split("```")
        text = fenced[0] if len(fenced) > 1 else "{}"
    lines = [line for line in text.split("\n") if line]
    answer = json.loads(answers[0])
    try:
        predicted = json.loads(lines[0].strip(".。")) if lines else None
        slots = {
            key: sorted(str(v).replace(" ", "") for v in value)
            if isinstance(value, list)
            else value.replace(" ", "")
            for key, value in predicted.get("slots", {}).items()
        }
        intent = predicted.get("intent", "")
    except (ValueError, AttributeError, RecursionError):  # not JSON, or JSON of another shape
        return 0
    expected = {
        key: sorted(map(str, value)) if isinstance(value, list) else value
        for key, value in answer["slots"].items()
    }
    return int(intent == answer.get("intent", "") and slots == expected)


STEP_BY_STEP = "Please reason step by step, and put your final answer within \\boxed{}."


def read_gsm8k(row: dict, where: str, ask: Ask) -> dict:
    """Reads {"question", "answer"}, the answer's number behind ####, as published."""
    question, answer = text_field(row, "question", where), text_field(row, "answer", where)
    if "####" not in answer or final_number(answer) is None:
        raise ValueError(f"{where}: field answer is {answer!r:.60}; it must end with #### NUMBER")
    solution, _, number = answer.partition("####")
    boxed = f"{solution.rstrip()}\n\\boxed{{{number.strip()}}}"  # as the chat question asks
    plain = f"Question: {question}\nAnswer:"
    prompt = ask(f"{question}\n{STEP_BY_STEP}", plain, where, boxed, answer)
    return {"prompt": prompt, "raw_answers": [answer]}


def check_gsm8k(example: dict, where: str) -> None:
    if final_number(read_answers(example, where)["raw_answers"][0]) is None:
        raise ValueError(f"{where}: field raw_answers[0] has no number")


NUMBER = r"(?:(?<!\d)-)?\$?(?:\d[\d,]*(?:\.\d+)?|(?<![\w.])\.\d+)"
BOX = r"\\(?:boxed|fbox)\s*\{"
# What TeX, or a narrow space, sets before the last three digits of 1\,250.
GROUPING = r"(?<=\d)(?:\\[,;:! ]|\{,\}|~|[\u00a0\u2009\u202f])(?=\d{3}(?!\d))"


def closing_brace(text: str) -> int:
    """Returns where the brace closes that was opened before the text: at its end, if it does not
    close."""
    depth = 1
    for i, letter in enumerate(text):  # braces nest
        depth += (letter == "{") - (letter == "}")
        if depth == 0:
            return i
    return len(text)


def boxed_number(text: str) -> str | None:
    """Returns the number in a box. `text` is what follows its opening brace. Of an equation the
    result counts, the side with the fewest numbers: 72 in 12 \\times 6 = 72."""
    sides = []
    for side in re.split(r"=|\\approx|≈", text[: closing_brace(text)]):
        # MATH's rules drop a unit on the right, then spaces.
        value = side.split("\\text{ ")[0] or side
        if numbers := re.findall(NUMBER, "".join(value.split())):
            sides.append(numbers)
    return min(reversed(sides), key=len)[0] if sides else None


def final_number(text: str) -> Decimal | None:
    """Returns the number in the last box that has one, else behind the first ####, else the last
    one. A box is \\boxed{} or \\fbox{}, as in MATH's rules. The first #### is the answer, as in
    lm-evaluation-harness: a base model goes on with other problems."""
    text = text.lstrip().split("\nQuestion:")[0]
    for tex, plain in (("\\!", ""), ("\\$", "$"), ("\u2212", "-")):
        text = text.replace(tex, plain)
    text = re.sub(GROUPING, "", text)
    found = [number for box in re.split(BOX, text)[1:] if (number := boxed_number(box))][-1:]
    found = found or re.findall(rf"####\s*({NUMBER})", text)[:1]  # a heading has ####, too
    found = found or re.findall(NUMBER, text)[-1:]
    return Decimal(found[0].replace(",", "").replace("$", "")) if found else None


def score_number(prediction: str, answers: list[str]) -> int:
    """Returns 1 if the final number is that of the answer; 1,000 is 1000.0."""
    return int(final_number(prediction) == final_number(answers[0]))


def read_trivia(row: dict, where: str, ask: Ask) -> dict:
    """Reads {"question", "answers": [...]}, or the hub's "answer": {"value", "aliases": [...]}, of
    which an example shows the first alias, as in lm-evaluation-harness."""
    question, answer = text_field(row, "question", where), row.get("answer")
    if isinstance(answer, dict):
        value = text_field(answer, "value", f"{where}: field answer")
        aliases = text_list(answer, "aliases", f"{where}: field answer", least=0)
        answers, shown = [value, *aliases], [*aliases, value][0]
    else:
        answers = text_list(row, "answers", where)
        shown = answers[0]
    asked = f"{question}\nAnswer with a name or a few words, without a sentence."
    prompt = ask(asked, f"Question: {question}\nAnswer:", where, shown)
    return {"prompt": prompt, "raw_answers": list(dict.fromkeys(answers))}


def score_trivia(prediction: str, answers: list[str]) -> int:
    """Returns 1 if the first line is one of the answers; articles, punctuation and case do not
    count, as in TriviaQA's script."""

    def bare(text: str) -> str:
        letters = "".join(" " if c in string.punctuation + "‘’´`_" else c for c in text.lower())
        return " ".join(word for word in letters.split() if word not in ("a", "an", "the"))

    lines = prediction.strip().splitlines()
    return int(bool(lines) and bare(lines[0]) in [bare(answer) for answer in answers])


TASKS = {
    "exact": Task(ANSWERS, by_row(read_answers), score_exact),
    "intent": Task(f"ESFT's: {ANSWERS}", by_row(read_intent), score_intent, check=read_intent),
    "gsm8k": Task(
        "rows of question, answer",
        by_row(read_gsm8k),
        score_number,
        512,
        check_gsm8k,
        takes_shots=True,
    ),
    "triviaqa": Task(
        "rows of question and answers", by_row(read_trivia), score_trivia, 32, takes_shots=True
    ),
}
