"""`optimizer_device = "cpu"`: masters, moments and sums of gradients rest in host memory, and AdamW
runs there. The device then holds nothing of what is trained but weights, and the gradients of a
moment."""

import math
import os
from collections import deque
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor, nn

from processes import SingleProcess
from training.config import TrainConfig
from training.optimizer import MasterAdamW, own_part, wholes
from training.replicas import on_gradient, parts_of

GROUP = 2**25  # elements, at most, of parameters whose gradients are summed together
UNDER_WAY = 2**26  # elements of gradients that wait on the device, while the host may go on
Group = dict[str, nn.Parameter]
MEMINFO, CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")


class HostAdamW(MasterAdamW):
    """MasterAdamW in host memory. On a CPU, its results have the bits of MasterAdamW's.

    It takes each gradient when backward has formed it (of what several ranks hold, their sums from
    replicas.py). When those of a group are there, and
    while the device goes on, the group's sums so far come to the device, get the gradients, and go
    back. So the sums take none of the host's cores, which have to keep the device busy."""

    def __init__(
        self,
        trained: dict[str, Tensor],
        config: TrainConfig,
        ranks: SingleProcess = SingleProcess(),
    ):
        self.groups = groups_of(own_part(wholes(trained), ranks))
        self.device, self.on_gpu = config.device, config.device.startswith("cuda")
        super().__init__(trained, config, ranks)
        self.number = {name: i for i, group in enumerate(self.groups) for name in group}
        shared = {name for share in self.shares for name in share.parameters}
        for name in self.own.keys() - shared:
            on_gradient(self.own[name], self.take_from, name)
        self.arrived: dict[int, dict[str, Tensor]] = {}  # gradients of groups, until all are there
        self.rehearses = config.device == "meta"
        if self.rehearses:
            return  # a plan has no sums
        self.sums = [self.in_host_memory(group) for group in self.groups]
        # Two, so that sums come while others go back.
        self.streams = [torch.cuda.Stream(config.device) for _ in range(2 * self.on_gpu)]
        self.under_way: deque[tuple[torch.cuda.Event, int]] = deque()
        self.waiting = 0  # elements of these gradients

    def in_host_memory(self, group: Group) -> Tensor:
        """Returns uninitialised float32 memory for a group. A GPU copies to and from pinned memory
        while it computes."""
        return torch.empty(sum(p.numel() for p in group.values()), pin_memory=self.on_gpu)

    def make_masters(self) -> dict[str, Tensor]:
        masters = {}
        for group in self.groups:
            if any(p.is_meta for p in group.values()):
                return super().make_masters()
            masters |= parts_of(self.in_host_memory(group), group)
        for name, master in masters.items():
            master.copy_(self.parameters[name].detach())
        return masters

    def take_from(self, name: str, p: nn.Parameter) -> None:
        """Takes the gradient away from `p`."""
        gradient, p.grad = p.grad, None
        self.take({name: gradient})

    def take(self, gradients: dict[str, Tensor]) -> None:
        """Adds gradients by name to the sums, when all of a group are there."""
        for name, gradient in gradients.items():
            number = self.number[name]
            arrived = self.arrived.setdefault(number, {})
            arrived[name] = gradient
            if len(arrived) == len(self.groups[number]):
                self.add(number)

    @torch.no_grad()
    def add(self, number: int) -> None:
        """Adds the gradients that arrived to the sums of a group."""
        arrived, group = self.arrived.pop(number), self.groups[number]
        if self.rehearses:  # what `here` needs below
            torch.empty(sum(p.numel() for p in group.values()), device="meta")
            return
        total = self.sums[number]
        first = self.masters[next(iter(group))].grad is None
        for name, part in parts_of(total, group).items():
            self.masters[name].grad = part
        if not self.on_gpu:
            add_to(total.zero_() if first else total, group, arrived)
            return
        stream = self.streams[number % 2]  # always the same, so that sums follow each other
        stream.wait_stream(torch.cuda.current_stream(stream.device))
        with torch.cuda.stream(stream):
            here = torch.empty_like(total, device=stream.device)
            here.zero_() if first else here.copy_(total, non_blocking=True)
            add_to(here, group, arrived)
            total.copy_(here, non_blocking=True)
            done = torch.cuda.Event(blocking=True)
            done.record(stream)
        for gradient in arrived.values():  # its memory is not used anew before the sum is formed
            gradient.record_stream(stream)
        self.under_way.append((done, total.numel()))
        self.waiting += total.numel()
        while self.waiting > UNDER_WAY:  # else a slow link would fill the device's memory
            done, count = self.under_way.popleft()
            done.synchronize()
            self.waiting -= count

    def accumulate(self) -> None:
        """Adds what arrived in groups that some gradients did not reach."""
        self.shared.finish()
        for number in list(self.arrived):
            self.add(number)

    @property
    def gradients(self) -> dict[str, Tensor]:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)
            self.under_way.clear()
            self.waiting = 0
        for group, total in zip(self.groups, self.sums):
            if self.masters[next(iter(group))].grad is None:  # no token reached it
                total.zero_()
                for name, part in parts_of(total, group).items():
                    self.masters[name].grad = part
        return super().gradients

    def copy_masters(self) -> None:
        for name, p in self.own.items():
            p.copy_(self.masters[name].to(p.device, non_blocking=True))
        if self.on_gpu:  # the next step writes the masters
            torch.cuda.synchronize(self.device)


def make_optimizer(
    trained: dict[str, Tensor], config: TrainConfig, ranks: SingleProcess = SingleProcess()
) -> MasterAdamW:
    """Returns the optimizer, of what `mark_trained` returned, that rests where the config says."""
    kind = HostAdamW if config.optimizer_device else MasterAdamW
    return kind(trained, config, ranks)


def groups_of(parameters: Group) -> list[Group]:
    """Returns the parameters in groups of up to GROUP elements, in their order."""
    groups: list[Group] = []
    for name, p in parameters.items():
        if not groups or sum(q.numel() for q in groups[-1].values()) + p.numel() > GROUP:
            groups.append({})
        groups[-1][name] = p
    return groups


def add_to(total: Tensor, group: Group, gradients: dict[str, Tensor]) -> None:
    parts = parts_of(total, group)
    torch._foreach_add_([parts[name] for name in gradients], [*gradients.values()])


# ------------------------------------------------------------------------------------------
# Memory


def host_bytes(trained: dict[str, Tensor], ranks: SingleProcess) -> int:
    """Returns the bytes of this rank's two moments, and masters and sums of gradients, each in
    float32. torch takes pinned memory by powers of two."""
    groups = groups_of(own_part(wholes(trained), ranks))
    sizes = [sum(p.numel() for p in group.values()) for group in groups]
    return 8 * sum(sizes) + 8 * sum(2 ** math.ceil(math.log2(size)) for size in sizes)


def check_host_memory(
    trained: dict[str, Tensor], config: TrainConfig, ranks: SingleProcess
) -> None:
    """Raises ValueError if this host has too little memory for the optimizer. All ranks must be
    asked before one of them allocates."""
    if not config.optimizer_device:
        return
    count = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    first = ranks.rank // count * count  # of this host
    of_host = ranks.from_all(host_bytes(trained, ranks))[first : first + count]
    need, left = sum(of_host), available_bytes()
    if need > left:
        of_ranks = f" of {count} ranks" if count > 1 else ""
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
