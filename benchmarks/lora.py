"""Training steps of LoRA of rank 8, scaling 2, on every linear layer of the DeepSeek-V2-Lite shape:
tokens per second and peak memory, beside PEFT over transformers.

    python benchmarks/lora.py           # a GPU with 80 GB
    python benchmarks/lora.py --tiny    # on a CPU, in seconds: the same, not compiled

Random bfloat16 weights, random tokens. A step is whole on both sides: forward, backward, the
gradients' norm, clipping, AdamW. Ours trains float32 masters of bfloat16 matrices. PEFT's matrices
are float32, its default, or bfloat16. PEFT adapts the same layers. The routed experts are two
parameters of a layer there, gate_up_proj and down_proj (target_parameters); gate and up share an A
in PEFT and have one each here, so ours trains more. PEFT's experts run by transformers' grouped_mm.
Ours is deleted before PEFT's model is made: both do not fit. Prints its conditions, a table, and
one JSON line."""

import json
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.v2_lite import (  # noqa: E402
    TINY,
    V2_LITE,
    command_line,
    empty_memory,
    empty_transformers,
    measure,
    median_seconds,
    peak_gib,
    print_conditions,
    random_model,
)
from model import ModelConfig  # noqa: E402

RUNS = [(1, False), (1, True), (4, True)]  # rows, checkpointing
ATTENTION = ["q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
LINEARS = ["gate_proj", "up_proj", "down_proj"]  # of dense layers and shared experts
FUSED = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]  # routed experts


def peft_model(fields: dict, device: str, float32: bool):
    """PEFT over transformers' model with random weights; no other model may be held."""
    import peft

    empty_memory(device)  # of the model before
    theirs = empty_transformers(fields, device)
    theirs.set_experts_implementation("grouped_mm")
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.fill_(1.0) if "norm" in name else parameter.normal_(std=0.02)
    # For a model_type that it knows, PEFT takes gate_proj, up_proj and down_proj for the routed
    # experts', and leaves those of dense layers and shared experts out.
    theirs.config.model_type = "unknown"
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=8,
        lora_alpha=16,
        target_modules=[*ATTENTION, *LINEARS],
        target_parameters=FUSED,
    )
    return peft.get_peft_model(theirs, config, autocast_adapter_dtype=float32)


def measure_peft(
    theirs, rows: int, checkpointing: bool, float32: bool, device: str, length: int, steps: int
) -> dict:
    theirs.train()
    theirs.gradient_checkpointing_disable()
    if checkpointing:
        theirs.gradient_checkpointing_enable({"use_reentrant": False})
        theirs.enable_input_require_grads()
    trained = [p for p in theirs.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    tokens = torch.randint(0, theirs.config.vocab_size, (rows, length), device=device)

    def step() -> None:
        theirs(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        adamw.step()
        adamw.zero_grad()

    result = {"who": f"PEFT, {'float32' if float32 else 'bfloat16'}", "rows": rows}
    result |= {"checkpointing": checkpointing, "trained": sum(p.numel() for p in trained)}
    empty_memory(device)
    try:
        seconds = median_seconds(step, device, steps, burn_in=2)
    except torch.OutOfMemoryError:
        adamw.zero_grad()
        return result | {"ms": None, "tokens_per_second": None, "peak_gib": None}
    speed = {"ms": round(seconds * 1e3, 1), "tokens_per_second": round(rows * length / seconds)}
    return result | speed | {"peak_gib": round(peak_gib(device), 2)}


def main() -> None:
    parser = command_line(__doc__)
    said = "timed steps (default: 5), after burn-in"
    parser.add_argument("--steps", type=int, default=5, help=said)
    args = parser.parse_args()
    device, length = ("cpu", 64) if args.tiny else ("cuda", 4096)
    fields = V2_LITE | TINY if args.tiny else V2_LITE
    made = print_conditions(device)
    print(f"bfloat16, rows of {length} tokens, medians of {args.steps} steps after burn-in")
    head = ("who", "blocks", "rows", "saved by", "ms", "tokens/s", "peak GiB", "trained")
    layout = "{:<14} {:<8} {:>4} {:>13} {:>8} {:>9} {:>8} {:>13}"
    print(layout.format(*head))
    results = []

    def show(row: dict) -> None:
        results.append(row)
        blocks = "compiled" if row.get("compiled") else ""
        saved = "checkpointing" if row["checkpointing"] else ""
        numbers = row["ms"], row["tokens_per_second"], row["peak_gib"]
        told = [x if x is not None else "no memory" for x in numbers]
        trained = f"{row['trained']:,}"
        print(layout.format(row["who"], blocks, row["rows"], saved, *told, trained), flush=True)

    model = random_model(ModelConfig(**fields), device)
    for rows, checkpointing in RUNS:
        # Compiling on a CPU takes longer than a test may.
        for compiled in (False, True) if device == "cuda" else (False,):
            setting = "lora", rows, checkpointing, False, compiled, "grouped"
            show(measure(model, setting, device, length, args.steps))
    del model
    for float32 in (True, False):
        theirs = peft_model(fields, device, float32)
        for run in RUNS:
            show(measure_peft(theirs, *run, float32, device, length, args.steps))
        del theirs
    print(json.dumps({"benchmark": "lora", **made, "seq_length": length, "results": results}))


if __name__ == "__main__":
    main()
