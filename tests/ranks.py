"""What each process of a test does: many runs of train_ep, one after the other, and what they came
to, written to a folder. Started by torchrun; see test_train_ep.py.

    torchrun --nproc-per-node 4 tests/ranks.py FOLDER

FOLDER/cases.json lists the runs: {"name", "ep_size", "config", "of_rank": {"1": {keys that differ
there}}}. Rank R leaves FOLDER/NAME.R.json, with the error that ended it or null, and the gradients
of the first step in FOLDER/NAME.R.safetensors."""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from safetensors.torch import save_file

from train import SingleProcess, TrainConfig, train
from train_ep import ExpertParallel


class Recording:
    """Keeps the gradients of a run's first step, as they are reduced."""

    recorded: dict | None = None

    def grad_norm(self, gradients):
        if self.recorded is None:
            self.recorded = {name: g.clone() for name, g in gradients.items()}
        return super().grad_norm(gradients)


class RecordingRanks(Recording, ExpertParallel):
    pass


class RecordingAlone(Recording, SingleProcess):
    pass


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    parallel = RecordingRanks(timeout=60)
    sys.stdout = open(os.devnull, "w")
    for case in json.loads((folder / "cases.json").read_text()):
        other = case.get("of_rank", {}).get(str(parallel.rank), {})
        config = TrainConfig(**{**case["config"], **other})
        error, parallel.recorded = None, None
        try:
            parallel.each(config.check)
            parallel.form_groups(config, other.get("ep_size", case["ep_size"]))
            train(config, parallel)
        except (ValueError, OSError, FloatingPointError) as reason:
            error = f"{type(reason).__name__}: {reason}"
        report = {"error": error}
        name = f"{case['name']}.{parallel.rank}"
        (folder / f"{name}.json").write_text(json.dumps(report))
        save_file(parallel.recorded or {}, folder / f"{name}.safetensors")


if __name__ == "__main__":
    main()
