"""Training steps of the DeepSeek-V2-Lite shape over several ranks: what the exchange costs.

    torchrun --nproc-per-node 1 benchmarks/expert_parallel.py    # as fast as train.py?
    torchrun --nproc-per-node 2 benchmarks/expert_parallel.py    # GPUs of 80 GB
    torchrun --nproc-per-node 2 benchmarks/expert_parallel.py --tiny    # CPU, in seconds

Random bfloat16 weights; 124 experts are trained (see v2_lite.py); random tokens; whole steps. One
rank alone is compared with train.py's own step, in the same process, one after the other, twice.
Several are timed with each ep_size that divides them: 1 is a replica on every rank. Beside it, what
an exchange of the tokens of one layer takes by itself. Prints its conditions, a table, and one JSON
line."""

import json
import os
import sys

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
from train import SingleProcess, TrainConfig, be_deterministic, plan_rank  # noqa: E402
from train_ep import ExpertParallel, Rehearsal, own_device  # noqa: E402


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
        dist.all_to_all_single(got, sent, group=parallel.replica)

    return median_seconds(run, device, steps, burn_in=3)


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--steps", type=int, default=5, help="timed steps (default: 5)")
    args = parser.parse_args()
    parallel = ExpertParallel(timeout=300)
    device, length = ("cpu", 64) if args.tiny else (own_device("cuda"), 4096)
    config = ModelConfig(**(V2_LITE | TINY if args.tiny else V2_LITE))
    if parallel.rank:
        sys.stdout = open(os.devnull, "w")
    made = print_conditions("cpu" if args.tiny else "cuda")
    be_deterministic(False)
    ranks = parallel.world_size
    print(f"{ranks} ranks, bfloat16, rows of {length} tokens, medians of {args.steps} steps")
    print(
        f"{'step of':<10} {'ep_size':>7} {'rows a rank':>11} {'layers':>12} {'saved by':>13} "
        f"{'ms':>8} {'tokens/s, all ranks':>19} {'peak GiB':>8} {'planned':>7} {'one way ms':>10}"
    )
    results = []
    sizes = [size for size in range(ranks, 0, -1) if ranks % size == 0]
    for ep_size in sizes:
        alone = [SingleProcess(), parallel] * 2 if ranks == 1 else [parallel]
        wanted = [(1, True, False), (1, False, False)]
        if ranks > 1:
            wanted += [(4, True, True)] + ([(4, True, False)] if ep_size > 1 else [])
        if args.tiny:  # compiling on a CPU takes longer than a test may
            wanted = [(1, False, False)]
        for rows, compiled, saving in wanted:
            c = settings(device, length, rows, ranks, compiled, saving)
            parallel.form_groups(c, ep_size)
            model = random_model(config, device, parallel)
            for way in alone:
                empty_memory(device)
                measured = Measured(model, c, way)
                measured.step()
                synchronise(device)
                seconds = median_seconds(measured.step, device, args.steps)
                peak = peak_gib(device)
                del measured
                expert_cfg = published_numbers(config)
                rehearsal = Rehearsal(ranks, ep_size, config.n_routed_experts, expert_cfg)
                need = plan_rank(c, config, expert_cfg, rehearsal)
                one_way = exchange_seconds(config, rows * length, parallel, args.steps)
                row = {
                    "step_of": "train.py" if way is not parallel else "train_ep.py",
                    "ep_size": ep_size,
                    "rows": rows,
                    "compiled": compiled,
                    "checkpointing": saving,
                    "ms": round(seconds * 1e3, 1),
                    "tokens_per_second": round(rows * length * ranks / seconds),
                    "peak_gib": round(peak, 2),
                    "planned_gib": round(need["peak", saving] / 2**30, 2),
                    "one_way_ms": round(one_way * 1e3, 3),
                }
                results.append(row)
                print(
                    f"{row['step_of']:<10} {ep_size:>7} {rows:>11} "
                    f"{'compiled' if compiled else 'not compiled':>12} "
                    f"{'checkpointing' if saving else '':>13} {row['ms']:>8} "
                    f"{row['tokens_per_second']:>19,} {row['peak_gib']:>8} "
                    f"{row['planned_gib']:>7} {row['one_way_ms']:>10}",
                    flush=True,
                )
            del model
            empty_memory(device)
    kind = {"benchmark": "expert_parallel", **made, "ranks": ranks, "seq_length": length}
    print(json.dumps({**kind, "results": results}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
