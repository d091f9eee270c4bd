"""What each process of a test does: many runs, one after the other. The tests ask for runs through
rank_pool.py.

    torchrun --nproc-per-node 2 tests/rank_worker.py FOLDER    # one job
    python tests/rank_worker.py FOLDER PID                     # four processes for many jobs

A job is a JSON file: {"ranks": how many processes do it, "folder": where they write}, and either
"cases" or "command". Without PID the job is FOLDER/job.json. With PID jobs are FOLDER/0.json,
FOLDER/1.json and so on, as long as the process PID lives.

"cases" lists runs of train_ep: {"name", "ep_size", "config"}; beside it may stand, for some ranks,
{"of_rank": {"1": {keys of the config, or ep_size, that differ there}}}, {"signal": {"1": step in
which rank 1 gets a SIGTERM}}, {"file_limit": {"1": bytes that a file may have}}, {"slow_disk":
{"1": seconds until rank 1 begins to write its part of a checkpoint}}, {"host_memory": {"1": bytes
that rank 1 takes to be available}}. Rank R leaves NAME.R.json, with the error that ended the run or
null, and the gradients of the first step in NAME.R.safetensors.

"command" is the arguments of a command, as ["train_ep.py", "--config", ...]. Rank R leaves its
status, stdout and stderr in command.R.json."""

import gc
import io
import itertools
import json
import math
import os
import resource
import runpy
import signal
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import torch
from safetensors.torch import save_file
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from lora import lora_parameters, whole
from processes import SingleProcess
from stored_tensors import write_tensors
from train import train
from train_ep import ExpertParallel
from training import directory
from training.config import TrainConfig
from training.optimizer import part_like, wholes
from training.stopping import ENDINGS


class Recording:
    """Keeps the gradients of a run's first step, as they are summed; may send a signal in a
    step."""

    recorded: dict | None = None
    steps, signal_in = 0, None

    def split(self, model):
        super().split(model)
        self.model = model

    def norm(self, gradients):
        self.steps += 1
        if self.steps == self.signal_in:
            os.kill(os.getpid(), signal.SIGTERM)
        norm = super().norm(gradients)
        if self.recorded is None:
            lora = lora_parameters(self.model)  # views of the parameters that have gradients
            of = {p: gradients[name] for name, p in wholes(lora).items() if name in gradients}
            parts = {n: part_like(v, of[whole(v)]) for n, v in lora.items() if whole(v) in of}
            others = {name: g for name, g in gradients.items() if name not in lora}
            self.recorded = {name: g.clone() for name, g in (parts | others).items()}
        return norm


class RecordingRanks(Recording, ExpertParallel):
    def __init__(self, timeout: float):
        super().__init__(timeout)
        self.formed = {}  # groups by ep_size: to form them takes longer than most runs


class RecordingAlone(Recording, SingleProcess):
    pass


def run_case(case: dict, ranks: RecordingRanks, folder: Path) -> None:
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    other = case.get("of_rank", {}).get(str(ranks.rank), {})
    ep_size = other.pop("ep_size", case["ep_size"])
    config = TrainConfig(**{**case["config"], **other})
    error, ranks.recorded, ranks.steps = None, None, 0
    ranks.signal_in = case.get("signal", {}).get(str(ranks.rank))
    wait = case.get("slow_disk", {}).get(str(ranks.rank), 0)
    directory.write_tensors = lambda *file: time.sleep(wait) or write_tensors(*file)
    room = case.get("host_memory", {}).get(str(ranks.rank), math.inf)
    directory.available_bytes = lambda: room
    if limit := case.get("file_limit", {}).get(str(ranks.rank)):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        ranks.on_all(config.check)
        if "of_rank" not in case and ep_size in ranks.formed:
            vars(ranks).update(ranks.formed[ep_size], config=config)
        else:
            ranks.form_groups(config, ep_size)
            groups = ("same_replica", "same_experts", "world", "ep_size", "replica", "replicas")
            ranks.formed[ep_size] = {name: getattr(ranks, name) for name in groups}
        train(config, ranks)
    except ENDINGS as reason:
        error = f"{type(reason).__name__}: {reason}"
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    name = f"{case['name']}.{ranks.rank}"
    (folder / f"{name}.json").write_text(json.dumps({"error": error}))
    save_file(ranks.recorded or {}, folder / f"{name}.safetensors")


def run_command(arguments: list[str], folder: Path) -> None:
    sys.argv, status = list(arguments), 0
    stdout, stderr = io.StringIO(), io.StringIO()
    with redirect_stdout(stdout), redirect_stderr(stderr):
        try:
            runpy.run_path(arguments[0], run_name="__main__")
        except SystemExit as end:
            status = end.code
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    said = {"status": status, "stdout": stdout.getvalue(), "stderr": stderr.getvalue()}
    (folder / f"command.{os.environ['RANK']}.json").write_text(json.dumps(said))


def run_job(job: dict) -> None:
    folder = Path(job["folder"])
    if "command" in job:
        return run_command(job["command"], folder)
    ranks = RecordingRanks(timeout=60)
    with redirect_stdout(io.StringIO()):
        for case in job["cases"]:
            run_case(case, ranks, folder)
    ranks.leave()


def end_on_signals() -> None:
    """A command that failed ignores them. The agent, which sends one at the end, would wait for half
    a minute."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.default_int_handler)


def lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def main() -> None:
    torch.set_num_threads(1)
    gc.freeze()  # as in conftest.py
    gc.set_threshold(700, 10, 1000)
    # What is compiled runs as the compiler's back end would get it, which takes half a minute.
    torch.compile = partial(torch.compile, backend="aot_eager")
    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    end_on_signals()
    if len(sys.argv) == 2:
        run_job(json.loads((folder / "job.json").read_text()))
        return
    parent = int(sys.argv[2])
    for number in itertools.count():
        path = folder / f"{number}.json"
        while not path.exists():
            if not lives(parent):
                return
            time.sleep(0.02)
        job = json.loads(path.read_text())
        if rank < job["ranks"]:
            os.environ["WORLD_SIZE"] = str(job["ranks"])  # the others wait for the next job
            run_job(job)
            end_on_signals()
            (folder / f"{number}.{rank}.done").touch()


def main_of_pool() -> None:
    """What torchrun does for `main`, with processes that are forked: they import torch together,
    which takes longer than most runs."""
    options = dict(rdzv_backend="c10d", rdzv_endpoint="localhost:0", run_id="pool")
    options |= dict(start_method="fork", max_restarts=0)
    elastic_launch(LaunchConfig(1, 1, 4, **options), main)()


if __name__ == "__main__":
    main() if len(sys.argv) == 2 else main_of_pool()
