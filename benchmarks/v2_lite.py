"""Training steps of the DeepSeek-V2-Lite shape: tokens per second beside transformers, and peak
memory beside what `train.py --plan` says.

    python benchmarks/v2_lite.py           # a GPU with 80 GB
    python benchmarks/v2_lite.py --tiny    # on a CPU, in seconds: the same, not compiled

Random bfloat16 weights; ESFT trains 124 experts (as many as the published selection for intent:
1.07B parameters), LoRA matrices of rank 8 at every linear layer; random tokens. Ours is a whole
step: gradients, norm, clipping, AdamW on float32 masters, all of it in both columns. transformers,
which cannot train single experts, is timed without an optimizer: forward and backward with experts
by grouped_mm, gradients for all experts, of which a user would keep some; the rest is frozen.
"layers again" is how many layers run again in backward; where the setting is auto, as few as fit.
Settings with the same bits print hashes of the gradients: of two passes, and with other layers that
run again. Prints its conditions, a table, and one JSON line."""

import argparse
import datetime
import gc
import hashlib
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from checkpoint import build_model  # noqa: E402
from data import Rows  # noqa: E402
from fast.experts import experts_grouped  # noqa: E402
from fast.packed import PARTS, packed_layers  # noqa: E402
from lora import remove_lora  # noqa: E402
from model import ModelConfig, MoE, Transformer, experts_loop  # noqa: E402
from processes import SingleProcess  # noqa: E402
from train import be_deterministic, compute_gradients  # noqa: E402
from training.cards import OVERHEAD, fewest_layers  # noqa: E402
from training.checkpointing import memory_of_process  # noqa: E402
from training.config import TrainConfig  # noqa: E402
from training.host_optimizer import make_optimizer  # noqa: E402
from training.optimizer import mark_trained  # noqa: E402
from training.plan import model_of_rank, peak_of_step  # noqa: E402

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
    num_hidden_layers=2,
    kv_lora_rank=32,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    v_head_dim=16,
)


def random_model(
    config: ModelConfig, device: str, ranks=SingleProcess(), quantize: str = ""
) -> Transformer:
    """A model with random weights, or the part of a rank."""
    model = build_model(config, device, split=ranks.split, quantize=quantize)
    torch.manual_seed(ranks.rank)
    for name, p in model.named_parameters():
        p.data.fill_(1.0) if "norm" in name else p.data.normal_(std=0.02)
    for experts in packed_layers(model).values():
        for e, part in product(experts.expert_at, PARTS):
            shape = experts[e].get_submodule(part).weight.shape
            experts.pack(e, part, torch.empty(shape, device=device).normal_(std=0.02))
    return model


def use_experts(model: Transformer, experts: str) -> None:
    """Runs the experts of a fast model by the loop, or by grouped products again."""
    for module in model.modules():
        if isinstance(module, MoE):
            module.run_experts = {"loop": experts_loop, "grouped": experts_grouped}[experts]


def published_numbers(config: ModelConfig) -> dict:
    """An expert_cfg with as many experts as the published selection for intent, 124."""
    draw = random.Random(0)
    counts = {layer: 5 if i < 20 else 4 for i, layer in enumerate(config.moe_layers)}
    return {"experts": {str(layer): draw.sample(range(64), n) for layer, n in counts.items()}}


def synchronise(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def median_seconds(run, device: str, repeats: int, burn_in: int = 1) -> float:
    times = []
    for _ in range(burn_in + repeats):
        synchronise(device)
        start = time.perf_counter()
        run()
        synchronise(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[burn_in:])


def command_line(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--tiny", action="store_true", help="a tiny shape on the CPU, to see that the script works"
    )
    return parser


def print_conditions(device: str) -> dict:
    """What a result depends on beside the code, and the code's commit."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=ROOT
    ).stdout.strip()
    made = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "torch": torch.__version__,
        "transformers": metadata.version("transformers") if find_spec("transformers") else "none",
        "date": str(datetime.date.today()),
        "commit": commit,
    }
    print(", ".join(f"{name} {value}" for name, value in made.items()))
    return made


def empty_transformers(fields: dict, device: str):
    """transformers' model with uninitialised weights, in bfloat16."""
    import transformers

    with torch.device("meta"):
        theirs = transformers.DeepseekV2ForCausalLM(
            transformers.DeepseekV2Config(
                **fields, q_lora_rank=None, max_position_embeddings=163840
            )
        )
    theirs = theirs.to(torch.bfloat16).to_empty(device=device).eval()
    # to_empty left the tables of the rotary positions uninitialised.
    theirs.model.rotary_emb = type(theirs.model.rotary_emb)(theirs.config).to(device)
    return theirs


def transformers_model(model: Transformer, fields: dict, device: str):
    """transformers' model with our weights, in bfloat16."""
    theirs = empty_transformers(fields, device)
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if name in own:
                parameter.copy_(own[name])
                continue
            of, _, kind = name.rpartition(".")  # gate_up_proj or down_proj of all experts
            experts = model.get_submodule(of)
            stack = experts.gate_up if kind == "gate_up_proj" else experts.down
            for e, place in enumerate(experts.place_of.tolist()):  # without a copy of the stack
                parameter[e] = stack[place]
    if device == "cuda":
        theirs.set_experts_implementation("grouped_mm")
    return theirs


def empty_memory(device: str) -> None:
    if device.startswith("cuda"):  # on a CPU, `peak_gib` measures nothing
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gib(device: str) -> float:
    return torch.cuda.max_memory_allocated() / 2**30 if device.startswith("cuda") else 0.0


class Measured:
    """The training steps of one setting, on one model."""

    def __init__(
        self, model: Transformer, config: TrainConfig, ranks=SingleProcess(), documents: int = 1
    ):
        self.model, self.config, self.ranks = model, config, ranks
        self.cfg = published_numbers(model.config) if config.method == "esft" else None
        self.parameters = mark_trained(config, model, self.cfg)
        self.optimizer = make_optimizer(self.parameters, config, ranks)
        shape = config.batch_size, config.seq_length
        tokens = torch.randint(0, model.config.vocab_size, shape)
        begins = torch.rand(shape) < (documents - 1) / config.seq_length
        self.rows = Rows(tokens, tokens, begins.long().cumsum(1))

    def gradients(self) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """The gradients and their norm."""
        alpha = self.model.config.aux_loss_alpha
        args = self.config, self.model, self.rows, alpha, self.optimizer, self.ranks
        compute_gradients(*args)
        gradients = self.optimizer.gradients
        return gradients, self.ranks.norm(gradients)

    def step(self) -> None:
        _, norm = self.gradients()
        self.optimizer.clip(norm)
        self.optimizer.step(1e-5)

    def same_bits(self) -> dict[str, str]:
        """Hashes of the gradients: of a pass, of another one, and with other layers that run again
        in backward."""
        asked, hashes = self.config.gradient_checkpointing, {}
        count = self.model.config.num_hidden_layers
        for what, layers in (("once", 0), ("again", 0), ("7 or more layers", 7), ("all", count)):
            self.config = replace(self.config, gradient_checkpointing=max(layers, asked))
            digest = hashlib.sha256()
            for gradient in self.gradients()[0].values():
                digest.update(gradient.cpu().numpy().tobytes())
            hashes[what] = digest.hexdigest()[:12]
            self.optimizer.adamw.zero_grad()
        return hashes


def planned(config: TrainConfig, model_config: ModelConfig) -> Callable[[int], int]:
    """What --plan gives for a setting: layers that run again in backward -> bytes."""
    cfg = published_numbers(model_config) if config.method == "esft" else None
    alone = SingleProcess()
    model, trained = model_of_rank(config, model_config, cfg, alone)
    return peak_of_step(config, model, trained, alone, compute_gradients)


# method, rows, checkpointing, deterministic, compiled, experts, documents in a row (1: no mask)
SETTINGS = [
    ("esft", 1, "auto", False, True, "grouped"),
    ("esft", 4, "auto", False, True, "grouped"),
    ("esft", 8, "auto", False, True, "grouped"),
    ("esft", 4, True, False, True, "grouped"),
    ("esft", 1, "auto", True, True, "grouped"),
    ("esft", 4, "auto", True, True, "grouped"),
    ("esft", 4, "auto", False, True, "grouped", 32),
    ("esft", 4, "auto", True, True, "grouped", 32),
    ("esft", 1, "auto", False, False, "grouped"),
    ("esft", 4, True, False, False, "grouped"),
    ("esft", 4, True, False, False, "loop"),
    ("lora", 4, True, False, True, "grouped"),
]


def measure(model: Transformer, setting: tuple, device: str, length: int, steps: int) -> dict:
    method, rows, checkpointing, deterministic, compiled, experts, *documents = setting
    be_deterministic(deterministic)
    use_experts(model, experts)
    config = TrainConfig(
        method=method,
        seq_length=length,
        batch_size=rows,
        gradient_accumulation_steps=1,
        gradient_checkpointing=checkpointing,
        learning_rate=1e-5,
        device=device,
        dtype="bfloat16",
        compile=compiled,
        experts=experts,
        document_mask=bool(documents),
    )
    empty_memory(device)
    peak, count = planned(config, model.config), model.config.num_hidden_layers
    layers = config.gradient_checkpointing
    if layers == "auto":
        layers = fewest_layers(peak, count, memory_of_process(device, model) - OVERHEAD)
    config.gradient_checkpointing = layers = count if layers is True else int(layers)
    start = time.perf_counter()
    measured = Measured(model, config, documents=documents[0] if documents else 1)
    measured.step()
    synchronise(device)
    first = time.perf_counter() - start
    seconds = median_seconds(measured.step, device, steps)
    result = {
        "who": "ours",
        "method": method,
        "rows": rows,
        "checkpointing": layers,
        "documents": documents[0] if documents else None,
        "deterministic": deterministic,
        "compiled": compiled,
        "experts": experts,
        "ms": round(seconds * 1e3, 1),
        "tokens_per_second": round(rows * length / seconds),
        "first_step_s": round(first, 1),
        "peak_gib": round(peak_gib(device), 2),
        "planned_gib": round(peak(layers) / 2**30, 2),
        "trained": sum(p.numel() for p in measured.parameters.values()),
        "same_bits": measured.same_bits() if deterministic else {},
    }
    remove_lora(model)
    return result


def measure_transformers(
    theirs, rows: int, checkpointing: bool, device: str, length: int, steps: int
) -> dict:
    theirs.requires_grad_(False)
    for name, parameter in theirs.named_parameters():
        parameter.requires_grad_(".experts." in name)
    theirs.train()
    if checkpointing:
        theirs.gradient_checkpointing_enable({"use_reentrant": False})
        theirs.enable_input_require_grads()
    tokens = torch.randint(0, theirs.config.vocab_size, (rows, length), device=device)

    def step() -> None:
        theirs(tokens, labels=tokens, use_cache=False).loss.backward()
        theirs.zero_grad()

    empty_memory(device)
    seconds = median_seconds(step, device, steps, burn_in=2)
    theirs.gradient_checkpointing_disable()
    return {
        "who": "transformers",
        "method": "all experts",
        "rows": rows,
        "checkpointing": theirs.config.num_hidden_layers if checkpointing else 0,
        "ms": round(seconds * 1e3, 1),
        "tokens_per_second": round(rows * length / seconds),
        "peak_gib": round(peak_gib(device), 2),
    }


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument(
        "--steps", type=int, default=5, help="timed steps (default: 5), after 2 of burn-in"
    )
    args = parser.parse_args()
    device, length = ("cpu", 64) if args.tiny else ("cuda", 4096)
    fields = V2_LITE | TINY if args.tiny else V2_LITE
    model = random_model(ModelConfig(**fields), device)
    made = print_conditions(device)
    print(f"bfloat16, rows of {length} tokens, medians of {args.steps} steps after 2 of burn-in")
    print(
        f"{'who':<12} {'method':<11} {'rows':>4} {'layers again':>13} {'bits':>5} {'blocks':>8} "
        f"{'experts':>7} {'ms':>8} {'tokens/s':>9} {'first s':>7} {'peak GiB':>8} {'planned':>7}"
    )
    results = []

    def show(row: dict) -> None:
        results.append(row)
        words = (
            row["checkpointing"] or "",
            "same" if row.get("deterministic") else "",
            "compiled" if row.get("compiled") else "",
        )
        print(
            f"{row['who']:<12} {row['method']:<11} {row['rows']:>4} {words[0]:>13} {words[1]:>5} "
            f"{words[2]:>8} {row.get('experts', ''):>7} {row['ms']:>8} "
            f"{row['tokens_per_second']:>9,} {row.get('first_step_s', ''):>7} "
            f"{row['peak_gib']:>8} {row.get('planned_gib', ''):>7}  {row.get('same_bits') or ''}"
            f"{'' if not row.get('documents') else 'document_mask'}",
            flush=True,
        )

    # Compiling on a CPU takes longer than a test may.
    for setting in SETTINGS if device == "cuda" else [s for s in SETTINGS if not s[4]]:
        show(measure(model, setting, device, length, args.steps))
    be_deterministic(False)
    theirs = transformers_model(model, fields, device)
    del model
    for rows, checkpointing in ((1, False), (4, True)):
        show(measure_transformers(theirs, rows, checkpointing, device, length, args.steps))
    print(json.dumps({"benchmark": "v2_lite", **made, "seq_length": length, "results": results}))


if __name__ == "__main__":
    main()
