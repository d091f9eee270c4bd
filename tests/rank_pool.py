"""Four processes that start once, for all tests that need several ranks: a start takes longer than
most runs. See rank_worker.py for what a job is."""

import atexit
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path

from conftest import ROOT

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
numbers = itertools.count()


@cache
def start() -> tuple[subprocess.Popen, Path]:
    """The agent of the four processes, and the folder where they look for jobs."""
    scratch = tempfile.TemporaryDirectory()
    folder = Path(scratch.name)
    command = [sys.executable, "tests/rank_worker.py", str(folder), str(os.getpid())]
    with open(folder / "stderr", "w") as stderr:
        agent = subprocess.Popen(command, cwd=ROOT, stderr=stderr)

    def stop() -> None:
        agent.send_signal(signal.SIGTERM)
        agent.wait()
        scratch.cleanup()

    atexit.register(stop)
    return agent, folder


def run_on_ranks(ranks: int, folder: Path, **what) -> None:
    """Runs `cases` or a `command` on so many ranks, which write to `folder`."""
    agent, jobs = start()
    number = next(numbers)
    part = jobs / "part"
    part.write_text(json.dumps({"ranks": ranks, "folder": str(folder), **what}))
    part.rename(jobs / f"{number}.json")
    until = time.monotonic() + 300
    while not all((jobs / f"{number}.{rank}.done").exists() for rank in range(ranks)):
        assert agent.poll() is None and time.monotonic() < until, (jobs / "stderr").read_text()
        time.sleep(0.01)


def run_command_on_ranks(ranks: int, folder: Path, *arguments: str) -> list[dict]:
    """What each rank's command came to: status, stdout, stderr."""
    run_on_ranks(ranks, folder, command=arguments)
    return [json.loads((folder / f"command.{rank}.json").read_text()) for rank in range(ranks)]
