"""How a run ends early: signals, steps that are not finite, and what is said of them."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import chain

import torch
from torch import Tensor

from processes import SingleProcess
from training.config import TrainConfig
from training.directory import RunDirectory, checkpoints
from training.inputs import Inputs

PATIENCE = 5.0  # seconds from a second signal to the end of a process that does not follow it
ENDINGS = (ValueError, OSError, FloatingPointError, torch.OutOfMemoryError, KeyboardInterrupt)


def ending(error: BaseException) -> tuple[str, int]:
    """Returns what a command says of an error of ENDINGS, and its exit status."""
    if isinstance(error, KeyboardInterrupt):
        return f"\nstopped: {error}" if str(error) else "\nstopped", 130
    return f"error: {error}", 1


@contextmanager
def saying_what_is_kept(config: TrainConfig, output: RunDirectory):
    """Adds to an error that ends a run early how much of the run is kept, or which keys help."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise torch.OutOfMemoryError(f"{error}\n{what_needs_less(config)}") from None
    except (OSError, FloatingPointError, KeyboardInterrupt) as error:
        saved = checkpoints(output.path)
        kept = f"kept: {saved[-1]}, from which" if saved else "no step was saved yet;"
        without = " without --overwrite" if output.overwrite else ""  # which would delete it
        goes_on = f"{kept} the same command{without} goes on"
        if isinstance(error, FloatingPointError):  # would come to the same end
            goes_on = f"kept: {saved[-1] if saved else 'no step'}"
        raise type(error)(f"{error}; {goes_on}" if str(error) else goes_on) from None


def what_needs_less(config: TrainConfig) -> str:
    """Returns which keys let a step need less memory."""
    less = {
        "--gradient_checkpointing true (if fewer layers run again)": (
            config.gradient_checkpointing is not True
        ),
        "--optimizer_device cpu": not config.optimizer_device,
        "more --gradient_accumulation_steps (in another output_dir)": config.micro_batch > 1,
        "--quantize (likewise)": config.method == "esft" and config.quantize != "nf4",
    }
    named = [key for key, helps in less.items() if helps] or ["a shorter --seq_length"]
    return f"--plan shows what the run needs; a step needs less with {' or '.join(named)}"


def not_finite_message(
    config: TrainConfig, inputs: Inputs, step: int, chosen: list[int], losses: Tensor, norm: float
) -> str:
    """Returns what to say of a step, from 0, whose losses (rows,) or gradient norm are not finite.
    Names the samples in the step's rows, or in those with a bad loss if there are any."""
    bad = ~losses.isfinite().cpu()
    suspects = torch.tensor(chosen)[bad if bad.any() else ~bad]
    named = []
    for row in suspects.tolist():
        first, last = inputs.rows.documents[row, [0, -1]].tolist()
        named.append(f"{first + 1} to {min(last + 1, len(inputs.samples))}")
    return (
        f"step {step + 1}: the loss is {losses.sum().item():g} and the gradient norm is {norm:g}; "
        f"both must be finite. The step's rows hold these samples of {config.data}: "
        f"{', '.join(named)}. The same config comes to the same end: look at them, or choose a "
        "lower learning_rate and another output_dir"
    )


@contextmanager
def signals_noted(ranks: SingleProcess) -> Iterator[Callable[[], str | None]]:
    """Within this block, a first SIGINT or SIGTERM is only noted, so that the step at hand can be
    finished. A second one acts as it does outside; if the step does not let it, it ends the process
    after `PATIENCE`. Yields a function that returns the name of the signal that a rank received,
    the same on all ranks."""
    received: list[str] = []
    both = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    # A process in the background of a script is started with SIGINT ignored.
    outside = {s: handler for s, handler in both.items() if handler != signal.SIG_IGN}
    numbers, wakeup = os.pipe()
    os.set_blocking(wakeup, False)
    ended = threading.Event()

    def restore() -> None:
        for number, handler in outside.items():
            signal.signal(number, handler)

    def note(number: int, frame) -> None:
        received.append(signal.Signals(number).name)
        restore()

    def say(words: bytes) -> None:
        with suppress(OSError):  # Ctrl-C ends a `| tee`, too
            if ranks.rank == 0:
                os.write(2, words)

    def watch() -> None:
        """Runs in a thread: `note` may have to wait for an operation of torch, for minutes."""
        count = 0
        while number := os.read(numbers, 1):
            count += number[0] in outside
            if count == 1:
                say(b"\nfinishes the step, then writes a checkpoint; again: stops at once\n")
            elif count == 2 and not ended.wait(PATIENCE):
                say(b"\nstopped within a step; its checkpoints are kept\n")
                os._exit(130)
        os.close(numbers)

    before = signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
    for number in outside:
        signal.signal(number, note)
    threading.Thread(target=watch, name="signals", daemon=True).start()
    try:
        yield lambda: next(chain.from_iterable(ranks.from_all(received)), None)
    finally:
        ended.set()
        restore()
        signal.set_wakeup_fd(before)
        os.close(wakeup)
