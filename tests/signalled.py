"""A command of the project that gets a signal in a certain step, whatever the machine's speed.

    python tests/signalled.py SIGTERM 0 5 train ...    # train.py, rank 0, in its 5th step

The process writes its number to the file that the environment names as SIGNALLED, and then sends
the signal to itself. A process that torchrun started again is left alone."""

import importlib
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import processes
import train

name, rank, step, module, *arguments = sys.argv[1:]
compute_gradients, calls = train.compute_gradients, []


def then_signalled(*args):
    result = compute_gradients(*args)
    calls.append(1)
    mine = os.environ.get("RANK", "0") == rank
    first = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    if mine and first and len(calls) == int(step):
        Path(os.environ["SIGNALLED"]).write_text(str(os.getpid()))
        os.kill(os.getpid(), getattr(signal, name))
    return result


train.compute_gradients = then_signalled
# The one other rank is killed or stopped, so to wait longer for it shows nothing.
wait_for_others = processes.ManyProcesses.fate_of_others
processes.ManyProcesses.fate_of_others = lambda ranks: wait_for_others(ranks, seconds=1.0)
sys.argv = [f"{module}.py", *arguments]
importlib.import_module(module).main()
