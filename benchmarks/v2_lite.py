"""Training steps of the DeepSeek-V2-Lite shape: tokens per second, and peak memory beside what
`train.py --plan` says.

    python benchmarks/v2_lite.py           # a GPU with 80 GB
    python benchmarks/v2_lite.py --tiny    # the same code on a CPU, in seconds

Random bfloat16 weights; ESFT trains 124 experts (as many as the published selection for intent:
1.07B parameters), LoRA matrices of rank 8 at every linear layer; float32 masters and AdamW, counted
in both columns; random tokens. Whether a step has the same bits when it is taken again, and with
and without gradient checkpointing, is compared, too. Prints its conditions, a table, and one JSON
line."""

import argparse
import json
import random
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from model import ModelConfig, Transformer, build_model, remove_lora  # noqa: E402
from train import (  # noqa: E402
    MasterAdamW,
    Rows,
    SingleProcess,
    TrainConfig,
    be_deterministic,
    compute_gradients,
    mark_trained,
    plan_rank,
)

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


def random_model(config: ModelConfig, device: str) -> Transformer:
    model = build_model(config, device)
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        p.data.fill_(1.0) if "norm" in name else p.data.normal_(std=0.02)
    return model


def published_numbers(config: ModelConfig) -> dict:
    """An expert_cfg with as many experts as the published selection for intent, 124."""
    draw = random.Random(0)
    counts = {layer: 5 if i < 20 else 4 for i, layer in enumerate(config.moe_layers)}
    return {"experts": {str(layer): draw.sample(range(64), n) for layer, n in counts.items()}}


class Measured:
    """The training steps of one setting, on one model."""

    def __init__(self, model: Transformer, config: TrainConfig):
        self.model, self.config = model, config
        self.cfg = published_numbers(model.config) if config.method == "esft" else None
        self.parameters = mark_trained(config, model, self.cfg)
        self.optimizer = MasterAdamW(self.parameters, config)
        shape = config.batch_size, config.seq_length
        tokens = torch.randint(0, model.config.vocab_size, shape)
        self.rows = Rows(tokens, tokens, torch.zeros_like(tokens))

    def gradients(self) -> dict[str, torch.Tensor]:
        alpha = self.model.config.aux_loss_alpha
        args = self.config, self.model, self.rows, alpha, self.optimizer, SingleProcess()
        compute_gradients(*args)
        return self.optimizer.gradients

    def step(self) -> None:
        gradients = self.gradients()
        norm = SingleProcess().grad_norm(gradients)
        torch.nn.utils.clip_grads_with_norm_(self.optimizer.masters.values(), 1.0, norm)
        self.optimizer.step(1e-5)

    def time(self, steps: int) -> float:
        """Median seconds, after two steps of burn-in."""
        times = []
        for i in range(2 + steps):
            start = time.perf_counter()
            self.step()
            if self.config.device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return statistics.median(times[2:])

    def same_bits(self) -> dict[str, bool]:
        """Whether a second pass gives the gradients of the first, with the same checkpointing and
        with the other."""
        first = {name: g.clone() for name, g in self.gradients().items()}
        same = {}
        for name in ("again", "checkpointing"):
            self.optimizer.adamw.zero_grad()
            if name == "checkpointing":
                flipped = not self.config.gradient_checkpointing
                self.config = replace(self.config, gradient_checkpointing=flipped)
            same[name] = all(torch.equal(first[n], g) for n, g in self.gradients().items())
        self.optimizer.adamw.zero_grad()
        return same


def planned(config: TrainConfig, model_config: ModelConfig) -> float:
    """GiB that --plan gives for a setting."""
    meta = build_model(model_config, "meta")
    cfg = published_numbers(model_config) if config.method == "esft" else None
    need = plan_rank(config, meta, mark_trained(config, meta, cfg), 1)
    return need["peak", config.gradient_checkpointing] / 2**30


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
    device, length = ("cpu", 64) if args.tiny else ("cuda", 4096)
    name = "CPU" if args.tiny else torch.cuda.get_device_name()
    model_config = ModelConfig(**(V2_LITE | TINY if args.tiny else V2_LITE))
    model = random_model(model_config, device)
    print(f"{name}, torch {torch.__version__}, bfloat16, rows of {length} tokens")
    print(
        f"{'method':<6} {'rows':>4} {'checkpointing':>13} {'deterministic':>13} {'ms':>8} "
        f"{'tokens/s':>9} {'peak GiB':>9} {'planned':>8}  same bits"
    )
    results = []
    settings = [
        (method, rows, checkpointing, deterministic)
        for method, rows, checkpointing in (
            ("esft", 1, False),
            ("esft", 1, True),
            ("esft", 4, True),
            ("lora", 1, False),
            ("lora", 1, True),
        )
        for deterministic in (True, False)
    ]
    for method, rows, checkpointing, deterministic in settings:
        be_deterministic(deterministic)
        config = TrainConfig(
            method=method,
            seq_length=length,
            batch_size=rows,
            gradient_accumulation_steps=1,
            gradient_checkpointing=checkpointing,
            learning_rate=1e-5,
            device=device,
            dtype="bfloat16",
        )
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        measured = Measured(model, config)
        seconds = measured.time(args.steps)
        peak = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0.0
        result = {
            "method": method,
            "rows": rows,
            "checkpointing": checkpointing,
            "deterministic": deterministic,
            "ms": round(seconds * 1e3, 1),
            "tokens_per_second": round(rows * length / seconds),
            "peak_gib": round(peak, 2),
            "planned_gib": round(planned(config, model_config), 2),
            "trained": sum(p.numel() for p in measured.parameters.values()),
            "same_bits": measured.same_bits(),
        }
        results.append(result)
        print(
            f"{method:<6} {rows:>4} {checkpointing!s:>13} {deterministic!s:>13} "
            f"{result['ms']:>8} {result['tokens_per_second']:>9,} {result['peak_gib']:>9} "
            f"{result['planned_gib']:>8}  {result['same_bits']}",
            flush=True,
        )
        del measured
        remove_lora(model)
    print(
        json.dumps(
            {
                "benchmark": "v2_lite",
                "device": name,
                "torch": torch.__version__,
                "seq_length": length,
                "results": results,
            }
        )
    )


if __name__ == "__main__":
    main()
