"""One ESFT training step of the DeepSeek-V2-Lite shape: tokens per second and peak memory.

    python benchmarks/v2_lite.py           # a GPU with 80 GB
    python benchmarks/v2_lite.py --tiny    # the same code on a CPU, in seconds

Random bfloat16 weights; 124 experts trained (as many as the published selection for intent: 1.07B
parameters) with float32 masters and AdamW, both counted; random tokens. Prints its conditions, a
table, and one JSON line."""

import argparse
import json
import random
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from model import (  # noqa: E402
    ModelConfig,
    build_model,
    mark_trainable,
    token_losses,
    trained_parameters,
)
from train import MasterAdamW, TrainConfig  # noqa: E402

V2_LITE = dict(
    model_type="deepseek_v2",
    vocab_size=102400,
    hidden_size=2048,
    intermediate_size=10944,
    moe_intermediate_size=1408,
    num_hidden_layers=27,
    num_attention_heads=16,
    n_routed_experts=64,
    n_shared_experts=2,
    num_experts_per_tok=6,
    first_k_dense_replace=1,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    aux_loss_alpha=0.001,
    rope_scaling=dict(
        type="yarn",
        factor=40,
        original_max_position_embeddings=4096,
        beta_fast=32,
        beta_slow=1,
        mscale=0.707,
        mscale_all_dim=0.707,
    ),
)
TINY = dict(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=128,
    moe_intermediate_size=32,
    num_hidden_layers=3,
    kv_lora_rank=32,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    v_head_dim=16,
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--tiny", action="store_true", help="a tiny shape on the CPU, to see that the script works"
    )
    parser.add_argument(
        "--steps", type=int, default=5, help="timed steps (default: 5), after 2 of burn-in"
    )
    args = parser.parse_args()
    device = "cpu" if args.tiny else "cuda"
    name = "CPU" if args.tiny else torch.cuda.get_device_name()
    config = ModelConfig(**(V2_LITE | TINY if args.tiny else V2_LITE))
    model = build_model(config, device)
    torch.manual_seed(0)
    for parameter_name, p in model.named_parameters():
        p.data.fill_(1.0) if "norm" in parameter_name else p.data.normal_(std=0.02)
    draw = random.Random(0)
    layers = config.moe_layers
    experts = {
        str(layer): draw.sample(range(64), 5 if i < 20 else 4) for i, layer in enumerate(layers)
    }
    mark_trainable(model, {"experts": experts})
    parameters = trained_parameters(model, {"experts": experts})
    optimizer = MasterAdamW(parameters, TrainConfig(learning_rate=1e-5))
    trained = sum(p.numel() for p in parameters.values())
    total = sum(p.numel() for p in model.parameters())
    print(f"{name}, torch {torch.__version__}; {total:,} parameters, {trained:,} trained")
    print(f"{'rows':>4} {'seq':>5} {'checkpointing':>13} {'ms':>8} {'tokens/s':>9} {'peak GiB':>9}")

    results = []
    length = 64 if args.tiny else 4096
    for rows, checkpointing in ((1, False), (1, True), (4, True)):
        tokens = torch.randint(0, config.vocab_size, (rows, length))
        times = []
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        for step in range(2 + args.steps):
            start = time.perf_counter()
            losses, balance = token_losses(
                model, tokens.to(device), tokens, balance=True, checkpointing=checkpointing
            )
            (losses.mean() + config.aux_loss_alpha * balance.mean()).backward()
            optimizer.accumulate()
            torch.nn.utils.get_total_norm(optimizer.gradients.values())
            optimizer.step(1e-5)
            if device == "cuda":
                torch.cuda.synchronize()
            if step >= 2:
                times.append(time.perf_counter() - start)
        median = statistics.median(times)
        peak = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0.0
        results.append(
            {
                "rows": rows,
                "seq_length": length,
                "checkpointing": checkpointing,
                "ms": round(median * 1e3, 1),
                "tokens_per_second": round(rows * length / median),
                "peak_gib": round(peak, 1),
            }
        )
        print(
            f"{rows:>4} {length:>5} {str(checkpointing):>13} {median * 1e3:>8.1f} "
            f"{rows * length / median:>9,.0f} {peak:>9.1f}",
            flush=True,
        )
    print(
        json.dumps(
            {
                "benchmark": "v2_lite",
                "device": name,
                "torch": torch.__version__,
                "trained": trained,
                "results": results,
            }
        )
    )


if __name__ == "__main__":
    main()
