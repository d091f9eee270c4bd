"""Published rows, one or two of each task's file, and helpers of the tests that read them."""

import json

from conftest import ROOT, SHARED

from chat import load_tokenizer
from tasks import Ask, read_examples

BOS, EOS = 0, 1  # of the tokenizer that save_tokenizer makes
HUMAN_EVAL, GSM8K = SHARED / "HumanEval.jsonl.gz", SHARED / "gsm8k_test.jsonl"
PLAIN = Ask(None, plain=True)
CHAT = Ask(load_tokenizer(ROOT / "demo/base"))


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def read_row(folder, task, row, ask=PLAIN) -> dict:
    """The example that a file of one row gives."""
    (example,) = read_examples(write_rows(folder / "rows.jsonl", [row]), task, ask)
    return example


def without(row: dict, name: str) -> dict:
    return {key: value for key, value in row.items() if key != name}


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
