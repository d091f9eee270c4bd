"""Training steps of the DeepSeek-V2-Lite shape over several ranks: speed, memory, and what the
exchange of tokens costs.

    torchrun --nproc-per-node 1 benchmarks/expert_parallel.py    # as fast as train.py?
    torchrun --nproc-per-node 4 benchmarks/expert_parallel.py    # GPUs of 80 GB
    torchrun --nproc-per-node 2 benchmarks/expert_parallel.py --tiny    # CPU, in seconds

Random bfloat16 weights; 124 experts are trained (see v2_lite.py); random tokens; whole steps,
compiled, with 1 and 4 rows a rank and with each ep_size that divides the ranks. One rank alone is
compared with train.py's own step, in the same process, in turns. With --profile, one more step says
how long kernels of each kind run, and what runs at the same time.

Peaks are the largest of all ranks, of torch's tensors; "beside" is what the GPU's driver says is in
use beyond what torch reserved. "sent" is what leaves a rank for others in one way of one layer,
counted, on average. Prints its conditions, a table, and one JSON line."""

import json
import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile
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
from training.exchange import ranks_reached  # noqa: E402
from training.plan import held_bytes, model_of_rank, peak_of_step  # noqa: E402

GIB, MIB = 2**30, 2**20


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
    """One way of so many tokens, spread evenly, while nothing else runs."""
    if parallel.ep_size == 1:
        return 0.0
    size, device = parallel.ep_size, parallel.config.device
    reached = ranks_reached(config.n_routed_experts, size, config.num_experts_per_tok)
    rows = round(tokens * reached / size) * size
    sent = torch.randn(rows, config.hidden_size, device=device).bfloat16()
    got = torch.empty_like(sent)

    def run() -> None:
        dist.all_to_all_single(got, sent, group=parallel.same_replica)

    return median_seconds(run, device, steps, burn_in=3)


@contextmanager
def counting() -> Iterator[list[int]]:
    """Counts the bytes of tokens that leave this rank for others, one number a way."""
    sent, send = [], dist.all_to_all_single

    def count(out, x, receive=None, to=None, group=None, **options):
        if to is not None and x.dtype == torch.bfloat16:
            mine = to[dist.get_rank(group)]
            sent.append((len(x) - mine) * x[0].nbytes if len(x) else 0)
        return send(out, x, receive, to, group=group, **options)

    with mock.patch.object(dist, "all_to_all_single", count):
        yield sent


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


def union(spans: list[tuple[float, float]]) -> float:
    """The length of what spans cover together."""
    total, end = 0.0, float("-inf")
    for begin, until in sorted(spans):
        total += max(until - max(begin, end), 0)
        end = max(end, until)
    return total


def profiled(measured: Measured, device: str) -> dict[str, float]:
    """The milliseconds of one step in which kernels of each kind run."""
    kinds = {"exchange": "SendRecv", "other NCCL": "nccl", "attention": "sdpa|bprop|cudnn"}
    kinds |= {"products of experts": "cutlass", "other products": "nvjet", "rest": ""}
    spans = {kind: [] for kind in kinds}
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        measured.step()
        synchronise(device)
    for event in recorded.events():
        labels = ("nccl:", "Optimizer.", "## Call", "Torch-")  # ranges, not kernels
        if event.device_type != torch.autograd.DeviceType.CUDA or event.name.startswith(labels):
            continue
        kind = next(
            k for k, words in kinds.items() if any(w in event.name for w in words.split("|"))
        )
        spans[kind].append((event.time_range.start / 1e3, event.time_range.end / 1e3))
    nccl = spans["exchange"] + spans["other NCCL"]
    everything = [span for kind in spans.values() for span in kind]
    others = [
        span for kind in spans if "NCCL" not in kind and kind != "exchange" for span in spans[kind]
    ]
    busy = union(everything)
    return {kind: round(union(those), 1) for kind, those in spans.items()} | {
        "NCCL beside other kernels": round(union(nccl) + union(others) - busy, 1),
        "no kernel": round(max(e for _, e in everything) - min(b for b, _ in everything) - busy, 1),
    }


def planned(base: ModelConfig, ranks: int, ep_size: int, c: TrainConfig) -> float:
    """What --plan says of the peak of a step's tensors, in GiB."""
    expert_cfg = published_numbers(base)
    rehearsal = Rehearsal(ranks, ep_size, base.n_routed_experts, expert_cfg)
    parts = model_of_rank(c, base, expert_cfg, rehearsal)
    peak_of = peak_of_step(c, *parts, rehearsal, compute_gradients)
    layers = base.num_hidden_layers if c.gradient_checkpointing else 0
    return (peak_of(layers) - held_bytes(c, *parts, rehearsal)["buffers"]) / GIB


def measure(
    base: ModelConfig, parallel: ExpertParallel, c: TrainConfig, plan: float, args: Namespace
) -> list[dict]:
    """Of one setting: a row for train_ep.py, and on one rank before it one for train.py."""
    ranks, device = parallel.world_size, c.device
    model = random_model(base, device, parallel)
    empty_memory(device)
    measured = Measured(model, c, parallel)
    with counting() as sent:
        measured.step()
    ways = [SingleProcess(), parallel] if ranks == 1 else [parallel]
    seconds = alternating(measured, ways, device, args.steps)
    peak, beside = peak_gib(device), 0.0
    if device.startswith("cuda"):
        free, total = torch.cuda.mem_get_info()
        beside = (total - free - torch.cuda.memory_reserved()) / GIB
    tokens = c.batch_size * c.seq_length
    one_way = exchange_seconds(base, tokens // ranks, parallel, args.steps)
    of_ranks = parallel.from_all((peak, beside, sum(sent) / max(len(sent), 1) / MIB))
    peaks, besides, ways_mib = zip(*of_ranks)
    kernels = parallel.from_all(profiled(measured, device))[0] if args.profile else {}
    return [
        {
            "step_of": "train.py" if way is not parallel else "train_ep.py",
            "ep_size": parallel.ep_size,
            "rows": c.batch_size // ranks,
            "checkpointing": c.gradient_checkpointing,
            "ms": round(taken * 1e3, 1),
            "tokens_per_second": round(tokens / taken),
            "of_a_gpu": round(tokens / taken / ranks),
            "peak_gib": round(max(peaks), 2),
            "planned_gib": round(plan, 2),
            "beside_gib": round(max(besides), 2),
            "sent_mib": round(sum(ways_mib) / ranks, 1),
            "one_way_ms": round(one_way * 1e3, 3),
            "kernels_ms": kernels,
        }
        for way, taken in zip(ways, seconds)
    ]


COLUMNS = {  # key of a row -> head, width
    "step_of": ("step of", 11),
    "ep_size": ("ep_size", 7),
    "rows": ("rows", 4),
    "checkpointing": ("checkpointing", 13),
    "ms": ("ms", 7),
    "tokens_per_second": ("tokens/s", 8),
    "of_a_gpu": ("of a GPU", 8),
    "peak_gib": ("peak GiB", 8),
    "planned_gib": ("planned", 7),
    "beside_gib": ("beside", 6),
    "sent_mib": ("sent MiB", 8),
    "one_way_ms": ("alone ms", 8),
}


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--steps", type=int, default=9, help="timed steps (default: 9)")
    said = "rows a rank (default: 1 4)"
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4], help=said)
    parser.add_argument("--profile", action="store_true", help="say what kernels run in a step")
    args = parser.parse_args()
    if args.tiny and args.profile:
        parser.error("--profile is of a GPU's kernels; --tiny runs on a CPU")
    parallel = ExpertParallel(timeout=300)
    device, length = ("cpu", 64) if args.tiny else (own_device("cuda"), 4096)
    base = ModelConfig(**(V2_LITE | TINY if args.tiny else V2_LITE))
    made = print_conditions("cpu" if args.tiny else "cuda")
    be_deterministic(False)
    ranks = parallel.world_size
    print(f"{ranks} ranks, bfloat16, rows of {length} tokens, medians of {args.steps} steps")
    print(" ".join(f"{head:>{width}}" for head, width in COLUMNS.values()))
    results = []
    wanted = [
        (ep_size, rows, saving)
        for ep_size in range(1, ranks + 1)
        if ranks % ep_size == 0
        for rows in args.rows
        for saving in (False, True)
    ]
    wanted = wanted[::4] if args.tiny else wanted
    # Compiling on a CPU takes longer than a test may.
    configs = [settings(device, length, rows, ranks, not args.tiny, s) for _, rows, s in wanted]
    cases = [(ep_size, c) for (ep_size, *_), c in zip(wanted, configs)]
    # Each rank plans some.
    plans = parallel.from_all(
        [planned(base, ranks, *case) for case in cases[parallel.rank :: ranks]]
    )
    for number, (ep_size, c) in enumerate(cases):
        parallel.form_groups(c, ep_size)
        plan = plans[number % ranks][number // ranks]
        for row in measure(base, parallel, c, plan, args):
            results.append(row)
            cells = [f"{row[key]:>{width}}" for key, (_, width) in COLUMNS.items()]
            print(" ".join(cells), flush=True)
            if row["kernels_ms"]:
                print(f"  ms of kernels on the first rank: {row['kernels_ms']}", flush=True)
        empty_memory(device)
        # In one order on all ranks: NCCL waits for the others here.
        for group in dict.fromkeys((parallel.world, parallel.same_replica, parallel.same_experts)):
            if group is not None:
                dist.destroy_process_group(group)
    if ranks == 1:
        pairs = zip(results[::2], results[1::2])
        ratios = [f"{theirs['ms'] / mine['ms']:.3f}" for theirs, mine in pairs]
        print(f"train_ep.py's speed over train.py's: {', '.join(ratios)}")
    kind = {"benchmark": "expert_parallel", **made, "ranks": ranks, "seq_length": length}
    print(json.dumps({**kind, "steps": args.steps, "results": results}))
    parallel.leave()


if __name__ == "__main__":
    main()
