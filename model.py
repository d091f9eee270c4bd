"""The DeepSeek-V2 transformer: attention, gate, experts; loading, freezing and adapters.

Dimensions, as in the comments: B rows, T tokens of a row, N = B * T tokens, D hidden size, V
vocabulary, H attention heads, E routed experts, K experts per token, S = N * K (token, expert)
slots, I expert width, C latent of keys and values (kv_lora_rank), R rotary part of a head, L
layers.

Parameter names are exactly those of the published checkpoints, so that a trained expert is a valid
checkpoint tensor. Equation numbers are those of DeepSeekMoE (arXiv 2401.06066) and DeepSeek-V2
(arXiv 2405.04434).
"""

import argparse
import json
import math
import os
import shutil
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

# ------------------------------------------------------------------------------------------
# Configuration


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
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    q_lora_rank: int | None = None
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
    attention_bias: bool = False
    tie_word_embeddings: bool = False
    hidden_act: str = "silu"
    mlp_bias: bool = False
    attention_dropout: float = 0.0
    quantization_config: dict | None = None

    @classmethod
    def from_json(cls, path: str | Path) -> "ModelConfig":
        """Reads `path`; both spellings of the rotary settings (`rope_scaling`, `rope_parameters`).

        Raises FileNotFoundError, or ValueError that names the field, its value and what is
        supported."""
        raw = read_json(path)
        if not isinstance(raw, dict):
            raise ValueError(f"{path}: must hold a JSON object, found {type(raw).__name__}")
        rope = raw.get("rope_parameters")
        if rope is not None:  # transformers 5 moved rope_theta and rope_scaling in here
            if not isinstance(rope, dict):
                raise ValueError(f"{path}: rope_parameters is {rope!r}; must be an object")
            theta = rope.get("rope_theta") if raw.get("rope_theta") is None else raw["rope_theta"]
            raw = {**raw, "rope_theta": theta, "rope_scaling": rope}
        given = {
            field.name: raw[field.name] for field in fields(cls) if raw.get(field.name) is not None
        }
        for field in fields(cls):
            if field.default is MISSING and field.name not in given:
                raise ValueError(f"{path}: field {field.name} is missing")
        config = cls(**given)
        try:
            config.check()
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        return config

    def check(self) -> None:
        """Raises ValueError for the first field with a value that this model does not support."""
        supported = {
            "model_type": ("deepseek_v2",),
            "topk_method": ("greedy", "group_limited_greedy"),
            "scoring_func": ("softmax",),
            "hidden_act": ("silu",),
            "mlp_bias": (False,),
            "attention_dropout": (0,),
            "quantization_config": (None,),
        }
        for name, values in supported.items():
            if getattr(self, name) not in values:
                shown = ", ".join(map(repr, values))
                raise ValueError(f"{name} is {getattr(self, name)!r}; supported: {shown}")
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is int or (field.type == int | None and value is not None):
                least = 0 if field.name == "first_k_dense_replace" else 1
                if type(value) is not int or not least <= value <= 2**24:
                    raise ValueError(
                        f"{field.name} is {value!r}; must be an integer from {least} to 2^24"
                    )
            elif field.type is float and (
                type(value) not in (int, float) or not math.isfinite(value)
            ):
                raise ValueError(f"{field.name} is {value!r}; must be a finite number")
            elif field.type is bool and type(value) is not bool:
                raise ValueError(f"{field.name} is {value!r}; must be true or false")
        if self.rms_norm_eps < 0 or self.rope_theta <= 1:
            raise ValueError(
                f"rms_norm_eps is {self.rms_norm_eps} and rope_theta is {self.rope_theta}; "
                "must be at least 0 and above 1"
            )
        if self.qk_rope_head_dim % 2:
            raise ValueError(f"qk_rope_head_dim is {self.qk_rope_head_dim}; must be even")
        reachable = self.n_routed_experts
        if self.topk_method == "group_limited_greedy":
            if not self.n_group or self.n_routed_experts % self.n_group:
                raise ValueError(
                    f"n_group is {self.n_group}; must divide n_routed_experts "
                    f"({self.n_routed_experts}) for group_limited_greedy"
                )
            if not self.topk_group or self.topk_group > self.n_group:
                raise ValueError(
                    f"topk_group is {self.topk_group}; must be 1 to n_group ({self.n_group})"
                )
            reachable = self.n_routed_experts // self.n_group * self.topk_group
        if self.num_experts_per_tok > reachable:
            raise ValueError(
                f"num_experts_per_tok is {self.num_experts_per_tok}; "
                f"a token can reach only {reachable} experts"
            )
        rope = self.rope_scaling
        if rope is not None:
            if not isinstance(rope, dict):
                raise ValueError(f"rope_scaling is {rope!r}; must be an object or null")
            kind = rope.get("rope_type", rope.get("type"))
            if kind not in ("default", "yarn"):
                raise ValueError(f"rope_scaling: type is {kind!r}; supported: 'default', 'yarn'")
            if kind == "yarn":
                numbers = {"factor": 1, "original_max_position_embeddings": 1}
                numbers |= {
                    key: 0
                    for key in ("beta_fast", "beta_slow", "mscale", "mscale_all_dim")
                    if key in rope
                }
                for key, least in numbers.items():
                    value = rope.get(key)
                    if type(value) not in (int, float) or not least <= value < math.inf:
                        raise ValueError(
                            f"rope_scaling: {key} is {value!r}; must be a number from {least}"
                        )
                if rope.get("attention_factor") is not None:
                    raise ValueError("rope_scaling: attention_factor is not supported")

    @property
    def normalises_gates(self) -> bool:
        return self.norm_topk_prob and self.num_experts_per_tok > 1

    def is_moe(self, layer: int) -> bool:
        return layer >= self.first_k_dense_replace and layer % self.moe_layer_freq == 0

    @property
    def moe_layers(self) -> list[int]:
        return [layer for layer in range(self.num_hidden_layers) if self.is_moe(layer)]

    @property
    def yarn(self) -> dict | None:
        rope = self.rope_scaling or {}
        return rope if rope.get("rope_type", rope.get("type")) == "yarn" else None


# ------------------------------------------------------------------------------------------
# Rotary positions


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's attention temperature (arXiv 2309.00071, eq. 22, with DeepSeek's factor `mscale`)."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def rope_table(config: ModelConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin, float32, (..., R / 2) for integer `positions` (...), with YaRN where the config
    says."""
    dim, theta = config.qk_rope_head_dim, config.rope_theta
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
        ramp = ((pairs / 2 - low) / max(high - low, 0.001)).clamp(0, 1)
        inverse_frequency = inverse_frequency * (1 - ramp) + inverse_frequency / factor * ramp
        scale = yarn_mscale(factor, yarn.get("mscale", 1)) / yarn_mscale(
            factor, yarn.get("mscale_all_dim", 0)
        )
    angle = positions[..., None].float() * inverse_frequency
    return angle.cos() * scale, angle.sin() * scale


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the pairs (0, 1), (2, 3), ... of x (..., R). The result holds all first members of the
    pairs, then all second ones: an order that queries and keys share, so that their products do not
    change."""
    first, second = x.float().unflatten(-1, (-1, 2)).unbind(-1)
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
    a head."""

    latent: Tensor  # (L, B, length, C + R)
    seen: Tensor  # (B,) tokens seen so far

    @classmethod
    def empty(cls, config: ModelConfig, rows: int, length: int, like: Tensor) -> "Cache":
        width = config.kv_lora_rank + config.qk_rope_head_dim
        latent = like.new_zeros(config.num_hidden_layers, rows, length, width)
        return cls(latent, torch.zeros(rows, dtype=torch.int64, device=like.device))


class Attention(nn.Module):
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
        self.latent = c.kv_lora_rank
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
    ) -> Tensor:
        """x (B, T, D). `past` (B, length, C + R) is this layer's cache and is written at
        `positions` (B, T). A call with several tokens starts at an empty cache; later calls bring
        one token a row."""
        B, T, _ = x.shape
        cos, sin = rope  # (T, R/2) or (B, T, R/2)
        q = (
            self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
            if hasattr(self, "q_a_proj")
            else self.q_proj(x)
        )
        q = q.view(B, T, self.heads, -1)
        q_nope, q_rope = q.split([self.nope, self.rope], -1)
        q_rope = apply_rope(q_rope, cos.unsqueeze(-2), sin.unsqueeze(-2))  # (B, T, H, R)
        latent, k_rope = self.kv_a_proj_with_mqa(x).split([self.latent, self.rope], -1)
        latent = self.kv_a_layernorm(latent)
        k_rope = apply_rope(k_rope, cos, sin)  # one key for all heads

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
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            is_causal=True,
            scale=self.scale,
        )
        return self.o_proj(out.transpose(1, 2).flatten(2))

    def attend_latent(
        self, q_nope: Tensor, q_rope: Tensor, past: Tensor, positions: Tensor
    ) -> Tensor:
        """Attention in the space of the latent: the up-projections of keys and values are applied
        to the query and to the result instead of to every token seen (DeepSeek-V2, section
        2.1.2)."""
        up = self.kv_b_proj.weight.view(self.heads, -1, self.latent)
        w_k, w_v = up.split([self.nope, self.v], 1)
        q = torch.cat([torch.einsum("bthn,hnc->bhtc", q_nope, w_k), q_rope.transpose(1, 2)], -1)
        keys = past.unsqueeze(1)  # (B, 1, length, C + R)
        scores = (q @ keys.mT).float() * self.scale  # (B, H, T, length)
        unseen = torch.arange(past.shape[1], device=past.device) > positions[:, None, :, None]
        weights = scores.masked_fill(unseen, -torch.inf).softmax(-1).to(past.dtype)
        out = weights @ keys[..., : self.latent]  # (B, H, T, C)
        return torch.einsum("bhtc,hvc->bthv", out, w_v).flatten(2)


class MLP(nn.Module):
    """SwiGLU: a dense layer's feed-forward part, the shared experts, or one routed expert."""

    def __init__(self, dim: int, width: int):
        super().__init__()
        self.gate_proj = nn.Linear(dim, width, bias=False)
        self.up_proj = nn.Linear(dim, width, bias=False)
        self.down_proj = nn.Linear(width, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Gate(nn.Module):
    """Which K experts a token uses, with what weight (DeepSeekMoE, eq. 10; DeepSeek-V2, eq. 22)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(config.n_routed_experts, config.hidden_size))
        self.config = config

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (N, D) -> weights (N, K) float32, indices (N, K) int64, scores (N, E) float32."""
        c = self.config
        # In float32: near ties decide the routing.
        scores = F.linear(x.float(), self.weight.float()).softmax(-1)
        choice = scores
        if c.topk_method == "group_limited_greedy":  # the groups with the best single expert
            groups = scores.view(len(scores), c.n_group, -1)
            kept = groups.amax(-1).topk(c.topk_group, -1).indices  # (N, topk_group)
            dropped = torch.ones_like(groups[..., 0], dtype=torch.bool).scatter_(1, kept, False)
            choice = groups.masked_fill(dropped[..., None], -torch.inf).flatten(1)
        indices = choice.topk(c.num_experts_per_tok, -1).indices
        weights = scores.gather(1, indices)
        if c.normalises_gates:  # normalised or scaled, as V2's own code
            weights = weights / weights.sum(-1, keepdim=True)
        else:
            weights = weights * c.routed_scaling_factor
        return weights, indices, scores


def sort_by_expert(indices: Tensor) -> tuple[Tensor, Tensor]:
    """indices (N, K) -> order and its inverse (S,): slots sorted by expert, ties in order of the
    tokens. Slot s belongs to token s // K."""
    order = indices.flatten().argsort(stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    return order, inverse


def experts_loop(moe: "MoE", x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
    """The specification: y = sum_k weights[:, k] * FFN_indices[:, k](x) (DeepSeekMoE, eq. 9).

    x (N, D), weights and indices (N, K) -> (N, D). An expert without tokens runs on an empty slice,
    so that its gradient is zero and not missing."""
    N, K = indices.shape
    order, inverse = sort_by_expert(indices)
    tokens_per_expert = indices.flatten().bincount(minlength=len(moe.experts))
    slots = x[order // K].split(tokens_per_expert.tolist())  # the one synchronisation
    out = torch.cat([expert(slot) for expert, slot in zip(moe.experts, slots)])  # (S, D)
    return (out[inverse].view(N, K, -1) * weights[..., None]).sum(1).to(x.dtype)


def experts_grouped(moe: "MoE", x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
    """The same as `experts_loop`, as grouped products over the stacked experts. A frozen expert
    costs neither a saved input nor a weight gradient."""
    order, inverse = sort_by_expert(indices)
    experts = torch.arange(len(moe.experts), device=x.device)
    ends = torch.searchsorted(indices.flatten()[order], experts, right=True).int()  # (E,)
    trained = []
    if torch.is_grad_enabled():
        trained = [e for e, expert in enumerate(moe.experts) if expert.up_proj.weight.requires_grad]
    parameters = [p for e in trained for p in moe.experts[e].parameters()]
    return GroupedExperts.apply(
        x, weights, order, inverse, ends, moe.gate_up, moe.down, trained, *parameters
    )


def grouped_mm(x: Tensor, stack: Tensor, ends: Tensor) -> Tensor:
    """x (S, A), sorted by expert and ending at `ends` (E,), times stack (E, A, Z) -> (S, Z)."""
    if x.is_cuda:
        return F.grouped_mm(x, stack, offs=ends)
    # On a CPU torch's own loop takes up to three times as long as this one.
    out = x.new_empty(len(x), stack.shape[-1])
    sizes = ends.diff(prepend=ends.new_zeros(1)).tolist()
    for rows, weight, result in zip(x.split(sizes), stack, out.split(sizes)):
        torch.mm(rows, weight, out=result)
    return out


class GroupedExperts(torch.autograd.Function):
    """Routed experts with a hand-written backward. Saved: the layer's input (not its K copies), the
    gate and up product, the order. The routing weight is multiplied in before the down projection:
    its gradient is then a row sum, and the down projection's output need not be kept."""

    @staticmethod
    def forward(ctx, x, weights, order, inverse, ends, gate_up, down, trained, *parameters):
        N, K = weights.shape
        h = grouped_mm(x[order // K], gate_up.mT, ends)  # (S, 2I)
        gate, up = h.float().chunk(2, -1)
        act = F.silu(gate) * up * weights.flatten()[order, None]  # (S, I)
        out = grouped_mm(act.to(x.dtype), down.mT, ends)  # (S, D)
        ctx.save_for_backward(x, weights, order, inverse, ends, h, gate_up, down)
        ctx.trained = trained
        return out[inverse].view(N, K, -1).sum(1)

    @staticmethod
    def backward(ctx, dy):
        x, weights, order, inverse, ends, h, gate_up, down = ctx.saved_tensors
        (N, K), token = weights.shape, order // weights.shape[1]
        weight = weights.flatten()[order, None]  # (S, 1)
        gate, up = h.float().chunk(2, -1)
        sigmoid = gate.sigmoid()
        silu = gate * sigmoid
        dy = dy[token]  # (S, D)
        # The gradient of the activation times its routing weight.
        dact = grouped_mm(dy, down, ends).float()  # (S, I)
        dweights = (dact * silu * up).sum(-1)[inverse].view(N, K)
        dup = dact * weight * silu
        dgate = dact * weight * up * (sigmoid + silu * (1 - sigmoid))
        dh = torch.cat([dgate, dup], -1).to(x.dtype)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = grouped_mm(dh, gate_up, ends)[inverse].view(N, K, -1).sum(1)

        dparameters = []
        bounds = [0, *ends.tolist()] if ctx.trained else []
        for e in ctx.trained:
            rows = slice(bounds[e], bounds[e + 1])
            act = (silu[rows] * up[rows] * weight[rows]).to(x.dtype)
            dparameters += (dh[rows].T @ x[token[rows]]).chunk(2)  # gate_proj, up_proj
            dparameters.append(dy[rows].T @ act)  # down_proj
        return dx, dweights, None, None, None, None, None, None, *dparameters


EXPERT_PATHS = {"loop": experts_loop, "grouped": experts_grouped}


class MoE(nn.Module):
    """Routed experts plus shared experts (DeepSeekMoE, eq. 9).

    Each expert keeps its own parameters under the checkpoint's names, so that it can be frozen or
    trained alone; their memory is two stacks, gate_up (E, 2I, D) and down (E, D, I), for the
    grouped path. copy.deepcopy would part them: load the model again instead."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        D, I, E = config.hidden_size, config.moe_intermediate_size, config.n_routed_experts
        self.config = config
        self.gate = Gate(config)
        self.shared_experts = MLP(D, I * config.n_shared_experts)
        self.experts = nn.ModuleList(MLP(D, I) for _ in range(E))
        self.gate_up, self.down = torch.empty(E, 2 * I, D), torch.empty(E, D, I)
        self.run_experts = experts_grouped
        self._view_stacks()

    def _view_stacks(self) -> None:
        for expert, gate_up, down in zip(self.experts, self.gate_up, self.down):
            gate, up = gate_up.chunk(2)
            for linear, view in (
                (expert.gate_proj, gate),
                (expert.up_proj, up),
                (expert.down_proj, down),
            ):
                linear.weight = nn.Parameter(view, requires_grad=linear.weight.requires_grad)

    def _apply(self, fn, recurse=True):
        """A change of device or dtype moves the stacks; the experts' parameters become views
        again."""
        self.gate._apply(fn)
        self.shared_experts._apply(fn)
        self.gate_up, self.down = fn(self.gate_up), fn(self.down)
        self._view_stacks()
        return self

    def forward(self, x: Tensor, balance: bool) -> tuple[Tensor, Tensor | None]:
        """x (B, T, D) -> output (B, T, D), and the balance loss (B,) where `balance` asks for
        it."""
        flat = x.flatten(0, 1)
        weights, indices, scores = self.gate(flat)
        y = self.run_experts(self, flat, weights, indices).view_as(x) + self.shared_experts(x)
        return y, self.balance_loss(scores, indices, len(x)) if balance else None

    def balance_loss(self, scores: Tensor, indices: Tensor, rows: int) -> Tensor:
        """sum_i f_i P_i of each row (B,), not yet times aux_loss_alpha (DeepSeekMoE, eq. 12 to 14):
        f_i the fraction of slots that chose expert i, times E; P_i its mean score. Perfect balance
        gives 1. With seq_aux false the whole batch counts as one row."""
        E = scores.shape[-1]
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
        self.self_attn = Attention(config)
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
        balance: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        x = x + self.self_attn(self.input_layernorm(x), rope, past, positions)
        y, loss = self.post_attention_layernorm(x), None
        if isinstance(self.mlp, MoE):
            y, loss = self.mlp(y, balance)
        else:
            y = self.mlp(y)
        return x + y, loss


class Transformer(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.model.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.model.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

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
    ) -> tuple[Tensor, Tensor | None]:
        """tokens (B, T) -> normalised final states (B, T, D), and with `balance` the balance loss
        (B,) summed over layers. `checkpointing` keeps only the input of each block and runs it
        again in backward. With a cache, rows go on after the tokens they have seen."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        if cache is not None:
            positions = cache.seen[:, None] + positions  # (B, T)
        rope = rope_table(self.config, positions)
        x = self.model.embed_tokens(tokens)
        losses = []
        for i, block in enumerate(self.model.layers):
            past = cache.latent[i] if cache is not None else None
            if checkpointing:
                x, loss = checkpoint(block, x, rope, past, positions, balance, use_reentrant=False)
            else:
                x, loss = block(x, rope, past, positions, balance)
            if loss is not None:
                losses.append(loss)
        if cache is not None:
            cache.seen += tokens.shape[1]
        return self.model.norm(x), torch.stack(losses).sum(0) if losses else None

    def forward(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """tokens (B, T) int64 -> logits (B, T, V)."""
        return self.lm_head(self.hidden_states(tokens, cache)[0])


def token_losses(
    model: Transformer,
    tokens: Tensor,
    labels: Tensor,
    balance: bool = False,
    checkpointing: bool = False,
    chunk: int = 2048,
) -> tuple[Tensor, Tensor | None]:
    """Cross-entropy of every label of tokens (B, T) that counts, float32, in the order of the rows;
    and the balance loss (B,) of `hidden_states`.

    labels (B, T), on the CPU, stand at the position of their own token; negative ones do not count,
    nor does the first of a row. Logits exist for `chunk` tokens at a time and are computed again in
    backward."""
    targets = labels.roll(-1, dims=1)
    targets[:, -1] = -1
    targets = targets.flatten()
    where = (targets >= 0).nonzero()[:, 0]  # found on the CPU: no synchronisation
    hidden, balance_loss = model.hidden_states(tokens, balance=balance, checkpointing=checkpointing)
    hidden = hidden.flatten(0, 1)[where.to(hidden.device)]  # (M, D)
    targets = targets[where].to(hidden.device)

    def losses(hidden, targets):
        return F.cross_entropy(model.lm_head(hidden).float(), targets, reduction="none")

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
    finally:
        part.unlink(missing_ok=True)


def check_output_file(path: str | Path, inputs: list[str]) -> None:
    """Raises OSError or ValueError if `path` cannot become a file, or is one of `inputs`: better
    before the work than after it."""
    if Path(path).is_dir():
        raise IsADirectoryError(f"{path}: is a directory; a file name is required")
    if Path(path).resolve() in [Path(name).resolve() for name in inputs]:
        raise ValueError(f"{path}: is read by this command; another output is required")
    Path(path).parent.mkdir(parents=True, exist_ok=True)


def write_json(path: str | Path, value, indent: int | None = None) -> None:
    with replacing(path) as part:
        part.write_text(
            json.dumps(value, ensure_ascii=False, indent=indent) + "\n", encoding="utf-8"
        )


def tensor_files(directory: str | Path) -> dict[str, Path]:
    """Tensor name -> the safetensors file that holds it, for a checkpoint in one file or with an
    index."""
    directory = Path(directory)
    index = directory / "model.safetensors.index.json"
    if index.exists():
        content = read_json(index)
        weight_map = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{index}: field weight_map must map tensor names to files")
        for name, file in weight_map.items():
            if not isinstance(file, str) or Path(file).name != file:
                raise ValueError(
                    f"{index}: {name} is in {file!r}; must be a file in the same directory"
                )
            if not (directory / file).is_file():
                raise FileNotFoundError(f"{directory / file}: missing shard (it holds {name})")
        return {name: directory / file for name, file in weight_map.items()}
    single = directory / "model.safetensors"
    if not single.is_file():
        raise FileNotFoundError(
            f"{directory}: no model.safetensors and no model.safetensors.index.json"
        )
    with open_tensors(single) as file:
        return {name: single for name in file.keys()}


@contextmanager
def open_tensors(path: Path):
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path}: {error}") from None


def build_model(
    config: ModelConfig,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    experts: str = "auto",
) -> Transformer:
    """A Transformer with uninitialised weights on `device`, everything frozen. `experts`: "loop" or
    "grouped"; "auto" is grouped."""
    if experts not in ("auto", *EXPERT_PATHS):
        raise ValueError(f"experts is {experts!r}; must be auto, loop or grouped")
    with torch.device("meta"):
        model = Transformer(config).to(dtype).requires_grad_(False)
    if device != "meta":
        model.to_empty(device=device)
    for module in model.modules():
        if isinstance(module, MoE):
            module.run_experts = EXPERT_PATHS["grouped" if experts == "auto" else experts]
    return model


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
) -> Transformer:
    """The checkpoint in directory `path`, with `adapter` over it. Everything is frozen.

    Names and shapes are compared with the config before memory is taken; then each tensor is read
    once, straight to its place. Raises FileNotFoundError and ValueError that name file, tensor and
    shape."""
    path = Path(path)
    check_device(device)
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such checkpoint directory")
    config = ModelConfig.from_json(path / "config.json")
    files = tensor_files(path)
    expected = {name: p.shape for name, p in build_model(config, "meta").named_parameters()}
    if missing := sorted(expected.keys() - files.keys()):
        raise ValueError(f"{path}: {len(missing)} tensors are missing: {', '.join(missing[:5])}")
    if unexpected := sorted(files.keys() - expected.keys()):
        raise ValueError(
            f"{path}: {len(unexpected)} tensors do not belong to this config: "
            f"{', '.join(unexpected[:5])}"
        )
    by_file: dict[Path, list[str]] = {}
    for name, file in files.items():
        by_file.setdefault(file, []).append(name)
    for file, names in by_file.items():
        check_shapes(file, {name: expected[name] for name in names})
    model = build_model(config, device, dtype, experts)
    parameters = dict(model.named_parameters())
    for file, names in tqdm(by_file.items(), desc="load", unit="file", leave=False, disable=None):
        with open_tensors(file) as tensors, torch.no_grad():
            for name in names:
                parameters[name].copy_(tensors.get_tensor(name))
    if adapter is not None:
        load_adapter(model, adapter)
    return model


def check_shapes(file: Path, shapes: dict[str, torch.Size]) -> None:
    """Raises ValueError for a tensor that the safetensors file lacks or has in another shape or
    kind."""
    with open_tensors(file) as tensors:
        present = set(tensors.keys())
        for name, shape in shapes.items():
            if name not in present:
                raise ValueError(f"{file}: tensor {name} is missing")
            found = tensors.get_slice(name)
            if tuple(found.get_shape()) != tuple(shape):
                raise ValueError(
                    f"{file}: tensor {name} has shape {list(found.get_shape())}; "
                    f"the config asks for {list(shape)}"
                )
            if found.get_dtype() not in ("BF16", "F16", "F32"):
                raise ValueError(
                    f"{file}: tensor {name} is {found.get_dtype()}; supported: BF16, F16, F32"
                )


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
                f"experts: layer {layer!r} is not a MoE layer of this model "
                f"({config.moe_layers[0]} to {config.moe_layers[-1]})"
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
        if ".mlp.experts." in name:
            return name[: name.index(".", name.index(".mlp.experts.") + 13) + 1] in selected
        if ".mlp.shared_experts." in name:
            return expert_cfg.get("shared_experts", False)
        return expert_cfg.get("non_expert_modules", False)

    return {name: p for name, p in model.named_parameters() if is_trained(name)}


def mark_trainable(model: Transformer, expert_cfg: dict) -> None:
    """Sets requires_grad of every parameter: true for what `expert_cfg` selects, false for the
    rest."""
    trained = trained_parameters(model, expert_cfg)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)


def save_adapter(model: Transformer, expert_cfg: dict, directory: str | Path) -> None:
    """Writes the selected tensors in the published ESFT format: expert_cfg.json and
    adapter.safetensors."""
    tensors = {
        name: p.detach().cpu().clone() for name, p in trained_parameters(model, expert_cfg).items()
    }
    with replacing(Path(directory) / "adapter.safetensors") as part:
        save_file(tensors, part, metadata={"format": "pt"})
    write_json(Path(directory) / "expert_cfg.json", expert_cfg)


def read_adapter(directory: str | Path, config: ModelConfig) -> dict[str, Tensor]:
    """The tensors of an adapter, under this model's names, checked against its expert_cfg and the
    config.

    Reads every *.safetensors file of the directory, as the original code does. Version-1 adapters
    lack the prefix "model.". Raises FileNotFoundError, or ValueError that names file and tensor.
    """
    directory = Path(directory)
    expert_cfg = read_expert_cfg(directory / "expert_cfg.json", config)
    expected = {
        name: p.shape
        for name, p in trained_parameters(build_model(config, "meta"), expert_cfg).items()
    }
    tensors: dict[str, Tensor] = {}
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{directory}: an adapter needs a .safetensors file")
    for path in files:
        with open_tensors(path) as file:
            for stored in file.keys():
                name = "model." + stored if stored.startswith("layers.") else stored
                if name not in expected:
                    raise ValueError(
                        f"{path}: tensor {stored} is not selected by {directory}/expert_cfg.json"
                    )
                if name in tensors:
                    raise ValueError(
                        f"{path}: tensor {stored} is in another file of {directory}, too"
                    )
                tensor = file.get_tensor(stored)
                if tensor.dtype not in (torch.bfloat16, torch.float16, torch.float32):
                    raise ValueError(
                        f"{path}: tensor {stored} is {tensor.dtype}; a float is required"
                    )
                if tensor.shape != expected[name]:
                    raise ValueError(
                        f"{path}: tensor {stored} has shape {list(tensor.shape)}; "
                        f"the base model asks for {list(expected[name])}"
                    )
                tensors[name] = tensor
    if missing := sorted(expected.keys() - tensors.keys()):
        raise ValueError(
            f"{directory}: {len(missing)} selected tensors are missing: {', '.join(missing[:5])}"
        )
    return tensors


def load_adapter(model: Transformer, directory: str | Path) -> dict[str, Tensor]:
    """Puts an adapter's tensors in place and returns those that stood there, on the CPU: hand them
    to `put_tensors` to have the base back bit for bit. Nothing changes unless the whole adapter is
    right."""
    tensors = read_adapter(directory, model.config)
    parameters = dict(model.named_parameters())
    replaced = {name: parameters[name].detach().to("cpu", copy=True) for name in tensors}
    put_tensors(model, tensors)
    return replaced


def put_tensors(model: Transformer, tensors: dict[str, Tensor]) -> None:
    """Copies tensors into the parameters of the same names, in the parameters' dtype."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in tensors.items():
            parameters[name].copy_(tensor)


def merge(base: str | Path, adapter: str | Path, output: str | Path) -> None:
    """Writes `base` with the adapter's tensors in place as a complete checkpoint, file by file, in
    the base's dtypes. Config and tokenizer are copied; code is not. `output` appears when whole."""
    base, output = Path(base), Path(output)
    config = ModelConfig.from_json(base / "config.json")
    tensors = read_adapter(adapter, config)
    files = tensor_files(base)
    if missing := sorted(tensors.keys() - files.keys()):
        raise ValueError(
            f"{base}: {len(missing)} of the adapter's tensors are missing: {missing[0]}"
        )
    if output.exists() and any(output.iterdir()):
        raise FileExistsError(f"{output}: must be empty or not exist")
    part = output.with_name(f".{output.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    for path in tqdm(sorted(set(files.values())), desc="merge", unit="file", disable=None):
        with open_tensors(path) as file:
            merged = {name: file.get_tensor(name) for name in file.keys()}
        for name in merged.keys() & tensors.keys():
            merged[name] = tensors[name].to(merged[name].dtype)
        with replacing(part / path.name) as target:
            save_file(merged, target, metadata={"format": "pt"})
    for path in sorted(base.iterdir()):
        if path.suffix in (".json", ".jinja", ".txt", ".model") or path.name.startswith("LICENSE"):
            shutil.copyfile(path, part / path.name)
    os.replace(part, output)


def main() -> None:
    parser = argparse.ArgumentParser(prog="model.py", description="Work on checkpoints.")
    commands = parser.add_subparsers(dest="command", required=True)
    merging = commands.add_parser(
        "merge",
        help="write a base checkpoint with an adapter's experts in place",
        description="Writes a complete checkpoint, base and adapter in one, for use anywhere.",
    )
    merging.add_argument("--model", required=True, help="directory of the base checkpoint")
    merging.add_argument(
        "--adapter", required=True, help="directory with expert_cfg.json and .safetensors"
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
