"""What a config key is, and what follows from it: the flag of a command line, the key of a TOML
file, the checks of type and bounds. The keys themselves stand where they are read.

A key is one line of a dataclass that inherits from `Keys`:

    top_p: float | None = key(None, "part of a layer's score to select", above=0, at_most=1)

With `group`, the help has a heading before this key.

Its type is BoolOrAuto; or str, bool, int, float or list[str]; or one of the latter `| None`.
"""

import argparse
import dataclasses
import difflib
import operator
import sys
import textwrap
import tomllib
from collections.abc import Collection
from dataclasses import fields
from pathlib import Path
from types import NoneType
from typing import Literal, NoReturn, TypeVar, get_args

PROJECT = Path(__file__).resolve().parent
BOUNDS = dict(above=operator.gt, at_least=operator.ge, below=operator.lt, at_most=operator.le)
BoolOrAuto = bool | Literal["auto"]
READ = {  # type -> how to read a flag's text, and what it must be
    str: (str, "a string"),
    bool: ({"true": True, "false": False}.__getitem__, "true or false"),
    BoolOrAuto: (
        {"true": True, "false": False, "auto": "auto"}.__getitem__,
        "true, false or auto",
    ),
    int: (int, "an integer"),
    float: (float, "a number"),
    list[str]: (list, "a list of strings"),
}
ELSEWHERE = {  # names in other trainers whose nearest name here is none or a wrong one -> ours
    "bf16": "dtype",
    "block_size": "seq_length",
    "cutoff_len": "seq_length",
    "dataset_name": "data",
    "epochs": "steps",
    "load_in_4bit": "quantize",
    "lora_alpha": "lora_scaling",
    "lr": "learning_rate",
    "max_steps": "steps",
    "model_name_or_path": "model",
    "num_epochs": "steps",
    "num_train_epochs": "steps",
    "per_device_train_batch_size": "batch_size",
    "train_file": "data",
}


def key(default, meaning: str, choices: Collection[str] = (), group: str = "", **bounds: float):
    """Returns a field of a dataclass of keys. `choices` may be a table that grows later; `bounds`
    are those of BOUNDS."""
    metadata = {"help": meaning, "choices": choices, "group": group, "bounds": bounds}
    return dataclasses.field(default=default, metadata=metadata)


class Keys:
    """Base of a dataclass of keys."""

    def check(self) -> None:
        """Raises ValueError for the first key with a wrong type or an impossible value. A default
        is always possible: it may stand for "not set"."""
        for f in fields(self):
            value, kind = getattr(self, f.name), kind_of(f)
            if value is None and f.default is None:
                continue
            if not has_type(value, kind):
                raise refusal(f.name, value, READ[kind][1])
            if kind == list[str]:
                setattr(self, f.name, list(value))
            choices, bounds = f.metadata["choices"], f.metadata["bounds"]
            if value == f.default:
                continue
            if choices and value not in choices:
                or_empty = ", or empty" if f.default == "" else ""
                raise refusal(f.name, value, one_of(choices, value, or_empty))
            if not all(BOUNDS[name](value, bound) for name, bound in bounds.items()):
                said = (f"{name.replace('_', ' ')} {bound}" for name, bound in bounds.items())
                raise refusal(f.name, value, " and ".join(said))


def refusal(name: str, value, required: str) -> ValueError:
    """The error of a key's value. Every error about a key begins with the key's name."""
    return ValueError(f"{name} is {value!r}; must be {required}")


def one_of(choices: Collection[str], value, or_empty: str = "") -> str:
    """Returns what a value must be that is none of the choices, with a guess of which was meant."""
    close = difflib.get_close_matches(str(value), choices, 1)
    meant = f"; did you mean {close[0]}?" if close else ""
    return f"one of {', '.join(choices)}{or_empty}{meant}"


def kind_of(f: dataclasses.Field) -> type:
    """Returns the type of a key without `| None`."""
    return get_args(f.type)[0] if NoneType in get_args(f.type) else f.type


def has_type(value, kind: type) -> bool:
    if kind == list[str]:
        return isinstance(value, (list, tuple)) and all(type(each) is str for each in value)
    if kind == BoolOrAuto:
        return type(value) is bool or value == "auto"
    return type(value) in ((int, float) if kind is float else (kind,))


class Parser(argparse.ArgumentParser):
    """A command line. Its help has an example. An error is one line, and ends with status 2."""

    def __init__(self, description: str, example: str):
        super().__init__(
            usage="python %(prog)s --key value ...",
            description=textwrap.fill(description, 80),
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.example = example

    def parse_args(self, args=None, namespace=None) -> argparse.Namespace:
        args = sys.argv[1:] if args is None else args
        if not args:
            self.error(f"no flags are given; try {self.example}")
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(self.why_unknown(unknown[0]))
        return parsed

    def why_unknown(self, word: str) -> str:
        """Returns what to say of a word of the command line that argparse does not know."""
        flags = {action.dest: action.help for action in self._actions}
        if word.startswith("-"):
            name = word.lstrip("-").split("=")[0]
            return f"unknown flag --{name}{nearest(name, flags, '--')}"
        is_config = "config" in flags and word.endswith(".toml")
        return f"{word} stands without a flag{f'; write --config {word}' if is_config else ''}"

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (all flags: python {self.prog} --help)\n")


def nearest(name: str, known: dict[str, str], dashes: str = "") -> str:
    """Returns a question for the nearest of the `known` names, with its meaning; "" if none is."""
    name = name.replace("-", "_")
    ours = ELSEWHERE.get(name)
    close = [ours] if ours in known else difflib.get_close_matches(name, known, 1)
    return f'; did you mean {dashes}{close[0]}, "{known[close[0]]}"?' if close else ""


def add_keys(parser: argparse.ArgumentParser, kind: type[Keys]) -> None:
    """Adds a flag for each key. A flag that is not given leaves nothing in the namespace."""
    group = parser
    for f in fields(kind):
        if f.metadata["group"]:
            group = parser.add_argument_group(f.metadata["group"])
        type_ = kind_of(f)
        options = {"metavar": "|".join(f.metadata["choices"]) or "VALUE"}
        if type_ in (bool, BoolOrAuto):
            words = "true|false" if type_ is bool else "true|false|auto"
            options = {"nargs": "?", "const": "true", "metavar": words}
        elif type_ == list[str]:
            options = {"nargs": "*", "action": "extend", "metavar": "VALUE"}
        shown = str(f.default).lower() if type_ is bool else f.default
        default = "" if f.default in (None, "", ()) else f" (default: {shown})"
        text = (f.metadata["help"] + default).replace("%", "%%")
        group.add_argument(f"--{f.name}", help=text, default=argparse.SUPPRESS, **options)


K = TypeVar("K", bound=Keys)


def read_keys(kind: type[K], arguments: argparse.Namespace, path: str | None = None) -> K:
    """Returns the checked config of a command line; precedence: defaults < the TOML file `path` <
    flags. Raises ValueError that names file, key, value, and what is required."""
    known = {f.name: f.metadata["help"] for f in fields(kind)}
    values = read_toml(path, known, arguments) if path else {}
    flags = {f.name: f for f in fields(kind) if f.name in arguments}
    for name, f in flags.items():
        text, (read, required) = getattr(arguments, name), READ[kind_of(f)]
        try:
            values[name] = read(text)
        except (ValueError, KeyError):
            raise refusal(name, text, required) from None
    config = kind(**values)
    try:
        config.check()
    except ValueError as error:
        name = str(error).split()[0]
        from_file = name in values and name not in flags
        raise ValueError(f"{path}: {error}" if from_file else str(error)) from None
    return config


def read_toml(path: str, known: dict[str, str], arguments: argparse.Namespace) -> dict:
    """Returns what a file says. `known` keys map to their meaning; others raise ValueError, also
    those of the command line alone."""
    try:
        values = tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ValueError(no_such(path, "config file")) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid TOML: {error}") from None
    for name in values:
        if name not in known and name in arguments:
            raise ValueError(f"{path}: {name} is no key of the file; give --{name} to the command")
        if name not in known:
            raise ValueError(f"{path}: unknown key {name}{nearest(name, known)}")
    return values


def no_such(path: str | Path, kind: str) -> str:
    """Returns what to say of a path that is not there. A relative one, also in a TOML file, is
    relative to the working directory. It may be one of this project's, and meant from there."""
    if Path(path).is_absolute():
        return f"{path}: no such {kind}"
    there = f"; it is in {PROJECT}: run the command there" if (PROJECT / path).exists() else ""
    return f"{path}: no such {kind} in the working directory, {Path.cwd()}{there}"
