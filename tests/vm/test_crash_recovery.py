"""Workers die at any instant, under verified load: the guest notices nothing but a pause."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.killer import Killer, children, kill, wait_quiet
from tests.support.test_vm import wait_until
from vmm.block.image import INCARNATION, hold_incarnation

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support.test_vm import TestVm

    Start = Callable[..., TestVm]

pytestmark = pytest.mark.vm

MIB = 1 << 20
ALL, NO_INDIRECT, NO_EVENT_INDEX, BARE = 0x1_FFFF_FFFF, 0x1_EFFF_FFFF, 0x1_DFFF_FFFF, 0x1_0000_0000


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(os.urandom(16 * MIB))
    return path


def events(vm: TestVm, name: str) -> list[dict[str, Any]]:
    vm.qmp.command("query-status")
    return [event["data"] for event in vm.qmp.events if event["event"] == name]


def stress(vm: TestVm, depth: int, rounds: int = 4, sectors: int = 1024) -> None:
    answer = vm.guest(f"blk.stress 0 0 {sectors} {rounds} {depth}", 60)
    assert answer.ok, f"{answer}\n{vm.story()}"


CASES = [("depth 1", ALL, 1, "direct=off"), ("depth 128", ALL, 128, "direct=off"),
         ("direct", ALL, 32, "direct=on"), ("threads", ALL, 32, "direct=off,aio=threads"),
         ("no indirect", NO_INDIRECT, 32, "direct=off"),
         ("no event index", NO_EVENT_INDEX, 32, "direct=off"), ("bare", BARE, 16, "direct=on")]


@pytest.mark.parametrize(("mask", "depth", "cache"), [case[1:] for case in CASES],
                         ids=[case[0] for case in CASES])
def test_kills_under_load(start_vm: Start, disk: Path, mask: int, depth: int, cache: str) -> None:
    vm = start_vm("-smp", "2", disks=(f"{disk},{cache}",))
    assert not events(vm, "WORKER_CRASHED")  # connected: events come from now on
    assert vm.guest(f"blk.init 0 {mask:#x}").ok
    with Killer(vm.process.pid, 4, seed=depth + mask) as killer:
        while killer.kills < 4:
            stress(vm, depth, 2)
    wait_quiet(vm.process.pid)
    stress(vm, depth, 2)
    restarts = events(vm, "WORKER_RESTARTED")
    assert len(restarts) >= killer.kills - 1  # one may have been killed while it took over
    assert not events(vm, "WORKER_GIVEN_UP")
    assert vm.qmp.command("query-workers")[0]["restarts"] == len(events(vm, "WORKER_CRASHED"))


def test_kills_with_several_queues(start_vm: Start, disk: Path) -> None:
    vm = start_vm("-smp", "2", "-drive", f"id=d,file={disk},direct=off", "-device",
                  "virtio-blk-device,drive=d,num-queues=4")
    with Killer(vm.process.pid, 4) as killer:
        while killer.kills < 4:
            stress(vm, 64)
    assert vm.guest("blk.stress 0 0 512 2 8", 60).ok


def test_kills_of_nursery_and_worker(start_vm: Start, disk: Path) -> None:
    vm = start_vm(disks=(f"{disk},direct=off",))
    assert not events(vm, "WORKER_CRASHED")
    with Killer(vm.process.pid, 3, longest=500, nursery=True) as killer:
        while killer.kills < 3:
            stress(vm, 32, 2)
    wait_quiet(vm.process.pid)
    stress(vm, 32, 2)
    assert not events(vm, "WORKER_GIVEN_UP")


def test_live_upgrades_under_load(start_vm: Start, disk: Path) -> None:
    vm = start_vm("-smp", "2", disks=(f"{disk},direct=off",))
    stress(vm, 32, 2)
    done = threading.Event()
    errors: list[BaseException] = []

    def load() -> None:
        try:
            while not done.is_set():
                stress(vm, 32, 2)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=load)
    thread.start()
    pids, nurseries = set(), set()
    try:
        for _ in range(4):
            vm.qmp.command("worker-restart", device="blk0")
            pids |= set(children(vm.process.pid, "sv-blk"))
            nurseries |= set(children(vm.process.pid, "sv-nursery"))
    finally:
        done.set()
        thread.join(60)
    assert not errors, errors[0]
    assert len(pids) >= 4 and len(nurseries) >= 4  # each from a fresh nursery
    assert not events(vm, "WORKER_CRASHED")
    assert len(events(vm, "WORKER_RESTARTED")) == 4
    assert "ERROR" not in vm.error_text()  # nothing went wrong


def test_upgrade_of_a_hung_worker_replaces_it(start_vm: Start, disk: Path) -> None:
    vm = start_vm(disks=(f"{disk},direct=off",))
    stress(vm, 8, 1)
    worker = wait_quiet(vm.process.pid)[0]
    kill(worker, signal.SIGSTOP)
    reply = vm.qmp.raw('{"execute":"worker-restart","arguments":{"device":"blk0"}}', timeout=30)
    assert "in time" in reply["error"]["desc"]
    assert wait_quiet(vm.process.pid)[0] != worker
    stress(vm, 8, 1)


@pytest.mark.parametrize("name", ["nobody", "", "x" * 300])
def test_restart_of_no_worker(start_vm: Start, disk: Path, name: str) -> None:
    vm = start_vm(disks=(disk,))
    command = {"execute": "worker-restart", "arguments": {"device": name}}
    reply = vm.qmp.raw(json.dumps(command))
    assert "error" in reply and reply["error"]["desc"]


@pytest.mark.parametrize("command", ["stop", "system_reset"])
def test_a_worker_dies_while_the_vm_changes(start_vm: Start, disk: Path, command: str) -> None:
    vm = start_vm(disks=(f"{disk},direct=off",))
    for _ in range(4):
        stress(vm, 32, 1)
        kill(wait_quiet(vm.process.pid)[0])
        vm.qmp.command(command)
        if command == "stop":
            vm.qmp.command("cont")
        else:
            vm.wait_output(r"^ready\r?\n", 20)
    stress(vm, 32, 2)


def test_a_worker_dies_while_the_vm_is_paused(start_vm: Start, disk: Path) -> None:
    vm = start_vm(disks=(f"{disk},direct=off",))
    stress(vm, 32, 1)
    vm.qmp.command("stop")
    kill(wait_quiet(vm.process.pid)[0])
    wait_until(lambda: events(vm, "WORKER_RESTARTED"), "another worker", 10)
    assert vm.qmp.command("query-status")["status"] == "paused"
    vm.qmp.command("cont")
    stress(vm, 32, 2)


def open_images(vm: TestVm, disk: Path) -> int:
    """How often the core has the image open: once more while a worker is to come."""
    count = 0
    for link in Path(f"/proc/{vm.process.pid}/fd").iterdir():
        try:
            count += os.readlink(link) == str(disk)
        except FileNotFoundError:
            pass  # it was closed meanwhile
    return count


def test_cont_waits_for_the_io_of_the_dead(start_vm: Start, disk: Path) -> None:
    """Nobody else answers for the disk meanwhile: the driver would see errors."""
    vm = start_vm(disks=(f"{disk},direct=off",))
    stress(vm, 32, 1)
    vm.qmp.command("stop")
    description = os.open(disk, os.O_RDWR | os.O_CLOEXEC)
    try:
        hold_incarnation(description, INCARNATION)  # as I/O does that a dead worker left
        kill(wait_quiet(vm.process.pid)[0])
        wait_until(lambda: open_images(vm, disk) > 1, "the wait for its I/O", 10)
        vm.qmp.command("cont")
        workers = vm.qmp.command("query-workers")
    finally:
        os.close(description)
    assert not [worker for worker in workers if worker["kind"] == "null"]
    stress(vm, 32, 2)
    assert len(events(vm, "WORKER_RESTARTED")) == 1


def test_who_dies_again_and_again_is_given_up(start_vm: Start, disk: Path) -> None:
    vm = start_vm(disks=(f"{disk},direct=off",))
    stress(vm, 8, 1)
    deadline = time.monotonic() + 30
    while not (given := events(vm, "WORKER_GIVEN_UP")):
        for pid in children(vm.process.pid, "sv-blk"):
            kill(pid)
        assert time.monotonic() < deadline
    assert given[0]["device"] == "blk0" and "died before they served" in given[0]["reason"]
    vm.qmp.command("stop")
    vm.qmp.command("cont")
    assert vm.guest("echo").ok
    vm.qmp.command("quit")
    assert vm.wait(15) == 0


def test_the_neighbour_notices_nothing(start_vm: Start, disk: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.img"
    other.write_bytes(bytes(4 * MIB))
    vm = start_vm(disks=(f"{disk},direct=off", f"{other},direct=off"))
    stress(vm, 8, 1)
    first, second = wait_quiet(vm.process.pid, 2)
    victim = next(w["pid"] for w in vm.qmp.command("query-workers") if w["device"] == "blk0")
    kill(victim)
    assert vm.guest("blk.stress 1 0 512 2 8").ok
    wait_until(lambda: events(vm, "WORKER_RESTARTED"), "another worker", 10)
    alive = children(vm.process.pid, "sv-blk")
    assert ({first, second} - {victim}).issubset(alive)
