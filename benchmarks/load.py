"""How long a 31 GB checkpoint of DeepSeek-V2-Lite's shape takes from local disk to the GPU, and
what host memory that takes: our load_model beside transformers' from_pretrained.

    python benchmarks/load.py --directory DIR    # a GPU with 40 GB, 32 GB of disk
    python benchmarks/load.py --tiny             # the same code on a CPU, in seconds

Random bfloat16 weights in 4 shards, experts one by one, as published. Each load runs in a process
of its own, in turn ours and theirs; imports (the same in both) and CUDA's start do not count.
Before a "cold" load the files are dropped from the page cache (a virtual machine's host may still
hold them); "warm" ones follow loads that filled it. transformers gets device_map="cuda", which
needs accelerate; without that it loads on the CPU and then moves the model.

Host memory in MiB, each at its peak over what there was before: the process's total (VmHWM), of it
own (anonymous and shared: the system cannot drop it) and mapped (files: it can); and `used`, the
machine's MemTotal - MemAvailable, which also has what the driver holds outside the process. Prints
its conditions, a table, and one JSON line."""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from v2_lite import TINY, V2_LITE  # noqa: E402

from checkpoint import build_model, load_model  # noqa: E402
from families import config_from_dict  # noqa: E402

STARTED = time.perf_counter()
PUBLISHED = dict(
    architectures=["DeepseekV2ForCausalLM"],
    torch_dtype="bfloat16",
    num_key_value_heads=16,
    q_lora_rank=None,  # must be said: transformers takes 1536 for a field that is not there
    max_position_embeddings=163840,
    hidden_act="silu",
    rope_theta=10000,
    norm_topk_prob=False,
    n_group=1,
    topk_group=1,
    topk_method="greedy",
)
ACCELERATE = importlib.util.find_spec("accelerate") is not None


def write_checkpoint(directory: Path, raw: dict, device: str, shards: int = 4) -> int:
    """Random weights, tensor by tensor, and config.json, which holds `raw`, last. Returns the bytes
    written."""
    model = build_model(config_from_dict(raw, {}), "meta")
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    sizes = {name: 2 * torch.Size(shape).numel() for name, shape in shapes.items()}
    free = shutil.disk_usage(directory).free
    if free < (total := sum(sizes.values())):
        raise SystemExit(f"{directory}: {free:,} bytes free; {total:,} are needed")
    names, weight_map = list(shapes), {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        header, end = {"__metadata__": {"format": "pt"}}, 0
        part = names[len(names) * i // shards : len(names) * (i + 1) // shards]
        for name in part:
            offsets = [end, end := end + sizes[name]]
            header[name] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": offsets}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(directory / file, "wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for name in part:
                tensor = torch.empty(shapes[name], dtype=torch.bfloat16, device=device)
                tensor = tensor.fill_(1) if "norm" in name else tensor.normal_(std=0.02)
                out.write(tensor.view(torch.uint8).cpu().numpy())
            os.fsync(out.fileno())
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text(json.dumps(raw))
    return total


def try_to_write(path: str, text: str) -> None:
    try:
        Path(path).write_text(text)
    except OSError:  # these need root, and a system that permits it
        pass


def drop_from_page_cache(directory: Path, everything: bool) -> None:
    for path in directory.glob("*.safetensors"):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if everything:
        try_to_write("/proc/sys/vm/drop_caches", "3")


def proc_mib(path: str) -> dict[str, float]:
    """Every field in kB of /proc/self/status or /proc/meminfo."""
    lines = (line.split() for line in Path(path).read_text().splitlines())
    return {line[0][:-1]: int(line[1]) / 1024 for line in lines if line[2:] == ["kB"]}


def memory() -> dict[str, float]:
    own, machine = proc_mib("/proc/self/status"), proc_mib("/proc/meminfo")
    return {
        "total": own["VmRSS"],
        "own": own.get("RssAnon", 0) + own.get("RssShmem", 0),
        "mapped": own.get("RssFile", 0),
        "used": machine["MemTotal"] - machine["MemAvailable"],
    }


def load_once(who: str, directory: str, device: str) -> dict:
    """One load in this process: seconds, peaks of memory, and what a few logits are."""
    # In both processes, or the other one imports sympy while it is timed; the second name, or
    # from_pretrained imports the model's code then.
    from transformers import AutoModelForCausalLM, DeepseekV2ForCausalLM  # noqa: F401

    torch.empty(1, device=device)
    try_to_write("/proc/self/clear_refs", "5")  # VmHWM starts again from VmRSS
    before, done = memory(), threading.Event()
    peak = dict(before)

    def watch():
        while not done.wait(0.02):
            peak.update({name: max(peak[name], value) for name, value in memory().items()})

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    try:
        if who == "ours":
            model = load_model(directory, device)
        else:
            options = {"device_map": device} if ACCELERATE and device == "cuda" else {}
            model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16, **options)
            if not options:
                model.to(device)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    finally:
        done.set()
        watcher.join()
    peak["total"] = max(peak["total"], proc_mib("/proc/self/status")["VmHWM"])
    result = {"seconds": round(seconds, 3)}
    result |= {f"{name}_mib": round(peak[name] - before[name]) for name in peak}
    gpu = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    result["gpu_gib"] = round(gpu / 2**30, 2)
    try:  # what was measured counts even if this fails
        with torch.no_grad():
            options = {"use_cache": False} if who == "transformers" else {}
            logits = model.eval()(torch.arange(16, device=device)[None], **options)
        logits = (logits if who == "ours" else logits.logits).float()
        result |= {"logits_sum": logits.sum().item(), "logits_norm": logits.norm().item()}
        result["logits"] = logits[0, -1, :64].tolist()
    except Exception as error:
        result["logits_error"] = f"{type(error).__name__}: {error}"[:300]
    return result


def run_child(who: str, directory: Path, device: str, timeout: float) -> dict:
    command = [sys.executable, __file__, "--child", who, "--directory", directory, "--device"]
    command.append(device)
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    try:
        child = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout, env=environment
        )
        if child.returncode == 0:
            return json.loads(child.stdout.splitlines()[-1])
        error = f"exit status {child.returncode}: {child.stderr.strip()[-1500:]}"
    except subprocess.TimeoutExpired:
        error = f"stopped after {timeout:.0f} s"
    return {"error": error}


def run(directory: Path, device: str, size: int, args: argparse.Namespace) -> list[dict]:
    columns = "total", "own", "mapped", "used"
    heads = "".join(f"{name:>9}" for name in columns)
    print(f"{'':<12} {'cache':<5} {'seconds':>8} {'GB/s':>6}{heads} {'GPU GiB':>8}", flush=True)
    rows, slowest = [], {}
    for cache in ["cold"] * min(args.cold, 1) + ["warm"] * args.warm + ["cold"] * (args.cold - 1):
        for who in ("ours", "transformers"):
            left = args.limit - (time.perf_counter() - STARTED)
            if left < 1.2 * slowest.get((who, cache), 0) or left < 5:
                print(f"{who:<12} {cache:<5} not run: {left:.0f} s left of --limit", flush=True)
                continue
            if cache == "cold":
                drop_from_page_cache(directory, everything=not args.tiny)
            cached = proc_mib("/proc/meminfo")["Cached"]
            start = time.perf_counter()
            row = run_child(who, directory, device, timeout=left)
            slowest[who, cache] = time.perf_counter() - start
            rows.append({"who": who, "cache": cache, "cached_before_mib": round(cached)} | row)
            if "error" in row:
                print(f"{who:<12} {cache:<5} failed: {row['error'].splitlines()[-1]}", flush=True)
                continue
            values = "".join(f"{row[f'{name}_mib']:>9,}" for name in columns)
            print(
                f"{who:<12} {cache:<5} {row['seconds']:>8.2f} {size / row['seconds'] / 1e9:>6.2f}"
                f"{values} {row['gpu_gib']:>8.2f}",
                flush=True,
            )
    return rows


def compare_logits(rows: list[dict]) -> dict:
    """Relative difference of the norms of all logits, and of 64 logits one by one."""
    found = {row["who"]: row for row in rows if "logits" in row}
    for row in rows:
        if "logits_error" in row:
            print(f"{row['who']}: logits failed: {row['logits_error']}")
    if len(found) < 2:
        return {}
    ours, theirs = found["ours"], found["transformers"]
    a, b = torch.tensor(ours["logits"]), torch.tensor(theirs["logits"])
    norms = abs(ours["logits_norm"] / theirs["logits_norm"] - 1)
    result = {"norm_difference": norms, "difference": ((a - b).norm() / b.norm()).item()}
    print(
        f"logits: sums {ours['logits_sum']:.3f} and {theirs['logits_sum']:.3f}, norms differ by "
        f"{norms:.1e}, 64 of them by {result['difference']:.1e} (bfloat16: about 1e-2)"
    )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--directory", help="where the checkpoint is, or is written to and stays")
    parser.add_argument("--tiny", action="store_true", help="a tiny shape on the CPU, loaded once")
    parser.add_argument("--cold", type=int, default=2, help="cold loads of each (default: 2)")
    parser.add_argument("--warm", type=int, default=3, help="warm loads of each (default: 3)")
    parser.add_argument("--limit", type=float, default=560, help="seconds in all (default: 560)")
    parser.add_argument("--child", choices=("ours", "transformers"), help=argparse.SUPPRESS)
    parser.add_argument("--device", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(load_once(args.child, args.directory, args.device)))
        return
    if not (args.directory or args.tiny):
        parser.error("--directory (or --tiny) is required")
    if args.tiny:
        args.cold, args.warm = 0, 1
    device, fields = ("cpu", V2_LITE | TINY) if args.tiny else ("cuda", V2_LITE)
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(args.directory or temporary).resolve()
        directory.mkdir(parents=True, exist_ok=True)
        table = subprocess.run(["df", "-T", directory], capture_output=True, text=True).stdout
        conditions = {
            "device": "CPU" if args.tiny else torch.cuda.get_device_name(),
            "cores": os.cpu_count(),
            "torch": torch.__version__,
            "transformers": importlib.metadata.version("transformers"),
            "accelerate": ACCELERATE and importlib.metadata.version("accelerate"),
            "disk": " ".join(table.splitlines()[-1].split()[:2]) if table else "",
            "directory": str(directory),
        }
        print(", ".join(f"{name} {value}" for name, value in conditions.items()), flush=True)
        if not (path := directory / "config.json").exists():
            start = time.perf_counter()
            written = write_checkpoint(directory, fields | PUBLISHED, device)
            conditions["write_gb_per_s"] = written / (time.perf_counter() - start) / 1e9
            print(f"written at {conditions['write_gb_per_s']:.2f} GB/s", flush=True)
        elif json.loads(path.read_text()) != json.loads(json.dumps(fields | PUBLISHED)):
            raise SystemExit(f"{path}: of another model; give an empty directory")
        size = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
        print(f"{size:,} bytes", flush=True)
        rows = run(directory, device, size, args)
    medians = {}
    for who, cache in dict.fromkeys((row["who"], row["cache"]) for row in rows):
        same = [row for row in rows if (row["who"], row["cache"]) == (who, cache)]
        if seconds := [row["seconds"] for row in same if "seconds" in row]:
            medians[f"{who} {cache}"] = statistics.median(seconds)
    print("medians: " + ", ".join(f"{name} {value:.2f} s" for name, value in medians.items()))
    summary = {"benchmark": "load", **conditions, "bytes": size, "medians": medians}
    summary["logits"] = compare_logits(rows)
    summary["loads"] = [{k: v for k, v in row.items() if k != "logits"} for row in rows]
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
