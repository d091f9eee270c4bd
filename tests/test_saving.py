"""Checkpoints are written while training goes on. They hold the state of their own step, whole or
not at all, however slow the disk is and however the run ends."""

import hashlib
import math
import subprocess
import sys
import threading
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file
from test_exactness import result, stop_after, wait_for_threads
from test_train import metrics, settings

import stored_tensors
import train as trainer
from files import read_json
from processes import SingleProcess, on_all_ranks
from stored_tensors import write_tensors
from train import train
from training import directory
from training.config import TrainConfig
from training.directory import RunDirectory, check_checkpoint, checkpoints, copies_fit


@pytest.fixture
def run(checkpoint, chat_file, tmp_path):
    """Trains six steps in a folder under `tmp_path`, with a checkpoint after every second one."""

    def run(name: str, **changes) -> Path:
        train(settings(checkpoint, chat_file, tmp_path / name, **{"dtype": "bfloat16", **changes}))
        return tmp_path / name

    return run


def steps_kept(output: Path) -> list[int]:
    """The steps of a run's checkpoints, all of which must be whole."""
    for path in checkpoints(output):
        check_checkpoint(path, SingleProcess())
        assert f"step-{read_json(path / 'state.json')['step']:06d}" == path.name
    return [int(path.name[-6:]) for path in checkpoints(output)]


def contents(output: Path) -> dict[str, bytes]:
    return {str(p.relative_to(output)): p.read_bytes() for p in output.glob("checkpoints/*/opt*")}


@pytest.fixture
def slow_disk(monkeypatch):
    """Every write of a checkpoint waits for this event."""
    goes_on = threading.Event()

    def write(path, tensors) -> str:
        assert goes_on.wait(60)
        return write_tensors(path, tensors)

    monkeypatch.setattr(directory, "write_tensors", write)
    yield goes_on
    goes_on.set()
    wait_for_threads()


# ------------------------------------------------------------------------------------------
# The file


@pytest.mark.parametrize(
    "shapes", [{"a": (3, 5), "a longer näme": (7,)}, {"none": (0, 4), "one": (), "b": (2, 1, 900)}]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_is_what_was_given_and_its_hash_is_returned(tmp_path, monkeypatch, shapes, dtype):
    monkeypatch.setattr(stored_tensors, "WRITE_BYTES", 1000)
    tensors = {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}
    path = tmp_path / "file.safetensors"
    assert write_tensors(path, tensors) == hashlib.sha256(path.read_bytes()).hexdigest()
    read = load_file(path)
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == dtype and torch.equal(read[name], tensor)


# ------------------------------------------------------------------------------------------
# A slow disk


@pytest.mark.parametrize("changes", [{}, {"optimizer_device": "cpu"}, {"dtype": "float32"}])
def test_steps_go_on_and_the_checkpoint_holds_its_own_step(
    run, tmp_path, monkeypatch, slow_disk, changes
):
    """The write of step 4 begins only after step 5 (with float32 the weights are the masters). What
    it writes is what a run writes that waits for each write."""
    with monkeypatch.context() as patched:
        patched.setattr(directory, "available_bytes", lambda: 0)
        slow_disk.set()
        waits = run("waits", **changes)
    slow_disk.clear()
    during = []

    def look(config, record):
        if record["step"] % 2:  # steps 3 and 5: the write of the step before is still under way
            during.append(steps_kept(tmp_path / "run"))
            slow_disk.set()
            wait_for_threads()
            slow_disk.clear()
        if record["step"] == config.steps:
            slow_disk.set()

    monkeypatch.setattr(trainer, "print_step", look)
    run("run", **changes)
    assert during == [[], [], [2]]
    assert steps_kept(tmp_path / "run") == [4, 6]  # the last is there when the command ends
    assert contents(tmp_path / "run") == contents(waits)
    assert result(tmp_path / "run") == result(waits)


def test_without_room_for_a_copy_training_waits_and_says_so_once(
    run, tmp_path, monkeypatch, capsys
):
    at_steps, written = [], []
    write = directory.write_tensors
    monkeypatch.setattr(directory, "available_bytes", lambda: 0)
    monkeypatch.setattr(
        trainer, "print_step", lambda *_: at_steps.append(steps_kept(tmp_path / "run"))
    )
    monkeypatch.setattr(
        directory, "write_tensors", lambda p, t: written.append({**t}) or write(p, t)
    )
    run("run")
    assert at_steps == [[], [2], [2], [2, 4], [2, 4], [4, 6]]
    assert all(written[0][name] is tensor for name, tensor in written[2].items())  # no copies
    assert capsys.readouterr().out.count("host memory has no room for a copy") == 1


@pytest.mark.parametrize("ranks, size, fits", [(1, 300, True), (1, 301, False), (4, 76, False)])
def test_copies_fit_if_a_third_more_is_available(monkeypatch, ranks, size, fits):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    monkeypatch.setattr(directory, "available_bytes", lambda: 401)
    tensors = {"a": torch.zeros(size - 40, dtype=torch.uint8), "b": torch.zeros(10)}
    assert copies_fit(tensors) == fits
    monkeypatch.setattr(directory, "available_bytes", lambda: math.inf)  # the system does not say
    assert copies_fit(tensors)


# ------------------------------------------------------------------------------------------
# How a run ends meanwhile

KILLED_IN_WRITE = """
import os, signal, sys, time
from pathlib import Path
import stored_tensors, train
from training import directory

output, step, *sys.argv[1:] = sys.argv[1:]

def write(path, tensors):
    if step not in path.parent.name:
        return stored_tensors.write_tensors(path, tensors)
    while Path(output, "metrics.jsonl").read_text().count("\\n") < int(step) + 1:
        time.sleep(0.01)
    stored_tensors.write_tensors(path, tensors)
    os.truncate(path, path.stat().st_size // 2)
    os.kill(os.getpid(), signal.SIGKILL)

directory.write_tensors = write
train.main()
"""


@pytest.mark.parametrize("step, before", [("000002", []), ("000004", [2])])
def test_a_process_killed_while_it_writes_and_trains_goes_on_to_the_same_bits(
    run, checkpoint, chat_file, tmp_path, step, before
):
    whole = result(run("whole"))
    config = settings(checkpoint, chat_file, tmp_path / "run", dtype="bfloat16")
    command = [sys.executable, "-c", KILLED_IN_WRITE, config.output_dir, step]
    for key, value in asdict(config).items():
        if value not in ([], TrainConfig.__dataclass_fields__[key].default):
            command += [f"--{key}", str(value).lower() if type(value) is bool else str(value)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    part = tmp_path / f"run/checkpoints/.step-{step}.part"
    assert steps_kept(tmp_path / "run") == before and part.is_dir()
    assert len(metrics(tmp_path / "run")) > int(step)
    assert result(run("run")) == whole and not part.exists()


FULL = OSError(28, "No space left on device")
FORBIDDEN = PermissionError(13, "Permission denied")


@pytest.mark.parametrize("error", [FULL, FORBIDDEN])
@pytest.mark.parametrize("failing, noticed", [(2, 3), (4, 5), (6, 6)])
def test_an_error_of_the_thread_ends_the_run_at_the_next_step(
    run, tmp_path, monkeypatch, error, failing, noticed
):
    """With the words of a run that waits for each write. What was kept is kept."""
    whole = result(run("whole"))

    def write(path, tensors) -> str:
        if f"{failing:06d}" in path.parent.name:
            path.write_bytes(b"half")
            raise type(error)(*error.args)
        return write_tensors(path, tensors)

    said = {}
    for name, room in (("waits", 0), ("run", math.inf)):
        with monkeypatch.context() as patched, pytest.raises(type(error)) as raised:
            patched.setattr(directory, "available_bytes", lambda: room)
            patched.setattr(directory, "write_tensors", write)
            patched.setattr(trainer, "print_step", lambda *_: wait_for_threads())
            run(name)
        said[name] = str(raised.value).replace(f"{tmp_path}/{name}/", "")
        kept = steps_kept(tmp_path / name)
        assert kept == [step for step in (2, 4) if step < failing]
        assert [path.name for path in (tmp_path / name / "checkpoints").glob(".*")] == []
        assert len(metrics(tmp_path / name)) == (noticed if name == "run" else failing)
        assert result(run(name)) == whole
    assert said["run"] == said["waits"]
    file = f"checkpoints/.step-{failing:06d}.part/optimizer.safetensors"
    assert f"{error.strerror}: '{file}'" in said["run"]
    kept = f"kept: checkpoints/step-{failing - 2:06d}, from" if failing > 2 else "no step was saved"
    assert kept in said["run"]


@pytest.mark.parametrize(
    "error", [FloatingPointError("nan"), OSError("other file"), torch.OutOfMemoryError("memory")]
)
def test_another_error_waits_for_what_is_being_written(
    run, tmp_path, monkeypatch, slow_disk, error
):
    whole = result(run_freely(run, slow_disk, "whole"))

    def fail(*args):
        threading.Timer(0.3, slow_disk.set).start()
        raise error

    stop_after(monkeypatch, 3, fail)
    with pytest.raises(type(error)) as raised:
        run("run")
    assert steps_kept(tmp_path / "run") == [2]
    if not isinstance(error, torch.OutOfMemoryError):
        assert f"; kept: {tmp_path}/run/checkpoints/step-000002" in str(raised.value)
    monkeypatch.undo()
    assert result(run("run")) == whole


def run_freely(run, slow_disk, name: str) -> Path:
    slow_disk.set()
    output = run(name)
    slow_disk.clear()
    return output


@pytest.mark.parametrize("step, kept", [(3, "no step was saved yet"), (5, "step-000002")])
def test_a_second_signal_does_not_wait_for_the_disk(
    run, tmp_path, monkeypatch, slow_disk, step, kept
):
    def interrupt(config, record):
        if record["step"] == step - 2:
            wait_for_threads()
            slow_disk.clear()
        if record["step"] == step:
            raise KeyboardInterrupt

    slow_disk.set()
    monkeypatch.setattr(trainer, "print_step", interrupt)
    with pytest.raises(KeyboardInterrupt, match=kept):
        run("run")
    assert not slow_disk.is_set()


@pytest.mark.parametrize("everywhere", [True, False])
def test_ranks_meet_after_an_error_only_if_all_raise_it(everywhere):
    """The others would wait in their next step for a rank that failed alone."""
    called = []
    ranks = SimpleNamespace(world_size=2)
    run = SimpleNamespace(ranks=ranks, finish_checkpoint=lambda: called.append(1))
    error = OSError("No space left on device: log")
    with pytest.raises(OSError, match="log"), RunDirectory.finishing(run):
        raise on_all_ranks(error) if everywhere else error
    assert called == [1] * everywhere
