"""Faster versions of functions of model.py, one file a concern, with the same results up to
rounding. `install` puts them into a model; the loss, compiled blocks and decoding are called.
`quantize` lets experts rest in fewer bits."""

from fast.attention import attend, attend_cache, group_documents
from fast.compiled import compiled_blocks
from fast.experts import StackedExperts, experts_grouped
from fast.gate import router_logits, top_experts
from fast.loss import token_losses
from fast.packed import quantize
from model import Gate, LatentAttention, MoE, MultiHeadAttention, Transformer

__all__ = ["StackedExperts", "compiled_blocks", "install", "quantize", "token_losses"]


def install(model: Transformer) -> None:
    """Lays the experts' weights of each layer side by side, and puts faster functions in place of
    those of model.py. The experts' parameters keep their names and become views of that memory. Do
    not copy.deepcopy the model: the copies would not share memory with the stacks."""
    model.document_mask = group_documents
    for module in model.modules():
        if isinstance(module, MultiHeadAttention | LatentAttention):
            module.attend, module.attend_cache = attend, attend_cache
        elif isinstance(module, Gate):
            module.router_logits, module.top_experts = router_logits, top_experts
        elif isinstance(module, MoE):
            module.experts = StackedExperts(module.experts)
            module.run_experts = experts_grouped
