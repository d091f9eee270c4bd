"""Blocks through torch.compile: a few graphs serve all layers of a model."""

from collections.abc import Callable
from functools import cache

import torch

from fast.attention import Documents, on_hopper
from fast.device import kernels_run
from fast.experts import trained_prefix, trained_stacks
from fast.lora import FAST
from fast.packed import PackedExperts, UnpackAgain
from model import Block, MoE, RunBlock, Transformer


@cache
def compiled_block(tuned: bool) -> Callable:
    """Returns `Block.forward`, compiled for each shape: one graph for dense and one for MoE layers.
    Training adds two: for layers before the first trained expert, and for the first layer with one.
    `tuned` lets the compiler try several sizes for each kernel, for half a minute more."""
    # Each shape needs a graph. Beyond torch's limit of 8, blocks would run uncompiled.
    torch._dynamo.config.recompile_limit = 64
    for asks_machine in (kernels_run, on_hopper):  # here, as it imports the compiler, for a second
        torch.compiler.assume_constant_result(asks_machine)
    # A kernel that sums along both dimensions, as it serves trained norms, may write wrong
    # gradients without an error (pytorch 193061).
    options = {"triton.mix_order_reduction": False, "coordinate_descent_tuning": tuned}
    return torch.compile(Block.forward, dynamic=False, options=options)


def compiled_blocks(model: Transformer, tokens: int | None = None) -> RunBlock:
    """Returns a `run_block` that runs compiled blocks. In training make a new one for each forward
    pass, since it knows which experts are trained now. `tokens` is how many a decoding step has."""
    moes = [block.mlp for block in model.model.layers if isinstance(block.mlp, MoE)]
    stacked = {moe: moe.experts for moe in moes if moe.run_experts in FAST}
    whole = {moe: experts for moe, experts in stacked.items() if experts.is_whole}
    # One length for all layers, so that one graph serves all.
    length = max(map(trained_prefix, whole.values()), default=0)
    # Tuning makes a decoding step a tenth faster if it reads some of a layer's experts only.
    few = tokens is not None and all(
        tokens * moe.config.num_experts_per_tok < moe.config.n_routed_experts for moe in moes
    )
    compiled = compiled_block(tuned=few)

    def run_block(block: Block, *args):
        args = [each.blocks if isinstance(each, Documents) else each for each in args]
        if block.mlp in whole:  # made here, outside of the graph, while the GPU works
            whole[block.mlp].trained = trained_stacks(whole[block.mlp], length)
        experts = whole.get(block.mlp)
        if not isinstance(experts, PackedExperts):
            return compiled(block, *args)
        experts.unpack()
        x, *rest = compiled(block, *args)
        return UnpackAgain.apply(x, experts), *rest

    return run_block
