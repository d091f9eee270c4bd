"""Which card a run fits, and which keys of the config make it fit."""

import os
import shlex
from bisect import bisect_left
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

from processes import SingleProcess
from training.config import TrainConfig
from training.table import size_text, table_row

# GB in a card's name -> GiB that programs find there, rounded down: the "total capacity" in public
# reports of torch.OutOfMemoryError, the least where cards with bfloat16 differ. 16: RTX 5080; 24:
# A10, L4 with ECC (RTX 4090: 23.5); 32: RTX 5090; 40, 80: A100; 48: L40S with ECC; 141: H200; 180:
# B200.
CARDS = {16: 15.4, 24: 22.0, 32: 31.3, 40: 39.3, 48: 44.3, 80: 79.1, 141: 139.7, 180: 178.3}
CARDS_OF_RANKS = (80, 141)  # those of hosts with several
# What a GPU needs beside the planned peak of tensors. CUDA, its libraries and the allocator's gaps
# took up to 1.5 GiB on an H100. The rest is for steps that need more than their rehearsal, of up to
# 1 %: their tokens are spread less evenly over the experts.
OVERHEAD = 2.5 * 2**30


class Choice(NamedTuple):
    """The keys that trade exactness or speed for memory, as in a config."""

    quantize: str
    gradient_checkpointing: bool | str
    optimizer_device: str

    def changes(self, config: TrainConfig) -> dict[str, str]:
        """Returns the flags that turn `config` into this choice."""
        mine = self._asdict().items()
        return {name: str(v).lower() for name, v in mine if v != getattr(config, name)}


class Need(NamedTuple):
    """Bytes."""

    device: int  # the peak of tensors
    host: int  # the optimizer's part


def need_of(need: dict, checkpointing: bool) -> Need:
    """Returns what a run needs that `plan_rank` planned: a step, and a pass without gradients."""
    peaks = need["peak", checkpointing], need.get(("peak", "inference"), 0)
    return Need(max(peaks), need["host"])


# What `plan_choices` planned, by quantize and optimizer_device, the best first: an exact choice is
# better than a packed one, which rounds weights, and a host's optimizer costs time.
Needs = dict[tuple[str, str], dict]
Choices = dict[Choice, Need]


def ordered_choices(needs: Needs) -> Choices:
    """Returns what each choice needs, in the order of the table."""
    kinds, places = (list(dict.fromkeys(values)) for values in zip(*needs))
    return {
        Choice(kind, checkpointing, place): need_of(needs[kind, place], checkpointing)
        for kind in kinds
        for checkpointing in (False, True)
        for place in places
    }


def needed(device: str, need: Need) -> float:
    """Returns the bytes that the device must have."""
    return need.device + beside(device, need.host)


def beside(device: str, host: int) -> float:
    """Returns the bytes that the device must have beside the peak of tensors. A CPU's memory is the
    host's."""
    return OVERHEAD if device.startswith("cuda") else host


def fewest_layers(peak: Callable[[int], int], count: int, room: float) -> int:
    """Returns how many of `count` layers, at least, must run again in backward so that the peak of
    a step, a function of that number, is within `room` bytes. All, if that is not enough."""
    if peak(0) <= room:  # the usual case, and each call is a rehearsal
        return 0
    return bisect_left(range(count), True, lo=1, key=lambda layers: peak(layers) <= room)


def memory_here(device: str) -> dict[str, int]:
    """Returns the bytes of the device by its name, if it is here."""
    if not device.startswith("cuda"):
        name, size = "this machine (", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    elif torch.cuda.is_available():
        card = torch.cuda.get_device_properties(device)
        name, size = f"this card ({card.name}, ", card.total_memory
    else:
        return {}
    return {f"{name}{size / 2**30:.0f} GiB)": size}


def smallest_card(need: Need) -> int | None:
    """Returns the GB of the smallest card that takes it."""
    enough = (gb for gb, gib in CARDS.items() if needed("cuda", need) <= gib * 2**30)
    return next(enough, None)


def fits(device: str, need: Need) -> str:
    """Returns whether it fits the device, or which GPU is large enough if none is here."""
    for memory in memory_here(device).values():
        return f"{memory / 2**30:.0f} GiB: {'yes' if needed(device, need) <= memory else 'NO'}"
    card = smallest_card(need)
    return f"GPU of {card} GB" if card else f"no GPU to {max(CARDS)} GB"


def card_text(device: str, need: Need) -> str:
    if not device.startswith("cuda"):
        return fits(device, need)
    card = smallest_card(need)
    return f"{card} GB" if card else "none"


# ------------------------------------------------------------------------------------------
# Lines of a plan


def choice_lines(
    config: TrainConfig, ranks: list[SingleProcess], columns: list[Choices]
) -> list[str]:
    """Returns a table of the choices. Each number of ranks is a column, if there are several."""
    heads = [f"{each.world_size} rank{'s' * (each.world_size > 1)}" for each in ranks]
    if len(ranks) == 1:
        heads = ["peak of the run", "optimizer in host", "fits"]
    lines = ["", table_row("quantize  checkpointing  optimizer_device", heads)]
    for choice, need in columns[0].items():
        kind, checkpointing, place = choice
        used = (kind, place) == (config.quantize, config.optimizer_device)
        used &= config.gradient_checkpointing in ("auto", checkpointing)
        words = kind or "-", "yes" if checkpointing else "no", place or "-", "*" if used else ""
        label = "{:<10}{:<15}{:<17}{}".format(*words)
        if len(ranks) == 1:
            host = size_text(need.host) if need.host else "-"
            cells = [size_text(need.device), host, card_text(config.device, need)]
        else:
            needs = [column[choice] for column in columns]
            cells = [f"{n.device / 2**30:.1f} GiB: {card_text(config.device, n)}" for n in needs]
        lines.append(table_row(label, cells))
    hosts = [max(need.host for need in column.values()) for column in columns]
    if len(ranks) > 1 and any(hosts):
        label = "host memory of a rank, optimizer_device cpu"
        lines.append(table_row(label, map(size_text, hosts)))
    return lines


def command_lines(config: TrainConfig, needs: Needs, given: dict) -> list[str]:
    """Returns the command with the best choice for the device here, or for each size of cards; if
    one is too small, also the command that plans several GPUs. `given` are the flags of the present
    command."""
    # Scoring and evaluation need so much at least, which the keys of a step do not change.
    floor = min(need["peak", "inference"] for need in needs.values())
    said: dict[str, list[str]] = {}  # text -> the devices that it is true of
    several = []
    for name, memory in memories(config.device, CARDS).items():
        if choice := best(needs, config.device, memory):
            command = shlex.join(["python", "train.py", *words_of(given | choice.changes(config))])
            text = f"{layers_text(needs, choice, config.device, memory)}: {command}"
        else:
            text = f"nothing fits: {less(config, 1)}"
            if needed(config.device, Need(floor, host=0)) > memory:
                beyond = size_text(OVERHEAD) if config.device.startswith("cuda") else "nothing"
                alone = f"scoring and evaluation alone need {size_text(floor)}"
                text = f"nothing fits: {alone}, and {beyond} beside it"
            command = shlex.join(["python", "train_ep.py", *words_of(given), "--plan"])
            several = [f"several GPUs: {command} 2 4 8"]
        said.setdefault(text, []).append(name)
    lines = [f"{', '.join(names)}: {text}" for text, names in said.items()]
    return ["", "the most exact choice that fits, and of these the fastest:", *lines, *several]


def rank_lines(config: TrainConfig, ranks: list[SingleProcess], columns: list[Needs]) -> list[str]:
    """Returns the smallest number of ranks that fits the device here, or each size of cards of
    hosts with several, and the flags of its best choice."""
    most = max(each.world_size for each in ranks)
    lines = ["", "the fewest of these ranks that fit; for them the most exact, then the fastest:"]
    for name, memory in memories(config.device, CARDS_OF_RANKS).items():
        found = {
            each.world_size: (needs, choice)
            for each, needs in zip(ranks, columns)
            if (choice := best(needs, config.device, memory))
        }
        if found:
            needs, choice = found[min(found)]
            flags = shlex.join(words_of(choice.changes(config)))
            text = f"{min(found)} ranks, {f'with {flags}' if flags else 'as in this config'}"
            text += f"; {layers_text(needs, choice, config.device, memory)}"
        else:
            text = f"nothing fits: {less(config, most)}, or more ranks"
        lines.append(f"{name}: {text}")
    return lines


def memories(device: str, cards: Iterable[int]) -> dict[str, float]:
    """Returns the bytes of the device here, or of each of `cards`, by name."""
    return memory_here(device) or {f"{gb} GB": CARDS[gb] * 2**30 for gb in cards}


def best(needs: Needs, device: str, memory: float) -> Choice | None:
    for (kind, place), need in needs.items():
        if needed(device, need_of(need, True)) <= memory:
            return Choice(kind, "auto", place)
    return None


def layers_text(needs: Needs, choice: Choice, device: str, memory: float) -> str:
    """Returns what "auto" does with a choice that fits."""
    layers, peak = layers_of(needs[choice.quantize, choice.optimizer_device], device, memory)
    return f"{layers} run again, peak of a step {size_text(peak)}"


def layers_of(need: dict, device: str, memory: float) -> tuple[str, int]:
    """Returns how many layers "auto" lets run again, of how many, and the peak of a step then."""
    count = need["layers"]
    layers = fewest_layers(need["peak"], count, memory - beside(device, need["host"]))
    return f"{layers} of {count} layers", need["peak"](layers)


def words_of(flags: dict[str, str | list[str]]) -> list[str]:
    """Returns flags as words of a command line."""
    lists = {name: [v] if isinstance(v, str) else v for name, v in flags.items()}
    return [word for name, values in lists.items() for word in (f"--{name}", *values)]


def less(config: TrainConfig, ranks: int) -> str:
    """Returns what makes a step of so many ranks smaller."""
    shorter = "a shorter --seq_length"
    # The most micro-batches of equal size that still have a row for each rank.
    sizes = range(1, config.batch_size // min(ranks, config.batch_size) + 1)
    steps = max(n for n in sizes if config.batch_size % n == 0)
    if steps <= config.gradient_accumulation_steps:
        return shorter
    return f"fewer rows a micro-batch (--gradient_accumulation_steps {steps}), {shorter}"
