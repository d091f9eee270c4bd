"""What a config key is, and what follows from it: the flag of a command line, the key of a TOML
file, the checks of type and bounds. The keys themselves stand where they are read.

A key is one line of a dataclass that inherits from `Keys`:

    top_p: float | None = key(None, "part of a layer's score to select", above=0, at_most=1)

Its type is BoolOrAuto; or str, bool, int, float or list[str]; or one of the latter `| None`.
"""

import argparse
import dataclasses
import difflib
import operator
import tomllib
from collections.abc import Collection
from dataclasses import fields
from pathlib import Path
from types import NoneType
from typing import Literal, TypeVar, get_args

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


def key(default, meaning: str, choices: Collection[str] = (), **bounds: float):
    """Returns a field of a dataclass of keys. `choices` may be a table that grows later; `bounds`
    are those of BOUNDS."""
    metadata = {"help": meaning, "choices": choices, "bounds": bounds}
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
                raise refusal(f.name, value, f"one of {', '.join(choices)}{or_empty}")
            if not all(BOUNDS[name](value, bound) for name, bound in bounds.items()):
                said = (f"{name.replace('_', ' ')} {bound}" for name, bound in bounds.items())
                raise refusal(f.name, value, " and ".join(said))


def refusal(name: str, value, required: str) -> ValueError:
    """The error of a key's value. Every error about a key begins with the key's name."""
    return ValueError(f"{name} is {value!r}; must be {required}")


def kind_of(f: dataclasses.Field) -> type:
    """Returns the type of a key without `| None`."""
    return get_args(f.type)[0] if NoneType in get_args(f.type) else f.type


def has_type(value, kind: type) -> bool:
    if kind == list[str]:
        return isinstance(value, (list, tuple)) and all(type(each) is str for each in value)
    if kind == BoolOrAuto:
        return type(value) is bool or value == "auto"
    return type(value) in ((int, float) if kind is float else (kind,))


def add_keys(parser: argparse.ArgumentParser, kind: type[Keys]) -> None:
    """Adds a flag for each key. A flag that is not given leaves nothing in the namespace."""
    for f in fields(kind):
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
        parser.add_argument(f"--{f.name}", help=text, default=argparse.SUPPRESS, **options)


K = TypeVar("K", bound=Keys)


def read_keys(kind: type[K], arguments: argparse.Namespace, path: str | None = None) -> K:
    """Returns the checked config of a command line; precedence: defaults < the TOML file `path` <
    flags. Raises ValueError that names file, key, value, and what is required."""
    values = read_toml(path, [f.name for f in fields(kind)]) if path else {}
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


def read_toml(path: str, known: list[str]) -> dict:
    try:
        values = tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such config file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid TOML: {error}") from None
    for name in values:
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            meant = f"; did you mean {close[0]}?" if close else ""
            raise ValueError(f"{path}: unknown key {name}{meant}")
    return values
