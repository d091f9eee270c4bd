"""`optimizer_device = "cpu"`: masters, moments and sums of gradients rest in host memory, and AdamW
runs there. The device then holds nothing of what is trained but weights, and the gradients of a
moment."""

import math
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from queue import Queue

import torch
from torch import Tensor, nn

from training.config import TrainConfig
from training.optimizer import MasterAdamW

SLOT_BYTES = 2**29  # of all slots together, unless two of the largest parameter need more
MEMINFO, CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")


class HostAdamW(MasterAdamW):
    """MasterAdamW in host memory, with the same bits if it runs on the same CPU.

    When backward has formed a gradient, a hook copies it to a slot and frees it. One worker thread
    adds slot after slot to the sums. So the host sums while the GPU computes, always in the same
    order. As there are few slots, a slow host makes the GPU wait and does not run out of memory."""

    def __init__(self, parameters: dict[str, nn.Parameter], config: TrainConfig):
        super().__init__(parameters, config)
        for name, p in parameters.items():
            p.register_post_accumulate_grad_hook(partial(self.take, name))
        if config.device == "meta":
            return  # a plan copies nothing
        on_gpu = config.device.startswith("cuda")
        # A GPU copies to pinned memory while it computes.
        slots = torch.empty(slots_of(parameters), dtype=torch.uint8, pin_memory=on_gpu)
        self.free: Queue[Tensor] = Queue()
        for slot in slots:
            self.free.put(slot)
        self.stream = torch.cuda.Stream(config.device) if on_gpu else None
        self.worker = ThreadPoolExecutor(1)
        self.pending: list[Future] = []
        # Kept, because new memory in each step costs a second of page faults.
        self.sums = {name: torch.empty_like(master) for name, master in self.masters.items()}

    def make_master(self, p: nn.Parameter) -> Tensor:
        return p.detach().to("meta" if p.is_meta else "cpu", torch.float32, copy=True)

    def take(self, name: str, p: nn.Parameter) -> None:
        """Frees the gradient of `p`, after a copy that the worker adds to its sum. Waits for a free
        slot."""
        gradient, p.grad = p.grad, None
        if p.is_meta:
            return
        slot = self.free.get()
        copy = slot_like(slot, p)
        if p.is_cuda:
            self.stream.wait_stream(torch.cuda.current_stream(p.device))
            gradient.record_stream(self.stream)  # its memory is not used anew before the copy ends
        with torch.cuda.stream(self.stream):  # None changes nothing
            copy.copy_(gradient, non_blocking=True)
            self.after_copy(p, slot, partial(self.add, name, copy))

    def add(self, name: str, gradient: Tensor) -> None:
        master = self.masters[name]
        if master.grad is None:
            master.grad = self.sums[name].copy_(gradient)
        else:
            master.grad.add_(gradient)

    def after_copy(self, p: nn.Parameter, slot: Tensor, work: Callable = lambda: None) -> None:
        """Lets the worker do `work` and free the slot, once the copies are done that were started
        on the current stream."""
        copied = torch.cuda.Event(blocking=True) if p.is_cuda else None
        if copied:
            copied.record(torch.cuda.current_stream(p.device))

        def run() -> None:
            try:
                if copied:
                    with torch.cuda.device(p.device):  # else this thread would open GPU 0, too
                        copied.synchronize()
                work()
            finally:  # after an error, too: a backward that waits for a slot would wait forever
                self.free.put(slot)

        self.pending.append(self.worker.submit(run))

    def accumulate(self) -> None:
        """Does nothing: the hooks have taken the gradients."""

    @property
    def gradients(self) -> dict[str, Tensor]:
        for work in self.pending:
            work.result()  # waits, and raises an error of the worker
        self.pending.clear()
        for name, master in self.masters.items():
            if master.grad is None:  # no token reached it
                master.grad = self.sums[name].zero_()
        return super().gradients

    def copy_masters(self) -> None:
        for name, p in self.parameters.items():
            slot = self.free.get()
            p.copy_(slot_like(slot, p).copy_(self.masters[name]), non_blocking=True)
            self.after_copy(p, slot)


def make_optimizer(parameters: dict[str, nn.Parameter], config: TrainConfig) -> MasterAdamW:
    """Returns the optimizer that rests where the config says."""
    kind = HostAdamW if config.optimizer_device else MasterAdamW
    return kind(parameters, config)


# ------------------------------------------------------------------------------------------
# Memory


def slots_of(parameters: dict[str, nn.Parameter]) -> tuple[int, int]:
    """Returns the number of slots, and the bytes of each: those of the largest parameter."""
    size = max((p.nbytes for p in parameters.values()), default=0)
    return max(2, min(len(parameters), SLOT_BYTES // max(size, 1))), size


def slot_like(slot: Tensor, p: nn.Parameter) -> Tensor:
    """Returns the slot's first bytes in the shape and dtype of `p`."""
    return slot[: p.nbytes].view(p.dtype).view(p.shape)


def host_bytes(parameters: dict[str, nn.Parameter]) -> int:
    """Returns the bytes of masters, two moments, sums of gradients, and slots."""
    return 16 * sum(p.numel() for p in parameters.values()) + math.prod(slots_of(parameters))


def check_host_memory(parameters: dict[str, nn.Parameter], config: TrainConfig) -> None:
    """Raises ValueError if this host has too little memory for the optimizer. All ranks must be
    asked before one of them allocates."""
    if not config.optimizer_device:
        return
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    need, left = ranks * host_bytes(parameters), available_bytes()
    if need > left:
        of_ranks = f" of {ranks} ranks" if ranks > 1 else ""
        needed = (
            f"needs {need / 2**30:.1f} GiB of host memory, {left / 2**30:.1f} GiB are available"
        )
        raise ValueError(
            f"optimizer_device is {config.optimizer_device!r}; the optimizer{of_ranks} {needed}: "
            "train fewer parameters, or leave optimizer_device empty"
        )


def available_bytes() -> float:
    """Returns the memory that is left on this host and in this container (cgroup v2); infinity if
    neither says it."""
    left = math.inf
    with suppress(OSError, KeyError):
        left = 1024 * read_numbers(MEMINFO)["MemAvailable:"]
    with suppress(OSError, KeyError, ValueError):  # the limit may be "max"
        limit = int((CGROUP / "memory.max").read_text())
        left = min(left, limit - read_numbers(CGROUP / "memory.stat")["anon"])
    return left


def read_numbers(path: Path) -> dict[str, int]:
    """Returns the numbers of a file with lines of a name and a number."""
    return {words[0]: int(words[1]) for words in map(str.split, path.read_text().splitlines())}
