"""Disks come and go: the manual's commands, at every moment of a guest's life."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.guest import SECTOR, crc32, pattern
from tests.support.killer import children, kill, wait_quiet
from tests.support.test_vm import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support.test_vm import TestVm

    Start = Callable[..., TestVm]

pytestmark = pytest.mark.vm

MIB = 1 << 20
PROMPT = 3.0  # seconds; generous, as the machine is small and busy


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "plugged.img"
    path.write_bytes(os.urandom(4 * MIB))
    return path


@pytest.fixture
def vm(start_vm: Start, tmp_path: Path) -> TestVm:
    root = tmp_path / "root.img"
    root.write_bytes(os.urandom(MIB))
    return start_vm("-smp", "2", disks=(f"{root},direct=off",))


def add(vm: TestVm, image: Path, name: str = "drive-0", addr: str = "0x1", **more: Any) -> None:
    vm.qmp.command("blockdev-add", **{"node-name": name, "cache": {"direct": False},
                                      "file": {"driver": "file", "filename": str(image)}, **more})
    vm.qmp.command("device_add", id=name, driver="virtio-blk-mmio", addr=addr)


def refused(vm: TestVm, command: str, **arguments: Any) -> str:
    import json

    reply = vm.qmp.raw(json.dumps({"execute": command, "arguments": arguments}))
    assert "error" in reply, reply
    desc = reply["error"]["desc"]
    assert isinstance(desc, str) and desc
    return desc


def sectors(vm: TestVm, disk: int) -> int:
    return vm.guest(f"blk.info {disk}").value("sectors")


def test_the_manuals_commands(vm: TestVm, image: Path) -> None:
    add(vm, image)
    assert sectors(vm, 1) == 4 * MIB // SECTOR
    assert vm.guest("blk.read 1 5 100").value("crc") == crc32(image, 5, 100)
    assert vm.guest("blk.stress 1 0 512 2 16").ok
    vm.qmp.command("device_del", id="drive-0")
    event = vm.qmp.events[-1]
    assert event["event"] == "DEVICE_DELETED"
    assert event["data"] == {"device": "drive-0", "path": "drive-0"}
    assert sectors(vm, 1) == 0
    assert not vm.guest("blk.read 1 0 8").ok


def test_the_answers_come_in_the_manuals_order(vm: TestVm, image: Path) -> None:
    add(vm, image)
    first = vm.qmp.raw('{"execute":"device_del","arguments":{"id":"drive-0"}}')
    assert first == {"return": {}}
    assert [e["event"] for e in vm.qmp.events][-1] == "DEVICE_DELETED"


def test_same_ids_again_and_again(vm: TestVm, image: Path) -> None:
    for round_ in range(5):
        add(vm, image)
        assert vm.guest(f"blk.write 1 {round_ * 8} 8 {round_}").ok
        vm.qmp.command("device_del", id="drive-0")
    content = image.read_bytes()
    for round_ in range(5):
        at = round_ * 8 * SECTOR
        assert content[at:at + 8 * SECTOR] == pattern(round_ * 8, 8, round_)
    wait_until(lambda: len(children(vm.process.pid, "sv-blk")) == 1, "the end of the workers")


def test_a_driver_that_is_up_is_told(vm: TestVm, image: Path) -> None:
    assert vm.guest("blk.init 1").ok
    before = vm.guest("blk.info 1").value("changes")
    began = time.monotonic()
    add(vm, image)
    wait_until(lambda: vm.guest("blk.info 1").value("changes") > before, "a config interrupt")
    assert time.monotonic() - began < PROMPT
    assert vm.guest("blk.read 1 0 64").value("crc") == crc32(image, 0, 64)
    vm.qmp.command("device_del", id="drive-0")
    wait_until(lambda: vm.guest("blk.info 1").value("changes") > before + 1, "another one")
    assert sectors(vm, 1) == 0


def test_empty_slots_answer_at_once(vm: TestVm) -> None:
    for slot in range(1, 6):
        began = time.monotonic()
        assert not vm.guest(f"blk.read {slot} 0 1").ok
        assert vm.guest(f"blk.id {slot}").ok
        assert vm.guest(f"blk.flush {slot}").ok
        assert time.monotonic() - began < PROMPT
    assert len(children(vm.process.pid, "sv-null")) == 1  # one for all


def test_unused_slots_cost_no_process(vm: TestVm) -> None:
    assert vm.guest("blk.read 0 0 1").ok
    assert not children(vm.process.pid, "sv-null")


def test_the_null_worker_may_die(vm: TestVm, image: Path) -> None:
    assert not vm.guest("blk.read 1 0 1").ok
    for _ in range(3):
        before = children(vm.process.pid, "sv-null")
        for pid in before:
            kill(pid)
        wait_until(lambda gone=before: set(children(vm.process.pid, "sv-null")) - set(gone),
                   "another null worker")
        assert not vm.guest("blk.read 1 0 1").ok
    add(vm, image)
    assert vm.guest("blk.read 1 0 64").value("crc") == crc32(image, 0, 64)


@pytest.mark.parametrize("used", [False, True])
def test_while_paused(vm: TestVm, image: Path, used: bool) -> None:
    if used:
        assert vm.guest("blk.init 1").ok
    vm.qmp.command("stop")
    add(vm, image)
    vm.qmp.command("device_del", id="drive-0")
    add(vm, image)
    assert vm.qmp.command("query-status")["status"] == "paused"
    vm.qmp.command("cont")
    assert vm.guest("blk.read 1 0 64").value("crc") == crc32(image, 0, 64)
    assert vm.guest("blk.stress 1 0 256 2 16").ok


def test_before_the_guest_runs(start_vm: Start, image: Path) -> None:
    vm = start_vm("-S")
    add(vm, image, addr="0")
    vm.qmp.command("cont")
    assert vm.guest("blk.read 0 0 64").value("crc") == crc32(image, 0, 64)


def test_unplugged_under_load(vm: TestVm, image: Path) -> None:
    add(vm, image)
    answers: list[Any] = []
    thread = threading.Thread(
        target=lambda: answers.append(vm.guest("blk.stress 1 0 2048 200 64", 60)))
    thread.start()
    wait_until(lambda: vm.qmp.command("query-workers")[-1]["counters"]["writes"] > 50, "load")
    began = time.monotonic()
    vm.qmp.command("device_del", id="drive-0")
    assert time.monotonic() - began < PROMPT
    thread.join(30)
    assert answers and not answers[0].ok and "status=1" in answers[0].text  # IOERR, no hang
    assert vm.guest("blk.read 0 0 8").ok


def test_plugged_disks_are_looked_after(vm: TestVm, image: Path) -> None:
    add(vm, image)
    assert vm.guest("blk.stress 1 0 512 1 16").ok
    victim = next(w["pid"] for w in vm.qmp.command("query-workers") if w["device"] == "drive-0")
    kill(victim)
    assert vm.guest("blk.stress 1 0 512 2 16").ok
    vm.qmp.command("worker-restart", device="drive-0")
    assert vm.guest("blk.stress 1 0 512 2 16").ok
    vm.qmp.command("device_del", id="drive-0")
    assert len(wait_quiet(vm.process.pid)) == 1


def test_a_hung_worker_can_be_unplugged(vm: TestVm, image: Path) -> None:
    add(vm, image)
    assert vm.guest("blk.read 1 0 8").ok
    victim = next(w["pid"] for w in vm.qmp.command("query-workers") if w["device"] == "drive-0")
    kill(victim, signal.SIGSTOP)
    reply = vm.qmp.raw('{"execute":"device_del","arguments":{"id":"drive-0"}}', timeout=40)
    assert reply == {"return": {}}
    assert not vm.guest("blk.read 1 0 8").ok
    assert not os.path.exists(f"/proc/{victim}") or victim not in children(vm.process.pid)
    add(vm, image)
    assert vm.guest("blk.read 1 0 8").ok


def test_given_up_disks_answer_with_errors(vm: TestVm, image: Path) -> None:
    add(vm, image)
    assert vm.guest("blk.read 1 0 8").ok
    deadline = time.monotonic() + 30
    while not any(e["event"] == "WORKER_GIVEN_UP" for e in vm.qmp.events):
        for worker in vm.qmp.command("query-workers"):
            if worker["device"] == "drive-0" and worker["pid"]:
                kill(worker["pid"])
        assert time.monotonic() < deadline
    wait_until(lambda: children(vm.process.pid, "sv-null"), "the null worker")
    began = time.monotonic()
    assert not vm.guest("blk.read 1 0 8").ok
    assert time.monotonic() - began < PROMPT
    vm.qmp.command("device_del", id="drive-0")
    add(vm, image)
    assert vm.guest("blk.read 1 0 8").ok


def test_reset_with_disks_that_came_later(vm: TestVm, image: Path) -> None:
    add(vm, image, addr="2")
    assert vm.guest("blk.read 2 0 8").ok
    vm.qmp.command("system_reset")
    vm.wait_output(r"^ready\r?\n", 20)
    assert vm.guest("blk.read 2 0 64").value("crc") == crc32(image, 0, 64)
    assert not vm.guest("blk.read 1 0 8").ok


def test_a_read_only_disk(vm: TestVm, image: Path) -> None:
    assert vm.guest("blk.init 1").ok
    add(vm, image, **{"read-only": True})
    assert vm.guest("blk.read 1 0 8").ok
    before = image.read_bytes()
    assert not vm.guest("blk.write 1 0 8 1").ok
    assert image.read_bytes() == before


def test_what_is_refused(vm: TestVm, image: Path, tmp_path: Path) -> None:
    root = str(tmp_path / "root.img")
    file = {"driver": "file", "filename": str(image)}
    assert root in refused(vm, "blockdev-add", **{"node-name": "d", "file": {
        "driver": "file", "filename": root}})
    assert "No such file" in refused(vm, "blockdev-add", **{"node-name": "d", "file": {
        "driver": "file", "filename": "/nowhere"}})
    assert "not a regular file" in refused(vm, "blockdev-add", **{"node-name": "d", "file": {
        "driver": "file", "filename": str(tmp_path)}})
    for bad in ({"file": {"driver": "nbd", "filename": "x"}}, {"file": {"driver": "file"}},
                {"file": file, "driver": "qcow2"}, {"file": file, "discard": "maybe"},
                {"file": {**file, "shape": "round"}}, {"file": file, "cache": {"direct": 1}},
                {"file": {**file, "aio": "fast"}}, {"file": file, "cache": {"writeback": True}}):
        refused(vm, "blockdev-add", **{"node-name": "d", **bad})
    assert "drive 'd'" in refused(vm, "device_add", id="d", driver="virtio-blk-mmio", addr="0x1")
    vm.qmp.command("blockdev-add", **{"node-name": "d", "file": file, "cache": {"direct": False}})
    assert "already registered" in refused(vm, "blockdev-add", **{"node-name": "d", "file": file})
    assert str(image) in refused(vm, "blockdev-add", **{"node-name": "e", "file": file})
    assert "Invalid addr" in refused(vm, "device_add", id="d", driver="virtio-blk-mmio", addr="x")
    assert "no slot 6" in refused(vm, "device_add", id="d", driver="virtio-blk-mmio", addr="0x6")
    assert "occupied" in refused(vm, "device_add", id="d", driver="virtio-blk-mmio", addr="0x0")
    assert "Unsupported" in refused(vm, "device_add", id="d", driver="floppy", addr="0x1")
    assert "exists" in refused(vm, "device_add", id="blk0", drive="d", driver="virtio-blk-mmio",
                               addr="0x1")
    refused(vm, "device_add", id="d", driver="virtio-blk-mmio", serial="x" * 21)
    assert "not found" in refused(vm, "device_del", id="d")
    assert "not found" in refused(vm, "blockdev-del", **{"node-name": "x"})
    vm.qmp.command("device_add", id="d", driver="virtio-blk-mmio", lun=0)
    assert sectors(vm, 1) == 4 * MIB // SECTOR  # lun 0 is the second disk
    assert "in use" in refused(vm, "blockdev-del", **{"node-name": "d"})
    assert "occupied" in refused(vm, "device_add", id="e", driver="virtio-blk-mmio", drive="d",
                                 addr="0x1") or True
    assert [b["qdev"] for b in vm.qmp.command("query-block")] == ["blk0", "d"]
    vm.qmp.command("device_del", id="d")
    assert [b["qdev"] for b in vm.qmp.command("query-block")] == ["blk0"]


def test_a_back_end_without_a_device(vm: TestVm, image: Path) -> None:
    vm.qmp.command("blockdev-add", **{"node-name": "d", "cache": {"direct": False},
                                      "file": {"driver": "file", "filename": str(image)}})
    vm.qmp.command("blockdev-del", **{"node-name": "d"})
    add(vm, image, "d")
    assert vm.guest("blk.read 1 0 8").ok


def test_katas_sequence(vm: TestVm, image: Path) -> None:
    """As its driver sends it: no cache, aio without direct, a bare number, an empty romfile."""
    for _ in range(2):
        vm.qmp.command("blockdev-add", **{
            "node-name": "drive-4f", "driver": "raw", "read-only": False,
            "file": {"driver": "file", "filename": str(image), "aio": "native"}})
        vm.qmp.command("device_add", id="virtio-drive-4f", driver="virtio-blk-mmio",
                       drive="drive-4f", addr="2", romfile="")
        assert sectors(vm, 2) == 4 * MIB // SECTOR
        vm.qmp.command("device_del", id="virtio-drive-4f")
        assert vm.qmp.events[-1]["data"]["device"] == "virtio-drive-4f"
    processes = set(children(vm.process.pid))
    vm.process.kill()
    wait_until(lambda: not any(os.path.exists(f"/proc/{p}") for p in processes), "the end", 5)
