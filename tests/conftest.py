"""Tiny checkpoints written by transformers, an oracle that nobody here wrote, and a tiny
tokenizer."""

import gc
import os
import random
import signal
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # of the commands that tests run, too: the same sums
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # test_kernels.py; Triton reads it when it is imported
torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a script's background job ignores it
SHARED = ROOT.parent / "shared" / "data"  # published data, used where it is present


def random_config(seed: int, family: str = "deepseek_v2") -> dict:
    """Fields of a small config of a family; over the seeds every branch of the model is taken."""
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
    if family not in ("deepseek", "deepseek_v2"):
        del config["topk_method"]  # transformers' configs of V3 and later do not name it
        config.update(
            norm_topk_prob=seed % 4 != 1,
            n_group=draw.choice([1, 2, 4]),
            rope_interleave=seed % 5 != 4,
            tie_word_embeddings=seed % 6 == 5,
        )
        config["topk_group"] = draw.randint(min(2, config["n_group"]), config["n_group"])
    if family in ("deepseek_v32", "glm_moe_dsa"):
        config.update(q_lora_rank=12, rope_interleave=True)
        config.update(index_topk=70, index_n_heads=2, index_head_dim=16)
    if family == "kimi_k25":  # transformers 5.24 takes a q_proj for the vision part's
        config["q_lora_rank"] = 12
    if family in ("mistral3", "mistral4"):
        config.update(n_group=1, topk_group=1)
        yarn = dict(
            rope_type="yarn", rope_theta=10000.0, factor=4.0, mscale=1.0, mscale_all_dim=1.0
        )
        config.setdefault("rope_parameters", yarn | {"beta_fast": 32, "beta_slow": 1})
        config["rope_parameters"] |= dict(
            original_max_position_embeddings=draw.choice([16, 64]),
            llama_4_scaling_beta=draw.choice([0.1, 0.5]),
        )
    if family == "deepseek":
        for name in ("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim"):
            del config[name]
        del config["v_head_dim"]
        config.pop("rope_parameters", None)
        config.update(
            num_key_value_heads=draw.choice([1, heads]),
            rope_theta=draw.choice([10000.0, 500.0]),
            routed_scaling_factor=1.0,
            topk_method="greedy",
        )
    return config


class LlamaMoE(torch.nn.Module):
    """DeepSeekMoE-16B's architecture, which transformers lacks, put together from its Llama
    attention and its V2 MoE."""

    def __init__(self, fields: dict):
        from transformers import DeepseekV2Config, LlamaConfig
        from transformers.models.deepseek_v2.modeling_deepseek_v2 import (
            DeepseekV2MLP,
            DeepseekV2Moe,
        )
        from transformers.models.llama import modeling_llama as llama

        super().__init__()
        names = ("hidden_size", "num_attention_heads", "num_key_value_heads", "attention_bias")
        theta = {"rope_type": "default", "rope_theta": fields["rope_theta"]}
        config = LlamaConfig(**{name: fields[name] for name in names}, rope_parameters=theta)
        config._attn_implementation = "eager"
        moe_config = DeepseekV2Config(**{k: v for k, v in fields.items() if k != "rope_theta"})
        moe_config._experts_implementation = "eager"
        size, eps = fields["hidden_size"], fields["rms_norm_eps"]
        self.model = torch.nn.Module()
        self.model.embed_tokens = torch.nn.Embedding(fields["vocab_size"], size)
        self.model.layers = torch.nn.ModuleList()
        for i in range(fields["num_hidden_layers"]):
            layer = torch.nn.Module()
            layer.input_layernorm = llama.LlamaRMSNorm(size, eps)
            layer.self_attn = llama.LlamaAttention(config, i)
            layer.post_attention_layernorm = llama.LlamaRMSNorm(size, eps)
            dense = i < fields["first_k_dense_replace"]
            layer.mlp = DeepseekV2MLP(moe_config) if dense else DeepseekV2Moe(moe_config)
            self.model.layers.append(layer)
        self.model.norm = llama.LlamaRMSNorm(size, eps)
        self.lm_head = torch.nn.Linear(size, fields["vocab_size"], bias=False)
        self.rotary = llama.LlamaRotaryEmbedding(config)

    def forward(self, tokens):
        from types import SimpleNamespace

        x = self.model.embed_tokens(tokens)
        length = tokens.shape[1]
        rope = self.rotary(x, torch.arange(length)[None])
        mask = torch.full((length, length), -torch.inf).triu(1)[None, None]
        for layer in self.model.layers:
            x = x + layer.self_attn(layer.input_layernorm(x), rope, mask)[0]
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return SimpleNamespace(logits=self.lm_head(self.model.norm(x)))


def one_by_one(tensors: dict) -> dict:
    """transformers holds the experts of a layer in one tensor; cut into the published names."""
    separate = {}
    for name, tensor in tensors.items():
        if name.endswith("experts.gate_up_proj"):
            for e, both in enumerate(tensor):
                for half, part in zip(("gate", "up"), both.chunk(2)):
                    separate[name.replace("gate_up_proj", f"{e}.{half}_proj.weight")] = part
        elif name.endswith("experts.down_proj"):
            for e, part in enumerate(tensor):
                separate[name.replace("down_proj", f"{e}.down_proj.weight")] = part
        else:
            separate[name] = tensor
    return separate


NATIVE = {  # the configuration and the model of transformers
    "deepseek_v2": ("DeepseekV2Config", "DeepseekV2ForCausalLM"),
    "deepseek_v3": ("DeepseekV3Config", "DeepseekV3ForCausalLM"),
    "deepseek_v32": ("DeepseekV32Config", "DeepseekV32ForCausalLM"),
    "glm4_moe_lite": ("Glm4MoeLiteConfig", "Glm4MoeLiteForCausalLM"),
    "glm_moe_dsa": ("GlmMoeDsaConfig", "GlmMoeDsaForCausalLM"),
    "kimi_k2": ("DeepseekV3Config", "DeepseekV3ForCausalLM"),  # has no class of its own
    "kimi_k25": ("Kimi_K25Config", "Kimi_K25ForConditionalGeneration"),
    "mistral3": ("Mistral3Config", "Mistral3ForConditionalGeneration"),
    "mistral4": ("Mistral4Config", "Mistral4ForCausalLM"),
    "sarvam_mla": ("SarvamMLAConfig", "DeepseekV3ForCausalLM"),
}


WHOLE = ("kimi_k25", "mistral3")  # have a vision part, too


def native_model(transformers, family: str, fields: dict):
    config_class, model_class = (getattr(transformers, name) for name in NATIVE[family])
    small = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=40)
    if family == "glm4_moe_lite":
        fields = dict(fields)
        dense = fields.pop("first_k_dense_replace")
        sparse = fields["num_hidden_layers"] - dense
        fields["mlp_layer_types"] = ["dense"] * dense + ["sparse"] * sparse
    if family == "kimi_k25":
        ids = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        fields = dict(
            text_config={"model_type": "deepseek_v3", **fields},
            vision_config={**small, "pos_emb_height": 4, "pos_emb_width": 4},
            tie_word_embeddings=fields["tie_word_embeddings"],
            projection_hidden_size=32,
            **{name: 92 + i for i, name in enumerate(ids)},
        )
    if family == "mistral3":
        fields = dict(
            text_config={"model_type": "mistral4", **fields},
            vision_config={**small, "model_type": "pixtral", "image_size": 28, "patch_size": 14},
            tie_word_embeddings=fields["tie_word_embeddings"],
            image_token_index=95,
        )
    return model_class(config_class(**fields))


def make_oracle(seed: int, family: str = "deepseek_v2", **changes):
    """A random model that nobody here wrote, with weights large enough to tell errors."""
    import transformers

    torch.manual_seed(seed)
    fields = {**random_config(seed, family), **changes}
    if family == "deepseek":
        oracle = LlamaMoE(fields)
    else:
        oracle = native_model(transformers, family, fields)
    with torch.no_grad():  # transformers' initial weights are so small that every logit is about 0
        for name, parameter in oracle.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.2)
        for name, buffer in oracle.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(0.0, 0.3)
    return TextPart(oracle).eval() if family in WHOLE else oracle.eval()


class TextPart(torch.nn.Module):
    """The language model of one that reads images, too."""

    def __init__(self, whole):
        super().__init__()
        self.__dict__["whole"] = whole  # not as a part of this one
        self.model, self.lm_head, self.config = (
            whole.model.language_model,
            whole.lm_head,
            whole.config,
        )

    def forward(self, tokens):
        return self.whole(tokens)


def save_with_transformers(directory, seed: int = 1, max_shard_size="50GB", **changes):
    """A random checkpoint written by transformers' save_pretrained; returns transformers' model."""
    oracle = make_oracle(seed, **changes)
    oracle.save_pretrained(directory, max_shard_size=max_shard_size)
    return oracle


def write_checkpoint(directory, config: dict, tensors: dict, shards: int = 1) -> None:
    """config.json and tensors in one file, or dealt out over several with an index."""
    import json

    from safetensors.torch import save_file

    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    tensors = {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in sorted(tensors)[i::shards]}
        save_file(part, directory / file, metadata={"format": "pt"})
        weight_map |= {name: file for name in part}
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


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


def load_with_adapter(base, adapter, **options):
    """A base with an adapter over it."""
    from adapter import load_adapter
    from checkpoint import load_model

    model = load_model(base, **options)
    load_adapter(model, adapter)
    return model


LONGEST = ("train_ep", "demo", "exactness", "families", "docs", "train", "packed", "hub")


def pytest_configure(config) -> None:
    config.option.loadscopereorder = False  # xdist's own order: the files with most tests first


def pytest_collection_modifyitems(items) -> None:
    """The longest files first: `--dist loadfile` gives each worker a whole file at a time, and one
    that begins last would leave the other worker without work."""
    first = [f"test_{name}.py" for name in LONGEST]
    items.sort(key=lambda item: first.index(item.path.name) if item.path.name in first else 99)


def pytest_collection_finish() -> None:
    """Python's collector would look through all that was imported, again and again: 3 to 13%
    of a file's time. A model may hold itself in a circle, so old objects are still collected, but
    seldom."""
    gc.freeze()
    gc.set_threshold(700, 10, 1000)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """A complete tiny base: 3 layers, 2 of them MoE with 8 experts, with a tokenizer."""
    path = tmp_path_factory.mktemp("base")
    save_with_transformers(path, seed=1, vocab_size=258, first_k_dense_replace=1)
    save_tokenizer(path)
    return path


def write_chats(path: Path) -> Path:
    """40 short conversations."""
    import json

    draw = random.Random(0)
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


@pytest.fixture
def chat_file(tmp_path) -> Path:
    return write_chats(tmp_path / "train.jsonl")
