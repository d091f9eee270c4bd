"""With the optimizer in host memory a run has the bits of one whose optimizer is beside the
weights; the memory that it needs there."""

import os
import signal
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file
from test_train import metrics, settings

import train as trainer
from checkpoint import build_model, load_model
from data import IGNORE, Rows
from fast import StackedExperts
from processes import SingleProcess, total_norm
from train import compute_gradients, train
from training import host_optimizer
from training.config import TrainConfig
from training.host_optimizer import HostAdamW, available_bytes, make_optimizer
from training.optimizer import MasterAdamW, mark_trained
from training.plan import plan, plan_rank
from training.rehearsal import Allocations, step_bytes

EXPERT_CFG = {"experts": {"1": [0, 3, 4], "2": [5]}, "shared_experts": True}


def step_config(**changes) -> TrainConfig:
    sizes = dict(seq_length=48, batch_size=6, gradient_accumulation_steps=3, learning_rate=1e-2)
    sizes["gradient_checkpointing"] = True
    return TrainConfig(**{**sizes, "device": "cpu", "dtype": "float32", **changes})


def host_adamw(parameters: dict, **changes) -> HostAdamW:
    optimizer = make_optimizer(parameters, step_config(optimizer_device="cpu", **changes))
    assert type(optimizer) is HostAdamW
    return optimizer


def parameters_of(sizes: list[tuple], dtype=torch.bfloat16) -> dict[str, torch.nn.Parameter]:
    torch.manual_seed(0)
    return {str(i): torch.nn.Parameter(torch.randn(s, dtype=dtype)) for i, s in enumerate(sizes)}


# ------------------------------------------------------------------------------------------
# The same bits


@pytest.mark.parametrize("max_grad_norm", [1e-3, 1e3])
@pytest.mark.parametrize("experts", ["grouped", "loop"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_steps_have_the_bits_of_the_optimizer_beside_the_weights(
    checkpoint, dtype, experts, max_grad_norm
):
    """Four steps of three micro-batches with 94, 20 and 1 labels. No token reaches one parameter."""
    tokens = torch.randint(0, 258, (6, 48), generator=torch.Generator().manual_seed(3))
    labels = tokens.clone()
    labels[2:4, 11:] = labels[4, :] = labels[5, 2:] = IGNORE
    rows = Rows(tokens, labels, torch.zeros_like(tokens))
    assert [part.learned.sum().item() for part in rows.split(2)] == [94, 20, 1]
    seen = []
    for device in ("", "cpu"):
        model = load_model(checkpoint, dtype=getattr(torch, dtype), experts=experts)
        config = step_config(optimizer_device=device, dtype=dtype, max_grad_norm=max_grad_norm)
        trained = mark_trained(config, model, EXPERT_CFG)
        trained |= {"unreached": torch.nn.Parameter(torch.ones(3, 5, dtype=getattr(torch, dtype)))}
        optimizer = make_optimizer(trained, config)
        assert type(optimizer) is (HostAdamW if device else MasterAdamW)
        for step in range(4):
            compute_gradients(config, model, rows, 0.1, optimizer, SingleProcess())
            assert all(p.grad is None for p in model.parameters())
            gradients = optimizer.gradients
            assert gradients.keys() == trained.keys() and not gradients["unreached"].any()
            norm = SingleProcess().norm(gradients)
            assert (norm > max_grad_norm) == (max_grad_norm < 1)
            optimizer.clip(norm)
            seen.append({n: g.clone() for n, g in gradients.items()} | {"norm": norm})
            optimizer.step(1e-2 / (step + 1))
            values = {f"parameter.{n}": p.detach().clone() for n, p in trained.items()}
            state = {n: t.clone() for n, t in optimizer.state().items()}
            seen[-1] |= values | state
    beside, on_host = seen[:4], seen[4:]
    assert not torch.equal(beside[0]["master.unreached"], beside[3]["master.unreached"])  # decays
    for mine, theirs in zip(on_host, beside):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("experts", ["grouped", "loop"])
def test_a_run_has_the_same_bits_wherever_its_optimizer_rests(
    checkpoint, chat_file, tmp_path, monkeypatch, experts, checkpointing
):
    """Whole, stopped between two checkpoints and continued, and moved while stopped."""

    class Stopped(Exception):
        pass

    def stop(config, record):
        if record["step"] == 3:
            raise Stopped

    def run(name: str, device: str, **changes) -> dict:
        changes |= {"experts": experts, "gradient_checkpointing": checkpointing}
        changes |= {"dtype": "bfloat16", "max_grad_norm": 0.5, "optimizer_device": device}
        train(settings(checkpoint, chat_file, tmp_path / name, **changes))
        files = ["adapter/adapter.safetensors", "checkpoints/step-000006/optimizer.safetensors"]
        contents = {file: (tmp_path / name / file).read_bytes() for file in files}
        return contents | {"metrics": metrics(tmp_path / name)}

    def in_two_parts(name: str, first: str, second: str) -> dict:
        with monkeypatch.context() as patched, pytest.raises(Stopped):
            patched.setattr(trainer, "print_step", stop)
            run(name, first)
        return run(name, second)

    whole = run("whole", "")
    assert max(record["grad_norm"] for record in whole["metrics"]) > 0.5
    assert run("on host", "cpu") == whole
    assert in_two_parts("parts", "cpu", "cpu") == whole
    assert in_two_parts("to the host", "", "cpu") == whole
    assert in_two_parts("from the host", "cpu", "") == whole


def test_a_killed_run_ends_the_same(checkpoint, chat_file, tmp_path):
    changes = {"optimizer_device": "cpu", "gradient_checkpointing": True, "save_steps": 1}
    config = settings(checkpoint, chat_file, tmp_path / "run", **changes)
    command = [sys.executable, "tests/signalled.py", "SIGKILL", "0", "4", "train"]
    for key, value in asdict(config).items():
        if value not in ([], TrainConfig.__dataclass_fields__[key].default):
            command += [f"--{key}", str(value).lower() if type(value) is bool else str(value)]
    environment = {**os.environ, "SIGNALLED": str(tmp_path / "pid")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True)
    assert done.returncode == -signal.SIGKILL and len(metrics(tmp_path / "run")) == 3
    train(config)
    train(settings(checkpoint, chat_file, tmp_path / "whole", **changes))
    for file in ("adapter/adapter.safetensors", "checkpoints/step-000006/optimizer.safetensors"):
        mine, theirs = (load_file(tmp_path / run / file) for run in ("run", "whole"))
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("shapes", [[(40, 30)] * 17, [(7,), (1000, 300)], []])
def test_the_norm_has_the_bits_of_torch_on_any_number_of_threads(monkeypatch, shapes):
    tensors = [p.detach() for p in parameters_of(shapes, torch.float32).values()]
    expected = torch.nn.utils.get_total_norm(tensors)
    assert expected.item() == pytest.approx(
        sum(t.double().square().sum().item() for t in tensors) ** 0.5, rel=1e-4
    )
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        assert torch.equal(total_norm(iter(tensors)), expected)


# ------------------------------------------------------------------------------------------
# Sums


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_sums_of_many_parameters_by_hand(monkeypatch, dtype):
    """Each gradient is i in the first micro-batch and 2 i in the second. Groups have one parameter
    or several."""
    monkeypatch.setattr(host_optimizer, "GROUP", 20)
    parameters = parameters_of([(3, 4), (7,), (2, 5), (1, 1), (12,), (5, 6)] * 4, dtype)
    optimizer = host_adamw(parameters)
    assert [len(group) for group in optimizer.groups[:5]] == [2, 2, 1, 1, 2]
    for _ in range(3):
        for factor in (1.0, 2.0):
            loss = sum(factor * int(n) * p.float().sum() for n, p in parameters.items())
            loss.backward()
            assert all(p.grad is None for p in parameters.values())
        for n, gradient in optimizer.gradients.items():
            assert gradient.dtype == torch.float32 and (gradient == 3 * int(n)).all()
        optimizer.step(0.1)
    for name, p in parameters.items():
        assert torch.equal(p, optimizer.masters[name].to(dtype))


def test_the_sums_of_a_step_are_those_of_the_next():
    """They are allocated once, and do not keep anything of the step before."""
    parameters = parameters_of([(3, 4), (5,)])
    optimizer, places = host_adamw(parameters), set()
    for used in ("01", "0", "1", ""):
        sum(
            (parameters[n].float().sum() for n in used), torch.zeros((), requires_grad=True)
        ).backward()
        optimizer.accumulate()
        gradients = optimizer.gradients
        assert [bool(gradients[n].all()) for n in "01"] == [n in used for n in "01"]
        assert all((gradients[n] == float(n in used)).all() for n in "01")
        places.add(tuple(g.data_ptr() for g in gradients.values()))
        optimizer.step(0.1)
    assert len(places) == 1


# ------------------------------------------------------------------------------------------
# Memory


def test_a_rank_may_train_nothing():
    optimizer = host_adamw({})
    assert optimizer.gradients == {} and total_norm([]) == 0
    optimizer.step(0.1)


@pytest.fixture
def host(tmp_path, monkeypatch):
    """Sets what the host and its cgroup say, in MiB."""

    def say(available: int | None, limit: int | str | None = None, used: int = 0) -> None:
        folder = tmp_path / f"host {available} {limit}"
        folder.mkdir()
        if available is not None:
            text = (
                f"MemTotal: 999999 kB\nMemAvailable:   {available << 10} kB\nHugePages_Total: 0\n"
            )
            (folder / "meminfo").write_text(text)
        if limit is not None:
            limit = limit if limit == "max" else limit << 20
            (folder / "memory.max").write_text(f"{limit}\n")
            (folder / "memory.stat").write_text(f"anon {used << 20}\nfile 77\nanon_thp 5\n")
        monkeypatch.setattr(host_optimizer, "MEMINFO", folder / "meminfo")
        monkeypatch.setattr(host_optimizer, "CGROUP", folder)

    return say


def test_the_smaller_of_what_host_and_cgroup_leave_counts(host):
    for said, left in (
        ((5000,), 5000),
        ((5000, "max"), 5000),
        ((5000, 3000, 1000), 2000),
        ((1500, 3000, 1000), 1500),
        ((None, 3000, 400), 2600),
        ((None,), float("inf")),
        ((None, "max"), float("inf")),
    ):
        host(*said)
        assert available_bytes() == left * 2**20


def test_too_little_host_memory_is_an_error_before_the_first_step(
    checkpoint, chat_file, tmp_path, host, monkeypatch
):
    changes = {"optimizer_device": "cpu", "steps": 1, "overwrite": True}
    config = settings(checkpoint, chat_file, tmp_path / "run", **changes)
    for said in ((0,), (9000, 2, 2)):
        host(*said)
        with pytest.raises(
            ValueError, match="optimizer_device is 'cpu'; the optimizer needs 0.0 GiB"
        ):
            train(config)
        assert not (tmp_path / "run/metrics.jsonl").exists()
    host(None)
    need = 16 * train(config)["trained_parameters"]
    host(1 + need // 2**20)  # enough for one rank, not for four
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4096")
    monkeypatch.setattr(SingleProcess, "from_all", lambda _, value: [value] * 4096)
    with pytest.raises(ValueError, match="of 4096 ranks needs .* GiB of host memory, 0.0 GiB are"):
        train(config)
    train(settings(checkpoint, chat_file, tmp_path / "beside", steps=1))  # needs none


def test_wrong_devices_are_refused():
    for value, message in (
        ("cuda", "is 'cuda'; must be one of cpu"),
        (0, "is 0; must be a string"),
    ):
        with pytest.raises(ValueError, match=f"optimizer_device {message}"):
            TrainConfig(model="a", data="b", output_dir="c", optimizer_device=value).check()


# ------------------------------------------------------------------------------------------
# The plan


@pytest.mark.parametrize("experts", ["grouped", "loop"])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_planned_bytes_are_those_of_a_real_step(checkpoint, experts, checkpointing):
    """As in test_plan.py; what rests in host memory does not count."""
    config = step_config(
        optimizer_device="cpu",
        seq_length=256,
        dtype="bfloat16",
        gradient_checkpointing=checkpointing,
    )
    real = load_model(checkpoint, experts=experts)
    meta = build_model(real.config, "meta", experts=experts)
    trained = mark_trained(config, meta, EXPERT_CFG)
    planned = step_bytes(config, meta, trained, SingleProcess(), compute_gradients)
    optimizer = make_optimizer(mark_trained(config, real, EXPERT_CFG), config)
    tokens = torch.randint(0, 258, (config.batch_size, 256))
    rows = Rows(tokens, tokens, torch.zeros_like(tokens))
    stacked = [m for m in real.modules() if isinstance(m, StackedExperts)]
    known = [*real.parameters(), *real.buffers(), *rows]
    known += [stack for experts in stacked for stack in (experts.gate_up, experts.down)]
    with Allocations(known) as allocations:
        compute_gradients(config, real, rows, 0.0, optimizer, SingleProcess())
    assert planned == pytest.approx(allocations.peak, rel=0.05)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_plan_says_what_host_and_device_need(checkpoint, chat_file, tmp_path, host, dtype):
    host(0)  # a plan runs anywhere
    base, plans = load_model(checkpoint).config, {}
    for device in ("", "cpu"):
        changes = {"optimizer_device": device, "dtype": dtype, "expert_config": ""}
        config = settings(checkpoint, chat_file, tmp_path / "run", **changes)
        plans[device] = plan_rank(config, base, EXPERT_CFG, SingleProcess(), compute_gradients)
        assert ("host memory of the optimizer" in plan(config, compute_gradients)) == bool(device)
    beside, on_host = plans[""], plans["cpu"]
    assert beside["host"] == 0
    assert [on_host[name] for name in ("masters", "moments", "gradients")] == [0, 0, 0]
    assert on_host["weights"] == beside["weights"] and on_host["trained"] == beside["trained"]
    count = on_host["trained"]
    # 3 experts and the shared ones of two layers in one group: 2^14 elements of pinned memory
    assert count == 13824 and on_host["host"] == 8 * count + 8 * 2**14
    rest = beside["masters"] + beside["moments"]
    for checkpointing in (True, False):
        saved = beside["peak", checkpointing] - on_host["peak", checkpointing]
        assert rest + beside["gradients"] <= saved <= rest + beside["gradients"] + 4 * count
        activations = on_host["activations", checkpointing]
        assert on_host["peak", checkpointing] == on_host["weights"] + activations
