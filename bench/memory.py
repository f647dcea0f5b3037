"""Memory beside guest RAM: the pages of all our processes, beside QEMU's microvm.

An idle guest, one disk.  Each physical page counts once, whoever else on the machine maps it too:
what PSS would say if nothing else ran (the interpreter's own pages are shared with every other
Python here, this program included); and PSS itself.  Goal: ratio ≤ 0.5, for PSS.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from bench import vmms
from bench.report import BenchError, Goal, Report, parse, parser, ratios, show
from tests.guest.build import guest

if TYPE_CHECKING:
    from collections.abc import Sequence

PAGE = os.sysconf("SC_PAGE_SIZE")
RAM = vmms.MEMORY_MIB << 20
PRESENT, FRAME = 1 << 63, (1 << 55) - 1
LIMIT = 20.0   # seconds for the guest to say something
SETTLE = 1.0  # seconds after the guest is ready


class Figures(NamedTuple):
    """Of one VM, in MiB."""

    alone: float    # each page once, shared with others or not
    pss: float      # as the kernel says
    dirty: float    # private and written
    processes: int


def family(root: int) -> list[int]:
    """`root` and all its descendants."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                parents[int(entry.name)] = int(fields[1])
    found = [root]
    for pid in found:
        found += [child for child, parent in parents.items() if parent == pid]
    return found


def _mappings(pid: int) -> list[tuple[int, int, dict[str, int]]]:
    """(start, end, numbers in KiB) of every mapping but guest RAM."""
    found: list[tuple[int, int, dict[str, int]]] = []
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if match := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            found.append((int(match[1], 16), int(match[2], 16), {}))
        elif match := re.match(r"(\w+):\s+(\d+) kB", line):
            found[-1][2][match[1]] = int(match[2])
    return [entry for entry in found if entry[1] - entry[0] != RAM]


def _frames(pid: int, start: int, end: int) -> set[int]:
    with open(f"/proc/{pid}/pagemap", "rb") as file:
        file.seek(start // PAGE * 8)
        data = file.read((end - start) // PAGE * 8)
    entries = struct.unpack(f"<{len(data) // 8}Q", data)
    return {entry & FRAME for entry in entries if entry & PRESENT}


def figures(pids: Sequence[int]) -> Figures:
    """What these processes use together."""
    frames: set[int] = set()
    pss = dirty = 0
    for pid in pids:
        for start, end, numbers in _mappings(pid):
            pss += numbers.get("Pss", 0)
            dirty += numbers.get("Private_Dirty", 0)
            if numbers.get("Rss", 0):
                frames |= _frames(pid, start, end)
    frames.discard(0)  # what the kernel tells those who may not know
    return Figures(len(frames) * PAGE / (1 << 20), pss / 1024, dirty / 1024, len(pids))


def _wait_ready(process: subprocess.Popen[bytes]) -> None:
    assert process.stdout is not None
    output = b""
    while b"ready" not in output:
        ready, _, _ = select.select([process.stdout], [], [], LIMIT)
        said = os.read(process.stdout.fileno(), 4096) if ready else b""
        if not said:
            raise BenchError(f"the guest isn't ready after {LIMIT:.0f} s; it said {output!r}")
        output += said


def measure(rival: str, folder: Path, disk: Path) -> Figures:
    """Start a VM, wait until its guest is idle, look."""
    command = vmms.RIVALS[rival](folder, guest("guest.elf"), disk)
    with subprocess.Popen(command, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE) as process:
        try:
            _wait_ready(process)
            time.sleep(SETTLE)
            return figures(family(process.pid))
        finally:
            process.kill()
            for left in folder.glob("*.sock"):
                left.unlink()


def main(arguments: Sequence[str]) -> int:
    """Exit code 1: it can't be measured here."""
    line = parse(parser(__doc__ or "", 3, 1), arguments)
    if os.geteuid():
        print("bench memory: only root may see which pages a process has", file=sys.stderr)
        return 1
    found: dict[str, list[Figures]] = {name: [] for name in vmms.RIVALS}
    report = Report("memory", "Memory beside guest RAM, MiB", [
        "", "ours", "QEMU microvm", "ratio", "goal", ""])
    try:
        with tempfile.TemporaryDirectory(prefix="bench-") as name:
            folder = Path(name)
            disk = folder / "disk.img"
            disk.write_bytes(bytes(1 << 20))
            for number in range(line.rounds):
                for rival in vmms.order(number):
                    found[rival].append(measure(rival, folder, disk))
    except (BenchError, OSError) as error:
        print(f"bench memory: {error}", file=sys.stderr)
        return 1
    for text, field, goal in (("pages, each once", "alone", Goal(0.5)), ("PSS", "pss", Goal(0.5)),
                              ("private, written", "dirty", None)):
        ours = [getattr(one, field) for one in found["ours"]]
        qemu = [getattr(one, field) for one in found["qemu"]]
        report.add([text, show(ours), show(qemu)], {"figure": text, "ours": ours, "qemu": qemu},
                   ratios(ours, qemu), goal)
    report.note(f"{found['ours'][0].processes} processes of ours (core, nursery, worker), "
                f"{found['qemu'][0].processes} of QEMU")
    return report.finish(line.json)
