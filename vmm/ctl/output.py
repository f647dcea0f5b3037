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

TEXT_LIMIT = 1000  # characters of a VM's in one line or cell
_WIDE = 1000       # columns where there is no terminal
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
# Suffix -> bits.
_FACTORS = {"": 0, "b": 0, **{unit + more: 10 * power for power, unit in enumerate("kmgt", 1)
                              for more in ("", "b", "ib")}}
_LARGEST = 1 << 63  # QMP's integers


def human_bytes(value: float) -> str:
    """Bytes as `1.5 GiB`, three digits or so."""
    unit = 0
    while value >= 999.5 and unit < len(_UNITS) - 1:
        value /= 1024
        unit += 1
    return f"{value:.0f} {_UNITS[unit]}" if value >= 99.95 or not unit else (
        f"{value:.1f} {_UNITS[unit]}")


def human_count(value: float) -> str:
    """A number as `12.3k`."""
    for suffix in ("", "k", "M", "G", "T"):
        if value < 999.5:  # 999.6 is 1.0k, not 1000
            return f"{value:.0f}{suffix}" if value >= 99.95 or not suffix else (
                f"{value:.1f}{suffix}")
        value /= 1000
    return f"{value:.0f}P"


def human_time(nanoseconds: float) -> str:
    """A duration as `12 µs`."""
    for unit in ("ns", "µs", "ms"):
        if nanoseconds < 999.5:
            return f"{nanoseconds:.0f} {unit}" if nanoseconds >= 9.95 else (
                f"{nanoseconds:.1f} {unit}")
        nanoseconds /= 1000
    return f"{nanoseconds:.1f} s"


def parse_bytes(text: str) -> int:
    """Bytes from `512M`, `1.5GiB`, `1073741824`: without a unit bytes, units of 1024.

    :raises ValueError: it is no size, no whole number of bytes, or beyond QMP's integers.
    """
    lower = text.strip().lower()
    digits = lower.rstrip("abcdefghijklmnopqrstuvwxyz")
    suffix = lower[len(digits):]
    whole, point, part = digits.partition(".")
    if not _is_number(whole) or suffix not in _FACTORS or (point and not _is_number(part)):
        raise ValueError(f"'{printable(text, 40)}' is not a size")
    scale: int = 10 ** len(part)
    value, rest = divmod(int(whole + part) << _FACTORS[suffix], scale)
    if rest and not _FACTORS[suffix]:
        raise ValueError(f"'{printable(text, 40)}' is not a whole number of bytes")
    if value >= _LARGEST:
        raise ValueError(f"'{printable(text, 40)}' is too large")
    return value


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) <= 19


def printable(text: object, limit: int = TEXT_LIMIT) -> str:
    """Text of a VM's or a file's, harmless for a terminal and of bounded length."""
    whole = str(text)
    cut = whole if len(whole) <= limit else whole[:limit - 1] + "…"
    return "".join(c if c.isprintable() else "?" for c in cut)


def print_json(value: object) -> None:
    """One JSON value, one line."""
    print(json.dumps(value, ensure_ascii=True), flush=True)


def console() -> Console:
    """Standard output; wide where it is no terminal, so that no cell is cut for a script."""
    from rich.console import Console

    class Output(Console):
        """Who has left is our caller's affair: rich would end us with a status of its own."""

        def on_broken_pipe(self) -> None:
            raise BrokenPipeError

    width = None if sys.stdout.isatty() else _WIDE
    return Output(width=width, highlight=False, markup=False, emoji=False)


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Draw a table on standard output; a column whose name begins with `>` is aligned to the
    right."""
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=any(columns))
    for column in columns:
        drawn.add_column(column.lstrip(">"), overflow="fold",
                         justify="right" if column.startswith(">") else "left")
    for row in rows:
        drawn.add_row(*(Text(printable(cell), style=_STYLES.get(str(cell), "")) for cell in row))
    out = console()
    if title:
        out.print(Text(printable(title), style="bold underline"))
    out.print(drawn)


_STYLES = {"running": "green", "up": "green", "paused": "yellow", "prelaunch": "yellow",
           "starting": "yellow", "down": "yellow", "dead": "red", "internal-error": "red",
           "unreachable": "red"}

