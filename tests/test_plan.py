"""What --plan says equals what a step takes; what a finished run shows."""

import itertools
import json
import math
import re
import sys

import pytest
import torch
from conftest import ROOT, random_config
from test_model import small_config
from test_train import metrics, settings

from benchmarks.v2_lite import V2_LITE
from checkpoint import build_model, load_model
from data import Rows
from families import read_config
from fast import StackedExperts
from model import ModelConfig
from processes import SingleProcess
from train import compute_gradients, main, train
from train_ep import Rehearsal, plan_ranks
from training import plan as planning
from training import report as reporting
from training.config import TrainConfig
from training.exchange import exchange_lines, nccl_bytes, ranks_reached, step_flops
from training.optimizer import MasterAdamW, mark_trained
from training.plan import plan, plan_rank
from training.rehearsal import Allocations, step_bytes
from training.report import report


@pytest.mark.parametrize("experts", ["grouped", "loop"])
@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_planned_bytes_are_those_of_a_real_step(checkpoint, experts, checkpointing, micro_batches):
    """The rehearsal without data against the same step with data, on a CPU. Real tokens are spread
    less evenly over the experts, so that the tensors of single experts differ a little."""
    config = TrainConfig(
        seq_length=256,
        batch_size=2 * micro_batches,
        gradient_accumulation_steps=micro_batches,
        gradient_checkpointing=checkpointing,
        learning_rate=1e-5,
        device="cpu",
        dtype="bfloat16",
    )
    cfg = {"experts": {"1": [0, 3, 4], "2": [5]}, "shared_experts": True}
    peaks = []
    for model in (
        build_model(load_model(checkpoint).config, "meta", experts=experts),
        load_model(checkpoint, experts=experts),
    ):
        trained = mark_trained(config, model, cfg)
        if not peaks:
            peaks.append(step_bytes(config, model, trained, SingleProcess(), compute_gradients))
            continue
        optimizer = MasterAdamW(trained, config)
        tokens = torch.randint(0, 258, (config.batch_size, 256))
        known = [*model.parameters(), *model.buffers(), *optimizer.masters.values()]
        for layer in model.config.moe_layers:
            moe = model.model.layers[layer].mlp
            if isinstance(moe.experts, StackedExperts):
                known += [moe.experts.gate_up, moe.experts.down]
        rows = Rows(tokens, tokens, torch.zeros_like(tokens))
        with Allocations([*known, tokens, rows.documents]) as allocations:
            compute_gradients(config, model, rows, 0.0, optimizer, SingleProcess())
        peaks.append(allocations.peak)
    assert peaks[0] == pytest.approx(peaks[1], rel=0.05)


@pytest.mark.parametrize("checkpointing", [True, False])
def test_planned_bytes_of_the_demo_are_those_of_its_step(checkpointing):
    """Where experts are small and few are trained, how many slots are theirs counts."""
    config = TrainConfig(
        seq_length=256,
        batch_size=4,
        gradient_accumulation_steps=1,
        gradient_checkpointing=checkpointing,
        learning_rate=1e-5,
        device="cpu",
        dtype="float32",
    )
    cfg = {"experts": {"1": [0, 4, 22, 37], "2": [7, 5], "3": [53], "4": [7, 24, 39, 21]}}
    base = load_model(ROOT / "demo/base", dtype=torch.float32)
    meta = build_model(base.config, "meta", torch.float32)
    marked = mark_trained(config, meta, cfg)
    planned = step_bytes(config, meta, marked, SingleProcess(), compute_gradients)
    optimizer = MasterAdamW(mark_trained(config, base, cfg), config)
    tokens = torch.randint(0, 1024, (config.batch_size, 256))
    rows = Rows(tokens, tokens, torch.zeros_like(tokens))
    stacked = [m for m in base.modules() if isinstance(m, StackedExperts)]
    stacks = [stack for experts in stacked for stack in (experts.gate_up, experts.down)]
    known = [*base.parameters(), *base.buffers(), *stacks, tokens, rows.documents]
    with Allocations(known) as allocations:
        compute_gradients(config, base, rows, 0.0005, optimizer, SingleProcess())
    assert planned == pytest.approx(allocations.peak, rel=0.01)


def test_a_plan_over_ranks_does_not_depend_on_the_order_of_the_experts():
    config = TrainConfig(
        seq_length=8,
        batch_size=4,
        gradient_accumulation_steps=1,
        learning_rate=1e-5,
        device="cuda",
        dtype="bfloat16",
    )
    sizes = dict(num_hidden_layers=4, hidden_size=64, moe_intermediate_size=512, vocab_size=64)
    needs = []
    for experts in ([0, 1, 6, 7], [6, 7, 0, 1]):
        base = small_config(**sizes)
        cfg = {"experts": {str(layer): experts for layer in base.moe_layers}}
        rank = Rehearsal(4, 4, 8, cfg)
        need = plan_rank(config, base, cfg, rank, compute_gradients)
        needs.append({name: v for name, v in need.items() if name != "peak"})
    assert needs[0] == needs[1]
    # The rank that is planned is the one that trains the most.
    assert Rehearsal(4, 4, 8, {"experts": {"1": [0, 6], "2": [0, 6, 7]}}).member == 3


def test_plan_by_hand(tmp_path):
    """Everything but the activations, for one rank and for four, of a model whose every number is
    written here."""
    fields = random_config(1) | {"hidden_size": 32, "moe_intermediate_size": 8}
    fields |= {"model_type": "deepseek_v2", "first_k_dense_replace": 1, "n_shared_experts": 1}
    (tmp_path / "base").mkdir()
    (tmp_path / "base/config.json").write_text(json.dumps(fields))
    (tmp_path / "cfg.json").write_text(json.dumps({"experts": {"1": [0, 1, 7], "2": [2]}}))
    config = TrainConfig(
        model=str(tmp_path / "base"),
        expert_config=str(tmp_path / "cfg.json"),
        output_dir=str(tmp_path / "run"),
        seq_length=16,
        batch_size=8,
        gradient_accumulation_steps=4,
        device="cuda",
        dtype="bfloat16",
    )
    meta = build_model(read_config(tmp_path / "base"), "meta")
    total = sum(p.numel() for p in meta.parameters())
    expert = 3 * 32 * 8
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    for ranks, ep_size, mine, own, experts, micro_batches, buffers in (
        (1, 1, 4, 4, 16, "4 of 2 rows", 0),
        (4, 4, 2, 2, 4, "1 of 2 rows", 2078),  # (0.13 + 4 x 0.175 + 3 x 0.4) GiB
        (4, 1, 4, 1, 16, "1 of 2 rows", 849),  # (0.13 + 4 x 0.175) GiB
    ):
        rank = Rehearsal(ranks, ep_size, 8, cfg)
        need = plan_rank(config, meta.config, cfg, rank, compute_gradients)
        assert need["trained"] == mine * expert  # of four ranks the first: experts 0 and 1
        assert need["held"] == total - (16 - experts) * expert
        assert need["weights"] == 2 * need["held"]
        # Of four replicas each updates one expert of four.
        assert need["masters"] == need["gradients"] == 4 * own * expert
        assert need["moments"] == 8 * own * expert
        assert need["micro-batches"] == micro_batches
        assert need["buffers"] // 2**20 == buffers
        fixed = need["weights"] + need["masters"] + need["moments"] + need["buffers"]
        for checkpointing in (True, False):
            activations = need["activations", checkpointing]
            assert need["peak", checkpointing] == fixed + need["gradients"] + activations
            # At least the largest that must be: float32 gradients, and a row's logits twice.
            assert activations > 2 * 16 * fields["vocab_size"] * 4
        assert 0 < need["activations", True] < need["activations", False]
    for text in (plan(config, compute_gradients), plan_ranks(config, [1, 4], None)):
        assert f"{total:,} parameters" in text and "GPU of 16 GB" in text
    following = "torchrun --nproc-per-node RANKS train_ep.py with these keys, without --plan"
    assert text.endswith(f"next: {following}, with a whole checkpoint as --model")
    for ranks, ep_size in ((3, None), (4, 3), (8, 16)):
        with pytest.raises(
            ValueError, match=f"--plan {ranks}: ep_size is {ep_size or ranks}; must"
        ):
            plan_ranks(config, [ranks], ep_size)
    (tmp_path / "cfg.json").write_text(json.dumps({"experts": {"1": []}}))
    with pytest.raises(ValueError, match="cfg.json: selects nothing to train"):
        plan(config, compute_gradients)
    config.device = "gpu"
    with pytest.raises(ValueError, match="device is 'gpu'; must be cpu or cuda"):
        plan(config, compute_gradients)
    config.device, config.expert_config = "cuda", "nowhere.json"
    with pytest.raises(FileNotFoundError, match="nowhere.json: no such file"):
        plan(config, compute_gradients)


def test_plan_of_v2_lite_and_what_it_assumes(tmp_path, monkeypatch, capsys):
    """The published shape: 15,706,484,224 parameters; experts are not selected yet. No step is
    rehearsed, which takes time."""
    for name in ("step_bytes", "inference_bytes"):
        monkeypatch.setattr(planning, name, lambda *_: 0)
    command = ["train.py", "--config", str(ROOT / "configs/esft_v2_lite.toml"), "--plan"]
    command += ["--model", str(ROOT / "configs/DeepSeek-V2-Lite"), "--device", "cuda"]
    command += ["--output_dir", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", command)
    main()
    said = capsys.readouterr().out
    assert "15,706,484,224 parameters, bfloat16; esft: 5 of 64 experts a layer, assumed" in said
    assert "29.26 GiB" in said and not (tmp_path / "run").exists()
    assert said.endswith("next: one of the commands above, with a whole checkpoint as --model\n")
    fields = json.loads((ROOT / "configs/DeepSeek-V2-Lite/config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(fields | {"num_hidden_layers": 2}))
    (tmp_path / "model.safetensors").touch()
    monkeypatch.setattr(sys, "argv", [*command, "--model", str(tmp_path)])
    main()
    assert capsys.readouterr().out.endswith("next: one of the commands above\n")


@pytest.mark.parametrize("name", ["checkpoints/ESFT-vanilla-lite", "nowhere"])
def test_a_plan_without_the_checkpoint_names_configs_that_will_do(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    config = TrainConfig(model=name, data="d", output_dir="o", device="cpu")
    config.check()
    with pytest.raises(FileNotFoundError, match=f"^{name}: no such .*--model configs/") as error:
        plan(config, compute_gradients)
    folders = re.findall(r"configs/[\w-]+", str(error.value))
    assert len(folders) == 2 and all((ROOT / f / "config.json").is_file() for f in folders)


def test_what_ranks_exchange_by_hand():
    """DeepSeek-V2-Lite: a token uses 2.45 billion parameters, the embedding apart."""
    config = TrainConfig(
        seq_length=4096,
        batch_size=32,
        gradient_accumulation_steps=8,
        gradient_checkpointing=False,
        dtype="bfloat16",
        device="cuda",
    )
    base = ModelConfig(**V2_LITE)
    # Forward and backward of the linear layers, and 0.57 GFLOP of attention, 2.5 times in backward.
    assert step_flops(config, base) == pytest.approx(2 * 4.9e9 + 3.5 * 0.57e9, rel=0.01)
    columns = [Rehearsal(8, 8, 64, None), Rehearsal(16, 4, 64, None)]
    lines = dict(re.split(r"\s{3,}", line, maxsplit=1) for line in lines_of(config, base, columns))
    # 4 rows of 4096 tokens, and 2 rows. A rank holds none of a token's 6 experts of 64 if these are
    # all among the 56, or 48, of other ranks.
    shares = [(1 - math.comb(64 - 64 // R, 6) / math.comb(64, 6)) * (R - 1) for R in (8, 4)]
    sent = [round(16384 * shares[0]), round(8192 * shares[1])]
    label = "x the other ranks with some of its 6 experts"
    assert lines[label].split() == [f"{n:,}" for n in sent] == ["65,021", "20,553"]
    way = sent[0] * 2048 * 2
    assert lines["x 2048 x 2 bytes: one way"].startswith(f"{way / 2**20:.1f} MiB")
    step = way * 26 * 4
    assert lines["x 26 layers x micro-batches: a step"].startswith(f"{step / 2**30:.2f} GiB")
    arithmetic = 16384 * step_flops(config, base) / 430e12
    taken = step / 130e9
    share = taken / (taken + arithmetic)
    assert lines["exchange at 130 GB/s (NVLink 4)"].startswith(f"{taken:.2f} s, {share:.0%}")


def test_to_how_many_ranks_a_token_goes():
    """All ways to draw 3 of 8 experts, of which each of four ranks holds two."""
    drawn = [{e // 2 for e in experts} for experts in itertools.combinations(range(8), 3)]
    assert ranks_reached(8, 4, 3) == pytest.approx(sum(map(len, drawn)) / len(drawn))
    assert ranks_reached(8, 8, 3) == 3 and ranks_reached(8, 1, 3) == 1


def test_what_nccl_takes():
    """Within 0.1 GiB of what four H100s said, of which two and two are groups, and exchange."""
    for ep_size, measured in ((4, 2.01), (2, 2.15), (1, 0.83)):
        assert nccl_bytes(4, ep_size) / 2**30 == pytest.approx(measured, abs=0.1)
    assert nccl_bytes(1, 1) == 0


def lines_of(config, base, columns) -> list[str]:
    return [line for line in exchange_lines(config, base, columns) if "   " in line]


def test_a_plan_takes_the_selection_of_its_own_run_alone(checkpoint, chat_file, tmp_path):
    config = settings(checkpoint, chat_file, tmp_path / "run", steps=1)
    train(config)
    assert "the experts of" in plan(config, compute_gradients)
    for changes in ({"top_p": 0.9}, {"selection": "random"}, {"overwrite": True}):
        other = settings(checkpoint, chat_file, tmp_path / "run", steps=1, **changes)
        assert "assumed: they are not selected yet" in plan(other, compute_gradients)


def test_the_report_shows_what_the_run_did(checkpoint, chat_file, tmp_path, monkeypatch):
    evaluation = tmp_path / "eval.jsonl"
    evaluation.write_text(json.dumps({"prompt": "a", "raw_answers": ["b"]}) + "\n")
    config = settings(checkpoint, chat_file, tmp_path / "run", eval_sets=[f"exact:{evaluation}"])
    results = train(config)
    assert report(config) == ["report.txt", "report.png"]
    assert (tmp_path / "run/report.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "run/report.txt").read_text()
    lines = text.splitlines()
    assert f"trained    {results['trained_parameters']:,} of {results['all_parameters']:,}" in text
    size = (tmp_path / "run/adapter/adapter.safetensors").stat().st_size
    assert results["adapter_bytes"] == size
    assert any(line.split()[:2] == ["eval", "exact"] for line in lines)
    records = metrics(tmp_path / "run")
    losses = [
        line.split()
        for line in lines[lines.index(next(x for x in lines if "step" in x.split()[:1])) + 1 :][:3]
    ]
    for (step, mean, validated, *best), k in zip(losses, (2, 4, 6), strict=True):
        assert int(step) == k
        expected = (records[k - 1]["loss"] + records[k - 2]["loss"]) / 2
        assert float(mean) == pytest.approx(expected, abs=1e-4)
        assert float(validated) == pytest.approx(records[k - 1]["validation_loss"], abs=1e-4)
        assert bool(best) == (records[k - 1]["validation_loss"] == results["best_validation_loss"])
    # Routing, by hand from the two score files.
    before, after = (
        json.loads((tmp_path / "run" / name).read_text())["token_scores"]
        for name in ("expert_cfg.scores.json", "scores_after.json")
    )
    chosen = json.loads((tmp_path / "run/expert_cfg.json").read_text())["experts"]
    for layer in ("1", "2"):
        line = next(x.split() for x in lines if x.split()[:1] == [layer] and len(x.split()) == 5)
        held = [sum(s[layer][str(e)] for e in chosen[layer]) for s in (before, after)]
        moved = sum(abs(before[layer][e] - after[layer][e]) for e in before[layer]) / 2
        assert [float(x) for x in line[2:]] == pytest.approx([*held, moved], abs=6e-4)
    lora = settings(checkpoint, chat_file, tmp_path / "lora", method="lora", steps=2)
    train(lora)
    report(lora)
    text = (tmp_path / "lora/report.txt").read_text()
    assert (
        "selected" not in text
        and len(text.partition("\n\ntoken scores")[0].splitlines()[-1].split()) == 2
    )
    monkeypatch.setattr(reporting.importlib.util, "find_spec", lambda name: None)
    assert report(config) == ["report.txt"]
    assert "\ntoken scores of 8 experts, from 0" in (tmp_path / "run/report.txt").read_text()


def test_every_step_says_what_it_cost(checkpoint, chat_file, tmp_path, capsys):
    train(settings(checkpoint, chat_file, tmp_path / "run", log_steps=1))
    rows = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 6
    for row in rows:
        assert row["tokens_per_second"] > 0 and 0.1 < row["memory_gib"] < 100
    left = [row["seconds_left"] for row in rows]
    assert left[0] >= left[-2] > left[-1] == 0.0
    printed = capsys.readouterr().out
    assert len([line for line in printed.splitlines() if line.startswith("step ")]) == 6
    for kind in ("attention", "router", "embedding and head"):
        line = next(x for x in printed.splitlines() if x.startswith(kind))
        assert line.endswith("0   frozen")
    assert "load balance loss x 0.1 (aux_loss_alpha)" in printed
