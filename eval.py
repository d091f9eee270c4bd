"""The evaluator: greedy decoding, likelihoods, tasks and their metrics; the paper's table from one
command.

    python eval.py --model BASE --adapter A --adapter B --base \
        --task intent --data intent.jsonl --task humaneval --data HumanEval.jsonl.gz --output DIR

Completions are saved one a line in the published shape:
{"example": {"prompt", "raw_prediction", "raw_answers"}, "score"}, with more fields where a task
needs them to be scored again.

Dimensions, as in the comments: B rows, T tokens of a row, D hidden size, N wanted tokens.
"""

import argparse
import csv
import glob
import hashlib
import http.client
import json
import math
import os
import re
import shlex
import signal
import string
import sys
import textwrap
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from statistics import fmean

import torch
import torch.distributed
from torch import Tensor
from tqdm import tqdm

from data import (
    CHAT_FORMATS,
    Tokenizer,
    by_length,
    check_chat_tokens,
    encode_file,
    is_text,
    load_tokenizer,
    pad,
    read_rows,
    text_field,
)
from model import (
    FEW_TOKENS,
    Cache,
    ModelConfig,
    MoE,
    Transformer,
    check_device,
    check_output_file,
    choose_dtype,
    experts_grouped,
    fingerprint,
    load_adapter,
    load_model,
    local_directory,
    locked,
    read_adapter,
    read_checkpoint,
    read_json,
    replacing,
    write_json,
)
from sandbox import missing_guards, run_programs

# ------------------------------------------------------------------------------------------
# Decoding


PREFILL_TOKENS = 2**14  # of prompts that one pass takes, padding included
COMPILED_STEPS = 4000  # so many steps of a large model pay for their compilation
STEPS_BETWEEN_LOOKS = 16  # a look at whether all rows have ended waits for the GPU


def generate(
    model: Transformer,
    prompts: list[list[int]],
    max_new_tokens: int,
    eos_id: int,
    batch_size: int = 64,
) -> list[list[int]]:
    """Greedy continuations of prompts of any lengths, in their order, without the `eos_id` that
    ends them. A row of a batch does not depend on the others. Raises ValueError for an empty
    prompt."""
    completions: list[list[int]] = [[] for _ in prompts]
    for batch, rows in generate_batches(model, prompts, max_new_tokens, eos_id, batch_size):
        for i, row in zip(batch, rows):
            completions[i] = row
    return completions


@torch.inference_mode()
def generate_batches(
    model: Transformer,
    prompts: list[list[int]],
    max_new_tokens: int,
    eos_id: int,
    batch_size: int,
) -> Iterator[tuple[list[int], list[list[int]]]]:
    """`generate`, batch by batch: the numbers of the prompts, and their continuations. Prompts of
    like length share a batch. The step is compiled where a GPU has so many ahead that this pays."""
    if not all(prompts):
        raise ValueError(f"prompt {prompts.index([])} is empty; at least one token is required")
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    on_gpu = model.lm_head.weight.is_cuda
    large = sum(p.numel() for p in model.parameters()) > 1e9
    long = len(batches) * max_new_tokens >= COMPILED_STEPS
    compiled = on_gpu and large and long and can_be_captured(model, batch_size)
    if compiled:
        print("decoding: the step is compiled first, for 10 to 60 seconds", flush=True)
    decoder, new, begin = None, 0, time.perf_counter()
    with tqdm(total=len(prompts), desc="decode", unit="prompt", leave=False, disable=None) as bar:
        for batch in batches:
            if decoder is None or not on_gpu:  # a GPU keeps one, whose step is captured
                longest = len(prompts[order[-1] if on_gpu else batch[-1]])
                length = -(-(longest + max_new_tokens) // 64) * 64  # few shapes to compile
                sizes = len(batch), length, max_new_tokens
                decoder = Decoder(model, *sizes, eos_id, compiled)
            rows = decoder([prompts[i] for i in batch])
            new += sum(map(len, rows))
            bar.update(len(batch))
            seconds = time.perf_counter() - begin
            bar.set_postfix_str(f"{new / seconds:,.0f} tokens/s")
            yield batch, rows
    if prompts:
        speed = f"{new:,} tokens in {seconds:,.1f} s, {new / seconds:,.0f} tokens/s"
        print(f"decoded {len(prompts)} prompts: {speed}", flush=True)


class Decoder:
    """Greedy decoding of batches of up to `rows` prompts, over one cache of `length` tokens a row.

    On a GPU the step is captured once in a CUDA graph, so that a replay is all that the host does:
    buffers keep their place, and a batch with fewer prompts has idle rows. Call it, and its
    methods, in torch.inference_mode."""

    def __init__(
        self,
        model: Transformer,
        rows: int,
        length: int,
        max_new_tokens: int,
        eos_id: int,
        compiled: bool = False,
    ):
        self.model, self.eos_id, self.compiled = model, eos_id, compiled
        self.weight = model.lm_head.weight
        device = self.weight.device
        self.cache = Cache.empty(model.config, rows, length, self.weight)
        self.new = torch.zeros(rows, max_new_tokens, dtype=torch.int64, device=device)
        self.count = torch.zeros(1, dtype=torch.int64, device=device)  # of new tokens
        self.token = torch.zeros(rows, 1, dtype=torch.int64, device=device)  # the last one
        self.done = torch.ones(rows, dtype=torch.bool, device=device)
        self.graph, self.steps_between_looks = None, 1
        if self.weight.is_cuda:
            self.steps_between_looks = STEPS_BETWEEN_LOOKS
            if can_be_captured(model, rows):
                with torch.cuda.device(device):
                    self.capture()
            else:
                print("decoding: without a CUDA graph; this expert path waits for the GPU")

    def capture(self) -> None:
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compiles, and takes the memory that libraries need
            self.eager_step()
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph, stream=stream):  # its own default may be another GPU's
            self.eager_step()
        self.graph = graph

    def step(self) -> None:
        self.graph.replay() if self.graph else self.eager_step()

    def eager_step(self) -> None:
        hidden, _ = self.model.hidden_states(self.token, self.cache, compiled=self.compiled)
        self.append(hidden[:, 0])

    def append(self, hidden: Tensor) -> None:
        """Chooses the next token of each row from its final state (B, D)."""
        token = self.model.lm_head(hidden).argmax(-1).masked_fill(self.done, self.eos_id)
        self.done |= token == self.eos_id
        self.new.index_copy_(1, self.count, token[:, None])
        self.count += 1
        self.token.copy_(token[:, None])

    def prefill(self, prompts: list[list[int]]) -> None:
        """Runs the prompts, in one pass unless they hold more than PREFILL_TOKENS, and chooses the
        first new token of each."""
        self.count.zero_()
        self.cache.seen.zero_()
        self.done.fill_(True)
        self.done[: len(prompts)] = False
        hidden = self.weight.new_zeros(len(self.done), self.weight.shape[1])  # (B, D)
        rows = max(PREFILL_TOKENS // max(map(len, prompts)), 1)
        for start in range(0, len(prompts), rows):
            part = slice(start, min(start + rows, len(prompts)))
            tokens = pad(prompts[part], self.eos_id).to(self.weight.device)  # padded at the end
            lengths = torch.tensor([len(p) for p in prompts[part]], device=self.weight.device)
            cache = Cache(self.cache.layers[:, part], torch.zeros_like(lengths))
            states, _ = self.model.hidden_states(tokens, cache)
            hidden[part] = states[torch.arange(len(lengths)), lengths - 1]
            self.cache.seen[part] = lengths  # new tokens overwrite the padding
        self.append(hidden)

    def __call__(self, prompts: list[list[int]]) -> list[list[int]]:
        """The new tokens of each prompt, up to the end of sequence."""
        self.prefill(prompts)
        steps = 1
        while steps < self.new.shape[1]:
            if steps % self.steps_between_looks == 0 and self.done.all():
                break
            self.step()
            steps += 1
        rows = self.new[: len(prompts), :steps].tolist()
        return [row[: row.index(self.eos_id)] if self.eos_id in row else row for row in rows]


def can_be_captured(model: Transformer, rows: int) -> bool:
    """Whether no layer of a step waits for the GPU."""
    moes = [block.mlp for block in model.model.layers if isinstance(block.mlp, MoE)]
    if any(moe.run_experts is not experts_grouped or not moe.is_whole for moe in moes):
        return False
    few = rows <= FEW_TOKENS and not any(moe.has_lora for moe in moes)
    return few or model.lm_head.weight.dtype == torch.bfloat16  # else grouped_mm is a loop


# ------------------------------------------------------------------------------------------
# Likelihoods


@torch.inference_mode()
def likelihoods(
    model: Transformer,
    rows: list[list[int]],
    wanted: list[list[tuple[int, int]]],
    max_tokens: int = 16384,
    chunk: int = 2048,
) -> Iterator[tuple[list[int], list[Tensor], list[Tensor]]]:
    """Log-probabilities of tokens that follow given ones. For each of `rows` of tokens, `wanted`
    lists (length, token): how likely is `token` after the row's first `length` tokens?

    Yields batches: the numbers of the rows; for each, float32 on the CPU, the log-probabilities
    (N,); and whether greedy decoding would choose the token (N,). Logits exist for `chunk` wanted
    tokens at a time."""
    device = model.lm_head.weight.device
    for batch in by_length([len(row) for row in rows], max_tokens):
        states, _ = model.hidden_states(pad([rows[i] for i in batch], 0).to(device))
        flat = [(b, n - 1, token) for b, i in enumerate(batch) for n, token in wanted[i]]
        b, position, target = torch.tensor(flat, device=device).unbind(1)
        logs, hits = [], []
        for state, token in zip(states[b, position].split(chunk), target.split(chunk)):
            logits = model.lm_head(state).float()  # (N, V)
            chosen = logits.gather(1, token[:, None])[:, 0]
            logs.append(chosen - logits.logsumexp(1))
            hits.append(logits.argmax(1) == token)
        sizes = [len(wanted[i]) for i in batch]
        yield batch, torch.cat(logs).cpu().split(sizes), torch.cat(hits).cpu().split(sizes)


def following(ids: list[int], start: int) -> list[tuple[int, int]]:
    """For `likelihoods`: every token from place `start` (1 or later) on."""
    return [(n, ids[n]) for n in range(start, len(ids))]


# ------------------------------------------------------------------------------------------
# Examples: from the rows of a published file to what a model is asked
#
# An example holds the prompt as the model sees it, the accepted answers, and what else its score
# needs. Readers raise ValueError that names file, line and field.


@dataclass
class Ask:
    """How a question becomes a prompt: in the chat format, or for a base model `plain`."""

    tokenizer: Tokenizer
    plain: bool = False
    context: int | None = None  # tokens that the model was made for

    def __call__(self, chat: str, plain: str) -> str:
        if self.plain:
            return plain
        check_chat_tokens(self.tokenizer, "questions")
        return CHAT_FORMATS[self.tokenizer.chat_format].user.format(chat)


def by_row(read: Callable[[dict, str, Ask], dict]) -> Callable[[str | Path, Ask], list[dict]]:
    """A reader of files from a reader of rows."""
    return lambda path, ask: [read(row, where, ask) for where, row in read_rows(path)]


def typed_field(row: dict, name: str, kind, where: str):
    """A field of a row: an object (dict) or a number (float | int). Raises ValueError."""
    value = row.get(name)
    if not isinstance(value, kind):
        needed = {dict: "an object"}.get(kind, "a number")
        raise ValueError(f"{where}: field {name} is {value!r:.60}; {needed} is required")
    return value


def text_list(row: dict, name: str, where: str, least: int = 1) -> list[str]:
    value = row.get(name)
    if not isinstance(value, list) or len(value) < least or not all(map(is_text, value)):
        many = f" of at least {least}" if least > 1 else ""
        raise ValueError(
            f"{where}: field {name} is {value!r:.60}; a list of strings{many} is required"
        )
    return value


def read_answers(row: dict, where: str, ask: Ask | None = None) -> dict:
    """{"prompt", "raw_answers"}; the prompt already carries its chat format."""
    if row.get("raw_answers") is None and ("messages" in row or "completion" in row):
        raise ValueError(f"{where}: field raw_answers is missing; this looks like a training file")
    answers = text_list(row, "raw_answers", where)
    return {"prompt": text_field(row, "prompt", where), "raw_answers": answers}


def read_intent(row: dict, where: str, ask: Ask | None = None) -> dict:
    example = read_answers(row, where)
    answer = example["raw_answers"][0]
    try:
        json.loads(answer)["slots"].items()
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise ValueError(
            f"{where}: field raw_answers[0] is {answer!r:.60}; "
            'JSON with an object "slots" is required'
        ) from None
    return example


def read_gsm8k(row: dict, where: str, ask: Ask) -> dict:
    """{"question", "answer"}, the answer's number behind ####, as published."""
    question, answer = text_field(row, "question", where), text_field(row, "answer", where)
    if "####" not in answer or final_number(answer) is None:
        raise ValueError(f"{where}: field answer is {answer!r:.60}; it must end with #### NUMBER")
    step_by_step = "Please reason step by step, and put your final answer within \\boxed{}."
    prompt = ask(f"{question}\n{step_by_step}", f"Question: {question}\nAnswer:")
    return {"prompt": prompt, "raw_answers": [answer]}


def read_trivia(row: dict, where: str, ask: Ask) -> dict:
    """{"question", "answers": [...]}, or, as TriviaQA's rows on the hub, "answer": {"value",
    "aliases"}."""
    question, answer = text_field(row, "question", where), row.get("answer")
    if isinstance(answer, dict):
        value = text_field(answer, "value", f"{where}: field answer")
        answers = [value, *text_list(answer, "aliases", f"{where}: field answer", least=0)]
    else:
        answers = text_list(row, "answers", where)
    asked = f"{question}\nAnswer with a name or a few words, without a sentence."
    return {
        "prompt": ask(asked, f"Question: {question}\nAnswer:"),
        "raw_answers": list(dict.fromkeys(answers)),
    }


def read_humaneval(row: dict, where: str, ask: Ask) -> dict:
    """{"prompt", "canonical_solution", "test", "entry_point"}."""
    code, solution, test, entry = (
        text_field(row, name, where)
        for name in ("prompt", "canonical_solution", "test", "entry_point")
    )
    asked = (
        "Complete this Python function. Answer with the whole function, in one block of code.\n\n"
        f"```python\n{code.strip()}\n```"
    )
    return {
        "prompt": ask(asked, code),
        "raw_answers": [solution],
        "code": code,
        "entry_point": entry,
        "test": f"{test}\n\ncheck({entry})\n",
    }


def read_mbpp(path: str | Path, ask: Ask) -> list[dict]:
    """The published files hold all splits; the test's rows have task_id 11 to 510."""
    rows = [(at, row) for at, row in read_rows(path) if row.get("task_id", 11) in range(11, 511)]
    if not rows:
        raise ValueError(f"{path}: no row has a task_id from 11 to 510, the published test")
    return [read_mbpp_row(row, where, ask) for where, row in rows]


def read_mbpp_row(row: dict, where: str, ask: Ask) -> dict:
    """{"text", "code", "test_list", "test_setup_code"}, or of the sanitized file "prompt" and
    "test_imports"."""
    task = text_field(row, "prompt" if "prompt" in row else "text", where)
    tests = text_list(row, "test_list", where)
    setup = [text_field(row, "test_setup_code", where)] if row.get("test_setup_code") else []
    imports = text_list(row, "test_imports", where, least=0) if "test_imports" in row else []
    asked = (
        f"You are an expert Python programmer, and here is your task: {task} Your code should pass "
        "these tests:\n\n" + "\n".join(tests)
    )
    return {
        "prompt": ask(asked, f"{asked}\n[BEGIN]\n"),
        "raw_answers": [text_field(row, "code", where)],
        "code": "",
        "entry_point": "",
        "test": "\n".join([*imports, *setup, *tests]) + "\n",
    }


def choice_example(prompt: str, choices: list[str], place, where: str, answer: str) -> dict:
    """`place`: which of the choices is right, by number from 0; `answer`: what the row says of it,
    for the error message."""
    if isinstance(place, bool) or not isinstance(place, int) or not 0 <= place < len(choices):
        raise ValueError(f"{where}: {answer}; it must be one of the {len(choices)} choices")
    if empty := [c for c in choices if not c.strip()]:
        raise ValueError(f"{where}: a choice is {empty[0]!r}; it must not be empty")
    return {"prompt": prompt, "raw_answers": [choices[place]], "choices": choices}


def place_in(labels: list[str], label) -> int | None:
    return labels.index(label) if label in labels else None


def stated(row: dict, name: str) -> str:
    return f"field {name} is {row.get(name)!r:.60}"


def read_choice(row: dict, where: str, ask: Ask) -> dict:
    """{"prompt", "choices", "answer"}, the answer by number from 0 or as the text of a choice."""
    choices, answer = text_list(row, "choices", where, least=2), row.get("answer")
    place = place_in(choices, answer) if isinstance(answer, str) else answer
    prompt = text_field(row, "prompt", where)
    return choice_example(prompt, choices, place, where, stated(row, "answer"))


def read_hellaswag(row: dict, where: str, ask: Ask) -> dict:
    """{"activity_label", "ctx_a", "ctx_b", "endings", "label"}; marks like [step] are taken out, as
    usual."""

    def clean(text: str) -> str:
        return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")

    label = row.get("label")
    label = int(label) if isinstance(label, str) and label.isdecimal() else label
    activity, a, b = (text_field(row, name, where) for name in ("activity_label", "ctx_a", "ctx_b"))
    endings = text_list(row, "endings", where, least=2)
    endings = [clean(ending) if clean(ending).strip() else ending for ending in endings]
    prompt = clean(f"{activity}: {a} {b.capitalize()}")
    return choice_example(prompt, endings, label, where, stated(row, "label"))


def read_arc(row: dict, where: str, ask: Ask) -> dict:
    """{"question": {"stem", "choices": [{"text", "label"}]}, "answerKey"}, or {"question",
    "choices": {"text": [...], "label": [...]}, "answerKey"}."""
    question, choices = row.get("question"), row.get("choices")
    if isinstance(question, dict):
        question, choices = question.get("stem"), question.get("choices")
    if isinstance(choices, list) and all(isinstance(choice, dict) for choice in choices):
        choices = {name: [choice.get(name) for choice in choices] for name in ("text", "label")}
    if not is_text(question):
        raise ValueError(f"{where}: {stated(row, 'question')}; a string, or an object with stem")
    if not isinstance(choices, dict):
        raise ValueError(f"{where}: field choices is {choices!r:.60}; text and label are required")
    texts = text_list(choices, "text", f"{where}: choices", least=2)
    labels = text_list(choices, "label", f"{where}: choices", least=2)
    if len(labels) != len(texts):
        raise ValueError(f"{where}: choices: {len(texts)} of text, {len(labels)} of label")
    place, prompt = place_in(labels, row.get("answerKey")), f"Question: {question}\nAnswer:"
    return choice_example(prompt, texts, place, where, stated(row, "answerKey"))


def read_cluewsc(row: dict, where: str, ask: Ask) -> dict:
    """{"text", "target": {"span1_text", "span2_text"}, "label"}: does the pronoun, span 2, mean
    span 1?"""
    text, target = text_field(row, "text", where), typed_field(row, "target", dict, where)
    name, pronoun = (text_field(target, f"span{i}_text", where) for i in (1, 2))
    prompt = f"{text}\n问题：上文中的“{pronoun}”指的是“{name}”吗？\n答案："
    place = place_in(["true", "false"], str(row.get("label")).lower())
    return choice_example(prompt, ["是", "不是"], place, where, stated(row, "label"))


def read_csv(path: Path, columns: int, header: bool = False) -> list[tuple[str, list[str]]]:
    """(where, cells) of each row, the header apart; `where` names the line that it begins in.
    Raises ValueError for a row of fewer cells than `columns`, and for a file without rows."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    rows = []
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader, end = csv.reader(file), 0
        try:
            for cells in reader:
                where, end = f"{path}: line {end + 1}", reader.line_num
                if not cells:  # an empty line
                    continue
                if len(cells) < columns:
                    raise ValueError(f"{where}: {len(cells)} cells; {columns} are required")
                rows.append((where, cells))
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: not a CSV file: {error}") from None
    if len(rows) <= header:
        raise ValueError(f"{path}: the file has no rows; at least one is required")
    return rows[header:]


LETTERS = ["A", "B", "C", "D"]


def subjects(folder: str | Path, split: str) -> list[str]:
    """The subjects of a folder of CSV files, SPLIT/SUBJECT_SPLIT.csv."""
    found = sorted((Path(folder) / split).glob(f"*_{split}.csv"))
    if not found:
        raise FileNotFoundError(
            f"{folder}: holds no {split}/SUBJECT_{split}.csv; the folder of the published CSV "
            "files is required"
        )
    return [path.name.removesuffix(f"_{split}.csv") for path in found]


def read_mmlu(folder: str | Path, ask: Ask) -> list[dict]:
    """MMLU's published folder: five examples of dev/ before each question of test/. The layout is
    that of the published evaluation, the second space before the subject included."""

    def question(cells: list[str]) -> str:
        lines = [cells[0], *(f"{a}. {b}" for a, b in zip(LETTERS, cells[1:])), "Answer:"]
        return "\n".join(lines)

    examples = []
    for subject in subjects(folder, "test"):
        name = subject.replace("_", " ")
        prompt = f"The following are multiple choice questions (with answers) about  {name}.\n\n"
        for _, cells in read_csv(Path(folder) / "dev" / f"{subject}_dev.csv", 6)[:5]:
            prompt += f"{question(cells)} {cells[5]}\n\n"
        for where, cells in read_csv(Path(folder) / "test" / f"{subject}_test.csv", 6):
            place, answer = place_in(LETTERS, cells[5]), f"the answer is {cells[5]!r:.60}"
            example = choice_example(prompt + question(cells), LETTERS, place, where, answer)
            examples.append(example | {"subject": subject})
    return examples


def read_ceval(folder: str | Path, ask: Ask) -> list[dict]:
    """C-Eval's published folder: five examples of dev/ before each question of val/ (the answers of
    test/ are not published). Chinese names of the subjects come from subject_mapping.json, if it is
    there."""
    mapping = Path(folder) / "subject_mapping.json"
    names = read_json(mapping) if mapping.exists() else {}
    if not isinstance(names, dict) or not all(
        isinstance(n, list) and len(n) > 1 and all(map(is_text, n)) for n in names.values()
    ):
        raise ValueError(
            f'{mapping}: must be an object like {{"law": ["Law", "法学", "Social Science"]}}'
        )

    def question(cells: list[str]) -> str:
        lines = [cells[1], *(f"{a}. {b}" for a, b in zip(LETTERS, cells[2:])), "答案："]
        return "\n".join(lines)

    examples = []
    for subject in subjects(folder, "val"):
        name = names[subject][1] if subject in names else subject.replace("_", " ")
        prompt = f"以下是中国关于{name}考试的单项选择题，请选出其中的正确答案。\n\n"
        for _, cells in read_csv(Path(folder) / "dev" / f"{subject}_dev.csv", 7, True)[:5]:
            prompt += f"{question(cells)}{cells[6]}\n\n"
        for where, cells in read_csv(Path(folder) / "val" / f"{subject}_val.csv", 7, True):
            place, answer = place_in(LETTERS, cells[6]), f"the answer is {cells[6]!r:.60}"
            example = choice_example(prompt + question(cells), LETTERS, place, where, answer)
            examples.append(example | {"subject": subject})
    return examples


def read_chat(path: str | Path, ask: Ask) -> list[dict]:
    """Any training file: the answers that count in it are what is scored."""
    examples = []
    for i, (ids, labels) in enumerate(encode_file(path, ask.tokenizer), 1):
        learned = [n for n in range(1, len(ids)) if labels[n] >= 0]
        if not learned:
            raise ValueError(f"{path}: row {i} has no answer to score; every one is masked")
        given = [token for token, label in zip(ids, labels) if label < 0]
        examples.append(
            {
                "prompt": ask.tokenizer.decode(given),
                "raw_answers": [ask.tokenizer.decode([ids[n] for n in learned])],
                "ids": ids,
                "learned": learned,
            }
        )
    return examples


# ------------------------------------------------------------------------------------------
# Scores of one answer


def score_exact(prediction: str, answers: list[str]) -> int:
    """1 if the prediction is one of the answers, white space at the ends apart."""
    return int(prediction.strip() in [answer.strip() for answer in answers])


def score_intent(prediction: str, answers: list[str]) -> int:
    """ESFT's intent task: 1 if intent and slots agree with the first answer. The first non-empty
    line of the prediction, or of its ```json fence, is read as JSON; lists compare as sorted, and
    spaces inside predicted values are dropped (the original's benchmarks.py, which gives the
    published scores)."""
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
        for key, value in answer.get("slots", {}).items()
    }
    return int(intent == answer.get("intent", "") and slots == expected)


NUMBER = r"(?<!\d)-?\$?\d[\d,]*(?:\.\d+)?|\d[\d,]*(?:\.\d+)?"


def final_number(text: str) -> Decimal | None:
    """The number in the last \\boxed{}, else behind the last ####, else the last of the text."""
    text = text.lstrip().split("\nQuestion:")[0]  # a base model goes on with the next one
    for tex, plain in (("{,}", ""), ("\\!", ""), ("\\$", "$"), ("\u2212", "-")):
        text = text.replace(tex, plain)
    if "\\boxed{" in text:
        found = re.search(NUMBER, text.rpartition("\\boxed{")[2])
        return number(found.group()) if found else None
    marked = re.findall(rf"####\s*({NUMBER})", text)  # not the headings that begin so
    found = marked or re.findall(NUMBER, text)
    return number(found[-1]) if found else None


def number(text: str) -> Decimal:
    return Decimal(text.replace(",", "").replace("$", ""))


def score_number(prediction: str, answers: list[str]) -> int:
    """GSM8K: 1 if the final number is that of the answer, 1,000 being 1000.0."""
    return int(final_number(prediction) == final_number(answers[0]))


def score_trivia(prediction: str, answers: list[str]) -> int:
    """TriviaQA's exact match, of the first line: articles, punctuation and case apart."""

    def bare(text: str) -> str:
        letters = "".join(" " if c in string.punctuation + "‘’´`_" else c for c in text.lower())
        return " ".join(word for word in letters.split() if word not in ("a", "an", "the"))

    lines = prediction.strip().splitlines()
    return int(bool(lines) and bare(lines[0]) in [bare(answer) for answer in answers])


STOPS = r"\n(?=class |def |@|#|if |print\(|```)"  # where a continuation of a function ends
FENCE = re.compile(r"(?<!\S)```[ \t]*(\w*)[^\n`]*\n(.*?)(?:```|\Z)", re.DOTALL)
INDENTED = re.compile(r"(?:[ \t]*\n)*(?:\t|  )[ \t]*[^\s`]")  # the first line of code is


def program(example: dict) -> str:
    """The Python program in a completion. An indented text goes on with the prompt's function.
    Of any other it is the first block of code that defines the function, else the first block, else
    the text itself."""
    text, code, entry = example["raw_prediction"], example["code"], example["entry_point"]
    if entry and INDENTED.match(text):
        return code + re.split(STOPS, text, maxsplit=1)[0]
    text = text.removeprefix(" ")  # chat formats have one before an answer
    defines = re.compile(rf"^(?:async )?def {re.escape(entry)}\b", re.MULTILINE)
    blocks = [
        block
        for language, block in FENCE.findall(text)
        if language.lower() in ("", "py", "python", "python3")
    ]
    whole = [b for b in map(textwrap.dedent, blocks) if defines.search(b)]
    if blocks:
        text = whole[0] if whole else blocks[0]
    elif not entry:  # MBPP's layout ends with [DONE]
        text = text.split("[DONE]")[0]
    if not entry:
        return text
    if defines.search(text):  # a whole function; imports and helpers stand in the prompt
        return f"{code.rstrip()}\n    pass\n\n{text}"
    return code + re.split(STOPS, text, maxsplit=1)[0]


# ------------------------------------------------------------------------------------------
# A judge: a language model behind an OpenAI-compatible endpoint gives points


JUDGE_PROMPT = """You grade {what}. Compare the candidate with the reference and give points \
from 0 to 10, where 10 says as good as the reference. Look at:
{criteria}

Reference:
{reference}

Candidate:
{candidate}

Reply with one line and nothing else, in this form: Total score: N"""
POINTS = re.compile(
    r"(?:total score|总分)\s*(?:[(（\[][^)）\]]*[)）\]])?\s*"  # a bracket may name the scale
    r"(?:is|是|为)?\s*[:：=]?\s*[(\[]?(\d+(?:\.\d+)?)",
    re.IGNORECASE,
)
BARE_POINTS = re.compile(r"\s*(?:score\s*:?\s*)?(\d+(?:\.\d+)?)(?:\s*/\s*10)?[\s.]*", re.IGNORECASE)
JUDGE_SECONDS = 120.0  # that one request may take
JUDGE_PAUSES = (1, 2, 4, 8, 16, 32, 60)  # seconds between the tries of a request
JUDGE_REQUESTS = 8  # at a time


class JudgeError(ValueError):
    """What no further try would mend: a wrong address, key or model."""


@dataclass
class Judge:
    """Asks `model` at `url` (the part before /chat/completions; empty: nobody), and keeps every
    reply in the file `replies`, so that what has been judged is not asked again."""

    url: str
    model: str
    key: str
    replies: Path
    known: dict[str, str] = field(default_factory=dict)  # digest of model and text -> reply
    failed: bool = False  # whether a try has failed, which is said once
    lost: int = 0  # texts in a row that got no reply

    def __post_init__(self) -> None:
        if self.url and not self.url.startswith(("http://", "https://")):
            raise ValueError(f"judge_url is {self.url!r}; must begin with http:// or https://")
        self.key = self.key.strip()
        if not (self.key.isascii() and self.key.isprintable()):
            raise ValueError("OPENAI_API_KEY holds characters that no key has")
        if self.replies.exists():
            for line in self.replies.read_text("utf-8", errors="replace").split("\n"):
                row = read_line(line)  # None where a kill cut it off
                if isinstance(row, dict) and is_text(row.get("reply")):
                    self.known[row.get("asked")] = row["reply"]

    def check(self) -> None:
        """Raises JudgeError for what a first request tells: better now than after decoding."""
        if not self.url:
            return
        try:
            self.request("Reply with the word yes.")
        except urllib.error.HTTPError as error:
            if error.code in (401, 403, 404):
                raise JudgeError(f"{self.url}: HTTP {error.code}: {body_of(error)}") from None
        except (OSError, http.client.HTTPException, ValueError):
            pass  # it may be there by then

    def digest(self, text: str) -> str:
        return hashlib.sha256(f"{self.model}\n{text}".encode()).hexdigest()

    def points(self, texts: list[str]) -> list[float | None]:
        """The points of each text out of 10, divided by 10; None where the judge could not be had
        or its reply is unreadable. Raises JudgeError."""
        self.lost = 0
        known = {self.digest(text): text for text in texts}
        missing = [d for d in known if read_points(self.known.get(d)) is None]
        if missing and self.url:
            print(f"judge: {len(missing)} of {len(texts)} to ask {self.model}", flush=True)
            self.replies.parent.mkdir(parents=True, exist_ok=True)
            with open(self.replies, "a", encoding="utf-8") as out:
                if out.tell() > 0:
                    out.write("\n")  # a line cut off ends here
                for asked, reply in self.ask_all({d: known[d] for d in missing}):
                    row = {"asked": asked, "model": self.model, "reply": reply}
                    out.write(json.dumps(row) + "\n")
                    out.flush()
                    self.known[asked] = reply
        unread = [r for d in known if (r := self.known.get(d)) and read_points(r) is None]
        if unread:
            print(f"judge: {len(unread)} replies without points, as {unread[0]!r:.100}", flush=True)
        return [read_points(self.known.get(self.digest(text))) for text in texts]

    def ask_all(self, texts: dict[str, str]) -> Iterator[tuple[str, str]]:
        """(digest, reply) as the replies come in."""
        stop = threading.Event()
        with ThreadPoolExecutor(JUDGE_REQUESTS) as pool:
            asked = {pool.submit(self.ask, text, stop): d for d, text in texts.items()}
            try:
                for done in tqdm(
                    as_completed(asked), "judge", len(asked), leave=False, disable=None
                ):
                    if (reply := done.result()) is not None:
                        yield asked[done], reply
            except BaseException:
                stop.set()
                pool.shutdown(cancel_futures=True)
                raise

    def ask(self, text: str, stop: threading.Event) -> str | None:
        """The judge's reply; None after the last try, and once JUDGE_REQUESTS texts in a row got
        none."""
        for pause in (*JUDGE_PAUSES, None):
            if self.lost >= JUDGE_REQUESTS:
                return None
            try:
                reply = self.request(text)
                self.lost = 0
                return reply
            except urllib.error.HTTPError as error:
                reason = f"HTTP {error.code}: {body_of(error)}"
                if error.code in (401, 403, 404):
                    raise JudgeError(f"{self.url}: {reason}") from None
                if error.code not in (408, 409, 425, 429) and error.code < 500:
                    print(f"judge: {self.url}: {reason}; no points for one text", flush=True)
                    return None
                after = error.headers.get("Retry-After", "")
                if pause is not None and after.isdecimal():
                    pause = max(pause, min(int(after), 600))
            except (OSError, http.client.HTTPException, ValueError) as error:
                reason = f"{type(error).__name__}: {error}"  # cut, slow, or nonsense
            if not self.failed:
                self.failed = True
                again = f"tried again for {sum(JUDGE_PAUSES)} seconds and more"
                print(f"judge: {self.url}: {reason}; such requests are {again}", flush=True)
            if pause is None or stop.wait(pause):
                break
        self.lost += 1
        return None

    def request(self, text: str) -> str:
        """One try. Raises OSError, HTTPException, or ValueError for an answer of another shape."""
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": text}],
            "temperature": 0,
        }
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(
            f"{self.url.rstrip('/')}/chat/completions", json.dumps(body).encode(), headers
        )
        with urllib.request.urlopen(request, timeout=JUDGE_SECONDS) as response:
            answer = response.read()
        try:
            reply = json.loads(answer)["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError):
            begins = answer[:80].decode(errors="replace")
            raise ValueError(f"no choices[0].message.content in {begins!r}") from None
        if not is_text(reply):
            raise ValueError("the answer's content is no text")
        return reply


def body_of(error: urllib.error.HTTPError) -> str:
    try:
        return error.read(300).decode(errors="replace")
    except (OSError, http.client.HTTPException):
        return ""


def read_points(reply: str | None) -> float | None:
    """Points of a reply, divided by 10: the first after "total score", or all that it says, from 0
    to 10."""
    text = (reply or "").replace("*", "")
    found = POINTS.search(text) or BARE_POINTS.fullmatch(text)
    return float(found[1]) / 10 if found and float(found[1]) <= 10 else None


# ------------------------------------------------------------------------------------------
# Tasks


@dataclass(frozen=True)
class Task:
    """How a task's file is read, its answers are got (`kind`, a key of PREDICTIONS and RESULTS) and
    scored."""

    kind: str
    about: str  # what --data is
    read: Callable[[str | Path, Ask], list[dict]]
    score: Callable[[str, list[str]], int] | None = None  # of a completion, where kind is text
    max_new_tokens: int = 128
    by_letter: bool = False  # of choices: the main metric, as these tasks' published scores
    grades: str = ""  # what a judge grades
    criteria: tuple[str, ...] = ()


ANSWERS = "rows of prompt (in its chat format) and raw_answers"


def judged(grades: str, *criteria: str, max_new_tokens: int = 512) -> Task:
    about, read = f"ESFT's: {ANSWERS}", by_row(read_answers)
    return Task("judged", about, read, None, max_new_tokens, False, grades, criteria)


TASKS = {
    "exact": Task("text", ANSWERS, by_row(read_answers), score_exact),
    "intent": Task("text", f"ESFT's: {ANSWERS}", by_row(read_intent), score_intent),
    "gsm8k": Task("text", "rows of question and answer", by_row(read_gsm8k), score_number, 512),
    "triviaqa": Task("text", "rows of question and answers", by_row(read_trivia), score_trivia, 32),
    "summary": judged(
        "the summary of a customer's call",
        "Accuracy: is the customer's problem or complaint put as in the reference?",
        "Completeness: is every important point there?",
        "Brevity: nothing superfluous, the reference's style",
        "Follow-up: are the same next steps asked for?",
    ),
    "law": judged(
        "the predicted judgment of a court (0 points if there is none)",
        "Agreement: the same decisions, whatever the words; this weighs most",
        "Completeness: parties, amounts, liability, costs",
        "Accuracy: details, figures, dates, legal grounds",
        "Tone: factual, in legal terms",
    ),
    "translation": judged(
        "a translation",
        "Accuracy: does it say what the reference says?",
        "Completeness: is every part there?",
        "Brevity: nothing superfluous, the reference's style",
        max_new_tokens=128,
    ),
    "choice": Task(
        "choice",
        "rows of prompt, choices, answer (its number from 0, or its text)",
        by_row(read_choice),
    ),
    "mmlu": Task("choice", "the folder of the published CSV files: dev/, test/", read_mmlu),
    "ceval": Task("choice", "the folder of the published CSV files: dev/, val/", read_ceval),
    "hellaswag": Task("choice", "the published rows", by_row(read_hellaswag), by_letter=True),
    "arc": Task("choice", "the published rows", by_row(read_arc), by_letter=True),
    "cluewsc": Task("choice", "the published rows", by_row(read_cluewsc)),
    "humaneval": Task("code", "the published rows", by_row(read_humaneval), max_new_tokens=512),
    "mbpp": Task("code", "the published rows", read_mbpp, max_new_tokens=512),
    "loss": Task("loss", "any training file", read_chat),
}


def read_examples(path: str | Path, task: str, ask: Ask) -> list[dict]:
    """The examples of a data file or folder. Raises ValueError and OSError that name file, line and
    field."""
    return TASKS[task].read(path, ask)


# What a model answers: (number of the example, the example with the answer), as answers come in
Predictions = Iterator[tuple[int, dict]]


def predict_text(
    model: Transformer, ask: Ask, examples: list[dict], max_new_tokens: int, batch_size: int
) -> Predictions:
    """Adds raw_prediction."""
    tokenizer = ask.tokenizer
    prompts = tokenizer.encode_all([example["prompt"] for example in examples])
    prompts = [[tokenizer.bos_id, *ids] for ids in prompts]
    if too_long := sum(len(ids) > (ask.context or len(ids)) for ids in prompts):
        print(
            f"{too_long} of {len(prompts)} prompts are longer than the {ask.context} tokens of "
            "max_position_embeddings; their answers mean little",
            flush=True,
        )
    sizes = max_new_tokens, tokenizer.eos_id, batch_size
    for batch, rows in generate_batches(model, prompts, *sizes):
        for i, row in zip(batch, rows):
            yield i, examples[i] | {"raw_prediction": tokenizer.decode(row)}


def predict_judged(
    model: Transformer, ask: Ask, examples: list[dict], max_new_tokens: int, batch_size: int
) -> Predictions:
    """Adds raw_prediction, and of the reference answer reference_loss (mean over its tokens),
    reference_accuracy (how many of them greedy decoding would choose) and reference_tokens."""
    tokenizer = ask.tokenizer
    rows, wanted = [], []
    for example in examples:
        answer = CHAT_FORMATS[tokenizer.chat_format].answer.format(example["raw_answers"][0])
        prompt, answer = tokenizer.encode_all([example["prompt"], answer])
        rows.append([tokenizer.bos_id, *prompt, *answer, tokenizer.eos_id])
        wanted.append(following(rows[-1], 1 + len(prompt)))
    judged = [dict(example) for example in examples]
    for batch, logs, hits in likelihoods(model, rows, wanted):
        for i, log, hit in zip(batch, logs, hits):
            judged[i]["reference_loss"] = -log.double().mean().item()
            judged[i]["reference_accuracy"] = hit.double().mean().item()
            judged[i]["reference_tokens"] = len(log)
    yield from predict_text(model, ask, judged, max_new_tokens, batch_size)


def predict_choice(
    model: Transformer, ask: Ask, examples: list[dict], max_new_tokens: int, batch_size: int
) -> Predictions:
    """Adds loglikelihoods, one a choice, and raw_prediction, the likeliest."""
    with tqdm(total=len(examples), desc="score", leave=False, disable=None) as bar:
        for start in range(0, len(examples), batch_size):
            block = examples[start : start + batch_size]
            for i, sums in enumerate(choice_likelihoods(model, ask.tokenizer, block)):
                best = block[i]["choices"][sums.index(max(sums))]
                yield start + i, block[i] | {"loglikelihoods": sums, "raw_prediction": best}
            bar.update(len(block))


def choice_likelihoods(
    model: Transformer, tokenizer: Tokenizer, examples: list[dict]
) -> list[list[float]]:
    """Of each example the log-likelihood of each choice, given the prompt. Choices that differ in
    their last token alone, as letters do, share a row."""
    rows: dict[tuple[int, ...], list[tuple[int, int]]] = {}  # a row, and what is wanted of it
    places = []  # of each choice, its row, and where its tokens are in what is wanted
    for example in examples:
        texts = [join_choice(example["prompt"], choice) for choice in example["choices"]]
        prompt, *choices = tokenizer.encode_all([example["prompt"], *texts])
        # Where a choice's first letters merge with the prompt's last, that token counts as its.
        start = 1 + min(common_prefix(prompt, ids) for ids in choices)
        for ids in choices:
            ids = [tokenizer.bos_id, *ids]
            wanted = rows.setdefault(tuple(ids[:-1]), [])
            places.append((tuple(ids[:-1]), len(wanted), len(wanted) + len(ids) - start))
            wanted += following(ids, start)
    found, keys = {}, list(rows)
    for batch, logs, _ in likelihoods(model, [list(key) for key in keys], list(rows.values())):
        found |= {keys[row]: log.double() for row, log in zip(batch, logs)}
    sums = iter([found[key][begin:end].sum().item() for key, begin, end in places])
    return [[next(sums) for _ in example["choices"]] for example in examples]


def join_choice(prompt: str, choice: str) -> str:
    """A space between them, unless there is one, or a Chinese letter."""
    apart = not prompt[-1:].isspace() and max(prompt[-1:], choice[:1]) < "\u2e80"
    return f"{prompt} {choice}" if apart else prompt + choice


def common_prefix(a: list[int], b: list[int]) -> int:
    differing = (n for n, (x, y) in enumerate(zip(a, b)) if x != y)
    return next(differing, min(len(a), len(b)))


def predict_loss(
    model: Transformer, ask: Ask, examples: list[dict], max_new_tokens: int, batch_size: int
) -> Predictions:
    """Adds loss, the mean over the answer's tokens, accuracy and tokens."""
    wanted = [[(n, example["ids"][n]) for n in example["learned"]] for example in examples]
    rows = [example["ids"] for example in examples]
    with tqdm(total=len(examples), desc="score", leave=False, disable=None) as bar:
        for batch, logs, hits in likelihoods(model, rows, wanted):
            for i, log, hit in zip(batch, logs, hits):
                answered = {name: examples[i][name] for name in ("prompt", "raw_answers")}
                answered["loss"] = -log.double().mean().item()
                answered["accuracy"] = hit.double().mean().item()
                answered["tokens"] = len(log)
                yield i, answered
            bar.update(len(batch))


PREDICTIONS = {
    "text": predict_text,
    "code": predict_text,
    "judged": predict_judged,
    "choice": predict_choice,
    "loss": predict_loss,
}


@dataclass
class Result:
    """What an evaluation gives: metrics, the main one first (None: nothing could be scored); over
    how many of what; how many of these could not be scored; and one record a sample."""

    metrics: dict[str, float | None]
    count: int
    unit: str
    records: list[dict]
    missing: int = 0
    groups: dict[str, float] | None = None  # the main metric of each subject

    @property
    def mean(self) -> float | None:
        return next(iter(self.metrics.values()))


def result_of_text(task: Task, examples: list[dict], judge: Judge | None) -> Result:
    scores = [task.score(e["raw_prediction"], e["raw_answers"]) for e in examples]
    records = [{"example": e, "score": score} for e, score in zip(examples, scores)]
    return Result({"accuracy": fmean(scores)}, len(records), "samples", records)


def result_of_choice(task: Task, examples: list[dict], judge: Judge | None) -> Result:
    """The likeliest choice, and the likeliest by letter: log-likelihoods divided by the length of
    the choice's text, as lm-evaluation-harness' acc_norm."""
    records, groups = [], {}
    for e in examples:
        right = e["choices"].index(e["raw_answers"][0])
        by_letter = [log / len(c) for log, c in zip(e["loglikelihoods"], e["choices"])]
        best, normalised = (v.index(max(v)) == right for v in (e["loglikelihoods"], by_letter))
        records.append({"example": e, "score": int(best), "score_normalised": int(normalised)})
        groups.setdefault(e.get("subject"), []).append(int(best))
    metrics = {
        "accuracy": fmean([r["score"] for r in records]),
        "normalised": fmean([r["score_normalised"] for r in records]),
    }
    if task.by_letter:
        metrics = dict(reversed(metrics.items()))
    subjects = {name: fmean(scores) for name, scores in groups.items() if name is not None}
    return Result(metrics, len(records), "questions", records, groups=subjects or None)


def result_of_code(task: Task, examples: list[dict], judge: Judge | None) -> Result:
    if guards := missing_guards():
        print(f"sandbox: this system lacks {', '.join(guards)}; programs run without", flush=True)
    said = run_programs([(program(e), e["test"]) for e in examples])
    records = [
        {"example": e, "score": int(line == "passed"), "result": line}
        for e, line in zip(examples, said)
    ]
    metrics = {"pass@1": fmean([r["score"] for r in records])}
    return Result(metrics, len(records), "programs", records)


def result_of_judged(task: Task, examples: list[dict], judge: Judge | None) -> Result:
    """The judge's points; without one, loss and token accuracy of the reference answers."""
    referenced = [e for e in examples if "reference_tokens" in e]  # not in files of others
    tokens = [e["reference_tokens"] for e in referenced]
    metrics: dict[str, float | None] = {
        name: fmean([e[f"reference_{name}"] for e in referenced], tokens) if referenced else None
        for name in ("loss", "accuracy")
    }
    metrics = {f"reference {name}": value for name, value in metrics.items()}
    if judge is None:
        records = [{"example": e, "score": None} for e in examples]
        return Result(
            metrics, len(records), "samples, reference answers' loss", records, len(records)
        )
    points = judge.points([judge_prompt(task, e) for e in examples])
    records = [{"example": e, "score": p} for e, p in zip(examples, points)]
    given = [p for p in points if p is not None]
    metrics = {"points": fmean(given) if given else None} | metrics
    return Result(metrics, len(given), "judged samples", records, len(records) - len(given))


def judge_prompt(task: Task, example: dict) -> str:
    candidate = example["raw_prediction"].strip()
    if task is TASKS["translation"]:  # as in the original: what follows is talk
        candidate = candidate.split("\n\n")[0]
    return JUDGE_PROMPT.format(
        what=task.grades,
        criteria="\n".join(f"- {line}" for line in task.criteria),
        reference=example["raw_answers"][0],
        candidate=candidate or "(nothing)",
    )


def result_of_loss(task: Task, examples: list[dict], judge: Judge | None) -> Result:
    """Means over all tokens; a record's score is its sample's mean loss."""
    tokens = [e["tokens"] for e in examples]
    loss = fmean([e["loss"] for e in examples], tokens)
    metrics = {"loss": loss, "token accuracy": fmean([e["accuracy"] for e in examples], tokens)}
    records = [{"example": e, "score": e["loss"]} for e in examples]
    return Result(metrics, sum(tokens), "tokens", records)


RESULTS = {
    "text": result_of_text,
    "choice": result_of_choice,
    "code": result_of_code,
    "judged": result_of_judged,
    "loss": result_of_loss,
}


def score(task: str, examples: list[dict], judge: Judge | None = None) -> Result:
    """Scores answered examples."""
    return RESULTS[TASKS[task].kind](TASKS[task], examples, judge)


def answer_file(
    model: Transformer,
    tokenizer: Tokenizer,
    task: str,
    path: str | Path,
    max_new_tokens: int | None = None,
    batch_size: int = 64,
) -> list[dict]:
    """The examples of a data file of `task`, a key of TASKS, with the model's answers, for
    `score`."""
    ask = Ask(tokenizer)
    examples = read_examples(path, task, ask)
    sizes = max_new_tokens or TASKS[task].max_new_tokens, batch_size
    for i, answered in PREDICTIONS[TASKS[task].kind](model, ask, examples, *sizes):
        examples[i] = answered
    return examples


# ------------------------------------------------------------------------------------------
# A run: several tasks on a base and its adapters, that can be stopped and continued
#
# While it decodes, each process appends its answers to FILE.rankR.part; at the end the first one
# puts them in order. results.json says of each finished file what made it.


SECONDS_BETWEEN_WORDS = 60.0  # on how far a run is, where no progress bar shows it


class Ranks:
    """The processes that torchrun started over one folder; without it, this one alone. The first
    one speaks."""

    def __init__(self) -> None:
        self.rank = int(os.environ.get("RANK", 0))
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        if self.world > 1:
            # Ranks wait as long as another one decodes.
            torch.distributed.init_process_group("gloo", timeout=timedelta(days=7))
        if self.rank > 0:
            sys.stdout = open(os.devnull, "w")

    def wait(self) -> None:
        if self.world > 1:
            torch.distributed.barrier()

    def first(self, value):
        """The first process's value."""
        values = [value]
        if self.world > 1:
            torch.distributed.broadcast_object_list(values)
        return values[0]


@dataclass
class Evaluation:
    """One task on one model: its row and column in the table, its examples, where the completions
    go, and what must be the same for it to be continued."""

    variant: str
    column: str
    adapter: Path | None
    task: str
    data: str
    examples: list[dict]
    limit: int | None
    max_new_tokens: int
    file: Path
    identity: dict

    @property
    def name(self) -> str:
        return f"{self.variant} {self.column}"

    def parts(self) -> list[Path]:
        return sorted(self.file.parent.glob(f"{glob.escape(self.file.name)}.rank*.part"))

    def answered(self) -> dict[int, dict]:
        """What the file and the parts hold: number of the example -> the example with its
        answer. Lines that a kill cut off or somebody spoiled are passed over."""
        found = {}
        paths = [self.file] if self.file.exists() else []
        for path in [*paths, *self.parts()]:
            whole, lines = path == self.file, path.read_text("utf-8", errors="replace").split("\n")
            for n, line in enumerate(lines[:-1] if whole else lines[1:]):
                row = read_line(line)
                with suppress(ValueError):
                    example = check_saved(row, self.task, str(path))
                    number = n if whole else row.get("number")
                    if number in range(len(self.examples)) and self.asked(number, example):
                        found[number] = example
        return found

    def asked(self, number: int, saved: dict) -> bool:
        """Whether a saved example is that one."""
        fields = ("prompt", "raw_answers", "choices", "test")
        return all(self.examples[number].get(name) == saved.get(name) for name in fields)

    def wanted(self) -> range:
        """Which examples are evaluated: the first `limit`, or as many as the file holds."""
        everything = len(self.examples)
        held = 0
        if self.file.exists():
            held = self.file.read_text("utf-8", errors="replace").count("\n")
        return range(min(max(self.limit or everything, held), everything))

    def differing(self, results: dict) -> list[str]:
        """Of what is there, of this file: what says that other settings or data made it."""
        entry = results.get(self.file.name)
        made = [entry.get("identity")] if entry else []
        made += [read_line(first_line(path)) for path in self.parts()]
        if self.file.exists() and not entry:
            return [f"{self.file}: was not written by such a command"]
        return [
            f"{self.file}: was made with another {key} ({theirs.get(key)!r:.60}, now {mine!r:.60})"
            for theirs in (each if isinstance(each, dict) else {} for each in made)
            for key, mine in self.identity.items()
            if theirs.get(key) != mine
        ]


def first_line(path: Path) -> str:
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.readline()


def read_line(line: str):
    """The value of a line of JSON; None if a kill cut it off."""
    try:
        return json.loads(line)
    except ValueError:
        return None


def answer(
    e: Evaluation,
    missing: list[int],
    model: Transformer,
    ask: Ask,
    batch_size: int,
    ranks: Ranks,
) -> None:
    """Answers the missing examples, split over the processes, into the parts."""
    if mine := missing[ranks.rank :: ranks.world]:
        with open(f"{e.file}.rank{ranks.rank}.part", "a", encoding="utf-8") as out:
            if out.tell() == 0:
                out.write(json.dumps(e.identity))
            out.write("\n")  # ends the first line, or one that a kill cut off
            out.flush()
            examples, spoken = [e.examples[n] for n in mine], time.monotonic()
            predict = PREDICTIONS[TASKS[e.task].kind]
            answers = predict(model, ask, examples, e.max_new_tokens, batch_size)
            for count, (i, example) in enumerate(answers, 1):
                out.write(json.dumps({"number": mine[i], "example": example}) + "\n")
                out.flush()
                if time.monotonic() > spoken + SECONDS_BETWEEN_WORDS:
                    spoken = time.monotonic()
                    print(f"{e.name}: {count} of {len(mine)} answered", flush=True)
    ranks.wait()


def write_records(path: str | Path, records: list[dict]) -> None:
    with replacing(path) as part:
        part.write_text(
            "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8"
        )


def describe(result: Result) -> str:
    values = [f"{name} {show(value)}" for name, value in result.metrics.items()]
    if "loss" in result.metrics:
        values.append(f"perplexity {math.exp(min(result.metrics['loss'], 700)):.3f}")
    missing = f"; {result.missing} without points" if result.missing and result.count else ""
    return f"{', '.join(values)} over {result.count:,} {result.unit}{missing}"


def show(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def table(evaluations: list[Evaluation], results: dict[str, Result]) -> str:
    """Lines: a row for the base and each adapter, a column for each task with the main metric that
    it has for the first of them, and the mean of those that are no loss."""
    variants = list(dict.fromkeys(e.variant for e in evaluations))
    columns = list(dict.fromkeys(e.column for e in evaluations))
    metrics = [next(iter(results[f"{variants[0]} {c}"].metrics)) for c in columns]
    averaged = [c for c, metric in zip(columns, metrics) if "loss" not in metric]
    lines = [["", *(f"{c} ({metric})" for c, metric in zip(columns, metrics))]]
    lines[0] += ["average"] * (len(averaged) > 1)
    for variant in variants:
        found = [results[f"{variant} {c}"].metrics for c in columns]
        # A loss is no point: "-" where only the others were judged.
        values = {
            c: of[metric] if metric == next(iter(of)) else None
            for c, of, metric in zip(columns, found, metrics)
        }
        lines.append([variant, *(show(values[c]) for c in columns)])
        if len(averaged) > 1:
            of = [values[c] for c in averaged]
            lines[-1].append(show(None if None in of else fmean(of)))
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:]))])
        for line in lines
    )


def name_adapters(paths: list[str]) -> list[str]:
    """A short name for each: its directory, or the one above where that is "adapter"; the whole
    path where two would share a name, or one that of the base."""
    whole = [Path(path).absolute() for path in paths]
    short = [p.parent.name if p.name == "adapter" else p.name for p in whole]
    return [
        name if name and name != "base" and short.count(name) == 1 else str(path).strip("/")
        for name, path in zip(short, whole)
    ]


def hash_files(paths: Iterable[Path]) -> str:
    """Of names and contents."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            digest.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}".encode())
    return digest.hexdigest()


def plan_evaluations(
    args: argparse.Namespace, ask: Ask, base: Path, dtype: torch.dtype
) -> list[Evaluation]:
    """Every evaluation that the command line asks for, with its examples read and its adapter
    checked; nothing is loaded. Raises ValueError and OSError."""
    meta, stored = read_checkpoint(base)
    meta.fingerprint = fingerprint(stored)
    settings = [base / f"{name}.json" for name in ("config", "tokenizer", "tokenizer_config")]
    made_by = {"base": meta.fingerprint, "base's settings": hash_files(settings)}
    variants = [("base", None, None)] if args.base or not args.adapter else []
    for name, adapter in zip(name_adapters(args.adapter), args.adapter):
        adapter = local_directory(adapter, "adapter")
        read_adapter(adapter, meta)  # refuses a wrong one
        named = ("expert_cfg.json", "adapter_config.json")
        held = [
            p for p in sorted(adapter.iterdir()) if p.name in named or p.suffix == ".safetensors"
        ]
        variants.append((name, adapter, hash_files(held)))
    names = [(task, Path(data)) for task, data in zip(args.task, args.data)]
    for given, what in ((variants, "--adapter"), (names, "--task and --data")):
        if len({str(each) for each in given}) < len(given):
            raise ValueError(f"{what}: the same is given twice")
    tasks = []
    for task, data in names:
        column = task
        if args.task.count(task) > 1:
            stems = [other.stem for name, other in names if name == task]
            column = f"{task}:{data.stem if stems.count(data.stem) == 1 else data}"
        examples = read_examples(data, task, ask)
        digest = hashlib.sha256(json.dumps(examples).encode()).hexdigest()
        tasks.append((task, column, data, examples, digest))
    evaluations = []
    for name, adapter, weights in variants:
        for task, column, data, examples, digest in tasks:
            new = args.max_new_tokens or TASKS[task].max_new_tokens
            identity = made_by | {
                "adapter": weights,
                "task": task,
                "data or prompts": digest,
                "chat_format": ask.tokenizer.chat_format,
                "max_new_tokens": new,
                "dtype": str(dtype),
            }
            file = f"{name}.{column}.jsonl".replace("/", "-").replace(":", ".")
            file = args.output if args.output.suffix == ".jsonl" else args.output / file
            evaluations.append(
                Evaluation(
                    name, column, adapter, task, data, examples, args.limit, new, file, identity
                )
            )
    return evaluations


def check_output(args: argparse.Namespace) -> Path:
    """Where the results go: results.json in the folder --output, or beside the file --output,
    NAME.jsonl, NAME.results.json. Raises ValueError where they cannot."""
    output = args.output
    if output.suffix != ".jsonl":
        if output.is_file():
            raise ValueError(f"{output}: is a file; a folder, or NAME.jsonl, is required")
        return output / "results.json"
    check_output_file(output, args.data)
    if max(len(args.adapter) + args.base, 1) * len(args.task) > 1:
        raise ValueError(f"--output is {output}; for several evaluations, name a folder")
    of_folder = output.with_name("results.json")
    if of_folder.exists():
        results = read_json(of_folder)
        if isinstance(results, dict) and output.name in results:
            raise ValueError(f"{output}: belongs to {of_folder}; give that folder")
    return output.with_name(f"{output.stem}.results.json")


def run(args: argparse.Namespace) -> None:
    """Answers, scores and writes all that the command line asks for, and prints the table."""
    ranks = Ranks()
    results_file = check_output(args)
    check_device(args.device)
    base = local_directory(args.model)
    ModelConfig.from_json(base / "config.json")  # refuses what is not supported
    context = read_json(base / "config.json").get("max_position_embeddings")
    context = context if isinstance(context, int) else None
    ask = Ask(load_tokenizer(base, args.chat_format), args.plain, context)
    evaluations = plan_evaluations(args, ask, base, choose_dtype(args.dtype, args.device))
    with locked(results_file.parent) if ranks.rank == 0 else nullcontext():
        evaluate_all(args, evaluations, base, ask, results_file, ranks)


def evaluate_all(
    args: argparse.Namespace,
    evaluations: list[Evaluation],
    base: Path,
    ask: Ask,
    results_file: Path,
    ranks: Ranks,
) -> None:
    """`run`, once everything is known and the folder is held."""
    saved = read_results(results_file) if ranks.rank == 0 else {}
    named = {e.name: name_judge(args, e, saved) for e in evaluations}
    judges = {name: judge_beside(results_file, *name) for name in {*named.values()} - {None}}
    if ranks.rank == 0:
        differing = check_outputs(args, evaluations, saved)
        for judge in judges.values():
            judge.check()
        delete_evaluations(differing, saved, results_file)
    model, present, results = None, None, {}
    for e in evaluations:
        begin = time.perf_counter()
        done = e.answered() if ranks.rank == 0 else {}
        wanted = ranks.first(e.wanted() if ranks.rank == 0 else None)
        missing = ranks.first([n for n in wanted if n not in done])
        if before := len(wanted) - len(missing):
            print(f"{e.name}: {before} of {len(wanted)} answered before", flush=True)
        if missing:
            if model is None:
                model = load_model(base, args.device, choose_dtype(args.dtype, args.device))
            if e.adapter != present:  # the base comes first, without one
                load_adapter(model, e.adapter)
                present = e.adapter
            answer(e, missing, model, ask, args.batch_size, ranks)
            done = e.answered() if ranks.rank == 0 else {}
        if ranks.rank == 0:
            results[e.name] = conclude(
                e, wanted, done, judges.get(named[e.name]), saved, results_file
            )
            seconds = time.perf_counter() - begin
            print(f"{e.name}: {describe(results[e.name])}, {seconds:,.1f} s", flush=True)
    if ranks.rank == 0:
        finish(evaluations, results, results_file)


def conclude(
    e: Evaluation,
    wanted: range,
    done: dict[int, dict],
    judge: Judge | None,
    saved: dict,
    results_file: Path,
) -> Result:
    """Scores and writes an evaluation. Raises OSError if answers are missing."""
    if lost := [n for n in wanted if n not in done]:
        raise OSError(
            f"{e.file}: {len(lost)} answers of other processes are missing beside it; all "
            "processes must write to the same folder"
        )
    result = score(e.task, [done[n] for n in wanted], judge)
    saved[e.file.name] = entry_of(e, result, judge)
    write_json(results_file, saved, indent=2)  # first: the file is known by its entry
    write_records(e.file, result.records)
    if done.keys() <= set(wanted):  # else a larger --limit needs the parts
        for path in e.parts():
            path.unlink()
    return result


def check_outputs(
    args: argparse.Namespace, evaluations: list[Evaluation], saved: dict
) -> list[Evaluation]:
    """The evaluations of whose files something is there that other settings or data made. Raises
    ValueError for that without --overwrite, and for a file that this command reads."""
    differing = []
    for e in evaluations:
        check_output_file(e.file, args.data)
        for path in e.parts():
            if read_line(first_line(path)) is None:  # killed before the first answer
                path.unlink()
        if reasons := e.differing(saved):
            differing.append(e)
            if not args.overwrite:
                raise ValueError(f"{reasons[0]}; name another --output, or give --overwrite")
    return differing


def delete_evaluations(evaluations: list[Evaluation], saved: dict, results_file: Path) -> None:
    """Their files, once nothing says any more that these are of another evaluation."""
    for e in evaluations:
        saved.pop(e.file.name, None)
    if evaluations:
        write_json(results_file, saved, indent=2)
    for e in evaluations:
        for path in (*e.parts(), e.file):
            path.unlink(missing_ok=True)


def read_results(path: Path) -> dict:
    """results.json of earlier runs, file -> `entry_of`."""
    saved = read_json(path) if path.exists() else {}
    if not isinstance(saved, dict) or not all(isinstance(v, dict) for v in saved.values()):
        raise ValueError(f"{path}: not a results file of eval.py; name another folder")
    return saved


def entry_of(e: Evaluation, result: Result, judge: Judge | None) -> dict:
    entry = {
        "variant": e.variant,
        "adapter": e.adapter and str(e.adapter),
        "task": e.task,
        "data": str(e.data),
        "metrics": result.metrics,
        "count": result.count,
        "unit": result.unit,
        "missing": result.missing,
        "identity": e.identity,
    }
    if judge is not None:
        entry["judge"] = judge.model
    return entry | ({"subjects": result.groups} if result.groups else {})


def name_judge(args: argparse.Namespace, e: Evaluation, saved: dict) -> tuple[str, str] | None:
    """Address and model of the judge that the command line names; else of the one that gave points
    before, whose replies are kept: without an address it is not asked again."""
    if TASKS[e.task].kind != "judged":
        return None
    model = args.judge_model or saved.get(e.file.name, {}).get("judge")
    return (args.judge_url or "", model) if model else None


def judge_beside(file: Path, url: str, model: str) -> Judge:
    """The judge whose replies are in the folder of a file of completions or results."""
    return Judge(url, model, os.environ.get("OPENAI_API_KEY", ""), file.parent / "judge.jsonl")


def finish(evaluations: list[Evaluation], results: dict[str, Result], results_file: Path) -> None:
    """The table, what it lacks, what was written and what to do next."""
    if len(evaluations) > 1:
        print(f"\n{table(evaluations, results)}")
    of_judged = [results[e.name] for e in evaluations if TASKS[e.task].kind == "judged"]
    if any("points" not in result.metrics for result in of_judged):
        print(
            "no judge was asked: of judged tasks the table has the loss of the reference answers; "
            "the same command with --judge_url and --judge_model has the saved completions judged"
        )
    elif missing := sum(result.missing for result in of_judged):
        print(f"{missing} completions have no points; --judge_url and --judge_model ask for them")
    others = f"{len(evaluations)} files of completions" if len(evaluations) > 1 else "completions"
    print(f"wrote {results_file} and {others} beside it, as {evaluations[0].file.name}")
    for e in evaluations:
        if TASKS[e.task].kind not in ("loss", "judged"):
            file = shlex.quote(str(e.file))
            print(f"next: python eval.py --rescore {file} --task {e.task}")
            return


# ------------------------------------------------------------------------------------------
# Saved completions


def check_saved(row: dict, task: str, where: str) -> dict:
    """The example of a saved row, with what its score needs. Raises ValueError that names line and
    field."""
    if not isinstance(row, dict):
        raise ValueError(f"{where}: must be a JSON object, found {row!r:.60}")
    example, kind = typed_field(row, "example", dict, where), TASKS[task].kind
    read_intent(example, where) if task == "intent" else read_answers(example, where)
    numbers = ["loss", "accuracy", "tokens"] if kind == "loss" else []
    if "reference_tokens" in example:  # not in other programs' files
        numbers = ["reference_loss", "reference_accuracy", "reference_tokens"]
    for name in numbers:
        typed_field(example, name, float | int, where)
    texts = ["raw_prediction"] if kind != "loss" else []
    for name in texts + (["code", "entry_point", "test"] if kind == "code" else []):
        text_field(example, name, where)
    if task == "gsm8k" and final_number(example["raw_answers"][0]) is None:
        raise ValueError(f"{where}: field raw_answers[0] has no number")
    if kind == "choice":
        choices, logs = text_list(example, "choices", where, 2), example.get("loglikelihoods")
        if (
            not isinstance(logs, list)
            or len(logs) != len(choices)
            or not all(isinstance(log, float | int) for log in logs)
        ):
            raise ValueError(
                f"{where}: field loglikelihoods is {logs!r:.60}; {len(choices)} numbers are "
                "required"
            )
        if not all(map(str.strip, choices)):
            raise ValueError(f"{where}: field choices holds an empty one")
        if not isinstance(example.get("subject", ""), str):
            raise ValueError(f"{where}: field subject is {example['subject']!r:.60}; not a string")
        if example["raw_answers"][0] not in choices:
            raise ValueError(f"{where}: field raw_answers[0] is none of the choices")
    return example


def rescore(path: str | Path, task: str, judge: Judge | None = None) -> tuple[Result, int]:
    """Scores saved completions again; also returns how many scores equal the saved ones. Raises
    ValueError that names line and field."""
    examples, saved = [], []
    for where, row in read_rows(path):
        examples.append(check_saved(row, task, where))
        saved.append(row.get("score"))
    result = score(task, examples, judge)
    return result, sum(r["score"] == s for r, s in zip(result.records, saved))


def rescore_command(args: argparse.Namespace) -> None:
    if args.output:
        check_output_file(args.output, [args.rescore])
        if args.output.exists() and not args.overwrite:
            raise ValueError(f"{args.output}: is there already; name another, or give --overwrite")
    judge = None
    if args.judge_url:
        judge = judge_beside(Path(args.rescore), args.judge_url, args.judge_model)
        judge.check()
    result, equal = rescore(args.rescore, args.task[0], judge)
    print(f"{args.task[0]}: {describe(result)}")
    print(f"{equal} of {len(result.records)} scores equal the saved ones")
    if args.output:
        write_records(args.output, result.records)
        print(f"wrote {args.output}")


# ------------------------------------------------------------------------------------------
# Command line


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=(
            "Evaluate a base checkpoint and adapters on tasks, or score saved completions again.\n"
            "Run again, the same command continues; with torchrun, processes share the examples."
        ),
        epilog="tasks, and what their --data is:\n"
        + "\n".join(f"  {name:<12} {task.about}" for name, task in TASKS.items())
        + "\n\nsummary, law and translation are graded by a judge, a language model; its key is\n"
        "read from the environment (OPENAI_API_KEY). Without a judge, the loss of the reference\n"
        "answers is reported. humaneval and mbpp run generated programs, in a sandbox\n"
        "(sandbox.py).",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", help="base checkpoint: a directory or a hub name")
    source.add_argument(
        "--rescore", metavar="COMPLETIONS", help="saved completions to score again, without a model"
    )
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        help="an adapter over the base, a directory or a hub name; may be given several times",
    )
    parser.add_argument("--base", action="store_true", help="beside adapters, the base alone, too")
    parser.add_argument(
        "--task",
        action="append",
        choices=TASKS,
        required=True,
        metavar="TASK",
        help="a task of the list below; may be given several times, each with its --data",
    )
    parser.add_argument("--data", action="append", default=[], help="the task's file or folder")
    parser.add_argument(
        "--output",
        type=Path,
        help="a folder for results.json and one file of completions for each evaluation; or, for "
        "a single one, that file, NAME.jsonl",
    )
    parser.add_argument(
        "--max_new_tokens", type=int, help="longest completion (default: the task's, 32 to 512)"
    )
    parser.add_argument(
        "--batch_size", type=int, default=64, help="prompts decoded together (default: 64)"
    )
    parser.add_argument(
        "--chat_format",
        choices=CHAT_FORMATS,
        default="",
        metavar="FORMAT",
        help=f"how questions become prompts: {', '.join(CHAT_FORMATS)} (default: that of the "
        "model's family)",
    )
    parser.add_argument(
        "--plain",
        action="store_true",
        help="gsm8k, triviaqa, humaneval and mbpp without the chat format, for base models that "
        "were not trained to chat",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace what other settings, adapters or data made of --output",
    )
    parser.add_argument(
        "--limit",
        type=int,
        help="only the first so many examples of each task; more of them later continue",
    )
    parser.add_argument("--judge_url", help="an OpenAI-compatible endpoint, as https://HOST/v1")
    parser.add_argument("--judge_model", help="the judge's name there")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: cuda where there is one)")
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        help="of weights and activations (default: bfloat16 on a GPU, float32 on a CPU)",
    )
    return parser


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends the program for options that do not go together."""
    if args.model and not (args.data and args.output):
        parser.error("--model needs --data and --output")
    if args.model and len(args.data) != len(args.task):
        parser.error(f"{len(args.task)} --task, {len(args.data)} --data; each task needs its data")
    if args.rescore:
        if len(args.task) > 1:
            parser.error("--rescore takes one task")
        if TASKS[args.task[0]].kind == "loss":
            parser.error("--rescore: a file of task loss holds no completions; use --model")
        if TASKS[args.task[0]].kind == "judged" and not args.judge_url:
            parser.error(f"--rescore of {args.task[0]} needs --judge_url and --judge_model")
        only_with_a_model = "data adapter base limit plain chat_format max_new_tokens"
        for name in f"{only_with_a_model} device dtype".split():
            if getattr(args, name):
                parser.error(f"--rescore takes no --{name}")
    if bool(args.judge_url) != bool(args.judge_model):
        parser.error("--judge_url and --judge_model go together")
    if args.judge_url and not any(TASKS[task].kind == "judged" for task in args.task):
        parser.error("--judge_url: no task is judged")
    for name in ("max_new_tokens", "batch_size", "limit"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name} is {value}; must be at least 1")
    if not args.device:
        local_rank = os.environ.get("LOCAL_RANK", "0")
        args.device = f"cuda:{local_rank}" if torch.cuda.is_available() else "cpu"


def main() -> None:
    parser = make_parser()
    args = parser.parse_args()
    check_arguments(parser, args)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        rescore_command(args) if args.rescore else run(args)
    except (ValueError, OSError, RuntimeError) as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        print("stopped; the same command continues", file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
