"""Soak: workers killed at random instants, again and again, under verified load.

Every combination of cache, queue depth, number of queues, indirect descriptors and event index in
turn, a new VM each; the guest verifies all that it writes and reads.  The first error ends it.
"""

from __future__ import annotations

import itertools
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from bench import crashes
from bench.report import BenchError, Report, median, parse, parser, quantile
from tests.support.load import Load
from tests.support.slow_disk import missing
from tests.support.test_vm import VmFailure

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

KILLS = 25  # a VM
LONGEST = 0.3  # seconds at most from one kill to the next, or to its victim's birth
FEATURES = {"all": 0x1_FFFF_FFFF, "no indirect": 0x1_EFFF_FFFF, "no event index": 0x1_DFFF_FFFF,
            "bare": 0x1_0000_0000}
MQ = 1 << 12  # VIRTIO_BLK_F_MQ


class Case(NamedTuple):
    """One VM."""

    kind: str
    features: str
    depth: int
    queues: int

    def __str__(self) -> str:
        return f"{self.kind}, {self.features}, depth {self.depth}, {self.queues} queues"


def cases(chance: random.Random) -> Iterator[Case]:
    """All combinations in random order, without end."""
    kinds = ["page cache", "direct", *([] if missing() else ["slow disk"])]
    every = [Case(*values) for values in
             itertools.product(kinds, FEATURES, (1, 8, 32, 64, 128), (1, 4))]
    # Without indirect descriptors a queue of 256 takes 85 requests, and a bare guest has but one.
    every = [case for case in every
             if case.depth <= 64 or case.features in ("all", "no event index")
             or (case.queues > 1 and FEATURES[case.features] & MQ)]
    while True:
        chance.shuffle(every)
        yield from every


def soak(case: Case, kills: int, seed: int) -> crashes.Outcome:
    """One VM, so many kills."""
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        folder = Path(name)
        with (crashes.disk(folder, case.kind, 1000) as (file, slow),
              crashes.machine(folder, file, slow, case.queues) as vm):
            answer = vm.guest(f"blk.init 0 {FEATURES[case.features]:#x}")
            if not answer.ok:
                raise BenchError(f"{answer}\n{vm.story()}")
            try:
                return crashes.run(folder, vm, Load(vm, case.depth, ("overlap", "stress")), kills,
                                   LONGEST, random.Random(seed))
            except (AssertionError, BenchError) as error:
                log = (folder / "log").read_text()
                raise BenchError(f"{error}\nlog: {log[-3000:]}") from error


def main(arguments: Sequence[str]) -> int:
    """Exit code 1: something was lost, or wrong."""
    command = parser(__doc__ or "", 1000, 100)
    command.add_argument("--seed", type=int, default=1, help="another order, other instants (1)")
    line = parse(command, arguments)
    chance = random.Random(line.seed)
    began, requests, done, failed = time.monotonic(), 0, [], False
    deaths = 0
    for number, case in enumerate(cases(chance)):
        kills = min(KILLS, line.rounds - deaths)
        if kills <= 0:
            break
        try:
            found = soak(case, kills, line.seed + number)
        except (AssertionError, VmFailure, BenchError) as error:
            print(f"bench soak: VM {number} ({case}), seed {line.seed}: {error}",
                  file=sys.stderr)
            failed = True
            break
        done += found.kills
        deaths += kills
        requests += found.requests
        if sys.stderr.isatty() or number % 4 == 3:
            print(f"soak: {deaths} kills, {requests} requests verified, "
                  f"{time.monotonic() - began:.0f} s ({case})", file=sys.stderr, flush=True)
    report = Report("soak", "Kills at random instants under verified load", [
        "kills", "requests verified", "done again", "errors", "gap, median", "99 %", "longest"])
    if done:
        gaps = [kill.gap for kill in done]
        again = sum(kill.replayed for kill in done)
        report.add([str(deaths), str(requests), str(again), str(int(failed)),
                    f"{median(gaps):.1f}", f"{quantile(gaps, 0.99):.1f}", f"{max(gaps):.1f}"],
                   {"kills": deaths, "verified": requests, "replayed": again,
                    "errors": int(failed), "gaps": gaps,
                    "waits": [kill.waited for kill in done]})
    report.note(f"seed {line.seed}, {time.monotonic() - began:.0f} s; gaps in ms, the wait for old "
                "I/O included")
    report.finish(line.json)
    return int(failed)
