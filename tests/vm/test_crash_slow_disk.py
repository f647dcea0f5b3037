"""A worker's death proves nothing about its I/O: on a slow disk it goes on long after.

Overlapping writes, version after version, show whether an old one ever reaches the disk after
a newer one that was acknowledged, and reads whether an old one ever reaches memory that is used
again.  For that, the successor's disk is faster than that of the dead: what is late comes late.
"""

from __future__ import annotations

import os
import random
import time
from typing import TYPE_CHECKING

import pytest

from tests.support.capabilities import require
from tests.support.killer import children, kill, wait_quiet
from tests.support.load import Load
from tests.support.slow_disk import SlowDisk

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.support.test_vm import TestVm

    Start = Callable[..., TestVm]

pytestmark = pytest.mark.vm

KILLS = 3
NO_INDIRECT, BARE = 0x1_EFFF_FFFF, 0x1_0000_0000


def victim(vm: TestVm, last: int, load: Load) -> int:
    """The pid of the worker after the one with pid `last`, alive but perhaps not yet serving."""
    deadline = time.monotonic() + 60
    while load.goes_on():
        for pid in children(vm.process.pid, "sv-blk"):
            if pid != last:
                return pid
        assert time.monotonic() < deadline, "no other worker came"
        time.sleep(0.001)
    return 0


def await_service(vm: TestVm, restarts: int, load: Load) -> None:
    """Until so many successors have taken over."""
    deadline = time.monotonic() + 60
    while load.goes_on():
        vm.qmp.command("query-status")
        if sum(event["event"] == "WORKER_RESTARTED" for event in vm.qmp.events) >= restarts:
            return
        assert time.monotonic() < deadline, "no other worker took over"
        time.sleep(0.001)


def slow_death(vm: TestVm, disk: SlowDisk, lanes: int) -> None:
    """Kill workers in the middle of their slow I/O, whose successors are fast; and successors
    that wait for that I/O to end, which is no event."""
    chance = random.Random(lanes)
    last = 0
    with Load(vm, lanes) as load:
        for number in range(KILLS):
            last = victim(vm, last, load)
            if not last:
                break
            disk.hold_back([last])
            time.sleep(chance.uniform(0.1, 0.3))  # any instant
            kill(last)
            if number == 1:
                last = victim(vm, last, load)
                kill(last)
            await_service(vm, number + 1, load)
    wait_quiet(vm.process.pid)
    assert vm.guest("blk.overlap 0 0 1 1 1").ok
    vm.qmp.command("query-status")
    assert not [event for event in vm.qmp.events if event["event"] == "WORKER_GIVEN_UP"]


@pytest.mark.parametrize(("lanes", "queues", "requests", "mask"), [
    (1, 1, 5, ~0), (16, 1, 20, ~0), (64, 4, 100, ~0), (128, 1, 100, ~0), (80, 1, 100, NO_INDIRECT),
    (32, 1, 40, BARE)], ids=["1", "16", "64 over 4 queues", "128", "no indirect", "bare"])
def test_nothing_old_comes_late(start_vm: Start, tmp_path: Path, lanes: int, queues: int,
                                requests: int, mask: int) -> None:
    require("slow_disk")
    image = tmp_path / "slow.img"
    image.write_bytes(os.urandom(4 << 20))
    with SlowDisk(image, requests) as disk:
        vm = start_vm("-smp", "2", "-drive", f"id=d,file={disk.path},direct=on", "-device",
                      f"virtio-blk-device,drive=d,id=blk0,num-queues={queues}")
        try:
            assert vm.guest(f"blk.init 0 {mask & (1 << 64) - 1:#x}").ok
            assert not [e for e in vm.qmp.events if e["event"] == "WORKER_CRASHED"]  # connected
            slow_death(vm, disk, lanes)
            restarts = [e for e in vm.qmp.events if e["event"] == "WORKER_RESTARTED"]
            assert len(restarts) == KILLS, vm.story()
        finally:
            vm.close()


@pytest.mark.parametrize("command", ["stop", "worker-restart"])
def test_an_orderly_end_waits_for_slow_io(start_vm: Start, tmp_path: Path, command: str) -> None:
    """Nothing of what was begun is under way any more when `stop` answers."""
    require("slow_disk")
    image = tmp_path / "slow.img"
    image.write_bytes(os.urandom(4 << 20))
    with SlowDisk(image, 50) as disk:
        vm = start_vm("-smp", "2", disks=(f"{disk.path},direct=on",))
        try:
            assert vm.guest("blk.overlap 0 0 1 1 1").ok
            with Load(vm, 32) as load:
                disk.hold_back([victim(vm, 0, load)])
                for _ in range(2):
                    time.sleep(0.2)  # the disk holds back meanwhile
                    if command == "stop":
                        vm.qmp.command("stop")
                        vm.qmp.command("cont")
                    else:
                        vm.qmp.command("worker-restart", device="blk0")
            vm.qmp.command("query-status")
            assert not [e for e in vm.qmp.events if e["event"] == "WORKER_CRASHED"]
        finally:
            vm.close()
