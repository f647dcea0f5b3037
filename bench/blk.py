"""Requests per CPU-second of the block worker, beside qemu-storage-daemon on the same image.

Goals: ≥ 1.6 at 4 KiB on the page cache, ≥ 1.1 at 4 KiB with `direct`, ≥ 1.0 at 1 MiB.
Traps: docs/performance.md.
"""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

from bench import backends
from bench.report import BenchError, Goal, Report, parse, parser, ratios, show

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

IMAGE_SIZE = 256 << 20
SECONDS = 0.6
MIB = 1 << 20


class Case(NamedTuple):
    """One line of the table."""

    pattern: str
    block: int
    depth: int
    direct: bool
    goal: float

    def text(self) -> str:
        """For the reader."""
        size = "4 KiB" if self.block == 4096 else "1 MiB"
        kind = "random" if self.pattern.startswith("rand") else "sequential"
        verb = "read" if self.pattern.endswith("read") else "write"
        return f"{'direct' if self.direct else 'cached'} {size} {kind} {verb}"


def cases() -> list[Case]:
    """All of the table, in its order."""
    found = []
    for direct, goal in ((False, 1.6), (True, 1.1)):
        found += [Case(pattern, 4096, depth, direct, goal)
                  for pattern in ("randread", "randwrite") for depth in (1, 32)]
        found += [Case(pattern, MIB, 4, direct, 1.0) for pattern in ("seqread", "seqwrite")]
    return found


def options(case: Case, seconds: float, segment: int = 0) -> list[str]:
    """Of the load generator."""
    line = ["--pattern", case.pattern, "--depth", str(case.depth), "--block", str(case.block),
            "--seconds", str(seconds), "--readback", "4096" if case.block == 4096 else "64"]
    return [*line, "--segment", str(segment)] if segment and case.block > segment else line


def pair(case: Case, image: Path, number: int, seconds: float = SECONDS, segment: int = 0,
         size: int = IMAGE_SIZE) -> dict[str, dict[str, Any]]:
    """One round: both rivals from the same state of image and cache, the first one in turn."""
    order = ["worker", "daemon"] if number % 2 == 0 else ["daemon", "worker"]
    found = {}
    # At depth 1 most of the time would be that of CPUs that fall asleep and are woken.
    for rival in order:
        # Who reads leaves all as it was: both find the same pages, fast or slow ones.
        if case.pattern.endswith("write") or rival == order[0]:
            backends.prepare(image, size, cached=not case.direct)
        with backends.awake() if case.depth == 1 else contextlib.nullcontext():
            found[rival] = backends.run(rival, image, case.direct,
                                        *options(case, seconds, segment), pinned=case.depth == 1)
    return found


def main(arguments: Sequence[str]) -> int:
    """Exit code 1: it can't be measured here, or data came back wrong."""
    command = parser(__doc__ or "", 5, 2)
    command.add_argument("--seconds", type=float, default=SECONDS, help=f"a run ({SECONDS})")
    command.add_argument("--segment", type=int, default=65536,
                         help="bytes of a descriptor of large requests (65536)")
    command.add_argument("--only", default="", help="cases whose text holds this, e.g. 'direct 1'")
    line = parse(command, arguments)
    backends.OUT.mkdir(parents=True, exist_ok=True)
    image = backends.OUT / "blk.img"
    report = Report("blk", "Block back ends: thousand requests per CPU-second", [
        "case", "depth", "our worker", "qemu-storage-daemon", "elapsed", "ratio", "goal", ""])
    try:
        for case in cases():
            if line.only in f"{case.text()} {case.depth}":
                _measure(case, image, line.rounds, line.seconds, line.segment, report)
    except BenchError as error:
        print(f"bench blk: {error}", file=sys.stderr)
        return 1
    finally:
        image.unlink(missing_ok=True)
    report.note("elapsed: requests a second, ours to the daemon's. Depth 1: generator and back end "
                "on a CPU each, idle-priority spinners keep both awake.")
    return report.finish(line.json)


def _measure(case: Case, image: Path, rounds: int, seconds: float, segment: int, report: Report
             ) -> None:
    if not report.rows:
        backends.loadgen()
    done = [pair(case, image, number, seconds, segment) for number in range(rounds)]
    mine = [found["worker"]["per_cpu_second"] / 1000 for found in done]
    theirs = [found["daemon"]["per_cpu_second"] / 1000 for found in done]
    speed = [found["worker"]["per_second"] / found["daemon"]["per_second"] for found in done]
    report.add([case.text(), str(case.depth), show(mine), show(theirs), show(speed, 2)],
               {**case._asdict(), "worker": mine, "daemon": theirs, "elapsed": speed,
                "runs": done},
               ratios(mine, theirs), Goal(case.goal, at_most=False))
