"""Writes the demo's untrained base: 4 million random weights in the published DeepSeek-V2
checkpoint format. demo/pretrain.toml trains them on the general skills.

    python demo/make_base.py
"""

import argparse
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

DEMO = Path(__file__).resolve().parent
sys.path.insert(0, str(DEMO.parent))

from checkpoint import build_model  # noqa: E402
from families import read_config  # noqa: E402
from files import replacing, write_json  # noqa: E402

# The fields of DeepSeek-V2-Lite's config.json; 64 experts of which a token uses 6, as there.
CONFIG = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "torch_dtype": "bfloat16",
    "vocab_size": 2048,
    "hidden_size": 128,
    "intermediate_size": 512,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "kv_lora_rank": 64,
    "q_lora_rank": None,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "topk_method": "greedy",
    "scoring_func": "softmax",
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "aux_loss_alpha": 0.0005,
    "seq_aux": True,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "rope_scaling": None,
    "max_position_embeddings": 1024,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.05,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "use_cache": True,
}


def write_base(output: Path, changes: dict, seed: int) -> int:
    """Writes a base of CONFIG with changes, and the demo's tokenizer. Returns its parameters."""
    config = CONFIG | changes
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "config.json", config, indent=2)
    model = build_model(read_config(output))
    draw = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.ones_like(p)
        if "norm" in name
        else (torch.randn(p.shape, generator=draw) * config["initializer_range"]).to(p.dtype)
        for name, p in model.named_parameters()
    }
    with replacing(output / "model.safetensors") as part:
        save_file(tensors, part, metadata={"format": "pt"})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(DEMO / "base" / name, output / name)
    return sum(t.numel() for t in tensors.values())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output", default=str(DEMO / "pretrain" / "init"), help="directory to write"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the weights (default: 0)")
    args = parser.parse_args()
    count = write_base(Path(args.output), {}, args.seed)
    print(f"wrote {args.output}: {count:,} random weights")
    print("next: python train.py --config demo/pretrain.toml")


if __name__ == "__main__":
    main()
