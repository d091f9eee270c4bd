"""Multiple choice: the model takes the likeliest continuation of the prompt. Readers of the
published files of MMLU, C-Eval, HellaSwag, ARC and CLUEWSC, and of rows of your own (choice)."""

import csv
import re
import sys
from collections import Counter
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from statistics import fmean

from tqdm import tqdm

from chat import Tokenizer, text_field
from files import read_json
from generate import likelihoods
from model import Transformer
from tasks.common import (
    Ask,
    Predictions,
    Result,
    Task,
    by_row,
    by_subject,
    stated,
    text_list,
    typed_field,
)
from tasks.spacing import join_choice

BLOCK = 64  # questions that are answered, and written, together


@dataclass(frozen=True)
class Choice(Task):
    by_letter: bool = False  # the main metric, as in these tasks' published scores
    by_subject: bool = False  # whether each subject weighs the same, as in C-Eval's scores
    decodes = False

    def rows(self, ask, examples) -> list[list[int]]:
        """Returns each prompt with its longest choice."""
        longest = [join_choice(e["prompt"], max(e["choices"], key=len)) for e in examples]
        return [ids[:-1] for ids in ask.tokenizer.encode_prompts(longest)]

    def predict(self, model, ask, examples, max_new_tokens, batch_size=0) -> Predictions:
        """Adds loglikelihoods, one a choice, and raw_prediction, the likeliest choice."""
        size = batch_size or BLOCK
        starts = range(0, len(examples), size)
        for start in tqdm(starts, "score", unit="batch", leave=False, disable=None):
            block = examples[start : start + size]
            for i, sums in enumerate(choice_likelihoods(model, ask.tokenizer, block)):
                best = block[i]["choices"][sums.index(max(sums))]
                yield start + i, block[i] | {"loglikelihoods": sums, "raw_prediction": best}

    def result_of(self, examples: list[dict], judge=None) -> Result:
        """Scores the likeliest choice, and the likeliest by letter: log-likelihoods divided by the
        length of the choice's text, as lm-evaluation-harness' acc_norm."""
        records = []
        for e in examples:
            right = e["place"] if "place" in e else e["choices"].index(e["raw_answers"][0])
            by_letter = [log / len(c) for log, c in zip(e["loglikelihoods"], e["choices"])]
            best, normalised = (v.index(max(v)) == right for v in (e["loglikelihoods"], by_letter))
            records.append({"example": e, "score": int(best), "score_normalised": int(normalised)})
        sizes = Counter(e.get("subject") for e in examples)
        weights = [1 / sizes[e.get("subject")] if self.by_subject else 1 for e in examples]
        scores = [r["score"] for r in records]
        accuracy = {"accuracy": fmean(scores, weights)}
        normalised = {"normalised": fmean([r["score_normalised"] for r in records], weights)}
        metrics = normalised | accuracy if self.by_letter else accuracy | normalised
        unit = "questions, each subject weighing the same" if self.by_subject else "questions"
        return Result(metrics, len(records), unit, records, groups=by_subject(examples, scores))

    def check_answer(self, example: dict, where: str) -> None:
        choices, logs = text_list(example, "choices", where, 2), example.get("loglikelihoods")
        numbers = [n for n in logs if is_finite(n)] if isinstance(logs, list) else []
        if logs != numbers or len(numbers) != len(choices):
            said = stated(example, "loglikelihoods")
            raise ValueError(f"{where}: {said}; {len(choices)} numbers are required, all finite")
        if not all(map(str.strip, choices)):
            raise ValueError(f"{where}: field choices holds an empty one")
        if example["raw_answers"][0] not in choices:
            raise ValueError(f"{where}: field raw_answers[0] is none of the choices")
        if "place" in example:  # not in older files
            right = [i for i, c in enumerate(choices) if c == example["raw_answers"][0]]
            if type(example["place"]) is not int or example["place"] not in right:
                needed = f"one of {right} is required, where raw_answers[0] is"
                raise ValueError(f"{where}: {stated(example, 'place')}; {needed}")


def is_finite(value) -> bool:
    """Returns whether a value of a JSON file is a number that a float can hold."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def choice_likelihoods(
    model: Transformer, tokenizer: Tokenizer, examples: list[dict]
) -> list[list[float]]:
    """Returns the log-likelihood of each example's choices, given its prompt. Choices that differ
    in their last token alone, as letters do, share a row."""
    rows: dict[tuple[int, ...], list[tuple[int, int]]] = {}  # a row, and what is wanted of it
    places = []  # for each choice: its row, and where its tokens are in what is wanted
    for example in examples:
        texts = [join_choice(example["prompt"], choice) for choice in example["choices"]]
        prompt, *choices = tokenizer.encode_prompts([example["prompt"], *texts])
        if not prompt:
            raise ValueError("a prompt is empty, and nothing begins a sequence in this chat format")
        # The first letters of a choice may merge with the last of the prompt: that token counts.
        columns = enumerate(zip_longest(prompt, *choices))
        known = next((n for n, tokens in columns if len(set(tokens)) > 1), len(prompt))
        known = max(known, 1)  # nothing stands before the first token
        for ids in choices:
            row = tuple(ids[:-1])
            wanted = rows.setdefault(row, [])
            places.append((row, slice(len(wanted), len(wanted) + len(ids) - known)))
            wanted += [(n, ids[n]) for n in range(known, len(ids))]
    found, keys = {}, list(rows)
    for i, logs, _ in likelihoods(model, [list(row) for row in keys], list(rows.values())):
        found[keys[i]] = logs.double()
    sums = iter([found[row][part].sum().item() for row, part in places])
    return [[next(sums) for _ in example["choices"]] for example in examples]


def choice_example(prompt: str, choices: list[str], place, where: str, answer: str) -> dict:
    """Returns an example. `place` is the right choice's number; errors say `answer`, the row's."""
    if isinstance(place, bool) or not isinstance(place, int) or not 0 <= place < len(choices):
        raise ValueError(f"{where}: {answer}; it must be one of the {len(choices)} choices")
    if empty := [c for c in choices if not c.strip()]:
        raise ValueError(f"{where}: a choice is {empty[0]!r}; it must not be empty")
    return {
        "prompt": prompt,
        "raw_answers": [choices[place]],
        "choices": choices,
        "place": place,  # two choices may have the same text
    }


def behind_shots(example: dict, where: str, ask: Ask) -> dict:
    """Returns an example with the shots before its prompt."""
    return example | {"prompt": ask.text(example["prompt"], where, example["raw_answers"][0])}


def place_in(labels: list[str], label) -> int | None:
    return labels.index(label) if label in labels else None


def read_choice(row: dict, where: str, ask: Ask) -> dict:
    """Reads {"prompt", "choices", "answer"}; the answer is a number from 0 or a choice's text."""
    choices, answer = text_list(row, "choices", where, least=2), row.get("answer")
    place = place_in(choices, answer) if isinstance(answer, str) else answer
    prompt = text_field(row, "prompt", where)
    return choice_example(prompt, choices, place, where, stated(row, "answer"))


def read_hellaswag(row: dict, where: str, ask: Ask) -> dict:
    """Reads {"activity_label", "ctx_a", "ctx_b", "endings", "label"} without marks like [step]."""

    def clean(text: str) -> str:
        return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")

    label = row.get("label")
    label = int(label) if isinstance(label, str) and label.isdecimal() else label
    activity, a, b = (text_field(row, name, where) for name in ("activity_label", "ctx_a", "ctx_b"))
    endings = text_list(row, "endings", where, least=2)
    endings = [clean(ending) if clean(ending).strip() else ending for ending in endings]
    prompt = clean(f"{activity}: {a} {b.capitalize()}")
    example = choice_example(prompt, endings, label, where, stated(row, "label"))
    return behind_shots(example, where, ask)


def read_arc(row: dict, where: str, ask: Ask) -> dict:
    """Reads {"question": {"stem", "choices": [{"text", "label"}]}, "answerKey"}, or {"question",
    "choices": {"text": [...], "label": [...]}, "answerKey"}."""
    question, choices, names = row.get("question"), row.get("choices"), ("text", "label")
    if isinstance(question, dict):
        question, choices = question.get("stem"), question.get("choices")
    if isinstance(choices, list) and all(isinstance(choice, dict) for choice in choices):
        choices = {name: [choice.get(name) for choice in choices] for name in names}
    row = row | {"question": question, "choices": choices}
    question, choices = text_field(row, "question", where), typed_field(row, "choices", dict, where)
    texts, labels = (text_list(choices, name, f"{where}: choices", least=2) for name in names)
    if len(labels) != len(texts):
        raise ValueError(f"{where}: choices: {len(texts)} of text, {len(labels)} of label")
    place, prompt = place_in(labels, row.get("answerKey")), f"Question: {question}\nAnswer:"
    example = choice_example(prompt, texts, place, where, stated(row, "answerKey"))
    return behind_shots(example, where, ask)


def read_cluewsc(row: dict, where: str, ask: Ask) -> dict:
    """Reads {"text", "target": {"span1_text", "span2_text"}, "label"}: does span 2 mean span 1?"""
    text, target = text_field(row, "text", where), typed_field(row, "target", dict, where)
    name, pronoun = (text_field(target, f"span{i}_text", where) for i in (1, 2))
    prompt = f"{text}\n问题：上文中的“{pronoun}”指的是“{name}”吗？\n答案："
    place = place_in(["true", "false"], str(row.get("label")).lower())
    example = choice_example(prompt, ["是", "不是"], place, where, stated(row, "label"))
    return behind_shots(example, where, ask)


LETTERS = ["A", "B", "C", "D"]
CEVAL_COLUMNS = ["id", "question", *LETTERS, "answer"]


def read_csv(path: Path, columns: int, header: list[str]) -> list[tuple[str, list[str]]]:
    """Returns (where, cells) of each row but the header; `where` names the line that the row begins
    in. `header` has the names of the first columns, or is empty where the file has none. Raises
    ValueError for other names, a row of fewer cells than `columns`, and a file without rows."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    rows = []
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader, end = csv.reader(file), 0
        try:
            for cells in reader:
                where, end = f"{path}: line {end + 1}", reader.line_num
                if cells:  # an empty line has none
                    rows.append((where, cells))
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: not a CSV file: {error}") from None
    if len(rows) <= bool(header):
        raise ValueError(f"{path}: the file has no rows; at least one is required")
    if header and rows[0][1][: len(header)] != header:
        named = f"the columns are {','.join(rows[0][1]):.60}"
        raise ValueError(f"{rows[0][0]}: {named}; {','.join(header)} are required")
    for where, cells in rows:
        if len(cells) < columns:
            raise ValueError(f"{where}: {len(cells)} cells; {columns} are required")
    return rows[bool(header) :]


def read_subjects(
    folder: str | Path,
    split: str,
    intro: str,
    names: dict,
    asked: str,
    first: int,
    header: list[str],
) -> list[dict]:
    """Reads a folder of CSV files, SPLIT/SUBJECT_SPLIT.csv. Before each question stand `intro` with
    the subject's name and five examples of dev/. A row's question, four choices and letter begin in
    column `first`; `asked` stands behind the choices."""
    paths = sorted((Path(folder) / split).glob(f"*_{split}.csv"))
    if not paths:
        files = f"{split}/SUBJECT_{split}.csv"
        raise FileNotFoundError(f"{folder}: holds no {files}; the published folder is required")

    def question(cells: list[str]) -> str:
        choices = (f"{a}. {b}" for a, b in zip(LETTERS, cells[first + 1 :]))
        return "\n".join([cells[first], *choices, asked])

    examples = []
    for path in paths:
        subject = path.name.removesuffix(f"_{split}.csv")
        prompt, last = intro.format(names.get(subject, subject.replace("_", " "))), first + 5
        dev = Path(folder) / "dev" / f"{subject}_dev.csv"
        for _, cells in read_csv(dev, last + 1, header)[:5]:
            prompt += f"{join_choice(question(cells), cells[last])}\n\n"
        for where, cells in read_csv(path, last + 1, header):
            place, answer = place_in(LETTERS, cells[last]), f"the answer is {cells[last]!r:.60}"
            example = choice_example(prompt + question(cells), LETTERS, place, where, answer)
            examples.append(example | {"subject": subject})
    return examples


def read_mmlu(folder: str | Path, ask: Ask) -> list[dict]:
    """Reads test/ of MMLU's published folder. The layout is that of the published evaluation, the
    second space before the subject included."""
    intro = "The following are multiple choice questions (with answers) about  {}.\n\n"
    return read_subjects(folder, "test", intro, {}, "Answer:", first=0, header=[])


def read_ceval(folder: str | Path, ask: Ask, split: str = "val") -> list[dict]:
    """Reads val/ or test/ of C-Eval's published folder. Chinese names of the subjects come from
    subject_mapping.json, if it is there."""
    mapping = Path(folder) / "subject_mapping.json"
    names = read_json(mapping) if mapping.exists() else {}
    try:
        names = {subject: text_list(names, subject, "", 2)[1] for subject in names}
    except (ValueError, AttributeError):
        raise ValueError(f'{mapping}: must be an object like {{"law": ["Law", "法学"]}}') from None
    intro = "以下是中国关于{}考试的单项选择题，请选出其中的正确答案。\n\n"
    return read_subjects(folder, split, intro, names, "答案：", first=1, header=CEVAL_COLUMNS)


def read_ceval_test(folder: str | Path, ask: Ask) -> list[dict]:
    """Reads test/. Its answers were published in 2025; older downloads have none."""
    return read_ceval(folder, ask, "test")


PUBLISHED = "the published rows"
TASKS = {
    "choice": Choice("rows of prompt, choices, answer (place from 0 or text)", by_row(read_choice)),
    "mmlu": Choice("the folder of the published CSV files: dev/, test/", read_mmlu),
    "ceval": Choice(
        "the folder of the published CSV files: dev/, val/", read_ceval, by_subject=True
    ),
    "ceval_test": Choice(
        "the same, and test/ with answers, as of 2025", read_ceval_test, by_subject=True
    ),
    "hellaswag": Choice(PUBLISHED, by_row(read_hellaswag), by_letter=True, takes_shots=True),
    "arc": Choice(PUBLISHED, by_row(read_arc), by_letter=True, takes_shots=True),
    "cluewsc": Choice(PUBLISHED, by_row(read_cluewsc), takes_shots=True),
}
