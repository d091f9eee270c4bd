"""The whole job at full size: a checkpoint of DeepSeek-V2-Lite's shape on disk, scores, selection,
training, adapter, evaluation, under a hard limit of GPU memory.

    python benchmarks/full_path.py --directory DIR --tokenizer DIR --data FILE --prompts FILE
    python benchmarks/full_path.py --paper ...        # configs/esft_v2_lite.toml as it stands
    python benchmarks/full_path.py --paper --config configs/esft_moonlight.toml \\
        --shape tests/published/Moonlight-16B-A3B-Instruct ...    # another model's
    python benchmarks/full_path.py --tiny             # the same code on a CPU, in seconds

Random bfloat16 weights are written to --directory first (V2-Lite's take 31.4 GB). The run is
train.py's. Without --paper it is that of a small card: experts in nf4, the optimizer in host
memory, 32 micro-batches of one row of 4096 tokens, and 64 prompts. With it, keys are those of
--config but for the number of steps, with all prompts, and checkpoints in the middle and at the
end. --shape is a folder with a config.json that says the size, without quantization. --limit GiB is
what torch.cuda.set_per_process_memory_fraction allows. Prints time and peak of GPU memory of each
stage, the peak of host memory, what 500 steps take, and one JSON line."""

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
import tomllib
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train as trainer  # noqa: E402
from benchmarks.load import PUBLISHED, proc_mib, write_checkpoint  # noqa: E402
from benchmarks.v2_lite import TINY, V2_LITE, empty_memory, peak_gib, print_conditions  # noqa: E402
from training.config import TrainConfig  # noqa: E402

STAGES = ("load_model", "evaluate", "score_experts", "mark_trained", "loop", "load_adapter")


def timed(name: str, function, device: str, stages: list[dict]):
    """Returns `function`, with a record of each call's time and peak."""

    def call(*args, **options):
        empty_memory(device)
        begin = time.perf_counter()
        result = function(*args, **options)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds, own = time.perf_counter() - begin, proc_mib("/proc/self/status")
        stages.append({"stage": name, "seconds": round(seconds, 1)})
        stages[-1] |= {"gpu_peak_gib": round(peak_gib(device), 2)}
        stages[-1] |= {"host_gib": round(own["VmRSS"] / 1024, 2)}
        print("stage", json.dumps(stages[-1]), flush=True)
        return result

    return call


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--directory", help="where the checkpoint and the run are written")
    parser.add_argument("--tokenizer", default=str(ROOT / "demo/base"), help="its directory")
    parser.add_argument("--data", default=str(ROOT / "demo/data/intent_train.jsonl"))
    parser.add_argument("--prompts", default=str(ROOT / "demo/data/intent_test.jsonl"))
    parser.add_argument("--limit", type=float, default=20.0, help="GiB (default: 20)")
    parser.add_argument("--paper", action="store_true", help="the paper's config as it stands")
    parser.add_argument("--config", default=str(ROOT / "configs/esft_v2_lite.toml"))
    parser.add_argument("--shape", help="a folder with a config.json (default: V2-Lite's)")
    parser.add_argument("--deterministic", default="true", choices=("true", "false"))
    parser.add_argument("--quantize", default="nf4", help="fp8 or nf4 (default)")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--tiny", action="store_true", help="a tiny shape on the CPU")
    return parser


def main() -> None:
    args = command_line().parse_args()
    device, raw = "cuda", V2_LITE | PUBLISHED
    if args.shape:
        raw = json.loads((Path(args.shape) / "config.json").read_text())
        raw = {k: v for k, v in raw.items() if not k.endswith("_token_id")}  # of its own tokenizer
    if args.tiny:
        device, raw, args.steps = "cpu", V2_LITE | PUBLISHED | TINY | {"vocab_size": 2048}, 2
    made = print_conditions(device)
    with tempfile.TemporaryDirectory() as temporary:
        run(args, Path(args.directory or temporary), device, raw, made)


def run(args: argparse.Namespace, folder: Path, device: str, raw: dict, made: dict) -> None:
    base, output = folder / "base", folder / "run"
    base.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    written = write_checkpoint(base, raw, device)
    print(f"wrote {written:,} bytes in {time.perf_counter() - begin:.0f} s", flush=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(args.tokenizer) / name, base)
    prompts = folder / "prompts.jsonl"
    lines = Path(args.prompts).read_text().splitlines(keepends=True)
    most = 2 if args.tiny else None if args.paper else 64
    prompts.write_text("".join(lines[:most]))
    if device == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(args.limit * 2**30 / total)
    keys = {"chat_format": "deepseek_v2"} | tomllib.loads(Path(args.config).read_text())
    keys |= {"model": str(base), "data": args.data, "output_dir": str(output)}
    keys |= {"eval_sets": [f"intent:{prompts}"], "steps": args.steps, "device": device}
    keys |= {"save_steps": -(-args.steps // 2), "deterministic": args.deterministic == "true"}
    if not args.paper:
        keys |= {"quantize": args.quantize, "optimizer_device": "cpu"}
        keys |= {"gradient_accumulation_steps": 32, "gradient_checkpointing": True}
    if args.tiny:
        keys |= {"seq_length": 64, "batch_size": 2, "gradient_accumulation_steps": 2}
        keys |= {"n_sample_tokens": 500, "max_new_tokens": 4}
    # The paper's run compiles, as it is long; this one has fewer steps.
    keys |= {"dtype": "float32"} if args.tiny else {"dtype": "bfloat16", "compile": True}
    config = TrainConfig(**keys)
    config.check()
    stages: list[dict] = []
    for name in STAGES:
        setattr(trainer, name, timed(name, getattr(trainer, name), device, stages))
    begin = time.perf_counter()
    results = trainer.train(config)
    seconds = time.perf_counter() - begin
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    # Without the first step, which compiles; validations and checkpoints are apart.
    step = statistics.median(
        config.batch_size * config.seq_length / r["tokens_per_second"] for r in records[1:]
    )
    host = proc_mib("/proc/self/status")["VmHWM"] / 1024
    print(f"{'stage':<14} {'seconds':>8} {'GPU GiB':>8} {'host GiB':>9}")
    for row in stages:
        print("{stage:<14} {seconds:>8} {gpu_peak_gib:>8} {host_gib:>9}".format(**row))
    print(f"a step {step:.2f} s; 500 steps {500 * step / 60:.1f} minutes")
    print(f"in all {seconds:.1f} s; peak of host memory {host:.1f} GiB; files:")
    for path in sorted(output.rglob("*.safetensors")):
        print(f"  {path.relative_to(output)} {path.stat().st_size:,} bytes")
    made |= {
        "limit_gib": args.limit,
        "paper": args.paper,
        "config": Path(args.config).name,
        "deterministic": args.deterministic,
    }
    made |= {"seconds_a_step": round(step, 3), "quantize": config.quantize, "stages": stages}
    layers = output / "checkpointed_layers.json"
    made |= {"checkpointed_layers": json.loads(layers.read_text()) if layers.exists() else None}
    made |= {"seconds": round(seconds, 1), "host_peak_gib": round(host, 1)}
    made |= {"steps": [{k: r[k] for k in ("loss", "tokens_per_second")} for r in records]}
    made |= {name: results[name] for name in ("trained_parameters", "adapter_bytes")}
    print(json.dumps({"benchmark": "full_path", **made}))


if __name__ == "__main__":
    main()
