"""Files that survive a kill: written beside their place, flushed, then renamed. Also JSON whose
errors name the file, and locks of directories. What the files hold is not known here."""

import fcntl
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


def parse_json(text: str, where: str):
    """Returns the value of a JSON text. Raises ValueError that begins with `where`."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}: " if error.lineno > 1 else ""
        raise ValueError(f"{where}: {line}not valid JSON: {error.msg}") from None
    except (ValueError, RecursionError) as error:  # a number too long, brackets too deep
        raise ValueError(f"{where}: not valid JSON: {error}") from None


def read_json(path: str | Path):
    """Returns the value in a JSON file. Raises FileNotFoundError, or ValueError that names the
    file."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from None
    return parse_json(text, str(path))


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yields a name beside `path` to write to. On success the file is flushed to disk and renamed:
    whoever reads `path` finds the old file or the new one, whole."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    try:
        yield part
        os.chmod(part, 0o644)  # safetensors lets only the owner read its files
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
        sync_directory(path.parent)
    except SafetensorError as error:  # a full disk, for example
        raise OSError(f"{path}: {error}") from None
    except OSError as error:
        if error.filename is None:  # the system does not say which file a write went to
            error.filename = str(path)
        raise
    finally:
        part.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value, indent: int | None = None) -> None:
    """Raises ValueError that names the file for a number that is not finite: JSON has none."""
    try:
        text = json.dumps(value, ensure_ascii=False, indent=indent, allow_nan=False)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    write_text(path, f"{text}\n")


def write_lines(path: str | Path, records: Iterable) -> None:
    """Writes one line of JSON for each record. Raises ValueError as `write_json` does."""
    try:
        lines = [json.dumps(r, ensure_ascii=False, allow_nan=False) + "\n" for r in records]
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    write_text(path, "".join(lines))


def sync_directory(path: Path) -> None:
    """Flushes to disk what was made or renamed in a directory."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_output_file(path: str | Path, inputs: list[str]) -> None:
    """Raises OSError or ValueError if `path` cannot become a file, or is one of `inputs`. Call it
    before the work."""
    if Path(path).is_dir():
        raise IsADirectoryError(f"{path}: is a directory; a file name is required")
    if Path(path).resolve() in [Path(name).resolve() for name in inputs]:
        raise ValueError(f"{path}: this command reads it; another output is required")
    Path(path).parent.mkdir(parents=True, exist_ok=True)


@contextmanager
def locked(output: Path) -> Iterator[None]:
    """Makes the directory and holds it for this process, because two runs in one directory would
    spoil each other's files. Raises ValueError if another process holds it, OSError if it cannot be
    written."""
    output.mkdir(parents=True, exist_ok=True)
    handle = os.open(output, os.O_RDONLY)
    try:
        try:  # a lock ends with its process, however the process ends
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{output}: another process is writing there") from None
        probe = output / ".writable.part"  # better refused now than after loading
        probe.touch()
        probe.unlink()
        yield
    finally:
        os.close(handle)
