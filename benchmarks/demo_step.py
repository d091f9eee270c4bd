"""The demo's training step on a CPU, beside transformers: forward, backward, clipping, AdamW.

    python benchmarks/demo_step.py           # a minute on two cores
    python benchmarks/demo_step.py --tiny    # the same code in seconds

Both train the same experts of demo/base, those that configs/demo.toml selects, in float32, on the
same packed rows. Before anything is timed, loss and gradient norm of both must agree. Of
transformers the fastest of its settings for experts and attention is taken. It keeps all experts of
a layer in one tensor: all of them get gradients, which are then masked; weight decay would move the
masked ones, too, so there it is 0. It has no load balance loss for this model; ours is in the time.
The sides take turns. Prints its conditions, a table, and one JSON line."""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from v2_lite import print_conditions

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from chat import load_tokenizer  # noqa: E402
from checkpoint import load_model  # noqa: E402
from config import read_keys  # noqa: E402
from data import Rows, encode_file, rows_of_step, sample_tokens  # noqa: E402
from processes import SingleProcess  # noqa: E402
from select_experts import choose, collect_scores, scoring_batches  # noqa: E402
from train import command_line, compute_gradients  # noqa: E402
from training.config import TrainConfig  # noqa: E402
from training.inputs import prepare_rows  # noqa: E402
from training.optimizer import MasterAdamW, mark_trained  # noqa: E402

RATE = 1e-5  # small: the routing, and with it the work, stays as it is
# Its third way for experts, batched_mm, takes twenty times as long on a CPU.
SETTINGS = [(e, a) for e in ("grouped_mm", "eager") for a in ("sdpa", "eager")]


def demo_work(config: TrainConfig) -> tuple[Rows, dict]:
    """The rows of the demo's first step, and its expert_cfg."""
    tokenizer = load_tokenizer(config.model)
    samples = encode_file(config.data, tokenizer)
    rows, _ = prepare_rows(config, samples, tokenizer)
    chosen = rows_of_step(len(rows.tokens), config.batch_size, config.seed, 0)
    drawn = sample_tokens(samples, config.n_sample_tokens, config.seq_length, config.seed)
    batches = scoring_batches(drawn, tokenizer.pad_id)
    scores = collect_scores(load_model(config.model, dtype=torch.float32), batches, config.average)
    return rows.take(chosen), choose(scores, config)


class Ours:
    """The step of train.py."""

    def __init__(self, config: TrainConfig, cfg: dict, rows: Rows, experts: str):
        self.config, self.rows = config, rows
        self.model = load_model(config.model, dtype=torch.float32, experts=experts)
        self.optimizer = MasterAdamW(mark_trained(config, self.model, cfg), config)

    def step(self, balance: bool = True) -> tuple[float, float]:
        """Takes a step; its loss and gradient norm."""
        alpha = self.config.balance_weight(self.model.config) if balance else 0.0
        args = self.config, self.model, self.rows, alpha, self.optimizer, SingleProcess()
        loss = compute_gradients(*args).sum()
        norm = SingleProcess().norm(self.optimizer.gradients)
        self.optimizer.clip(norm)
        self.optimizer.step(RATE)
        return loss.item(), norm.item()


class Theirs:
    """The same step with transformers' model."""

    def __init__(self, config: TrainConfig, cfg: dict, rows: Rows, experts: str, attention: str):
        self.config, self.rows = config, rows
        import transformers

        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            config.model, dtype=torch.float32, attn_implementation=attention
        ).train()
        self.model.set_experts_implementation(experts)
        self.model.requires_grad_(False)
        self.masks = {}
        for layer, ids in cfg["experts"].items():
            stacks = self.model.model.layers[int(layer)].mlp.experts
            mask = torch.zeros(len(stacks.down_proj), 1, 1)
            mask[ids] = 1
            for stack in (stacks.gate_up_proj, stacks.down_proj):
                self.masks[stack.requires_grad_(True)] = mask
        betas = config.adam_beta1, config.adam_beta2
        self.adamw = torch.optim.AdamW(
            self.masks, lr=RATE, betas=betas, weight_decay=0.0, fused=True
        )

    def step(self) -> tuple[float, float]:
        """Takes a step; its loss and gradient norm."""
        loss = self.model(self.rows.tokens, labels=self.rows.labels, use_cache=False).loss
        loss.backward()
        for stack, mask in self.masks.items():
            stack.grad *= mask
        norm = torch.nn.utils.clip_grad_norm_(self.masks, self.config.max_grad_norm)
        self.adamw.step()
        self.adamw.zero_grad()
        return loss.item(), norm.item()


def check_same(ours: tuple[float, float], theirs: tuple[float, float]) -> None:
    for name, mine, other in zip(("loss", "gradient norm"), ours, theirs):
        if abs(mine - other) > 1e-4:
            raise SystemExit(f"error: the {name} is {mine} here and {other} in transformers")


def taking_turns(steps: dict[str, Callable], rounds: int) -> dict[str, float]:
    """Name -> median seconds of its step, after two rounds of burn-in."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(2 + rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds[2:]) for name, seconds in times.items()}


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(line.partition(": ")[2] for line in lines if line.startswith("model name"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="two rows and one round, as a test")
    args = parser.parse_args()
    import transformers  # takes seconds, which --help does not need

    transformers.utils.logging.disable_progress_bar()
    rounds, tried = (1, 1) if args.tiny else (15, 3)
    flags = ["--device", "cpu", "--gradient_checkpointing", "false"]  # what auto comes to here
    arguments = command_line().parse_args(flags)
    config = read_keys(TrainConfig, arguments, str(ROOT / "configs/demo.toml"))
    config.model, config.data = str(ROOT / config.model), str(ROOT / config.data)
    if args.tiny:
        config = replace(config, seq_length=64, batch_size=2, n_sample_tokens=1000)
    rows, cfg = demo_work(config)
    work = config, cfg, rows

    ours = {experts: Ours(*work, experts) for experts in ("grouped", "loop")}
    trained = sum(p.numel() for p in ours["loop"].optimizer.parameters.values())
    n_experts = sum(len(ids) for ids in cfg["experts"].values())
    where = f"{cpu_name()}, {torch.get_num_threads()} threads"
    made = print_conditions("cpu") | {"device": where}
    print(f"{where}, float32")
    print(
        f"{config.batch_size} rows of {config.seq_length} tokens, {rows.learned.sum()} of them learned; "
        f"{n_experts} experts trained ({trained:,} parameters); medians of {rounds} rounds"
    )
    first = {experts: side.step(balance=False) for experts, side in ours.items()}
    candidates = {}
    for setting in SETTINGS:
        theirs = Theirs(*work, *setting)
        found = theirs.step()
        for mine in first.values():
            check_same(mine, found)
        candidates[setting] = taking_turns({"": theirs.step}, tried)[""]
        print(
            f"transformers, experts {setting[0]}, {setting[1]}: {candidates[setting] * 1e3:.0f} ms"
        )
    best = min(candidates, key=candidates.get)
    steps = {f"ours, {experts}": side.step for experts, side in ours.items()}
    steps["transformers"] = Theirs(*work, *best).step
    seconds = taking_turns(steps, rounds)

    print(f"{'who':<14} {'ms':>7} {'tokens/s':>9} {'times as fast':>14}")
    results = []
    for who, median in seconds.items():
        result = {
            "who": who,
            "ms": round(median * 1e3, 1),
            "tokens_per_second": round(rows.tokens.numel() / median),
            "times_as_fast": round(seconds["transformers"] / median, 2),
        }
        results.append(result)
        print("{who:<14} {ms:>7} {tokens_per_second:>9,} {times_as_fast:>14}".format(**result))
    print(
        json.dumps(
            {
                "benchmark": "demo_step",
                **made,
                "rows": config.batch_size,
                "seq_length": config.seq_length,
                "trained": trained,
                "transformers_setting": {"experts": best[0], "attention": best[1]},
                "results": results,
            }
        )
    )


if __name__ == "__main__":
    main()
