"""Examples before a question (--shots): the prompts written here by hand, plain as
lm-evaluation-harness writes them, and as earlier turns of a conversation; and what is refused."""

import json

import pytest
from conftest import ROOT
from published_rows import ARC_HUB, CHAT, CLUEWSC, HELLASWAG, MBPP, PLAIN, WIKIHOW, write_rows

from chat.template import Chat
from eval import main
from tasks import TASKS, read_examples

EOS = "<｜end▁of▁sentence｜>"
BOXED = "\nPlease reason step by step, and put your final answer within \\boxed{}."
FEW_WORDS = "\nAnswer with a name or a few words, without a sentence."
TAKERS = ["hellaswag", "arc", "cluewsc", "mbpp", "math", "gsm8k", "triviaqa"]


def few(tmp_path, task, shots, row, ask=PLAIN, count=None) -> dict:
    """The example of a row, behind the first `count` rows of `shots`."""
    examples = write_rows(tmp_path / "shots.jsonl", shots)
    ask = ask.with_shots(TASKS[task].read, examples, count or len(shots))
    (example,) = read_examples(write_rows(tmp_path / "asked.jsonl", [row]), task, ask)
    return example


def hens(n, total):
    return {"question": f"{n} hens lay {n} eggs.  How many? ", "answer": f"{total}\n#### {total}"}


APPLES = {
    "question": "Ann has 2 bags of 6 apples. How many?",
    "answer": "2*6=<<2*6=12>>12\nShe has 12.\n#### 12",
}


def test_gsm8k_by_hand(tmp_path):
    shots, asked = [APPLES, hens(40, "1,600")], hens(3, 9)
    assert few(tmp_path, "gsm8k", shots, asked)["prompt"] == (
        "Question: Ann has 2 bags of 6 apples. How many?\n"
        "Answer: 2*6=<<2*6=12>>12\nShe has 12.\n#### 12\n\n"
        "Question: 40 hens lay 40 eggs.  How many? \nAnswer: 1,600\n#### 1,600\n\n"
        "Question: 3 hens lay 3 eggs.  How many? \nAnswer:"
    )
    assert few(tmp_path, "gsm8k", shots, asked, CHAT)["prompt"] == (
        f"User: Ann has 2 bags of 6 apples. How many?{BOXED}\n\n"
        f"Assistant: 2*6=<<2*6=12>>12\nShe has 12.\n\\boxed{{12}}{EOS}"
        f"User: 40 hens lay 40 eggs.  How many? {BOXED}\n\nAssistant: 1,600\n\\boxed{{1,600}}{EOS}"
        f"User: 3 hens lay 3 eggs.  How many? {BOXED}\n\nAssistant:"
    )


def test_triviaqa_by_hand(tmp_path):
    hub = {"value": "Oslo", "aliases": ["Christiania", "Oslo"]}
    shots = [{"question": "Capital of Norway?", "answer": hub}]
    shots += [{"question": "Who sang Help?", "answers": ["The Beatles", "Beatles"]}]
    asked = {"question": "Largest moon?", "answers": ["Ganymede"]}
    assert few(tmp_path, "triviaqa", shots, asked)["prompt"] == (
        "Question: Capital of Norway?\nAnswer: Christiania\n\n"
        "Question: Who sang Help?\nAnswer: The Beatles\n\nQuestion: Largest moon?\nAnswer:"
    )
    assert few(tmp_path, "triviaqa", shots, asked, CHAT)["prompt"] == (
        f"User: Capital of Norway?{FEW_WORDS}\n\nAssistant: Christiania{EOS}"
        f"User: Who sang Help?{FEW_WORDS}\n\nAssistant: The Beatles{EOS}"
        f"User: Largest moon?{FEW_WORDS}\n\nAssistant:"
    )
    no_alias = [{"question": "Sea?", "answer": {"value": "Aral", "aliases": []}}]
    assert "Answer: Aral\n\n" in few(tmp_path, "triviaqa", no_alias, asked)["prompt"]


def test_mbpp_by_hand(tmp_path):
    """All splits stand in one file: 2 and 3 come first, 1 last, and others are no examples."""

    def row(number):
        code = f"def f(x):\r\n  return x + {number} "
        tests = [f"assert f(0) == {number}", "assert f"]
        return MBPP | {
            "text": f"Add {number}.",
            "code": code,
            "task_id": number,
            "test_list": tests,
        }

    def asked(number):
        return (
            "You are an expert Python programmer, and here is your task: "
            f"Add {number}. Your code should pass these tests:\n\n"
            f"assert f(0) == {number}\nassert f"
        )

    numbers = [11, 1, 600, 2, 3, 510]
    file = write_rows(tmp_path / "mbpp.jsonl", [row(number) for number in numbers])
    for ask, parts in (
        (
            PLAIN,
            [f"{asked(n)}\n[BEGIN]\ndef f(x):\r\n  return x + {n} \n[DONE]\n\n" for n in (2, 3)]
            + [f"{asked(11)}\n[BEGIN]\n"],
        ),
        (
            CHAT,
            [
                f"User: {asked(n)}\n\nAssistant: ```python\ndef f(x):\r\n  return x + {n} \n```"
                + EOS
                for n in (2, 3)
            ]
            + [f"User: {asked(11)}\n\nAssistant:"],
        ),
    ):
        first, last = read_examples(file, "mbpp", ask.with_shots(TASKS["mbpp"].read, file, 2))
        assert first["prompt"] == "".join(parts)
        assert last["prompt"].startswith("".join(parts[:2]))
        assert asked(510) in last["prompt"] and asked(1) not in last["prompt"]
    three = PLAIN.with_shots(TASKS["mbpp"].read, file, 3)
    assert [shot.where.split()[-1] for shot in three.shots] == ["4", "5", "2"]
    with pytest.raises(ValueError, match="mbpp.jsonl: holds 3 examples; 4 are required"):
        PLAIN.with_shots(TASKS["mbpp"].read, file, 4)
    only_test = write_rows(tmp_path / "test.jsonl", [row(11)])
    with pytest.raises(ValueError, match="no row has a task_id from 1 to 10, the published prompt"):
        PLAIN.with_shots(TASKS["mbpp"].read, only_test, 1)


def test_math_by_hand(tmp_path):
    shots = [{"problem": "What is $1+1$?", "solution": "It is $\\boxed{2}$."}]
    shots += [{"problem": "Find $x$.", "solution": "So $x = \\boxed 5$.", "level": "Level 1"}]
    asked = {"problem": "Half of 3?", "solution": "\\fbox{1.5}"}
    assert few(tmp_path, "math", shots, asked)["prompt"] == (
        "Problem:\nWhat is $1+1$?\n\nSolution: It is $\\boxed{2}$.\n\n"
        "Problem:\nFind $x$.\n\nSolution: So $x = \\boxed 5$.\n\n"
        "Problem:\nHalf of 3?\n\nSolution:"
    )
    assert few(tmp_path, "math", shots, asked, CHAT)["prompt"] == (
        f"User: What is $1+1$?{BOXED}\n\nAssistant: It is $\\boxed{{2}}$.{EOS}"
        f"User: Find $x$.{BOXED}\n\nAssistant: So $x = \\boxed 5$.{EOS}"
        f"User: Half of 3?{BOXED}\n\nAssistant:"
    )


@pytest.mark.parametrize("ask", [PLAIN, CHAT])
def test_multiple_choice_by_hand(ask, tmp_path):
    """It is plain text always."""
    snow = HELLASWAG | {"activity_label": "Snow", "ctx_a": "It snows.", "ctx_b": "KIDS", "label": 1}
    assert few(tmp_path, "hellaswag", [WIKIHOW, HELLASWAG], snow, ask)["prompt"] == (
        "Food: How to boil eggs. Buy eggs. Take six. Boil them.\n\n"
        "Roof shingle removal: A man is sitting on a roof. He starts pulling.\n\n"
        "Snow: It snows. Kids"
    )
    ice = ARC_HUB | {"question": "What melts?", "answerKey": "D"}
    assert few(tmp_path, "arc", [ice], ARC_HUB, ask)["prompt"] == (
        "Question: What melts?\nAnswer: lotion\n\n"
        "Question: Which surface gives the most heat?\nAnswer:"
    )
    other = CLUEWSC | {"text": "小明说他饿了。", "label": "true"}
    example = few(tmp_path, "cluewsc", [other, CLUEWSC | {"text": "他走了。"}], CLUEWSC, ask)
    assert example["prompt"] == (
        "小明说他饿了。\n问题：上文中的“他”指的是“马克”吗？\n答案：是\n\n"
        "他走了。\n问题：上文中的“他”指的是“马克”吗？\n答案：不是\n\n"
        "马克告诉皮特许多关于他自己的谎言，他应该更真实。\n"
        "问题：上文中的“他”指的是“马克”吗？\n答案："
    )
    assert (example["choices"], example["place"]) == (["是", "不是"], 1)


def test_the_first_rows_are_the_examples(tmp_path):
    rows = [hens(n, n) for n in range(2, 8)]
    prompt = few(tmp_path, "gsm8k", rows, APPLES, count=2)["prompt"]
    assert [n for n in range(2, 8) if f"{n} hens" in prompt] == [2, 3]
    with pytest.raises(ValueError, match=r"shots\.jsonl: holds 6 examples; 7 are required"):
        few(tmp_path, "gsm8k", rows, APPLES, count=7)


@pytest.mark.parametrize("ask", [PLAIN, CHAT])
def test_a_question_among_the_examples_is_named(ask, tmp_path):
    """The second example is the third row; without it, the file may be evaluated."""
    rows = write_rows(tmp_path / "rows.jsonl", [APPLES, hens(2, 2), hens(3, 3)])
    shots = write_rows(tmp_path / "shots.jsonl", [hens(9, 9), hens(3, 3)])
    said = r"rows\.jsonl: line 3: the question is also an example, .*shots\.jsonl: line 2$"
    with pytest.raises(ValueError, match=said):
        read_examples(rows, "gsm8k", ask.with_shots(TASKS["gsm8k"].read, shots, 2))
    assert len(read_examples(rows, "gsm8k", ask.with_shots(TASKS["gsm8k"].read, shots, 1))) == 3


def test_a_bad_example_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"shots\.jsonl: line 2: field answer is 'x'"):
        few(tmp_path, "gsm8k", [APPLES, {"question": "q", "answer": "x"}], hens(2, 2), count=1)


# ------------------------------------------------------------------------------------------
# The command line


@pytest.fixture
def files(tmp_path):
    rows = {
        "gsm8k": [hens(2, 4), hens(3, 9)],
        "train": [APPLES, hens(50, 1), hens(60, 1)],
        "arc": [ARC_HUB],
        "arc_dev": [ARC_HUB | {"question": f"What is {n}?"} for n in range(3)],
        "exact": [{"prompt": "p", "raw_answers": ["a"]}],
    }
    return {name: str(write_rows(tmp_path / f"{name}.jsonl", rows[name])) for name in rows}


def evaluate(monkeypatch, output, *arguments) -> dict:
    """What results.json says of each file of completions."""
    shared = ["eval.py", "--model", str(ROOT / "demo/base"), "--output", str(output)]
    monkeypatch.setattr("sys.argv", [*shared, "--max_new_tokens", "2", *arguments])
    main()
    return json.loads((output / "results.json").read_text())


def prompts(file) -> list[str]:
    return [json.loads(line)["example"]["prompt"] for line in file.read_text().splitlines()]


def test_each_task_has_its_shots(files, tmp_path, monkeypatch):
    named = ["--task", "gsm8k", "--data", files["gsm8k"], "--task", "exact", "--data"]
    named += [files["exact"], "--task", "arc", "--data", files["arc"], "--plain"]
    shots = ["--shots", "1", "0", "2", "--shots_data", files["train"], files["arc_dev"]]
    results = evaluate(monkeypatch, tmp_path / "out", *named, *shots)
    identities = [entry["identity"] for entry in results.values()]
    assert [i["shots"] for i in identities] == [1, None, 2]
    assert [i["examples of shots"] is None for i in identities] == [False, True, False]
    first, second = prompts(tmp_path / "out/base.gsm8k.jsonl")
    assert first.count("Question:") == second.count("Question:") == 2
    assert prompts(tmp_path / "out/base.arc.jsonl")[0].count("Answer: wet palms\n\n") == 2
    assert prompts(tmp_path / "out/base.exact.jsonl") == ["p"]
    # One number is for all tasks.
    both = [*named[:4], *named[8:], "--shots", "2", "--shots_data", files["train"]]
    results = evaluate(monkeypatch, tmp_path / "both", *both, files["arc_dev"])
    assert [entry["identity"]["shots"] for entry in results.values()] == [2, 2]


def test_a_run_with_other_shots_is_refused(files, tmp_path, monkeypatch):
    named = ["--task", "gsm8k", "--data", files["gsm8k"]]
    more = ["--shots_data", files["train"]]
    evaluate(monkeypatch, tmp_path / "out", *named, "--limit", "1", "--shots", "2", *more)
    evaluate(monkeypatch, tmp_path / "out", *named, "--shots", "2", *more)  # continues
    before = (tmp_path / "out/base.gsm8k.jsonl").read_bytes()
    assert len(before.splitlines()) == 2
    for change, said in (
        (["--shots", "1", *more], r"another shots \(2, now 1\)"),
        ([], r"another shots \(2, now None\)"),
        (["--shots", "2", "--shots_data", files["gsm8k"] + "2"], r"another examples of shots"),
    ):
        write_rows(tmp_path / "gsm8k.jsonl2", [hens(50, 1), hens(60, 1)])
        with pytest.raises(SystemExit, match=said):
            evaluate(monkeypatch, tmp_path / "out", *named, *change)
    assert (tmp_path / "out/base.gsm8k.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    "tasks, more, message",
    [
        (["exact"], "--shots 2 --shots_data x", "--shots 2: task exact takes no examples; .*gsm8k"),
        (["gsm8k", "mmlu"], "--shots 5 --shots_data x y", "--shots 5: task mmlu takes no examples"),
        (["gsm8k"], "--shots 5", r"1 tasks with examples \(--shots\), 0 --shots_data; each"),
        (["gsm8k"], "--shots_data x", r"0 tasks with examples \(--shots\), 1 --shots_data; each"),
        (["gsm8k", "arc"], "--shots 5 0 --shots_data x y", "1 tasks with .*, 2 --shots_data"),
        (["gsm8k", "arc"], "--shots 5 2 1 --shots_data x y", "2 --task, 3 --shots; one for all"),
        (["gsm8k"], "--shots five --shots_data x", "shots is 'five'; must be a number of examples"),
        (["gsm8k"], "--shots -1 --shots_data x", "shots is '-1'; must be a number of examples, 0"),
    ],
)
def test_shots_that_cannot_be_are_refused_before_anything_is_read(
    tasks, more, message, tmp_path, monkeypatch
):
    named = [word for task in tasks for word in ("--task", task, "--data", "none")]
    arguments = ["--model", "none", "--output", str(tmp_path), *named, *more.split()]
    monkeypatch.setattr("sys.argv", ["eval.py", *arguments])
    with pytest.raises(SystemExit, match=f"error: {message}"):
        main()


def test_no_examples_are_read_where_completions_are_scored_again(tmp_path, monkeypatch):
    words = ["--rescore", "none", "--task", "gsm8k", "--shots", "1", "--shots_data", "x"]
    monkeypatch.setattr("sys.argv", ["eval.py", *words])
    with pytest.raises(SystemExit, match="--rescore takes no --shots"):
        main()


def test_the_file_of_examples_is_not_overwritten(files, monkeypatch):
    words = ["--task", "gsm8k", "--data", files["gsm8k"], "--shots", "1", "--shots_data"]
    arguments = ["--model", "none", "--output", files["train"], *words, files["train"]]
    monkeypatch.setattr("sys.argv", ["eval.py", *arguments])
    with pytest.raises(SystemExit, match="this command reads it"):
        main()


def test_the_tasks_that_take_shots():
    assert sorted(n for n, task in TASKS.items() if task.takes_shots) == sorted(TAKERS)


def test_examples_that_a_template_leaves_out_are_named():
    """This one shows the last answer alone."""
    template = "{% for m in messages %}{% if m.role == 'user' %}Q: {{ m.content }} A:"
    template += "{% elif loop.revindex <= 2 %} {{ m.content }}<end>{% endif %}{% endfor %}"
    chat = Chat("own", template, "a test", {"eos_token": "<end>"}, ["<end>"])
    assert chat.prompt("Q2", [("Q1", "A1")]) == "Q: Q1 A: A1<end>Q: Q2 A:"
    with pytest.raises(ValueError, match="content is 'A1'; the chat format leaves it out"):
        chat.prompt("Q3", [("Q1", "A1"), ("Q2", "A2")])
