"""The DeepSeek-MoE transformers (DeepSeekMoE, V2, V3): attention, gate, experts; loading, freezing,
adapters.

Dimensions, as in the comments: B rows, T tokens of a row, N = B * T tokens, D hidden size, V
vocabulary, H attention heads, E routed experts, K experts per token, S = N * K (token, expert)
slots, I expert width, C latent of keys and values (kv_lora_rank), R rotary part of a head, L
layers.

Parameter names are exactly those of the published checkpoints, so that a trained expert is a valid
checkpoint tensor. Equation numbers are those of DeepSeekMoE (arXiv 2401.06066), DeepSeek-V2
(arXiv 2405.04434) and DeepSeek-V3 (arXiv 2412.19437).
"""

import argparse
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields, replace
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

# ------------------------------------------------------------------------------------------
# Configuration


# What the families support of the fields that name a variant, the default first: DeepSeek's own
# configuration classes leave some of them out.
FAMILIES = {
    "deepseek": {
        "scoring_func": ["softmax"],
        "topk_method": ["greedy"],
        "routed_scaling_factor": [1.0],
        "quantization_config": [None],
    },
    "deepseek_v2": {
        "scoring_func": ["softmax"],
        "topk_method": ["greedy", "group_limited_greedy"],
        "quantization_config": [None],
    },
    "deepseek_v3": {"scoring_func": ["sigmoid"], "topk_method": ["noaux_tc"]},
}
V3_DEFAULTS = {"norm_topk_prob": True, "routed_scaling_factor": 2.5, "n_group": 8, "topk_group": 4}
MLA_FIELDS = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")


@dataclass
class ModelConfig:
    """The fields of a Hugging Face `config.json` that this model reads, under the file's names."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int  # width of the dense layers
    moe_intermediate_size: int  # width of one expert
    num_hidden_layers: int
    num_attention_heads: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    first_k_dense_replace: int
    num_key_value_heads: int | None = None  # of `deepseek`; multi-head latent attention has none
    head_dim: int | None = None  # of `deepseek`; for the others transformers writes the rotary part
    kv_lora_rank: int | None = None  # this and the next four: of multi-head latent attention
    q_lora_rank: int | None = None
    qk_nope_head_dim: int | None = None
    qk_rope_head_dim: int | None = None
    v_head_dim: int | None = None
    moe_layer_freq: int = 1
    topk_method: str = "greedy"
    scoring_func: str = "softmax"
    n_group: int | None = None
    topk_group: int | None = None
    norm_topk_prob: bool = False
    routed_scaling_factor: float = 1.0
    aux_loss_alpha: float = 0.0  # weight of the load balance loss in training
    seq_aux: bool = True  # balance within each row (True) or over the whole batch
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None
    rope_interleave: bool = True
    attention_bias: bool = False
    tie_word_embeddings: bool = False
    hidden_act: str = "silu"
    mlp_bias: bool = False
    attention_dropout: float = 0.0
    num_nextn_predict_layers: int = 0  # layers for multi-token prediction, which are not loaded
    quantization_config: dict | None = None

    @classmethod
    def from_json(cls, path: str | Path) -> "ModelConfig":
        """Reads `path`; both spellings of the rotary settings (`rope_scaling`, `rope_parameters`).

        Raises FileNotFoundError, or ValueError that names the field, its value and what is
        supported."""
        raw = read_json(path)
        if not isinstance(raw, dict):
            raise ValueError(f"{path}: must hold a JSON object, found {type(raw).__name__}")
        try:
            return cls._from_dict(raw)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    @classmethod
    def _from_dict(cls, raw: dict) -> "ModelConfig":
        family = raw.get("model_type")
        if not isinstance(family, str) or family not in FAMILIES:
            raise ValueError(f"model_type is {family!r}; supported: {', '.join(FAMILIES)}")
        for name in ("index_topk", "index_n_heads"):  # V3.2 and later
            if raw.get(name) is not None:
                raise ValueError(f"{name} is {raw[name]!r}; sparse attention is not supported")
        rope = raw.get("rope_parameters")
        if rope is not None:  # transformers 5 moved rope_theta and rope_scaling in here
            if not isinstance(rope, dict):
                raise ValueError(f"rope_parameters is {rope!r}; must be an object")
            if raw.get("rope_scaling", rope) not in (None, rope):
                raise ValueError("rope_scaling and rope_parameters differ; one is required")
            theta = {"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {}
            raw = {**raw, **theta, "rope_scaling": rope}
        defaults = {name: values[0] for name, values in FAMILIES[family].items()}
        if family == "deepseek_v3":
            defaults |= V3_DEFAULTS
        given = {field.name: raw[field.name] for field in fields(cls) if field.name in raw}
        for field in fields(cls):
            if field.default is MISSING and field.name not in given:
                raise ValueError(f"field {field.name} is missing")
        config = cls(**{**defaults, **given})
        config.check()
        return config

    def check(self) -> None:
        """Raises ValueError for the first field with a value that this model does not support."""
        supported = {
            "model_type": list(FAMILIES),
            "hidden_act": ["silu"],
            "mlp_bias": [False],
            "attention_dropout": [0.0],
            **FAMILIES.get(self.model_type, {}),
        }
        for name, values in supported.items():
            if getattr(self, name) not in values:
                shown = ", ".join(map(repr, values))
                raise ValueError(f"{name} is {getattr(self, name)!r}; supported: {shown}")
        for field in fields(self):
            self._check_kind(field.name, field.type, getattr(self, field.name))
        if self.num_hidden_layers * self.n_routed_experts > 2**17:
            raise ValueError(
                f"num_hidden_layers is {self.num_hidden_layers} and n_routed_experts is "
                f"{self.n_routed_experts}; at most {2**17} experts are supported"
            )
        if self.rms_norm_eps < 0 or self.rope_theta <= 1:
            raise ValueError(
                f"rms_norm_eps is {self.rms_norm_eps} and rope_theta is {self.rope_theta}; "
                "must be at least 0 and above 1"
            )
        self._check_attention()
        self._check_routing()
        self._check_rope()
        if self.quantization_config is not None:
            fp8_block(self.quantization_config)

    @staticmethod
    def _check_kind(name: str, kind, value) -> None:
        if kind in (int, float, bool, str) and value is None:
            raise ValueError(f"{name} is null; a value is required")
        if kind in (int, int | None) and value is not None:
            least = 0 if name in ("first_k_dense_replace", "num_nextn_predict_layers") else 1
            if type(value) is not int or not least <= value < 2**19:
                raise ValueError(
                    f"{name} is {value!r}; must be an integer from {least} to 2^19 - 1"
                )
        elif kind is float and (type(value) not in (int, float) or not abs(value) < 1e30):
            raise ValueError(f"{name} is {value!r}; must be a finite number")
        elif kind is bool and type(value) is not bool:
            raise ValueError(f"{name} is {value!r}; must be true or false")

    def _check_attention(self) -> None:
        if self.model_type != "deepseek":
            for name in MLA_FIELDS:
                if getattr(self, name) is None:
                    raise ValueError(f"field {name} is missing")
            if self.qk_rope_head_dim % 2:
                raise ValueError(f"qk_rope_head_dim is {self.qk_rope_head_dim}; must be even")
            return
        heads, kv_heads = self.num_attention_heads, self.key_value_heads
        if self.hidden_size % (2 * heads):
            raise ValueError(
                f"num_attention_heads is {heads}; must part hidden_size ({self.hidden_size}) into "
                "heads of even size"
            )
        if heads % kv_heads:
            raise ValueError(f"num_key_value_heads is {kv_heads}; must divide {heads} heads")
        if self.head_dim not in (None, self.hidden_size // heads):
            raise ValueError(
                f"head_dim is {self.head_dim}; supported: hidden_size / num_attention_heads, "
                f"{self.hidden_size // heads}"
            )

    def _check_routing(self) -> None:
        E, reachable = self.n_routed_experts, self.n_routed_experts
        if E >= 2**15:
            raise ValueError(f"n_routed_experts is {E}; must be below 2^15")
        if self.topk_method != "greedy":
            least = 2 if self.topk_method == "noaux_tc" else 1  # experts that rank a group
            if not self.n_group or E % self.n_group or E // self.n_group < least:
                raise ValueError(
                    f"n_group is {self.n_group}; {self.topk_method} needs groups of equal size, "
                    f"of n_routed_experts ({E}), at least {least} in each"
                )
            if not self.topk_group or self.topk_group > self.n_group:
                raise ValueError(
                    f"topk_group is {self.topk_group}; must be 1 to n_group ({self.n_group})"
                )
            reachable = E // self.n_group * self.topk_group
        if self.num_experts_per_tok > reachable:
            raise ValueError(
                f"num_experts_per_tok is {self.num_experts_per_tok}; "
                f"a token can reach only {reachable} experts"
            )

    def _check_rope(self) -> None:
        rope = self.rope_scaling
        if rope is None:
            return
        if not isinstance(rope, dict):
            raise ValueError(f"rope_scaling is {rope!r}; must be an object or null")
        rope = {name: value for name, value in rope.items() if value is not None}
        kind = rope.get("rope_type", rope.get("type", "default"))
        kinds = ("default",) if self.model_type == "deepseek" else ("default", "yarn")
        if kind not in kinds:
            raise ValueError(
                f"rope_scaling: type is {kind!r}; supported: {', '.join(map(repr, kinds))}"
            )
        known = {"rope_type", "type", "rope_theta"}
        if kind == "yarn":
            numbers = {"factor": 1, "original_max_position_embeddings": 1}
            given = ("beta_fast", "beta_slow", "mscale", "mscale_all_dim")
            numbers |= {name: 0 for name in given if name in rope}
            for name, least in numbers.items():
                value = rope.get(name)
                usable = type(value) in (int, float) and (value == 0 or 1e-6 < value < 1e30)
                if not usable or value < least:
                    raise ValueError(
                        f"rope_scaling: {name} is {value!r}; must be a number from {least}"
                    )
            known |= {*numbers, *given}
        for name in rope.keys() - known:  # an attention_factor or a partial_rotary_factor, say
            raise ValueError(f"rope_scaling: {name} is {rope[name]!r}; not supported")

    @property
    def key_value_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def rotary_dim(self) -> int:
        """R; `deepseek` turns whole heads."""
        if self.model_type == "deepseek":
            return self.hidden_size // self.num_attention_heads
        return self.qk_rope_head_dim

    @property
    def cache_width(self) -> int:
        """What a token leaves in a layer's cache: latent and rotary part, or keys and values."""
        if self.model_type == "deepseek":
            return 2 * self.key_value_heads * self.rotary_dim
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def normalises_gates(self) -> bool:
        return self.norm_topk_prob and self.num_experts_per_tok > 1

    @property
    def scales_gates(self) -> bool:
        """V3 always multiplies by routed_scaling_factor, V2 where it does not normalise."""
        return self.model_type == "deepseek_v3" or not self.normalises_gates

    def is_moe(self, layer: int) -> bool:
        return layer >= self.first_k_dense_replace and layer % self.moe_layer_freq == 0

    @property
    def moe_layers(self) -> list[int]:
        return [layer for layer in range(self.num_hidden_layers) if self.is_moe(layer)]

    @property
    def yarn(self) -> dict | None:
        rope = {k: v for k, v in (self.rope_scaling or {}).items() if v is not None}
        return rope if rope.get("rope_type", rope.get("type")) == "yarn" else None


# ------------------------------------------------------------------------------------------
# Rotary positions


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's attention temperature (arXiv 2309.00071, eq. 22, with DeepSeek's factor `mscale`)."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def rope_table(config: ModelConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin, float32, (..., R / 2) for integer `positions` (...), with YaRN where the config
    says."""
    dim, theta = config.rotary_dim, config.rope_theta
    pairs = torch.arange(0, dim, 2, dtype=torch.float32, device=positions.device)
    inverse_frequency = 1.0 / theta ** (pairs / dim)  # (R/2,)
    scale = 1.0
    if config.yarn:
        yarn = config.yarn
        factor, length = yarn["factor"], yarn["original_max_position_embeddings"]

        def pair_turning(
            times: float,
        ) -> float:  # the pair that turns `times` times within `length`
            return dim * math.log(length / (times * 2 * math.pi)) / (2 * math.log(theta))

        # Pairs that turn fast keep their frequency, those that turn slowly are stretched by
        # `factor`.
        low = max(math.floor(pair_turning(yarn.get("beta_fast") or 32)), 0)
        high = min(math.ceil(pair_turning(yarn.get("beta_slow") or 1)), dim - 1)
        ramp = ((pairs / 2 - low) / ((high - low) or 0.001)).clamp(0, 1)
        inverse_frequency = inverse_frequency * (1 - ramp) + inverse_frequency / factor * ramp
        scale = yarn_mscale(factor, yarn.get("mscale", 1)) / yarn_mscale(
            factor, yarn.get("mscale_all_dim", 0)
        )
    angle = positions[..., None].float() * inverse_frequency
    return angle.cos() * scale, angle.sin() * scale


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Turns the pairs (0, 1), (2, 3), ... of x (..., R) if `interleaved`, else (0, R/2), (1, R/2 +
    1), ... The result holds all first members of the pairs, then all second ones: an order that
    queries and keys share, so that their products do not change."""
    pairs = x.float()
    first, second = pairs.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else pairs.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


# ------------------------------------------------------------------------------------------
# Layers


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


@dataclass
class Cache:
    """What decoding remembers of the tokens seen: normalised latent and turned rotary key, nothing
    a head; of `deepseek`, turned keys and values of each head."""

    layers: Tensor  # (L, B, length, C + R) or (L, B, length, 2 * key-value heads * head size)
    seen: Tensor  # (B,) tokens seen so far

    @classmethod
    def empty(cls, config: ModelConfig, rows: int, length: int, like: Tensor) -> "Cache":
        layers = like.new_zeros(config.num_hidden_layers, rows, length, config.cache_width)
        return cls(layers, torch.zeros(rows, dtype=torch.int64, device=like.device))


def on_gpu(x: Tensor) -> bool:
    """A function of its own for `--plan`, whose tensors without data stand for a GPU's."""
    return x.is_cuda


def effective_weight(linear: nn.Linear) -> Tensor:
    """W, or W + scaling * B A of a Linear that carries LoRA (`add_lora`): for code that uses the
    weight without calling the Linear, whose hook then does not run."""
    if not hasattr(linear, "lora_A"):
        return linear.weight
    A, B = linear.lora_A.weight, linear.lora_B.weight
    return torch.addmm(linear.weight, B, A, alpha=linear.lora_scaling)


Documents = tuple[list[Tensor], Tensor]


def group_documents(documents: Tensor) -> Documents:
    """documents (B, T), on the CPU, equal numbers next to each other -> for `attend`, indices of
    the B * T tokens: of documents of like length, within a power of two, one (count, longest) for
    each length; and where each token is in all of these one after another (B * T,).

    Indices run on past the end of a document: causal attention does not look there, and what comes
    out there is dropped."""
    begins = (documents.diff(dim=1, prepend=documents[:, :1] - 1) != 0).flatten().nonzero()[:, 0]
    total = documents.numel()
    lengths = begins.diff(append=begins.new_tensor([total]))
    power = (lengths - 1).double().log2().floor()  # of 1, 2, 3 to 4, 5 to 8, ... tokens
    groups, places, before = [], torch.empty(total, dtype=torch.int64), 0
    for each in power.unique():
        chosen = power == each
        offsets = torch.arange(lengths[chosen].max())
        indices = (begins[chosen, None] + offsets) % total
        within = offsets < lengths[chosen, None]
        places[indices[within]] = before + within.flatten().nonzero()[:, 0]
        before += indices.numel()
        groups.append(indices)
    return groups, places


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    documents: Documents | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention of q and k (B, T, heads, A) and v (B, T, heads, Z) -> (B, T, heads * Z), k and v
    with as many heads or a divisor of them. Causal, unless a `mask` says what is seen; with
    `documents` of `group_documents`, each within itself alone."""
    if documents is not None:
        groups, places = documents
        tokens = [x.flatten(0, 1) for x in (q, k, v)]
        out = [attend(*(x[indices] for x in tokens), scale=scale) for indices in groups]
        return torch.cat([x.flatten(0, 1) for x in out])[places].view(*q.shape[:2], -1)
    width = v.shape[-1]
    if not on_gpu(q) or torch.are_deterministic_algorithms_enabled():
        # Heads of one width are what a CPU's fast kernel wants, and of a GPU's the fast one that
        # gives the same bits twice; the others hold all scores (B, heads, T, T).
        v = F.pad(v, (0, max(q.shape[-1] - width, 0)))
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out[..., :width].transpose(1, 2).flatten(2)


class MultiHeadAttention(nn.Module):
    """The attention of `deepseek`, that of Llama: as many key heads as query heads, or fewer."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        D, bias = config.hidden_size, config.attention_bias
        self.head_dim = config.rotary_dim
        key_width = config.key_value_heads * self.head_dim
        self.q_proj = nn.Linear(D, D, bias=bias)
        self.k_proj = nn.Linear(D, key_width, bias=bias)
        self.v_proj = nn.Linear(D, key_width, bias=bias)
        self.o_proj = nn.Linear(D, D, bias=bias)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        past: Tensor | None = None,
        positions: Tensor | None = None,
        documents: Documents | None = None,
    ) -> Tensor:
        """As `LatentAttention.forward`; `past` (B, length, 2 * key width)."""
        cos, sin = (table.unsqueeze(-2) for table in rope)
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.head_dim))  # (B, T, heads, R)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = apply_rope(q, cos, sin, False), apply_rope(k, cos, sin, False)
        mask = None
        if past is not None:
            rows = torch.arange(len(x), device=x.device)[:, None]
            past[rows, positions] = torch.cat([k, v], -2).flatten(2)
            if x.shape[1] == 1:
                k, v = past.unflatten(-1, (-1, self.head_dim)).chunk(2, -2)
                mask = torch.arange(past.shape[1], device=x.device) <= positions[:, None, :, None]
        return self.o_proj(attend(q, k, v, mask, documents))


class LatentAttention(nn.Module):
    """Multi-head latent attention (DeepSeek-V2, section 2.1)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        c, bias = config, config.attention_bias
        self.heads, self.nope, self.rope, self.v = (
            c.num_attention_heads,
            c.qk_nope_head_dim,
            c.qk_rope_head_dim,
            c.v_head_dim,
        )
        self.latent, self.interleaved = c.kv_lora_rank, c.rope_interleave
        query_width = self.heads * (self.nope + self.rope)
        # The norms in here use eps 1e-6, whatever rms_norm_eps says; so does the original.
        if c.q_lora_rank:
            self.q_a_proj = nn.Linear(c.hidden_size, c.q_lora_rank, bias=bias)
            self.q_a_layernorm = RMSNorm(c.q_lora_rank)
            self.q_b_proj = nn.Linear(c.q_lora_rank, query_width, bias=False)
        else:
            self.q_proj = nn.Linear(c.hidden_size, query_width, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(c.hidden_size, self.latent + self.rope, bias=bias)
        self.kv_a_layernorm = RMSNorm(self.latent)
        self.kv_b_proj = nn.Linear(self.latent, self.heads * (self.nope + self.v), bias=False)
        self.o_proj = nn.Linear(self.heads * self.v, c.hidden_size, bias=bias)
        self.scale = (self.nope + self.rope) ** -0.5
        if c.yarn:
            self.scale *= yarn_mscale(c.yarn["factor"], c.yarn.get("mscale_all_dim", 0)) ** 2

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        past: Tensor | None = None,
        positions: Tensor | None = None,
        documents: Documents | None = None,
    ) -> Tensor:
        """x (B, T, D). `past` (B, length, C + R) is this layer's cache and is written at
        `positions` (B, T). A call with several tokens starts at an empty cache; later calls bring
        one token a row. `documents`: see `attend`."""
        B, T, _ = x.shape
        cos, sin = rope  # (T, R/2) or (B, T, R/2)
        q = (
            self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
            if hasattr(self, "q_a_proj")
            else self.q_proj(x)
        )
        q = q.view(B, T, self.heads, -1)
        q_nope, q_rope = q.split([self.nope, self.rope], -1)
        q_rope = apply_rope(q_rope, cos.unsqueeze(-2), sin.unsqueeze(-2), self.interleaved)
        latent, k_rope = self.kv_a_proj_with_mqa(x).split([self.latent, self.rope], -1)
        latent = self.kv_a_layernorm(latent)
        k_rope = apply_rope(k_rope, cos, sin, self.interleaved)  # one key for all heads

        if past is not None:
            past[torch.arange(B, device=x.device)[:, None], positions] = torch.cat(
                [latent, k_rope], -1
            )
            if T == 1:
                return self.o_proj(self.attend_latent(q_nope, q_rope, past, positions))
        k_nope, v = self.kv_b_proj(latent).view(B, T, self.heads, -1).split([self.nope, self.v], -1)
        k_rope = k_rope.unsqueeze(2).expand(-1, -1, self.heads, -1)
        q = torch.cat([q_nope, q_rope], -1)  # (B, T, H, nope + R)
        k = torch.cat([k_nope, k_rope], -1)
        return self.o_proj(attend(q, k, v, documents=documents, scale=self.scale))

    def attend_latent(
        self, q_nope: Tensor, q_rope: Tensor, past: Tensor, positions: Tensor
    ) -> Tensor:
        """Attention of one token a row in the space of the latent: the up-projections of keys and
        values are applied to the query and to the result instead of to every token seen
        (DeepSeek-V2, section 2.1.2). positions (B, 1) -> (B, 1, H * v)."""
        up = effective_weight(self.kv_b_proj).view(self.heads, -1, self.latent)
        w_k, w_v = up.split([self.nope, self.v], 1)
        q = torch.cat([torch.einsum("bhn,hnc->bhc", q_nope[:, 0], w_k), q_rope[:, 0]], -1)
        # One product for all heads of a row; broadcasting over heads would copy the cache for each.
        scores = torch.bmm(q, past.mT).float() * self.scale  # (B, H, length)
        unseen = torch.arange(past.shape[1], device=past.device) > positions[:, None]
        weights = scores.masked_fill(unseen, -torch.inf).softmax(-1).to(past.dtype)
        out = torch.bmm(weights, past[..., : self.latent])  # (B, H, C)
        return torch.einsum("bhc,hvc->bhv", out, w_v).flatten(1)[:, None]


class MLP(nn.Module):
    """SwiGLU: a dense layer's feed-forward part, the shared experts, or one routed expert."""

    def __init__(self, dim: int, width: int):
        super().__init__()
        self.gate_proj = nn.Linear(dim, width, bias=False)
        self.up_proj = nn.Linear(dim, width, bias=False)
        self.down_proj = nn.Linear(width, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


# Up to here a step waits for the weights of the experts, not for arithmetic.
FEW_TOKENS = 128


def compiling_for_few(x: Tensor) -> bool:
    """Whether torch.compile reads this for few tokens x (N, D), as in decoding: then comparisons
    and sums that melt into one kernel beat the library's kernels, of which each is waited for."""
    return torch.compiler.is_compiling() and len(x) <= FEW_TOKENS


def largest(scores: Tensor, count: int) -> Tensor:
    """scores (N, E) -> the indices of the largest (N, count), largest first."""
    if not compiling_for_few(scores):
        return scores.topk(count, -1).indices
    ids = torch.arange(scores.shape[1], device=scores.device)
    mine, other = scores[:, :, None], scores[:, None, :]
    ahead = ((other > mine) | ((other == mine) & (ids < ids[:, None]))).sum(-1)  # (N, E)
    place = torch.arange(count, device=scores.device)[:, None]
    indices = ((ahead[:, None] == place) * ids).sum(-1)
    return indices.clamp(max=len(ids) - 1)  # of NaN: any, but one that is there


class RouterProduct(torch.autograd.Function):
    """x (N, D) times weight (E, D) -> (N, E) float32, as of float32 factors: products of bfloat16
    numbers are exact, and a GPU sums them up in float32 without copies of the factors."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return torch.mm(x, weight.T, out_dtype=torch.float32)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        dx = dweight = None
        if ctx.needs_input_grad[0]:
            dx = (dy @ weight.float()).to(x.dtype)
        if ctx.needs_input_grad[1]:
            dweight = (dy.T @ x.float()).to(x.dtype)
        return dx, dweight


class Gate(nn.Module):
    """Which K experts a token uses, with what weight (DeepSeekMoE, eq. 10; DeepSeek-V2, eq. 22;
    DeepSeek-V3, eq. 13 to 16)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        E, D = config.n_routed_experts, config.hidden_size
        self.config = config
        self.weight = nn.Parameter(torch.zeros(E, D))
        # V3 moves it by a rule during pretraining; it has no gradient, so it is no parameter.
        bias = torch.zeros(E) if config.topk_method == "noaux_tc" else None
        self.register_buffer("e_score_correction_bias", bias)

    def _apply(self, fn, recurse=True):
        """The bias stays float32 whatever the model's dtype: it decides near ties."""
        bias = self.e_score_correction_bias
        super()._apply(fn, recurse)
        if bias is not None and self.e_score_correction_bias.dtype != bias.dtype:
            self.e_score_correction_bias = bias.to(self.e_score_correction_bias.device)
        return self

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (N, D) -> weights (N, K) float32, indices (N, K) int64, scores (N, E) float32."""
        c = self.config
        # In float32: near ties decide the routing.
        if compiling_for_few(x):
            logits = (x[:, None].float() * self.weight.float()).sum(-1)
        elif x.is_cuda and x.dtype == torch.bfloat16:
            logits = RouterProduct.apply(x, self.weight)
        else:
            logits = F.linear(x.float(), self.weight.float())
        scores = logits.sigmoid() if c.scoring_func == "sigmoid" else logits.softmax(-1)
        choice = scores
        if c.topk_method == "noaux_tc":  # the bias chooses, the score without it weighs
            choice = scores + self.e_score_correction_bias
        if c.topk_method != "greedy":  # a token's experts come from the best groups alone
            groups = choice.view(len(scores), c.n_group, -1)
            # V3 ranks a group by its two best experts, V2 by the best one.
            best = groups.topk(2 if c.topk_method == "noaux_tc" else 1, -1).values.sum(-1)
            kept = best.topk(c.topk_group, -1).indices  # (N, topk_group)
            dropped = torch.ones_like(best, dtype=torch.bool).scatter_(1, kept, False)
            choice = groups.masked_fill(dropped[..., None], -torch.inf).flatten(1)
        indices = largest(choice, c.num_experts_per_tok)
        weights = scores.gather(1, indices)
        if c.normalises_gates:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        if c.scales_gates:
            weights = weights * c.routed_scaling_factor
        return weights, indices, scores


def sort_by_expert(indices: Tensor, n_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """indices (N, K) -> order and its inverse (S,): slots sorted by expert, ties in order of the
    tokens; and where each expert's slots end in that order, int32 (E,). Slot s belongs to token
    s // K."""
    # A GPU sorts short keys in half the time.
    experts, order = indices.flatten().to(torch.int16).sort(stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    ids = torch.arange(n_experts, dtype=torch.int16, device=order.device)
    return order, inverse, torch.searchsorted(experts, ids, right=True).int()


def tokens_per_expert(ends: Tensor, slots: int) -> list[int]:
    """Of `ends` of `sort_by_expert`, on the host: a synchronisation. On the meta device, where
    there are no data, the slots are spread evenly."""
    if ends.is_meta:
        bounds = [slots * e // len(ends) for e in range(1, len(ends) + 1)]
    else:
        bounds = ends.tolist()
    return [end - begin for begin, end in zip([0, *bounds], bounds)]


def experts_loop(moe: "MoE", x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
    """The specification: y = sum_k weights[:, k] * FFN_indices[:, k](x) (DeepSeekMoE, eq. 9).

    x (N, D), weights and indices (N, K) -> (N, D). An expert without tokens runs on an empty slice,
    so that its gradient is zero and not missing."""
    N, K = indices.shape
    order, inverse, ends = sort_by_expert(indices, len(moe.experts))
    slots = x[order // K].split(tokens_per_expert(ends, N * K))  # the one synchronisation
    out = torch.cat([expert(slot) for expert, slot in zip(moe.experts, slots)])  # (S, D)
    return (out[inverse].view(N, K, x.shape[1]) * weights[..., None]).sum(1).to(x.dtype)


Stacks = tuple[Tensor, Tensor, Tensor]


class TrainedStack(torch.autograd.Function):
    """The first experts of a stack as one tensor; its gradient goes on, in pieces that are views,
    to the parameters that lie there."""

    @staticmethod
    def forward(ctx, stack, length, *parameters):
        ctx.shape, ctx.count = parameters[0].shape, len(parameters)
        return stack[:length]

    @staticmethod
    def backward(ctx, dstack):
        pieces = dstack.view(-1, *ctx.shape)
        if ctx.count < len(pieces):  # lets go of what only made the layers alike
            pieces = pieces[: ctx.count].clone()
        return None, None, *pieces.unbind()


def count_trained(moe: "MoE") -> int:
    """How many experts, from the front of the stacks, hold all that want a gradient (and, where
    requires_grad was set by hand, some that do not); none without grad mode."""
    if not torch.is_grad_enabled():
        return 0
    wanted = [any(p.requires_grad for p in expert) for expert in moe.stacked]
    return max((place for place, wants in enumerate(wanted, 1) if wants), default=0)


def trained_stacks(moe: "MoE", length: int = 0) -> Stacks | None:
    """For `experts_grouped`: the first experts of gate_up and of down, as tensors that want a
    gradient, and the place (1,) of the last of them that is trained; None if none is. A `length`
    beyond that place makes layers alike, so that one graph serves all."""
    count = count_trained(moe)
    if not count:
        return None
    length = max(length, count)
    gates, ups, downs = zip(*moe.stacked[:count])
    gate_up = TrainedStack.apply(moe.gate_up, length, *(p for two in zip(gates, ups) for p in two))
    down = TrainedStack.apply(moe.down, length, *downs)
    return gate_up, down, torch.full((1,), count - 1, device=down.device)


def experts_grouped(
    moe: "MoE", x: Tensor, weights: Tensor, indices: Tensor, trained: Stacks | None = None
) -> Tensor:
    """The same as `experts_loop`, as grouped products over the stacked experts. A frozen expert
    costs neither a saved input nor a weight gradient, if it stands behind the trained ones in the
    stacks: `mark_trainable` sees to that. `trained`, of `trained_stacks`, comes from outside of
    what is compiled, where the experts' own parameters would make each layer another graph."""
    indices = moe.places[indices]
    if x.is_cuda and len(x) <= FEW_TOKENS and not moe.has_lora and not torch.is_grad_enabled():
        # Uncompiled and in bfloat16, grouped products read no more than the chosen experts.
        all_used = indices.numel() >= len(moe.order)
        if all_used or torch.compiler.is_compiling() or x.dtype != torch.bfloat16:
            return experts_for_few(moe, x, weights, indices)
    order, inverse, ends = sort_by_expert(indices, len(moe.order))
    if moe.has_lora:
        return experts_with_lora(moe, x, weights, order, inverse, ends)
    if trained is None and not torch.compiler.is_compiling():
        trained = trained_stacks(moe)
    stacks = moe.gate_up, moe.down, *(trained or (None, None, None))
    return GroupedExperts.apply(x, weights, order, inverse, ends, moe.swiglus, *stacks)


def experts_for_few(moe: "MoE", x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
    """What `experts_grouped` returns, without gradients and without sorting the slots; `indices`
    are places in the stacks."""
    (N, K), E = indices.shape, len(moe.order)
    if N * K < E and compiling_for_few(x):
        # Compiled, the gathered weights are never written: they go from memory into the sums.
        h = (moe.gate_up[indices].float() * x[:, None, None].float()).sum(-1)  # (N, K, 2I)
        gate, up = h.chunk(2, -1)
        act = (F.silu(gate) * up)[:, :, None]  # (N, K, 1, I)
        act = act.as_strided(act.shape, act.stride())  # written once, not computed in each sum
        out = (moe.down[indices].float() * act).sum(-1)  # (N, K, D)
        return (out * weights[..., None]).sum(1).to(x.dtype)
    # Every expert for every token: each weight is read once, as most would be anyway.
    chosen = weights.new_zeros(N, E).scatter_(1, indices, weights).T[..., None]  # (E, N, 1)
    h = torch.bmm(x.expand(E, -1, -1), moe.gate_up.mT)  # (E, N, 2I)
    gate, up = h.float().chunk(2, -1)
    act = torch.where(chosen != 0, F.silu(gate) * up * chosen, 0)  # no inf * 0 where not chosen
    return torch.bmm(act.to(x.dtype), moe.down.mT).sum(0)


def no_synchronisation(x: Tensor) -> bool:
    """Whether numbers of slots stay on the device: on a GPU each one read is a synchronisation, and
    in what is compiled it would end the graph."""
    return on_gpu(x) or torch.compiler.is_compiling()


def grouped_mm(x: Tensor, stack: Tensor, ends: Tensor) -> Tensor:
    """x (S, A), sorted by expert and ending at `ends` (E,), times stack (E, A, Z) -> (S, Z)."""
    if no_synchronisation(x):
        return F.grouped_mm(x, stack, offs=ends)
    # On a CPU torch's own loop takes up to three times as long as this one.
    out = x.new_empty(len(x), stack.shape[-1])
    counts = tokens_per_expert(ends, len(x))
    for rows, weight, result in zip(x.split(counts), stack, out.split(counts)):
        torch.mm(rows, weight, out=result)
    return out


def sum_slots(out: Tensor, inverse: Tensor, K: int) -> Tensor:
    """out (S, D), sorted by expert -> the sum of each token's K slots (N, D). Without gradient."""
    if K == 1:
        return out[inverse]
    if no_synchronisation(out):
        return out[inverse].view(-1, K, out.shape[-1]).sum(1)
    # On a CPU in one pass, without the slots in another order.
    return F.embedding_bag(inverse.view(-1, K), out, mode="sum")


def swiglu(h: Tensor, weight: Tensor) -> Tensor:
    """Gate and up product h (S, 2I), routing weights (S, 1) -> the experts' activation times its
    weight (S, I), by way of float32."""
    gate, up = h.float().chunk(2, -1)
    return (F.silu(gate) * up * weight).to(h.dtype)


def swiglu_backward(h: Tensor, weight: Tensor, dact: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of h (S, 2I) and of the routing weights (S,), of that of `swiglu` (S, I)."""
    gate, up = h.float().chunk(2, -1)
    dact, sigmoid = dact.float(), gate.sigmoid()
    silu = gate * sigmoid
    dgate = dact * weight * up * (sigmoid + silu * (1 - sigmoid))
    dh = torch.cat([dgate, dact * weight * silu], -1).to(h.dtype)
    return dh, (dact * silu * up).sum(-1)


@cache
def compiled_swiglu() -> tuple[Callable, Callable]:
    """Both in one kernel or two each, for any number of slots."""
    return tuple(torch.compile(piece, dynamic=True) for piece in (swiglu, swiglu_backward))


class GroupedExperts(torch.autograd.Function):
    """Routed experts with a hand-written backward. Saved: the layer's input (not its K copies), the
    gate and up product, the order. The routing weight is multiplied in before the down projection:
    its gradient is then a row sum, and the down projection's output need not be kept.

    Weight gradients are one grouped product over the slots of the experts that stand first."""

    @staticmethod
    def forward(ctx, x, weights, order, inverse, ends, swiglus, gate_up, down, *trained):
        N, K = weights.shape
        h = grouped_mm(x.index_select(0, order // K), gate_up.mT, ends)  # (S, 2I)
        act = swiglus[0](h, weights.flatten()[order, None])  # (S, I)
        out = grouped_mm(act, down.mT, ends)  # (S, D)
        _, trained_down, last = trained
        ctx.save_for_backward(x, weights, order, inverse, ends, h, gate_up, down, last)
        ctx.length, ctx.swiglus = 0 if last is None else len(trained_down), swiglus
        return sum_slots(out, inverse, K)

    @staticmethod
    def backward(ctx, dy):
        x, weights, order, inverse, ends, h, gate_up, down, last = ctx.saved_tensors
        (N, K), token = weights.shape, order // weights.shape[1]
        weight = weights.flatten()[order, None]  # (S, 1)
        dy = dy.index_select(0, token)  # (S, D)
        dh, dweights = ctx.swiglus[1](h, weight, grouped_mm(dy, down, ends))
        dweights = dweights[inverse].view(N, K)
        dx = dgate_up = ddown = None
        if ctx.needs_input_grad[0]:
            dx = sum_slots(grouped_mm(dh, gate_up, ends), inverse, K)
        if ctx.length:
            rows = slice(None)
            if not no_synchronisation(x):
                rows = slice(sum(tokens_per_expert(ends, len(order))[: ctx.length]))
            # Behind the last that is trained: no slots, so zeros.
            ends = torch.minimum(ends[: ctx.length], ends[last])
            act = ctx.swiglus[0](h[rows], weight[rows])
            dgate_up = grouped_outer(dh[rows], x.index_select(0, token[rows]), ends)
            ddown = grouped_outer(dy[rows], act, ends)
        return dx, dweights, None, None, None, None, None, None, dgate_up, ddown, None


def experts_with_lora(
    moe: "MoE", x: Tensor, weights: Tensor, order: Tensor, inverse: Tensor, ends: Tensor
) -> Tensor:
    """What `experts_grouped` returns where experts carry LoRA: gradients of x, weights and every A
    and B, none of the stacks. Raises ValueError if an expert's own weights ask for one."""
    if count_trained(moe):
        raise ValueError('LoRA over experts that are trained, too, needs experts "loop"')
    N, K = weights.shape
    slots, experts = x[order // K], [moe.experts[e] for e in moe.order]  # (S, D)
    w_gate, w_up = moe.gate_up.chunk(2, 1)
    gate = grouped_lora(slots, w_gate, [e.gate_proj for e in experts], ends)  # (S, I)
    up = grouped_lora(slots, w_up, [e.up_proj for e in experts], ends)
    act = F.silu(gate.float()) * up.float() * weights.flatten()[order, None]
    out = grouped_lora(act.to(x.dtype), moe.down, [e.down_proj for e in experts], ends)
    return out[inverse].view(N, K, x.shape[1]).sum(1)


def grouped_lora(x: Tensor, stack: Tensor, linears: list[nn.Linear], ends: Tensor) -> Tensor:
    """x (S, A), sorted by expert and ending at `ends` (E,) -> (S, Z): W x + scaling * B A x, the W
    in stack (E, Z, A). A Linear without LoRA counts as one with zeros."""
    y = GroupedProduct.apply(x, stack.mT, ends)
    carriers = [linear for linear in linears if hasattr(linear, "lora_A")]
    if not carriers:
        return y
    rank, scaling = carriers[0].lora_A.out_features, carriers[0].lora_scaling
    zero_A, zero_B = x.new_zeros(rank, x.shape[1]), x.new_zeros(y.shape[1], rank)
    A = torch.stack([m.lora_A.weight if hasattr(m, "lora_A") else zero_A for m in linears])
    B = torch.stack([m.lora_B.weight if hasattr(m, "lora_B") else zero_B for m in linears])
    padding = -rank % 8  # grouped products on a GPU need strides of 16 bytes
    A, B = F.pad(A, (0, 0, 0, padding)), F.pad(B, (0, padding))
    low = GroupedProduct.apply(x, A.mT, ends)  # (S, rank and padding)
    return y + scaling * GroupedProduct.apply(low, B.mT, ends)


class GroupedProduct(torch.autograd.Function):
    """`grouped_mm` with a backward; x is kept only for a stack that wants its gradient."""

    @staticmethod
    def forward(ctx, x, stack, ends):
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, stack, ends)
        return grouped_mm(x, stack, ends)

    @staticmethod
    def backward(ctx, dy):
        x, stack, ends = ctx.saved_tensors
        dx = grouped_mm(dy, stack.mT, ends) if ctx.needs_input_grad[0] else None
        dstack = grouped_outer(x, dy, ends) if ctx.needs_input_grad[1] else None
        return dx, dstack, None


def grouped_outer(x: Tensor, dy: Tensor, ends: Tensor) -> Tensor:
    """x (S, A) and dy (S, Z), sorted by expert and ending at `ends` (E,) -> x_e^T dy_e (E, A, Z),
    the gradient of a stack: zero for an expert without rows."""
    if no_synchronisation(x):
        out = F.grouped_mm(x.T, dy, offs=ends)
        # Blackwell GPUs leave there what was in memory (pytorch issue 172439).
        empty = ends.diff(prepend=ends.new_zeros(1)) == 0
        return out.masked_fill(empty[:, None, None], 0)
    out = x.new_empty(len(ends), x.shape[1], dy.shape[1])
    counts = tokens_per_expert(ends, len(x))
    for rows, dys, result in zip(x.split(counts), dy.split(counts), out):
        torch.mm(rows.T, dys, out=result)
    return out


EXPERT_PATHS = {"loop": experts_loop, "grouped": experts_grouped}


# Of a MoE layer: weights (N, K) float32 and indices (N, K), as its gate gives them.
Routing = tuple[Tensor, Tensor]


class MoE(nn.Module):
    """Routed experts plus shared experts (DeepSeekMoE, eq. 9).

    Each expert keeps its own parameters under the checkpoint's names, so that it can be frozen or
    trained alone; their memory is two stacks, gate_up (E, 2I, D) and down (E, D, I), for the
    grouped path. copy.deepcopy would part them: load the model again instead.

    Expert e lies at places[e] of the stacks, so that trained experts can lie side by side, and
    order[i] is the expert at place i: at first, both count up. A process of train_ep.py holds the
    experts in `order` alone."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        D, I, E = config.hidden_size, config.moe_intermediate_size, config.n_routed_experts
        self.config = config
        self.gate = Gate(config)
        self.shared_experts = MLP(D, I * config.n_shared_experts)
        self.experts = nn.ModuleList(MLP(D, I) for _ in range(E))
        self.gate_up, self.down = torch.empty(E, 2 * I, D), torch.empty(E, D, I)
        self.run_experts = experts_grouped
        self.has_lora = False  # of any expert
        self.swiglus = swiglu, swiglu_backward
        self.order = list(range(E))
        self._view_stacks()

    def _view_stacks(self) -> None:
        """Lets the experts' parameters be views of the stacks."""
        for place, e in enumerate(self.order):
            expert, (gate, up) = self.experts[e], self.gate_up[place].chunk(2)
            views = ((expert.gate_proj, gate), (expert.up_proj, up))
            for linear, view in (*views, (expert.down_proj, self.down[place])):
                linear.weight = nn.Parameter(view, requires_grad=linear.weight.requires_grad)
        self._note_places()

    def _note_places(self) -> None:
        places = [0] * len(self.experts)
        for place, e in enumerate(self.order):
            places[e] = place
        self.places = torch.tensor(places, device=self.down.device)
        # By place: the weights of gate_proj, up_proj, down_proj. Asking modules takes far longer.
        self.stacked = [tuple(m.weight for m in self.experts[e].children()) for e in self.order]

    @property
    def is_whole(self) -> bool:
        """Whether all experts are held here."""
        return len(self.order) == len(self.experts)

    @property
    def takes_stacks(self) -> bool:
        """Whether `trained_stacks` is for it."""
        return self.run_experts is experts_grouped and not self.has_lora and self.is_whole

    def keep_experts(self, held: range) -> None:
        """Lets go of all experts but these, while there are no weights yet. Where another one was
        stands nn.Identity: it has no parameters, and an empty slice goes through it."""
        for e in set(range(len(self.experts))) - set(held):
            self.experts[e] = nn.Identity()
        self.order = list(held)
        stacks = (self.gate_up, self.down)
        self.gate_up, self.down = (s.new_empty(len(held), *s.shape[1:]) for s in stacks)
        self._view_stacks()

    @torch.no_grad()
    def put_first(self, experts: list[int]) -> None:
        """Moves experts to the front of the stacks, those of them that are held here; their
        parameters remain the same objects, with the same values."""
        experts = [e for e in experts if e in self.order]
        if set(self.order[: len(experts)]) == set(experts):
            return
        before = self.order.copy()
        for place, e in enumerate(experts):
            other = self.order.index(e)
            self.order[place], self.order[other] = e, self.order[place]
        moved = [i for i, e in enumerate(self.order) if before[i] != e]
        sources = [before.index(self.order[i]) for i in moved]
        for stack in (self.gate_up, self.down):
            stack[moved] = stack[sources]
        for i in moved:
            expert = self.experts[self.order[i]]
            expert.gate_proj.weight.data, expert.up_proj.weight.data = self.gate_up[i].chunk(2)
            expert.down_proj.weight.data = self.down[i]
        self._note_places()

    def _apply(self, fn, recurse=True):
        """A change of device or dtype moves the stacks; the experts' parameters become views
        again."""
        self.gate._apply(fn)
        self.shared_experts._apply(fn)
        self.gate_up, self.down = fn(self.gate_up), fn(self.down)
        self._view_stacks()
        for linear in (linear for expert in self.experts for linear in expert.children()):
            for lora in linear.children():
                lora._apply(fn)
        return self

    def forward(
        self, x: Tensor, balance: bool, trained: Stacks | None = None
    ) -> tuple[Tensor, Tensor | None, Routing]:
        """x (B, T, D) -> output (B, T, D), the balance loss (B,) where `balance` asks for it, and
        the routing. `trained` goes to `experts_grouped`."""
        flat = x.flatten(0, 1)
        weights, indices, scores = self.gate(flat)
        y = self.all_experts(flat, weights, indices, trained).view_as(x)
        loss = self.balance_loss(scores, indices, len(x)) if balance else None
        return y, loss, (weights.detach(), indices)

    def all_experts(
        self, x: Tensor, weights: Tensor, indices: Tensor, trained: Stacks | None = None
    ) -> Tensor:
        """The sum of routed and shared experts, x (N, D) -> (N, D). train_ep.py puts another
        function in its place, where other processes hold some of the experts."""
        given = () if trained is None else (trained,)
        return self.run_experts(self, x, weights, indices, *given) + self.shared_experts(x)

    def balance_loss(self, scores: Tensor, indices: Tensor, rows: int) -> Tensor:
        """sum_i f_i P_i of each row (B,), not yet times aux_loss_alpha (DeepSeekMoE, eq. 12 to 14):
        f_i the fraction of slots that chose expert i, times E; P_i its mean score, of sigmoids
        their part of the token's sum (DeepSeek-V3, eq. 17 to 20). Perfect balance gives 1. With
        seq_aux false the whole batch counts as one row."""
        E = scores.shape[-1]
        if self.config.scoring_func == "sigmoid":
            scores = scores / scores.sum(-1, keepdim=True)
        groups = rows if self.config.seq_aux else 1
        chosen = indices.view(groups, -1)  # (groups, slots)
        f = torch.zeros(groups, E, device=scores.device).scatter_add_(
            1, chosen, torch.ones_like(chosen, dtype=torch.float32)
        ) * (E / chosen.shape[1])
        return (f * scores.view(groups, -1, E).mean(1)).sum(-1).expand(rows)


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        attention = MultiHeadAttention if config.model_type == "deepseek" else LatentAttention
        self.self_attn = attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = (
            MoE(config)
            if config.is_moe(layer)
            else MLP(config.hidden_size, config.intermediate_size)
        )

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        past: Tensor | None = None,
        positions: Tensor | None = None,
        documents: Documents | None = None,
        balance: bool = False,
        trained: Stacks | None = None,
    ) -> tuple[Tensor, Tensor | None, Routing | None]:
        """x (B, T, D) -> x (B, T, D), and of a MoE layer what it returns beside."""
        x = x + self.self_attn(self.input_layernorm(x), rope, past, positions, documents)
        y = self.post_attention_layernorm(x)
        if isinstance(self.mlp, MoE):
            y, loss, routing = self.mlp(y, balance, trained)
            return x + y, loss, routing
        return x + self.mlp(y), None, None


@cache
def compiled_block(tuned: bool) -> Callable:
    """A block's forward, compiled for each shape. One graph for dense and one for MoE layers serve
    all; in training layers before the first trained expert, and the first with one, have their own.
    `tuned` tries sizes for each kernel: half a minute more."""
    # One for each shape that is decoded; from the default of 8 on they would run uncompiled.
    torch._dynamo.config.recompile_limit = 64
    options = {"coordinate_descent_tuning": True} if tuned else None
    return torch.compile(Block.forward, dynamic=False, options=options)


class Transformer(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model = nn.Module()
        # Not nn.Embedding(V, D): its random start on the meta device imports for seconds.
        table = torch.empty(config.vocab_size, config.hidden_size)
        self.model.embed_tokens = nn.Embedding.from_pretrained(table, freeze=False)
        self.model.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.model.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.fingerprint: str | None = None  # of the checkpoint that was loaded
        self.replaced: dict[str, Tensor] = {}  # the base's tensors while an adapter is over them

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        return self

    def hidden_states(
        self,
        tokens: Tensor,
        cache: Cache | None = None,
        balance: bool = False,
        checkpointing: bool = False,
        documents: Tensor | None = None,
        compiled: bool = False,
        watch: Callable[[int, Routing], None] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """tokens (B, T) -> normalised final states (B, T, D), and with `balance` the balance loss
        (B,) summed over layers. `checkpointing` keeps only the input of each block and runs it
        again in backward. With a cache, rows go on after the tokens they have seen. `documents`
        (B, T), on the CPU, ascending in a row: tokens see only those of their own document, and
        positions begin anew with each. `compiled` runs the blocks through torch.compile. `watch` is
        called with each MoE layer's number and routing."""
        run_block = Block.__call__
        if compiled:  # tuning gains a tenth where the weights of few experts are summed up
            few = tokens.numel() * self.config.num_experts_per_tok < self.config.n_routed_experts
            run_block = compiled_block(tuned=few)
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.model.embed_tokens(tokens)
        groups = None
        if cache is not None:
            positions = cache.seen[:, None] + positions  # (B, T)
        if documents is not None:
            positions = positions - torch.searchsorted(documents, documents).to(positions.device)
            indices, places = group_documents(documents)
            groups = [x.to(tokens.device) for x in indices], places.to(tokens.device)
        rope = rope_table(self.config, positions)
        length = self.most_trained() if compiled else 0
        losses = []
        for i, block in enumerate(self.model.layers):
            past = cache.layers[i] if cache is not None else None
            trained = None
            if length and isinstance(block.mlp, MoE) and block.mlp.takes_stacks:
                trained = trained_stacks(block.mlp, length)  # here: the GPU works meanwhile
            given = x, rope, past, positions, groups, balance, trained
            if checkpointing:
                x, loss, routing = checkpoint(run_block, block, *given, use_reentrant=False)
            else:
                x, loss, routing = run_block(block, *given)
            if loss is not None:
                losses.append(loss)
            if watch is not None and routing is not None:
                watch(i, routing)
        if cache is not None:
            cache.seen += tokens.shape[1]
        return self.model.norm(x), torch.stack(losses).sum(0) if losses else None

    def most_trained(self) -> int:
        """The largest of the layers' `count_trained`, where they take stacks."""
        moes = (block.mlp for block in self.model.layers if isinstance(block.mlp, MoE))
        return max((count_trained(moe) for moe in moes if moe.takes_stacks), default=0)

    def forward(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """tokens (B, T) int64 -> logits (B, T, V)."""
        return self.lm_head(self.hidden_states(tokens, cache)[0])


def cross_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """logits (M, V), targets (M,) -> losses (M,) float32, and each one's gradient with respect to
    its logits (M, V), in their dtype."""
    scores = logits.float()
    total = scores.logsumexp(-1, keepdim=True)
    losses = (total - scores.gather(1, targets[:, None]))[:, 0]
    slope = (scores - total).exp_()
    ids = torch.arange(slope.shape[1], device=slope.device)
    return losses, slope.add_(ids == targets[:, None], alpha=-1).to(logits.dtype)


@cache
def compiled_cross_entropy() -> Callable:
    """One kernel or two instead of a dozen, for any number of tokens."""
    return torch.compile(cross_entropy, dynamic=True)


class HeadLosses(torch.autograd.Function):
    """Cross-entropy of each of hidden (M, D) under a frozen head (V, D) -> (M,). A loss depends on
    its own state alone: the gradient, but for a factor, is formed in forward, while the logits of
    `chunk` tokens are there, and they need not be formed again."""

    @staticmethod
    def forward(ctx, hidden, head, targets, chunk, piece):
        losses, slopes = [], torch.empty_like(hidden)
        for states, aims, slope in zip(*(x.split(chunk) for x in (hidden, targets, slopes))):
            loss, dlogits = piece(F.linear(states, head), aims)
            losses.append(loss)
            torch.mm(dlogits, head, out=slope)
        ctx.save_for_backward(slopes)
        return torch.cat(losses)

    @staticmethod
    def backward(ctx, dlosses):
        (slopes,) = ctx.saved_tensors
        return (slopes * dlosses[:, None]).to(slopes.dtype), None, None, None, None


def token_losses(
    model: Transformer,
    tokens: Tensor,
    labels: Tensor,
    documents: Tensor | None = None,
    balance: bool = False,
    checkpointing: bool = False,
    chunk: int = 2048,
    compiled: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Cross-entropy of every label of tokens (B, T) that counts, float32, in the order of the rows;
    and the balance loss (B,) of `hidden_states`, to which `documents` and `compiled` go.

    labels (B, T), on the CPU as `documents`, stand at the position of their own token; negative
    ones do not count, nor does the first of a row. Logits exist for `chunk` tokens at a time; only
    where the head is trained they are formed again in backward."""
    targets = labels.roll(-1, dims=1)
    targets[:, -1] = -1
    targets = targets.flatten()
    where = (targets >= 0).nonzero()[:, 0]  # found on the CPU: no synchronisation
    hidden, balance_loss = model.hidden_states(
        tokens, balance=balance, checkpointing=checkpointing, documents=documents, compiled=compiled
    )
    hidden = hidden.flatten(0, 1)[where.to(hidden.device)]  # (M, D)
    targets, head = targets[where].to(hidden.device), model.lm_head
    if hidden.requires_grad and not head.weight.requires_grad:
        piece = compiled_cross_entropy() if compiled else cross_entropy
        return HeadLosses.apply(hidden, head.weight, targets, chunk, piece), balance_loss

    def losses(hidden, targets):
        return F.cross_entropy(head(hidden).float(), targets, reduction="none")

    pieces = [
        checkpoint(losses, *piece, use_reentrant=False)
        if torch.is_grad_enabled()
        else losses(*piece)
        for piece in zip(hidden.split(chunk), targets.split(chunk))
    ]
    return torch.cat(pieces), balance_loss


# ------------------------------------------------------------------------------------------
# Checkpoints


def read_json(path: str | Path):
    """The value in a JSON file. Raises FileNotFoundError, or ValueError that names the file."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from None


@contextmanager
def replacing(path: str | Path):
    """Yields a name beside `path` to write to; on success the file is flushed to disk and renamed,
    so that whoever reads `path` finds the old file or the new one, whole."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    try:
        yield part
        os.chmod(part, 0o644)  # safetensors makes its files readable to their owner alone
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
        sync_directory(path.parent)
    except SafetensorError as error:  # a full disk, say
        raise OSError(f"{path}: {error}") from None
    except OSError as error:
        if error.filename is None:  # of a write, the system does not say where
            error.filename = str(path)
        raise
    finally:
        part.unlink(missing_ok=True)


def sync_directory(path: Path) -> None:
    """Flushes to disk what was made or renamed in a directory."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_output_file(path: str | Path, inputs: list[str]) -> None:
    """Raises OSError or ValueError if `path` cannot become a file, or is one of `inputs`: better
    before the work than after it."""
    if Path(path).is_dir():
        raise IsADirectoryError(f"{path}: is a directory; a file name is required")
    if Path(path).resolve() in [Path(name).resolve() for name in inputs]:
        raise ValueError(f"{path}: is read by this command; another output is required")
    Path(path).parent.mkdir(parents=True, exist_ok=True)


@contextmanager
def locked(output: Path):
    """Makes the directory and holds it for this process: two runs that write to one directory would
    spoil each other's. Raises ValueError if another holds it, OSError if it cannot be written."""
    output.mkdir(parents=True, exist_ok=True)
    handle = os.open(output, os.O_RDONLY)
    try:
        try:  # a lock ends with its process, however that ends
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{output}: another process is writing there") from None
        probe = output / ".writable.part"  # better refused now than after loading
        probe.touch()
        probe.unlink()
        yield
    finally:
        os.close(handle)


def write_json(path: str | Path, value, indent: int | None = None) -> None:
    with replacing(path) as part:
        part.write_text(
            json.dumps(value, ensure_ascii=False, indent=indent) + "\n", encoding="utf-8"
        )


CHECKPOINT_FILES = ["*.json", "*.safetensors", "*.jinja", "LICENSE*"]


def local_directory(
    name: str | Path, kind: str = "checkpoint", files: list[str] = CHECKPOINT_FILES
) -> Path:
    """The directory `name`, or, for a hub name like deepseek-ai/ESFT-vanilla-lite, the directory of
    the Hugging Face cache that `files` were downloaded to: config, tokenizer and safetensors, no
    code. What is there already is not downloaded again.

    Raises FileNotFoundError that says what to do."""
    path = Path(name)
    if path.is_dir():
        return path
    if path.exists():
        raise NotADirectoryError(f"{name}: is a file; a {kind} directory is required")
    # org/name, unless there is a folder org here: then it is a path, mistyped.
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", str(name), re.ASCII) or path.parent.is_dir():
        raise FileNotFoundError(f"{name}: no such {kind} directory")
    try:
        return Path(snapshot_download(str(name), allow_patterns=files))
    except Exception as error:  # the library raises its own, its HTTP client's and the system's
        reason = " ".join(str(error).split())
        raise FileNotFoundError(
            f"{name}: no such {kind} directory, and it could not be had from the Hugging Face hub "
            f"({type(error).__name__}: {reason:.300}). Check the name; for a gated one, log in "
            f"with `hf auth login`; without a network, fetch it elsewhere with `hf download {name} "
            "--local-dir DIR` and give DIR"
        ) from None


DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F8_E4M3": torch.float8_e4m3fn,
}
READ_BYTES = 2**23  # what one thread reads and converts at a time


@dataclass
class StoredTensor:
    """Where a safetensors file holds a tensor, or a part of one. Data are read when asked for."""

    path: Path
    name: str
    dtype: str  # a key of DTYPES, or one that is not supported
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file
    scale: "StoredTensor | None" = None  # of FP8 weights: one factor a block
    block: tuple[int, int] = (0, 0)  # rows and columns of an FP8 block

    def check(self, shape, dtypes: tuple[str, ...] = ("BF16", "F16", "F32")) -> None:
        """Raises ValueError for another shape, or a dtype that is none of `dtypes`."""
        if self.shape != tuple(shape):
            raise ValueError(
                f"{self.path}: tensor {self.name} has shape {list(self.shape)}; "
                f"the config asks for {list(shape)}"
            )
        if self.dtype not in dtypes and self.scale is None:
            raise ValueError(
                f"{self.path}: tensor {self.name} is {self.dtype}; supported: {', '.join(dtypes)}"
            )

    def part(self, skipped: int, shape: tuple[int, ...]) -> "StoredTensor":
        """The tensor of that shape that begins `skipped` elements on."""
        size = DTYPES[self.dtype].itemsize
        return replace(self, shape=shape, offset=self.offset + skipped * size)

    def read(self, out: Tensor | None = None) -> Tensor:
        """The stored values, in the stored dtype, on the CPU; in `out`, a contiguous tensor of
        that shape and dtype, if it is given."""
        if out is None:
            out = torch.empty(self.shape, dtype=DTYPES[self.dtype])
        view = memoryview(out.view(-1).view(torch.uint8).numpy())
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.offset)
            while view:
                if not (count := file.readinto(view)):
                    raise ValueError(f"{self.path}: ends within tensor {self.name}")
                view = view[count:]
        return out

    def copy_to(self, target: Tensor, buffer: Tensor | None = None) -> None:
        """Fills `target`, on any device and in any dtype, by blocks of rows; FP8 weights times
        their scales, multiplied in float32. `buffer`: uint8 memory to read into."""
        if not self.shape or 0 in self.shape:  # one number, or none
            target.copy_(self.read())
            return
        rows, width = self.shape[0], math.prod(self.shape[1:])
        row_bytes = width * DTYPES[self.dtype].itemsize
        step = max(READ_BYTES // row_bytes, 1)
        scale = None
        if self.scale is not None:
            step = max(step // (4 * self.block[0]), 1) * self.block[0]  # float32 is 4 times FP8
            scale = self.scale.read()
            if not (scale.isfinite() & (scale >= 0)).all():
                raise ValueError(
                    f"{self.scale.path}: tensor {self.scale.name} holds a value that is not finite "
                    "or negative; scales must be neither"
                )
            scale = scale.to(target.device)
        in_place = target.dtype == DTYPES[self.dtype] and target.device.type == "cpu"
        for first in range(0, rows, step):
            shape = (min(step, rows - first), *self.shape[1:])
            stored = self.part(first * width, shape)
            goal = target[first : first + step]
            if in_place:
                stored.read(goal)
                continue
            size = shape[0] * row_bytes
            fits = buffer is not None and size <= len(buffer)
            memory = buffer[:size] if fits else torch.empty(size, dtype=torch.uint8)
            values = stored.read(memory.view(DTYPES[self.dtype]).view(shape)).to(target.device)
            if scale is not None:
                start = first // self.block[0]
                values = dequantise(values, scale[start:], self.block)
            goal.copy_(values)


def dequantise(values: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """values (rows, columns) in FP8 times scale, one factor a block of block[0] x block[1], the
    last ones ragged: float32 (rows, columns). Files call the factor `weight_scale_inv`, but it is
    what weights are multiplied by."""
    rows, columns = values.shape
    high, wide = min(block[0], rows), min(block[1], columns)  # of a block that is not cut
    factors = scale.repeat_interleave(high, 0)[:rows].repeat_interleave(wide, 1)
    return values.float().mul_(factors[:, :columns])


def fp8_block(quantization: dict) -> tuple[int, int]:
    """Rows and columns of a block. Raises ValueError for another quantisation than V3's."""
    expected = {"quant_method": "fp8", "fmt": "e4m3"}
    if not isinstance(quantization, dict):
        raise ValueError(f"quantization_config is {quantization!r}; must be an object or null")
    for name, value in expected.items():
        if quantization.get(name, "e4m3") != value:
            raise ValueError(
                f"quantization_config: {name} is {quantization.get(name)!r}; supported: {value!r}"
            )
    block = quantization.get("weight_block_size")
    if not (
        isinstance(block, list)
        and len(block) == 2
        and all(type(size) is int and 1 <= size < 2**19 for size in block)
    ):
        raise ValueError(
            f"quantization_config: weight_block_size is {block!r}; two integers are required"
        )
    return tuple(block)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """What a safetensors file holds. Raises ValueError that names the file."""
    with open_tensors(path):  # the library checks the header: sizes, gaps, the file's end
        pass
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    return {
        name: StoredTensor(
            path, name, entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0]
        )
        for name, entry in header.items()
        if name != "__metadata__"
    }


@contextmanager
def open_tensors(path: Path):
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path}: {error}") from None
    except OSError as error:  # a directory, say, of which the library does not give the name
        raise OSError(f"{path}: {error}") from None


def stored_tensors(directory: Path, config: ModelConfig) -> dict[str, StoredTensor]:
    """All tensors of a checkpoint in one file or with an index, under the files' names; FP8 weights
    with their scales, wherever these lie. Reads headers only.

    Raises FileNotFoundError or ValueError that names file and tensor."""
    index = directory / "model.safetensors.index.json"
    if index.exists():
        content = read_json(index)
        weight_map = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{index}: field weight_map must map tensor names to files")
        for name, file in weight_map.items():
            if not (isinstance(file, str) and re.fullmatch(r"[\w.-]{1,200}\.safetensors", file)):
                raise ValueError(
                    f"{index}: {name} is in {file!r}; must be a .safetensors file in the same "
                    "directory"
                )
        headers = {}
        for name, file in weight_map.items():
            if file not in headers:
                if not (directory / file).is_file():
                    raise FileNotFoundError(f"{directory / file}: missing shard (it holds {name})")
                headers[file] = read_header(directory / file)
            if name not in headers[file]:
                raise ValueError(f"{directory / file}: tensor {name} is missing")
        tensors = {name: headers[file][name] for name, file in weight_map.items()}
    elif (directory / "model.safetensors").is_file():
        tensors = read_header(directory / "model.safetensors")
    else:
        raise FileNotFoundError(
            f"{directory}: no model.safetensors and no model.safetensors.index.json"
        )
    for name, stored in tensors.items():
        if stored.dtype == "F8_E4M3":
            add_scale(stored, tensors, config)
    scales = {stored.scale.name for stored in tensors.values() if stored.scale is not None}
    return {name: stored for name, stored in tensors.items() if name not in scales}


def add_scale(stored: StoredTensor, tensors: dict[str, StoredTensor], config: ModelConfig) -> None:
    name = f"{stored.name}_scale_inv"
    if config.quantization_config is None or name not in tensors or len(stored.shape) != 2:
        raise ValueError(
            f"{stored.path}: tensor {stored.name} is F8_E4M3; required: a matrix, a tensor {name}, "
            "and quantization_config in config.json"
        )
    stored.block = fp8_block(config.quantization_config)
    tensors[name].check(
        [-(-size // block) for size, block in zip(stored.shape, stored.block)], ("F32",)
    )
    stored.scale = tensors[name]


FUSED = re.compile(r"(model\.layers\.(\d+)\.mlp\.experts\.)(gate_up_proj|down_proj)")


def split_experts(stored: StoredTensor, config: ModelConfig) -> dict[str, StoredTensor]:
    """Name -> part, for each expert of a tensor that holds a layer's: gate_up_proj (E, 2I, D) or
    down_proj (E, D, I)."""
    prefix, _, kind = FUSED.fullmatch(stored.name).groups()
    E, I, D = config.n_routed_experts, config.moe_intermediate_size, config.hidden_size
    stored.check((E, 2 * I, D) if kind == "gate_up_proj" else (E, D, I))
    if kind == "down_proj":
        return {f"{prefix}{e}.down_proj.weight": stored.part(e * D * I, (D, I)) for e in range(E)}
    return {
        f"{prefix}{e}.{half}_proj.weight": stored.part((2 * e + i) * I * D, (I, D))
        for e in range(E)
        for i, half in enumerate(("gate", "up"))
    }


def read_checkpoint(directory: Path) -> tuple["Transformer", dict[str, StoredTensor]]:
    """The model of a checkpoint's config, on the meta device, and the checkpoint's tensors under
    the model's names, compared with each other: every tensor that the model needs is there, in its
    shape, and no other. Reads headers only.

    Passed over are layers for multi-token prediction and tables of rotary frequencies. Raises
    FileNotFoundError, or ValueError that names file and tensor."""
    config = ModelConfig.from_json(directory / "config.json")
    found: dict[str, StoredTensor] = {}
    layers = range(config.num_hidden_layers)
    extra = range(layers.stop, layers.stop + config.num_nextn_predict_layers)
    for name, stored in stored_tensors(directory, config).items():
        layer = re.match(r"model\.layers\.(\d{1,9})\.", name)
        if (layer and int(layer[1]) in extra) or name.endswith(".rotary_emb.inv_freq"):
            continue
        fused = layer and FUSED.fullmatch(name) and config.is_moe(int(layer[1]))
        found |= split_experts(stored, config) if fused else {name: stored}

    # These two first: building a model of absurd size, even without weights, takes its time.
    for layer in layers:
        if f"model.layers.{layer}.input_layernorm.weight" not in found:
            raise ValueError(
                f"{directory}: tensors of layer {layer} are missing; num_hidden_layers is "
                f"{config.num_hidden_layers}"
            )
    for layer in config.moe_layers:
        name = f"model.layers.{layer}.mlp.gate.weight"
        if name not in found:
            raise ValueError(f"{directory}: tensor {name} is missing")
        found[name].check((config.n_routed_experts, config.hidden_size))
    model = build_model(config, "meta")
    expected = {name: t.shape for name, t in model.state_dict().items()}
    if config.tie_word_embeddings:
        del expected["lm_head.weight"]
        check_tied(found.pop("lm_head.weight", None), found.get("model.embed_tokens.weight"))
    for problem, names in (
        ("are missing", expected.keys() - found.keys()),
        ("do not belong to this config", found.keys() - expected.keys()),
    ):
        if names:
            raise ValueError(
                f"{directory}: {len(names)} tensors {problem}: {', '.join(sorted(names)[:5])}"
            )
    for name, shape in expected.items():
        found[name].check(shape)
    return model, found


def check_tied(head: StoredTensor | None, embedding: StoredTensor | None) -> None:
    """Raises ValueError where a checkpoint with tied embeddings stores a head that differs."""
    if head is None or embedding is None:  # a missing embedding is reported with the rest
        return
    if head.shape != embedding.shape or not torch.equal(head.read(), embedding.read()):
        raise ValueError(
            f"{head.path}: tensor lm_head.weight differs from model.embed_tokens.weight, but "
            "tie_word_embeddings is true in config.json"
        )


def fingerprint(tensors: dict[str, StoredTensor]) -> str:
    """Says which weights a checkpoint holds, however it stores them (one file or many, experts one
    by one or fused, float32, bfloat16 or FP8): the hash of the first 64 values of the first row of
    each tensor, rounded to bfloat16. `tensors` as of `read_checkpoint`."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        stored = tensors[name]
        count = min(64, stored.shape[-1])
        values = stored.part(0, (count,)).read().float()
        if stored.scale is not None:
            width = stored.block[1]
            factors = stored.scale.part(0, (-(-count // width),)).read()
            values = values * factors.repeat_interleave(width)[:count]
        digest.update(f"{name} {list(stored.shape)} ".encode())
        digest.update(values.bfloat16().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


def build_model(
    config: ModelConfig,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    experts: str = "auto",
) -> Transformer:
    """A Transformer with uninitialised weights on `device`, everything frozen."""
    with torch.device("meta"):
        model = Transformer(config).to(dtype).requires_grad_(False)
    if device != "meta":
        model.to_empty(device=device)
    choose_experts_path(model, experts)
    return model


def choose_experts_path(model: Transformer, experts: str) -> None:
    """`experts`: "loop" or "grouped"; "auto" is grouped. Raises ValueError for another."""
    if experts not in ("auto", *EXPERT_PATHS):
        raise ValueError(f"experts is {experts!r}; must be auto, loop or grouped")
    for module in model.modules():
        if isinstance(module, MoE):
            module.run_experts = EXPERT_PATHS["grouped" if experts == "auto" else experts]


def check_device(device: str) -> None:
    """Raises ValueError for a device that is none, or is not here."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device is {device!r}; not available here: {reason}") from None


def choose_dtype(name: str, device: str) -> torch.dtype:
    """The dtype of that name; where it is empty, bfloat16 on a GPU and float32 on a CPU, which sets
    up a bfloat16 product anew for every number of rows and takes ten times as long."""
    return getattr(torch, name or ("float32" if device == "cpu" else "bfloat16"))


def load_model(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    adapter: str | Path | None = None,
    experts: str = "auto",
    split: Callable[["Transformer"], None] | None = None,
) -> Transformer:
    """The checkpoint in directory `path` or of that hub name, with `adapter` over it. Everything is
    frozen. `split` may take parts out of the model, on the meta device, which are then not read.

    Names and shapes are compared with the config before memory is taken; then each tensor is read
    once, straight to its place. Raises OSError and ValueError that name file, tensor and shape."""
    check_device(device)
    path = local_directory(path)
    model, stored = read_checkpoint(path)
    model.fingerprint = fingerprint(stored)
    if split is not None:
        split(model)
    if adapter is not None:
        adapter = local_directory(adapter, "adapter")
        read_adapter(adapter, model)  # a wrong one is refused before the base is read
    model.to(dtype).to_empty(device=device)
    choose_experts_path(model, experts)
    targets = model.state_dict()
    if model.config.tie_word_embeddings:
        targets.pop("lm_head.weight")
    local = threading.local()

    def load(name: str) -> int:
        if not hasattr(local, "buffer"):  # pinned: the GPU's copy engine reads it directly
            pinned = targets[name].is_cuda
            local.buffer = torch.empty(READ_BYTES, dtype=torch.uint8, pin_memory=pinned)
        stored[name].copy_to(targets[name], local.buffer)
        return targets[name].nbytes

    total = sum(tensor.nbytes for tensor in targets.values())
    with (
        ThreadPoolExecutor(min(8, os.cpu_count())) as pool,
        tqdm(total=total, desc="load", unit="B", unit_scale=True, leave=False, disable=None) as bar,
    ):
        for count in pool.map(load, targets):
            bar.update(count)
    if adapter is not None:
        load_adapter(model, adapter)
    return model


# ------------------------------------------------------------------------------------------
# Which parameters are trained, and adapters


def read_expert_cfg(path: str | Path, config: ModelConfig) -> dict:
    """An expert_cfg.json, checked against the model's config. Raises ValueError that names the
    file."""
    expert_cfg = read_json(path)
    try:
        check_expert_cfg(expert_cfg, config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return expert_cfg


def check_expert_cfg(expert_cfg: dict, config: ModelConfig) -> None:
    """Raises ValueError unless every layer is a MoE layer of the model and every expert one of its
    own."""
    if not isinstance(expert_cfg, dict) or not isinstance(expert_cfg.get("experts"), dict):
        raise ValueError(
            'must be {"experts": {"LAYER": [EXPERT, ...]}, "shared_experts": BOOL, '
            '"non_expert_modules": BOOL}'
        )
    for name in ("shared_experts", "non_expert_modules"):
        if type(expert_cfg.get(name, False)) is not bool:
            raise ValueError(f"{name} is {expert_cfg[name]!r}; must be true or false")
    layers = {str(layer) for layer in config.moe_layers}
    for layer, experts in expert_cfg["experts"].items():
        if layer not in layers:
            raise ValueError(
                f"experts: layer {layer!r} is not a MoE layer of this model; these are "
                f"{', '.join(map(str, config.moe_layers)) or 'none'}"
            )
        if not isinstance(experts, list):
            raise ValueError(f"experts: layer {layer} is {experts!r}; must be a list of expert ids")
        for expert in experts:
            if type(expert) is not int or not 0 <= expert < config.n_routed_experts:
                raise ValueError(
                    f"experts: layer {layer} names expert {expert!r}; "
                    f"must be 0 to {config.n_routed_experts - 1}"
                )
        if len(set(experts)) != len(experts):
            raise ValueError(f"experts: layer {layer} names an expert twice: {experts}")


def everything(config: ModelConfig) -> dict:
    """The expert_cfg of full fine-tuning."""
    experts = {str(layer): list(range(config.n_routed_experts)) for layer in config.moe_layers}
    return {"experts": experts, "shared_experts": True, "non_expert_modules": True}


def trained_parameters(model: Transformer, expert_cfg: dict) -> dict[str, nn.Parameter]:
    """Name -> parameter of all that `expert_cfg` selects, in the model's order."""
    check_expert_cfg(expert_cfg, model.config)
    selected = {
        f"model.layers.{layer}.mlp.experts.{expert}."
        for layer, experts in expert_cfg["experts"].items()
        for expert in experts
    }

    def is_trained(name: str) -> bool:
        if ".lora_" in name:  # no part of the checkpoint
            return False
        if ".mlp.experts." in name:
            return name[: name.index(".", name.index(".mlp.experts.") + 13) + 1] in selected
        if ".mlp.shared_experts." in name:
            return expert_cfg.get("shared_experts", False)
        return expert_cfg.get("non_expert_modules", False)

    return {name: p for name, p in model.named_parameters() if is_trained(name)}


def mark_trainable(model: Transformer, expert_cfg: dict) -> None:
    """Sets requires_grad of every parameter: true for what `expert_cfg` selects, false for the
    rest, LoRA included. The selected experts move to the front of their layer's stacks: what shares
    memory with their parameters has to be made afterwards."""
    trained = trained_parameters(model, expert_cfg)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    for layer, experts in expert_cfg["experts"].items():
        model.model.layers[int(layer)].mlp.put_first(experts)


def save_adapter(
    model: Transformer,
    expert_cfg: dict,
    directory: str | Path,
    trained: dict[str, Tensor] | None = None,
) -> None:
    """Writes the selected tensors in the published ESFT format, adapter.safetensors and
    expert_cfg.json; the latter also names the base, which other readers pass over. `trained`: these
    tensors, where the model here does not hold them all."""
    trained = trained_parameters(model, expert_cfg) if trained is None else trained
    tensors = {name: p.detach().cpu().clone() for name, p in trained.items()}
    with replacing(Path(directory) / "adapter.safetensors") as part:
        save_file(tensors, part, metadata={"format": "pt"})
    # The original code asks for every MoE layer, also for one in which nothing is selected.
    experts = {str(i): expert_cfg["experts"].get(str(i), []) for i in model.config.moe_layers}
    named = {**expert_cfg, "experts": experts, "base_fingerprint": model.fingerprint}
    write_json(Path(directory) / "expert_cfg.json", named)


@dataclass
class StoredAdapter:
    """An adapter's tensors under the model's names: of ESFT in place of the base's, of LoRA the A
    and B of some Linears."""

    tensors: dict[str, StoredTensor]
    rank: int = 0  # this and the next of LoRA; 0 says ESFT
    scaling: float = 0.0


def read_adapter(directory: Path, model: Transformer) -> StoredAdapter:
    """Where an adapter's tensors are, compared with its expert_cfg.json, or of PEFT's LoRA its
    adapter_config.json, and with the model: exactly what is selected, in its shapes, trained on
    this base (which released adapters do not say). Reads headers only.

    Of ESFT it takes every *.safetensors file of the directory, as the original code does; version-1
    adapters lack the prefix "model.". Raises FileNotFoundError, or ValueError that names file and
    tensor or field."""
    if (directory / "adapter_config.json").exists():
        if (directory / "expert_cfg.json").exists():
            raise ValueError(
                f"{directory}: holds both expert_cfg.json and adapter_config.json; one is required"
            )
        return read_lora(directory, model)
    expert_cfg = read_expert_cfg(directory / "expert_cfg.json", model.config)
    check_base(expert_cfg.get("base_fingerprint"), directory / "expert_cfg.json", model)
    expected = {name: p.shape for name, p in trained_parameters(model, expert_cfg).items()}
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{directory}: an adapter needs a .safetensors file")
    found: dict[str, StoredTensor] = {}
    elsewhere = held_elsewhere(model)
    for path in files:
        for stored in read_header(path).values():
            name = "model." + stored.name if stored.name.startswith("layers.") else stored.name
            if name.startswith(elsewhere):
                continue
            if name not in expected:
                raise ValueError(
                    f"{path}: tensor {stored.name} is not selected by {directory}/expert_cfg.json"
                )
            if name in found:
                raise ValueError(
                    f"{path}: tensor {stored.name} is in another file of {directory}, too"
                )
            stored.check(expected[name])
            found[name] = stored
    if missing := sorted(expected.keys() - found.keys()):
        raise ValueError(
            f"{directory}: {len(missing)} selected tensors are missing: {', '.join(missing[:5])}"
        )
    return StoredAdapter(found)


def held_elsewhere(model: Transformer) -> tuple[str, ...]:
    """How the names of tensors begin whose experts this model does not hold (train_ep.py), so that
    they are another process's to check and to read."""
    return tuple(
        f"{name}.experts.{e}."
        for name, moe in model.named_modules()
        if isinstance(moe, MoE) and not moe.is_whole
        for e in set(range(len(moe.experts))) - set(moe.order)
    )


def check_base(named: str | None, path: Path, model: Transformer) -> None:
    """Raises ValueError if the adapter file `path` names another base than the model's."""
    if named is not None and model.fingerprint is not None and named != model.fingerprint:
        raise ValueError(
            f"{path}: base_fingerprint is {named!r}; the adapter belongs to "
            f"another base checkpoint than this one, whose fingerprint is {model.fingerprint!r}"
        )


def load_adapter(model: Transformer, directory: str | Path) -> None:
    """Puts the adapter in a directory or of a hub name, ESFT's or PEFT's LoRA, over the base, in
    place of the one that is over it, if any; LoRA comes frozen, like the rest. Nothing changes
    unless the whole adapter is right; should reading it fail all the same, the base stands there,
    whole."""
    stored = read_adapter(local_directory(directory, "adapter"), model)
    remove_adapter(model)
    try:
        if stored.rank:
            modules = {name.rpartition(".lora_")[0] for name in stored.tensors}
            attach_lora(model, modules, stored.rank, stored.scaling)
        parameters = dict(model.named_parameters())
        if not stored.rank:
            model.replaced = {
                name: parameters[name].detach().to("cpu", copy=True) for name in stored.tensors
            }
        with torch.no_grad():
            for name, tensor in stored.tensors.items():
                tensor.copy_to(parameters[name])
    except BaseException:
        remove_adapter(model)
        raise


def remove_adapter(model: Transformer) -> None:
    """Puts the base's own tensors back, bit for bit, and takes LoRA off."""
    put_tensors(model, model.replaced)
    model.replaced = {}
    remove_lora(model)


def put_tensors(model: Transformer, tensors: dict[str, Tensor]) -> None:
    """Copies tensors into the parameters of the same names, in the parameters' dtype."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in tensors.items():
            parameters[name].copy_(tensor)


# ------------------------------------------------------------------------------------------
# LoRA (arXiv 2106.09685), the method that ESFT is compared with; files as PEFT writes and reads
# them


def linears(model: Transformer) -> dict[str, nn.Linear]:
    """Name -> Linear of all that LoRA may adapt: attention, dense layers, shared and routed
    experts; neither the head nor the router."""
    modules = model.model.named_modules(prefix="model")
    return {n: m for n, m in modules if isinstance(m, nn.Linear) and ".lora_" not in n}


def add_lora_product(linear: nn.Linear, inputs: tuple[Tensor], output: Tensor) -> Tensor:
    """The forward hook of a Linear with LoRA: W x (and bias) -> W x + scaling * B A x."""
    return output + linear.lora_scaling * linear.lora_B(linear.lora_A(*inputs))


def attach_lora(model: Transformer, modules: set[str], rank: int, scaling: float) -> None:
    """Gives the Linears of these names an uninitialised, frozen A (rank, in) and B (out, rank)."""
    for name, linear in linears(model).items():
        if name not in modules:
            continue
        for half, width, height in (
            ("lora_A", linear.in_features, rank),
            ("lora_B", rank, linear.out_features),
        ):
            # On the meta device: its own start would draw from torch's global generator.
            product = nn.Linear(width, height, bias=False, device="meta")
            values = linear.weight.new_empty(height, width)
            product.weight = nn.Parameter(values, requires_grad=False)
            linear.add_module(half, product)
        linear.lora_scaling = scaling
        linear.lora_hook = linear.register_forward_hook(add_lora_product)
    for module in model.modules():
        if isinstance(module, MoE):
            module.has_lora = any(hasattr(m, "lora_A") for m in module.experts.modules())


def add_lora(model: Transformer, rank: int, scaling: float, seed: int = 0) -> None:
    """y = W x + scaling * B A x in every Linear but the head, routed and shared experts included
    (the paper: rank 8, scaling 2). B starts at zero, A uniform within 1 / sqrt(in), as in PEFT,
    drawn by seed and name: the same on every device, and whatever else the model holds. A and B are
    trained, in W's dtype; everything else is frozen.

    Raises ValueError for a rank below 1, a scaling that is not finite, or where there is LoRA."""
    if type(rank) is not int or rank < 1:
        raise ValueError(f"rank is {rank!r}; must be an integer from 1")
    if not math.isfinite(scaling):
        raise ValueError(f"scaling is {scaling!r}; must be a finite number")
    if lora_parameters(model):
        raise ValueError("the model carries LoRA already; remove_lora takes it off")
    model.requires_grad_(False)
    attach_lora(model, set(linears(model)), rank, scaling)
    for name, parameter in lora_parameters(model).items():
        parameter.requires_grad_(True)
        if parameter.is_meta:
            continue
        start = torch.zeros(parameter.shape)
        if name.endswith("lora_A.weight"):
            own = hashlib.sha256(f"{seed} {name}".encode()).digest()[:8]
            generator = torch.Generator().manual_seed(int.from_bytes(own, "little"))
            nn.init.kaiming_uniform_(start, a=math.sqrt(5), generator=generator)
        with torch.no_grad():
            parameter.copy_(start)


def remove_lora(model: Transformer) -> None:
    """Takes all LoRA off; the base's own tensors were never touched."""
    for module in model.modules():
        if isinstance(module, MoE):
            module.has_lora = False
    for linear in linears(model).values():
        if hasattr(linear, "lora_A"):
            linear.lora_hook.remove()
            del linear.lora_A, linear.lora_B, linear.lora_scaling, linear.lora_hook


def lora_parameters(model: Transformer) -> dict[str, nn.Parameter]:
    """Name -> parameter of every A and B, in the model's order:
    "model.layers.0.self_attn.q_proj.lora_A.weight", ..."""
    return {name: p for name, p in model.named_parameters() if ".lora_" in name}


PEFT_PREFIX = "base_model.model."


def save_lora(
    model: Transformer, directory: str | Path, trained: dict[str, Tensor] | None = None
) -> None:
    """Writes the model's LoRA as PEFT does, adapter_model.safetensors and adapter_config.json.
    `trained`: all A and B, where the model here does not hold them all.

    The base's fingerprint is in the metadata of the tensors: PEFT warns of keys of
    adapter_config.json that it does not know. Raises ValueError where there is no LoRA."""
    carriers = {name: m for name, m in linears(model).items() if hasattr(m, "lora_A")}
    if not carriers:
        raise ValueError("the model carries no LoRA; there is nothing to save")
    trained = lora_parameters(model) if trained is None else trained
    tensors = {PEFT_PREFIX + name: p.detach().cpu().clone() for name, p in trained.items()}
    # One key alone: safetensors writes several in random order.
    metadata = {"base_fingerprint": model.fingerprint} if model.fingerprint else {"format": "pt"}
    with replacing(Path(directory) / "adapter_model.safetensors") as part:
        save_file(tensors, part, metadata=metadata)
    linear = next(iter(carriers.values()))
    rank, alpha = linear.lora_A.out_features, linear.lora_scaling * linear.lora_A.out_features
    targets = sorted({name.rpartition(".")[2] for name in carriers})
    if targeted(linears(model), targets) != set(carriers):  # the last part of a name says too much
        targets = sorted(carriers)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": targets,
        "inference_mode": True,
    }
    write_json(Path(directory) / "adapter_config.json", config, indent=2)


def targeted(names: Iterable[str], targets: list[str]) -> set[str]:
    """The names that PEFT's target_modules select: whole, or by their last parts."""
    wanted = set(targets)
    endings = {name: name.split(".") for name in names}
    return {
        name
        for name, parts in endings.items()
        if any(".".join(parts[i:]) in wanted for i in range(len(parts)))
    }


# Fields of adapter_config.json that say how W x + scaling * B A x is trained, or nothing at all;
# of every other field, only a value that switches nothing on is supported.
LORA_FIELDS = {"peft_type", "task_type", "base_model_name_or_path", "revision", "auto_mapping"}
LORA_FIELDS |= {"peft_version", "inference_mode", "r", "lora_alpha", "lora_dropout", "bias"}
LORA_FIELDS |= {"target_modules", "use_rslora", "init_lora_weights", "layers_to_transform"}
LORA_FIELDS |= {"megatron_core", "qalora_group_size"}  # read only where others switch them on


def check_lora_config(config: dict) -> None:
    """Raises ValueError that names the first field of a PEFT config that is not plain LoRA."""
    if not isinstance(config, dict):
        raise ValueError(f"must hold a JSON object, found {type(config).__name__}")
    if config.get("peft_type") != "LORA":
        raise ValueError(f"peft_type is {config.get('peft_type')!r}; supported: 'LORA'")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if type(rank) is not int or not 1 <= rank < 2**19:
        raise ValueError(f"r is {rank!r}; must be an integer from 1 to 2^19 - 1")
    if type(alpha) not in (int, float) or not abs(alpha) < 1e30:
        raise ValueError(f"lora_alpha is {alpha!r}; must be a finite number")
    targets, layers = config.get("target_modules"), config.get("layers_to_transform")
    if targets != "all-linear" and not is_list_of(str, targets):
        raise ValueError(
            f"target_modules is {targets!r}; must be a list of module names or 'all-linear'"
        )
    if layers is not None and type(layers) is not int and not is_list_of(int, layers):
        raise ValueError(f"layers_to_transform is {layers!r}; must be a list of layers")
    supported = {
        "bias": ["none"],
        "use_rslora": [False, True],
        # Others begin with another base, of which the adapter is the rest.
        "init_lora_weights": [True, False, "gaussian", "orthogonal", "eva"],
    }
    for name, values in supported.items():
        value = config.get(name, values[0])
        if value not in values:
            shown = ", ".join(map(repr, values))
            raise ValueError(f"{name} is {value!r}; supported: {shown}")
    for name, value in config.items():
        if name not in LORA_FIELDS and value not in (None, False, [], {}):
            raise ValueError(f"{name} is {value!r}; not supported")


def is_list_of(kind: type, value) -> bool:
    return isinstance(value, list) and all(type(item) is kind for item in value)


def read_lora(directory: Path, model: Transformer) -> StoredAdapter:
    """`read_adapter` for a directory that PEFT or `save_lora` wrote: A and B of every Linear that
    target_modules selects, and of no other."""
    path = directory / "adapter_config.json"
    config = read_json(path)
    try:
        check_lora_config(config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    modules, rank = linears(model), config["r"]
    targets, layers = config["target_modules"], config.get("layers_to_transform")
    selected = set(modules) if targets == "all-linear" else targeted(modules, targets)
    if layers is not None:
        layers = [layers] if type(layers) is int else layers
        selected = {name for name in selected if int(name.split(".")[2]) in layers}
    if not selected:
        raise ValueError(f"{path}: target_modules is {targets!r}; selects nothing of this model")
    expected = {}
    for name, linear in modules.items():
        if name in selected:
            expected[f"{name}.lora_A.weight"] = (rank, linear.in_features)
            expected[f"{name}.lora_B.weight"] = (linear.out_features, rank)

    path = directory / "adapter_model.safetensors"
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; other formats of PEFT are not supported")
    with open_tensors(path) as file:
        metadata = file.metadata() or {}
    check_base(metadata.get("base_fingerprint"), path, model)
    found: dict[str, StoredTensor] = {}
    elsewhere = held_elsewhere(model)
    for stored in read_header(path).values():
        name = stored.name.removeprefix(PEFT_PREFIX)
        if name.startswith(elsewhere):
            continue
        if name not in expected or name == stored.name:
            raise ValueError(
                f"{path}: tensor {stored.name} is not LoRA of a Linear of this model that "
                "target_modules selects in adapter_config.json"
            )
        stored.check(expected[name])
        found[name] = stored
    if missing := [PEFT_PREFIX + name for name in expected if name not in found]:
        raise ValueError(
            f"{path}: {len(missing)} selected tensors are missing: {', '.join(missing[:5])}"
        )
    scaling = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return StoredAdapter(found, rank, scaling)


# ------------------------------------------------------------------------------------------
# Merging


def merge(base: str | Path, adapter: str | Path, output: str | Path) -> None:
    """Writes `base` with the adapter's tensors in place, of LoRA W + scaling * B A, as a complete
    checkpoint, file by file, in the base's dtypes, FP8 as bfloat16. Config and tokenizer are
    copied; code is not. At most one file's tensors are in memory. `output` appears when whole."""
    base, output = local_directory(base), Path(output).resolve()
    model, tensors = read_checkpoint(base)
    config = model.config
    model.fingerprint = fingerprint(tensors)
    trained = read_adapter(local_directory(adapter, "adapter"), model)
    if config.tie_word_embeddings and "model.embed_tokens.weight" in trained.tensors:
        trained.tensors["lm_head.weight"] = trained.tensors["model.embed_tokens.weight"]
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"{output}: must be an empty directory or not exist")
    part = output.with_name(f".{output.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        write_merged(base, config, trained, part)
        os.replace(part, output)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def write_merged(base: Path, config: ModelConfig, trained: StoredAdapter, part: Path) -> None:
    """All files of a merged checkpoint, into the directory `part`."""
    by_file: dict[Path, list[StoredTensor]] = {}
    for stored in stored_tensors(base, config).values():
        by_file.setdefault(stored.path, []).append(stored)
    weight_map, total = {}, 0
    for path in tqdm(sorted(by_file), desc="merge", unit="file", disable=None):
        merged = {s.name: merged_tensor(s, trained, config) for s in by_file[path]}
        weight_map |= {name: path.name for name in merged}
        total += sum(tensor.nbytes for tensor in merged.values())
        with replacing(part / path.name) as target:
            save_file(merged, target, metadata={"format": "pt"})
        del merged
    if (base / "model.safetensors.index.json").exists():
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(part / "model.safetensors.index.json", index, indent=2)
    for path in sorted(base.iterdir()):
        kept = path.suffix in (".json", ".jinja", ".txt", ".model") or path.stem == "LICENSE"
        if kept and path.is_file() and not (part / path.name).exists():
            shutil.copyfile(path, part / path.name)
    if config.quantization_config is not None:
        raw = read_json(base / "config.json")
        del raw["quantization_config"]
        raw["dtype" if "dtype" in raw else "torch_dtype"] = "bfloat16"
        write_json(part / "config.json", raw, indent=2)


def merged_tensor(stored: StoredTensor, trained: StoredAdapter, config: ModelConfig) -> Tensor:
    """A base's tensor, with the adapter over it; one that holds all experts of a layer is put
    together from theirs."""
    quantised = stored.scale is not None
    dtype = torch.bfloat16 if quantised else DTYPES.get(stored.dtype)
    if dtype is None:
        raise ValueError(f"{stored.path}: tensor {stored.name} is {stored.dtype}; not supported")
    tensor = torch.empty(stored.shape, dtype=dtype)
    if not FUSED.fullmatch(stored.name):
        copy_merged(stored.name, stored, trained, tensor)
        return tensor
    flat = tensor.view(-1)
    for name, piece in split_experts(stored, config).items():
        start = (piece.offset - stored.offset) // dtype.itemsize
        copy_merged(
            name, piece, trained, flat[start : start + math.prod(piece.shape)].view(piece.shape)
        )
    return tensor


def copy_merged(name: str, stored: StoredTensor, trained: StoredAdapter, target: Tensor) -> None:
    """Fills `target` with the base's tensor of that name, the adapter's in its place, or
    W + scaling * B A, computed in float32 and rounded once."""
    module = name.removesuffix(".weight")
    if f"{module}.lora_A.weight" not in trained.tensors:
        trained.tensors.get(name, stored).copy_to(target)
        return
    A, B = (trained.tensors[f"{module}.{half}.weight"].read() for half in ("lora_A", "lora_B"))
    weight = torch.empty(target.shape)
    stored.copy_to(weight)
    target.copy_(weight.addmm_(B.float(), A.float(), alpha=trained.scaling))


def main() -> None:
    parser = argparse.ArgumentParser(prog="model.py", description="Work on checkpoints.")
    commands = parser.add_subparsers(dest="command", required=True)
    merging = commands.add_parser(
        "merge",
        help="write a base checkpoint with an adapter in place",
        description="Writes a complete checkpoint, base and adapter in one, for use anywhere.",
    )
    merging.add_argument(
        "--model", required=True, help="base checkpoint: a directory or a hub name"
    )
    merging.add_argument(
        "--adapter",
        required=True,
        help="a directory of ESFT's (expert_cfg.json and .safetensors) or of PEFT's LoRA "
        "(adapter_config.json and adapter_model.safetensors), or a hub name",
    )
    merging.add_argument(
        "--output", required=True, help="directory to write; must not hold anything yet"
    )
    args = parser.parse_args()
    try:
        merge(args.model, args.adapter, args.output)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    print(f"wrote the merged checkpoint to {args.output}")
    print(f"next: python eval.py --model {args.output} --task exact --data FILE --output FILE")


if __name__ == "__main__":
    main()
