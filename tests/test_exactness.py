"""A run that is killed, interrupted, damaged or out of disk ends as if nothing had happened; what
is frozen does not move; one step is what the formulas say."""

import inspect
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, save_tokenizer, save_with_transformers, write_chats
from safetensors.torch import load_file, save_file
from test_train import metrics, settings

import train as trainer
from adapter import mark_trainable, save_adapter, trained_parameters
from checkpoint import load_model
from data import IGNORE, Rows
from fast import token_losses
from files import locked
from model import Block, checkpointed
from processes import SingleProcess
from train import train
from training import directory
from training.config import TrainConfig
from training.directory import check_checkpoint, checkpoints
from training.optimizer import MasterAdamW
from training.stopping import not_finite_message


def result(output: Path) -> dict:
    """What must be the same, bit for bit."""
    files = ["adapter/adapter.safetensors", "adapter/expert_cfg.json", "expert_cfg.json"]
    files += ["checkpoints/step-000006/optimizer.safetensors", "scores_after.json"]
    return {"metrics": metrics(output)} | {name: (output / name).read_bytes() for name in files}


EACH_STEP = {"save_steps": 1, "dtype": "bfloat16"}  # has a checkpoint


@pytest.fixture
def run(checkpoint, chat_file, tmp_path):
    """Trains in a folder under `tmp_path`."""

    def run(name: str, **changes) -> Path:
        train(settings(checkpoint, chat_file, tmp_path / name, **EACH_STEP | changes))
        return tmp_path / name

    return run


@pytest.fixture(scope="module")
def whole_run(checkpoint, tmp_path_factory) -> Path:
    """The folder of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    chats = write_chats(folder / "train.jsonl")
    train(settings(checkpoint, chats, folder / "run", **EACH_STEP))
    return folder / "run"


@pytest.fixture(scope="module")
def whole(whole_run) -> dict:
    return result(whole_run)


# ------------------------------------------------------------------------------------------
# Kills


class Killed(BaseException):
    pass


def wait_for_threads() -> None:
    """Those that write checkpoints: they would live on in a process that only pretends to die."""
    for thread in threading.enumerate():
        if thread.name == "checkpoint":
            thread.join()


def test_a_kill_at_any_touch_of_the_file_system(run, whole, tmp_path, monkeypatch):
    """A process that dies does nothing more: after the first call that fails, all of them do, so
    that no `finally` tidies up."""
    calls = [(os, "replace"), (os, "fsync"), (os, "chmod"), (shutil, "rmtree"), (Path, "unlink")]
    calls += [
        (Path, "mkdir"),
        (inspect.getmodule(save_adapter), "save_file"),
        (directory, "write_tensors"),
    ]

    def kill_at(number: int, folder: str) -> bool:
        """Runs until the `number`-th call; says whether there was one."""
        count = 0

        def dying(function):
            def call(*args, **kwargs):
                nonlocal count
                count += 1
                if count >= number:
                    raise Killed
                return function(*args, **kwargs)

            return call

        with monkeypatch.context() as patched:
            for owner, name in calls:
                patched.setattr(owner, name, dying(getattr(owner, name)))
            try:
                run(folder)
            except Killed:
                wait_for_threads()
                return True
        return False

    number, ends = 1, 0
    while kill_at(number, f"run{number}"):
        assert result(run(f"run{number}")) == whole, number
        names = [path.name for path in (tmp_path / f"run{number}/checkpoints").iterdir()]
        assert all(name.startswith("step-") for name in names)  # nothing half written or damaged
        shutil.rmtree(tmp_path / f"run{number}")
        # The first ones each, then each kind of call, all within half a minute.
        number, ends = number + (1 if number < 12 else 11), ends + 1
    assert ends > 20


def test_overwriting_that_is_killed_leaves_neither_a_finished_run_nor_half_of_one(
    run, whole, tmp_path, monkeypatch
):
    run("run")
    shutil.copytree(tmp_path / "run", tmp_path / "finished")
    for kills in range(1, 8):
        with monkeypatch.context() as patched:
            count = []

            def dying(function):
                def call(*args, **kwargs):
                    count.append(function)
                    if len(count) > kills:
                        raise Killed
                    return function(*args, **kwargs)

                return call

            patched.setattr(Path, "unlink", dying(Path.unlink))
            patched.setattr(shutil, "rmtree", dying(shutil.rmtree))
            with pytest.raises(Killed):
                run("run", overwrite=True)
        assert (tmp_path / "run/train_config.json").exists()
        assert result(run("run")) == whole  # without overwriting: begins anew
        shutil.rmtree(tmp_path / "run")
        shutil.copytree(tmp_path / "finished", tmp_path / "run")


@pytest.mark.parametrize("step, saved", [(3, 4), (6, 6)])
def test_a_signal_after_the_step_is_not_lost(run, whole, tmp_path, monkeypatch, step, saved):
    """Neither between saving and stopping nor behind the last step."""
    stop_after(monkeypatch, step, lambda: signal.raise_signal(signal.SIGINT))
    message = f"SIGINT after step {saved}; kept: .*step-00000{saved}, from which the same command"
    with pytest.raises(KeyboardInterrupt, match=message):
        run("run", save_steps=100)
    monkeypatch.undo()
    assert not (tmp_path / "run/results.json").exists()
    assert result(run("run", save_steps=100)) == whole


def test_what_is_kept_is_not_overwritten_by_what_is_said(run, tmp_path, monkeypatch):
    stop_after(monkeypatch, 3, lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt, match="the same command without --overwrite goes on"):
        run("run", overwrite=True)


def test_random_kills_of_the_process(tmp_path):
    """The benchmark's own check, of a shorter run on fewer rows."""
    rows = (ROOT / "demo/data/intent_train.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "rows.jsonl").write_text("".join(rows[:200]))
    small = {"steps": 8, "seq_length": 64, "batch_size": 4, "n_sample_tokens": 1000}
    small["data"] = str(tmp_path / "rows.jsonl")
    small["gradient_checkpointing"] = "false"  # without the rehearsal of a step
    program = f"import kills; kills.KEYS |= {small}; kills.main()"
    command = [sys.executable, "-c", program, "--kills", "1"]
    done = subprocess.run(command, cwd=ROOT / "benchmarks", capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["kills"] == 1


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_signals_write_a_checkpoint_and_say_how_to_go_on(checkpoint, chat_file, tmp_path, name):
    changes = {"steps": 12, "save_steps": 12, "eval_steps": 5}
    config = settings(checkpoint, chat_file, tmp_path / "run", **changes)
    command = [sys.executable, "tests/signalled.py", name, "0", "5", "train"]
    for key, value in asdict(config).items():
        if value not in ([], TrainConfig.__dataclass_fields__[key].default):
            command += [f"--{key}", str(value).lower() if type(value) is bool else str(value)]
    environment = {**os.environ, "SIGNALLED": str(tmp_path / "pid")}
    done = subprocess.run(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    errors, steps = done.stderr, len(metrics(tmp_path / "run"))
    assert done.returncode == 130 and steps == 5
    assert "finishes the step, then writes a checkpoint" in errors
    kept = tmp_path / f"run/checkpoints/step-{steps:06d}"
    assert f"stopped: {name} after step {steps}; kept: {kept}, from which the same" in errors
    assert checkpoints(tmp_path / "run") == [kept]
    train(config)
    train(settings(checkpoint, chat_file, tmp_path / "whole", **changes))
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    last = "checkpoints/step-000012/optimizer.safetensors"
    assert (tmp_path / "run" / last).read_bytes() == (tmp_path / "whole" / last).read_bytes()


def test_two_runs_do_not_share_a_directory(run, tmp_path):
    with locked(tmp_path / "run"):
        with pytest.raises(ValueError, match="run: another process is writing there"):
            run("run")
    run("run")


# ------------------------------------------------------------------------------------------
# Damage


def stop_after(monkeypatch, step: int, action) -> None:
    """Calls `action` when the step's line would be printed."""

    def act(config, record):
        if record["step"] == step:
            action()

    monkeypatch.setattr(trainer, "print_step", act)


def die():
    wait_for_threads()
    raise Killed


@pytest.mark.parametrize(
    "file", ["optimizer.safetensors", "state.json", "sha256.json", "optimizer-1.safetensors", None]
)
def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_is_used(
    run, whole, tmp_path, monkeypatch, capsys, file
):
    stop_after(monkeypatch, 5, die)  # the fourth checkpoint is in its place then
    with pytest.raises(Killed):
        run("run")
    monkeypatch.undo()
    newest = tmp_path / "run/checkpoints/step-000004"
    if file is None:
        (newest / "state.json").unlink()
    elif file == "optimizer-1.safetensors":  # it would be read, too
        shutil.copy(newest / "optimizer.safetensors", newest / file)
    else:
        content = bytearray((newest / file).read_bytes())
        content[len(content) // 2] ^= 1
        (newest / file).write_bytes(content)
    run("run")
    printed = capsys.readouterr().out
    aside = tmp_path / "run/checkpoints/damaged-step-000004"
    assert f"set aside as {aside}" in printed and aside.is_dir()
    assert f"{newest}/{'state.json' if file is None else ''}" in printed
    assert "continues after step 3" in printed
    assert result(tmp_path / "run") == whole


def test_all_checkpoints_damaged_begins_anew_and_says_so(run, whole, tmp_path, monkeypatch, capsys):
    stop_after(monkeypatch, 3, die)
    with pytest.raises(Killed):
        run("run")
    monkeypatch.undo()
    for path in checkpoints(tmp_path / "run"):
        (path / "state.json").unlink()
    run("run")
    assert "there is none before it: begins at step 1" in capsys.readouterr().out
    assert result(tmp_path / "run") == whole


@pytest.mark.parametrize("tail", [b"\0" * 40, b"\xff\xfe\n", b"5\n{}\n", b'{"step": 4, "lo'])
def test_anything_behind_the_checkpoint_in_metrics_is_passed_over(
    run, whole, tmp_path, monkeypatch, tail
):
    stop_after(monkeypatch, 4, die)
    with pytest.raises(Killed):
        run("run")
    monkeypatch.undo()
    path = tmp_path / "run/metrics.jsonl"
    path.write_bytes(path.read_bytes() + tail)
    assert result(run("run")) == whole
    (tmp_path / "run/results.json").unlink()
    path.write_bytes(b"5\n" + path.read_bytes().split(b"\n", 1)[1])  # before it: an error
    with pytest.raises(ValueError, match="metrics.jsonl: line 1: .*record of step 1 is required"):
        run("run")


def test_what_lies_beside_a_run_and_what_was_changed_in_it(run, whole, tmp_path, monkeypatch):
    stop_after(monkeypatch, 4, die)
    with pytest.raises(Killed):
        run("run")
    monkeypatch.undo()
    (tmp_path / "run/checkpoints/step-000003-backup").mkdir()  # no checkpoint of ours
    cfg = tmp_path / "run/expert_cfg.json"
    selected = cfg.read_text()
    every = {layer: list(range(8)) for layer in json.loads(selected)["experts"]}
    for experts in ({"1": [0]}, every):
        cfg.write_text(json.dumps({"experts": experts}))
        with pytest.raises(ValueError, match="cfg.json: selects other tensors than .*000003"):
            run("run")
    cfg.write_text(selected)
    shutil.move(tmp_path / "run", tmp_path / "moved")  # to a larger disk, say
    assert result(run("moved")) == whole
    shutil.move(tmp_path / "moved/checkpoints", tmp_path / "scratch")
    (tmp_path / "moved/checkpoints").symlink_to(tmp_path / "scratch")
    assert result(run("moved", overwrite=True)) == whole
    assert (tmp_path / "scratch/step-000006").is_dir()  # only the link was ours


@pytest.mark.parametrize("validation_fraction", [0.0, 0.1])
def test_a_last_step_that_spoils_the_weights_gives_no_adapter(
    run, tmp_path, monkeypatch, validation_fraction
):
    step = MasterAdamW.step

    def spoil(optimizer, learning_rate):
        step(optimizer, learning_rate)
        spoil.steps += 1
        if spoil.steps == 6:
            with torch.no_grad():
                next(iter(optimizer.parameters.values())).fill_(torch.nan)

    spoil.steps = 0
    monkeypatch.setattr(MasterAdamW, "step", spoil)
    with pytest.raises(FloatingPointError, match="step 6: .*kept: [^ ]*$"):
        run("run", eval_steps=100, validation_fraction=validation_fraction)
    assert not (tmp_path / "run/results.json").exists()
    assert not (tmp_path / "run/adapter").exists()


def test_a_full_disk_leaves_the_checkpoint_before_whole(
    run, whole_run, whole, tmp_path, monkeypatch
):
    """A limit on the size of files stands in for the disk: both refuse the write."""
    size = (whole_run / "checkpoints/step-000006/optimizer.safetensors").stat().st_size
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    limit = (size // 2, unlimited[1])

    def fill() -> None:
        wait_for_threads()
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)

    stop_after(monkeypatch, 3, fill)
    try:
        with pytest.raises(OSError, match=r"safetensors.*kept: .*step-000003, from which the same"):
            run("run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    monkeypatch.undo()
    left = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert left == ["step-000002", "step-000003"]
    for path in checkpoints(tmp_path / "run"):
        check_checkpoint(path, SingleProcess())
    assert result(run("run")) == whole


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_not_finite_stops_the_run_and_keeps_the_state_before(
    run, chat_file, tmp_path, monkeypatch, what
):
    rows_of_step, losses, seen = trainer.rows_of_step, trainer.fast.token_losses, []
    monkeypatch.setattr(
        trainer, "rows_of_step", lambda *a: seen.append(rows_of_step(*a)) or seen[-1]
    )

    def poisoned(model, tokens, *args, **options):
        values, balance = losses(model, tokens, *args, **options)
        if len(seen) == 4 and torch.is_grad_enabled():
            if what == "gradient":
                values.register_hook(lambda grad: grad * torch.nan)
            elif tokens[0].tolist() == poison:
                values = values * torch.nan
        return values, balance

    config = settings(tmp_path, chat_file, tmp_path / "run")  # the rows depend on the data alone
    run("rows", steps=4)
    second = seen[3][2:]  # the second micro-batch of step 4
    base = next(iter(tmp_path.glob("rows/train_config.json")))
    config.model = json.loads(base.read_text())["model"]
    inputs = trainer.read_inputs(config)
    poison = inputs.rows.tokens[second[0]].tolist()
    seen.clear()
    monkeypatch.setattr(trainer.fast, "token_losses", poisoned)
    with pytest.raises(FloatingPointError) as error:
        run("run", save_steps=100)
    message = str(error.value)
    assert message.startswith("step 4: the loss is") and "nan" in message
    assert message.endswith(f"kept: {tmp_path}/run/checkpoints/step-000003")
    documents = [inputs.rows.documents[row] for row in (second if what == "loss" else seen[3])]
    named = re.search(r"jsonl: (.*)\. The same", message)[1].split(", ")
    count = len(inputs.samples)
    assert named == [f"{d[0] + 1} to {min(d[-1] + 1, count)}" for d in documents]
    assert len(metrics(tmp_path / "run")) == 3
    kept = [tmp_path / name / "checkpoints/step-000003" for name in ("run", "rows")]
    states = [(path / "optimizer.safetensors").read_bytes() for path in kept]
    assert states[0] == states[1]


def test_padding_is_not_named_as_a_sample():
    rows = Rows(*[torch.tensor([[0, 1], [2, 3]])] * 3)  # of three samples and padding
    inputs = SimpleNamespace(rows=rows, samples=[None] * 3)
    config = TrainConfig(data="d.jsonl")
    said = not_finite_message(config, inputs, 0, [0, 1], torch.tensor([1.0, torch.nan]), 1.0)
    assert "these samples of d.jsonl: 3 to 3." in said


# ------------------------------------------------------------------------------------------
# What a step is


@pytest.mark.parametrize("micro_batches", [1, 2, 4])
def test_steps_equal_adamw_by_hand_on_transformers_gradients(tmp_path, chat_file, micro_batches):
    """Loss and gradients of transformers' model over the whole step at once, the update written out
    in float64; ours from micro-batches whose labels are masked unevenly."""
    oracle = save_with_transformers(
        tmp_path / "base", seed=1, vocab_size=258, first_k_dense_replace=1
    )
    save_tokenizer(tmp_path / "base")
    config = settings(
        tmp_path / "base",
        chat_file,
        tmp_path / "run",
        steps=3,
        save_steps=3,
        gradient_accumulation_steps=micro_batches,
        aux_loss_alpha=0.0,
        max_grad_norm=0.5,
        weight_decay=0.3,
        warmup_steps=2,
    )
    inputs = trainer.read_inputs(config)
    train(config)
    selected = json.loads((tmp_path / "run/expert_cfg.json").read_text())["experts"]
    parameters = dict(oracle.named_parameters())

    def expert(tensors: dict, name: str):
        """An expert's part of transformers' fused tensors."""
        prefix, e, kind = re.fullmatch(r"(.*experts\.)(\d+)\.(\w+)_proj\.weight", name).groups()
        if kind == "down":
            return tensors[f"{prefix}down_proj"][int(e)]
        return tensors[f"{prefix}gate_up_proj"][int(e)].chunk(2)[kind == "up"]

    names = [
        f"model.layers.{layer}.mlp.experts.{e}.{kind}_proj.weight"
        for layer, experts in selected.items()
        for e in experts
        for kind in ("gate", "up", "down")
    ]
    weights = {name: expert(parameters, name).detach().double() for name in names}
    moments = {name: (0.0, 0.0) for name in names}
    uneven = 0
    for step in range(3):
        chosen = trainer.rows_of_step(len(inputs.rows.tokens), 4, config.seed, step)
        labels = inputs.rows.labels[chosen]
        counts = (labels[:, 1:] != IGNORE).sum(1).view(micro_batches, -1).sum(1)
        uneven += len(set(counts.tolist())) > 1
        oracle.zero_grad()
        loss = oracle(inputs.rows.tokens[chosen], labels=labels).loss
        loss.backward()
        gradients = {n: p.grad for n, p in parameters.items() if p.grad is not None}
        gradients = {name: expert(gradients, name).double() for name in names}
        norm = sum((g**2).sum() for g in gradients.values()) ** 0.5
        record = metrics(tmp_path / "run")[step]
        assert record["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert record["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
        rate = 1e-2 * min((step + 1) / 2, 1)
        for name, g in gradients.items():
            g = g * min(0.5 / norm.item(), 1)
            m, v = moments[name]
            m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g**2
            moments[name] = m, v
            update = (m / (1 - 0.9 ** (step + 1))) / ((v / (1 - 0.95 ** (step + 1))).sqrt() + 1e-8)
            weights[name] = weights[name] * (1 - rate * 0.3) - rate * update
            with torch.no_grad():
                expert(parameters, name).copy_(weights[name])
    assert micro_batches == 1 or uneven
    saved = load_file(tmp_path / "run/checkpoints/step-000003/optimizer.safetensors")
    assert {n.removeprefix("master.") for n in saved if n.startswith("master.")} == set(names)
    for name, expected in weights.items():
        difference = (saved[f"master.{name}"].double() - expected).norm() / expected.norm()
        assert difference < 1e-5, name


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_a_selected_expert_that_sees_no_token_only_decays(chat_file, tmp_path, weight_decay):
    base = tmp_path / "base"
    save_with_transformers(
        base, seed=1, family="deepseek_v3", vocab_size=258, first_k_dense_replace=1
    )
    save_tokenizer(base)
    tensors = load_file(base / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("e_score_correction_bias"):
            tensor[3] = -100.0  # chosen by no token
    save_file(tensors, base / "model.safetensors")
    (tmp_path / "cfg.json").write_text(json.dumps({"experts": {"1": [3, 4]}}))
    changes = {"expert_config": str(tmp_path / "cfg.json"), "chat_format": "deepseek_v2"}
    changes |= {"weight_decay": weight_decay, "validation_fraction": 0.0}
    train(settings(base, chat_file, tmp_path / "run", steps=3, **changes))
    adapter = load_file(tmp_path / "run/adapter/adapter.safetensors")
    scores = json.loads((tmp_path / "run/scores_after.json").read_text())["token_scores"]["1"]
    assert scores["3"] == 0.0 < scores["4"]
    for name, before in load_model(base, dtype=torch.float32).named_parameters():
        if ".layers.1.mlp.experts.3." in name:
            for _ in range(3):
                before = before * (1 - 1e-2 * weight_decay)
            torch.testing.assert_close(adapter[name], before.detach(), rtol=1e-6, atol=0)
            assert weight_decay or torch.equal(adapter[name], before)
        if ".layers.1.mlp.experts.4." in name:
            assert (adapter[name] - before).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checkpointing_changes_no_bit_of_the_gradients(checkpoint, dtype):
    model = load_model(checkpoint, dtype=dtype)
    cfg = {"experts": {"1": [0, 3], "2": [5]}, "shared_experts": True, "non_expert_modules": True}
    mark_trainable(model, cfg)
    tokens = torch.randint(0, 258, (2, 48), generator=torch.Generator().manual_seed(0))
    documents = torch.arange(48).expand(2, -1) // 13
    gradients = []
    for checkpointing in (False, True):
        run_block = checkpointed() if checkpointing else Block.__call__
        losses, balance = token_losses(
            model, tokens, tokens, documents, balance=True, run_block=run_block
        )
        (losses.mean() + 0.1 * balance.sum()).backward()
        gradients.append({n: p.grad for n, p in trained_parameters(model, cfg).items()})
        model.zero_grad()
    assert all(torch.equal(gradients[0][n], g) for n, g in gradients[1].items())


def test_a_run_goes_on_only_with_its_own_base(run, checkpoint, chat_file, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(checkpoint, base)
    train(settings(base, chat_file, tmp_path / "run", steps=1))
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, base / "model.safetensors")
    with pytest.raises(ValueError, match=r"another config: fingerprint of model \("):
        train(settings(base, chat_file, tmp_path / "run", steps=1))
