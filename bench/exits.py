"""What our run loop adds to the round trip of an exit, seen by the guest.

Beside a loop in C that answers every exit at once (bareloop), the same guest with the same
instructions in both.  Goals: ≤ 1 µs where C serves the exit, ≤ 30 µs (median) where Python does.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from bench import vmms
from bench.report import ROOT, BenchError, Goal, Report, median, parse, parser, show
from tests.guest.build import guest
from tests.support.test_vm import TestVm, VmFailure

if TYPE_CHECKING:
    from collections.abc import Sequence

OUT = ROOT / "build/bench"
SAMPLES = 4000
# vmm/arch/x86_64/layout.py: the first slot's registers, the generic event device's.
DISK = 0xF0100000
EVENTS = 0xF0000010
ANSWER = re.compile(r"p50=(\d+) p99=(\d+)")


class Case(NamedTuple):
    """An access of the guest, who serves it, the goal for the median."""

    text: str
    command: str
    goal: float


CASES = (
    Case("C: port read, serial line status", f"ping.pio 0x3fd {SAMPLES}", 1.0),
    Case("C: MMIO read, virtio interrupt status", f"ping.mmio {DISK + 0x60:#x} {SAMPLES}", 1.0),
    Case("Python: port read, nothing there", f"ping.pio 0x700 {SAMPLES}", 30.0),
    Case("Python: MMIO read, event device", f"ping.mmio {EVENTS:#x} {SAMPLES}", 30.0),
)


def bareloop() -> Path:
    """The bare loop, built if its source changed."""
    source = ROOT / "bench/bareloop/bareloop.c"
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    program, stamp = OUT / "bareloop", OUT / "bareloop.key"
    if not program.exists() or not stamp.exists() or stamp.read_text() != digest:
        OUT.mkdir(parents=True, exist_ok=True)
        subprocess.run(["gcc", "-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror",
                        "-D_GNU_SOURCE", "-o", program, source], check=True)
        stamp.write_text(digest)
    return program


def _times(text: str) -> tuple[float, float]:
    match = ANSWER.search(text)
    if match is None:
        raise BenchError(f"the guest doesn't answer: {text[-300:]!r}")
    return int(match[1]) / 1000, int(match[2]) / 1000


def bare(case: Case) -> tuple[float, float]:
    """Median and 99th percentile in µs in the bare loop."""
    done = subprocess.run([bareloop(), guest("guest.elf"), case.command.replace(" ", ",")],
                          capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        raise BenchError(done.stderr.strip())
    return _times(done.stdout)


class Busy:
    """A QMP client that asks without pause."""

    def __init__(self, vm: TestVm) -> None:
        self.vm = vm
        self.end = threading.Event()
        self.thread = threading.Thread(target=self._ask)

    def _ask(self) -> None:
        while not self.end.is_set():
            self.vm.qmp.command("query-status")

    def __enter__(self) -> Busy:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.end.set()
        self.thread.join()


def ours(vm: TestVm, case: Case, busy: bool) -> tuple[float, float]:
    """Median and 99th percentile in µs in our VM."""
    if not busy:
        return _times(vm.guest(case.command).text)
    with Busy(vm):
        return _times(vm.guest(case.command).text)


def main(arguments: Sequence[str]) -> int:
    """Exit code 1: it can't be measured here."""
    line = parse(parser(__doc__ or "", 7, 3), arguments)
    report = Report("exits", "Round trip of an exit, µs", [
        "served in", "QMP", "bare C loop", "ours", "p99, bare / ours", "added (median)", "goal",
        ""])
    try:
        with tempfile.TemporaryDirectory(prefix="bench-") as name:
            disk = Path(name) / "disk.img"
            disk.write_bytes(bytes(1 << 20))
            with TestVm(Path(name), "-machine", "microvm", "-m", "128", "-kernel",
                        guest("guest.elf"), "-drive", f"file={disk},id=d,format=raw", "-device",
                        "virtio-blk-device,drive=d,id=d", command=vmms.product()) as vm:
                vm.wait_output(r"^ready\r?\n")
                vm.qmp.command("query-status")
                for case in CASES:
                    _measure(vm, case, line.rounds, report)
    except (BenchError, VmFailure) as error:
        print(f"bench exits: {error}", file=sys.stderr)
        return 1
    report.note("busy: a client asks query-status all the time")
    return report.finish(line.json)


def _measure(vm: TestVm, case: Case, rounds: int, report: Report) -> None:
    base: list[tuple[float, float]] = []
    found: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    for _ in range(rounds):
        base.append(bare(case))
        for busy in (False, True):
            found[busy].append(ours(vm, case, busy))
    for busy, values in found.items():
        added = [one[0] - other[0] for one, other in zip(values, base, strict=True)]
        tails = [f"{median([one[1] for one in each]):.0f}" for each in (base, values)]
        report.add([case.text, "busy" if busy else "idle", show([one[0] for one in base]),
                    show([one[0] for one in values]), " / ".join(tails)],
                   {"case": case.text, "busy": busy, "bare": base, "ours": values},
                   added, Goal(case.goal))
