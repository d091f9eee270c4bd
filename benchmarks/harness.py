"""Compares IFEval's verdicts, MATH's scores and prompts with lm-evaluation-harness' own code.

    git clone https://github.com/EleutherAI/lm-evaluation-harness CHECKOUT
    pip install -e "CHECKOUT[ifeval,math]"
    python benchmarks/harness.py --harness CHECKOUT

The code of the checkout is imported and runs; nothing is downloaded. Compared:
- IFEval: strict and loose verdicts of each checked instruction, on random answers and arguments.
  The checkers that need the data of nltk are not among them.
- MATH: which answers are equal, and what stands in the last box, on random pieces of LaTeX.
- Prompts of --plain with 0 and more examples, and the choices, of documents made by hand.
Prints a table, with how often our verdict is true and the reason of each known difference, and one
JSON line last, which it also writes to benchmarks/results/harness.json. A difference without a
known reason ends it with status 1."""

import argparse
import datetime
import importlib
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tasks import TASKS, Ask, read_examples  # noqa: E402
from tasks.competition import are_equal, last_box  # noqa: E402
from tasks.ifeval import loose_answers, verdicts  # noqa: E402
from tasks.instructions import INSTRUCTIONS, NEVER_CHECKED  # noqa: E402

LETTER = "for # and !, it counts a letter that it draws at random"
SLASH = "its fix_a_slash_b raises for x/2, so it compares both answers as they stand"
FBOX = "its remove_boxed refuses \\fbox"

# ------------------------------------------------------------------------------------------
# Random answers, of pieces that rules look for. ~ stands between two pieces.

ASKED = "Write a haiku about moms.  Use <<titles>>"
WORDS = "war~WAR~sun~cat~cut~peace~mother~Mom~é~Straße~ΟΔΟΣ~日本~don't~3.14~co-op~a_b~The~it~I~q~Q"
MARKS = "*~**~***~******~- ~-~--~[~]~[a]~<<~>>~```~{~}~\"~'~”~,~，~.~?~!~#~:~;~(~)~1~2~١~²"
SPACES = " ~ ~ ~\n~\n\n~~\t~\r\n~\x0b~\x0c~\x85~\u2028~\u00a0~\n \n~\n\n\n"
PIECES = {  # of answers to an instruction, beside those above
    "detectable_format:number_bullet_lists": "*~* a~*a~**~** b~-~- c~--~\n~\n~\n\n~ ~\t~\u2028",
    "detectable_format:number_highlighted_sections": "*~*~**~a~b~ ~\n~***~\t",
    "detectable_format:title": "<<~>>~<~>~ ~a~\n~\t",
    "detectable_content:number_placeholders": "[~]~[a]~a~ ~\n~[b",
    "detectable_content:postscript": "P.~p.~S~s~S.~P.S.~P.P.S~ ~\n~Note:",
    "length_constraints:nth_paragraph_first_word": "it~It's~\"It~'it~été~ΟΔΟΣ~ ~\n\n~\n\n~\n~\n\n\n",
    "length_constraints:number_paragraphs": "***~***~****~a~b~ ~\n~\n\n~ *** ",
    "combination:two_responses": "******~******~*~a~b~ ~\n",
    "combination:repeat_prompt": f"{ASKED}~{ASKED.lower()}~{ASKED[:8]}~\n~ ~*~x",
    "detectable_format:multiple_sections": "Section~SECTION~Day~ ~ ~\n~1~2~١~²~x",
    "detectable_format:json_format": '```json~```~```JSON~{~}~"a"~:~1~,~[~]~[]~null~\n~NaN~{}',
    "detectable_format:constrained_response": "My answer is ~yes.~no.~maybe.~*~ ~\n~my",
    "startend:quotation": '"~"~a~ ~\n~*',
    "startend:end_checker": 'in India.~In india. ~"~ ~\n~*~no~NO',
    "punctuation:no_comma": "a~ ~，~、~.~\n~*~b~c~d~e~f~g~,",
}
VALUES = {  # of the arguments of instructions; all others are counts
    "keyword": "sun~war~cat~ cat ~c.t~(?:war|sun)~[aeiou]~é~ΟΔΟΣ~a_b~3.14",
    "letter": "q~Q~t~e~E~a~z~#~!",
    "section_spliter": "Section~SECTION~Day~ Section ~[Ss]ection",
    "postscript_marker": "P.S.~P.P.S~ P.S. ~Note:",
    "end_phrase": "in India.~ in India. ~no~!",
    "prompt_to_repeat": f"{ASKED}~ {ASKED.upper()}~{ASKED[:8]}",
    "first_word": "it~IT~don~ΟΔΟΣ~été~Mom",
}
LATEX = "1~2~12~x~k=~abc=~\\frac~\\frac12~\\frac1{72}~\\frac{3}{4}~\\tfrac12~\\dfrac{1}{2}~{~}~/~1/2~03/4"
LATEX += "~-3/4~x/2~=~0~0.5~.5~ .~{.~ ~,~-~\\sqrt~\\sqrt3~\\sqrt{2}~\\text{ cm}~\\text{a}~\\%~\\$~\\!~\n~\\pi"
LATEX += "~^\\circ~^{\\circ}~\\left(~\\right)~\\\\~\\begin{pmatrix}1\\\\2\\end{pmatrix}"
BOXES = "\\boxed{1}~\\boxed{\\frac{1}{2}}~\\boxed{\\boxed{4}}~\\fbox{3}~ and ~x~$~.~{~}"


def drawn(draw: random.Random, pieces: str, most: int) -> str:
    return "".join(draw.choices(pieces.split("~"), k=draw.randint(1, most)))


def answer_to(name: str, draw: random.Random) -> str:
    if name in PIECES and draw.random() < 0.6:
        return drawn(draw, PIECES[name], draw.choice([4, 8, 30]))
    few = draw.sample(f"{WORDS}~{MARKS}".split("~"), draw.randint(1, 40))
    return "".join(draw.choice(few) + drawn(draw, SPACES, 1) for _ in range(draw.randint(0, 40)))


def arguments_of(name: str, draw: random.Random) -> dict:
    given = {}
    for field in INSTRUCTIONS[name].kwargs:
        if field in ("keywords", "forbidden_words"):
            given[field] = draw.sample(VALUES["keyword"].split("~"), draw.randint(1, 3))
        elif field.endswith("relation"):
            given[field] = draw.choice(["less than", "at least"])
        else:
            given[field] = drawn(draw, VALUES[field], 1) if field in VALUES else draw.randint(1, 5)
    if "nth_paragraph" in given:
        given["nth_paragraph"] = draw.randint(1, given["num_paragraphs"])
    return given


# ------------------------------------------------------------------------------------------
# What is compared: (what, our result, theirs, the reason if a difference is known)

Compared = Iterator[tuple[str, object, object, str | None]]


def compare_ifeval(count: int) -> Compared:
    draw = random.Random(0)
    random.seed(0)  # of the letters that the harness draws
    theirs_of = importlib.import_module("lm_eval.tasks.ifeval.utils").process_results
    for name in sorted(INSTRUCTIONS.keys() - NEVER_CHECKED):
        for _ in range(count // 2 // (len(INSTRUCTIONS) - len(NEVER_CHECKED))):
            answer, kwargs = answer_to(name, draw), arguments_of(name, draw)
            doc = {"key": 0, "prompt": ASKED, "instruction_id_list": [name], "kwargs": [kwargs]}
            example, theirs = {"raw_answers": [name], "kwargs": [kwargs]}, theirs_of(doc, [answer])
            reason = LETTER if kwargs.get("letter") in ("#", "!") else None
            for how, texts in (("strict", [answer]), ("loose", loose_answers(answer))):
                expected = theirs[f"inst_level_{how}_acc"]
                yield f"ifeval {name}", verdicts(texts, example), expected, reason


def compare_math(count: int) -> Compared:
    draw = random.Random(0)
    theirs = importlib.import_module("lm_eval.tasks.hendrycks_math.utils")
    slash = theirs.fix_a_slash_b

    def mended(text: str) -> str:
        try:
            return slash(text)
        except ValueError:
            return text

    for _ in range(count // 2):
        one = drawn(draw, LATEX, 5)
        changed = one.replace(" ", "").replace("dfrac", "frac").replace("\\frac12", "1/2")
        other = draw.choice([one, changed, f"{one} ", f"{one}\\text{{ m}}", drawn(draw, LATEX, 5)])
        ours, expected = are_equal(one, other), theirs.is_equiv(one, other)
        with mock.patch.object(theirs, "fix_a_slash_b", mended):
            reason = SLASH if theirs.is_equiv(one, other) == ours else None
        yield "math, equal answers", [ours], [expected], reason
    for _ in range(count // 2):
        text = drawn(draw, BOXES, 4)
        boxed = theirs.last_boxed_only_string(text)
        try:
            expected = boxed and theirs.remove_boxed(boxed)
        except AssertionError:
            expected = "refused"
        reason = FBOX if (boxed or "").startswith("\\fbox") else None
        yield "math, last box", last_box(text), expected, reason


CONFIGS = {  # a task -> the harness' file
    "gsm8k": "gsm8k/gsm8k.yaml",
    "triviaqa": "triviaqa/default.yaml",
    "arc": "arc/arc_easy.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "mbpp": "mbpp/mbpp.yaml",
    "math": "minerva_math/minerva_math_algebra.yaml",
}
KNOWN = {  # a task -> text of the harness' prompts, ours, why they differ
    "triviaqa": ("??\n", "?\n", "it puts a second question mark behind the question"),
    "hellaswag": ("it.  ", "it. ", "it puts a second space behind a context that ends in one"),
}
ROWS = {  # each is asked after those before it; mbpp's and math's, after the harness' own examples
    "gsm8k": [
        {"question": "3 cats & <3> dogs.  How many? ", "answer": "3+3=<<3+3=6>>6\n#### 6"},
        {"question": 'Sam\'s 1,200 "eggs"?', "answer": "So many.\n#### 1,200 "},
        {"question": "{{n}} is?\n", "answer": "#### 3"},
    ],
    "triviaqa": [
        {"question": "Who wrote A?", "answer": {"value": "x", "aliases": ["O'x", "x", "x"]}},
        {"question": 'Who wrote "B"??', "answer": {"value": "y", "aliases": ["[5]", "y"]}},
        {"question": "It's by whom?", "answer": {"value": "z", "aliases": ['"z"']}},
    ],
    "arc": [
        {"question": question, "choices": {"text": texts, "label": labels}, "answerKey": labels[1]}
        for question, texts, labels in [
            ("Is?", ["one", "it's", "3"], ["1", "2", "3"]),
            ("a\nb?", ["[a]", "4", "b  b"], ["A", "B", "C"]),
            ("Which_", ["x", "y"], ["A", "B"]),
        ]
    ],
    "hellaswag": [
        {"activity_label": label, "ctx_a": a, "ctx_b": b, "endings": endings, "label": "1"}
        for label, a, b, endings in [
            ("Roof", "A man sits.", "he", ["a.", "is [x] b."]),
            (
                "Food",
                "[header] Eggs [title] Buy. [step] Six.",
                "",
                ["b", "[substeps] Go  [title] R."],
            ),
            ("Snow [now]", " It  snows.", "the KIDS", ["b  b.", "c [title] d."]),
            ("Step", "Do it. [step]", "", ["a.", "b."]),
            ("Dogs", "A dog runs.", "it", ["sits.", "flies."]),
        ]
    ],
    "mbpp": [{"task_id": 11, "text": "'x'.", "code": "x", "test_list": ["assert f(1) ", "2", "3"]}],
    "math": [{"problem": "What is $1+1$?\n[asy]x[/asy]", "solution": "It is $\\boxed{2}$."}],
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
    doc = task.eval_docs[0]
    choices = task.doc_to_choice(doc) if "doc_to_choice" in config else None
    return [task.fewshot_context(doc, len(shots)), choices]


def compare_prompts(harness: str) -> Compared:
    load_yaml = importlib.import_module("lm_eval.tasks._yaml_loader").load_yaml
    for name, path in CONFIGS.items():
        with mock.patch("evaluate.load"):  # mbpp's file asks the hub for a metric
            config = load_yaml(Path(harness, "lm_eval/tasks", path))
        own = config["fewshot_config"]["samples"]() if "fewshot_config" in config else []
        for i, row in enumerate(ROWS[name]):
            shots = own or ROWS[name][:i]
            for count in range(len(shots) + 1):
                ours = our_prompt(name, shots[:count], row)
                theirs = their_prompt(config, shots[:count], row)
                old, new, why = KNOWN.get(name, ("", "", None))
                known = [theirs[0].replace(old, new), theirs[1]] == ours
                yield f"prompts of {name}", ours, theirs, why if known else None


def version_of(folder: str | Path) -> str:
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--harness", metavar="CHECKOUT", required=True, help="its git clone")
    parser.add_argument("--count", type=int, default=20000, help="of each kind (default: 20000)")
    args = parser.parse_args()
    sys.path.insert(0, args.harness)
    made = {"harness": version_of(args.harness), "commit": version_of(ROOT)}
    made |= {name: metadata.version(name) for name in ("datasets", "jinja2", "nltk")}
    made |= {"date": str(datetime.date.today())}
    print(", ".join(f"{name} {value}" for name, value in made.items()))
    results: dict[str, dict] = {}
    with mock.patch("nltk.download"):  # data of checkers that are not compared
        compared = [*compare_ifeval(args.count), *compare_math(args.count)]
    for what, ours, theirs, reason in compared + [*compare_prompts(args.harness)]:
        row = {"what": what, "compared": 0, "true": 0, "differ": 0, "unexplained": 0, "reason": ""}
        row = results.setdefault(what, row)
        row["compared"] += 1
        row["true"] += ours == [True]
        if ours != theirs:
            row["differ"] += 1
            row["unexplained"] += reason is None
            row["reason"] = reason or row["reason"]
            if reason is None:
                print(f"{what}: ours {ours!r}, theirs {theirs!r}")
    print(f"{'what':<54} {'compared':>8} {'true':>6} {'differ':>6}  reason")
    for row in results.values():
        print("{what:<54} {compared:>8} {true:>6} {differ:>6}  {reason}".format(**row))
    summary = {"benchmark": "harness", **made, "results": list(results.values())}
    path = ROOT / "benchmarks/results/harness.json"
    path.write_text(json.dumps(summary, indent=1) + "\n")
    print(json.dumps(summary))
    if unexplained := sum(row["unexplained"] for row in results.values()):
        raise SystemExit(f"{unexplained} differences without a known reason")


if __name__ == "__main__":
    main()
