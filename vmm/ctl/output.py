"""What people and scripts get: tables on a terminal, JSON with --json.

The package rich is imported when a table is drawn, so that --json, completion and the console
work without it and start fast.
"""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from rich.console import Console
    from rich.table import Table

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
_FACTORS = {"": 0, "b": 0, "k": 10, "m": 20, "g": 30, "t": 40}


def human_bytes(value: float) -> str:
    """Bytes as `1.5 GiB`, three digits or so."""
    unit = 0
    while value >= 1000 and unit < len(_UNITS) - 1:
        value /= 1024
        unit += 1
    return f"{value:.0f} {_UNITS[unit]}" if value >= 100 or not unit else (
        f"{value:.1f} {_UNITS[unit]}")


def human_count(value: float) -> str:
    """A number as `12.3k`."""
    for suffix in ("", "k", "M", "G", "T"):
        if value < 1000:
            return f"{value:.0f}{suffix}" if value >= 100 or not suffix else f"{value:.1f}{suffix}"
        value /= 1000
    return f"{value:.0f}P"


def human_time(nanoseconds: float) -> str:
    """A duration as `12 µs`."""
    for unit in ("ns", "µs", "ms"):
        if nanoseconds < 1000:
            return f"{nanoseconds:.0f} {unit}" if nanoseconds >= 10 else f"{nanoseconds:.1f} {unit}"
        nanoseconds /= 1000
    return f"{nanoseconds:.1f} s"


def parse_bytes(text: str) -> int:
    """Bytes from `512M`, `2GiB`, `1073741824`: without a unit bytes, units of 1024.

    :raises ValueError: it is no size, or beyond what QMP's integers hold.
    """
    lower = text.strip().lower()
    digits = lower.rstrip("abcdefghijklmnopqrstuvwxyz")
    suffix = lower[len(digits):]
    unit = suffix.removesuffix("ib") if len(suffix) == 3 else suffix.removesuffix("b")
    if not (digits.isascii() and digits.isdecimal()) or len(digits) > 19 or unit not in _FACTORS:
        raise ValueError(f"'{text}' is not a size")
    value = int(digits) << _FACTORS[unit]
    if value >= 1 << 63:
        raise ValueError(f"'{text}' is too large")
    return value


def printable(text: object) -> str:
    """Text of a VM's or a file's, harmless for a terminal."""
    return "".join(c if c.isprintable() else "?" for c in str(text))


def print_json(value: object) -> None:
    """One JSON value, one line."""
    print(json.dumps(value, ensure_ascii=True), flush=True)


def console() -> Console:
    """Standard output; wide where it is no terminal, so that no cell is cut for a script."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else 200
    return Console(width=width, highlight=False, markup=False, emoji=False)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
    """A table; a column whose name begins with `>` is aligned to the right."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    drawn = Table(title=Text(title) if title else None, title_justify="left", box=SIMPLE_HEAD,
                  pad_edge=False)
    for column in columns:
        right = column.startswith(">")
        drawn.add_column(column.lstrip(">"), justify="right" if right else "left",
                         overflow="fold")
    for row in rows:
        drawn.add_row(*(Text(printable(cell), style=_style(str(cell))) for cell in row))
    return drawn


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Draw a table on standard output."""
    console().print(table(title, columns, rows))


_STYLES = {"running": "green", "paused": "yellow", "prelaunch": "yellow", "starting": "yellow",
           "dead": "red", "internal-error": "red", "unreachable": "red"}


def _style(text: str) -> str:
    return _STYLES.get(text, "")
