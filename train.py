"""Fine-tune the experts that a task uses: score, select, train, evaluate; one process.

    python train.py --config configs/demo.toml [--key value ...]

Precedence: defaults < the config file < the command line.
"""

import argparse
import difflib
import hashlib
import json
import math
import os
import shutil
import time
import tomllib
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from data import (
    CHAT_FORMATS,
    IGNORE,
    Sample,
    Tokenizer,
    encode_file,
    epoch_order,
    load_tokenizer,
    pack,
    rows_of_step,
    sample_tokens,
)
from eval import TASKS, check_file, evaluate, write_records
from model import (
    EXPERT_PATHS,
    ModelConfig,
    Transformer,
    build_model,
    check_device,
    choose_dtype,
    everything,
    load_adapter,
    load_model,
    local_directory,
    mark_trainable,
    open_tensors,
    read_expert_cfg,
    read_json,
    replacing,
    save_adapter,
    token_losses,
    trained_parameters,
    write_json,
)
from select_experts import (
    DEFAULT_TOP_P,
    collect_scores,
    describe,
    scoring_batches,
    select,
    select_random,
)

# ------------------------------------------------------------------------------------------
# Configuration


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
    method: str = key("esft", "esft: train the selected experts; full: train everything")

    # Which experts. Without expert_config they are scored on the training data first.
    expert_config: str = key("", "an expert_cfg.json; empty: score and select first")
    score: str = key("token", "token: how often an expert is chosen; gate: with what weight")
    top_p: float | None = key(
        None, "part of a layer's score to select (default: 0.2 for token, 0.1 for gate)"
    )
    selection: str = key(
        "highest", "highest: the highest scored; random: as many, drawn by seed (a control)"
    )
    average: str = key("tokens", "scores are means over tokens, or over samples")
    n_sample_tokens: int = key(131072, "tokens to score on")
    shared_experts: bool = key(False, "train the shared experts, too")
    non_expert_modules: bool = key(
        False, "train attention, norms, router, embeddings and head, too"
    )

    # Data
    chat_format: str = key(
        "", "how messages become text: deepseek_v2, deepseek_v3 (default: the model family's)"
    )
    seq_length: int = key(4096, "tokens of a packed row")
    random_concat_ratio: float = key(
        0.2, "how often a sample that joins others in a row loses its first token"
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
        None, "peak learning rate (default: 1e-5 for esft, 3e-5 for full)"
    )
    warmup_steps: int = key(0, "steps over which the learning rate rises to its peak")
    schedule: str = key("constant", "after warmup: constant, linear or cosine (both fall to 0)")
    weight_decay: float = key(0.1, "of AdamW, for matrices")
    adam_beta1: float = key(0.9, "of AdamW")
    adam_beta2: float = key(0.95, "of AdamW")
    max_grad_norm: float = key(1.0, "gradients are scaled down to this norm")
    aux_loss_alpha: float | None = key(
        None, "weight of the load balance loss (default: the checkpoint's config)"
    )

    # Evaluation and saving
    eval_steps: int = key(100, "steps between validations; the best state becomes the adapter")
    save_steps: int = key(100, "steps between checkpoints to continue from")
    log_steps: int = key(10, "steps between printed lines; metrics.jsonl has every step")
    eval_sets: list[str] = key(
        (), "TASK:FILE, evaluated before and after training (tasks: see eval.py)"
    )
    max_new_tokens: int = key(128, "longest completion in these evaluations")

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
            }[f.type]
            if type(value) not in kinds or (
                f.type == list[str] and not all(type(v) is str for v in value)
            ):
                kind = getattr(f.type, "__name__", str(f.type))
                raise ValueError(f"{f.name} is {value!r}; must be of type {kind}")
        for name in ("model", "data", "output_dir"):
            if not getattr(self, name):
                raise ValueError(f"{name} is missing; try --config configs/demo.toml, or --help")
        choices = {
            "method": ("esft", "full"),
            "score": tuple(DEFAULT_TOP_P),
            "selection": ("highest", "random"),
            "average": ("tokens", "samples"),
            "chat_format": ("", *CHAT_FORMATS),
            "schedule": ("constant", "linear", "cosine"),
            "dtype": ("", "bfloat16", "float32"),
            "experts": ("auto", *EXPERT_PATHS),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; must be one of {', '.join(allowed)}"
                )
        if self.top_p is None:
            self.top_p = DEFAULT_TOP_P[self.score]
        if self.learning_rate is None:
            self.learning_rate = {"esft": 1e-5, "full": 3e-5}[self.method]
        at_least = {
            "n_sample_tokens": 1,
            "seq_length": 2,
            "batch_size": 1,
            "gradient_accumulation_steps": 1,
            "steps": 1,
            "warmup_steps": 0,
            "weight_decay": 0,
            "eval_steps": 1,
            "save_steps": 1,
            "log_steps": 1,
            "max_new_tokens": 1,
            "seed": 0,
            "aux_loss_alpha": 0,
        }
        for name, least in at_least.items():
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise ValueError(f"{name} is {value}; must be at least {least}")
        between = {"top_p": (0, 1), "learning_rate": (0, 1), "max_grad_norm": (0, math.inf)}
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
        if self.method == "full" or self.expert_config:
            reason = "method is full" if self.method == "full" else "expert_config is given"
            for name in ("selection", "shared_experts", "non_expert_modules", "expert_config"):
                default = TrainConfig.__dataclass_fields__[name].default
                given = getattr(self, name) != default
                if given and (name != "expert_config" or self.method == "full"):
                    raise ValueError(
                        f"{name} is {getattr(self, name)!r}; no effect, since {reason}"
                    )
        for entry in self.eval_sets:
            if entry.partition(":")[0] not in TASKS or ":" not in entry:
                raise ValueError(
                    f"eval_sets: {entry!r} must be TASK:FILE with a task of {', '.join(TASKS)}"
                )
        if not self.device:
            self.device = "cuda" if torch.cuda.is_available() else "cpu"
        check_device(self.device)
        if not self.dtype:
            self.dtype = str(choose_dtype("", self.device)).removeprefix("torch.")


def parse_config(argv: list[str] | None = None) -> TrainConfig:
    """The config of a command line. Raises ValueError that names file, key and what is required."""
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
    args = vars(parser.parse_args(argv))
    path = args.pop("config")
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
    if f.type is bool and text in ("true", "false"):
        return text == "true"
    try:
        return int(text) if f.type is int else float(text)
    except ValueError:
        kind = "true or false" if f.type is bool else "an integer" if f.type is int else "a number"
        raise ValueError(f"{f.name} is {text!r}; must be {kind}") from None


# ------------------------------------------------------------------------------------------
# One process; train_ep.py has the counterpart for many


class SingleProcess:
    """What the loop asks of other ranks, where there are none."""

    rank, world_size = 0, 1

    def sum(self, value: Tensor) -> Tensor:
        """The sum of a tensor over all ranks."""
        return value

    def reduce_gradients(self, gradients: dict[str, Tensor]) -> None:
        """Sums gradients over the ranks that hold the same parameters."""

    def grad_norm(self, gradients: dict[str, Tensor]) -> Tensor:
        """The norm of the whole model's gradient."""
        return nn.utils.get_total_norm(gradients.values())


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
        groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
        self.adamw = torch.optim.AdamW(
            [g for g in groups if g["params"]],
            lr=config.learning_rate,
            fused=True,
            betas=(config.adam_beta1, config.adam_beta2),
            weight_decay=config.weight_decay,
        )

    def accumulate(self) -> None:
        """Adds the parameters' gradients to the masters', in float32, and frees them."""
        for name, p in self.parameters.items():
            if p.grad is not None:
                master = self.masters[name]
                master.grad = p.grad.float() if master.grad is None else master.grad.add_(p.grad)
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
        for name, p in self.parameters.items():
            p.copy_(self.masters[name])

    def state(self) -> dict[str, Tensor]:
        """Masters and moments by name, on the CPU."""
        tensors = {}
        for name, master in self.masters.items():
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
                "exp_avg": tensors[f"exp_avg.{name}"].to(device),
                "exp_avg_sq": tensors[f"exp_avg_sq.{name}"].to(device),
            }


def learning_rate_at(config: TrainConfig, step: int) -> float:
    """Learning rate of step `step`, from 0."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(config.steps - config.warmup_steps, 1)
    factor = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}
    return config.learning_rate * factor[config.schedule]


# ------------------------------------------------------------------------------------------
# Output directory: train_config.json, expert_cfg.json, adapter/, metrics.jsonl, checkpoints/,
# results.json


def input_files(config: TrainConfig) -> list[str]:
    sets = [entry.partition(":")[2] for entry in config.eval_sets]
    return [p for p in (config.data, config.validation_data, config.expert_config, *sets) if p]


def identity(config: TrainConfig) -> dict:
    """What makes two runs the same: the keys that change results, the content of input files."""
    keys = asdict(config)
    for name in ("overwrite", "device", "log_steps"):
        del keys[name]
    keys["eval_sets"] = list(config.eval_sets)
    for path in input_files(config):
        keys[f"sha256 of {path}"] = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    return keys


def check_output(config: TrainConfig) -> None:
    """Raises ValueError if output_dir holds a run of another config, naming the keys that differ,
    or something else, or an input of this run."""
    output = Path(config.output_dir)
    for path in (config.model, *input_files(config)):
        if Path(path).resolve().is_relative_to(output.resolve()):
            raise ValueError(f"output_dir is {output}; it holds {path}, which this run reads")
    if output.exists() and not output.is_dir():
        raise ValueError(f"output_dir is {output}; it is a file")
    saved = output / "train_config.json"
    if saved.exists() and not config.overwrite:
        theirs, mine = read_json(saved), identity(config)
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
    elif not saved.exists() and output.exists() and any(output.iterdir()):
        raise ValueError(f"output_dir is {output}; it holds files that no run of train.py wrote")


def save_checkpoint(output: Path, optimizer: MasterAdamW, state: dict) -> None:
    """Writes checkpoints/step-N whole or not at all, and keeps the newest two."""
    directory = output / "checkpoints" / f"step-{state['step']:06d}"
    part = directory.with_name(f".{directory.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    with replacing(part / "optimizer.safetensors") as file:
        save_file(optimizer.state(), file)
    write_json(part / "state.json", state)
    shutil.rmtree(directory, ignore_errors=True)
    os.replace(part, directory)
    for old in checkpoints(output)[:-2]:
        shutil.rmtree(old)


def checkpoints(output: Path) -> list[Path]:
    saved = (output / "checkpoints").glob("step-*")
    return sorted(saved, key=lambda path: int(path.name.removeprefix("step-")))


def resume(output: Path, optimizer: MasterAdamW) -> dict:
    """Puts the newest checkpoint in place and returns its state; metrics.jsonl goes back to that
    step."""
    state = {"step": 0, "best_loss": None}
    if saved := checkpoints(output):
        state = read_json(saved[-1] / "state.json")
        with open_tensors(saved[-1] / "optimizer.safetensors") as file:
            optimizer.restore({name: file.get_tensor(name) for name in file.keys()}, state["step"])
    metrics = output / "metrics.jsonl"
    if metrics.exists():  # steps after the checkpoint will come again; a last line may be cut short
        lines = metrics.read_text().split("\n")[:-1]
        with replacing(metrics) as part:
            part.write_text(
                "".join(line + "\n" for line in lines if json.loads(line)["step"] <= state["step"])
            )
    return state


# ------------------------------------------------------------------------------------------
# The job


@dataclass
class Rows:
    """Packed rows (rows, seq_length), for training and for validation."""

    tokens: Tensor
    labels: Tensor


def prepare_rows(
    config: TrainConfig, samples: list[Sample], tokenizer: Tokenizer
) -> tuple[Rows, Rows | None]:
    """Rows for training, and for validation where the config asks for it."""
    length, pad_id, seed = config.seq_length, tokenizer.eos_id, config.seed
    rows = Rows(*pack(samples, length, config.random_concat_ratio, pad_id, seed))
    held_out = None
    if config.validation_data:
        held_out = Rows(
            *pack(encode_file(config.validation_data, tokenizer), length, 0.0, pad_id, seed)
        )
    elif config.validation_fraction:
        held = math.ceil(len(rows.tokens) * config.validation_fraction)
        if held == len(rows.tokens):
            raise ValueError(
                f"{config.data}: fills {held} row of seq_length {length}, too few to hold out a "
                "part; set validation_data, a shorter seq_length, or validation_fraction 0"
            )
        order = epoch_order(len(rows.tokens), seed, -1)
        held_out = Rows(rows.tokens[order[:held]], rows.labels[order[:held]])
        rows = Rows(rows.tokens[order[held:]], rows.labels[order[held:]])
    for part, path in ((rows, config.data), (held_out, config.validation_data or config.data)):
        if part and not (part.labels[:, 1:] != IGNORE).any():
            raise ValueError(f"{path}: holds no answer to learn from; every one is masked")
    return rows, held_out


def choose_experts(
    config: TrainConfig, model: Transformer, samples: list[Sample], pad_id: int
) -> dict:
    """The run's expert_cfg: full's, that of the run that is continued, the given one, or a new
    selection, whose scores are saved."""
    output = Path(config.output_dir)
    path = output / "expert_cfg.json"
    if path.exists():
        return read_expert_cfg(path, model.config)
    if config.method == "full":
        expert_cfg = everything(model.config)
    elif config.expert_config:
        expert_cfg = read_expert_cfg(config.expert_config, model.config)
    else:
        drawn = sample_tokens(samples, config.n_sample_tokens, config.seq_length, config.seed)
        scores = collect_scores(model, scoring_batches(drawn, pad_id), config.average)
        write_json(output / "expert_cfg.scores.json", scores)
        experts = select(scores, config.score, config.top_p)
        if config.selection == "random":
            experts = select_random(experts, model.config.n_routed_experts, config.seed)
        expert_cfg = {
            "experts": experts,
            "shared_experts": config.shared_experts,
            "non_expert_modules": config.non_expert_modules,
        }
        print(describe(experts, scores, config.score))
    write_json(path, expert_cfg)
    return expert_cfg


def run_eval_sets(
    config: TrainConfig, model: Transformer, tokenizer: Tokenizer, output: Path, when: str
) -> dict:
    """Evaluates every set once, and keeps completions and means in output_dir/eval/."""
    means_path = output / "eval" / f"{when}.json"
    if means_path.exists():
        return read_json(means_path)
    means = {}
    for i, entry in enumerate(config.eval_sets, 1):
        task, _, path = entry.partition(":")
        result = evaluate(model, tokenizer, task, path, config.max_new_tokens)
        write_records(output / "eval" / f"{when}.{i}.{Path(path).stem}.jsonl", result.records)
        means[entry] = {"mean": result.mean, "count": result.count, "unit": result.unit}
        print(f"{when} training: {task} on {path}: {result.mean:.3f}", flush=True)
    write_json(means_path, means, indent=2)
    return means


@dataclass
class Job:
    """What a run works on, read and checked."""

    output: Path
    tokenizer: Tokenizer
    model: Transformer
    rows: Rows
    held_out: Rows | None
    expert_cfg: dict
    alpha: float  # weight of the load balance loss
    before: dict  # what run_eval_sets gave


def prepare(config: TrainConfig) -> Job | None:
    """Reads and checks all input, evaluates the base, and chooses what is trained. Only then, and
    after every file was found right, is the model loaded. None if the run is finished already."""
    base = local_directory(config.model)
    model_config = ModelConfig.from_json(base / "config.json")
    tokenizer = load_tokenizer(base, config.chat_format)
    samples = encode_file(config.data, tokenizer)
    rows, held_out = prepare_rows(config, samples, tokenizer)
    for entry in config.eval_sets:
        task, _, path = entry.partition(":")
        check_file(task, path, tokenizer)
    if config.expert_config:
        given = read_expert_cfg(config.expert_config, model_config)
        if not trained_parameters(build_model(model_config, "meta"), given):
            raise ValueError(f"{config.expert_config}: selects nothing to train")
    check_output(config)
    output = Path(config.output_dir)
    if (output / "results.json").exists() and not config.overwrite:
        return None
    model = load_model(base, config.device, getattr(torch, config.dtype), experts=config.experts)
    if config.overwrite and output.exists():  # only now that the new run is known to start
        shutil.rmtree(output)
    write_json(output / "train_config.json", identity(config), indent=2)
    before = run_eval_sets(config, model, tokenizer, output, "before")
    expert_cfg = choose_experts(config, model, samples, tokenizer.eos_id)
    mark_trainable(model, expert_cfg)
    alpha = model_config.aux_loss_alpha if config.aux_loss_alpha is None else config.aux_loss_alpha
    return Job(output, tokenizer, model, rows, held_out, expert_cfg, alpha, before)


@torch.no_grad()
def validate(config: TrainConfig, job: Job) -> float:
    """Mean cross-entropy over all labels of the validation rows."""
    micro_batch = config.batch_size // config.gradient_accumulation_steps
    tokens, labels = job.held_out.tokens.split(micro_batch), job.held_out.labels.split(micro_batch)
    total = torch.zeros((), dtype=torch.float64, device=config.device)
    for micro_tokens, micro_labels in zip(tokens, labels):
        losses, _ = token_losses(job.model, micro_tokens.to(config.device), micro_labels)
        total += losses.double().sum()
    return total.item() / (job.held_out.labels[:, 1:] != IGNORE).sum().item()


def compute_gradients(
    config: TrainConfig, job: Job, optimizer: MasterAdamW, step: int, parallel
) -> Tensor:
    """Adds the gradients of a step's rows to the optimizer, micro-batch by micro-batch, and returns
    this rank's part of the loss: the sum over all labels that count divided by their number in the
    whole step, so that neither micro-batches nor ranks weigh labels differently."""
    chosen = rows_of_step(len(job.rows.tokens), config.batch_size, config.seed, step)
    mine = chosen[parallel.rank :: parallel.world_size]
    tokens, labels = job.rows.tokens[mine], job.rows.labels[mine]
    learned = parallel.sum((labels[:, 1:] != IGNORE).sum()).clamp(min=1).item()
    micro_batch = len(mine) // config.gradient_accumulation_steps
    loss = torch.zeros((), device=config.device)
    for micro_tokens, micro_labels in zip(tokens.split(micro_batch), labels.split(micro_batch)):
        losses, balance = token_losses(
            job.model,
            micro_tokens.to(config.device),
            micro_labels,
            balance=job.alpha > 0,
            checkpointing=config.gradient_checkpointing,
        )
        total = losses.sum() / learned
        loss += total.detach()
        if job.alpha > 0:
            total = total + job.alpha * balance.sum() / config.batch_size
        total.backward()
        optimizer.accumulate()
    return loss


def train(config: TrainConfig, parallel=SingleProcess()) -> dict:
    """The whole job; returns what results.json holds."""
    started = time.perf_counter()
    job = prepare(config)
    if job is None:
        print(f"{config.output_dir} holds the finished run; --overwrite true starts anew")
        return read_json(Path(config.output_dir) / "results.json")
    optimizer = MasterAdamW(trained_parameters(job.model, job.expert_cfg), config)
    state = resume(job.output, optimizer)
    print_start(config, job, optimizer, state)

    clock = time.perf_counter()
    with open(job.output / "metrics.jsonl", "a", encoding="utf-8") as metrics:
        for step in range(state["step"], config.steps):
            learning_rate = learning_rate_at(config, step)
            loss = compute_gradients(config, job, optimizer, step, parallel)
            parallel.reduce_gradients(optimizer.gradients)
            norm = parallel.grad_norm(optimizer.gradients)
            nn.utils.clip_grads_with_norm_(optimizer.masters.values(), config.max_grad_norm, norm)
            optimizer.step(learning_rate)

            state["step"] = step + 1
            last = state["step"] == config.steps
            seconds = time.perf_counter() - clock
            record = {
                "step": state["step"],
                "loss": parallel.sum(loss).item(),
                "learning_rate": learning_rate,
                "grad_norm": norm.item(),
                "tokens_per_second": round(config.batch_size * config.seq_length / seconds),
            }
            if job.held_out and (state["step"] % config.eval_steps == 0 or last):
                record["validation_loss"] = validate(config, job)
                if state["best_loss"] is None or record["validation_loss"] < state["best_loss"]:
                    state["best_loss"] = record["validation_loss"]
                    save_adapter(job.model, job.expert_cfg, job.output / "adapter")
            metrics.write(json.dumps(record) + "\n")
            metrics.flush()
            if state["step"] % config.save_steps == 0 or last:
                save_checkpoint(job.output, optimizer, state)
            print_step(config, record)
            clock = time.perf_counter()

    if job.held_out is None:
        save_adapter(job.model, job.expert_cfg, job.output / "adapter")
    load_adapter(job.model, job.output / "adapter")  # the best state
    results = {
        "method": config.method,
        "steps": config.steps,
        "learning_rate": config.learning_rate,
        "seed": config.seed,
        "trained_parameters": sum(p.numel() for p in optimizer.parameters.values()),
        "all_parameters": sum(p.numel() for p in job.model.parameters()),
        "adapter_bytes": (job.output / "adapter" / "adapter.safetensors").stat().st_size,
        "best_validation_loss": state["best_loss"],
        "before": job.before,
        "after": run_eval_sets(config, job.model, job.tokenizer, job.output, "after"),
        "seconds": round(time.perf_counter() - started, 1),
    }
    write_json(job.output / "results.json", results, indent=2)
    return results


# ------------------------------------------------------------------------------------------
# What is printed


def print_start(config: TrainConfig, job: Job, optimizer: MasterAdamW, state: dict) -> None:
    trained = sum(p.numel() for p in optimizer.parameters.values())
    total = sum(p.numel() for p in job.model.parameters())
    print(
        f"trains {trained:,} of {total:,} parameters ({trained / total:.1%}, "
        f"{len(optimizer.parameters)} tensors); the rest is frozen"
    )
    print(
        f"data: {len(job.rows.tokens):,} rows of {config.seq_length} tokens, and "
        f"{len(job.held_out.tokens) if job.held_out else 0} for validation; "
        f"{config.steps} steps of {config.batch_size} rows; load balance loss x {job.alpha:g}"
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
    seconds = config.batch_size * config.seq_length / max(record["tokens_per_second"], 1)
    line = (
        f"step {step:>5}/{config.steps}  loss {record['loss']:.4f}  "
        f"lr {record['learning_rate']:.1e}  norm {record['grad_norm']:.2f}  "
        f"{record['tokens_per_second']:,} tokens/s  "
        f"{(config.steps - step) * seconds / 60:.1f} min left"
    )
    if "validation_loss" in record:
        line += f"  validation {record['validation_loss']:.4f}"
    print(line, flush=True)


def print_results(config: TrainConfig, results: dict) -> None:
    output = Path(config.output_dir)
    share = results["trained_parameters"] / results["all_parameters"]
    if results["before"]:
        print(f"\n{'evaluation':<34} {'task':<7} {'before':>7} {'after':>7}")
    for entry, before in results["before"].items():
        task, _, path = entry.partition(":")
        after = results["after"][entry]
        print(
            f"{Path(path).stem:<34} {task:<7} {before['mean']:>7.3f} {after['mean']:>7.3f}   "
            f"({before['count']:,} {before['unit']})"
        )
    print(
        f"{results['method']}: trained {results['trained_parameters']:,} parameters ({share:.1%}), "
        f"adapter {results['adapter_bytes'] / 2**20:.1f} MiB, {results['seconds'] / 60:.1f} minutes"
    )
    print(f"wrote {output}/: adapter/, expert_cfg.json, metrics.jsonl, eval/, results.json")
    print(
        f"next: python model.py merge --model {config.model} --adapter {output}/adapter "
        "--output MERGED"
    )


def main() -> None:
    try:
        config = parse_config()
        print_results(config, train(config))
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit(
            "stopped; the same command continues from the newest checkpoint, if there is one"
        ) from None


if __name__ == "__main__":
    main()
