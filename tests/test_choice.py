"""Multiple choice: published rows and folders become the prompts written here by hand, and
likelihoods become scores."""

import json

import pytest
import torch
from published_rows import (
    ARC_FILE,
    ARC_HUB,
    ARC_TEXTS,
    CHAT,
    CLUEWSC,
    GENERIC,
    HELLASWAG,
    PLAIN,
    WIKIHOW,
    WSC_PROMPT,
    read_row,
    write_rows,
)

from checkpoint import load_model
from data import load_tokenizer
from eval import rescore
from families import read_config
from tasks import TASKS, Ask, check_lengths, read_examples, score
from tasks.choice import join_choice

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
        "place": 3,
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


@pytest.mark.parametrize("task, split", [("ceval", "val"), ("ceval_test", "test")])
def test_ceval_is_the_mean_over_subjects(task, split, tmp_path):
    """One of one and one of three: (1 + 1/3) / 2, where MMLU has 2 / 4."""
    head, row = "id,question,A,B,C,D,answer\n", "0,q,1,2,3,4,A\n"
    files = {f"dev/{name}_dev.csv": head + row for name in ("art", "law")}
    for other, rows in (("val", row), ("test", row)):
        files |= {f"{other}/art_{other}.csv": head + rows, f"{other}/law_{other}.csv": head + rows}
    files[f"{split}/law_{split}.csv"] = head + 3 * row
    examples = read_examples(write_folder(tmp_path, files), task, PLAIN)
    assert [e["subject"] for e in examples] == ["art", "law", "law", "law"]
    for example, right in zip(examples, (True, False, True, False)):
        example["loglikelihoods"] = [-1.0 if right else -3.0, -2.0, -4.0, -4.0]
    result = score(task, examples)
    assert result.metrics == dict.fromkeys(("accuracy", "normalised"), pytest.approx(2 / 3))
    assert (result.mean, result.count) == (pytest.approx(2 / 3), 4)
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
        ("ceval_test", {"val/a_val.csv": TEST}, OSError, r"holds no test/SUBJECT_test\.csv"),
        (
            "ceval_test",  # a download from before 2025
            {
                "dev/a_dev.csv": "id,question,A,B,C,D,answer,explanation\n0,q,1,2,3,4,A,e\n",
                "test/a_test.csv": "id,question,A,B,C,D\n0,q,1,2,3,4\n",
            },
            ValueError,
            r"test/a_test\.csv: line 1: the columns are id,question,A,B,C,D; .*answer are required",
        ),
        (
            "ceval",
            {
                "dev/a_dev.csv": "id,question,A,B,C,D,answer,explanation\n0,q,1,2,3,4,A,e\n",
                "val/a_val.csv": "0,q,1,2,3,4,B\n1,r,1,2,3,4,C\n",
            },
            ValueError,
            r"val/a_val\.csv: line 1: the columns are 0,q,1,2,3,4,B; id,question",
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
        "test/high_school_history_test.csv": "id,question,A,B,C,D\n0,没有答案,1,2,3,4\n",
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
        "place": right,
    }


def test_normalised_accuracy_is_by_letter_of_the_choice():
    """-6 of 2 letters is -3 a letter, -8 of 4 letters is -2."""
    example = {"choices": ["ab", "abcd"], "raw_answers": ["abcd"], "loglikelihoods": [-6.0, -8.0]}
    result = score("choice", [example])
    assert result.metrics == {"accuracy": 0.0, "normalised": 1.0}
    assert (result.records[0]["score"], result.records[0]["score_normalised"]) == (0, 1)


@pytest.mark.parametrize(
    "prompt, space",
    [
        *((prompt, True) for prompt in ("Answer:", "답:", "정답은", "㈜", "ㅋ", "Is it 😀", "☺️")),
        *((prompt, True) for prompt in ("(答案)", "x = 1", "he said “no”", "")),
        *((prompt, False) for prompt in ("Answer: ", "Answer:\n", "答案：", "答え\u3000")),
        *(
            (prompt, False)
            for prompt in ("他说", "答えは", "カタカナ", "ﾃﾞｰﾀ", "𠮷", "「", "。", "！")
        ),
    ],
)
@pytest.mark.parametrize(
    "choices", [["A", "B"], ["是", "不是"], ["yes", "네", "😀", "はい"], [" left", "right"]]
)
def test_the_prompt_alone_says_whether_a_space_follows(prompt, space, choices):
    joined = [join_choice(prompt, choice) for choice in choices]
    assert joined == [f"{prompt} {c}" if space else f"{prompt}{c}" for c in choices]


@pytest.mark.parametrize(
    "task, row, gold",
    [
        ("choice", {"prompt": "Sky?", "choices": ["blue", "red", "blue"], "answer": 2}, 2),
        ("choice", {"prompt": "Sky?", "choices": ["blue", "red", "blue"], "answer": "blue"}, 0),
        (
            "arc",
            ARC_HUB
            | {"choices": {"text": ["oil", "ice", "oil", "x"], "label": list("ABCD")}}
            | {"answerKey": "C"},
            2,
        ),
        ("hellaswag", HELLASWAG | {"endings": ["go.", "go. [x]", "[y]go.", "run."], "label": 1}, 1),
    ],
)
def test_of_equal_choices_the_labelled_one_counts(task, row, gold, tmp_path):
    """The first of the likeliest is taken, so of two equal choices never the second."""
    example = read_row(tmp_path, task, row)
    assert example["place"] == gold
    for taken in range(len(example["choices"])):
        logs = [-1.0 if i == taken else -9.0 for i in range(len(example["choices"]))]
        (record,) = score(task, [example | {"loglikelihoods": logs}]).records
        assert (record["score"], record["score_normalised"]) == (taken == gold, taken == gold)


SAVED = {
    "prompt": "p",
    "raw_answers": ["go"],
    "choices": ["go", "no", "go"],
    "raw_prediction": "go",
}
SAVED["loglikelihoods"] = [-2.0, -3.0, -1.0]


@pytest.mark.parametrize("place, right", [({}, 0), ({"place": 0}, 0), ({"place": 2}, 1)])
def test_saved_rows_keep_the_place_and_older_ones_have_that_of_the_text(place, right, tmp_path):
    path = write_rows(tmp_path / "saved.jsonl", [{"example": SAVED | place}])
    assert rescore(path, "choice")[0].mean == right


@pytest.mark.parametrize(
    "field, text, message",
    [
        *(
            ("place", text, r"field place is .*; one of \[0, 2\] is required")
            for text in ("1", "3", "-1", "true", "false", "2.0", '"2"', "null", "[0]")
        ),
        *(
            (
                "loglikelihoods",
                text,
                "field loglikelihoods is .*; 3 numbers are required, all finite",
            )
            for text in ("[-1, NaN, -2]", "[-1, -2, -Infinity]", "[1e999, -1, -2]", "[-1, -2]")
        ),
        ("loglikelihoods", f"[-1, -2, 1{'0' * 400}]", "field loglikelihoods is .*all finite"),
        ("loglikelihoods", "[-1, -2, true]", "field loglikelihoods is .*all finite"),
    ],
)
def test_a_saved_place_or_number_that_cannot_be_is_named(field, text, message, tmp_path):
    whole, marked = json.dumps({"example": SAVED}), json.dumps({"example": SAVED | {field: "HERE"}})
    path = tmp_path / "saved.jsonl"
    path.write_text(f"{whole}\n{marked}\n".replace('"HERE"', text))
    with pytest.raises(ValueError, match=rf"saved\.jsonl: line 2: {message}"):
        rescore(path, "choice")


def test_prompts_longer_than_the_context_are_counted(checkpoint, capsys):
    """A token is a byte here. What the model reads is the beginning, the prompt, the space and the
    choice but for its last byte: 20, 21 and 22 tokens."""
    examples = [
        {"prompt": 18 * "p", "choices": ["A", "B"]},
        {"prompt": 19 * "p", "choices": ["A", "B"]},
        {"prompt": 10 * "p", "choices": ["A", "B" * 11]},
    ]
    tokenizer, config = load_tokenizer(checkpoint), read_config(checkpoint)
    for context, said in ((20, "2 of 3"), (21, "1 of 3"), (22, ""), (None, "")):
        check_lengths("q.jsonl", "choice", examples, Ask(tokenizer, False, context), config)
        wanted = f"q.jsonl: {said} prompts are longer than the {context} tokens of max_position_"
        printed = capsys.readouterr().out
        assert printed.startswith(wanted) if said else not printed
    model = load_model(checkpoint, dtype=torch.float32)  # they are answered all the same
    answered = list(TASKS["choice"].predict(model, Ask(tokenizer, False, 20), examples, 0))
    assert [len(e["loglikelihoods"]) for _, e in answered] == [2, 2, 2]
