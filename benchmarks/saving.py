"""How long a checkpoint stops training, and how long it takes until it is on disk.

    python benchmarks/saving.py --directory DIR                  # 13 GB from a GPU
    python benchmarks/saving.py --device cpu --gigabytes 0.4     # on a CPU, in a minute
    python benchmarks/saving.py --tiny                           # the same code, in a second

Masters and moments of experts of DeepSeek-V2-Lite's size; five checkpoints each way. "copied": the
state is copied, and a thread writes the copy. "waits": without room for a copy. "before": as it was
before there was a thread; safetensors wrote a copy on the host, which was read again for its hash.
Prints seconds of each checkpoint and one JSON line."""

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.v2_lite import print_conditions  # noqa: E402
from files import replacing  # noqa: E402
from processes import SingleProcess  # noqa: E402
from training import directory  # noqa: E402
from training.config import TrainConfig  # noqa: E402
from training.directory import RunDirectory, file_hash  # noqa: E402
from training.optimizer import MasterAdamW  # noqa: E402

STATE_BYTES = 12  # of a trained parameter: master and two moments in float32


def before(output: RunDirectory, optimizer: MasterAdamW, state: dict) -> None:
    path = output.file(f"checkpoints/before-{state['step']}/optimizer.safetensors")
    tensors = {name: t.cpu() for name, t in optimizer.state().items()}
    with replacing(path) as file:
        save_file(tensors, file)
    file_hash(path)
    shutil.rmtree(output.file(f"checkpoints/before-{state['step'] - 2}"), ignore_errors=True)


def measure(kind: str, folder: Path, optimizer: MasterAdamW) -> list[dict]:
    output = RunDirectory(
        TrainConfig(output_dir=str(folder)), SimpleNamespace(identity={}), SingleProcess()
    )
    save = before if kind == "before" else RunDirectory.save_checkpoint
    room = 0 if kind == "waits" else 2**60
    rows = []
    for step in (1, 2, 3, 4, 5):
        begin = time.perf_counter()
        with mock.patch.object(directory, "available_bytes", lambda: room):
            save(output, optimizer, {"step": step})
        stopped = time.perf_counter() - begin
        output.finish_checkpoint()
        rows.append({"kind": kind, "stops": round(stopped, 2)})
        rows[-1]["on_disk"] = round(time.perf_counter() - begin, 2)
        print("{kind:<8} {stops:>8} {on_disk:>8}".format(**rows[-1]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=13, help="of the state (default: 13)")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--directory", help="where to write (default: a temporary folder)")
    parser.add_argument("--tiny", action="store_true", help="40 MB on the CPU")
    args = parser.parse_args()
    if args.tiny:
        args.device, args.gigabytes = "cpu", 0.04
    made = print_conditions(args.device)
    shape = (1408, 2048)
    count = max(round(args.gigabytes * 1e9 / STATE_BYTES / (shape[0] * shape[1])), 1)
    parameters = {
        str(i): torch.nn.Parameter(torch.randn(shape, device=args.device, dtype=torch.bfloat16))
        for i in range(count)
    }
    optimizer = MasterAdamW(parameters, TrainConfig(learning_rate=1e-5))
    optimizer.gradients  # zeros
    optimizer.step(1e-5)
    print(f"a state of {count * shape[0] * shape[1] * STATE_BYTES / 1e9:.2f} GB")
    print(f"{'':<8} {'stops':>8} {'on disk':>8}  seconds")
    rows = []
    for kind in ("before", "waits", "copied"):
        with tempfile.TemporaryDirectory(dir=args.directory) as folder:
            rows += measure(kind, Path(folder) / "run", optimizer)
    print(json.dumps({"benchmark": "saving", **made, "gigabytes": args.gigabytes, "rows": rows}))


if __name__ == "__main__":
    main()
