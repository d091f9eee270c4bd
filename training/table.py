"""Rows and sizes in the tables of a plan."""

from collections.abc import Iterable


def table_row(label: str, cells: Iterable[str]) -> str:
    return (f"{label:<44}" + "".join(f"{cell:>18}" for cell in cells)).rstrip()


def size_text(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**29 else f"{count / 2**20:.1f} MiB"
