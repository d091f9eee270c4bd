"""Fine-tune the experts that a task uses: score, select, freeze, train, evaluate. One process;
train_ep.py spreads the experts over many.

    python train.py --config configs/demo.toml [--key value ...]

What the loop stands on (config, optimizer, the run's directory, plan, report) is in training/.
`ranks` is for train_ep.py. In one process on_all(f, x) and on_first(f, x) are f(x), sum(x) and
gather(x) are x, from_all(x) is [x], and norm(gradients) is their norm.
"""

import math
import os
import shlex
import signal
import sys
import time
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import fast
from adapter import everything, load_adapter, read_expert_cfg, save_adapter
from checkpoint import load_model
from config import Parser, read_keys
from data import Rows, micro_batches, rows_of_step, sample_tokens
from files import write_json
from generate import not_finite
from model import Block, Transformer, token_losses
from peft_format import save_lora
from processes import SingleProcess, meet
from select_experts import Scores, choose, collect_scores, describe, read_scores, scoring_batches
from training.checkpointing import first_checkpointed, settle_checkpointing
from training.config import TrainConfig, config_parser
from training.directory import RunDirectory
from training.evaluation import evaluate
from training.head import say_what_cannot_be_learned
from training.host_optimizer import check_host_memory, make_optimizer
from training.inputs import Inputs, read_inputs
from training.optimizer import MasterAdamW, learning_rate_at, mark_trained
from training.plan import plan
from training.report import Clock, print_heading, print_results, print_start, print_step, report
from training.stopping import (
    ENDINGS,
    ending,
    not_finite_message,
    saying_what_is_kept,
    signals_noted,
)


def train(config: TrainConfig, ranks: SingleProcess = SingleProcess()) -> dict:
    """Runs the whole job and returns what results.json holds. The same config continues a run that
    ended early. Raises ValueError for a wrong config or file; KeyboardInterrupt after a signal,
    FloatingPointError at a loss or gradient that is not finite, OSError where a file cannot be
    written, and these say how much of a begun run is kept."""
    be_deterministic(config.deterministic)
    inputs = ranks.on_all(read_inputs, config)
    output = RunDirectory(config, inputs, ranks)
    if results := output.results():
        print(f"{output.path} holds the finished run; --overwrite starts anew")
        return results
    with output.locked(), saying_what_is_kept(config, output), output.finishing():
        return run(config, inputs, output, ranks)


def run(config: TrainConfig, inputs: Inputs, output: RunDirectory, ranks: SingleProcess) -> dict:
    """Runs the job. `inputs` must be checked, and `output` locked."""
    started = time.perf_counter()
    how = {"device": config.device, "dtype": getattr(torch, config.dtype)}
    how |= {"experts": config.experts, "split": ranks.split, "changes": config.model_config}
    how["quantize"] = config.quantize
    model = ranks.on_all(load_model, inputs.base, **how)
    output.begin()  # deletes an old run for --overwrite, so not before the model is there
    before = evaluate(config, model, inputs, output, "before")

    scores = score_experts(config, model, inputs, output, "expert_cfg.scores.json")
    expert_cfg = choose_experts(config, inputs, output, scores)
    parameters = mark_trained(config, model, expert_cfg)
    # The same on the whole base without data: over ranks, `model` lacks experts of other ranks.
    trained = mark_trained(config, inputs.whole, expert_cfg)

    ranks.on_all(check_host_memory, parameters, config, ranks)
    config = settle_checkpointing(config, inputs, expert_cfg, output, compute_gradients)
    optimizer = make_optimizer(parameters, config, ranks)
    state = output.resume(optimizer, trained)
    print_start(config, inputs, expert_cfg, trained, state["step"])
    if not state["step"]:
        say_what_cannot_be_learned(config, model, inputs, trained, losses_of)
    started -= state["seconds"]  # the time of earlier processes counts, too
    job = Job(config, inputs, output, ranks, model, expert_cfg, optimizer)
    best_loss = loop(job, state, started)

    ranks.on_all(load_adapter, model, output.file("adapter"))  # what `loop` saved
    score_experts(config, model, inputs, output, "scores_after.json")
    after = evaluate(config, model, inputs, output, "after")
    results = {
        "method": config.method,
        "steps": config.steps,
        "learning_rate": config.learning_rate,
        "seed": config.seed,
        "trained_parameters": sum(p.numel() for p in trained.values()),
        "all_parameters": inputs.base_parameters,
        "adapter_bytes": sum(f.stat().st_size for f in output.path.glob("adapter/*.safetensors")),
        "best_validation_loss": best_loss,
        "before": before,
        "after": after,
        "seconds": round(time.perf_counter() - started, 1),
    }
    ranks.on_first(write_json, output.file("results.json"), results, indent=2)
    return results


# ------------------------------------------------------------------------------------------
# Scores and selection


def score_experts(
    config: TrainConfig, model: Transformer, inputs: Inputs, output: RunDirectory, name: str
) -> Scores:
    """Returns the scores of the experts on the training data: from the file `name` if it is there,
    else they are computed and written to it."""

    def collect() -> Scores:
        sizes = config.scored_tokens, config.seq_length, config.seed
        sequences = sample_tokens(inputs.samples, *sizes)
        count = sum(map(len, sequences))
        print_heading(f"scoring on {count:,} tokens of {config.data}, for {name}")
        batches = scoring_batches(sequences, inputs.tokenizer.pad_id)
        return collect_scores(model, batches, config.average)

    return output.once(name, collect, lambda path: read_scores(path, config.score))


def choose_experts(
    config: TrainConfig, inputs: Inputs, output: RunDirectory, scores: Scores
) -> dict | None:
    """Returns the run's expert_cfg, which is kept in a file; None for lora."""
    if config.method == "lora":
        return None

    def make() -> dict:
        if config.method == "full":
            return everything(inputs.base_config)
        if config.expert_config:
            return read_expert_cfg(config.expert_config, inputs.base_config)
        expert_cfg = choose(scores, config)
        print_heading("selecting")
        print(describe(expert_cfg["experts"], scores, config.score))
        return expert_cfg

    make_once = partial(output.ranks.on_first, make)
    read = partial(read_expert_cfg, config=inputs.base_config)
    return output.once("expert_cfg.json", make_once, read)


# ------------------------------------------------------------------------------------------
# The loop


@dataclass
class Job:
    """What the loop works on."""

    config: TrainConfig
    inputs: Inputs
    output: RunDirectory
    ranks: SingleProcess
    model: Transformer
    expert_cfg: dict | None
    optimizer: MasterAdamW

    def save_adapter(self) -> None:
        tensors, path = self.ranks.gather(self.optimizer.trained), self.output.file("adapter")
        if self.config.method == "lora":
            self.ranks.on_first(save_lora, self.model, path, tensors)
        else:
            self.ranks.on_first(save_adapter, self.model, self.expert_cfg, path, tensors)


def loop(job: Job, state: dict, started: float) -> float | None:
    """Trains from `state` on, which `RunDirectory.resume` returned. With validation rows, saves the
    state with the best validation loss as the adapter, and returns that loss. Without, saves the
    last state, and returns None."""
    config, inputs, output, ranks = job.config, job.inputs, job.output, job.ranks
    optimizer, held_out = job.optimizer, job.inputs.held_out
    alpha = config.balance_weight(inputs.base_config)
    clock = Clock(config, state["step"] + 1)
    with signals_noted(ranks) as signal_received:
        for step in range(state["step"], config.steps):
            step_begun = time.perf_counter()
            learning_rate = learning_rate_at(config, step)
            numbers = rows_of_step(len(inputs.rows.tokens), config.batch_size, config.seed, step)
            rows = inputs.rows.take(numbers)
            row_losses = compute_gradients(config, job.model, rows, alpha, optimizer, ranks)
            row_losses = ranks.sum(row_losses)
            norm = ranks.norm(optimizer.gradients)
            record = {
                "step": step + 1,
                "loss": row_losses.sum().item(),
                "learning_rate": learning_rate,
                "grad_norm": norm.item(),
            }
            if not (math.isfinite(record["loss"]) and math.isfinite(record["grad_norm"])):
                output.save_checkpoint(optimizer, state)  # the step before: this one is not taken
                said = not_finite_message(config, inputs, step, numbers, row_losses, norm.item())
                raise FloatingPointError(said)
            optimizer.clip(norm)
            optimizer.step(learning_rate)
            state["step"] = step + 1
            record |= clock.measure(step + 1, step_begun)

            last = state["step"] == config.steps
            if held_out is not None and (state["step"] % config.eval_steps == 0 or last):
                loss = record["validation_loss"] = validate(job, step + 1)
                if state["best_loss"] is None or loss < state["best_loss"]:
                    state["best_loss"] = loss
                    job.save_adapter()
            stopping = signal_received()  # asked once a step, so that all ranks agree
            saving = state["step"] % config.save_steps == 0 or last or stopping
            output.add_record(record, sync=saving)
            if saving:
                state["seconds"] = round(time.perf_counter() - started, 1)
                output.save_checkpoint(optimizer, state)
            print_step(config, record)
            if stopping:
                break
        output.finish_checkpoint()
    if received := signal_received():  # also one that came during the last save
        raise KeyboardInterrupt(f"{received} after step {state['step']}")
    if held_out is None:
        finite = all(p.isfinite().all() for p in optimizer.parameters.values())
        if not all(ranks.from_all(finite)):
            raise FloatingPointError(f"step {state['step']}: trained weights are not finite")
        job.save_adapter()
    return state["best_loss"]


def compute_gradients(
    config: TrainConfig,
    model: Transformer,
    rows: Rows,
    alpha: float,
    optimizer: MasterAdamW,
    ranks: SingleProcess,
) -> Tensor:
    """Adds the gradients of this rank's part of a step's rows to the optimizer, micro-batch by
    micro-batch. Returns each row's part of the loss (rows,), 0 for the other ranks' rows.

    The loss is the sum over the labels that count, divided by their number in the whole step, so
    all labels weigh the same. `alpha` is the weight of the load balance loss."""
    learned, count = rows.learned.sum().item(), len(rows.tokens)
    row_losses = torch.zeros(count, device=config.device)
    size = count // config.gradient_accumulation_steps  # a plan takes fewer rows than batch_size
    for mine in micro_batches(count, size, ranks.rank, ranks.world_size):
        # Only over ranks: one without a row runs a row without labels, as others wait for its part
        # in the exchange of tokens.
        part = rows.take(mine) if mine else rows.take([0]).unlearned()
        losses, balance = losses_of(config, model, part, balance=alpha > 0)
        total = losses.sum() / learned
        if mine:
            of_rows = losses.detach().split(part.learned.tolist())
            sums = torch.stack([row.sum() for row in of_rows]) / learned
            row_losses[mine.start : mine.stop : mine.step] = sums
        if alpha > 0:
            total = total + alpha * balance[: len(mine)].sum() / config.batch_size
        total.backward()
        optimizer.accumulate()
    return row_losses


def losses_of(
    config: TrainConfig, model: Transformer, rows: Rows, balance: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Returns the losses of `token_losses` for rows. The config decides whether layers are compiled
    and computed again in backward. Validation does neither."""
    documents = rows.documents if config.document_mask else None
    run_block = Block.__call__
    if torch.is_grad_enabled():
        run_block = fast.compiled_blocks(model) if config.compile else run_block
        count = config.checkpointed_layers(model.config)
        run_block = first_checkpointed(run_block, model, count)
    given = model, rows.tokens.to(config.device), rows.labels, documents, balance, run_block
    losses = token_losses if config.experts == "loop" else fast.token_losses  # loop: model.py alone
    return losses(*given)


@torch.no_grad()
def validate(job: Job, step: int) -> float:
    """Returns the mean cross-entropy over all labels of the validation rows, which the replicas of
    the model share. Raises FloatingPointError, which names the layer, if it is not finite."""
    config, ranks, rows = job.config, job.ranks, job.inputs.held_out
    total = torch.zeros((), dtype=torch.float64, device=config.device)
    share = len(rows.tokens), config.micro_batch, ranks.replica, ranks.replicas
    for mine in filter(len, micro_batches(*share)):
        total += losses_of(config, job.model, rows.take(mine))[0].double().sum()
    total = ranks.sum(total) * ranks.replicas / ranks.world_size  # a replica's ranks have the same
    loss = total.item() / rows.learned.sum().item()
    if not math.isfinite(loss):
        bad = not_finite(job.model, rows.tokens.tolist())
        raise FloatingPointError(f"step {step}: the validation loss is {loss}: {bad}")
    return loss


def be_deterministic(on: bool) -> None:
    """Makes a GPU sum in the same order every time, if `on` (cost: docs/speed_and_memory.md)."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch requires it before CUDA
    torch.use_deterministic_algorithms(on)
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing reads it


# ------------------------------------------------------------------------------------------
# Command line


def command_line() -> Parser:
    parser = config_parser(
        "Fine-tune the experts of a DeepSeek-MoE checkpoint that a task uses: score, select, "
        "train, evaluate.",
        "python train.py --config configs/demo.toml --top_p 0.3 --output_dir runs/p3",
    )
    said = "train nothing and load nothing: print the memory that the run needs"
    parser.add_argument("--plan", action="store_true", help=said)
    return parser


def refuse_ranks() -> None:
    """Ends all processes, with one message, if torchrun started several."""
    if "TORCHELASTIC_RUN_ID" in os.environ and (ranks := meet(timeout=60)).world_size > 1:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun ends all ranks when one ends
        command = shlex.join(["train_ep.py", *sys.argv[1:]])
        count = os.environ["LOCAL_WORLD_SIZE"]
        several = f"torchrun --nproc-per-node {count} {command}"
        ranks.say(f"error: train.py is for one process; for several there is {several}")
        ranks.leave()
        raise SystemExit(1)


def main() -> None:
    arguments = command_line().parse_args()
    refuse_ranks()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends a run as Ctrl-C does
    try:
        config = read_keys(TrainConfig, arguments, arguments.config)
        if arguments.plan:
            del arguments.plan
            given = {name: v for name, v in vars(arguments).items() if v is not None}
            print(plan(config, compute_gradients, given=given))
            return
        results = train(config)
        written = report(config)
        print_results(config, results, written)
    except ENDINGS as error:
        message, status = ending(error)
        print(message, file=sys.stderr)
        raise SystemExit(status) from None


if __name__ == "__main__":
    main()
