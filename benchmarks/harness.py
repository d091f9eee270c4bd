"""Compares IFEval's verdicts, MATH's scores and prompts with lm-evaluation-harness' own code.

    git clone https://github.com/EleutherAI/lm-evaluation-harness CHECKOUT
    pip install -e "CHECKOUT[ifeval,math]"
    python benchmarks/harness.py --harness CHECKOUT

The code of the checkout is imported and runs; nothing is downloaded. Compared are the strict and
loose verdicts of each instruction that is checked and the scores of MATH, on random answers, and
the prompts of --plain of rows made by hand. Prints a table, with the times our verdict is true and
the reason of each known difference, and one JSON line last, which it also writes to
benchmarks/results/harness.json. A difference without a known reason gives status 1."""

import argparse
import datetime
import importlib.metadata
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tasks import TASKS, Ask, ifeval, instructions, read_examples  # noqa: E402
from tasks.competition import score_math  # noqa: E402

# Pieces of random arguments and answers, with ~ between two.
ASKED = "Write a haiku about moms.  Use <<titles>>"
TEXTS = f"{ASKED}~sun~ cat ~c.t~(?:war|sun)~[aeiou]~é~ΟΔΟΣ~It~Mom~a_b~Section~ Day ~P.S.~P.P.S~no~!"
PIECES = (
    "war~WAR~sun~cut~mom~é~Straße~ΟΔΟΣ~日本~don't~3.14~co-op~a_b~The~It's~I~q~Q~P. S.~p.p.s"
    "~My answer is yes.~my answer is no.~*~**~***~******~* ~\n* ~\n- ~\n-~--~[~]~[a]~<<~>>~*a*"
    "~```~```json~{~}~{}~[]~null~:~'~\"~”~\n\n***\n\n~\n******\n~,~，~.~?~!~#~;~(~1~2~١~²"
    "~<<a>>~ ~\n~\n\n~\n\n\n~\n \n~\t~\r\n~\x0b~\x85~\u2028"
)
LATEX = (
    "1~2~12~x~k=~abc=~\\frac~\\frac12~\\frac1{72}~\\frac{3}{4}~\\tfrac12~\\dfrac{1}{2}~{~}~/~1/2~x/2"
    "~03/4~-3/4~=~0~0.5~.5~ .~{.~ ~,~-~\\sqrt~\\sqrt3~\\sqrt{2}~\\text{ cm}~\\text{a}~\\%~\\$~\n"
    "~^\\circ~^{\\circ}~\\left(~\\right)~\\\\~\\!~\\pi"
)
Compared = Iterator[tuple[str, object, object, str | None]]  # what, ours, theirs, a known reason


def drawn(pieces: str, most: int = 1) -> str:
    return "".join(random.choices(pieces.split("~"), k=random.randint(1, most)))


def arguments_and_answer(name: str) -> tuple[dict, str]:
    values = {
        instructions.COUNT: random.randint(1, 5),
        instructions.RELATION: random.choice(["less than", "at least"]),
        instructions.LETTER: random.choice("qQtEaz#!"),
        instructions.PATTERNS: random.sample(TEXTS.split("~"), 2),
    }
    kinds = instructions.INSTRUCTIONS[name].kwargs.items()
    kwargs = {field: values.get(kind) or drawn(TEXTS) for field, kind in kinds}
    if "nth_paragraph" in kwargs:
        kwargs["nth_paragraph"] = random.randint(1, kwargs["num_paragraphs"])
    pieces = random.sample(PIECES.split("~"), random.randint(1, 12))
    pieces += 2 * [v for v in [*kwargs.values(), *kwargs.get("keywords", [])] if isinstance(v, str)]
    quote = random.choice(["", "", '"'])
    return kwargs, quote + drawn("~".join(pieces), random.choice([3, 10, 40])) + quote


def compare_ifeval(count: int) -> Compared:
    theirs_of = importlib.import_module("lm_eval.tasks.ifeval.utils").process_results
    names = sorted(instructions.INSTRUCTIONS.keys() - instructions.NEVER_CHECKED)
    for name in names * (count // 2 // len(names)):
        kwargs, answer = arguments_and_answer(name)
        doc = {"key": 0, "prompt": ASKED, "instruction_id_list": [name], "kwargs": [kwargs]}
        example, theirs = {"raw_answers": [name], "kwargs": [kwargs]}, theirs_of(doc, [answer])
        reason = "for # and !, it counts a letter that it draws at random"
        known = kwargs.get("letter") in ("#", "!")
        for how, texts in (("strict", [answer]), ("loose", ifeval.loose_answers(answer))):
            ours, expected = ifeval.verdicts(texts, example), theirs[f"inst_level_{how}_acc"]
            yield f"ifeval {name}", ours, expected, reason if known else None


def compare_math(count: int) -> Compared:
    theirs = importlib.import_module("lm_eval.tasks.hendrycks_math.utils")

    def mended(text: str, fix=theirs.fix_a_slash_b) -> str:
        try:
            return fix(text)
        except ValueError:
            return text

    for _ in range(count):
        one = drawn(LATEX, 5)
        changed = one.replace(" ", "").replace("dfrac", "frac").replace("\\frac12", "1/2")
        other = random.choice([one, changed, f"{one} ", f"{one}\\text{{ m}}", drawn(LATEX, 5)])
        said = f"It is not \\boxed{{3}} but $\\boxed{{{one}}}$."
        boxed = theirs.last_boxed_only_string(said)
        box = boxed and theirs.remove_boxed(boxed)
        ours, expected = score_math(said, [other]), theirs.is_equiv(box, other)
        with mock.patch.object(theirs, "fix_a_slash_b", mended):
            known = theirs.is_equiv(box, other) == ours
        reason = "its fix_a_slash_b raises for x/2; then answers are compared as they stand"
        yield "math", [bool(ours)], [expected], reason if known else None


KNOWN = {  # a task -> text of the harness' prompts, ours, why they differ
    "triviaqa": ("??\n", "?\n", "it puts a second question mark behind the question"),
    "hellaswag": ("it.  ", "it. ", "it puts a second space behind a context that ends in one"),
}
ROWS = {  # each is asked after those before it; mbpp's and math's, after the harness' own examples
    "gsm8k/gsm8k.yaml": [
        {"question": "3 cats & <3> dogs.  How many? ", "answer": "3+3=<<3+3=6>>6\n#### 6"},
        {"question": '{{n}}\'s 1,200 "eggs"?\n', "answer": "So many.\n#### 1,200 "},
    ],
    "triviaqa/default.yaml": [
        {"question": 'Who wrote "B"??', "answer": {"value": "y", "aliases": ["[5]", "y"]}},
        {"question": "It's by whom?", "answer": {"value": "z", "aliases": ["O'z", "z"]}},
    ],
    "arc/arc_easy.yaml": [
        {"question": question, "choices": {"text": texts, "label": [*"12"]}, "answerKey": "2"}
        for question, texts in [("Is?", ["4", "it's"]), ("a\nb", ["4", "[a]"]), ("_", ["x", "y "])]
    ],
    "hellaswag/hellaswag.yaml": [
        {"activity_label": label, "ctx_a": a, "ctx_b": b, "endings": endings, "label": "1"}
        for label, a, b, endings in [
            ("Roof", "Do it. [step]", "", ["a.", "is [x] b."]),
            ("Food", "[header] Eggs [title] Buy. [step] Six.", "", ["b", "[x] Go  [title] R."]),
            ("Snow [now]", " It  snows.", "the KIDS", ["b  b.", "c [title] d."]),
        ]
    ],
    "mbpp/mbpp.yaml": [{"task_id": 11, "text": "'", "code": "x", "test_list": ["a ", "b", "c"]}],
    "minerva_math/minerva_math_algebra.yaml": [{"problem": "$1$?\n", "solution": "\\boxed{2}"}],
}


def our_prompt(name: str, shots: list[dict], row: dict) -> list:
    """Returns the prompt and, in multiple choice, the choices."""
    with tempfile.TemporaryDirectory() as folder:
        before, asked = Path(folder, "shots.jsonl"), Path(folder, "asked.jsonl")
        before.write_text("".join(json.dumps(shot) + "\n" for shot in shots))
        asked.write_text(json.dumps(row))
        ask = Ask(None, plain=True)
        ask = ask.with_shots(TASKS[name].read, before, len(shots)) if shots else ask
        example = read_examples(asked, name, ask)[0]
    return [example["prompt"], example.get("choices")]


def their_prompt(config: dict, shots: list[dict], row: dict) -> list:
    """Returns the same of the harness. Its task reads these rows instead of the hub's."""
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    asked = Dataset.from_list([row])
    rows = {"train": Dataset.from_list(shots or [row]), "validation": asked, "test": asked}
    examples = {"sampler": "first_n"} | config.get("fewshot_config", {})
    changed = {"custom_dataset": lambda **_: rows, "fewshot_config": examples}
    task = ConfigurableTask(config=config | changed)
    choices = task.doc_to_choice(task.eval_docs[0]) if "doc_to_choice" in config else None
    return [task.fewshot_context(task.eval_docs[0], len(shots)), choices]


def compare_prompts(harness: str) -> Compared:
    load_yaml = importlib.import_module("lm_eval.tasks._yaml_loader").load_yaml
    for path, rows in ROWS.items():
        name = path.split("/")[0].removeprefix("minerva_")
        with mock.patch("evaluate.load"):  # mbpp's file asks the hub for a metric
            config = load_yaml(Path(harness, "lm_eval/tasks", path))
        own = config["fewshot_config"]["samples"]() if "fewshot_config" in config else []
        for i, row in enumerate(rows):
            shots = own or rows[:i]
            for count in range(len(shots) + 1):
                ours = our_prompt(name, shots[:count], row)
                theirs = their_prompt(config, shots[:count], row)
                old, new, why = KNOWN.get(name, ("", "", None))
                known = [theirs[0].replace(old, new), theirs[1]] == ours
                yield f"prompts of {name}", ours, theirs, why if known else None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--harness", metavar="CHECKOUT", required=True, help="its git clone")
    parser.add_argument("--count", type=int, default=20000, help="of each kind (default: 20000)")
    args = parser.parse_args()
    if not Path(args.harness, "lm_eval/tasks").is_dir():
        parser.error(f"--harness is {args.harness}; a clone of lm-evaluation-harness is required")
    random.seed(0)
    sys.path.insert(0, args.harness)
    made = {"date": str(datetime.date.today())}
    for name, folder in (("lm_eval", args.harness), ("commit", ROOT)):
        command = ["git", "-C", folder, "describe", "--always", "--dirty"]
        made[name] = subprocess.check_output(command, text=True).strip()
    made |= {name: importlib.metadata.version(name) for name in ("datasets", "jinja2", "nltk")}
    print(", ".join(f"{name} {value}" for name, value in made.items()))
    results, unexplained = {}, 0
    with mock.patch("nltk.data.find"):  # the data of checkers that are not compared
        compared = [*compare_ifeval(args.count), *compare_math(args.count)]
    for what, ours, theirs, reason in compared + [*compare_prompts(args.harness)]:
        row = results.setdefault(what, dict(what=what, compared=0, true=0, differ=0, reason=""))
        row["compared"] += 1
        row["true"] += ours == [True]
        row["differ"] += ours != theirs
        if ours != theirs and reason:
            row["reason"] = reason
        elif ours != theirs:
            unexplained += 1
            print(f"{what}: ours {ours!r}, theirs {theirs!r}")
    print(f"{'what':<54} {'compared':>8} {'true':>6} {'differ':>6}  reason")
    for row in results.values():
        print("{what:<54} {compared:>8} {true:>6} {differ:>6}  {reason}".format(**row))
    summary = {"benchmark": "harness", **made, "results": list(results.values())}
    Path(ROOT, "benchmarks/results/harness.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(json.dumps(summary))
    if unexplained:
        raise SystemExit(f"{unexplained} differences have no known reason")


if __name__ == "__main__":
    main()
