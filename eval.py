"""Greedy decoding with a cache, tasks and their metrics.

Completions are saved one a line in the published shape:
{"example": {"prompt", "raw_prediction", "raw_answers"}, "score"}.
"""

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from data import (
    CHAT_FORMATS,
    IGNORE,
    Sample,
    Tokenizer,
    by_length,
    encode_file,
    is_text,
    load_tokenizer,
    pad,
    read_rows,
    text_field,
)
from model import (
    Cache,
    ModelConfig,
    Transformer,
    check_output_file,
    choose_dtype,
    load_model,
    local_directory,
    replacing,
    token_losses,
)

# ------------------------------------------------------------------------------------------
# Decoding


@torch.inference_mode()
def generate(
    model: Transformer,
    prompts: list[list[int]],
    max_new_tokens: int,
    eos_id: int,
    batch_size: int = 64,
) -> list[list[int]]:
    """Greedy continuations of prompts of any lengths, in their order, without the `eos_id` that
    ends them.

    Prompts of like length share a batch. A row of a batch does not depend on the others.
    """
    if not all(prompts):
        raise ValueError(f"prompt {prompts.index([])} is empty; at least one token is required")
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    completions: list[list[int]] = [[] for _ in prompts]
    with tqdm(total=len(prompts), desc="generate", unit="prompt", leave=False, disable=None) as bar:
        for start in range(0, len(order), batch_size):
            group = order[start : start + batch_size]
            rows = generate_batch(model, [prompts[i] for i in group], max_new_tokens, eos_id)
            for i, row in zip(group, rows.tolist()):
                completions[i] = row[: row.index(eos_id)] if eos_id in row else row
            bar.update(len(group))
    return completions


def generate_batch(
    model: Transformer, prompts: list[list[int]], max_new_tokens: int, eos_id: int
) -> Tensor:
    """New tokens (B, at most max_new_tokens), `eos_id` from each row's end on."""
    weight = model.lm_head.weight
    tokens = pad(prompts, eos_id).to(weight.device)  # (B, T), padding at the end
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=weight.device)
    rows = torch.arange(len(prompts), device=weight.device)
    cache = Cache.empty(model.config, len(prompts), tokens.shape[1] + max_new_tokens, weight)
    hidden, _ = model.hidden_states(tokens, cache)
    cache.seen.copy_(lengths)  # new tokens overwrite the padding
    hidden = hidden[rows, lengths - 1]  # (B, D)
    done = torch.zeros_like(rows, dtype=torch.bool)
    new = []
    while True:
        token = model.lm_head(hidden).argmax(-1).masked_fill(done, eos_id)
        new.append(token)
        done |= token == eos_id
        if len(new) == max_new_tokens or done.all():
            return torch.stack(new, 1)
        hidden = model.hidden_states(token[:, None], cache)[0][:, 0]


# ------------------------------------------------------------------------------------------
# Tasks


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


# task -> score of a prediction, given the accepted answers; None: the task is the loss of given
# answers
TASKS: dict[str, Callable[[str, list[str]], int] | None] = {
    "exact": score_exact,
    "intent": score_intent,
    "loss": None,
}


def read_examples(path: str | Path, task: str) -> list[dict]:
    """Rows {"prompt", "raw_answers"} of an evaluation file. Prompts already carry the chat format.
    Raises ValueError that names file, line and field."""
    examples = []
    for where, row in read_rows(path):
        examples.append(example_fields(row, where, task))
    return examples


def example_fields(row: dict, where: str, task: str) -> dict:
    answers = row.get("raw_answers")
    if answers is None and ("messages" in row or "completion" in row):
        raise ValueError(f"{where}: field raw_answers is missing; this looks like a training file")
    if not isinstance(answers, list) or not answers or not all(map(is_text, answers)):
        raise ValueError(
            f"{where}: field raw_answers is {answers!r:.60}; a list of strings is required"
        )
    if task == "intent":
        try:
            json.loads(answers[0])["slots"].items()
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise ValueError(
                f"{where}: field raw_answers[0] is {answers[0]!r:.60}; "
                'JSON with an object "slots" is required'
            ) from None
    return {"prompt": text_field(row, "prompt", where), "raw_answers": answers}


def read_loss_samples(path: str | Path, tokenizer: Tokenizer) -> list[Sample]:
    """The samples of a chat file. Raises ValueError for one without an answer that counts."""
    samples = encode_file(path, tokenizer)
    for i, (_, labels) in enumerate(samples, 1):
        if not any(label >= 0 for label in labels[1:]):
            raise ValueError(f"{path}: row {i} has no answer to score; every one is masked")
    return samples


def check_file(task: str, path: str | Path, tokenizer: Tokenizer) -> None:
    """Raises what evaluating `path` would raise over its rows, without a model."""
    read_loss_samples(path, tokenizer) if TASKS[task] is None else read_examples(path, task)


@dataclass
class Result:
    """What an evaluation gives: the mean, over how many of what, and one record a sample."""

    mean: float
    count: int
    unit: str
    records: list[dict]


def evaluate(
    model: Transformer,
    tokenizer: Tokenizer,
    task: str,
    path: str | Path,
    max_new_tokens: int = 128,
    batch_size: int = 64,
    limit: int | None = None,
) -> Result:
    """Runs `task` on a data file. Tasks with answers decode greedily; "loss" takes chat rows."""
    if TASKS[task] is None:
        return evaluate_loss(model, tokenizer, path, limit)
    examples = read_examples(path, task)[:limit]
    prompts = [
        [tokenizer.bos_id, *ids] for ids in tokenizer.encode_all([e["prompt"] for e in examples])
    ]
    completions = generate(model, prompts, max_new_tokens, tokenizer.eos_id, batch_size)
    return score_records(
        [
            {
                "prompt": e["prompt"],
                "raw_prediction": tokenizer.decode(completion),
                "raw_answers": e["raw_answers"],
            }
            for e, completion in zip(examples, completions)
        ],
        task,
    )


def score_records(examples: list[dict], task: str) -> Result:
    records = [
        {"example": e, "score": TASKS[task](e["raw_prediction"], e["raw_answers"])}
        for e in examples
    ]
    return Result(sum(r["score"] for r in records) / len(records), len(records), "samples", records)


@torch.inference_mode()
def evaluate_loss(
    model: Transformer,
    tokenizer: Tokenizer,
    path: str | Path,
    limit: int | None = None,
    max_tokens: int = 16384,
) -> Result:
    """Mean cross-entropy over the answers' tokens of a chat file; a record's score is its sample's
    mean."""
    samples = read_loss_samples(path, tokenizer)[:limit]
    records: list[dict] = [{} for _ in samples]
    total, count = 0.0, 0
    for group in by_length([len(ids) for ids, _ in samples], max_tokens):
        tokens = pad([samples[i][0] for i in group], tokenizer.eos_id)
        labels = pad([samples[i][1] for i in group], IGNORE)
        losses, _ = token_losses(model, tokens.to(model.lm_head.weight.device), labels)
        learned = [sum(label >= 0 for label in samples[i][1][1:]) for i in group]
        for i, part in zip(group, losses.double().split(learned)):
            ids, targets = samples[i]
            answer = [label for label in targets[1:] if label >= 0]
            records[i] = {
                "example": {
                    "prompt": tokenizer.decode([t for t, y in zip(ids, targets) if y < 0]),
                    "raw_answers": [tokenizer.decode(answer)],
                },
                "score": part.mean().item(),
            }
            total, count = total + part.sum().item(), count + len(answer)
    return Result(total / count, count, "tokens", records)


def write_records(path: str | Path, records: list[dict]) -> None:
    with replacing(path) as part:
        part.write_text(
            "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8"
        )


def rescore(path: str | Path, task: str) -> tuple[Result, int]:
    """Scores saved completions again; also returns how many scores equal the saved ones."""
    examples, saved = [], []
    for where, row in read_rows(path):
        if not isinstance(row.get("example"), dict):
            raise ValueError(
                f"{where}: field example is {row.get('example')!r:.60}; an object is required"
            )
        example = example_fields(row["example"], where, task)
        examples.append(
            {**example, "raw_prediction": text_field(row["example"], "raw_prediction", where)}
        )
        saved.append(row.get("score"))
    result = score_records(examples, task)
    return result, sum(r["score"] == s for r, s in zip(result.records, saved))


def main() -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        description=(
            "Evaluate a checkpoint, with or without an adapter, on a task; or score saved "
            "completions again."
        ),
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", help="checkpoint: a directory or a hub name")
    source.add_argument(
        "--rescore", metavar="COMPLETIONS", help="saved completions to score again, without a model"
    )
    parser.add_argument(
        "--adapter", help="a directory with expert_cfg.json and .safetensors, or a hub name"
    )
    parser.add_argument(
        "--task",
        choices=TASKS,
        required=True,
        help="exact: the completion is one of the answers; intent: ESFT's intent task, "
        "JSON compared; "
        "loss: mean cross-entropy of the answers in a chat file",
    )
    parser.add_argument(
        "--data",
        help="evaluation file: rows of prompt and raw_answers, for loss rows of messages or "
        "of prompt and completion",
    )
    parser.add_argument(
        "--output", help="where completions and scores are written, one line a sample"
    )
    parser.add_argument(
        "--max_new_tokens", type=int, default=128, help="longest completion (default: 128)"
    )
    parser.add_argument(
        "--batch_size", type=int, default=64, help="prompts decoded together (default: 64)"
    )
    parser.add_argument(
        "--chat_format",
        choices=CHAT_FORMATS,
        default="",
        help="how messages become text, for task loss (default: that of the model's family)",
    )
    parser.add_argument("--limit", type=int, help="only the first so many rows")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        default="",
        help="(default: bfloat16 on a GPU, float32 on a CPU)",
    )
    args = parser.parse_args()
    if args.model and not (args.data and args.output):
        parser.error("--model needs --data and --output")
    if args.rescore and (TASKS[args.task] is None or args.limit or args.data):
        parser.error("--rescore takes no --data, no --limit, and no task loss")
    for name in ("max_new_tokens", "batch_size", "limit"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name} is {value}; must be at least 1")
    try:
        if args.output:
            check_output_file(args.output, [args.data or args.rescore])
        if args.rescore:
            result, equal = rescore(args.rescore, args.task)
        else:
            base = local_directory(args.model)
            if args.adapter:
                args.adapter = local_directory(args.adapter, "adapter")
            ModelConfig.from_json(base / "config.json")  # refuses what is not supported
            tokenizer = load_tokenizer(base, args.chat_format)
            check_file(args.task, args.data, tokenizer)
            dtype = choose_dtype(args.dtype, args.device)
            model = load_model(base, args.device, dtype, args.adapter)
            sizes = args.max_new_tokens, args.batch_size, args.limit
            result = evaluate(model, tokenizer, args.task, args.data, *sizes)
        if args.output:
            write_records(args.output, result.records)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("stopped; nothing was written") from None
    perplexity = f" (perplexity {math.exp(result.mean):.3f})" if args.task == "loss" else ""
    print(f"{args.task}: {result.mean:.4f} over {result.count} {result.unit}{perplexity}")
    if args.rescore:
        print(f"{equal} of {result.count} scores equal the saved ones")
    if args.output:
        print(f"wrote {args.output}")
        if args.task != "loss":
            print(f"next: python eval.py --rescore {args.output} --task {args.task}")


if __name__ == "__main__":
    main()
