"""Fine-tune the experts that a task uses: score, select, train, evaluate; one process.

    python train.py --config configs/demo.toml [--key value ...]

Precedence: defaults < the config file < the command line.
"""

import argparse
import difflib
import hashlib
import importlib.util
import json
import math
import os
import re
import resource
import shutil
import signal
import sys
import time
import tomllib
import weakref
from collections.abc import Callable, Iterable
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from unittest import mock

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from data import (
    CHAT_FORMATS,
    IGNORE,
    Sample,
    Tokenizer,
    encode_file,
    epoch_order,
    load_tokenizer,
    pack,
    parse_json,
    rows_of_step,
    sample_tokens,
)
from eval import TASKS, Ask, answer_file, read_examples, score, write_records
from model import (
    EXPERT_PATHS,
    ModelConfig,
    MoE,
    Transformer,
    add_lora,
    build_model,
    check_device,
    choose_dtype,
    everything,
    fingerprint,
    load_adapter,
    load_model,
    local_directory,
    locked,
    lora_parameters,
    mark_trainable,
    open_tensors,
    read_checkpoint,
    read_expert_cfg,
    read_json,
    replacing,
    save_adapter,
    save_lora,
    sync_directory,
    token_losses,
    trained_parameters,
    write_json,
)
from select_experts import (
    DEFAULT_TOP_P,
    SELECTIONS,
    Scores,
    choose,
    collect_scores,
    describe,
    draw_scores,
    read_scores,
    scoring_batches,
)

# ------------------------------------------------------------------------------------------
# Configuration

LEARNING_RATE = {"esft": 1e-5, "full": 3e-5, "lora": 1e-4}  # the paper's, for each method


def key(default, meaning: str):
    return field(default=default, metadata={"help": meaning})


@dataclass
class TrainConfig:
    model: str = key("", "base checkpoint: a directory or a hub name")
    data: str = key(
        "", "training data: JSON lines with rows of messages, or of prompt and completion"
    )
    output_dir: str = key(
        "", "where the run writes; the same command run again continues from there"
    )
    method: str = key(
        "esft",
        "esft: train the selected experts; full: train everything; lora: train low-rank updates of "
        "all linear layers but embedding, router and head",
    )

    # Which experts. The base's experts are scored on the training data before training, and again
    # after it.
    expert_config: str = key("", "an expert_cfg.json; empty: select by score")
    score: str = key("token", "token: how often an expert is chosen; gate: with what weight")
    top_p: float | None = key(
        None, "part of a layer's score to select (default: 0.2 for token, 0.1 for gate)"
    )
    selection: str = key(
        "highest",
        "highest: the highest scored; lowest, random (drawn by seed): as many of each layer, as "
        "controls",
    )
    average: str = key("tokens", "scores are means over tokens, or over samples")
    n_sample_tokens: int = key(131072, "tokens to score on")
    shared_experts: bool = key(False, "train the shared experts, too")
    non_expert_modules: bool = key(
        False, "train attention, norms, router, embeddings and head, too"
    )

    # LoRA
    lora_rank: int = key(8, "rank of the update B A of a weight")
    lora_scaling: float = key(2.0, "what the update is multiplied by (PEFT's lora_alpha / r)")

    # Data
    chat_format: str = key(
        "", "how messages become text: deepseek_v2, deepseek_v3 (default: the model family's)"
    )
    seq_length: int = key(4096, "tokens of a packed row")
    document_mask: bool = key(
        False, "samples in a row do not see each other, and positions begin anew with each"
    )
    random_concat_ratio: float | None = key(
        None,
        "how often a sample that joins others in a row loses its first token (default: 0.2; with "
        "document_mask 0)",
    )
    validation_data: str = key("", "validation file; empty: a part of the training rows")
    validation_fraction: float = key(
        0.02, "part of the packed rows held out where validation_data is empty; 0: none"
    )

    # Optimization
    batch_size: int = key(32, "rows of one step, over all micro-batches and ranks")
    gradient_accumulation_steps: int = key(8, "micro-batches that a step's rows are split into")
    steps: int = key(500, "optimizer steps")
    learning_rate: float | None = key(
        None, "peak learning rate (default: 1e-5 for esft, 3e-5 for full, 1e-4 for lora)"
    )
    warmup_steps: int = key(0, "steps over which the learning rate rises to its peak")
    schedule: str = key("constant", "after warmup: constant, linear or cosine (both fall to 0)")
    weight_decay: float = key(
        0.1, "of AdamW, for matrices; a selected expert that no token reaches decays all the same"
    )
    adam_beta1: float = key(0.9, "of AdamW")
    adam_beta2: float = key(0.95, "of AdamW")
    max_grad_norm: float = key(1.0, "gradients are scaled down to this norm")
    aux_loss_alpha: float | None = key(
        None, "weight of the load balance loss; 0: none (default: the checkpoint's config)"
    )

    # Evaluation and saving
    eval_steps: int = key(100, "steps between validations; the best state becomes the adapter")
    save_steps: int = key(100, "steps between checkpoints to continue from")
    log_steps: int = key(10, "steps between printed lines; metrics.jsonl has every step")
    eval_sets: list[str] = key(
        (), "TASK:FILE, evaluated before and after training (tasks: see eval.py)"
    )
    max_new_tokens: int = key(0, "longest completion in these evaluations; 0: the task's own")

    # Machine
    seed: int = key(0, "of sampling, packing, order and random selection")
    device: str = key("", "cpu, cuda, cuda:1 ... (default: cuda where there is one)")
    dtype: str = key(
        "",
        "of weights and activations: bfloat16 or float32 (default: bfloat16 on a GPU, float32 on a "
        "CPU); the optimizer's are float32",
    )
    experts: str = key("auto", "auto, loop (the readable specification) or grouped (the fast path)")
    gradient_checkpointing: bool = key(
        True, "compute each layer again in backward: less memory, a third more time"
    )
    compile: bool | None = key(
        None,
        "true or false: whether layers go through torch.compile, which takes 10 to 60 seconds at "
        "the start, bfloat16, and a C++ compiler; not for experts loop, document_mask and lora "
        "(default: true on a GPU, if the model has a billion parameters or more and the run 200 "
        "micro-batches or more)",
    )
    deterministic: bool = key(
        True, "same seed and machine, same bits; false: let a GPU choose faster algorithms"
    )
    overwrite: bool = key(False, "delete what output_dir holds and start anew")

    def check(self) -> None:
        """Raises ValueError for the first impossible value; then settles what depends on other
        keys."""
        for f in fields(self):
            value = getattr(self, f.name)
            kinds = {
                str: (str,),
                bool: (bool,),
                int: (int,),
                float: (int, float),
                list[str]: (list, tuple),
                float | None: (int, float, type(None)),
                bool | None: (bool, type(None)),
            }[f.type]
            if type(value) not in kinds or (
                f.type == list[str] and not all(type(v) is str for v in value)
            ):
                kind = f"of type {getattr(f.type, '__name__', f.type)}"
                kind = "true or false" if f.type in (bool, bool | None) else kind
                raise ValueError(f"{f.name} is {value!r}; must be {kind}")
        if not self.device:
            self.device = "cuda" if torch.cuda.is_available() else "cpu"
        if not self.dtype:
            self.dtype = str(choose_dtype("", self.device)).removeprefix("torch.")
        for name in ("model", "data", "output_dir"):
            if not getattr(self, name):
                raise ValueError(f"{name} is missing; try --config configs/demo.toml, or --help")
        choices = {
            "method": tuple(LEARNING_RATE),
            "score": tuple(DEFAULT_TOP_P),
            "selection": SELECTIONS,
            "average": ("tokens", "samples"),
            "chat_format": ("", *CHAT_FORMATS),
            "schedule": ("constant", "linear", "cosine"),
            "dtype": ("", "bfloat16", "float32"),
            "experts": ("auto", *EXPERT_PATHS),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; must be one of "
                    f"{', '.join(filter(None, allowed))}"
                )
        if self.top_p is None:
            self.top_p = DEFAULT_TOP_P[self.score]
        if self.learning_rate is None:
            self.learning_rate = LEARNING_RATE[self.method]
        if self.random_concat_ratio is None:
            self.random_concat_ratio = 0.0 if self.document_mask else 0.2
        at_least = {
            "n_sample_tokens": 1,
            "lora_rank": 1,
            "seq_length": 2,
            "batch_size": 1,
            "gradient_accumulation_steps": 1,
            "steps": 1,
            "warmup_steps": 0,
            "weight_decay": 0,
            "eval_steps": 1,
            "save_steps": 1,
            "log_steps": 1,
            "max_new_tokens": 0,
            "seed": 0,
            "aux_loss_alpha": 0,
        }
        for name, least in at_least.items():
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise ValueError(f"{name} is {value}; must be at least {least}")
        for name, bound in (("seed", 2**63), ("lora_rank", 2**19)):
            if getattr(self, name) >= bound:
                raise ValueError(f"{name} is {getattr(self, name)}; must be below {bound}")
        between = {
            "top_p": (0, 1),
            "lora_scaling": (0, 1e6),
            "learning_rate": (0, 1),
            "max_grad_norm": (0, math.inf),
        }
        for name, (above, most) in between.items():
            if not above < getattr(self, name) <= most:
                raise ValueError(
                    f"{name} is {getattr(self, name)}; must be above {above} and at most {most}"
                )
        for name in ("random_concat_ratio", "validation_fraction", "adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; must be at least 0 and below 1")
        if self.batch_size % self.gradient_accumulation_steps:
            raise ValueError(
                f"gradient_accumulation_steps is {self.gradient_accumulation_steps}; "
                f"must divide batch_size ({self.batch_size})"
            )
        self._check_without_effect()
        if self.compile and (obstacle := no_compilation(self)):
            raise ValueError(f"compile is true; cannot be with {obstacle}")
        for entry in self.eval_sets:
            if entry.partition(":")[0] not in TASKS or ":" not in entry:
                raise ValueError(
                    f"eval_sets: {entry!r} must be TASK:FILE with a task of {', '.join(TASKS)}"
                )

    def _check_without_effect(self) -> None:
        """Raises ValueError for a key that was set although another one takes its effect."""
        selecting = ("selection", "shared_experts", "non_expert_modules")
        without_effect = []
        if self.method != "esft":
            without_effect.append((f"method is {self.method}", (*selecting, "expert_config")))
        if self.method != "lora":
            without_effect.append((f"method is {self.method}", ("lora_rank", "lora_scaling")))
        if self.expert_config:
            without_effect.append(("expert_config is given", selecting))
        for reason, names in without_effect:
            for name in names:
                if getattr(self, name) != TrainConfig.__dataclass_fields__[name].default:
                    raise ValueError(
                        f"{name} is {getattr(self, name)!r}; no effect, since {reason}"
                    )
        if self.document_mask and self.random_concat_ratio:
            raise ValueError(
                f"random_concat_ratio is {self.random_concat_ratio}; must be 0 with document_mask, "
                "which keeps the samples of a row apart"
            )


def no_compilation(config: TrainConfig) -> str:
    """The key and value with which layers cannot be compiled, and why; empty if there is none."""
    if config.dtype == "float32":
        return "dtype float32, since grouped products compile in bfloat16 alone"
    if config.experts == "loop":
        return "experts loop, which waits for each expert's number of tokens"
    if config.document_mask:
        return "document_mask, which makes other shapes in every step"
    if config.method == "lora":
        return "method lora, which has parameters of its own in each expert"
    return ""


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        description="Fine-tune the experts of a DeepSeek-MoE checkpoint that a task uses: score, "
        "select, train, evaluate. Keys come from --config, a TOML file, and from the command "
        "line, which wins.",
        epilog="example: python train.py --config configs/demo.toml --top_p 0.3 "
        "--output_dir runs/p3",
    )
    parser.add_argument(
        "--config", metavar="FILE.toml", help="keys of this list as a flat TOML file"
    )
    for f in fields(TrainConfig):
        shown = str(f.default).lower() if f.type is bool else f.default
        default = "" if f.default in (None, "", ()) else f" (default: {shown})"
        parser.add_argument(
            f"--{f.name}",
            help=f.metadata["help"] + default,
            default=MISSING,
            metavar="VALUE",
            **({"nargs": "*"} if f.type == list[str] else {}),
        )
    return parser


def parse_config(argv: list[str] | None = None) -> TrainConfig:
    """The config of a command line. Raises ValueError that names file, key and what is required."""
    return config_of(command_line().parse_args(argv))


def config_of(arguments: argparse.Namespace) -> TrainConfig:
    """`parse_config`, of what is parsed."""
    args, path = vars(arguments), arguments.config
    values = {}
    if path:
        try:
            values = tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))
        except FileNotFoundError:
            raise ValueError(f"{path}: no such config file") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: not valid TOML: {error}") from None
        known = [f.name for f in fields(TrainConfig)]
        for name in values.keys() - set(known):
            close = difflib.get_close_matches(name, known, 1)
            raise ValueError(
                f"{path}: unknown key {name}" + (f"; did you mean {close[0]}?" if close else "")
            )
    for f in fields(TrainConfig):
        if args[f.name] is not MISSING:
            values[f.name] = parse_value(f, args[f.name])
    config = TrainConfig(**values)
    try:
        config.check()
    except ValueError as error:
        name = str(error).split()[0].rstrip(":")
        from_file = name in values and args[name] is MISSING
        raise ValueError(f"{path}: {error}" if from_file else str(error)) from None
    return config


def parse_value(f, text: str | list[str]):
    if f.type in (str, list[str]):
        return text
    if f.type in (bool, bool | None):
        if text not in ("true", "false"):
            raise ValueError(f"{f.name} is {text!r}; must be true or false")
        return text == "true"
    try:
        return int(text) if f.type is int else float(text)
    except ValueError:
        kind = "an integer" if f.type is int else "a number"
        raise ValueError(f"{f.name} is {text!r}; must be {kind}") from None


# ------------------------------------------------------------------------------------------
# One process; train_ep.py has the counterpart for many


class SingleProcess:
    """What the loop asks of other ranks, where there are none."""

    rank, world_size = 0, 1

    def split(self, model: Transformer) -> None:
        """Takes out of a model on the meta device what other ranks hold."""

    def sum(self, value: Tensor) -> Tensor:
        """The sum of a tensor over all ranks."""
        return value

    def reduce_gradients(self, gradients: dict[str, Tensor]) -> None:
        """Sums gradients over the ranks that hold the same parameters."""

    def grad_norm(self, gradients: dict[str, Tensor]) -> Tensor:
        """The norm of the whole model's gradient."""
        return nn.utils.get_total_norm(gradients.values())

    def saves(self, name: str) -> bool:
        """Whether it is this rank that saves the trained tensor of that name."""
        return True

    def gather(self, tensors: dict[str, Tensor]) -> dict[str, Tensor] | None:
        """On the first rank the trained tensors of all, by name."""
        return tensors

    def first(self, function, *args, **options):
        """What the function returns, or raises, on the first rank, where alone it runs."""
        return function(*args, **options)

    def each(self, function, *args, **options):
        """What the function returns here; an error on one rank is raised on all."""
        return function(*args, **options)

    def all(self, value) -> list:
        """Every rank's value."""
        return [value]

    def check_same(self, values: dict) -> None:
        """Raises ValueError on all ranks if one has other values."""


# ------------------------------------------------------------------------------------------
# Optimizer


class MasterAdamW:
    """AdamW on float32 copies of the trained parameters. A bfloat16 weight of 0.02 is 6e-5 from its
    neighbours and would not move at learning rate 1e-5. A float32 parameter is its own master."""

    def __init__(self, parameters: dict[str, nn.Parameter], config: TrainConfig):
        self.parameters = parameters
        self.masters = {name: p.detach().float() for name, p in parameters.items()}
        matrices = [m for m in self.masters.values() if m.ndim > 1]
        vectors = [m for m in self.masters.values() if m.ndim < 2]  # norms and biases do not decay
        groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]  # may be empty
        if any(master.is_meta for master in self.masters.values()):
            return  # a plan counts the bytes of gradients, and takes no step
        self.adamw = torch.optim.AdamW(
            groups,
            lr=config.learning_rate,
            fused=True,
            betas=(config.adam_beta1, config.adam_beta2),
            weight_decay=config.weight_decay,
        )

    def accumulate(self) -> None:
        """Adds the parameters' gradients to the masters', in float32, and frees them."""
        arrived = [(self.masters[n], p) for n, p in self.parameters.items() if p.grad is not None]
        # A few at a time: those of a layer are freed before the next layer's float32 ones are made.
        for start in range(0, len(arrived), 32):
            group = arrived[start : start + 32]
            sums = [(master.grad, p.grad) for master, p in group if master.grad is not None]
            if sums:
                torch._foreach_add_(*map(list, zip(*sums)))
            new = [(master, p) for master, p in group if master.grad is None]
            for master, p in new:
                master.grad = p.grad if p.dtype == torch.float32 else torch.empty_like(master)
            copies = [(m.grad, p.grad) for m, p in new if m.grad is not p.grad]
            if copies:
                torch._foreach_copy_(*map(list, zip(*copies)))
            for _, p in group:
                p.grad = None

    @property
    def gradients(self) -> dict[str, Tensor]:
        for master in self.masters.values():
            if master.grad is None:  # no token reached it
                master.grad = torch.zeros_like(master)
        return {name: master.grad for name, master in self.masters.items()}

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        for group in self.adamw.param_groups:
            group["lr"] = learning_rate
        self.adamw.step()
        self.adamw.zero_grad()
        if self.masters:
            torch._foreach_copy_([*self.parameters.values()], [*self.masters.values()])

    def state(self, saves: Callable[[str], bool]) -> dict[str, Tensor]:
        """Masters and moments by name, on the CPU, of the parameters that `saves` names."""
        tensors = {}
        for name, master in self.masters.items():
            if not saves(name):
                continue
            moments = self.adamw.state[master]
            tensors |= {
                f"master.{name}": master,
                f"exp_avg.{name}": moments["exp_avg"],
                f"exp_avg_sq.{name}": moments["exp_avg_sq"],
            }
        return {name: tensor.cpu() for name, tensor in tensors.items()}

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor], step: int) -> None:
        for name, master in self.masters.items():
            master.copy_(tensors[f"master.{name}"])
            self.parameters[name].copy_(master)
            device = master.device
            self.adamw.state[master] = {
                "step": torch.tensor(float(step), device=device),
                # Copied: on a CPU these are the checkpoint's file, mapped.
                "exp_avg": tensors[f"exp_avg.{name}"].to(device, copy=True),
                "exp_avg_sq": tensors[f"exp_avg_sq.{name}"].to(device, copy=True),
            }


def learning_rate_at(config: TrainConfig, step: int) -> float:
    """Learning rate of step `step`, from 0."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(config.steps - config.warmup_steps, 1)
    factor = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}
    return config.learning_rate * factor[config.schedule]


# ------------------------------------------------------------------------------------------
# Output directory: train_config.json, expert_cfg.json, scores before and after, adapter/,
# metrics.jsonl, checkpoints/, eval/, results.json, report.txt, report.png


def input_files(config: TrainConfig) -> list[str]:
    sets = [entry.partition(":")[2] for entry in config.eval_sets]
    return [p for p in (config.data, config.validation_data, config.expert_config, *sets) if p]


def identity(config: TrainConfig, base_fingerprint: str) -> dict:
    """What makes two runs the same: the keys that change results, the base's weights, the content
    of input files."""
    keys = asdict(config)
    for name in ("overwrite", "device", "log_steps", "output_dir"):  # a run may be moved
        del keys[name]
    keys["eval_sets"] = list(config.eval_sets)
    keys["fingerprint of model"] = base_fingerprint
    for path in input_files(config):
        keys[f"sha256 of {path}"] = content_hash(Path(path))
    return keys


def content_hash(path: Path) -> str:
    """Of a file, or of all files of a folder (as some evaluations read)."""
    digest = hashlib.sha256()
    for file in [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def check_output(config: TrainConfig, mine: dict) -> None:
    """Raises ValueError if output_dir holds a run of another config than `mine`, naming the keys
    that differ, or something else, or an input of this run."""
    output = Path(config.output_dir)
    for path in (config.model, *input_files(config)):
        if Path(path).resolve().is_relative_to(output.resolve()):
            raise ValueError(f"output_dir is {output}; it holds {path}, which this run reads")
    if output.exists() and not output.is_dir():
        raise ValueError(f"output_dir is {output}; it is a file")
    saved = output / "train_config.json"
    if saved.exists() and not config.overwrite:
        theirs = read_json(saved)
        if not isinstance(theirs, dict):
            raise ValueError(f"{saved}: must be a JSON object")
        differing = [
            f"{k} ({theirs.get(k)!r}, now {mine.get(k)!r})"
            for k in sorted(mine.keys() | theirs.keys())
            if mine.get(k) != theirs.get(k)
        ]
        if differing:
            raise ValueError(
                f"{output} holds a run of another config: {', '.join(differing)}; "
                "choose another output_dir, or --overwrite true to delete it"
            )
    elif not saved.exists() and output.exists():
        # A run that was killed at its very start leaves a .part.
        if any(path.suffix != ".part" for path in output.iterdir()):
            raise ValueError(
                f"output_dir is {output}; it holds files that no run of train.py wrote"
            )


def checkpoints(output: Path) -> list[Path]:
    saved = (output / "checkpoints").glob("step-*")
    saved = [path for path in saved if path.name.removeprefix("step-").isdecimal()]
    return sorted(saved, key=lambda path: int(path.name.removeprefix("step-")))


def file_hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_checkpoint(output: Path, optimizer: MasterAdamW, state: dict, parallel) -> None:
    """Writes checkpoints/step-N, unless it is there (or N is 0), whole or not at all, with the hash
    of each file; keeps the newest two. Each rank writes a file with what it `saves`."""
    directory = output / "checkpoints" / f"step-{state['step']:06d}"
    if not state["step"] or parallel.first(directory.exists):
        return
    part = directory.with_name(f".{directory.name}.part")
    parallel.first(shutil.rmtree, part, ignore_errors=True)

    def write_tensors() -> dict[str, str]:
        if not (tensors := optimizer.state(parallel.saves)):
            return {}
        rank = f"-{parallel.rank}" if parallel.rank else ""
        path = part / f"optimizer{rank}.safetensors"
        with replacing(path) as file:
            save_file(tensors, file)
        return {path.name: file_hash(path)}

    def finish() -> None:
        write_json(part / "state.json", state)
        hashes["state.json"] = file_hash(part / "state.json")
        write_json(part / "sha256.json", hashes)
        os.replace(part, directory)
        sync_directory(directory.parent)
        for old in checkpoints(output)[:-2]:
            shutil.rmtree(old)

    try:
        written = parallel.all(parallel.each(write_tensors))
        hashes = {name: value for files in written for name, value in files.items()}
        parallel.first(finish)
    finally:
        if parallel.rank == 0:
            shutil.rmtree(part, ignore_errors=True)


def damage(directory: Path, parallel) -> str | None:
    """What is wrong with a checkpoint; None if its files are as they were written. Ranks share the
    files."""
    try:
        hashes = parallel.first(read_json, directory / "sha256.json")
        names = parallel.first(lambda: sorted(path.name for path in directory.iterdir()))
    except (ValueError, OSError) as error:
        return str(error)
    if not isinstance(hashes, dict):
        return f"{directory}/sha256.json: must be a JSON object"
    for name in ("state.json", *hashes):
        if name not in names:
            return f"{directory / name}: is missing"
    found = None
    for name in names[parallel.rank :: parallel.world_size]:
        try:
            if name != "sha256.json" and file_hash(directory / name) != hashes.get(name):
                found = f"{directory / name}: is not as it was written (its hash differs)"
        except OSError as error:
            found = str(error)
    return next(filter(None, parallel.all(found)), None)


def newest_checkpoint(output: Path, parallel) -> Path | None:
    """The newest checkpoint that is whole. Damaged ones are reported and set aside."""
    problem = None
    for directory in reversed(parallel.first(checkpoints, output)):
        problem = damage(directory, parallel)
        if problem is None:
            return directory
        aside = directory.with_name(f"damaged-{directory.name}")
        parallel.first(shutil.rmtree, aside, ignore_errors=True)
        parallel.first(os.replace, directory, aside)
        print(f"{problem}; set aside as {aside}, the checkpoint before it is used", flush=True)
    if problem:
        print("there is none before it: begins at step 1", flush=True)
    return None


def read_optimizer(directory: Path, optimizer: MasterAdamW, trained: Iterable[str]) -> dict:
    """The optimizer's tensors of this rank's parameters; `trained`: the names of all ranks'. Raises
    ValueError unless the checkpoint holds just these, whatever number of ranks wrote it."""
    tensors, held = {}, set()
    for path in sorted(directory.glob("optimizer*.safetensors")):
        with open_tensors(path) as file:
            for name in file.keys():
                kind, _, parameter = name.partition(".")
                held.add(parameter)
                if parameter in optimizer.masters:
                    tensors[name] = file.get_tensor(name)
    if held != set(trained):
        raise ValueError(
            f"{directory.parents[1]}/expert_cfg.json: selects other tensors than {directory} "
            "holds; it was changed during the run"
        )
    return tensors


def resume(output: Path, optimizer: MasterAdamW, trained: Iterable[str], parallel) -> dict:
    """Puts the newest whole checkpoint in place and returns its state; metrics.jsonl goes back to
    that step, and what a killed process was writing goes. `trained`: see `read_optimizer`."""
    state = {"step": 0, "best_loss": None, "seconds": 0.0}
    if newest := newest_checkpoint(output, parallel):
        state = parallel.first(read_json, newest / "state.json")
        tensors = parallel.each(read_optimizer, newest, optimizer, trained)
        optimizer.restore(tensors, state["step"])

    def clean() -> None:
        for part in (output / "checkpoints").glob(".step-*.part"):
            shutil.rmtree(part)
        metrics = output / "metrics.jsonl"
        if metrics.exists():  # later steps will come again; a last line may be cut short
            kept = read_metrics(metrics, state["step"])
            with replacing(metrics) as part:
                text = "".join(json.dumps(line) + "\n" for line in kept)
                part.write_text(text, encoding="utf-8")

    parallel.first(clean)
    return state


def add_record(path: Path, record: dict, sync: bool) -> None:
    """Appends a line of JSON; `sync` flushes it to disk."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
        file.flush()
        if sync:
            os.fsync(file.fileno())


def read_metrics(path: Path, steps: int) -> list[dict]:
    """The lines of metrics.jsonl for the first `steps` steps. What stands behind them is not read:
    a process that was killed, or a power cut, may have left anything there. Raises ValueError that
    names file and line."""
    lines = path.read_bytes().split(b"\n")[:steps]
    records = []
    for i, line in enumerate(lines, 1):
        where = f"{path}: line {i}"
        record = parse_json(line.decode("utf-8", "replace"), where)
        if not isinstance(record, dict) or record.get("step") != i:
            raise ValueError(f"{where}: {line!r:.60}; the record of step {i} is required")
        records.append(record)
    if len(records) < steps:
        raise ValueError(f"{path}: ends at line {len(records)}; {steps} steps were done")
    return records


# ------------------------------------------------------------------------------------------
# The job


@dataclass
class Rows:
    """Packed rows (rows, seq_length), for training or for validation; see `data.pack`."""

    tokens: Tensor
    labels: Tensor
    documents: Tensor

    def take(self, rows) -> "Rows":
        return Rows(self.tokens[rows], self.labels[rows], self.documents[rows])

    def split(self, size: int) -> list["Rows"]:
        columns = self.tokens.split(size), self.labels.split(size), self.documents.split(size)
        return [Rows(*part) for part in zip(*columns)]

    def unlearned(self) -> "Rows":
        """The same rows, with nothing to learn from them."""
        return replace(self, labels=torch.full_like(self.labels, IGNORE))

    @property
    def learned(self) -> Tensor:
        """How many labels count: the first of a row is predicted by nothing."""
        return (self.labels[:, 1:] != IGNORE).sum()

    def losses(self, config: TrainConfig, model: Transformer, **options):
        """`token_losses` of these rows."""
        documents = self.documents if config.document_mask else None
        return token_losses(model, self.tokens.to(config.device), self.labels, documents, **options)


def prepare_rows(
    config: TrainConfig, samples: list[Sample], tokenizer: Tokenizer
) -> tuple[Rows, Rows | None]:
    """Rows for training, and for validation where the config asks for it."""

    def packed(samples: list[Sample], ratio: float) -> Rows:
        sizes = config.seq_length, ratio, tokenizer.eos_id, config.seed
        return Rows(*pack(samples, *sizes, document_mask=config.document_mask))

    rows, held_out = packed(samples, config.random_concat_ratio), None
    if config.validation_data:
        held_out = packed(encode_file(config.validation_data, tokenizer), 0.0)
    elif config.validation_fraction:
        held = math.ceil(len(rows.tokens) * config.validation_fraction)
        if held == len(rows.tokens):
            raise ValueError(
                f"{config.data}: fills {held} row of seq_length {config.seq_length}, too few to "
                "hold out a part; set validation_data, a shorter seq_length, or "
                "validation_fraction 0"
            )
        order = epoch_order(len(rows.tokens), config.seed, -1)
        rows, held_out = rows.take(order[held:]), rows.take(order[:held])
    for part, path in ((rows, config.data), (held_out, config.validation_data or config.data)):
        if part and not part.learned:
            raise ValueError(f"{path}: holds no answer to learn from; every one is masked")
    return rows, held_out


@dataclass
class Inputs:
    """What a run reads, checked."""

    base: Path
    base_config: ModelConfig
    whole: Transformer  # all of the base, without data
    tokenizer: Tokenizer
    samples: list[Sample]
    rows: Rows
    held_out: Rows | None
    identity: dict


def read_inputs(config: TrainConfig) -> Inputs:
    """Reads and checks everything but the base's weights, of which it reads what they are called.
    Nothing is written. Raises ValueError and OSError that name file and field."""
    check_device(config.device)
    base = local_directory(config.model)
    meta, stored = read_checkpoint(base)
    if not meta.config.moe_layers:
        raise ValueError(
            f"{base}/config.json: first_k_dense_replace and moe_layer_freq leave no MoE layer; "
            "there are no experts to score"
        )
    settle_compile(config, meta.config, sum(p.numel() for p in meta.parameters()))
    tokenizer = load_tokenizer(base, config.chat_format)
    samples = encode_file(config.data, tokenizer)
    rows, held_out = prepare_rows(config, samples, tokenizer)
    for entry in config.eval_sets:
        task, _, path = entry.partition(":")
        read_examples(path, task, Ask(tokenizer))
    if config.expert_config:
        given = read_expert_cfg(config.expert_config, meta.config)
        if not trained_parameters(meta, given):
            raise ValueError(f"{config.expert_config}: selects nothing to train")
    mine = identity(config, fingerprint(stored))
    check_output(config, mine)
    return Inputs(base, meta.config, meta, tokenizer, samples, rows, held_out, mine)


def compiler_error(device: str) -> str:
    """Why torch.compile does not work here, as without a C++ compiler; empty if it does."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(8, device=device))
    except Exception as error:  # the compiler's own kinds, and those of what it calls
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    return ""


def settle_compile(config: TrainConfig, model_config: ModelConfig, parameters: int) -> None:
    """Decides `compile` where it is left open. Raises ValueError where it was asked for and the
    model's sizes or the machine do not allow it: grouped products want strides of 16 bytes."""
    sizes = {n: getattr(model_config, n) for n in ("hidden_size", "moe_intermediate_size")}
    odd = [f"{name} {size}" for name, size in sizes.items() if size % 8]
    if config.compile and odd:
        raise ValueError(f"compile is true; cannot be with {odd[0]}: must be a multiple of 8")
    micro_batches = config.steps * config.gradient_accumulation_steps
    pays = config.device.startswith("cuda") and parameters >= 1e9 and micro_batches >= 200
    by_itself = config.compile is None
    if by_itself:
        config.compile = pays and not odd and not no_compilation(config)
    if config.compile and (reason := compiler_error(config.device)):
        if not by_itself:
            raise ValueError(f"compile is true; torch.compile does not work here: {reason}")
        config.compile = False
        print(f"layers are not compiled, as torch.compile does not work here: {reason}")


def score_experts(
    config: TrainConfig, model: Transformer, inputs: Inputs, path: Path, parallel
) -> Scores:
    """Scores of the experts on the training data; those in `path`, if this run wrote them
    before."""
    if not parallel.first(path.exists):
        sizes = config.n_sample_tokens, config.seq_length, config.seed
        drawn = scoring_batches(sample_tokens(inputs.samples, *sizes), inputs.tokenizer.eos_id)
        parallel.first(write_json, path, collect_scores(model, drawn, config.average))
    return parallel.first(read_scores, path)


def choose_experts(config: TrainConfig, model_config: ModelConfig, scores: Scores) -> dict:
    """The run's expert_cfg: full's, that of the run that is continued, the given one, or a new
    selection, which is written."""
    path = Path(config.output_dir) / "expert_cfg.json"
    if path.exists():
        return read_expert_cfg(path, model_config)
    if config.method == "full":
        expert_cfg = everything(model_config)
    elif config.expert_config:
        expert_cfg = read_expert_cfg(config.expert_config, model_config)
    else:
        experts = choose(scores, config.score, config.top_p, config.selection, config.seed)
        expert_cfg = {
            "experts": experts,
            "shared_experts": config.shared_experts,
            "non_expert_modules": config.non_expert_modules,
        }
        print(describe(experts, scores, config.score))
    write_json(path, expert_cfg)
    return expert_cfg


def mark_trained(
    config: TrainConfig, model: Transformer, expert_cfg: dict | None
) -> dict[str, nn.Parameter]:
    """Freezes all but what the method trains, and returns that; LoRA's matrices are added."""
    if config.method == "lora":
        add_lora(model, config.lora_rank, config.lora_scaling, config.seed)
        return lora_parameters(model)
    mark_trainable(model, expert_cfg)
    return trained_parameters(model, expert_cfg)


def run_eval_sets(
    config: TrainConfig, model: Transformer, tokenizer: Tokenizer, output: Path, when: str, parallel
) -> dict:
    """Evaluates every set once, and keeps completions and means in output_dir/eval/."""
    means_path = output / "eval" / f"{when}.json"

    def read_means() -> dict | None:
        means = read_json(means_path) if means_path.exists() else None
        return means if isinstance(means, dict) and means.keys() == {*config.eval_sets} else None

    def conclude(i: int, task: str, path: str, examples: list[dict]) -> dict:
        result = score(task, examples)
        write_records(output / "eval" / f"{when}.{i}.{Path(path).stem}.jsonl", result.records)
        print(f"{when} training: {task} on {path}: {result.mean:.3f}", flush=True)
        return {"mean": result.mean, "count": result.count, "unit": result.unit}

    if means := parallel.first(read_means):
        return means
    means = {}
    for i, entry in enumerate(config.eval_sets, 1):
        task, _, path = entry.partition(":")
        examples = answer_file(model, tokenizer, task, path, config.max_new_tokens)
        means[entry] = parallel.first(conclude, i, task, path, examples)
    parallel.first(write_json, means_path, means, indent=2)
    return means


@dataclass
class Job(Inputs):
    """What a run works on."""

    output: Path
    model: Transformer
    expert_cfg: dict | None  # none with LoRA
    parameters: dict[str, nn.Parameter]  # the trained ones that this rank holds
    trained: dict[str, nn.Parameter]  # all trained ones, without data
    base_parameters: int  # how many the base has
    alpha: float  # weight of the load balance loss
    before: dict  # what run_eval_sets gave

    def save_adapter(self, parallel) -> None:
        tensors, directory = parallel.gather(self.parameters), self.output / "adapter"
        if self.expert_cfg is None:
            parallel.first(save_lora, self.model, directory, tensors)
        else:
            parallel.first(save_adapter, self.model, self.expert_cfg, directory, tensors)


def begin_output(config: TrainConfig, identity: dict) -> None:
    """Deletes what `overwrite` says, and writes whose output_dir is."""
    output = Path(config.output_dir)
    if config.overwrite:
        # First what says how far a run came, last whose the rest is: killed half-way, what is left
        # is neither taken for a finished run nor continued from, and can be overwritten again.
        order = {"results.json": 0, "checkpoints": 1, "train_config.json": 3}
        for path in sorted(output.iterdir(), key=lambda path: order.get(path.name, 2)):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    write_json(output / "train_config.json", identity, indent=2)


def check_shared(output: Path, identity: dict, patience: float = 60.0) -> None:
    """Raises OSError where the first rank's output_dir is not to be seen, within some seconds: a
    network's file system may show what was there before for a while."""
    path, until = output / "train_config.json", time.monotonic() + patience
    while not path.exists() or read_json(path) != identity:
        if time.monotonic() > until:
            raise OSError(f"{output}: is not the first rank's; all ranks must see one output_dir")
        time.sleep(0.5)


def prepare(config: TrainConfig, inputs: Inputs, parallel) -> Job:
    """Loads the base, evaluates and scores it, and chooses what is trained."""
    output = Path(config.output_dir)
    sizes = config.device, getattr(torch, config.dtype)
    options = {"experts": config.experts, "split": parallel.split}
    model = parallel.each(load_model, inputs.base, *sizes, **options)
    parallel.first(begin_output, config, inputs.identity)  # only now that the run can start
    parallel.each(check_shared, output, inputs.identity)
    before = run_eval_sets(config, model, inputs.tokenizer, output, "before", parallel)
    path = output / "expert_cfg.scores.json"
    scores = score_experts(config, model, inputs, path, parallel)
    expert_cfg = None
    if config.method != "lora":
        expert_cfg = parallel.first(choose_experts, config, inputs.base_config, scores)
    return Job(
        **vars(inputs),
        output=output,
        model=model,
        expert_cfg=expert_cfg,
        base_parameters=sum(p.numel() for p in inputs.whole.parameters()),
        parameters=mark_trained(config, model, expert_cfg),
        trained=mark_trained(config, inputs.whole, expert_cfg),
        alpha=balance_weight(config, inputs.base_config),
        before=before,
    )


def balance_weight(config: TrainConfig, model_config: ModelConfig) -> float:
    given = config.aux_loss_alpha
    return model_config.aux_loss_alpha if given is None else given


@torch.no_grad()
def validate(config: TrainConfig, job: Job) -> float:
    """Mean cross-entropy over all labels of the validation rows."""
    micro_batch = config.batch_size // config.gradient_accumulation_steps
    total = torch.zeros((), dtype=torch.float64, device=config.device)
    for part in job.held_out.split(micro_batch):
        losses, _ = part.losses(config, job.model)
        total += losses.double().sum()
    return total.item() / job.held_out.learned.item()


def micro_batches(count: int, size: int, rank: int, world_size: int) -> list[range]:
    """Which of a step's `count` rows are a rank's, every world_size-th, in micro-batches of up to
    `size`: as many on each rank, so that some may be empty."""
    mine, most = range(rank, count, world_size), math.ceil(count / world_size)
    return [mine[first : first + size] for first in range(0, most, size)]


def compute_gradients(
    config: TrainConfig,
    model: Transformer,
    rows: Rows,
    alpha: float,
    optimizer: MasterAdamW,
    parallel,
) -> Tensor:
    """Adds the gradients of this rank's part of a step's rows to the optimizer, micro-batch by
    micro-batch, and returns each row's part of the loss (rows,), 0 for the other ranks' rows: the
    sum over its labels that count divided by their number in the whole step, so that neither
    micro-batches nor ranks weigh labels differently."""
    learned, count = rows.learned.clamp(min=1).item(), len(rows.tokens)
    loss = torch.zeros(count, device=config.device)
    size = count // config.gradient_accumulation_steps
    for mine in micro_batches(count, size, parallel.rank, parallel.world_size):
        # A rank without a row takes part with one that counts nothing: others wait for it.
        part = rows.take(mine) if mine else rows.take([0]).unlearned()
        losses, balance = part.losses(
            config,
            model,
            balance=alpha > 0,
            checkpointing=config.gradient_checkpointing,
            compiled=bool(config.compile),
        )
        total = losses.sum() / learned
        if mine:
            of_rows = losses.detach().split((part.labels[:, 1:] != IGNORE).sum(1).tolist())
            sums = torch.stack([row.sum() for row in of_rows]) / learned
            loss[mine.start : mine.stop : mine.step] = sums
        if alpha > 0:
            total = total + alpha * balance[: len(mine)].sum() / config.batch_size
        total.backward()
        optimizer.accumulate()
    return loss


def not_finite(
    config: TrainConfig, job: Job, step: int, chosen: list[int], losses: Tensor, norm: float
) -> str:
    """What to say of a step, from 0, whose losses (rows,) or gradient norm are not finite: its
    rows, or only those with a bad loss, if there are such."""
    bad = ~losses.isfinite().cpu()
    suspects = torch.tensor(chosen)[bad if bad.any() else ~bad]
    named = []
    for row in suspects.tolist():
        first, last = job.rows.documents[row, [0, -1]].tolist()
        named.append(f"{first + 1} to {min(last + 1, len(job.samples))}")
    return (
        f"step {step + 1}: the loss is {losses.sum().item():g} and the gradient norm is {norm:g}; "
        f"both must be finite. The step's rows hold these samples of {config.data}: "
        f"{', '.join(named)}. The same config comes to the same end: look at them, or choose a "
        "lower learning_rate and another output_dir"
    )


@contextmanager
def saying_what_is_kept(config: TrainConfig):
    """Adds to what ends a run early how much of it is kept."""
    try:
        yield
    except (OSError, FloatingPointError, KeyboardInterrupt) as error:
        saved = checkpoints(Path(config.output_dir))
        kept = f"kept: {saved[-1]}, from which" if saved else "no step was saved yet;"
        without = " without --overwrite" if config.overwrite else ""  # which would delete it
        goes_on = f"{kept} the same command{without} goes on"
        if isinstance(error, FloatingPointError):  # would come to the same end
            goes_on = f"kept: {saved[-1] if saved else 'no step'}"
        raise type(error)(f"{error}; {goes_on}" if str(error) else goes_on) from None


class Interruption:
    """Within its block a first SIGINT or SIGTERM only leaves its name in `received`, so that the
    step at hand can be finished; a second one acts as it does outside."""

    def __init__(self, said: bool):
        self.received: str | None = None
        self.said = said
        both = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
        # A process in the background of a script is started with SIGINT ignored.
        self.outside = {s: handler for s, handler in both.items() if handler != signal.SIG_IGN}

    def __enter__(self) -> "Interruption":
        for number in self.outside:
            signal.signal(number, self.note)
        return self

    def note(self, number: int, frame) -> None:
        self.received = signal.Signals(number).name
        self.restore()
        with suppress(OSError):  # Ctrl-C ends a `| tee`, too
            if self.said:
                os.write(
                    2, b"\nfinishes the step, then writes a checkpoint; again: stops at once\n"
                )

    def restore(self) -> None:
        for number, handler in self.outside.items():
            signal.signal(number, handler)

    def __exit__(self, *_) -> None:
        self.restore()


def train(config: TrainConfig, parallel=SingleProcess()) -> dict:
    """The whole job; returns what results.json holds.

    Raises KeyboardInterrupt after a SIGINT or SIGTERM, FloatingPointError at a loss or gradient
    that is not finite, OSError where a file cannot be written: each says which checkpoint is
    kept."""
    be_deterministic(config.deterministic)
    inputs = parallel.each(read_inputs, config)
    whose = {"output_dir": config.output_dir, "overwrite": config.overwrite}
    parallel.check_same({**inputs.identity, **whose})
    output = Path(config.output_dir)
    if parallel.first((output / "results.json").exists) and not config.overwrite:
        results = parallel.first(read_json, output / "results.json")
        if not isinstance(results, dict) or "after" not in results:
            raise ValueError(f"{output}/results.json: is no run's; without it the run ends again")
        print(f"{output} holds the finished run; --overwrite true starts anew")
        return results
    with ExitStack() as held:
        parallel.first(lambda: held.enter_context(locked(output)))
        held.enter_context(saying_what_is_kept(config))
        return run(config, inputs, parallel)


def run(config: TrainConfig, inputs: Inputs, parallel) -> dict:
    """`train`, of what is read and checked, in an output_dir that no other process writes to."""
    started = time.perf_counter()
    job = prepare(config, inputs, parallel)
    optimizer = MasterAdamW(job.parameters, config)
    state = resume(job.output, optimizer, job.trained, parallel)
    print_start(config, job, state)
    if config.compile and state["step"] < config.steps:
        print("the first step compiles the layers, for 10 to 60 seconds", flush=True)
    started -= state["seconds"]  # of the processes before, up to the checkpoint

    clock = Clock(config, state["step"])
    with Interruption(said=parallel.rank == 0) as stop:
        for step in range(state["step"], config.steps):
            chosen = rows_of_step(len(job.rows.tokens), config.batch_size, config.seed, step)
            rows = job.rows.take(chosen)
            learning_rate = learning_rate_at(config, step)
            losses = compute_gradients(config, job.model, rows, job.alpha, optimizer, parallel)
            losses, gradients = parallel.sum(losses), optimizer.gradients
            parallel.reduce_gradients(gradients)
            norm = parallel.grad_norm(gradients)
            loss, norm_value = losses.sum().item(), norm.item()
            if not (math.isfinite(loss) and math.isfinite(norm_value)):
                save_checkpoint(job.output, optimizer, state, parallel)
                raise FloatingPointError(not_finite(config, job, step, chosen, losses, norm_value))
            if norm_value > config.max_grad_norm:
                masters = optimizer.masters.values()
                nn.utils.clip_grads_with_norm_(masters, config.max_grad_norm, norm)
            optimizer.step(learning_rate)

            state["step"] = step + 1
            last = state["step"] == config.steps
            record = {
                "step": state["step"],
                "loss": loss,
                "learning_rate": learning_rate,
                "grad_norm": norm_value,
                **clock.step_done(),
            }
            if job.held_out and (state["step"] % config.eval_steps == 0 or last):
                record["validation_loss"] = validate(config, job)
                if not math.isfinite(record["validation_loss"]):
                    raise FloatingPointError(
                        f"step {step + 1}: the validation loss is {record['validation_loss']}"
                    )
                if state["best_loss"] is None or record["validation_loss"] < state["best_loss"]:
                    state["best_loss"] = record["validation_loss"]
                    job.save_adapter(parallel)
            stopping = any(parallel.all(stop.received))  # a later signal is the next step's
            saving = state["step"] % config.save_steps == 0 or last or stopping
            parallel.first(add_record, job.output / "metrics.jsonl", record, saving)
            if saving:
                state["seconds"] = round(time.perf_counter() - started, 1)
                save_checkpoint(job.output, optimizer, state, parallel)
            print_step(config, record)
            if stopping:
                break
            clock.start_step()
    if received := next(filter(None, parallel.all(stop.received)), None):
        raise KeyboardInterrupt(f"{received} after step {state['step']}")

    if job.held_out is None:
        finite = all(p.isfinite().all() for p in job.parameters.values())
        if not all(parallel.all(finite)):
            raise FloatingPointError(f"step {state['step']}: trained weights are not finite")
        job.save_adapter(parallel)
    parallel.each(load_adapter, job.model, job.output / "adapter")  # the best state
    score_experts(config, job.model, job, job.output / "scores_after.json", parallel)
    after = run_eval_sets(config, job.model, job.tokenizer, job.output, "after", parallel)
    adapter = job.output.glob("adapter/*.safetensors")
    results = {
        "method": config.method,
        "steps": config.steps,
        "learning_rate": config.learning_rate,
        "seed": config.seed,
        "trained_parameters": sum(p.numel() for p in job.trained.values()),
        "all_parameters": job.base_parameters,
        "adapter_bytes": sum(file.stat().st_size for file in adapter),
        "best_validation_loss": state["best_loss"],
        "before": job.before,
        "after": after,
        "seconds": round(time.perf_counter() - started, 1),
    }
    parallel.first(write_json, job.output / "results.json", results, indent=2)
    return results


def be_deterministic(on: bool) -> None:
    """Whether sums of many numbers are taken in the same order every time. A CPU does so in any
    case; README.md says what it costs on a GPU."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch asks for it, on a GPU
    torch.use_deterministic_algorithms(on)
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing reads it


class Clock:
    """What a step took, and what is left to do at that speed."""

    def __init__(self, config: TrainConfig, first: int):
        self.config, self.first, self.done = config, first, first
        self.counted_from = first
        self.begun = self.step_begun = time.perf_counter()

    def start_step(self) -> None:
        self.step_begun = time.perf_counter()

    def step_done(self) -> dict:
        """tokens_per_second of the step alone; memory_gib: the peak so far, of the GPU or of the
        process; seconds_left with validation and checkpoints."""
        config, now = self.config, time.perf_counter()
        self.done += 1
        tokens = config.batch_size * config.seq_length
        left = (config.steps - self.done) * (now - self.begun) / (self.done - self.counted_from)
        if self.done == self.first + 1:  # it compiles and warms up: no measure for the others
            self.begun, self.counted_from = now, self.done
        return {
            "tokens_per_second": round(tokens / (now - self.step_begun)),
            "memory_gib": round(peak_memory(config.device) / 2**30, 2),
            "seconds_left": round(left, 2),
        }


def peak_memory(device: str) -> int:
    """Bytes: the largest sum of tensors on a GPU so far; on a CPU the process's resident memory."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# ------------------------------------------------------------------------------------------
# What a run needs, without loading it

ASSUMED_SHARE = 0.075  # of the experts; the published selection for intent: 124 of 1,664
GPU_SIZES = (24, 48, 80, 141, 180)  # GB
OVERHEAD = 1.5 * 2**30  # what CUDA, its libraries and the allocator's gaps take beside tensors


class FlashAttention(torch.autograd.Function):
    """The memory of a fused attention kernel on the meta device, where torch would take the one
    that holds all scores: kept are its inputs, its output, and one number a query."""

    @staticmethod
    def forward(ctx, q, k, v):
        out = torch.empty_like(q[..., : v.shape[-1]])
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx, dy):
        q, k, v, *_ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def fused_attention(q, k, v, **_) -> Tensor:
    """Stands in for `scaled_dot_product_attention`."""
    return FlashAttention.apply(q, k, v)


class Allocations(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make, for as long as they live. `known`: what
    is there already and does not count."""

    def __init__(self, known: Iterable[Tensor]):
        super().__init__()
        self.live = self.peak = 0
        self.known = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.count(tensor.untyped_storage())
        return out

    def count(self, storage) -> None:
        if storage._cdata not in self.known:
            self.known.add(storage._cdata)
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())

    def free(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


def step_bytes(
    config: TrainConfig, model: Transformer, trained: dict[str, nn.Parameter], parallel
) -> int:
    """The most bytes that one step allocates beside weights, masters and moments: activations,
    gradients, temporaries. `compute_gradients` itself runs, on tensors without data; two
    micro-batches, where there are more, since the second meets the gradients of the first."""
    size = config.batch_size // config.gradient_accumulation_steps
    count = min(config.batch_size, 2 * size * parallel.world_size)
    tokens = torch.zeros(count, config.seq_length, dtype=torch.int64)
    rows = Rows(tokens, tokens, tokens)
    rehearsal = replace(
        config, device="meta", gradient_accumulation_steps=count // size, compile=False
    )
    known = [*model.parameters(), *model.buffers()]
    known += [stack for m in model.modules() if isinstance(m, MoE) for stack in (m.gate_up, m.down)]
    optimizer = MasterAdamW(trained, rehearsal)
    alpha = balance_weight(config, model.config)
    # float32 has no grouped product of its own: torch goes through a loop, as ours on a CPU.
    like_gpu = config.device.startswith("cuda") and config.dtype == "bfloat16"
    with (
        mock.patch("model.on_gpu", lambda x: like_gpu),
        mock.patch.object(nn.functional, "scaled_dot_product_attention", fused_attention),
        Allocations([*known, *optimizer.masters.values()]) as allocations,
    ):
        compute_gradients(rehearsal, model, rows, alpha, optimizer, parallel)
    return allocations.peak


def planned_experts(config: TrainConfig, model_config: ModelConfig) -> tuple[dict | None, str]:
    """The expert_cfg that a run would train, and where it is from; while it is not selected yet, as
    many experts as the published selection for intent has."""
    if config.method == "lora":
        return None, f"LoRA of rank {config.lora_rank}"
    if config.method == "full":
        return everything(model_config), "everything"
    path = config.expert_config or selection_of_this_run(config)
    if path:
        return read_expert_cfg(path, model_config), f"the experts of {path}"
    E = model_config.n_routed_experts
    count = max(round(ASSUMED_SHARE * E), 1)
    experts = {
        str(layer): [i * E // count for i in range(count)] for layer in model_config.moe_layers
    }
    flags = {name: getattr(config, name) for name in ("shared_experts", "non_expert_modules")}
    said = f"{count} of {E} experts a layer, assumed: they are not selected yet"
    return {"experts": experts, **flags}, said


def selection_of_this_run(config: TrainConfig) -> Path | None:
    """What a run with these keys selected in output_dir, if it came so far."""
    output = Path(config.output_dir)
    if config.overwrite or not (output / "expert_cfg.json").exists():
        return None
    saved, mine = read_json(output / "train_config.json"), asdict(config)
    keys = ("model", "data", "method", "expert_config", "score", "top_p", "selection", "seed")
    keys += ("shared_experts", "non_expert_modules", "average", "n_sample_tokens")
    same = all(saved.get(key) == mine[key] for key in keys)
    return output / "expert_cfg.json" if same else None


def plan_rank(
    config: TrainConfig, model_config: ModelConfig, expert_cfg: dict | None, parallel
) -> dict:
    """What a rank holds and needs, in parameters and bytes."""
    model = build_model(model_config, "meta", getattr(torch, config.dtype), config.experts)
    parallel.split(model)
    trained = mark_trained(config, model, expert_cfg)
    size = getattr(torch, config.dtype).itemsize
    count = sum(p.numel() for p in trained.values())
    micro_batch = config.batch_size // config.gradient_accumulation_steps
    batches = micro_batches(config.batch_size, micro_batch, 0, parallel.world_size)
    need = {
        "micro-batches": f"{len(batches)} of {len(batches[0])} rows",
        "held": sum(p.numel() for p in model.parameters()),
        "trained": count,
        "weights": sum(p.nbytes for p in [*model.parameters(), *model.buffers()]),
        "masters": 4 * count if size < 4 else 0,  # a float32 weight is its own master
        "moments": 8 * count,
        "gradients": 4 * count,
    }
    for checkpointing in (True, False):
        rehearsed = replace(config, gradient_checkpointing=checkpointing)
        step = step_bytes(rehearsed, model, trained, parallel)
        need["activations", checkpointing] = max(step - need["gradients"], 0)
        held = sum(need[name] for name in ("weights", "masters", "moments"))
        need["peak", checkpointing] = step + held
    return need


def plan(
    config: TrainConfig,
    ranks: Callable[[ModelConfig, dict | None], list] = lambda *_: [SingleProcess()],
    more: Callable[[TrainConfig, ModelConfig, list], list[str]] = lambda *_: [],
) -> str:
    """A table of what the run needs, from the checkpoint's config.json alone: a column for each of
    the parallel objects that `ranks` makes for the base's config and an expert_cfg. `more` gives
    further lines."""
    if not re.fullmatch(r"cpu|cuda(:\d+)?", config.device):
        raise ValueError(f"device is {config.device!r}; must be cpu or cuda")
    path = local_directory(config.model, files=["config.json"]) / "config.json"
    model_config = ModelConfig.from_json(path)
    expert_cfg, what = planned_experts(config, model_config)
    columns = ranks(model_config, expert_cfg)  # refused before the work
    whole = build_model(model_config, "meta")
    total = sum(p.numel() for p in whole.parameters())
    trained = mark_trained(config, whole, expert_cfg)
    if not trained:
        raise ValueError(f"{config.expert_config}: selects nothing to train")
    progress = tqdm(columns, desc="plan", unit="column", leave=False, disable=None)
    needs = [plan_rank(config, model_config, expert_cfg, each) for each in progress]
    lines = [
        f"{config.model}, {total:,} parameters, {config.dtype}; {config.method}: {what}",
        f"steps of {config.batch_size} rows of {config.seq_length} tokens; device {config.device}",
        "",
    ]

    def add(label: str, cells: Iterable[str]) -> None:
        lines.append(table_row(label, cells))

    def gib(name) -> list[str]:
        return [size_text(need[name]) for need in needs]

    add("ranks", [str(each.world_size) for each in columns])
    add("micro-batches of a step", [need["micro-batches"] for need in needs])
    add("parameters held", [f"{need['held']:,}" for need in needs])
    add("  trained", [f"{need['trained']:,}" for need in needs])
    add("  frozen", [f"{need['held'] - need['trained']:,}" for need in needs])
    add(f"weights, {config.dtype}", gib("weights"))
    add("master weights, float32", gib("masters"))
    add("AdamW's moments, float32", gib("moments"))
    add("gradients, float32", gib("gradients"))
    for checkpointing, said in ((True, "with"), (False, "without")):
        used = " *" if checkpointing == config.gradient_checkpointing else ""
        add(f"{said} gradient checkpointing:{used}", [])
        add("  activations and what else a step holds", gib(("activations", checkpointing)))
        add("  peak of tensors in memory", gib(("peak", checkpointing)))
        add("  fits", [fits(config.device, need["peak", checkpointing]) for need in needs])
    size = getattr(torch, config.dtype).itemsize
    count = sum(p.numel() for p in trained.values())
    lines += [
        "* as in this config",
        *more(config, model_config, columns),
        "",
        f"on disk: adapter {size_text(count * size)}; each checkpoint to continue from "
        f"{size_text(count * 12)}, of which two are kept and a third is written",
        "nothing was loaded or written; next: the same command without --plan",
    ]
    return "\n".join(lines)


def table_row(label: str, cells: Iterable[str]) -> str:
    return (f"{label:<44}" + "".join(f"{cell:>18}" for cell in cells)).rstrip()


def size_text(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**29 else f"{count / 2**20:.1f} MiB"


def fits(device: str, need: int) -> str:
    """Whether `need` bytes fit the device; where it is a GPU that is not here, which ones."""
    if not device.startswith("cuda"):
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    elif torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(device).total_memory
        need += OVERHEAD
    else:
        enough = [size for size in GPU_SIZES if need + OVERHEAD <= size * 1e9]
        return f"GPU of {enough[0]} GB" if enough else f"no GPU to {GPU_SIZES[-1]} GB"
    return f"{memory / 2**30:.0f} GiB: {'yes' if need <= memory else 'NO'}"


# ------------------------------------------------------------------------------------------
# What is printed

KINDS = {  # part of a parameter's name -> what it belongs to; the first that fits counts
    ".lora_": "low-rank updates",
    ".mlp.experts.": "routed experts",
    ".mlp.shared_experts.": "shared experts",
    ".mlp.gate.": "router",
    ".self_attn.": "attention",
    ".mlp.": "dense layers",
    "norm": "norms",
    "": "embedding and head",
}


def print_start(config: TrainConfig, job: Job, state: dict) -> None:
    counts: dict[str, list[int]] = {}
    for name, p in job.whole.named_parameters():
        kind = next(kind for part, kind in KINDS.items() if part in name)
        count = counts.setdefault(kind, [0, 0])
        count[0] += p.numel()
        count[1] += p.numel() if name in job.trained else 0
    trained = sum(p.numel() for p in job.trained.values())
    what = f"LoRA of rank {config.lora_rank}"
    if job.expert_cfg is not None:
        chosen = sum(map(len, job.expert_cfg["experts"].values()))
        experts = len(job.base_config.moe_layers) * job.base_config.n_routed_experts
        what = f"{chosen} of {experts} routed experts"
    print(f"{'':<20} {'parameters':>15} {'trained':>15}")
    for kind, (total, of_them) in counts.items():
        print(f"{kind:<20} {total:>15,} {of_them:>15,}{'' if of_them else '   frozen'}")
    print(
        f"trains {trained:,} parameters, {trained / job.base_parameters:.1%} of the base's "
        f"{job.base_parameters:,}; {what}"
    )
    source = "the checkpoint's config" if config.aux_loss_alpha is None else "aux_loss_alpha"
    print(f"load balance loss x {job.alpha:g} ({source})" + ("" if job.alpha else ": none"))
    print(
        f"data: {len(job.rows.tokens):,} rows of {config.seq_length} tokens, and "
        f"{len(job.held_out.tokens) if job.held_out else 0} for validation; "
        f"{config.steps} steps of {config.batch_size} rows"
    )
    if state["step"]:
        print(f"continues after step {state['step']}")


def print_step(config: TrainConfig, record: dict) -> None:
    step = record["step"]
    if (
        step % config.log_steps
        and step not in (1, config.steps)
        and "validation_loss" not in record
    ):
        return
    line = (
        f"step {step:>5}/{config.steps}  loss {record['loss']:.4f}  "
        f"lr {record['learning_rate']:.1e}  norm {record['grad_norm']:.2f}  "
        f"{record['tokens_per_second']:,} tokens/s  {record['memory_gib']:.2f} GiB  "
        f"{record['seconds_left'] / 60:.1f} min left"
    )
    if "validation_loss" in record:
        line += f"  validation {record['validation_loss']:.4f}"
    print(line, flush=True)


# ------------------------------------------------------------------------------------------
# The report at the end


def report(config: TrainConfig) -> list[str]:
    """Writes report.txt, and report.png where matplotlib is installed, from what the finished run
    left in output_dir. Returns what it wrote."""
    output = Path(config.output_dir)
    results = read_json(output / "results.json")
    metrics = read_metrics(output / "metrics.jsonl", results["steps"])
    scores = [
        read_scores(output / name) for name in ("expert_cfg.scores.json", "scores_after.json")
    ]
    experts = {}
    if config.method != "lora":
        experts = read_json(output / "expert_cfg.json")["experts"]
    text = report_text(config, results, metrics, scores, experts)
    drawn = importlib.util.find_spec("matplotlib") is not None
    if drawn:
        draw_report(config, metrics, scores, experts, output / "report.png")
    else:
        text += "\nfor a picture of it: pip install matplotlib, and run the same command again\n"
    with replacing(output / "report.txt") as part:
        part.write_text(text, encoding="utf-8")
    return ["report.txt", *(["report.png"] if drawn else [])]


def report_text(
    config: TrainConfig, results: dict, metrics: list[dict], scores: list[Scores], experts: dict
) -> str:
    trained, total = results["trained_parameters"], results["all_parameters"]
    lines = [
        f"{config.method} on {config.data}, from {config.model}: {config.steps} steps, learning "
        f"rate {results['learning_rate']:g}, seed {config.seed}",
        "",
        f"trained    {trained:,} of {total:,} parameters ({trained / total:.1%})",
        f"on disk    adapter {results['adapter_bytes'] / 2**20:.1f} MiB",
        f"time       {results['seconds'] / 60:.1f} minutes",
        "",
        *quality_lines(results),
        "",
        f"{'step':>6} {'training loss':>14} {'validation':>11}",
    ]
    since: list[float] = []
    for record in metrics:
        since.append(record["loss"])
        validated = record.get("validation_loss")
        if validated is not None or record is metrics[-1]:
            shown = f"{validated:>11.4f}" if validated is not None else ""
            best = "  the adapter" if validated == results["best_validation_loss"] else ""
            mean = sum(since) / len(since)
            lines.append(f"{record['step']:>6} {mean:>14.4f} {shown}{best if shown else ''}")
            since = []
    lines += [
        "",
        f"routing on the task ({config.score} score): what the selected experts of a layer have of "
        "it before and",
        "after training, and how much of it moved from some experts to others",
        f"{'layer':>5} {'selected':>9} {'before':>7} {'after':>7} {'moved':>7}",
    ]
    if not experts:  # LoRA selects none
        lines[-3:] = [
            f"routing on the task ({config.score} score): how much of it training moved from some "
            "experts to others",
            f"{'layer':>5} {'moved':>7}",
        ]
    before, after = (s[f"{config.score}_scores"] for s in scores)
    for layer in sorted(before, key=int):
        chosen = [str(e) for e in experts.get(layer, [])]
        moved = sum(abs(after[layer][e] - score) for e, score in before[layer].items()) / 2
        held = [f"{sum(s[layer][e] for e in chosen):>7.3f}" for s in (before, after)]
        shown = f" {len(chosen):>9} {' '.join(held)}" if experts else ""
        lines.append(f"{layer:>5}{shown} {moved:>7.3f}")
    return "\n".join(lines) + "\n"


def draw_report(
    config: TrainConfig, metrics: list[dict], scores: list[Scores], experts: dict, path: Path
) -> None:
    """Losses; the scores with the selected experts marked; how the scores changed."""
    from matplotlib.figure import Figure

    name = f"{config.score}_scores"
    before, after = (s[name] for s in scores)
    layers = sorted(before, key=int)
    figure = Figure(figsize=(12, 8 + 0.3 * len(layers)), layout="constrained")
    losses, map_before, change = figure.subplots(3, 1, height_ratios=[3, 2, 2])
    steps = [record["step"] for record in metrics]
    losses.plot(steps, [record["loss"] for record in metrics], label="training")
    validated = [record for record in metrics if "validation_loss" in record]
    if validated:
        points = [[r["step"] for r in validated], [r["validation_loss"] for r in validated]]
        losses.plot(*points, "o-", label="validation")
    losses.set(xlabel="step", ylabel="loss", title=f"{config.method} on {config.data}")
    losses.legend()
    draw_scores(map_before, scores[0], config.score, experts)
    changes = [[after[i][e] - before[i][e] for e in sorted(before[i], key=int)] for i in layers]
    most = max(abs(value) for row in changes for value in row) or 1.0
    image = change.imshow(changes, aspect="auto", cmap="RdBu", vmin=-most, vmax=most)
    change.set_yticks(range(len(layers)), layers)
    change.set(xlabel="expert", ylabel="layer", title="change of the score by training")
    figure.colorbar(image, ax=change)
    with replacing(path) as part:
        figure.savefig(part, format="png", dpi=120)


def quality_lines(results: dict) -> list[str]:
    if not results["before"]:
        return ["no evaluation files were named (eval_sets)"]
    lines = [f"{'evaluation':<34} {'task':<7} {'before':>7} {'after':>7}"]
    for entry, before in results["before"].items():
        task, _, path = entry.partition(":")
        after = results["after"][entry]
        lines.append(
            f"{Path(path).stem:<34} {task:<11} {before['mean']:>7.3f} {after['mean']:>7.3f}   "
            f"({before['count']:,} {before['unit']})"
        )
    return lines


def print_results(config: TrainConfig, results: dict, reports: list[str]) -> None:
    output = Path(config.output_dir)
    share = results["trained_parameters"] / results["all_parameters"]
    print("\n" + "\n".join(quality_lines(results)))
    print(
        f"{results['method']}: trained {results['trained_parameters']:,} parameters ({share:.1%}), "
        f"adapter {results['adapter_bytes'] / 2**20:.1f} MiB, {results['seconds'] / 60:.1f} minutes"
    )
    print(f"wrote {output}/: adapter/, {', '.join(reports)}, metrics.jsonl, eval/, results.json")
    print(
        f"next: python model.py merge --model {config.model} --adapter {output}/adapter "
        "--output MERGED"
    )


ENDINGS = (ValueError, OSError, FloatingPointError, torch.OutOfMemoryError, KeyboardInterrupt)


def ending(error: BaseException) -> tuple[str, int]:
    """Of one of ENDINGS: what a command says of it, and its exit status."""
    if isinstance(error, KeyboardInterrupt):
        return f"\nstopped: {error}" if str(error) else "\nstopped", 130
    if isinstance(error, torch.OutOfMemoryError):
        return (
            f"error: {error}\n--plan shows what the run needs; gradient_checkpointing and more "
            "gradient_accumulation_steps make it less"
        ), 1
    return f"error: {error}", 1


def main() -> None:
    parser = command_line()
    parser.add_argument(
        "--plan",
        action="store_true",
        help="train nothing and load nothing: print the memory that the run needs",
    )
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends a run as Ctrl-C does
    try:
        config = config_of(arguments)
        if arguments.plan:
            print(plan(config))
            return
        results = train(config)
        print_results(config, results, report(config))
    except ENDINGS as error:
        message, status = ending(error)
        print(message, file=sys.stderr)
        raise SystemExit(status) from None


if __name__ == "__main__":
    main()
