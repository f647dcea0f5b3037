"""What all benchmarks share: options, medians with their spread, a table with goals, JSON."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT = Path(__file__).resolve().parents[1]
MARKUP = re.compile(r"\[/?[a-z]*\]")  # of rich


class BenchError(Exception):
    """A benchmark can't run here; the text says what it lacks."""


def parser(description: str, rounds: int, quick: int) -> argparse.ArgumentParser:
    """The options that every benchmark knows; `options.rounds` is set by `parse`."""
    result = argparse.ArgumentParser(prog="./dev bench", description=description)
    result.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    result.add_argument("--markdown", action="store_true", help="a table for a page of docs/")
    result.add_argument("--rounds", type=int, default=0,
                        help=f"rounds, the rivals in turn in each ({rounds})")
    result.add_argument("--quick", action="store_true", help=f"{quick} rounds")
    result.set_defaults(usual=rounds, few=quick)
    return result


def parse(arguments: argparse.ArgumentParser, line: Sequence[str]) -> argparse.Namespace:
    """The options of a command line, `rounds` filled in."""
    options = arguments.parse_args(list(line))
    Report.as_markdown = options.markdown
    options.rounds = options.rounds or (options.few if options.quick else options.usual)
    return options


def median(values: Sequence[float]) -> float:
    """The middle one."""
    return statistics.median(values)


def quantile(values: Sequence[float], share: float) -> float:
    """The value that `share` of all lie below."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def spread(values: Sequence[float]) -> tuple[float, float]:
    """The middle half: first and third quartile; of less than four values the ends."""
    if len(values) < 4:
        return min(values), max(values)
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Round by round: what disturbs a round disturbs both halves of it."""
    return [a / b for a, b in zip(ours, theirs, strict=True) if b]


def show(values: Sequence[float], digits: int = 1) -> str:
    """Median and the middle half, as text."""
    low, high = spread(values)
    return f"{median(values):.{digits}f} [dim]({low:.{digits}f}-{high:.{digits}f})[/]"


class Goal:
    """A bound on a figure: `at_most` or at least."""

    def __init__(self, bound: float, at_most: bool = True) -> None:
        self.bound = bound
        self.at_most = at_most

    def met(self, value: float) -> bool:
        """Whether a value (rounded as it is printed) keeps the bound."""
        value = round(value, 2)
        return value <= self.bound if self.at_most else value >= self.bound

    def __str__(self) -> str:
        return f"{'≤' if self.at_most else '≥'} {self.bound:g}"


class Report:
    """Rows for the reader, the same figures as data, verdicts."""

    as_markdown = False

    def __init__(self, name: str, title: str, columns: Sequence[str]) -> None:
        self.name, self.title, self.columns = name, title, columns
        self.rows: list[list[str]] = []
        self.figures: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self.load = os.getloadavg()[0]

    def add(self, cells: Sequence[str], figure: dict[str, Any],
            values: Sequence[float] = (), goal: Goal | None = None) -> None:
        """A row: `cells`, then for a goal the median of `values`, the goal and the verdict."""
        row = list(cells)
        figure = dict(figure)
        if values:
            figure.update(value=median(values), spread=spread(values))
            row.append(show(values, 2))
        if goal is not None:
            met = goal.met(median(values))
            figure.update(goal=str(goal), met=met)
            row += [str(goal), "[green]met[/]" if met else "[red]missed[/]"]
        self.rows.append(row)
        self.figures.append(figure)

    def note(self, text: str) -> None:
        """A line below the table."""
        self.notes.append(text)

    def finish(self, as_json: bool) -> int:
        """Print it all; 0."""
        busy = (f"{platform.release()}, {os.cpu_count()} CPUs, load {self.load:.1f} before, "
                f"{os.getloadavg()[0]:.1f} after")
        if as_json:
            print(json.dumps({"benchmark": self.name, "machine": busy, "figures": self.figures,
                              "notes": self.notes}))
            return 0
        if self.as_markdown:
            lines = [self.columns, ["---"] * len(self.columns), *self.rows]
            print(f"{self.title}\n")
            for cells in lines:
                print(f"| {' | '.join(MARKUP.sub('', cell) for cell in cells)} |")
            print("".join(f"\n{note}" for note in [*self.notes, busy]))
            return 0
        from rich.console import Console
        from rich.table import Table

        width = None if sys.stdout.isatty() else 150
        console = Console(width=width, highlight=False)
        table = Table(title=self.title, title_justify="left")
        for index, column in enumerate(self.columns):
            table.add_column(column, justify="right" if index else "left")
        for row in self.rows:
            table.add_row(*row)
        console.print(table)
        for note in [*self.notes, f"median (middle half); {busy}"]:
            console.print(f"[dim]{note}[/]")
        return 0
