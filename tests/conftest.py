"""Tiny checkpoints written by transformers, an oracle that nobody here wrote, and a tiny
tokenizer."""

import os
import random
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import pytest
import torch

torch.set_num_threads(2)
SHARED = ROOT.parent / "shared" / "data"  # published data, used where it is present


def random_config(seed: int) -> dict:
    """Fields of a small DeepSeek-V2 config; over the seeds every branch of the model is taken."""
    draw = random.Random(seed)
    heads = draw.choice([2, 4])
    config = dict(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=draw.choice([40, 64]),
        moe_intermediate_size=draw.choice([8, 24]),
        num_hidden_layers=3,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        n_routed_experts=8,
        n_shared_experts=draw.choice([1, 2]),
        num_experts_per_tok=draw.choice([2, 3]),
        first_k_dense_replace=draw.choice([0, 1, 2]),
        kv_lora_rank=draw.choice([8, 16]),
        q_lora_rank=None if seed % 2 else 12,
        qk_nope_head_dim=draw.choice([8, 16]),
        qk_rope_head_dim=draw.choice([4, 8]),
        v_head_dim=draw.choice([8, 12]),
        attention_bias=seed % 3 == 1,
        routed_scaling_factor=draw.choice([1.0, 2.5]),
        rms_norm_eps=draw.choice([1e-6, 0.1]),
        max_position_embeddings=256,
        topk_method="greedy",
        norm_topk_prob=False,
    )
    if seed % 4 >= 2:
        config.update(topk_method="group_limited_greedy", n_group=4, topk_group=draw.choice([2, 3]))
    if seed % 3 != 0:
        mscale, factor = draw.choice([0.707, 1.0]), draw.choice([4.0, 40.0])
        config["max_position_embeddings"] = int(64 * factor)
        config["rope_parameters"] = dict(
            rope_type="yarn",
            rope_theta=10000.0,
            factor=factor,
            mscale=mscale,
            mscale_all_dim=draw.choice([mscale, 1.0]),
            original_max_position_embeddings=64,
            beta_fast=32,
            beta_slow=1,
        )
    return config


def save_with_transformers(directory, seed: int = 1, max_shard_size="50GB", **changes):
    """A random checkpoint written by transformers' save_pretrained; returns transformers' model."""
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

    torch.manual_seed(seed)
    oracle = DeepseekV2ForCausalLM(DeepseekV2Config(**{**random_config(seed), **changes}))
    with torch.no_grad():  # transformers' initial weights are so small that every logit is about 0
        for name, parameter in oracle.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.2)
    oracle.eval().save_pretrained(directory, max_shard_size=max_shard_size)
    return oracle


def save_tokenizer(directory) -> None:
    """A byte-level tokenizer of 258 tokens, in the published files' form."""
    import json

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    specials = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(specials + alphabet)}, []))
    tokenizer.add_special_tokens(specials)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": {"content": specials[0]}, "eos_token": specials[1]})
    )


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """A complete tiny base: 3 layers, 2 of them MoE with 8 experts, with a tokenizer."""
    path = tmp_path_factory.mktemp("base")
    save_with_transformers(path, seed=1, vocab_size=258, first_k_dense_replace=1)
    save_tokenizer(path)
    return path


@pytest.fixture
def chat_file(tmp_path) -> Path:
    """40 short conversations."""
    import json

    draw = random.Random(0)
    path = tmp_path / "train.jsonl"
    rows = []
    for _ in range(40):
        word = "".join(draw.choices("abcdef", k=draw.randint(2, 6)))
        rows.append(
            {
                "messages": [
                    {"role": "user", "content": f"Repeat: {word}"},
                    {"role": "assistant", "content": word},
                ]
            }
        )
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path
