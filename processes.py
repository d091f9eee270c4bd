"""Processes that work together: one alone, or those that torchrun started. They meet here, pass
values to each other and say how they end. Code that may run on several ranks does not know which
kind it has. What a model that is spread over ranks needs is in train_ep.py."""

import os
import sys
import time
import traceback
import uuid
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Holders(NamedTuple):
    """The ranks that hold a parameter."""

    kind: str  # differs where the ranks differ
    place: int | None  # of this rank among them; None in a plan: the one that updates the most
    count: int


class SingleProcess:
    """One process: there is nothing to agree on."""

    rank, world_size = 0, 1
    replica, replicas = 0, 1  # which copy of the model this rank has a part of, and of how many
    buffers = 0  # bytes of a GPU, beside torch's, that sending to other ranks takes

    def on_first(self, function, *args, **options):
        """Runs the function on rank 0 alone. Returns its value, or raises its error, on all."""
        return function(*args, **options)

    def on_all(self, function, *args, **options):
        """Runs the function on each rank and returns the rank's own value. An error on one rank is
        raised on all."""
        return function(*args, **options)

    def from_all(self, value) -> list:
        """Returns every rank's value, in the order of ranks."""
        return [value]

    def sum(self, tensor: Tensor) -> Tensor:
        """Returns the sum of a tensor over all ranks."""
        return tensor

    def check_same(self, values: dict) -> None:
        """Raises ValueError on all ranks if one rank has other values than the first."""

    def leave(self) -> None:
        """Ends the connections to the other ranks."""

    # Of a model that is spread over ranks

    def split(self, model: nn.Module) -> None:
        """Takes out of a model without data what other ranks hold."""

    def holders(self, name: str) -> Holders:
        """Returns which ranks hold the parameter of that name."""
        return Holders("", 0, 1)

    def start_sum(self, tensor: Tensor, name: str, owner: int) -> object | None:
        """Starts to sum a tensor, in place, over the holders of a parameter; the sum is there on
        the one whose place is `owner`, after `wait` of what this returns."""

    def send(self, tensor: Tensor, name: str, owner: int) -> None:
        """Copies a tensor from the holder of a parameter whose place is `owner` to the others."""

    def norm(self, gradients: dict[str, Tensor]) -> Tensor:
        """Returns the norm of the gradients of all ranks."""
        return total_norm(gradients.values())

    def gather(self, tensors: dict[str, Tensor]) -> dict[str, Tensor] | None:
        """Returns the trained tensors of all ranks by name, on rank 0; elsewhere None."""
        return tensors


class ManyProcesses(SingleProcess):
    """The processes that torchrun started, each with a whole model. Messages go through gloo."""

    world = None  # the group that `sum` goes through; None: gloo's

    def __init__(self, timeout: float):
        """Meets the other ranks. A rank waits `timeout` seconds for another one, here and later.
        From here on the first rank alone prints."""
        self.timeout = timedelta(seconds=timeout)
        store, self.rank, self.world_size = next(dist.rendezvous("env://", timeout=self.timeout))
        self.replica, self.replicas = self.rank, self.world_size
        store = own_store(store, self.rank, self.world_size, timeout)
        options = {"rank": self.rank, "world_size": self.world_size, "timeout": self.timeout}
        dist.init_process_group("gloo", store=dist.PrefixStore("gloo", store), **options)
        self.store = dist.PrefixStore("ends", store)
        if self.rank:
            sys.stdout = open(os.devnull, "w")
            sys.stderr.isatty = lambda: False  # progress bars look at this

    def on_first(self, function, *args, **options):
        outcome = [attempt(function, *args, **options) if self.rank == 0 else None]
        dist.broadcast_object_list(outcome, src=0)
        value, error = outcome[0]
        if error is not None:
            raise on_all_ranks(error)
        return value

    def on_all(self, function, *args, **options):
        value, error = attempt(function, *args, **options)
        errors = {rank: e for rank, e in enumerate(self.from_all(error)) if e is not None}
        if errors:
            rank, error = next(iter(errors.items()))
            same = len(errors) == self.world_size and len({str(e) for e in errors.values()}) == 1
            raise on_all_ranks(error if same else type(error)(f"rank {rank}: {error}"))
        return value

    def from_all(self, value) -> list:
        values = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def sum(self, tensor: Tensor) -> Tensor:
        total = tensor.clone()
        dist.all_reduce(total, group=self.world)
        return total

    def check_same(self, values: dict) -> None:
        for rank, theirs in enumerate(everyone := self.from_all(values)):
            for name, value in everyone[0].items():
                if theirs.get(name) != value:
                    both = f"{theirs.get(name)!r:.200}, not {value!r:.200}"
                    raise ValueError(f"rank {rank} has another {name} than rank 0: {both}")

    def leave(self) -> None:
        dist.destroy_process_group()

    # How ranks end

    def say(self, message: str) -> None:
        """Prints why all ranks end: once, unless ranks give different reasons."""
        said = self.store.compare_set("said", "", f"{self.rank} {message}").decode()
        rank, _, theirs = said.partition(" ")
        if rank == str(self.rank) or theirs != message:
            print(message, file=sys.stderr, flush=True)

    def note_failure(self, reason: str) -> None:
        """Lets the other ranks know that this one failed by itself."""
        self.store.set(f"failed/{self.rank}", reason)

    def fate_of_others(self, seconds: float = 5.0) -> str:
        """Returns which ranks failed, and which do not come to this call within some seconds."""
        self.store.set(f"here/{self.rank}", "")
        until = time.monotonic() + seconds
        missing = list(range(self.world_size))
        while missing and time.monotonic() < until:
            time.sleep(0.1)
            missing = [rank for rank in missing if not self.store.check([f"here/{rank}"])]
        failed = [r for r in range(self.world_size) if self.store.check([f"failed/{r}"])]
        said = [f"rank {r} failed: {self.store.get(f'failed/{r}').decode()}" for r in failed]
        silent = [rank for rank in missing if rank not in failed]
        return "; ".join([*said, *(f"rank {r} died or does not answer" for r in silent)])


def on_all_ranks(error: Exception) -> Exception:
    """Marks an error that all ranks raise, so that they can still meet when they handle it."""
    error.on_all_ranks = True
    return error


def meet(timeout: float) -> SingleProcess:
    """Returns this process alone, or, if torchrun started it, the ranks that it belongs to."""
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    return ManyProcesses(timeout) if several else SingleProcess()


def total_norm(tensors: Iterable[Tensor]) -> Tensor:
    """Returns the norm of all tensors, of one dtype, together, with the bits of torch's
    `get_total_norm`. That uses one core for tensors in host memory; here threads share them."""
    tensors = list(tensors)
    if not tensors or tensors[0].device.type != "cpu":
        return nn.utils.get_total_norm(tensors)
    parts = [tensors[i : i + 8] for i in range(0, len(tensors), 8)]
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        norms = [norm for part in threads.map(torch._foreach_norm, parts) for norm in part]
    return torch.linalg.vector_norm(torch.stack(norms))


def own_store(store: dist.Store, rank: int, world_size: int, timeout: float) -> dist.Store:
    """Returns a part of torchrun's store for the processes that were started together.

    After a restart the store still holds the addresses of the former processes (pytorch issue
    135712), and TORCHELASTIC_RESTART_COUNT is not the same on all hosts. So each process greets
    with a name of its own, and the first rank answers to that name."""
    me = uuid.uuid4().hex
    store.set(f"hello/{rank}", me)
    if rank:
        start = store.get(f"welcome/{me}").decode()  # waits for it
        store.set(f"joined/{start}/{rank}", "")
        return dist.PrefixStore(start, store)
    missing, until = set(range(1, world_size)), time.monotonic() + timeout
    while missing:
        if time.monotonic() > until:
            raise ValueError(f"ranks {sorted(missing)} did not come within {timeout:g} seconds")
        for other in sorted(missing):
            if store.check([f"joined/{me}/{other}"]):
                missing.remove(other)
            elif store.check([f"hello/{other}"]):  # perhaps from a process that has ended
                store.set(f"welcome/{store.get(f'hello/{other}').decode()}", me)
        time.sleep(0.02)
    return dist.PrefixStore(me, store)


def attempt(function, *args, **options) -> tuple:
    """Returns a function's value and None, or None and its error as a kind that can be sent."""
    try:
        return function(*args, **options), None
    except (ValueError, OSError, FloatingPointError) as error:
        kind = next(k for k in (OSError, FloatingPointError, ValueError) if isinstance(error, k))
        return None, kind(str(error))
    except Exception as error:
        if not isinstance(error, torch.OutOfMemoryError):  # an error in the code: show where
            traceback.print_exc()
        return None, RuntimeError(f"{type(error).__name__}: {error}")
