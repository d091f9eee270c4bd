"""README.md and docs/ say what is so. Files that they name exist, flags are those of the real
parsers, links lead somewhere, and commands on the demo's base run as they stand, on less data. The
recipes of docs/changing_the_code.md are applied to a copy of the project, and work."""

import contextlib
import difflib
import importlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed.run
from conftest import ROOT, make_oracle, one_by_one, write_checkpoint

from config import read_keys
from training.config import TrainConfig

README = ROOT / "README.md"
RECIPES = ROOT / "docs/changing_the_code.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = (
    "overlap",
    "train",
    "train_ep",
    "compare",
    "select_experts",
    "eval",
    "generate",
    "merge",
    "data",
)  # files with command_line()
NOT_HERE = ("checkpoints/", "datasets/", "deepseek-ai/", "mine.jsonl", "DIR")  # a reader has them
OUTSIDE = ("pip install", "hf download", "git clone", "cp -r")  # commands of others


def blocks(page: Path) -> tuple[str, str]:
    """Returns the page's prose, without its blocks, and its indented lines."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    lines = text.splitlines()
    shown = [line.strip() for line in lines if line.startswith("    ")]
    return "\n".join(line for line in lines if not line.startswith("    ")), "\n".join(shown)


def commands(page: Path) -> list[list[str]]:
    """Returns the page's commands as lists of words, in order, without comments."""
    joined = blocks(page)[1].replace("\\\n", " ")
    starts = ("python ", "torchrun ", *OUTSIDE)
    lines = [line for line in joined.splitlines() if line.startswith(starts)]
    return [shlex.split(c, comments=True) for line in lines for c in line.split("&&")]


def inline(page: Path) -> list[str]:
    """Returns the code in the page's sentences and tables. The first column of the tables of
    from_the_original.md is about the original."""
    prose = blocks(page)[0]
    if page.name == "from_the_original.md":
        prose = re.sub(r"^\|[^|]*\|", "|", prose, flags=re.M)
    return re.findall(r"`([^`]+)`", prose)


def script_of(words: list[str]) -> tuple[str, list[str]]:
    """Returns the file that a command runs, and its arguments."""
    place = next(i for i, word in enumerate(words) if word.endswith(".py"))
    return words[place], words[place + 1 :]


def parser_of(script: str):
    return importlib.import_module(script.removesuffix(".py")).command_line()


def flags_of(*parsers) -> set[str]:
    return {flag for parser in parsers for flag in parser._option_string_actions}


def ids(path: Path) -> str:
    return path.name


# ------------------------------------------------------------------------------------------
# What the pages name


def test_the_readme_is_one_screen_and_a_page():
    text = README.read_text()
    assert len(text.split()) <= 1200 and len(text.splitlines()) <= 150
    assert max(map(len, text.splitlines())) <= 100
    assert "pip install -r requirements.txt && python train.py --config configs/demo.toml\n" in text
    assert (
        "pip install -r tests/requirements.txt && python -m pytest -n 2 --dist loadfile\n" in text
    )
    for command in re.findall(r"^pip install -r .*", (ROOT / ".ci/run").read_text(), flags=re.M):
        assert f"    {command}\n" in text
    assert (ROOT / "docs/report.png").stat().st_size <= 200_000


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_commands_name_what_exists(page):
    for words in commands(page):
        if " ".join(words).startswith(OUTSIDE) or words[:3] == ["python", "-m", "pytest"]:
            files = [word for word in words if word.endswith((".py", ".txt"))]
            assert all((ROOT / file).is_file() for file in files), words
            continue
        script, arguments = script_of(words)
        assert (ROOT / script).is_file(), words
        if words[0] == "torchrun":
            torch.distributed.run.get_args_parser().parse_args(words[1:])
        else:
            assert words[:2] == ["python", script]
        if script.removesuffix(".py") in COMMANDS:
            if page == RECIPES or "--help" in words:  # the recipes' commands run below
                continue
            parsed = parser_of(script).parse_args(arguments)
            if getattr(parsed, "config", None) and "FILE" not in parsed.config:
                read_keys(TrainConfig, parsed, parsed.config)  # types, choices, bounds
        else:  # a benchmark, which takes long to import
            known = (ROOT / script).read_text() + (ROOT / "benchmarks/v2_lite.py").read_text()
            assert all(f'"{word}"' in known for word in arguments if word.startswith("--")), words


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_flags_and_files_in_sentences_exist(page):
    known = flags_of(*map(parser_of, COMMANDS), torch.distributed.run.get_args_parser())
    known |= {"--help", "--shutdown-timeout"}  # the second one is torchrun's from torch 2.13 on
    keys = TrainConfig.__dataclass_fields__
    folders = {path.name for path in ROOT.iterdir() if path.is_dir()}
    for code in inline(page):
        unknown = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", code)) - known
        assert not unknown, f"{unknown} in `{code}`"
        if setting := re.fullmatch(r"(\w+) = \S+", code):
            assert setting[1] in keys, code
        for name in re.findall(r"[\w./*-]+\.(?:py|md|toml|sh)\b|\b[\w/]+/", code):
            first = name.split("/")[0]
            if "*" in name or name == "FILE.toml" or name.startswith("../"):
                continue
            if first in folders - {"runs"} or name.endswith((".py", ".md")):
                assert (ROOT / name).exists(), f"{name} in `{code}`"


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", blocks(page)[0].replace("\n", "")):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        there = (page.parent / name).resolve() if name else page
        assert there.is_file(), target
        if anchor:
            text = there.read_text()
            headings = re.findall(r"^#+ (.*)", text, flags=re.M)
            slugs = [re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings]
            assert anchor in slugs, target


def test_the_reading_order_names_functions_that_exist():
    named = {
        "select_experts": ("collect_scores", "select"),
        "adapter": ("mark_trainable", "load_adapter"),
        "train": ("compute_gradients",),
    }
    text = README.read_text() + (ROOT / "docs/from_the_original.md").read_text()
    for module, names in named.items():
        assert all(hasattr(importlib.import_module(module), name) for name in names), module
        assert all(f"`{name}`" in text for name in (*names, f"{module}.py"))


def test_every_page_is_in_the_readme():
    linked = re.findall(r"\]\((docs/[^)#]+)", README.read_text())
    assert {path.relative_to(ROOT).as_posix() for path in PAGES[1:]} <= set(linked)


def test_every_file_is_in_the_readme():
    section = README.read_text().split("## Files")[1].split("## Where")[0]
    named = set(re.findall(r"`([^`]+)`", section))
    files = {path.name for path in ROOT.glob("*.py")}
    folders = {f"{p.parent.name}/" for p in ROOT.glob("*/__init__.py")}
    assert files | folders <= named


def test_a_figure_stands_once():
    """A number with a thousands separator is a measurement or a count: it is on one page."""
    pages: dict[str, set[str]] = {}
    for page in PAGES:
        for number in re.findall(r"\b\d{1,3}(?:,\d{3})+\b", page.read_text()):
            pages.setdefault(number, set()).add(page.name)
    assert not {number: names for number, names in pages.items() if len(names) > 1}


def test_code_and_configs_name_pages_that_exist():
    files = [*ROOT.glob("*.py"), *ROOT.glob("*/*.py"), *ROOT.glob("*/*.toml")]
    for path in files:
        for name in re.findall(r"\b(?:docs/[\w-]+\.md|configs/\w+\.toml)\b", path.read_text()):
            assert (ROOT / name).is_file(), f"{path}: {name}"


# ------------------------------------------------------------------------------------------
# Commands on the demo's base


def small_copy(folder: Path) -> Path:
    """Returns `folder` with the demo's base, few rows of its data, and its config at one step."""
    (folder / "demo/data").mkdir(parents=True)
    (folder / "demo/base").symlink_to(ROOT / "demo/base")
    for path in (ROOT / "demo/data").glob("*.jsonl"):
        rows = path.read_text().splitlines(keepends=True)
        few = rows[: 24 if "train" in path.name else 4]
        (folder / "demo/data" / path.name).write_text("".join(few))
    shutil.copytree(ROOT / "configs", folder / "configs")
    demo = folder / "configs/demo.toml"
    text = re.sub(r"^steps = .*", "steps = 1", demo.read_text(), flags=re.M)
    text = re.sub(r"^batch_size = .*", "batch_size = 2", text, flags=re.M)
    demo.write_text(re.sub(r"^max_new_tokens = .*", "max_new_tokens = 2", text, flags=re.M))
    return folder


def runs_here(words: list[str]) -> bool:
    """Whether a command is about the demo, on one process."""
    line = " ".join(words)
    if words[0] != "python" or words[1] == "-m" or words[1].startswith("benchmarks/"):
        return False
    return "configs/esft" not in line and not any(name in line for name in NOT_HERE)


def run(words: list[str]) -> str:
    """Runs a command in this process, with a question on a pipe. Returns what it printed."""
    script, arguments = script_of(words)
    out, question = io.StringIO(), io.TextIOWrapper(io.BytesIO(b"Copy: cat\n"))
    patched = mock.patch.multiple(sys, argv=[script, *arguments], stdin=question)
    with patched, contextlib.redirect_stdout(out):
        try:
            importlib.import_module(script.removesuffix(".py")).main()
        except SystemExit as end:
            assert not end.code, (words, end.code, out.getvalue())
    return out.getvalue()


DEMO = ["python", "train.py", "--config", "configs/demo.toml"]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Yields what the README's first command prints. The working folder is the small copy."""
    here, threads = os.getcwd(), torch.get_num_threads()
    os.chdir(small_copy(tmp_path_factory.mktemp("small")))
    torch.set_num_threads(1)
    yield run(DEMO)
    torch.set_num_threads(threads)
    os.chdir(here)


@pytest.mark.parametrize("page", [p for p in PAGES if p != RECIPES], ids=ids)
def test_commands_on_the_demo_run(page, small):
    """The page's commands run in order, after the README's first one."""
    for words in commands(page):
        if runs_here(words) and words != DEMO:
            run(words)
            named = [b for a, b in zip(words, words[1:]) if a in ("--output", "--plot")]
            assert all(Path(name).exists() for name in named), words


def test_the_readme_shows_what_the_demo_prints(small):
    """Numbers apart: the small copy gives others."""

    def form(line: str) -> str:
        line = re.sub(r"\d[\d.,]*", "N", line).replace("report.png, ", "")
        return " ".join(re.sub("learned|forgotten|as before", "M", line).split())

    starts = ("evaluation ", "intent_test", "general_test", "esft: trained", "wrote ")
    shown = [line for line in blocks(README)[1].splitlines() if line.startswith(starts)]
    printed = [form(line) for line in small.splitlines()]
    assert len(shown) == 5 and all(form(line) in printed for line in shown)


# ------------------------------------------------------------------------------------------
# The recipes


def recipes() -> dict[str, list[tuple[str, str, str]]]:
    """Returns the recipes of the page: section -> (file, old text, new text) of each block. Old
    text is "" for a new file."""
    found: dict[str, list[tuple[str, str, str]]] = {}
    page = RECIPES.read_text()
    for section in re.split(r"^## ", page, flags=re.M)[1:]:
        edits = []
        for kind, body in re.findall(r"^```(\S.*?)\n(.*?)^```$", section, flags=re.M | re.S):
            if kind == "diff":
                head, *lines = body.splitlines(keepends=True)
                old = "".join(line[1:] or line for line in lines if line[0] != "+")
                new = "".join(line[1:] or line for line in lines if line[0] != "-")
                edits.append((head.removeprefix("+++ ").strip(), old, new))
            else:
                edits.append((kind.removeprefix("python title="), "", body))
        found[section.splitlines()[0]] = edits
    return found


def test_recipes_touch_one_file_in_a_handful_of_lines():
    named = ["A new selection rule", "A new task", "A new gate", "A new family"]
    assert list(recipes()) == named
    for section, edits in recipes().items():
        assert len({file for file, _, _ in edits}) == 1, section
        changed = [difflib.ndiff(old.splitlines(), new.splitlines()) for _, old, new in edits]
        new_lines = sum(line.startswith("+ ") for diff in changed for line in diff)
        assert new_lines <= 10, (section, new_lines)


RUN_ALL = """
import json, runpy, sys
for words in json.loads(sys.argv[1]):
    sys.argv = words
    try:
        runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise RuntimeError(f"{words}: {end.code}")
"""


def save_kimi_vl(folder: Path) -> None:
    """A small Kimi-VL, and its language model alone as a V3."""
    oracle = make_oracle(1, "deepseek_v3", vocab_size=2048)
    config = {**json.loads(oracle.config.to_json_string()), "model_type": "deepseek_v3"}
    tensors = one_by_one(oracle.state_dict())
    write_checkpoint(folder / "V3", config, tensors)
    whole = {f"language_model.{name}": tensor for name, tensor in tensors.items()}
    whole |= {"vision_tower.patch_embed.proj.bias": torch.ones(4)}
    whole |= {"multi_modal_projector.pre_norm.weight": torch.ones(4)}
    vl = folder / "Kimi-VL-A3B-Instruct"
    write_checkpoint(vl, {"model_type": "kimi_vl", "text_config": config}, whole)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        for base in (folder / "V3", vl):
            shutil.copy(ROOT / "demo/base" / name, base)


def test_recipes_work(tmp_path):
    """All four, applied to one copy of the project, whose commands run in one process."""
    small_copy(tmp_path)
    save_kimi_vl(tmp_path / "checkpoints")
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    for package in ROOT.glob("*/__init__.py"):
        shutil.copytree(package.parent, tmp_path / package.parent.name)
    for edits in recipes().values():
        for file, old, new in edits:
            text = (tmp_path / file).read_text() if old else ""
            assert not old or text.count(old) == 1, f"{file} must have once:\n{old}"
            assert old or not (tmp_path / file).exists(), file
            (tmp_path / file).write_text(text.replace(old, new) if old else new)
    words = [words[1:] for words in commands(RECIPES)]
    assert len(words) == 7
    plain = "select_experts.py --model demo/base --data demo/data/intent_train.jsonl".split()
    words.append([*plain, "--n_sample_tokens", "4096", "--output", "plain_cfg.json"])
    (vl,) = (each for each in words if "vl_cfg.json" in each)
    names = {"checkpoints/Kimi-VL-A3B-Instruct": "checkpoints/V3", "vl_cfg.json": "v3_cfg.json"}
    words.append([names.get(word, word) for word in vl])
    done = subprocess.run(
        [sys.executable, "-c", RUN_ALL, json.dumps(words)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr

    def read(name: str):
        return json.loads((tmp_path / name).read_text())

    plain, even = read("plain_cfg.scores.json"), read("even_cfg.scores.json")
    layers = plain["token_scores"]
    busy = {
        layer: [int(e) for e in row if row[e] >= 2 * sum(row.values()) / len(row)]
        for layer, row in layers.items()
    }
    assert read("busy_cfg.json")["experts"] == busy and any(busy.values())
    assert read("runs/busy/expert_cfg.json")["experts"].keys() == busy.keys()

    rows = [json.loads(line) for line in (tmp_path / "begins.jsonl").read_text().splitlines()]
    assert len(rows) == 4
    for row in rows:
        answers = [answer.strip() for answer in row["example"]["raw_answers"]]
        said = row["example"]["raw_prediction"].strip()
        assert row["score"] == any(said.startswith(answer) for answer in answers)
    assert any(row["score"] for row in rows)
    assert read("runs/begins/results.json")["after"]

    # The first layer sees the same tokens, chooses the same experts, and weighs them less.
    first = min(layers, key=int)
    assert even["token_scores"][first] == layers[first]
    runs = [read(f"runs/{name}/expert_cfg.scores.json") for name in ("busy", "even")]
    for ones, others in ((plain, even), runs):
        gates = [sum(scores["gate_scores"][first].values()) for scores in (ones, others)]
        assert gates[1] < 0.9 * gates[0]
    assert "router_temperature=2.0" in str(read("runs/even/train_config.json"))
    assert read("vl_cfg.scores.json") == read("v3_cfg.scores.json")
