"""Which lines of a policy a process needs: its system calls, as strace saw them."""

from __future__ import annotations

import re
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tests.support.capabilities import require

if TYPE_CHECKING:
    from collections.abc import Iterable

    from shared.sandbox.policy import Rule

    Call = tuple[str, list[int]]

_LINE = re.compile(r"^(\d+) +(?:<\.\.\. (\w+) resumed>|(\w+)\(([^)]*))(.*)$")
_RESULT = re.compile(r"= (0x[0-9a-f]+|\d+)\b")


class Tracer:
    """Traces a process and all that it clones from now on."""

    def __init__(self, pid: int, output: Path) -> None:
        require("strace")
        self._output = output
        self._process = subprocess.Popen(
            ["strace", "-f", "-qq", "-e", "raw=all", "-e", "signal=none", "-o", str(output),
             "-p", str(pid)], stderr=subprocess.PIPE)
        deadline = time.monotonic() + 10
        while f"TracerPid:\t{self._process.pid}\n" not in Path(f"/proc/{pid}/status").read_text():
            assert self._process.poll() is None and time.monotonic() < deadline, "no strace"
            time.sleep(0.01)

    def calls(self, leaders: Iterable[int]) -> list[Call]:
        """When all traced processes have ended: the calls of these, and of their threads, from
        the moment at which their filter was installed. None in a PID namespace of its own, where
        clone() returns other numbers."""
        self._process.wait(20)
        inside: set[int] = set()
        seen: list[Call] = []
        for line in self._output.read_text().splitlines():
            found = _LINE.match(line)
            if not found:
                continue
            tid, resumed, name, arguments, rest = found.groups()
            result = _RESULT.search(rest)
            value = int(result.group(1), 0) if result else -1
            if int(tid) in inside:
                if name:
                    seen.append((name, [_number(word.partition(" <")[0])
                                        for word in arguments.split(", ") if word]))
                if (name or resumed) == "clone" and value > 0:
                    inside.add(value)
            elif int(tid) in set(leaders) and (name or resumed) == "seccomp" and value == 0:
                inside.add(int(tid))
        return seen

    def close(self) -> None:
        """Stop tracing."""
        if self._process.poll() is None:
            self._process.terminate()
            self._process.wait(10)
        assert self._process.stderr is not None
        self._process.stderr.close()


def _number(word: str) -> int:
    try:
        return int(word, 0)
    except ValueError:
        return 0


def matches(rule: Rule, call: Call) -> bool:
    """Whether this rule lets the call through (or answers it)."""
    name, arguments = call
    padded = [*arguments, 0, 0, 0, 0, 0, 0]
    return rule.call == name and all(padded[argument] & mask == value
                                     for argument, mask, value in rule.conditions)
