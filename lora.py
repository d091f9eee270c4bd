"""LoRA (arXiv 2106.09685), the method that ESFT is compared with: y = W x + scaling * B A x in the
linear layers of a model. PEFT's files are in peft_format.py."""

import hashlib
import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fast.experts import StackedExperts, experts_grouped
from fast.lora import experts_with_lora, stack_lora
from fast.packed import PackedExperts
from model import Gate, LatentAttention, MoE, Transformer


class Update(NamedTuple):
    rank: int  # r in A (r, in) and B (out, r)
    scaling: float


def adaptable(model: Transformer) -> dict[str, nn.Module]:
    """Returns name -> module of all that can carry LoRA: `linears`, and routers, which PEFT's
    "all-linear" adapts, too."""
    modules = model.model.named_modules(prefix="model")
    return {n: m for n, m in modules if isinstance(m, nn.Linear | Gate) and ".lora_" not in n}


def linears(model: Transformer) -> dict[str, nn.Linear]:
    """Returns name -> Linear of all that `add_lora` adapts: attention, dense layers, shared and
    routed experts, but neither the head nor the router."""
    return {name: m for name, m in adaptable(model).items() if isinstance(m, nn.Linear)}


def add_lora_product(linear: nn.Linear, inputs: tuple[Tensor], output: Tensor) -> Tensor:
    """The forward hook of a Linear with LoRA: W x -> W x + scaling * B A x."""
    return output + linear.lora_scaling * linear.lora_B(linear.lora_A(*inputs))


def weight_with_lora(module: nn.Module) -> Tensor:
    """Returns W + scaling * B A, where a weight is used without calling a Linear, so that the hook
    does not run: in a router, and in place of `LatentAttention.up_projection`."""
    A, B = module.lora_A.weight, module.lora_B.weight
    return torch.addmm(module.weight, B, A, alpha=module.lora_scaling)


def router_logits_with_lora(gate: Gate, router_logits: Callable, x: Tensor, weight: Tensor):
    """In place of `Gate.router_logits`, which is passed on."""
    return router_logits(x, weight_with_lora(gate))


def attach_lora(model: Transformer, updates: dict[str, Update]) -> None:
    """Gives the Linears and routers of these names a frozen A and B, not yet filled. Raises
    ValueError for experts that rest packed."""
    if any(isinstance(module, PackedExperts) for module in model.modules()):
        raise ValueError("LoRA cannot be over quantised experts; it needs quantize empty")
    carriers = {m: updates[name] for name, m in adaptable(model).items() if name in updates}
    for module, update in carriers.items():
        module.lora_scaling = update.scaling
        if isinstance(module, Gate):
            module.router_logits = partial(router_logits_with_lora, module, module.router_logits)
        else:
            module.lora_hook = module.register_forward_hook(add_lora_product)
    for moe in model.modules():
        if isinstance(moe, MoE) and isinstance(moe.experts, StackedExperts):
            linears = carriers.keys() & set(moe.experts.modules())
            if linears:
                stack_lora(moe.experts, {linear: carriers.pop(linear).rank for linear in linears})
                if moe.run_experts is experts_grouped:
                    moe.run_experts = experts_with_lora
    for module, (rank, _) in carriers.items():  # outside of stacks
        out_features, in_features = module.weight.shape
        for half, width, height in (("lora_A", in_features, rank), ("lora_B", rank, out_features)):
            # On the meta device: its own start would draw from torch's global generator.
            product = nn.Linear(width, height, bias=False, device="meta")
            values = module.weight.new_empty(height, width)
            product.weight = nn.Parameter(values, requires_grad=False)
            module.add_module(half, product)
    for module in model.modules():
        if isinstance(module, LatentAttention) and hasattr(module.kv_b_proj, "lora_A"):
            module.up_projection = partial(weight_with_lora, module.kv_b_proj)


def add_lora(model: Transformer, rank: int, scaling: float, seed: int = 0) -> None:
    """Adds LoRA to every Linear but head and router, routed and shared experts included (the paper:
    rank 8, scaling 2). A and B are trained, in W's dtype. Everything else is frozen.

    B starts at zero, and A uniform within 1 / sqrt(in), as in PEFT. A is drawn by seed and name, so
    it is the same on every device and whatever else the model holds. Raises ValueError for a rank
    below 1, a scaling that is not finite, or a model that carries LoRA."""
    if type(rank) is not int or rank < 1:
        raise ValueError(f"rank is {rank!r}; must be an integer from 1")
    if not math.isfinite(scaling):
        raise ValueError(f"scaling is {scaling!r}; must be a finite number")
    if lora_parameters(model):
        raise ValueError("the model carries LoRA already; remove_lora takes it off")
    model.requires_grad_(False)
    attach_lora(model, dict.fromkeys(linears(model), Update(rank, scaling)))
    for name, parameter in lora_parameters(model).items():
        whole(parameter).requires_grad_(True)
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
    """Takes all LoRA off. The base's own tensors were never touched."""
    for module in model.modules():
        if isinstance(module, MoE) and module.run_experts is experts_with_lora:
            module.run_experts = experts_grouped
        elif isinstance(module, LatentAttention):
            vars(module).pop("up_projection", None)
        elif isinstance(module, StackedExperts):
            for name, _ in list(module.named_parameters(recurse=False)):  # LoRA's stacks
                delattr(module, name)
    for module in adaptable(model).values():
        if not hasattr(module, "lora_A"):
            continue
        if isinstance(module, Gate):
            module.router_logits = module.router_logits.args[1]
        else:
            module.lora_hook.remove()
            del module.lora_hook
        del module.lora_A, module.lora_B, module.lora_scaling


def lora_parameters(model: Transformer) -> dict[str, Tensor]:
    """Returns name -> A or B of every Linear and router, in the model's order, with names like
    model.layers.0.self_attn.q_proj.lora_A.weight. Where experts lie side by side, so do their A and
    B: these tensors are views of a parameter, see `whole`."""
    return {
        f"{name}.{half}.weight": getattr(module, half).weight
        for name, module in adaptable(model).items()
        if hasattr(module, "lora_A")
        for half in ("lora_A", "lora_B")
    }


def whole(parameter: Tensor) -> nn.Parameter:
    """Returns the parameter that a tensor is, or is a view of."""
    return parameter if parameter._base is None else parameter._base
