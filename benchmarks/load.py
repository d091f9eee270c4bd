"""How long a 31 GB checkpoint of DeepSeek-V2-Lite's shape takes from local disk to the GPU, and
what host memory that takes: load_model beside transformers' from_pretrained.

    python benchmarks/load.py --directory DIR    # a GPU with 40 GB, 32 GB of disk
    python benchmarks/load.py --tiny             # the same on a CPU, in seconds

Random bfloat16 weights in 8 shards, experts one by one, as published. Each load runs in a process
of its own, in turn ours and theirs; "cold" loads come after the files were dropped from the page
cache.
Prints its conditions, a table, and one JSON line."""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from safetensors.torch import save_file  # noqa: E402
from v2_lite import TINY, V2_LITE  # noqa: E402

from model import ModelConfig, build_model, load_model  # noqa: E402

PUBLISHED = dict(
    architectures=["DeepseekV2ForCausalLM"],
    torch_dtype="bfloat16",
    num_key_value_heads=16,
    max_position_embeddings=163840,
    hidden_act="silu",
    topk_method="greedy",
    n_group=1,
    topk_group=1,
)


def write_checkpoint(directory: Path, fields: dict, device: str, shards: int = 8) -> None:
    """Random weights, shard by shard, with an index."""
    directory.mkdir(parents=True, exist_ok=True)
    shapes = {
        k: t.shape for k, t in build_model(ModelConfig(**fields), "meta").state_dict().items()
    }
    names, weight_map = list(shapes), {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        tensors = {}
        for name in names[len(names) * i // shards : len(names) * (i + 1) // shards]:
            tensor = torch.empty(shapes[name], dtype=torch.bfloat16, device=device)
            tensors[name] = (tensor.fill_(1) if "norm" in name else tensor.normal_(std=0.02)).cpu()
            weight_map[name] = file
        save_file(tensors, directory / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text(json.dumps({**fields, **PUBLISHED}))


def drop_from_page_cache(directory: Path) -> None:
    for path in directory.glob("*.safetensors"):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def status(field: str) -> float:
    """MiB, of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024


def load_once(who: str, directory: str, device: str) -> dict:
    """One load in this process: seconds, and host memory at its peak beyond what was there before.
    Mapped files count as resident, but the system can drop them; anonymous and shared memory
    stay."""
    if who == "transformers":
        from transformers import AutoModelForCausalLM
    torch.ones(1, device=device)
    before, own, done = status("VmRSS"), [], threading.Event()
    kept = status("RssAnon") + status("RssShmem")

    def watch():
        while not done.wait(0.02):
            own.append(status("RssAnon") + status("RssShmem") - kept)

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    if who == "ours":
        model = load_model(directory, device)
    else:
        kwargs = {"device_map": device} if device == "cuda" else {}
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16, **kwargs)
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    with torch.no_grad():
        logits = model(torch.arange(16, device=device)[None])
        logits = logits if isinstance(logits, torch.Tensor) else logits.logits
    return {
        "seconds": round(seconds, 2),
        "host_peak_mib": round(status("VmHWM") - before),
        "host_own_peak_mib": round(max(own, default=0)),
        "gpu_peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2)
        if device == "cuda"
        else 0,
        "logits_norm": logits.float().norm().item(),
    }


def run(directory: Path, device: str, cold: int, warm: int) -> list[dict]:
    print(f"{'':<13} {'cache':<5} {'seconds':>8} {'GB/s':>6} {'host MiB':>9} {'of it own':>9}")
    size = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    rows = []
    for cache in ["cold"] * cold + ["warm"] * warm:
        for who in ("ours", "transformers"):
            if cache == "cold":
                drop_from_page_cache(directory)
            command = [sys.executable, __file__, "--child", who, "--directory", directory]
            child = subprocess.run([*command, "--device", device], capture_output=True, text=True)
            if child.returncode:
                raise SystemExit(f"{who}: {child.stderr[-2000:]}")
            row = {"who": who, "cache": cache, **json.loads(child.stdout.splitlines()[-1])}
            rows.append(row)
            print(
                f"{who:<13} {cache:<5} {row['seconds']:>8.2f} {size / row['seconds'] / 1e9:>6.2f} "
                f"{row['host_peak_mib']:>9,} {row['host_own_peak_mib']:>9,}",
                flush=True,
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--directory", help="where the checkpoint is, or is written to")
    parser.add_argument("--tiny", action="store_true", help="a tiny shape on the CPU")
    parser.add_argument("--cold", type=int, default=2, help="loads from disk (default: 2)")
    parser.add_argument("--warm", type=int, default=3, help="loads from memory (default: 3)")
    parser.add_argument("--child", choices=("ours", "transformers"), help=argparse.SUPPRESS)
    parser.add_argument("--device", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(load_once(args.child, args.directory, args.device)))
        return
    if not (args.directory or args.tiny):
        parser.error("--directory (or --tiny) is required")
    device = "cpu" if args.tiny else "cuda"
    fields = V2_LITE | TINY if args.tiny else V2_LITE
    import transformers

    name = "CPU" if args.tiny else torch.cuda.get_device_name()
    print(
        f"{name}, {os.cpu_count()} cores, torch {torch.__version__}, "
        f"transformers {transformers.__version__}"
    )
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(args.directory or temporary)
        if not (directory / "config.json").exists():
            start = time.perf_counter()
            write_checkpoint(directory, fields, device)
            print(f"wrote {directory} in {time.perf_counter() - start:.0f} s", flush=True)
        cold, warm = (1, 1) if args.tiny else (args.cold, args.warm)
        rows = run(directory, device, cold, warm)
    medians = {
        f"{who} {cache}": statistics.median(
            row["seconds"] for row in rows if (row["who"], row["cache"]) == (who, cache)
        )
        for who, cache in {(row["who"], row["cache"]): None for row in rows}
    }
    for cache in ("cold", "warm"):
        ours, theirs = medians[f"ours {cache}"], medians[f"transformers {cache}"]
        print(f"{cache}: ours {ours:.2f} s, transformers {theirs:.2f} s, ratio {theirs / ours:.2f}")
    summary = {"benchmark": "load", "device": name, "torch": torch.__version__}
    summary |= {"transformers": transformers.__version__, "medians": medians, "loads": rows}
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
