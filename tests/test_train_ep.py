"""Experts on several processes change nothing: each run equals train.py's. Processes are started
by torchrun and talk through gloo, on a CPU."""

import json
import random
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch
from conftest import ROOT, save_tokenizer, save_with_transformers
from ranks import RecordingAlone
from safetensors.torch import load_file
from test_train import metrics

from train import TrainConfig, train

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
LAYOUTS = [(1, 1), (2, 1), (2, 2), (4, 2), (4, 4)]  # ranks, ep_size


def torchrun(folder, ranks: int, cases: list[dict]) -> None:
    """Runs cases on so many processes; see ranks.py."""
    (folder / "cases.json").write_text(json.dumps(cases))
    command = [*TORCHRUN, f"--nproc-per-node={ranks}", "tests/ranks.py", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, str]:
    """Tiny bases with V2's and V3's gates, and one of V3 whose experts 4 and 5 no token reaches."""
    paths = {}
    for family in ("deepseek_v2", "deepseek_v3"):
        path = tmp_path_factory.mktemp(family)
        sizes = dict(vocab_size=258, first_k_dense_replace=1, tie_word_embeddings=False)
        save_with_transformers(path, seed=2, family=family, **sizes)
        save_tokenizer(path)
        paths[family] = str(path)
    path = tmp_path_factory.mktemp("unreached")
    oracle = save_with_transformers(path, seed=2, family="deepseek_v3", **sizes, n_group=1)
    for name, buffer in oracle.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer[4:6] = -100.0
    oracle.save_pretrained(path)
    save_tokenizer(path)
    return paths | {"unreached": str(path)}


@pytest.fixture(scope="module")
def chats(tmp_path_factory) -> str:
    """Conversations of several turns, of which some are masked: rows have 3 to 30 labels."""
    draw = random.Random(0)
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    rows = []
    for _ in range(60):
        turns = []
        for _ in range(draw.randint(1, 3)):
            word = "".join(draw.choices("abcdef", k=draw.randint(1, 12)))
            turns += [{"role": "user", "content": f"Say {word}"}]
            turns += [{"role": "assistant", "content": word, "mask": draw.randint(0, 1)}]
        turns[-1]["mask"] = 0
        rows.append(json.dumps({"messages": turns}))
    path.write_text("\n".join(rows) + "\n")
    return str(path)


def keys(model: str, data: str, output, **changes) -> dict:
    """The config of a run of five steps. Of 10 rows in micro-batches of 2, two of four ranks have 3
    and two have 2: their second micro-batches are of one row and of none."""
    config = TrainConfig(
        model=model,
        chat_format="deepseek_v2",
        data=data,
        output_dir=str(output),
        n_sample_tokens=600,
        seq_length=32,
        batch_size=10,
        gradient_accumulation_steps=5,
        steps=5,
        learning_rate=1e-3,
        eval_steps=5,
        save_steps=5,
        validation_fraction=0.05,
        dtype="float32",
        device="cpu",
        gradient_checkpointing=False,
        aux_loss_alpha=0.1,
        max_grad_norm=0.5,
    )
    for name, value in changes.items():
        setattr(config, name, value)
    config.check()
    return asdict(config)


METHODS = {
    "esft": {},
    "shared": {"shared_experts": True, "gradient_checkpointing": True},
    "non_expert": {"non_expert_modules": True, "score": "gate"},
    "full": {"method": "full", "gradient_checkpointing": True},
    "lora": {"method": "lora", "batch_size": 20},
    "loop": {"experts": "loop", "gradient_accumulation_steps": 2},
    "mean": {"validation_fraction": 0.0, "aux_loss_alpha": 0.0, "document_mask": True},
}


def assert_same(alone, run, recorded: dict, parts: list[dict]) -> None:
    """A run's losses, norms, validation, scores, first gradients and adapter are those of one
    process, within 1e-5."""
    for mine, theirs in zip(metrics(run), metrics(alone), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)
    seen = {}
    for gradients in parts:  # of each rank
        for name, gradient in gradients.items():
            assert torch.equal(seen.setdefault(name, gradient), gradient)
    assert seen.keys() == recorded.keys()
    for name, gradient in recorded.items():
        torch.testing.assert_close(
            seen[name], gradient, rtol=1e-5, atol=1e-5 * gradient.abs().max().item()
        )
    (file,) = (path.name for path in (alone / "adapter").glob("*.safetensors"))
    mine, theirs = load_file(run / "adapter" / file), load_file(alone / "adapter" / file)
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (mine[name] - tensor).norm() <= 1e-5 * tensor.norm(), name
    for name in ("expert_cfg.json", "adapter/expert_cfg.json", "adapter/adapter_config.json"):
        if (alone / name).exists():
            assert (run / name).read_bytes() == (alone / name).read_bytes()


@pytest.fixture(scope="module")
def runs(bases, chats, tmp_path_factory):
    """All cases, alone and on every layout: name -> folder of the run alone; folder of the rest."""
    folder = tmp_path_factory.mktemp("runs")
    cases = {
        f"{family}.{method}": (bases[family], changes)
        for family in ("deepseek_v2", "deepseek_v3")
        for method, changes in METHODS.items()
    }
    first = folder / "first.json"  # trained experts are all on the first of four ranks
    first.write_text(json.dumps({"experts": {"1": [1], "2": [0, 1]}}))
    cases |= {
        "few": (bases["deepseek_v2"], {"expert_config": str(first)}),
        "few.checkpointing": (
            bases["deepseek_v3"],
            {"expert_config": str(first), "gradient_checkpointing": True},
        ),
        "unreached": (bases["unreached"], {"method": "full"}),
        "small batch": (
            bases["deepseek_v2"],
            {"batch_size": 2, "gradient_accumulation_steps": 1},
        ),
    }
    recorded = {}
    torch.set_num_threads(1)  # as the ranks
    for name, (base, changes) in cases.items():
        alone = RecordingAlone()
        train(TrainConfig(**keys(base, chats, folder / name, **changes)), alone)
        recorded[name] = alone.recorded
    torch.set_num_threads(2)
    for ranks in (1, 2, 4):
        listed = [
            {
                "name": f"{name}.{ranks}.{ep_size}",
                "ep_size": ep_size,
                "config": keys(base, chats, folder / f"{name}.{ranks}.{ep_size}", **changes),
            }
            for name, (base, changes) in cases.items()
            for count, ep_size in LAYOUTS
            if count == ranks
        ]
        torchrun(folder, ranks, listed)
    return folder, recorded


CASES = [f"{family}.{method}" for family in ("deepseek_v2", "deepseek_v3") for method in METHODS]
CASES += ["few", "few.checkpointing", "unreached", "small batch"]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("ranks, ep_size", LAYOUTS)
def test_a_run_on_ranks_equals_one_process(runs, name, ranks, ep_size):
    folder, recorded = runs
    case = f"{name}.{ranks}.{ep_size}"
    parts = []
    for rank in range(ranks):
        report = json.loads((folder / f"{case}.{rank}.json").read_text())
        assert report["error"] is None
        parts.append(load_file(folder / f"{case}.{rank}.safetensors"))
    assert_same(folder / name, folder / case, recorded[name], parts)
    if name == "few" and ep_size == 4:
        assert parts[0] and not any(parts[1:])
