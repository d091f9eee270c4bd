"""What each process of a test does: many runs of train_ep, one after the other, and what they came
to, written to a folder. Started by torchrun; see test_train_ep.py.

    torchrun --nproc-per-node 4 tests/ranks.py FOLDER

FOLDER/cases.json lists the runs: {"name", "ep_size", "config"}; beside it may stand, for some
ranks, {"of_rank": {"1": {keys of the config, or ep_size, that differ there}}}, {"signal": {"1":
step in which rank 1 gets a SIGTERM}}, {"file_limit": {"1": bytes that a file may have}}. Rank R
leaves FOLDER/NAME.R.json, with the error that ended the run or null, and the gradients of the first
step in FOLDER/NAME.R.safetensors."""

import json
import os
import resource
import signal
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from safetensors.torch import save_file

from train import ENDINGS, SingleProcess, TrainConfig, train
from train_ep import ExpertParallel


class Recording:
    """Keeps the gradients of a run's first step, as they are reduced; may send a signal in a
    step."""

    recorded: dict | None = None
    steps, signal_in = 0, None

    def grad_norm(self, gradients):
        self.steps += 1
        if self.steps == self.signal_in:
            os.kill(os.getpid(), signal.SIGTERM)
        if self.recorded is None:
            self.recorded = {name: g.clone() for name, g in gradients.items()}
        return super().grad_norm(gradients)


class RecordingRanks(Recording, ExpertParallel):
    pass


class RecordingAlone(Recording, SingleProcess):
    pass


def main() -> None:
    torch.set_num_threads(1)
    # What is compiled runs as the compiler's back end would get it, which takes half a minute.
    torch.compile = partial(torch.compile, backend="aot_eager")
    folder = Path(sys.argv[1])
    parallel = RecordingRanks(timeout=60)
    sys.stdout = open(os.devnull, "w")
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    for case in json.loads((folder / "cases.json").read_text()):
        other = case.get("of_rank", {}).get(str(parallel.rank), {})
        ep_size = other.pop("ep_size", case["ep_size"])
        config = TrainConfig(**{**case["config"], **other})
        error, parallel.recorded, parallel.steps = None, None, 0
        parallel.signal_in = case.get("signal", {}).get(str(parallel.rank))
        if limit := case.get("file_limit", {}).get(str(parallel.rank)):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            parallel.each(config.check)
            parallel.form_groups(config, ep_size)
            train(config, parallel)
        except ENDINGS as reason:
            error = f"{type(reason).__name__}: {reason}"
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        report = {"error": error}
        name = f"{case['name']}.{parallel.rank}"
        (folder / f"{name}.json").write_text(json.dumps(report))
        save_file(parallel.recorded or {}, folder / f"{name}.safetensors")


if __name__ == "__main__":
    main()
