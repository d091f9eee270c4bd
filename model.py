"""The transformers of DeepSeekMoE, DeepSeek-V2 and DeepSeek-V3 as the papers write them: attention,
gate, experts, loss.

This file says what is computed. It does not read files (checkpoint.py), choose what is trained
(adapter.py) or know of several processes (train_ep.py). It is not made to be fast. Some functions
are attributes of modules, so that other files can put others there, with the same results up to
rounding: `attend`, `attend_cache`, `document_mask`, `router_logits`, `top_experts`, `run_experts`
(fast/), `up_projection` (lora.py) and `all_experts` (train_ep.py).

Parameter names are exactly those of the published checkpoints, so a trained expert is a valid
checkpoint tensor. Equation numbers are those of DeepSeekMoE (arXiv 2401.06066), DeepSeek-V2
(arXiv 2405.04434) and DeepSeek-V3 (arXiv 2412.19437).

Dimensions in the comments:
    B rows, T tokens of a row, N = B * T tokens, D hidden size, V vocabulary, L layers
    H attention heads, C width of the latent (kv_lora_rank), R rotary part of a head
    E routed experts, I width of an expert, K experts per token
    S = N * K slots: a slot is a token for one of its K experts
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# ------------------------------------------------------------------------------------------
# Configuration


@dataclass
class ModelConfig:
    """The fields of a Hugging Face `config.json` that this project reads, under DeepSeek's names.
    families.py reads them from a file and checks them."""

    model_type: str  # the family; families.py lists them
    vocab_size: int
    hidden_size: int
    intermediate_size: int  # width of the dense layers
    moe_intermediate_size: int  # width of one expert
    num_hidden_layers: int
    num_attention_heads: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    first_k_dense_replace: int  # so many layers come first that have no experts
    num_key_value_heads: int | None = None  # only deepseek has key-value heads
    kv_lora_rank: int | None = None  # this field and the next four define latent attention
    q_lora_rank: int | None = None
    qk_nope_head_dim: int | None = None
    qk_rope_head_dim: int | None = None
    v_head_dim: int | None = None
    moe_layer_freq: int = 1  # every so many layers one has experts
    topk_method: str = "greedy"  # or group_limited_greedy (V2), noaux_tc (V3)
    scoring_func: str = "softmax"  # or sigmoid (V3)
    n_group: int | None = None  # groups of experts, for the two other methods
    topk_group: int | None = None  # groups that a token may use
    norm_topk_prob: bool = False
    routed_scaling_factor: float = 1.0
    aux_loss_alpha: float = 0.0  # weight of the load balance loss in training
    seq_aux: bool = True  # balance within each row (True) or over all rows of a call
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # YaRN's numbers
    rope_interleave: bool = True
    attention_bias: bool = False
    tie_word_embeddings: bool = False
    index_topk: int | None = None  # up to so many tokens a row V3.2's attention is dense, as here
    num_nextn_predict_layers: int = 0  # layers for multi-token prediction, which are not loaded
    quantization_config: dict | None = None

    @property
    def rotary_dim(self) -> int:  # R
        if self.model_type == "deepseek":  # whole heads rotate
            return self.hidden_size // self.num_attention_heads
        return self.qk_rope_head_dim

    @property
    def cache_width(self) -> int:  # numbers that a token leaves in the cache of a layer
        if self.model_type == "deepseek":
            return 2 * self.num_key_value_heads * self.rotary_dim  # keys and values
        return self.kv_lora_rank + self.qk_rope_head_dim  # the latent and the rotary key

    @property
    def normalises_gates(self) -> bool:
        return self.norm_topk_prob and self.num_experts_per_tok > 1

    @property
    def scales_gates(self) -> bool:  # V2 normalises or scales, later families do both
        return self.model_type != "deepseek_v2" or not self.normalises_gates

    def is_moe(self, layer: int) -> bool:
        return layer >= self.first_k_dense_replace and layer % self.moe_layer_freq == 0

    @property
    def moe_layers(self) -> list[int]:
        return [layer for layer in range(self.num_hidden_layers) if self.is_moe(layer)]

    def check_row(self, length: int, what: str = "the length of a row") -> None:
        """Raises ValueError for a row that is so long that V3.2's attention would be sparse."""
        if self.index_topk and length > self.index_topk:
            said = f"{what} is {length}; must be at most index_topk, {self.index_topk}"
            raise ValueError(f"{said}: beyond it attention is sparse, which is not supported")


# ------------------------------------------------------------------------------------------
# Rotary positions


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's sqrt(1/t) for queries and for keys (arXiv 2309.00071, eq. 22), weighed by `mscale`."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def rope_table(config: ModelConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Returns cos and sin, float32 (..., R / 2), for integer `positions` (...)."""
    dim, theta = config.rotary_dim, config.rope_theta
    pairs = torch.arange(0, dim, 2, dtype=torch.float32, device=positions.device)
    inverse_frequency = 1.0 / theta ** (pairs / dim)  # (R/2,)
    scale = 1.0
    if yarn := config.rope_scaling:
        factor, length = yarn["factor"], yarn["original_max_position_embeddings"]

        def pair_that_turns(times: float) -> float:
            """The number of the pair that turns `times` times within `length` tokens."""
            return dim * math.log(length / (times * 2 * math.pi)) / (2 * math.log(theta))

        # Pairs that turn fast keep their frequency. `factor` stretches those that turn slowly.
        low = max(math.floor(pair_that_turns(yarn.get("beta_fast") or 32)), 0)
        high = min(math.ceil(pair_that_turns(yarn.get("beta_slow") or 1)), dim - 1)
        ramp = ((pairs / 2 - low) / ((high - low) or 0.001)).clamp(0, 1)
        inverse_frequency = inverse_frequency * (1 - ramp) + inverse_frequency / factor * ramp
        # 1 for V2 and V3, which put the factor into the softmax scale.
        scale = yarn_mscale(factor, yarn.get("mscale", 1))
        scale /= yarn_mscale(factor, yarn.get("mscale_all_dim", 0))
    angle = positions[..., None].float() * inverse_frequency
    return angle.cos() * scale, angle.sin() * scale


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotates the pairs (0, 1), (2, 3), ... of x (..., R) if `interleaved`, else (0, R/2), (1,
    R/2 + 1), ... The result holds the first members of all pairs, then the second ones. Queries and
    keys share this order, so their products do not change."""
    pairs = x.float()
    first, second = pairs.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else pairs.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


# ------------------------------------------------------------------------------------------
# Attention


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


@dataclass
class Cache:
    """What decoding keeps of the tokens seen: the normalised latent and the rotated key, which all
    heads share; for `deepseek`, keys and values of each head. The first call brings whole prompts
    and needs an empty cache. Later calls bring one token a row."""

    layers: Tensor  # (L, B, length, cache_width)
    seen: Tensor  # (B,) number of tokens seen so far

    @classmethod
    def empty(cls, config: ModelConfig, rows: int, length: int, like: Tensor) -> "Cache":
        config.check_row(length, "the length of the cache")
        layers = like.new_zeros(config.num_hidden_layers, rows, length, config.cache_width)
        return cls(layers, torch.zeros(rows, dtype=torch.int64, device=like.device))


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """q (B, T, heads, A), k (B, U, kv_heads, A), v (B, U, kv_heads, Z) -> (B, T, heads * Z). Query
    heads may share a key head. `mask`, boolean and broadcast to (B, heads, T, U), is true where a
    query sees a key. Without it attention is causal."""
    width = v.shape[-1]
    # torch's kernels that need no memory for the scores (B, heads, T, T) want heads of one width.
    v = F.pad(v, (0, max(q.shape[-1] - width, 0)))
    options = {"scale": scale, "enable_gqa": q.shape[2] != k.shape[2]}
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, heads, T, ...)
    out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, **options)
    return out[..., :width].transpose(1, 2).flatten(2)


def attend_cache(q: Tensor, past: Tensor, positions: Tensor, C: int, scale: float) -> Tensor:
    """q (B, H, C + R), of one token a row, and `past` (B, length, C + R) -> (B, H, C). All heads
    share keys, and values, which are their first C numbers. A token sees up to positions (B, 1)."""
    # One product for all heads of a row. Broadcasting would copy the cache for each head.
    scores = torch.bmm(q, past.mT).float() * scale  # (B, H, length)
    unseen = torch.arange(past.shape[1], device=past.device) > positions[:, None]
    weights = scores.masked_fill(unseen, -torch.inf).softmax(-1).to(past.dtype)
    return torch.bmm(weights, past[..., :C])


def document_mask(documents: Tensor, device: torch.device) -> Tensor:
    """documents (B, T), a number for each token -> mask (B, 1, T, T): a token sees the tokens
    before it in its own document."""
    documents = documents.to(device)
    return (documents[:, :, None] == documents[:, None]).tril()[:, None]


class MultiHeadAttention(nn.Module):
    """The attention of `deepseek`, as in Llama."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        D, bias = config.hidden_size, config.attention_bias
        self.head_dim = config.rotary_dim
        key_width = config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(D, D, bias=bias)
        self.k_proj = nn.Linear(D, key_width, bias=bias)
        self.v_proj = nn.Linear(D, key_width, bias=bias)
        self.o_proj = nn.Linear(D, D, bias=bias)
        self.attend = attend

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        past: Tensor | None = None,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """See `LatentAttention.forward`. `past` is (B, length, 2 * width of the keys)."""
        cos, sin = (table.unsqueeze(-2) for table in rope)
        projections = self.q_proj, self.k_proj, self.v_proj
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)) for p in projections)  # (B, T, heads, R)
        q, k = apply_rope(q, cos, sin, False), apply_rope(k, cos, sin, False)
        if past is not None:
            rows = torch.arange(len(x), device=x.device)[:, None]
            past[rows, positions] = torch.cat([k, v], -2).flatten(2)
            if x.shape[1] == 1:
                k, v = past.unflatten(-1, (-1, self.head_dim)).chunk(2, -2)
                mask = torch.arange(past.shape[1], device=x.device) <= positions[:, None, :, None]
        return self.o_proj(self.attend(q, k, v, mask))


class LatentAttention(nn.Module):
    """Multi-head latent attention (DeepSeek-V2, section 2.1)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        c, D, H = config, config.hidden_size, config.num_attention_heads
        bias = config.attention_bias
        nope, R, v = c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim
        self.nope_dim, self.rope_dim, self.v_dim = nope, R, v
        self.heads, self.latent_dim, self.interleaved = H, c.kv_lora_rank, c.rope_interleave
        # Both norms in here keep eps 1e-6 whatever rms_norm_eps says, as in the original code.
        if c.q_lora_rank:
            self.q_a_proj = nn.Linear(D, c.q_lora_rank, bias=bias)
            self.q_a_layernorm = RMSNorm(c.q_lora_rank)
            self.q_b_proj = nn.Linear(c.q_lora_rank, H * (nope + R), bias=False)
        else:
            self.q_proj = nn.Linear(D, H * (nope + R), bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(D, self.latent_dim + R, bias=bias)
        self.kv_a_layernorm = RMSNorm(self.latent_dim)
        self.kv_b_proj = nn.Linear(self.latent_dim, H * (nope + v), bias=False)
        self.o_proj = nn.Linear(H * v, D, bias=bias)
        self.yarn = c.rope_scaling or {}
        mscale = yarn_mscale(self.yarn.get("factor", 1), self.yarn.get("mscale_all_dim", 0))
        self.scale = (nope + R) ** -0.5 * mscale**2
        self.attend, self.attend_cache = attend, attend_cache

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        past: Tensor | None = None,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """x (B, T, D) -> (B, T, D). `rope` is cos and sin, (T, R/2) or (B, T, R/2). `past` (B,
        length, C + R) is this layer's part of the cache. It is written at `positions` (B, T)."""
        B, T, _ = x.shape
        cos, sin = rope
        low_rank = hasattr(self, "q_a_proj")
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))) if low_rank else self.q_proj(x)
        if beta := self.yarn.get("llama_4_scaling_beta"):  # Mistral 4's queries grow with positions
            periods = positions // self.yarn["original_max_position_embeddings"]
            q = q * (1 + beta * torch.log1p(periods))[..., None].to(q.dtype)
        q_nope, q_rope = q.view(B, T, self.heads, -1).split([self.nope_dim, self.rope_dim], -1)
        q_rope = apply_rope(q_rope, cos.unsqueeze(-2), sin.unsqueeze(-2), self.interleaved)
        latent, k_rope = self.kv_a_proj_with_mqa(x).split([self.latent_dim, self.rope_dim], -1)
        latent = self.kv_a_layernorm(latent)
        k_rope = apply_rope(k_rope, cos, sin, self.interleaved)  # one key for all heads

        if past is not None:
            rows = torch.arange(B, device=x.device)[:, None]
            past[rows, positions] = torch.cat([latent, k_rope], -1)
            if T == 1:  # decoding: do not expand keys and values of all tokens seen in each step
                return self.o_proj(self.attend_latent(q_nope, q_rope, past, positions))
        expanded = self.kv_b_proj(latent).view(B, T, self.heads, -1)
        k_nope, v = expanded.split([self.nope_dim, self.v_dim], -1)
        k_rope = k_rope.unsqueeze(2).expand(-1, -1, self.heads, -1)
        q = torch.cat([q_nope, q_rope], -1)  # (B, T, H, nope + R)
        k = torch.cat([k_nope, k_rope], -1)
        return self.o_proj(self.attend(q, k, v, mask, self.scale))

    def attend_latent(
        self, q_nope: Tensor, q_rope: Tensor, past: Tensor, positions: Tensor
    ) -> Tensor:
        """Attention of one token a row in the space of the latent (DeepSeek-V2, section 2.1.2). The
        up-projections of keys and values are applied to the query and to the result, not to every
        token seen. positions (B, 1) -> (B, 1, H * v)."""
        up = self.up_projection().view(self.heads, -1, self.latent_dim)
        w_k, w_v = up.split([self.nope_dim, self.v_dim], 1)
        q = torch.cat([torch.einsum("bhn,hnc->bhc", q_nope[:, 0], w_k), q_rope[:, 0]], -1)
        out = self.attend_cache(q, past, positions, self.latent_dim, self.scale)
        return torch.einsum("bhc,hvc->bhv", out, w_v).flatten(1)[:, None]

    def up_projection(self) -> Tensor:
        """Returns the weight of kv_b_proj (H * (nope + v), C). lora.py adds B A to it."""
        return self.kv_b_proj.weight


# ------------------------------------------------------------------------------------------
# Experts


class MLP(nn.Module):
    """SwiGLU: the feed-forward part of a dense layer, the shared experts, or one routed expert."""

    def __init__(self, dim: int, width: int):
        super().__init__()
        self.gate_proj = nn.Linear(dim, width, bias=False)
        self.up_proj = nn.Linear(dim, width, bias=False)
        self.down_proj = nn.Linear(width, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def router_logits(x: Tensor, weight: Tensor) -> Tensor:
    """x (N, D), weight (E, D) -> (N, E), in float32: bfloat16 would make close scores equal."""
    return F.linear(x.float(), weight.float())


def top_experts(scores: Tensor, choice: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Returns the scores and indices (N, count) of the experts with the largest `choice` (N, E)."""
    indices = choice.topk(count, -1).indices
    return scores.gather(1, indices), indices


class Gate(nn.Module):
    """Says which K experts a token uses, and with what weight (DeepSeekMoE, eq. 10; DeepSeek-V2,
    eq. 22; DeepSeek-V3, eq. 13 to 16)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        E, D = config.n_routed_experts, config.hidden_size
        self.config = config
        self.weight = nn.Parameter(torch.zeros(E, D))
        # In pretraining V3 moves this bias by a rule, not by gradients. Here it stays as it is.
        bias = torch.zeros(E) if config.topk_method == "noaux_tc" else None
        self.register_buffer("e_score_correction_bias", bias)
        self.router_logits, self.top_experts = router_logits, top_experts

    def _apply(self, fn, recurse=True):
        """Keeps the bias in float32 when .to() changes the dtype of the model."""
        bias = self.e_score_correction_bias
        super()._apply(fn, recurse)
        if bias is not None and self.e_score_correction_bias.dtype != bias.dtype:
            self.e_score_correction_bias = bias.to(self.e_score_correction_bias.device)
        return self

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (N, D) -> weights (N, K) float32, indices (N, K) int64, scores (N, E) float32."""
        c = self.config
        logits = self.router_logits(x, self.weight)
        scores = logits.sigmoid() if c.scoring_func == "sigmoid" else logits.softmax(-1)
        choice = scores
        if c.topk_method == "noaux_tc":  # the bias helps to choose; it does not weigh
            choice = scores + self.e_score_correction_bias
        if c.topk_method != "greedy":  # the experts of a token come from the best groups alone
            groups = choice.view(len(scores), c.n_group, -1)
            # V3 ranks a group by its two best experts, V2 by the best one.
            best = groups.topk(2 if c.topk_method == "noaux_tc" else 1, -1).values.sum(-1)
            kept = best.topk(c.topk_group, -1).indices  # (N, topk_group)
            dropped = torch.ones_like(best, dtype=torch.bool).scatter_(1, kept, False)
            choice = groups.masked_fill(dropped[..., None], -torch.inf).flatten(1)
        weights, indices = self.top_experts(scores, choice, c.num_experts_per_tok)
        if c.normalises_gates:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        if c.scales_gates:
            weights = weights * c.routed_scaling_factor
        return weights, indices, scores


def slots_per_expert(indices: Tensor, n_experts: int) -> list[int]:
    """Returns how many slots each expert has, as a list on the host. This waits for the GPU. On the
    meta device, which has no values, slots are spread evenly."""
    if indices.is_meta:
        bounds = [indices.numel() * e // n_experts for e in range(n_experts + 1)]
        return [end - begin for begin, end in zip(bounds, bounds[1:])]
    return indices.flatten().bincount(minlength=n_experts).tolist()


def experts_loop(moe: "MoE", x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
    """The specification of the routed experts: y[n] = sum_k weights[n, k] * expert_{indices[n, k]}
    (x[n]) (DeepSeekMoE, eq. 9), for x (N, D), weights and indices (N, K) -> (N, D). An expert
    without tokens runs on an empty slice, so its gradient is zero and not missing."""
    K = indices.shape[1]
    order = indices.flatten().argsort(stable=True)  # (S,) the slots of an expert side by side
    inputs = x[order // K].split(slots_per_expert(indices, len(moe.experts)))
    out = torch.cat([expert(rows) for expert, rows in zip(moe.experts, inputs)])  # (S, D)
    out = out[order.argsort()].view(*indices.shape, x.shape[1])  # (N, K, D), in order of tokens
    return (out * weights[..., None]).sum(1).to(x.dtype)


# What the gate of a layer decided: weights (N, K) float32 and indices (N, K).
Routing = tuple[Tensor, Tensor]


class MoE(nn.Module):
    """Routed experts plus shared experts (DeepSeekMoE, eq. 9). Each expert has its own parameters
    under the checkpoint's names, so it can be frozen or trained alone."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        D, I = config.hidden_size, config.moe_intermediate_size
        self.config = config
        self.gate = Gate(config)
        self.shared_experts = MLP(D, I * config.n_shared_experts)
        self.experts = nn.ModuleList(MLP(D, I) for _ in range(config.n_routed_experts))
        self.run_experts = experts_loop

    def forward(self, x: Tensor, balance: bool) -> tuple[Tensor, Tensor | None, Routing]:
        """x (B, T, D) -> output (B, T, D), the balance loss (B,) if `balance` asks for it, and the
        routing."""
        flat = x.flatten(0, 1)
        weights, indices, scores = self.gate(flat)
        y = self.all_experts(flat, weights, indices).view_as(x)
        loss = self.balance_loss(scores, indices, len(x)) if balance else None
        return y, loss, (weights.detach(), indices)

    def all_experts(self, x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        """Returns the sum of routed and shared experts, x (N, D) -> (N, D)."""
        return self.run_experts(self, x, weights, indices) + self.shared_experts(x)

    def balance_loss(self, scores: Tensor, indices: Tensor, rows: int) -> Tensor:
        """Returns sum_i f_i P_i of each row (B,), not yet times aux_loss_alpha (DeepSeekMoE, eq. 12
        to 14). f_i is the fraction of slots that chose expert i, times E. P_i is the mean score of
        expert i; sigmoid scores are first divided by their sum (DeepSeek-V3, eq. 17 to 20). Perfect
        balance gives 1. With seq_aux false all rows of the call count as one."""
        E = scores.shape[-1]
        if self.config.scoring_func == "sigmoid":
            scores = scores / scores.sum(-1, keepdim=True)
        groups = rows if self.config.seq_aux else 1
        chosen = indices.view(groups, -1)  # (groups, slots)
        f = E * (chosen[..., None] == torch.arange(E, device=scores.device)).float().mean(1)
        return (f * scores.view(groups, -1, E).mean(1)).sum(-1).expand(rows)


# ------------------------------------------------------------------------------------------
# The model


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        D, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(D, eps)
        attention = MultiHeadAttention if config.model_type == "deepseek" else LatentAttention
        self.self_attn = attention(config)
        self.post_attention_layernorm = RMSNorm(D, eps)
        self.mlp = MoE(config) if config.is_moe(layer) else MLP(D, config.intermediate_size)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        past: Tensor | None = None,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        balance: bool = False,
    ) -> tuple[Tensor, Tensor | None, Routing | None]:
        """x (B, T, D) -> x (B, T, D); also the balance loss and the routing of a MoE layer."""
        x = x + self.self_attn(self.input_layernorm(x), rope, past, positions, mask)
        y = self.post_attention_layernorm(x)
        if isinstance(self.mlp, MoE):
            y, loss, routing = self.mlp(y, balance)
            return x + y, loss, routing
        return x + self.mlp(y), None, None


RunBlock = Callable[..., tuple[Tensor, Tensor | None, Routing | None]]


def checkpointed(run_block: RunBlock = Block.__call__) -> RunBlock:
    """Returns a `run_block` that keeps only a block's input, and runs it again in backward."""
    return lambda block, *args: checkpoint(run_block, block, *args, use_reentrant=False)


class Transformer(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model = nn.Module()
        table = torch.empty(config.vocab_size, config.hidden_size)  # a random start takes seconds
        self.model.embed_tokens = nn.Embedding.from_pretrained(table, freeze=False)
        self.model.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.model.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.document_mask = document_mask

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        return self

    def hidden_states(
        self,
        tokens: Tensor,
        cache: Cache | None = None,
        documents: Tensor | None = None,
        balance: bool = False,
        run_block: RunBlock = Block.__call__,
        watch: Callable[[int, Routing], None] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """tokens (B, T) -> normalised final states (B, T, D). With `balance`, also the balance loss
        (B,), summed over layers.

        With a `cache`, each row continues after the tokens that it has seen. With `documents` (B,
        T), on the CPU and ascending in a row, a token sees only its own document, and positions
        begin anew with each; a cache has none. `run_block` calls a block: see `checkpointed`.
        `watch` is called with the number and the routing of each MoE layer."""
        self.config.check_row(tokens.shape[1])
        positions, mask = torch.arange(tokens.shape[1], device=tokens.device), None
        if cache is not None:
            positions = cache.seen[:, None] + positions  # (B, T)
        if documents is not None:
            positions = positions - torch.searchsorted(documents, documents).to(tokens.device)
            mask = self.document_mask(documents, tokens.device)
        rope = rope_table(self.config, positions)
        x = self.model.embed_tokens(tokens)
        losses = []
        for i, block in enumerate(self.model.layers):
            past = cache.layers[i] if cache is not None else None
            x, loss, routing = run_block(block, x, rope, past, positions, mask, balance)
            if loss is not None:
                losses.append(loss)
            if watch is not None and routing is not None:
                watch(i, routing)
        if cache is not None:
            cache.seen += tokens.shape[1]
        return self.model.norm(x), torch.stack(losses).sum(0) if losses else None

    def forward(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """tokens (B, T) int64 -> logits (B, T, V)."""
        return self.lm_head(self.hidden_states(tokens, cache)[0])


# ------------------------------------------------------------------------------------------
# Loss


def next_tokens(labels: Tensor) -> tuple[Tensor, Tensor]:
    """labels (B, T) -> the places (M,) among B * T tokens whose next token counts, and these next
    tokens (M,). Labels stand at the position of their own token. Negative ones do not count, nor
    does the first of a row, because nothing predicts it."""
    targets = labels.roll(-1, dims=1)
    targets[:, -1] = -1
    targets = targets.flatten()
    places = (targets >= 0).nonzero()[:, 0]
    return places, targets[places]


def token_losses(
    model: Transformer,
    tokens: Tensor,
    labels: Tensor,
    documents: Tensor | None = None,
    balance: bool = False,
    run_block: RunBlock = Block.__call__,
) -> tuple[Tensor, Tensor | None]:
    """tokens (B, T), labels (B, T) on the CPU -> the cross-entropy of every label that counts (M,),
    float32, in row order; and the balance loss (B,) of `hidden_states`, which gets the rest."""
    places, targets = next_tokens(labels)
    hidden, balance_loss = model.hidden_states(
        tokens, documents=documents, balance=balance, run_block=run_block
    )
    logits = model.lm_head(hidden.flatten(0, 1)[places.to(tokens.device)])  # (M, V)
    losses = F.cross_entropy(logits.float(), targets.to(tokens.device), reduction="none")
    return losses, balance_loss
