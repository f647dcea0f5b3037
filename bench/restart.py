"""Restart gap: from the kill of a worker under load until the rings of the next one run.

The guest writes, reads and verifies without end; workers are killed at random instants.  The
part of a gap in which the core waits for the I/O of the dead is told apart: nobody can make it
shorter but the disk.  No request may fail.  Goal: 20 ms median beyond that wait.
"""

from __future__ import annotations

import contextlib
import random
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from bench import crashes, urgent
from bench.report import BenchError, Goal, Report, parse, parser, show
from tests.support.load import Load
from tests.support.test_vm import VmFailure

if TYPE_CHECKING:
    from collections.abc import Sequence

GOAL = 20.0
DEPTH = 32
LONGEST = {"page cache": 0.3, "direct": 0.3, "slow disk": 0.6}  # seconds of a worker's life


def measure(kind: str, kills: int, seed: int, group: str) -> crashes.Outcome:
    """Kill that many workers of a VM with a disk of that kind."""
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        with (crashes.disk(folder, kind) as (file, slow),
              crashes.machine(folder, file, slow, 1, group) as vm):
            return crashes.run(folder, vm, Load(vm, DEPTH, ("stress",)), kills, LONGEST[kind],
                               random.Random(seed))


def main(arguments: Sequence[str]) -> int:
    """Exit code 1: it can't be measured here, or the guest saw an error."""
    command = parser(__doc__ or "", 100, 20)
    command.add_argument("--urgent", action="store_true",
                         help="the VM goes before all else that runs here")
    line = parse(command, arguments)
    report = Report("restart", "Restart gap of a killed blk worker, in ms", [
        "", "kills", "gap", "longest", "old I/O", "longest", "done again", "beyond the wait",
        "goal", ""])
    failed = False
    for number, kind in enumerate(LONGEST):
        try:
            with urgent.group() if line.urgent else contextlib.nullcontext("") as group:
                found = measure(kind, line.rounds, number, group)
        except (AssertionError, VmFailure, BenchError) as error:
            print(f"bench restart: {kind}: {error}", file=sys.stderr)
            failed = True
            continue
        gaps, waits = [k.gap for k in found.kills], [k.waited for k in found.kills]
        again = sum(k.replayed for k in found.kills)
        report.add([kind, str(len(gaps)), show(gaps), f"{max(gaps):.1f}", show(waits),
                    f"{max(waits):.1f}", str(again)],
                   {"case": kind, "gaps": gaps, "waits": waits, "replayed": again,
                    "verified": found.requests, "errors": 0},
                   found.beyond(), Goal(GOAL))
        report.note(f"{kind}: {found.requests} requests verified, 0 errors seen by the guest; "
                    f"beyond the wait at most {max(found.beyond()):.1f} ms; {found.unmatched} died "
                    "before they served")
    report.note(f"queue depth {DEPTH}, 512 bytes to 8 KiB; the slow disk takes 400 requests a "
                "second; the wait includes opening the image anew")
    report.finish(line.json)
    return int(failed)
