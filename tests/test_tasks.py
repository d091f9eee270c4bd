"""Every task: a published row becomes the prompt written here by hand, an answer its score.
Likelihoods are held against transformers, published solutions against their tests."""

import json
import re
import string

import pytest
import tokenizers
import torch
from conftest import SHARED, save_tokenizer, save_with_transformers

from data import Tokenizer, load_tokenizer, read_rows
from eval import (
    TASKS,
    Ask,
    answer_file,
    choice_likelihoods,
    final_number,
    join_choice,
    judge_prompt,
    program,
    read_examples,
    read_points,
    rescore,
    score,
    score_number,
    score_trivia,
    write_records,
)
from model import load_model
from sandbox import run_programs

BOS, EOS = 0, 1  # of the tokenizer that save_tokenizer makes
HUMAN_EVAL, GSM8K = SHARED / "HumanEval.jsonl.gz", SHARED / "gsm8k_test.jsonl"
PLAIN = Ask(None, plain=True)
CHAT = Ask(Tokenizer(None, BOS, EOS, "deepseek_v2"))


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def read_row(folder, task, row, ask=PLAIN) -> dict:
    """The example that a file of one row gives."""
    (example,) = read_examples(write_rows(folder / "rows.jsonl", [row]), task, ask)
    return example


def without(row: dict, name: str) -> dict:
    return {key: value for key, value in row.items() if key != name}


# ------------------------------------------------------------------------------------------
# Likelihoods


@pytest.fixture(autouse=True)
def one_thread():
    """So small models gain nothing from a second thread, and wait for it on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=[1, 2])
def base(request, tmp_path_factory):
    """A random base's folder and transformers' model of it."""
    path = tmp_path_factory.mktemp("base")
    oracle = save_with_transformers(path, request.param, vocab_size=258)
    save_tokenizer(path)
    return path, oracle


@torch.no_grad()
def answer_logits(oracle, given: list[int], answer: list[int]) -> torch.Tensor:
    """transformers' log-probabilities (tokens of the answer, vocabulary), of this sequence alone,
    and each before its own token."""
    logits = oracle(torch.tensor([given + answer])).logits[0]
    return logits.double().log_softmax(-1)[len(given) - 1 : -1]


def log_likelihood(oracle, given: list[int], answer: list[int]) -> float:
    return answer_logits(oracle, given, answer)[range(len(answer)), answer].sum().item()


# prompt, choices, how each goes on behind the prompt, which one is right
CHOICES = [
    ("2 + 2 =\nA. 3\nB. 4\nAnswer:", ["A", "B", "C", "D"], [" A", " B", " C", " D"], 1),
    ("The cat", ["sat on the mat.", "is", "ate it"], [" sat on the mat.", " is", " ate it"], 0),
    ("It ends with a space: ", ["x", "xyz", "Xyz"], ["x", "xyz", "Xyz"], 1),
    ("马克打了他。\n答案：", ["是", "不是"], ["是", "不是"], 0),
    ("中文, then Latin：", ["right", "一二三"], ["right", "一二三"], 1),
    ("Go", ["left", "on and on and on and on"], [" left", " on and on and on and on"], 1),
]


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_choices_score_as_transformers_has_them(base, batch_size, tmp_path):
    path, oracle = base
    encode = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json")).encode
    expected, hits, normalised_hits = [], 0, 0
    for prompt, choices, texts, right in CHOICES:
        given = [BOS, *encode(prompt).ids]
        logs = [log_likelihood(oracle, given, encode(text).ids) for text in texts]
        by_letter = [log / len(choice) for log, choice in zip(logs, choices)]
        expected.append(logs)
        hits += max(logs) == logs[right]
        normalised_hits += max(by_letter) == by_letter[right]
    assert hits != normalised_hits  # or the test could not tell them apart
    rows = [{"prompt": p, "choices": c, "answer": right} for p, c, _, right in CHOICES]
    data = write_rows(tmp_path / "choices.jsonl", rows)
    model = load_model(path, dtype=torch.float32)
    tokenizer = load_tokenizer(path)
    result = score("choice", answer_file(model, tokenizer, "choice", data, batch_size=batch_size))
    for record, logs, (_, choices, _, _) in zip(result.records, expected, CHOICES):
        example = record["example"]
        assert example["loglikelihoods"] == pytest.approx(logs, rel=1e-4)
        assert example["raw_prediction"] == choices[logs.index(max(logs))]
    assert result.metrics == {
        "accuracy": pytest.approx(hits / len(CHOICES)),
        "normalised": pytest.approx(normalised_hits / len(CHOICES)),
    }


def test_a_choice_that_merges_with_the_prompt_counts_from_the_merged_token(tmp_path):
    """The last byte of 题 and the first of 是 are one token of this tokenizer: what differs from
    the prompt's own tokens begins one token earlier, for both choices."""
    oracle = save_with_transformers(tmp_path, 1, vocab_size=259)
    save_tokenizer(tmp_path)
    file = tmp_path / "tokenizer.json"
    (last, first) = (tokenizers.Tokenizer.from_file(str(file)).encode(c).tokens for c in "题是")
    raw = json.loads(file.read_text())
    raw["model"]["vocab"][last[-1] + first[0]] = 258
    raw["model"]["merges"] = [[last[-1], first[0]]]
    file.write_text(json.dumps(raw))
    encode = tokenizers.Tokenizer.from_file(str(file)).encode
    prompt, merged, plain = (encode(text).ids for text in ("问题", "问题是", "问题不是"))
    assert merged[: len(prompt)] != prompt and merged[len(prompt) - 1] == 258
    assert plain[: len(prompt)] == prompt
    given, known = [BOS, *prompt[:-1]], len(prompt) - 1
    expected = [log_likelihood(oracle, given, ids[known:]) for ids in (merged, plain)]
    example = {"prompt": "问题", "choices": ["是", "不是"]}
    model = load_model(tmp_path, dtype=torch.float32)
    (found,) = choice_likelihoods(model, load_tokenizer(tmp_path), [example])
    assert found == pytest.approx(expected, rel=1e-4)


def half_likely(oracle, tokenizer, given: list[int], space: str) -> str:
    """Two letters of which greedy decoding would choose the second, or an accuracy would be 0."""
    for letter in string.ascii_letters:
        answer = tokenizer.encode(space + letter).ids
        likeliest = answer_logits(oracle, given, [*answer, EOS])[-1].argmax().item()
        if (second := tokenizer.decode([likeliest])) in string.ascii_letters:
            return letter + second


@pytest.mark.parametrize("chat_format, space", [("deepseek_v2", " "), ("deepseek_v3", "")])
def test_without_a_judge_loss_and_accuracy_of_references_are_transformers(
    base, chat_format, space, tmp_path
):
    path, oracle = base
    tokenizer = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    rows, loss, hits, count = [], 0.0, 0, 0
    for question, rest in (("Sum up: ab", ""), ("翻译", ", a longer one"), ("?", "。")):
        prompt = f"User: {question}\n\nAssistant:"
        given = [BOS, *tokenizer.encode(prompt).ids]
        text = half_likely(oracle, tokenizer, given, space) + rest
        answer = [*tokenizer.encode(space + text).ids, EOS]
        logs = answer_logits(oracle, given, answer)
        loss -= logs[range(len(answer)), answer].sum().item()
        hits += (logs.argmax(1) == torch.tensor(answer)).sum().item()
        count += len(answer)
        rows.append({"prompt": prompt, "raw_answers": [text, "not this one"]})
    assert 3 <= hits < count
    model, tokenizer = load_model(path, dtype=torch.float32), load_tokenizer(path, chat_format)
    data = write_rows(tmp_path / "summary.jsonl", rows)
    result = score("summary", answer_file(model, tokenizer, "summary", data, max_new_tokens=1))
    assert result.metrics == {
        "reference loss": pytest.approx(loss / count, rel=1e-4),
        "reference accuracy": pytest.approx(hits / count),
    }
    assert (result.missing, [record["score"] for record in result.records]) == (3, [None] * 3)


# ------------------------------------------------------------------------------------------
# Multiple choice


DEV = """\
What is 1 + 1?,1,2,3,4,B
"He said ""no"", twice.",a,"b, c",d,"e ""f\""",A
"Statement 1 | x
Statement 2 | y","True, True","False, False","True, False","False, True",C
Q4,a4,b4,c4,d4,D
Q5,a5,b5,c5,d5,A
Q6,a6,b6,c6,d6,B
"""
TEST = '"Find it,\nif you can.",zero,one,two,three,D\n'


def write_folder(folder, files: dict[str, str]):
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def test_mmlu_prompt_is_the_published_layout(tmp_path):
    files = {"dev/abstract_algebra_dev.csv": DEV, "test/abstract_algebra_test.csv": TEST}
    (example,) = read_examples(write_folder(tmp_path, files), "mmlu", CHAT)
    assert example == {
        "prompt": """\
The following are multiple choice questions (with answers) about  abstract algebra.

What is 1 + 1?
A. 1
B. 2
C. 3
D. 4
Answer: B

He said "no", twice.
A. a
B. b, c
C. d
D. e "f"
Answer: A

Statement 1 | x
Statement 2 | y
A. True, True
B. False, False
C. True, False
D. False, True
Answer: C

Q4
A. a4
B. b4
C. c4
D. d4
Answer: D

Q5
A. a5
B. b5
C. c5
D. d5
Answer: A

Find it,
if you can.
A. zero
B. one
C. two
D. three
Answer:""",
        "raw_answers": ["D"],
        "choices": ["A", "B", "C", "D"],
        "subject": "abstract_algebra",
    }
    assert [join_choice("Answer:", c) for c in "AD"] == ["Answer: A", "Answer: D"]


def test_mmlu_is_the_mean_over_questions_with_subjects_apart(tmp_path):
    row = "q,1,2,3,4,A\n"
    files = {
        "dev/law_dev.csv": DEV,
        "dev/art_dev.csv": DEV,
        "test/law_test.csv": 3 * row,
        "test/art_test.csv": row + "\n",  # an empty line counts for nothing
    }
    examples = read_examples(write_folder(tmp_path, files), "mmlu", PLAIN)
    assert [e["subject"] for e in examples] == ["art", "law", "law", "law"]
    for example, right in zip(examples, (True, False, True, False)):
        example["loglikelihoods"] = [-1.0 if right else -3.0, -2.0, -4.0, -4.0]
    result = score("mmlu", examples)
    assert (result.mean, result.count) == (0.5, 4)
    assert result.groups == {"art": 1.0, "law": pytest.approx(1 / 3)}


@pytest.mark.parametrize(
    "task, files, error, message",
    [
        ("mmlu", {"dev/a_dev.csv": DEV}, OSError, r"holds no test/SUBJECT_test\.csv"),
        ("mmlu", {"test/a_test.csv": TEST}, OSError, r"dev/a_dev\.csv: no such file"),
        (
            "mmlu",
            {"dev/a_dev.csv": DEV, "test/a_test.csv": f"{TEST}q,1,2,3,E,A,\nq,1,2,3,4\n"},
            ValueError,
            r"test/a_test\.csv: line 4: 5 cells; 6 are required",
        ),
        (
            "mmlu",
            {"dev/a_dev.csv": DEV, "test/a_test.csv": TEST + TEST.replace(",D\n", ",E\n")},
            ValueError,
            r"test/a_test\.csv: line 3: the answer is 'E'; it must be one of the 4 choices",
        ),
        (
            "mmlu",
            {"dev/a_dev.csv": DEV, "test/a_test.csv": "\n"},
            ValueError,
            r"test/a_test\.csv: the file has no rows",
        ),
        ("ceval", {"test/a_test.csv": TEST}, OSError, r"holds no val/SUBJECT_val\.csv"),
        (
            "ceval",
            {"dev/a_dev.csv": "id,question,A,B,C,D,answer,explanation\n", "val/a_val.csv": "\n"},
            ValueError,
            r"dev/a_dev\.csv: the file has no rows",
        ),
        (
            "ceval",
            {
                "dev/a_dev.csv": "id,question,A,B,C,D,answer,explanation\n0,q,1,2,3,4,A,e\n",
                "val/a_val.csv": "id,question,A,B,C,D,answer\n0,q,1,2,3,4,\n",
            },
            ValueError,
            r"val/a_val\.csv: line 2: the answer is ''; it must be one of the 4 choices",
        ),
    ],
)
def test_bad_folders(task, files, error, message, tmp_path):
    with pytest.raises(error, match=message):
        read_examples(write_folder(tmp_path, files), task, PLAIN)


@pytest.mark.parametrize("named", [True, False])
def test_ceval_prompt_by_hand(named, tmp_path):
    dev = "".join(f"{i},问题{i},甲,乙,丙,丁,{'ABCDAB'[i]},解释{i}\n" for i in range(6))
    files = {
        "dev/high_school_history_dev.csv": f"id,question,A,B,C,D,answer,explanation\n{dev}",
        "val/high_school_history_val.csv": 'id,question,A,B,C,D,answer\n0,"谁,何时？",1,2,3,4,C\n',
        "test/high_school_history_test.csv": "id,question,A,B,C,D\n0,不公布,1,2,3,4\n",
    }
    if named:
        mapping = {"high_school_history": ["High School History", "高中历史", "Humanities"]}
        files["subject_mapping.json"] = json.dumps(mapping)
    (example,) = read_examples(write_folder(tmp_path, files), "ceval", PLAIN)
    options = "A. 甲\nB. 乙\nC. 丙\nD. 丁\n答案："
    assert example["prompt"] == (
        f"以下是中国关于{'高中历史' if named else 'high school history'}考试的单项选择题，"
        "请选出其中的正确答案。\n\n"
        f"问题0\n{options}A\n\n问题1\n{options}B\n\n问题2\n{options}C\n\n问题3\n{options}D\n\n"
        f"问题4\n{options}A\n\n"
        "谁,何时？\nA. 1\nB. 2\nC. 3\nD. 4\n答案："
    )
    assert example["raw_answers"] == ["C"]
    assert join_choice(example["prompt"], "C").endswith("答案：C")


HELLASWAG = {
    "ind": 24,
    "activity_label": "Roof shingle removal",
    "ctx_a": "A man is sitting on a roof.",
    "ctx_b": "he",
    "ctx": "A man is sitting on a roof. he",
    "split": "val",
    "endings": [
        "is using wrap.",
        "is ripping level tiles off.",
        "holds a cube.",
        "starts pulling.",
    ],
    "label": 3,
}
WIKIHOW = {
    "activity_label": "Food",
    "ctx_a": "[header] How to boil eggs [title] Buy eggs. [step] Take six.",
    "ctx_b": "",
    "endings": ["[substeps] Go  home [title] Rest.", "Boil [sic] them.", "Eat.", "Sleep."],
    "label": "1",
}
ARC_TEXTS, ARC_LABELS = ["dry palms", "wet palms", "oil", "lotion"], ["1", "2", "3", "4"]
ARC_FILE = {
    "id": "MCAS_2000_4_6",
    "question": {
        "stem": "Which surface gives the most heat?",
        "choices": [{"text": t, "label": n} for t, n in zip(ARC_TEXTS, ARC_LABELS)],
    },
    "answerKey": "3",
}
ARC_HUB = {
    "id": "Mercury_7175875",
    "question": "Which surface gives the most heat?",
    "choices": {"text": ARC_TEXTS, "label": ["A", "B", "C", "D"]},
    "answerKey": "B",
}
CLUEWSC = {
    "target": {"span2_index": 25, "span1_index": 0, "span1_text": "马克", "span2_text": "他"},
    "idx": 0,
    "label": "false",
    "text": "马克告诉皮特许多关于他自己的谎言，他应该更真实。",
}
WSC_PROMPT = f"{CLUEWSC['text']}\n问题：上文中的“他”指的是“马克”吗？\n答案："
GENERIC = {"prompt": "Sky?", "choices": ["blue", "green"], "answer": 1}


@pytest.mark.parametrize(
    "task, row, prompt, choices, right",
    [
        (
            "hellaswag",
            HELLASWAG,
            "Roof shingle removal: A man is sitting on a roof. He",
            HELLASWAG["endings"],
            3,
        ),
        (
            "hellaswag",
            WIKIHOW,
            "Food: How to boil eggs. Buy eggs. Take six.",
            [" Go home. Rest.", "Boil them.", "Eat.", "Sleep."],
            1,
        ),
        ("arc", ARC_FILE, "Question: Which surface gives the most heat?\nAnswer:", ARC_TEXTS, 2),
        ("arc", ARC_HUB, "Question: Which surface gives the most heat?\nAnswer:", ARC_TEXTS, 1),
        ("cluewsc", CLUEWSC, WSC_PROMPT, ["是", "不是"], 1),
        ("cluewsc", CLUEWSC | {"label": "true"}, WSC_PROMPT, ["是", "不是"], 0),
        ("choice", GENERIC, "Sky?", ["blue", "green"], 1),
        ("choice", GENERIC | {"answer": "blue"}, "Sky?", ["blue", "green"], 0),
    ],
)
def test_choice_rows_by_hand(task, row, prompt, choices, right, tmp_path):
    assert read_row(tmp_path, task, row) == {
        "prompt": prompt,
        "choices": choices,
        "raw_answers": [choices[right]],
    }


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
    ],
)
def test_final_numbers_by_hand(text, number):
    assert final_number(text) == number
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


TRIVIA = {"question": "Who wrote Macbeth?", "answers": ["Shakespeare", "The Bard"]}
TRIVIA_HUB = {
    "question": "Who wrote Macbeth?",
    "question_id": "tc_1",
    "answer": {
        "value": "Shakespeare",
        "aliases": ["Shakespeare", "The Bard"],
        "normalized_value": "shakespeare",
    },
}
FUNCTION = 'import math\n\n\ndef area(r):\n    """Of a circle."""\n'
CIRCLE = {
    "task_id": "HumanEval/0",
    "prompt": FUNCTION,
    "entry_point": "area",
    "canonical_solution": "    return math.pi * r * r\n",
    "test": "def check(candidate):\n    assert round(candidate(1), 2) == 3.14\n",
}
MBPP = {
    "text": "Write a function to add up a tree.",
    "code": "def total(n):\r\n  return n.value",
    "task_id": 11,
    "test_setup_code": "root = Node(3)",
    "test_list": ["assert total(root) == 3", "assert total(Node(4)) == 4"],
    "challenge_test_list": [],
}
MBPP_SANITIZED = {
    "source_file": "Benchmark Questions Verification V2.ipynb",
    "task_id": 17,
    "prompt": "Write a function for the root.",
    "code": "def root(x):\n  return x ** 0.5",
    "test_imports": ["import math"],
    "test_list": ["assert root(9) == math.sqrt(9)"],
}
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
# Programs


JUNK = [  # what base models go on with; each would break the program
    "\n\ndef other(x):\n    return (",
    "\n\nprint(undefined_name)\n",
    "\n# Tests\nassert False\n",
    "\nif __name__ == '__main__':\n    main(",
    "\n\nclass Other:\n    x = (",
    "\n\n@undefined_name\ndef other(x):\n    return x\n",
    "\n```\n\nThis solves it:\n```python\nx = (\n```\n",
    "\n\ndef {entry}(x):\n    return (",  # the same function again, cut off
]


def continuation(i: int, row: dict) -> str:
    return row["canonical_solution"]


def with_junk(i: int, row: dict) -> str:
    return row["canonical_solution"] + JUNK[i % len(JUNK)].replace("{entry}", row["entry_point"])


def whole_function(row: dict) -> str:
    """Without the imports and helpers that the prompt has before it."""
    return row["prompt"][row["prompt"].index(f"def {row['entry_point']}(") :] + (
        row["canonical_solution"].rstrip()
    )


def in_a_fence(i: int, row: dict) -> str:
    before = ["", "First:\n```bash\npip install numpy\n```\nThen:\n\n", "```\n>>> x = (\n```\n"]
    language = ["python", "Python", "py", "", "python3"]
    return (
        f" Sure! {before[i % 3]}```{language[i % 5]}\n{whole_function(row)}\n```\n\nIt is called "
        "so:\n\n```python\nprint(undefined_name)\n```\nGood luck!"
    )


def unended(i: int, row: dict) -> str:
    """In a fence that does not end, or without one; a space comes first, as in the chat format."""
    return [" ", " ```python\n"][i % 2] + whole_function(row)


def body_in_a_fence(i: int, row: dict) -> str:
    example = ["", "\n\nprint(undefined_name)"][i % 2]
    body = row["canonical_solution"].rstrip() + example
    return f"The body is\n```python\n{body}\n```\nas asked."


def empty(i: int, row: dict) -> str:
    return ""


def without_code(i: int, row: dict) -> str:
    return ["\n", "    ", "```python\n", "I cannot.", " ```\nno\n```"][i % 5]


@pytest.mark.skipif(not HUMAN_EVAL.exists(), reason="HumanEval is not here")
@pytest.mark.parametrize(
    "complete, passing",
    [
        (continuation, True),
        (with_junk, True),
        (in_a_fence, True),
        (unended, True),
        (body_in_a_fence, True),
        (empty, False),
        (without_code, False),
    ],
)
def test_humaneval_solutions_in_every_shape(complete, passing):
    rows = [row for _, row in read_rows(HUMAN_EVAL)]
    examples = read_examples(HUMAN_EVAL, "humaneval", PLAIN)
    examples = [
        e | {"raw_prediction": complete(i, row)} for i, (e, row) in enumerate(zip(examples, rows))
    ]
    said = run_programs([(program(e), e["test"]) for e in examples])
    wrong = {r["task_id"]: line for r, line in zip(rows, said) if (line == "passed") != passing}
    assert (len(rows), wrong) == (164, {})


NODE = "class Node:\n    def __init__(self, value):\n        self.value = value\n\n"
TOTAL = NODE + "def total(n):\n    return n.value"
ROOT = "def root(x):\n    return x ** 0.5"


@pytest.mark.parametrize(
    "row, completion, passes",
    [
        (MBPP, TOTAL, True),
        (MBPP, f"{TOTAL}\n[DONE]\n\nYou are an expert", True),
        (MBPP, f" {TOTAL}", True),  # the space of the chat format
        (MBPP, f"Here:\n```python\n{TOTAL}\n```\nDone. [DONE]", True),
        (MBPP, f"```\npip install x\n```\n```python\n{TOTAL}\n```", True),
        (MBPP, "def total(n):\n    return n.value", False),  # the set-up needs Node
        (MBPP, TOTAL.replace("n.value", "4"), False),  # of two tests one fails
        (MBPP, "", False),
        (MBPP_SANITIZED, ROOT, True),  # the test imports math
        (MBPP_SANITIZED, f"```python\n{ROOT}\n```\n[DONE]", True),
        (MBPP_SANITIZED, ROOT.replace("0.5", "2"), False),
    ],
)
def test_mbpp_by_hand(row, completion, passes, tmp_path):
    example = read_row(tmp_path, "mbpp", row) | {"raw_prediction": completion}
    result = score("mbpp", [example])
    assert (result.mean, result.records[0]["result"] == "passed") == (passes, passes)


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
    example = {"raw_answers": ["The {right} one", "no"]}
    prompt = judge_prompt(TASKS[task], example | {"raw_prediction": " One.\nTwo.\n\nTalk {x}.\n"})
    _, between, end = re.split("Reference:|Candidate:", prompt)
    assert between.strip() == "The {right} one"
    assert end.strip().startswith(f"{candidate}\n\nReply with one line")
    assert TASKS[task].grades in prompt and all(c in prompt for c in TASKS[task].criteria)
    assert "Candidate:\n(nothing)\n" in judge_prompt(TASKS[task], example | {"raw_prediction": " "})


# ------------------------------------------------------------------------------------------
# Saved completions


class StubJudge:
    """Gives 0.7 where the candidate is "good", else no points."""

    def points(self, texts: list[str]) -> list[float | None]:
        return [0.7 if "Candidate:\ngood" in text else None for text in texts]


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
    write_records(path, first.records)
    again, equal = rescore(path, task, judge)
    assert (equal, again) == (2, first)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    write_rows(path, [rows[0], rows[1] | {"score": 0.123}])
    assert rescore(path, task, judge)[1] == 1


def test_losses_are_means_over_all_tokens():
    """2 tokens of 0.5 and 6 of 2.0: 13 / 8; of the 8 tokens 2 + 3 are right."""
    result = score("loss", ANSWERED["loss"])
    assert (result.metrics, result.count) == ({"loss": 1.625, "token accuracy": 0.625}, 8)


def test_normalised_accuracy_is_by_letter_of_the_choice():
    """-6 of 2 letters is -3 a letter, -8 of 4 letters is -2."""
    example = {"choices": ["ab", "abcd"], "raw_answers": ["abcd"], "loglikelihoods": [-6.0, -8.0]}
    result = score("choice", [example])
    assert result.metrics == {"accuracy": 0.0, "normalised": 1.0}
    assert (result.records[0]["score"], result.records[0]["score_normalised"]) == (0, 1)


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
