"""Training steps of the DeepSeek-V2-Lite shape over several ranks: what the exchange costs.

    torchrun --nproc-per-node 1 benchmarks/expert_parallel.py    # as fast as train.py?
    torchrun --nproc-per-node 2 benchmarks/expert_parallel.py    # GPUs of 80 GB
    torchrun --nproc-per-node 2 benchmarks/expert_parallel.py --tiny    # CPU, in seconds

Random bfloat16 weights; 124 experts are trained (see v2_lite.py); random tokens; whole steps. One
rank alone is compared with train.py's own step, in the same process, in turns.
Several are timed with each ep_size that divides them: 1 is a replica on every rank. Beside it, what
an exchange of the tokens of one layer takes by itself. Prints its conditions, a table, and one JSON
line."""

import json
import statistics
import sys
import time

import torch
import torch.distributed as dist
from v2_lite import (
    ROOT,
    TINY,
    V2_LITE,
    Measured,
    command_line,
    empty_memory,
    median_seconds,
    peak_gib,
    print_conditions,
    published_numbers,
    random_model,
    synchronise,
)

sys.path.insert(0, str(ROOT))

from model import ModelConfig  # noqa: E402
from processes import SingleProcess  # noqa: E402
from train import be_deterministic, compute_gradients  # noqa: E402
from train_ep import ExpertParallel, Rehearsal, own_device  # noqa: E402
from training.config import TrainConfig  # noqa: E402
from training.plan import plan_rank  # noqa: E402


def settings(device: str, length: int, rows: int, ranks: int, compiled: bool, saving: bool):
    return TrainConfig(
        seq_length=length,
        batch_size=rows * ranks,
        gradient_accumulation_steps=1,
        gradient_checkpointing=saving,
        learning_rate=1e-5,
        device=device,
        dtype="bfloat16",
        compile=compiled,
    )


def exchange_seconds(config: ModelConfig, tokens: int, parallel: ExpertParallel, steps: int):
    """One way of the slots of so many tokens, spread evenly."""
    slots = tokens * config.num_experts_per_tok // parallel.ep_size * parallel.ep_size
    device = parallel.config.device
    sent = torch.randn(slots, config.hidden_size, device=device).bfloat16()
    got = torch.empty_like(sent)

    def run() -> None:
        dist.all_to_all_single(got, sent, group=parallel.same_replica)

    return median_seconds(run, device, steps, burn_in=3)


def alternating(measured: Measured, ways: list, device: str, steps: int) -> list[float]:
    """The median seconds of a step in each way, taken in turns: what disturbs a machine disturbs
    all."""
    times = [[] for _ in ways]
    for _ in range(steps + 1):  # the first is burn-in
        for way, taken in zip(ways, times):
            measured.ranks = way
            synchronise(device)
            start = time.perf_counter()
            measured.step()
            synchronise(device)
            taken.append(time.perf_counter() - start)
    return [statistics.median(taken[1:]) for taken in times]


def measure(base: ModelConfig, parallel: ExpertParallel, c: TrainConfig, steps: int) -> list[dict]:
    """Of one setting: a row for train_ep.py, and on one rank before it one for train.py."""
    ranks, device = parallel.world_size, c.device
    model = random_model(base, device, parallel)
    empty_memory(device)
    measured = Measured(model, c, parallel)
    ways = [SingleProcess(), parallel] if ranks == 1 else [parallel]
    seconds, peak = alternating(measured, ways, device, steps), peak_gib(device)
    expert_cfg = published_numbers(base)
    rehearsal = Rehearsal(c, ranks, parallel.ep_size, base.n_routed_experts, expert_cfg)
    need = plan_rank(c, base, expert_cfg, rehearsal, compute_gradients)
    tokens = c.batch_size * c.seq_length
    one_way = exchange_seconds(base, tokens // ranks, parallel, steps)
    return [
        {
            "step_of": "train.py" if way is not parallel else "train_ep.py",
            "ep_size": parallel.ep_size,
            "rows": c.batch_size // ranks,
            "compiled": c.compile,
            "checkpointing": c.gradient_checkpointing,
            "ms": round(taken * 1e3, 1),
            "tokens_per_second": round(tokens / taken),
            "peak_gib": round(peak, 2),
            "planned_gib": round(need["peak", c.gradient_checkpointing] / 2**30, 2),
            "one_way_ms": round(one_way * 1e3, 3),
        }
        for way, taken in zip(ways, seconds)
    ]


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--steps", type=int, default=9, help="timed steps (default: 9)")
    args = parser.parse_args()
    parallel = ExpertParallel(timeout=300)
    device, length = ("cpu", 64) if args.tiny else (own_device("cuda"), 4096)
    base = ModelConfig(**(V2_LITE | TINY if args.tiny else V2_LITE))
    made = print_conditions("cpu" if args.tiny else "cuda")
    be_deterministic(False)
    ranks = parallel.world_size
    print(f"{ranks} ranks, bfloat16, rows of {length} tokens, medians of {args.steps} steps")
    print(
        f"{'step of':<11} {'ep_size':>7} {'rows a rank':>11} {'layers':>12} {'saved by':>13} "
        f"{'ms':>8} {'tokens/s, all ranks':>19} {'peak GiB':>8} {'planned':>7} {'one way ms':>10}"
    )
    results = []
    for ep_size in [size for size in range(ranks, 0, -1) if ranks % size == 0]:
        # Rows, compiled, checkpointing. Compiling on a CPU takes longer than a test may.
        wanted = [(1, False, False)] if args.tiny else [(1, True, False), (1, False, False)]
        if ranks > 1 and not args.tiny:
            wanted += [(4, True, True)] + ([(4, True, False)] if ep_size > 1 else [])
        for rows, *how in wanted:
            c = settings(device, length, rows, ranks, *how)
            parallel.form_groups(c, ep_size)
            for row in measure(base, parallel, c, args.steps):
                results.append(row)
                print(
                    f"{row['step_of']:<11} {ep_size:>7} {rows:>11} "
                    f"{'compiled' if row['compiled'] else 'not compiled':>12} "
                    f"{'checkpointing' if row['checkpointing'] else '':>13} {row['ms']:>8} "
                    f"{row['tokens_per_second']:>19,} {row['peak_gib']:>8} "
                    f"{row['planned_gib']:>7} {row['one_way_ms']:>10}",
                    flush=True,
                )
            empty_memory(device)
    if ranks == 1:
        pairs = zip(results[::2], results[1::2])
        ratios = [f"{theirs['ms'] / mine['ms']:.3f}" for theirs, mine in pairs]
        print(f"train_ep.py's speed over train.py's: {', '.join(ratios)}")
    kind = {"benchmark": "expert_parallel", **made, "ranks": ranks, "seq_length": length}
    print(json.dumps({**kind, "results": results}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
