"""`optimizer_device = "cpu"`: masters, moments and sums of gradients rest in host memory, and AdamW
runs there. The device then holds nothing of what is trained but weights, and the gradients of a
moment."""

import math
import os
from collections import deque
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from training.config import TrainConfig
from training.optimizer import MasterAdamW

PIECE = 2**26  # elements of pinned memory in one piece
UNDER_WAY = 2**26  # elements of gradients that wait on the device, while the host may go on
MEMINFO, CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")


class HostAdamW(MasterAdamW):
    """MasterAdamW in host memory, with the same bits if it runs on the same CPU.

    A hook takes each gradient when backward has formed it. While the device goes on, the sum so far
    comes there, gets the gradient, and goes back. So the sums take none of the host's cores, which
    have to keep the device busy."""

    def __init__(self, parameters: dict[str, nn.Parameter], config: TrainConfig):
        super().__init__(parameters, config)
        self.on_gpu = config.device.startswith("cuda")
        for number, (name, p) in enumerate(parameters.items()):
            p.register_post_accumulate_grad_hook(partial(self.take, name, number))
        if config.device == "meta":
            return  # a plan has no sums
        self.sums = in_host_memory(parameters, pinned=self.on_gpu)
        # Two, so that one sum comes while another one goes back.
        self.streams = [torch.cuda.Stream(config.device) for _ in range(2 * self.on_gpu)]
        self.under_way: deque[tuple[torch.cuda.Event, int]] = deque()
        self.waiting = 0  # elements of these gradients

    def make_masters(self) -> dict[str, Tensor]:
        if any(p.is_meta for p in self.parameters.values()):
            return super().make_masters()
        pinned = any(p.is_cuda for p in self.parameters.values())
        masters = in_host_memory(self.parameters, pinned)
        for name, p in self.parameters.items():
            masters[name].copy_(p.detach())
        return masters

    @torch.no_grad()
    def take(self, name: str, number: int, p: nn.Parameter) -> None:
        """Takes the gradient away from `p` and adds it to its sum."""
        gradient, p.grad = p.grad, None
        if p.is_meta:
            return
        master, total = self.masters[name], self.sums[name]
        first, master.grad = master.grad is None, total
        if not self.on_gpu:
            total.copy_(gradient) if first else total.add_(gradient)
            return
        stream = self.streams[number % 2]  # always the same, so that sums follow each other
        stream.wait_stream(torch.cuda.current_stream(p.device))
        gradient.record_stream(stream)  # its memory is not used anew before the sum is formed
        with torch.cuda.stream(stream):
            here = gradient.float() if first else total.to(p.device, non_blocking=True)
            total.copy_(here if first else here.add_(gradient), non_blocking=True)
            done = torch.cuda.Event(blocking=True)
            done.record(stream)
        self.under_way.append((done, p.numel()))
        self.waiting += p.numel()
        while self.waiting > UNDER_WAY:  # else a slow link would fill the device's memory
            done, count = self.under_way.popleft()
            done.synchronize()
            self.waiting -= count

    def accumulate(self) -> None:
        """Does nothing: the hooks have taken the gradients."""

    @property
    def gradients(self) -> dict[str, Tensor]:
        if self.on_gpu:
            for stream in self.streams:
                stream.synchronize()
            self.under_way.clear()
            self.waiting = 0
        for name, master in self.masters.items():
            if master.grad is None:  # no token reached it
                master.grad = self.sums[name].zero_()
        return super().gradients

    def copy_masters(self) -> None:
        for name, p in self.parameters.items():
            p.copy_(self.masters[name].to(p.device, non_blocking=True))
        if self.on_gpu:  # the next step writes the masters
            torch.cuda.synchronize()


def make_optimizer(parameters: dict[str, nn.Parameter], config: TrainConfig) -> MasterAdamW:
    """Returns the optimizer that rests where the config says."""
    kind = HostAdamW if config.optimizer_device else MasterAdamW
    return kind(parameters, config)


def in_host_memory(parameters: dict[str, nn.Parameter], pinned: bool) -> dict[str, Tensor]:
    """Returns an uninitialised float32 tensor for each parameter. They lie in few pieces: each
    piece of pinned memory is rounded up to a power of two. A GPU copies to and from pinned memory
    while it computes."""
    tensors, left = {}, sum(p.numel() for p in parameters.values())
    piece = torch.empty(0)
    for name, p in parameters.items():
        if p.numel() > len(piece):
            piece = torch.empty(max(p.numel(), min(left, PIECE)), pin_memory=pinned)
        tensors[name], piece = piece[: p.numel()].view(p.shape), piece[p.numel() :]
        left -= p.numel()
    return tensors


# ------------------------------------------------------------------------------------------
# Memory


def host_bytes(parameters: dict[str, nn.Parameter]) -> int:
    """Returns the bytes of masters, two moments, and sums of gradients."""
    return 16 * sum(p.numel() for p in parameters.values())


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
