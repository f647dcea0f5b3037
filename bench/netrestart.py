"""Restart gap of a NIC: from the kill of a net worker under traffic until the next one's rings run.

The guest sends numbered frames through a tap and gets each back; both sides check every byte.
Workers are killed at random instants, then replaced by live upgrades.  What is in flight then
may be lost, nothing may be wrong.  Goal: 20 ms median.
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.report import BenchError, Goal, Report, parse, parser
from tests.guest.build import guest
from tests.support.killer import children, kill
from tests.support.net_namespace import NetNamespace
from tests.support.net_peer import Peer
from tests.support.net_traffic import WINDOW, Traffic
from tests.support.qmp import QmpError
from tests.support.test_vm import TestVm, VmFailure

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

GOAL = 20.0
LONGEST = 0.3  # seconds of a worker's life
LIMIT = 60.0
WAYS = ("kill", "live upgrade")


@contextmanager
def machine(folder: Path, namespace: NetNamespace) -> Iterator[TestVm]:
    """A VM whose NIC is on a tap of the namespace."""
    def start() -> TestVm:
        return TestVm(folder, "-machine", "microvm", "-kernel", guest("guest.elf"), "-m", "128",
                      "-smp", "2", "-D", folder / "log", "-netdev", "tap,id=net0,ifname=tap0",
                      "-device", "virtio-net-device,netdev=net0,id=nic0")

    with namespace.run(start) as vm:
        if not vm.guest("net.init 0").ok:
            raise BenchError(f"the guest can't use its NIC\n{vm.story()}")
        vm.qmp.command("query-status")
        yield vm


def replace(vm: TestVm, way: str) -> dict[str, Any]:
    """Have another worker take over; its event."""
    before = len([e for e in vm.qmp.events if e["event"] == "WORKER_RESTARTED"])
    if way == "kill":
        for pid in children(vm.process.pid, "sv-net"):
            kill(pid)
    else:
        vm.qmp.command("worker-restart", device="nic0")
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline:
        vm.qmp.command("query-status")
        events = [e["data"] for e in vm.qmp.events if e["event"] == "WORKER_RESTARTED"]
        if len(events) > before:
            event: dict[str, Any] = events[before]
            return event
        time.sleep(0.001)
    raise BenchError(f"no worker came back\n{vm.story()}")


def measure(way: str, count: int, seed: int) -> tuple[list[float], Traffic, float]:
    """Gaps in ms, what the traffic came to, and its seconds."""
    chance = random.Random(seed)
    namespace = NetNamespace()
    try:
        with tempfile.TemporaryDirectory(prefix="bench-") as name, \
                machine(Path(name), namespace) as vm, Peer(namespace) as peer:
            began = time.monotonic()
            gaps = []
            with Traffic(vm) as traffic:
                for _ in range(count):
                    time.sleep(chance.uniform(0.1, LONGEST))
                    gaps.append(replace(vm, way)["gap-us"] / 1e3)
            if peer.wrong:
                raise BenchError(f"{len(peer.wrong)} frames came out wrong")
            return gaps, traffic, time.monotonic() - began
    finally:
        namespace.close()


def main(arguments: Sequence[str]) -> int:
    """Exit code 1: it can't be measured here, or a frame was wrong."""
    line = parse(parser(__doc__ or "", 100, 20), arguments)
    if os.geteuid():
        print("bench netrestart: a network namespace needs root", file=sys.stderr)
        return 1
    report = Report("netrestart", "Restart gap of a net worker under traffic, in ms", [
        "", "times", "longest", "frames", "lost", "lost a time", "gap", "goal", ""])
    failed = False
    for number, way in enumerate(WAYS):
        try:
            gaps, traffic, seconds = measure(way, line.rounds, number)
        except (AssertionError, VmFailure, BenchError, QmpError) as error:
            print(f"bench netrestart: {way}: {error}", file=sys.stderr)
            failed = True
            continue
        report.add([way, str(len(gaps)), f"{max(gaps):.1f}", str(traffic.sent), str(traffic.lost),
                    f"{traffic.lost / len(gaps):.2f}"],
                   {"way": way, "gaps": gaps, "frames": traffic.sent, "lost": traffic.lost,
                    "seconds": seconds}, gaps, Goal(GOAL))
    report.note(f"{WINDOW} frames under way at most, there and back, each verified at both ends")
    report.finish(line.json)
    return int(failed)
