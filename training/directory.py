"""The directory that a run writes to, and continues from: whose run it holds, its checkpoints, its
metrics. What each file means to the job is in train.py. The directory holds train_config.json,
expert_cfg.json, scores before and after, adapter/, metrics.jsonl, checkpoints/step-N/, eval/,
results.json, report.txt, report.png."""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from threading import Thread

import torch
from torch import Tensor

from files import locked, parse_json, read_json, replacing, sync_directory, write_json, write_lines
from processes import SingleProcess
from stored_tensors import open_tensors, write_tensors
from training.config import TrainConfig
from training.host_optimizer import available_bytes
from training.inputs import Inputs, input_files
from training.optimizer import MasterAdamW


class RunDirectory:
    """A run's directory. Every method but `file` is called on all ranks."""

    def __init__(self, config: TrainConfig, inputs: Inputs, ranks: SingleProcess):
        """Raises ValueError on all ranks if the directory or a rank is of another run."""
        self.path, self.overwrite = Path(config.output_dir), config.overwrite
        self.identity, self.ranks = inputs.identity, ranks
        self.copies: dict[str, Tensor] | None = None  # of what a checkpoint holds
        self.copying = False  # whether there is room for them
        # A checkpoint's place, where it is written, its state, and the thread's hashes of files.
        self.under_way: tuple[Path, Path, dict, Future[dict[str, str]]] | None = None
        ranks.on_all(check_output, config, self.identity)
        whose = {"output_dir": config.output_dir, "overwrite": config.overwrite}
        ranks.check_same({**self.identity, **whose})

    def file(self, name: str) -> Path:
        return self.path / name

    def results(self) -> dict | None:
        """Returns the results of the run if it is finished."""

        def read() -> dict | None:
            path = self.file("results.json")
            if self.overwrite or not path.exists():
                return None
            results = read_json(path)
            if not isinstance(results, dict) or "after" not in results:
                raise ValueError(f"{path}: is no run's; without it the run ends again")
            return results

        return self.ranks.on_first(read)

    @contextmanager
    def locked(self):
        """Keeps other processes from writing to the directory."""
        with ExitStack() as held:
            self.ranks.on_first(lambda: held.enter_context(locked(self.path)))
            yield

    def begin(self) -> None:
        """Deletes what `overwrite` says, and writes whose directory it is."""

        def begin() -> None:
            if self.overwrite:
                # First what says how far a run came, last whose the rest is: what a kill leaves is
                # not continued from, and can be overwritten again.
                order = {"results.json": 0, "checkpoints": 1, "train_config.json": 3}
                for path in sorted(self.path.iterdir(), key=lambda path: order.get(path.name, 2)):
                    if path.is_dir() and not path.is_symlink():
                        shutil.rmtree(path)
                    else:
                        path.unlink()
            write_json(self.file("train_config.json"), self.identity, indent=2)

        self.ranks.on_first(begin)
        self.ranks.on_all(check_shared, self.path, self.identity)

    def once(self, name: str, make: Callable[[], object], read: Callable[[Path], object]):
        """Returns, on all ranks, what `read` finds in the file `name`. If the file is missing, or
        `read` returns None, first writes the JSON value that `make` returns. `make` runs on all
        ranks, `read` on the first."""
        path = self.file(name)
        found = self.ranks.on_first(lambda: read(path) if path.exists() else None)
        if found is None:
            self.ranks.on_first(write_json, path, make())
            found = self.ranks.on_first(read, path)
        return found

    def add_record(self, record: dict, sync: bool) -> None:
        """Appends a line to metrics.jsonl; `sync` flushes it to disk. Ends a checkpoint that has
        been written meanwhile."""

        def append() -> None:
            with open(self.file("metrics.jsonl"), "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
                file.flush()
                if sync:
                    os.fsync(file.fileno())

        self.ranks.on_first(append)
        self.finish_checkpoint(wait=False)

    def save_checkpoint(self, optimizer: MasterAdamW, state: dict) -> None:
        """Begins to write checkpoints/step-N, unless it is there (or N is 0): each rank copies its
        part of the optimizer, and a thread writes that to a file while training goes on. First ends
        the checkpoint before, and raises as `finish_checkpoint` does."""
        self.finish_checkpoint()
        ranks, directory = self.ranks, self.file(f"checkpoints/step-{state['step']:06d}")
        if not state["step"] or ranks.on_first(directory.exists):
            return
        part = directory.with_name(f".{directory.name}.part")
        ranks.on_first(shutil.rmtree, part, ignore_errors=True)
        tensors = self.copied(optimizer.state())

        def write() -> dict[str, str]:
            if not tensors:
                return {}
            rank = f"-{ranks.rank}" if ranks.rank else ""
            path = part / f"optimizer{rank}.safetensors"
            with replacing(path) as file:
                return {path.name: write_tensors(file, tensors)}

        self.under_way = directory, part, dict(state), in_thread(write)
        if not self.copying:
            self.finish_checkpoint()

    def copied(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns copies in host memory, which the next call uses again. If they do not fit there,
        returns the tensors themselves."""
        if self.copies is None:
            self.copying = all(self.ranks.from_all(copies_fit(tensors)))
            if not self.copying:
                print("host memory has no room for a copy: training waits for each checkpoint")
            kept = tensors if self.copying else {}
            self.copies = {name: torch.empty_like(t, device="cpu") for name, t in kept.items()}
        return tensors | {name: copy.copy_(tensors[name]) for name, copy in self.copies.items()}

    def finish_checkpoint(self, wait: bool = True) -> None:
        """Puts the checkpoint that is being written in its place, whole or not at all, with the
        hash of each file; keeps the newest two. Without `wait`, only if all ranks have written it.
        Raises, on all ranks, why a rank could not write."""
        if self.under_way is None:
            return
        ranks, (directory, part, state, written) = self.ranks, self.under_way
        if not wait:  # True, False for a rank that failed, None for one that writes
            ended = ranks.from_all(written.exception() is None if written.done() else None)
            if None in ended and False not in ended:
                return
        self.under_way = None

        def finish() -> None:
            write_json(part / "state.json", state)
            hashes["state.json"] = file_hash(part / "state.json")
            write_json(part / "sha256.json", hashes)
            os.replace(part, directory)
            sync_directory(directory.parent)
            for old in checkpoints(self.path)[:-2]:
                shutil.rmtree(old)

        try:
            of_ranks = ranks.from_all(ranks.on_all(written.result))
            hashes = {name: value for files in of_ranks for name, value in files.items()}
            ranks.on_first(finish)
        finally:
            if ranks.rank == 0:
                shutil.rmtree(part, ignore_errors=True)

    @contextmanager
    def finishing(self):
        """Ends the checkpoint that is being written if an error ends this block. Ranks have to meet
        for that, so they do it for errors that all of them raise, as for a loss that is not finite.
        A second signal does not wait for a disk."""
        try:
            yield
        except Exception as error:
            everywhere = isinstance(error, FloatingPointError) or hasattr(error, "on_all_ranks")
            if self.ranks.world_size == 1 or everywhere:
                with suppress(OSError):
                    self.finish_checkpoint()
            raise

    def resume(self, optimizer: MasterAdamW, trained: Iterable[str]) -> dict:
        """Puts the newest whole checkpoint in place and returns its state. Cuts metrics.jsonl back
        to that step, and deletes what a killed process was writing. `trained` names the trained
        parameters of all ranks."""
        state = {"step": 0, "best_loss": None, "seconds": 0.0}
        if newest := self.newest_checkpoint():
            state = self.ranks.on_first(read_json, newest / "state.json")
            tensors = self.ranks.on_all(read_optimizer, newest, optimizer, trained)
            optimizer.restore(tensors, state["step"])

        def clean() -> None:
            for part in self.path.glob("checkpoints/.step-*.part"):
                shutil.rmtree(part)
            metrics = self.file("metrics.jsonl")
            if metrics.exists():  # later steps will come again; a last line may be cut short
                write_lines(metrics, read_metrics(metrics, state["step"]))

        self.ranks.on_first(clean)
        return state

    def newest_checkpoint(self) -> Path | None:
        """Returns the newest checkpoint that is whole. Reports damaged ones and sets them aside."""
        saved = self.ranks.on_first(checkpoints, self.path)
        for directory in reversed(saved):
            try:
                check_checkpoint(directory, self.ranks)
                return directory
            except (ValueError, OSError) as problem:
                aside = directory.with_name(f"damaged-{directory.name}")
                print(f"{problem}; set aside as {aside}, the checkpoint before it is used")
            self.ranks.on_first(shutil.rmtree, aside, ignore_errors=True)
            self.ranks.on_first(os.replace, directory, aside)
        if saved:
            print("there is none before it: begins at step 1")
        return None


def check_output(config: TrainConfig, mine: dict) -> None:
    """Raises ValueError if output_dir holds a run of another config than `mine`, or something else,
    or an input of this run."""
    output = Path(config.output_dir)
    for path in (config.model, *input_files(config)):
        if Path(path).resolve().is_relative_to(output.resolve()):
            raise ValueError(f"output_dir is {output}; it holds {path}, which this run reads")
    if output.exists() and not output.is_dir():
        raise ValueError(f"output_dir is {output}; it is a file")
    saved = output / "train_config.json"
    if saved.exists() and not config.overwrite:
        theirs = read_json(saved)
        if not isinstance(theirs, dict):
            raise ValueError(f"{saved}: must be a JSON object")
        # gradient_checkpointing changes no bit, and a run that was out of memory may go on with it.
        keys = sorted((mine.keys() | theirs.keys()) - {"gradient_checkpointing"})
        pairs = [(key, theirs.get(key), mine.get(key)) for key in keys]
        others = ", ".join(f"{key} ({old!r}, now {new!r})" for key, old, new in pairs if old != new)
        if others:
            needed = "choose another output_dir, or --overwrite to delete it"
            raise ValueError(f"{output} holds a run of another config: {others}; {needed}")
    elif not saved.exists() and output.exists():
        # A run that was killed at its very start leaves a .part.
        if any(path.suffix != ".part" for path in output.iterdir()):
            raise ValueError(f"output_dir is {output}; holds files that no run of train.py wrote")


def check_shared(output: Path, identity: dict, patience: float = 60.0) -> None:
    """Raises OSError if the first rank's output_dir cannot be seen here within `patience` seconds.
    A network's file system may be that late."""
    path, until = output / "train_config.json", time.monotonic() + patience
    while not path.exists() or read_json(path) != identity:
        if time.monotonic() > until:
            raise OSError(f"{output}: is not the first rank's; all ranks must see one output_dir")
        time.sleep(0.5)


def checkpoints(output: Path) -> list[Path]:
    """Returns the checkpoints of a run, the oldest first."""
    saved = (output / "checkpoints").glob("step-*")
    saved = [path for path in saved if path.name.removeprefix("step-").isdecimal()]
    return sorted(saved, key=lambda path: int(path.name.removeprefix("step-")))


def copies_fit(tensors: dict[str, Tensor]) -> bool:
    """Returns whether host memory has room for copies, and a third more: `save_adapter` copies the
    weights, too. All ranks must be asked before one of them allocates."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return ranks * sum(t.nbytes for t in tensors.values()) * 4 / 3 < available_bytes()


def in_thread(function: Callable[[], object]) -> Future:
    """Calls the function in a thread, which ends with the process, and returns its outcome."""
    outcome = Future()

    def run() -> None:
        try:
            outcome.set_result(function())
        except BaseException as error:
            outcome.set_exception(error)

    Thread(target=run, name="checkpoint", daemon=True).start()
    return outcome


def file_hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_checkpoint(directory: Path, ranks: SingleProcess) -> None:
    """Raises ValueError or OSError, on all ranks, unless the files of a checkpoint are as they were
    written. Each rank reads some of them."""
    hashes = ranks.on_first(read_json, directory / "sha256.json")
    if not isinstance(hashes, dict):
        raise ValueError(f"{directory}/sha256.json: must be a JSON object")
    there = ranks.on_first(os.listdir, directory)
    names = sorted({"state.json", *hashes, *there} - {"sha256.json"})

    def check() -> None:
        for path in [directory / name for name in names[ranks.rank :: ranks.world_size]]:
            if file_hash(path) != hashes.get(path.name):
                raise ValueError(f"{path}: is not as it was written (its hash differs)")

    ranks.on_all(check)


def read_optimizer(
    directory: Path, optimizer: MasterAdamW, trained: Iterable[str]
) -> dict[str, Tensor]:
    """Returns the optimizer's tensors of what this rank updates. Raises ValueError unless the
    checkpoint holds just those that `trained` names."""
    tensors, held, own = {}, set(), set(optimizer.own_names)
    for path in sorted(directory.glob("optimizer*.safetensors")):
        with open_tensors(path) as file:
            for name in file.keys():
                parameter = name.partition(".")[2]
                held.add(parameter)
                if parameter in own:
                    tensors[name] = file.get_tensor(name)
    if held != set(trained):
        changed = f"{directory.parents[1]}/expert_cfg.json"
        raise ValueError(f"{changed}: selects other tensors than {directory} holds; it was changed")
    return tensors


def read_metrics(path: Path, steps: int) -> list[dict]:
    """Returns the lines of metrics.jsonl for the first `steps` steps. Behind them, a killed process
    may have left anything. Raises ValueError that names file and line."""
    lines = path.read_bytes().split(b"\n")[:steps]
    records = []
    for i, line in enumerate(lines, 1):
        where = f"{path}: line {i}"
        record = parse_json(line.decode("utf-8", "replace"), where)
        if not isinstance(record, dict) or record.get("step") != i:
            raise ValueError(f"{where}: {line!r:.60}; the record of step {i} is required")
        records.append(record)
    if len(records) < steps:
        raise ValueError(f"{path}: ends at line {len(records)}; {steps} steps were done")
    return records
