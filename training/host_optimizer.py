"""`optimizer_device = "cpu"`: masters, moments and sums of gradients rest in host memory, and AdamW
runs there. The device then holds nothing of what is trained but weights, and the gradients of a
moment."""

import math
import os
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import accumulate
from pathlib import Path
from queue import Queue

import torch
from torch import Tensor, nn

from training.config import TrainConfig
from training.optimizer import MasterAdamW

SLOTS, SLOT_ELEMENTS = 8, 2**26  # 1 GiB in bfloat16: what the host lags behind in a backward
MEMINFO, CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")


class HostAdamW(MasterAdamW):
    """MasterAdamW in host memory, with the same bits if it runs on the same CPU.

    When backward has formed the gradients that fill a slot, they are copied to it and freed. One
    worker thread adds slot after slot to the sums. So the host sums while the GPU computes, always
    in the same order. As there are few slots, a slow host makes the GPU wait and does not run out
    of memory."""

    def __init__(self, parameters: dict[str, nn.Parameter], config: TrainConfig):
        super().__init__(parameters, config)
        self.arrived: list[tuple[str, Tensor]] = []  # gradients that wait until they fill a slot
        self.filled = 0  # elements of these
        for name, p in parameters.items():
            p.register_post_accumulate_grad_hook(partial(self.take, name))
        count, self.size = slots_of(parameters)
        self.rehearses = config.device == "meta"
        if self.rehearses:
            return
        on_gpu = config.device.startswith("cuda")
        dtype = next((p.dtype for p in parameters.values()), None)
        # A GPU copies to pinned memory while it computes.
        slots = torch.empty(count, self.size, dtype=dtype, pin_memory=on_gpu)
        self.free: Queue[Tensor] = Queue()
        for slot in slots:
            self.free.put(slot)
        self.stream = torch.cuda.Stream(config.device) if on_gpu else None
        # Half of the cores: the threads that keep the GPU busy need some, too.
        share = max(torch.get_num_threads() // 2, 1)
        self.worker = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(share,))
        self.pending: list[Future] = []
        # Kept, because new memory in each step costs a second of page faults.
        self.sums = {name: torch.empty_like(master) for name, master in self.masters.items()}

    def make_master(self, p: nn.Parameter) -> Tensor:
        return p.detach().to("meta" if p.is_meta else "cpu", torch.float32, copy=True)

    def take(self, name: str, p: nn.Parameter) -> None:
        """Takes the gradient away from `p`."""
        if p.grad is None:  # in a plan, the hook of an earlier rehearsal was first
            return
        if self.filled + p.numel() > self.size:
            self.accumulate()
        self.arrived.append((name, p.grad))
        self.filled += p.numel()
        p.grad = None

    def accumulate(self) -> None:
        """Copies the gradients that arrived to a slot, which the worker adds to the sums. Waits for
        a free slot."""
        arrived, self.arrived, self.filled = self.arrived, [], 0
        if not arrived or self.rehearses:
            return
        names, gradients = zip(*arrived)
        slot = self.free.get()
        copies = parts_of(slot, gradients)
        if self.stream:
            self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
            for gradient in gradients:  # its memory is not used anew before the copy ends
                gradient.record_stream(self.stream)
        with torch.cuda.stream(self.stream):  # None changes nothing
            torch._foreach_copy_(copies, gradients, non_blocking=True)
            self.after_copies(slot, partial(self.add, names, copies))

    def add(self, names: list[str], gradients: list[Tensor]) -> None:
        """Adds gradients to their sums, many in one call: between calls this thread may have to
        wait for Python's lock."""
        pairs = [(self.masters[name], self.sums[name], g) for name, g in zip(names, gradients)]
        if new := [(total, g) for master, total, g in pairs if master.grad is None]:
            torch._foreach_copy_(*map(list, zip(*new)))
        if more := [(total, g) for master, total, g in pairs if master.grad is not None]:
            torch._foreach_add_(*map(list, zip(*more)))
        for master, total, _ in pairs:
            master.grad = total

    def after_copies(self, slot: Tensor, work: Callable = lambda: None) -> None:
        """Lets the worker do `work` and free the slot, once the copies are done that were started
        on the current stream."""
        copied = None
        if self.stream:
            copied = torch.cuda.Event(blocking=True)
            copied.record(torch.cuda.current_stream(self.stream.device))

        def run() -> None:
            try:
                if copied:
                    with torch.cuda.device(self.stream.device):  # else it would open GPU 0, too
                        copied.synchronize()
                work()
            finally:  # after an error, too: a backward that waits for a slot would wait forever
                self.free.put(slot)

        self.pending.append(self.worker.submit(run))

    @property
    def gradients(self) -> dict[str, Tensor]:
        self.accumulate()
        for work in self.pending:
            work.result()  # waits, and raises an error of the worker
        self.pending.clear()
        for name, master in self.masters.items():
            if master.grad is None:  # no token reached it
                master.grad = self.sums[name].zero_()
        return super().gradients

    def copy_masters(self) -> None:
        names = list(self.parameters)
        while names:
            ends = accumulate(self.parameters[name].numel() for name in names)
            count = sum(end <= self.size for end in ends)
            group, names = names[:count], names[count:]
            parameters = [self.parameters[name] for name in group]
            slot = self.free.get()
            copies = parts_of(slot, parameters)
            torch._foreach_copy_(copies, [self.masters[name] for name in group])
            torch._foreach_copy_(parameters, copies, non_blocking=True)
            self.after_copies(slot)


def make_optimizer(parameters: dict[str, nn.Parameter], config: TrainConfig) -> MasterAdamW:
    """Returns the optimizer that rests where the config says."""
    kind = HostAdamW if config.optimizer_device else MasterAdamW
    return kind(parameters, config)


# ------------------------------------------------------------------------------------------
# Memory


def slots_of(parameters: dict[str, nn.Parameter]) -> tuple[int, int]:
    """Returns the number of slots, and how many elements each has: at least those of the largest
    parameter."""
    sizes = [p.numel() for p in parameters.values()]
    return SLOTS, max([min(SLOT_ELEMENTS, sum(sizes)), *sizes])


def parts_of(slot: Tensor, like: Iterable[Tensor]) -> list[Tensor]:
    """Returns parts of a slot in the shapes of `like`."""
    sizes = [x.numel() for x in like]
    return [part.view(x.shape) for part, x in zip(slot[: sum(sizes)].split(sizes), like)]


def host_bytes(parameters: dict[str, nn.Parameter]) -> int:
    """Returns the bytes of masters, two moments, sums of gradients, and slots."""
    itemsize = max((p.itemsize for p in parameters.values()), default=0)
    slots = itemsize * math.prod(slots_of(parameters))
    return 16 * sum(p.numel() for p in parameters.values()) + slots


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
