"""What kvm's tracepoints say of one process and its children: `Trace` runs a command under them."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from bench.report import BenchError

if TYPE_CHECKING:
    from collections.abc import Iterator

TRACEFS = Path("/sys/kernel/tracing")
LINE = re.compile(r"^\s*(.+)-(\d+)\s+\[\d+\] \S+\s+(\d+\.\d+): (\w+): (.*)$")
# Waits for a byte, so that its number can be told to the kernel first; then becomes the command.
GATE = """import os, sys
if sys.argv[1]:
    open(sys.argv[1] + "/cgroup.procs", "w").write("0")
os.read(0, 1)
os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
os.execv(sys.argv[2], sys.argv[2:])
"""
# The guest's first instruction: hardware enters it, KVM without hardware emulates it.
FIRST = ("kvm/kvm_entry", "kvm/kvm_emulate_insn")
PORT = ("kvm/kvm_pio",)
MARK_PORT = 0x80


def available() -> bool:
    """Whether this machine lets us have kvm's tracepoints."""
    if not (TRACEFS / "events").exists():
        with contextlib.suppress(OSError):
            subprocess.run(["mount", "-t", "tracefs", "nodev", TRACEFS], check=False,
                           capture_output=True)
    return os.access(TRACEFS / "events/kvm/kvm_pio/enable", os.W_OK)


class Trace:
    """A trace of its own; `run` starts a command in it."""

    def __init__(self, events: tuple[str, ...]) -> None:
        self.folder = TRACEFS / f"instances/bench-{os.getpid()}"
        self.events = events
        self.process: subprocess.Popen[bytes] | None = None

    def _set(self, name: str, value: str) -> None:
        (self.folder / name).write_text(value)

    def __enter__(self) -> Trace:
        self.folder.mkdir()
        try:
            self._set("trace_clock", "mono")
            self._set("options/event-fork", "1")
            if self.events == PORT:
                self._set("events/kvm/kvm_pio/filter", f"port == {MARK_PORT}")
            self.pipe = os.open(self.folder / "trace_pipe", os.O_RDONLY | os.O_NONBLOCK)
        except OSError as error:
            self.folder.rmdir()
            raise BenchError(f"tracepoints: {error}") from error
        return self

    def __exit__(self, *_: object) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
        os.close(self.pipe)
        self.folder.rmdir()

    def run(self, command: list[str], folder: Path, group: str = "") -> None:
        """Start `command`; everything that it does from its exec on is traced.

        :param group: a control group that it goes into first.
        """
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", GATE, group, *command],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=folder)
        self._set("set_event_pid", str(self.process.pid))
        for event in ("sched/sched_process_exec", *self.events):
            self._set(f"events/{event}/enable", "1")
        assert self.process.stdin is not None
        self.process.stdin.write(b"x")
        self.process.stdin.close()
        self.process.stdin = None

    def lines(self, limit: float) -> Iterator[tuple[float, str, str]]:
        """(seconds, event, text) as they come.

        :raises BenchError: the command ended, or `limit` seconds passed.
        """
        assert self.process is not None
        deadline = time.monotonic() + limit
        rest = ""
        while True:
            ended = self.process.poll() is not None
            try:
                rest += os.read(self.pipe, 1 << 16).decode(errors="replace")
            except BlockingIOError:
                if ended or time.monotonic() > deadline:
                    errors = self.process.stderr.read().decode() if ended else "too late"
                    raise BenchError(f"{self.process.args[6]}: {errors}") from None
                time.sleep(0.001)
                continue
            *complete, rest = rest.split("\n")
            for line in complete:
                if match := LINE.match(line):
                    yield float(match[3]), match[4], match[5]


def until(command: list[str], folder: Path, events: tuple[str, ...], wanted: str,
          group: str = "", limit: float = 30) -> float:
    """Milliseconds from the exec of `command` to the first of `events` whose text has `wanted`."""
    with Trace(events) as trace:
        trace.run(command, folder, group)
        began = 0.0
        for at, event, text in trace.lines(limit):
            if event == "sched_process_exec":
                if f"filename={command[0]} " in text:
                    began = at
            elif wanted in text:
                return (at - began) * 1000
    raise BenchError("the trace ended")
