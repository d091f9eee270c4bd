"""What counts as a GPU, and as a step of few tokens, in fast/; whether torch.compile works here."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fast import kernels

# Up to this number of tokens a step waits for the weights of the experts, not for arithmetic.
FEW_TOKENS = 128

_meta_is_gpu = False


def on_gpu(x: Tensor) -> bool:
    return x.is_cuda or (x.is_meta and _meta_is_gpu)


_kernels_run: dict[torch.device, bool] = {}


def kernels_run(device: torch.device) -> bool:
    """Whether Triton's kernels run on this GPU. Says once why they do not: Triton may be missing,
    or the C compiler that it needs."""
    if device not in _kernels_run:
        try:
            kernels.invert(torch.zeros(1, dtype=torch.int64, device=device))
            _kernels_run[device] = True
        except Exception as error:  # Triton's own kinds, and those of what it calls
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            print(f"{device}: without the kernels of fast/kernels.py, which is slower: {reason}")
            _kernels_run[device] = False
    return _kernels_run[device]


def has_kernels(x: Tensor) -> bool:
    """Whether fast/kernels.py serves x. A plan, on the meta device, assumes so of a GPU."""
    return on_gpu(x) and (x.is_meta or kernels_run(x.device))


@contextmanager
def meta_as_gpu(like_gpu: bool) -> Iterator[None]:
    """Lets tensors on the meta device take the GPU's path, if `like_gpu`, for a plan."""
    global _meta_is_gpu
    before, _meta_is_gpu = _meta_is_gpu, like_gpu
    try:
        yield
    finally:
        _meta_is_gpu = before


def stays_on_device(x: Tensor) -> bool:
    """Whether code may not read values of x on the host: that waits for a GPU, and ends a graph."""
    return on_gpu(x) or torch.compiler.is_compiling()


def compiling_for_few(x: Tensor) -> bool:
    """Whether torch.compile traces this code for few tokens x (N, ...), as in decoding. Comparisons
    and sums that melt into one kernel then beat the library's kernels."""
    return torch.compiler.is_compiling() and len(x) <= FEW_TOKENS


def compiler_error(device: str | torch.device) -> str:
    """Returns why torch.compile does not work here: no C++ compiler, say. Empty if it works."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(8, device=device))
    except Exception as error:  # the compiler's own kinds, and those of what it calls
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    return ""
