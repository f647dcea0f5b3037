"""The manual's QMP exchanges, read from its own text, and what docs/compatibility.md says of them.

`<-` is what the client sends, each `->` one answer. Exchanges are numbered as they come; a line
that begins with a greeting is one without a command.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
COPY = ROOT / "tests" / "data" / "manual-vm-management.zh.txt"
COMPATIBILITY = ROOT / "docs" / "compatibility.md"

_ARROW = re.compile(r"(<-|->)\s*(?=\{)")
_DECODER = json.JSONDecoder()


class Exchange:
    """One command with the answers printed for it; `answers` is None where one isn't JSON."""

    def __init__(self, number: str, command: dict[str, Any] | None) -> None:
        self.number = number
        self.command = command
        self.answers: list[dict[str, Any]] | None = []

    @property
    def name(self) -> str:
        return "greeting" if self.command is None else str(self.command["execute"])


def exchanges(text: str) -> list[Exchange]:
    found: list[Exchange] = []
    commands = greetings = 0
    for line in text.splitlines():
        if line.startswith('{"QMP"'):
            line = "-> " + line
        if '回显 {"return"' in line:  # "if {...} comes back, ..."
            line = "-> " + line[line.index("{"):]
        for arrow, value in _split(line):
            if arrow == "<-":
                commands += 1
                assert value is not None, line
                found.append(Exchange(str(commands), value))
            elif value is not None and "QMP" in value:
                greetings += 1
                found.append(Exchange(f"G{greetings}", None))
                found[-1].answers = [value]
            elif value is None:
                found[-1].answers = None
            elif found[-1].answers is not None:
                found[-1].answers.append(value)
    return found


def _split(line: str) -> list[tuple[str, dict[str, Any] | None]]:
    parts: list[tuple[str, dict[str, Any] | None]] = []
    if not line.startswith(("<-", "->")):
        return parts
    for match in _ARROW.finditer(line):
        try:
            parts.append((match[1], _DECODER.raw_decode(line, match.end())[0]))
        except json.JSONDecodeError:
            parts.append((match[1], None))
    return parts


class Row:
    """A row of the table of exchanges."""

    def __init__(self, number: str, name: str, state: str, answer: str, why: str) -> None:
        self.number = number
        self.name = name.strip("`")
        self.state = state
        self.answers = [json.loads(text) for text in re.findall(r"`([^`]+)`", answer)]
        self.why = why


def rows() -> dict[str, Row]:
    section = COMPATIBILITY.read_text().split("## The manual's exchanges")[1].split("\n## ")[0]
    table = [[cell.strip() for cell in line.strip("|").split("|")]
             for line in section.splitlines() if line.startswith("| ")][2:]
    found = [Row(*cells) for cells in table]
    assert len({row.number for row in found}) == len(found)
    return {row.number: row for row in found}


def missing_commands() -> set[str]:
    """The commands of StratoVirt that the page says we don't have."""
    page = COMPATIBILITY.read_text()
    section = page.split("## StratoVirt's commands that we don't have")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| `")]
    return {name for line in lines for name in re.findall(r"`([^`]+)`", line.split("|")[1])}
