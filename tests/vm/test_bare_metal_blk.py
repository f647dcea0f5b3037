"""The blk worker under a bare-metal guest's own virtio driver: verified data, hostile rings."""

from __future__ import annotations

import os
import zlib
from typing import TYPE_CHECKING

import pytest

from tests.support.guest import SECTOR, crc32, pattern
from tests.support.test_vm import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.support.test_vm import TestVm

    Start = Callable[..., TestVm]

pytestmark = pytest.mark.vm

MIB = 1 << 20
NO_INDIRECT = 0x1_EFFF_FFFF  # feature masks for `blk.init`
NO_EVENT_INDEX = 0x1_DFFF_FFFF
BARE = 0x1_0000_0000
ALL = 0x1_FFFF_FFFF


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(os.urandom(MIB) + bytes(15 * MIB))
    return path


def test_reads_what_the_image_holds(start_vm: Start, disk: Path) -> None:
    vm = start_vm(disks=(disk,))
    assert vm.guest("blk.info 0").value("sectors") == 16 * MIB // SECTOR
    for sector, count in ((0, 1), (1, 7), (100, 1948), (32767, 1)):
        assert vm.guest(f"blk.read 0 {sector} {count}").value("crc") == crc32(disk, sector, count)


def test_writes_reach_the_image(start_vm: Start, disk: Path) -> None:
    vm = start_vm(disks=(disk,))
    assert vm.guest("blk.write 0 4096 512 7").ok
    assert vm.guest("blk.flush 0").ok
    with disk.open("rb") as file:
        file.seek(4096 * SECTOR)
        assert file.read(512 * SECTOR) == pattern(4096, 512, 7)
        assert file.read(SECTOR) == bytes(SECTOR)


@pytest.mark.parametrize("cache", ["direct=off", "direct=on", "aio=threads,direct=off"])
@pytest.mark.parametrize("mask", [ALL, NO_INDIRECT, NO_EVENT_INDEX, BARE])
def test_many_requests_in_flight(start_vm: Start, disk: Path, cache: str, mask: int) -> None:
    vm = start_vm(disks=(f"{disk},{cache}",))
    assert vm.guest(f"blk.init 0 {mask:#x}").ok
    assert vm.guest("blk.stress 0 2048 512 4 32").ok
    assert vm.guest("blk.verify 0 2048 512 3 1 1").ok


def test_small_queues_wrap_around(start_vm: Start, disk: Path) -> None:
    vm = start_vm(disks=(disk,))
    for size in (256, 16, 4):
        assert vm.guest(f"blk.init 0 {NO_INDIRECT:#x} {size}").ok
        assert vm.guest("blk.stress 0 0 256 2 64").ok


def test_several_queues(start_vm: Start, disk: Path) -> None:
    vm = start_vm("-drive", f"id=d,file={disk}", "-device",
                  "virtio-blk-device,drive=d,num-queues=3,serial=S3RIAL")
    assert vm.guest("blk.info 0").value("queues") == 3
    assert vm.guest("blk.id 0").text.endswith("S3RIAL")
    assert vm.guest("blk.stress 0 0 1024 3 64").ok


def test_two_disks_keep_their_order(start_vm: Start, disk: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.img"
    other.write_bytes(pattern(0, 64, 1))
    vm = start_vm(disks=(disk, other))
    assert vm.guest("blk.count").text.endswith(" 6")  # empty slots are there too
    assert vm.guest("blk.info 1").value("sectors") == 64
    assert vm.guest("blk.verify 1 0 64 1").ok
    assert vm.guest("blk.stress 0 0 256 2 16").ok
    assert vm.guest("blk.verify 1 0 64 1").ok


def test_discard_and_write_zeroes(start_vm: Start, disk: Path) -> None:
    vm = start_vm(disks=(f"{disk},discard=unmap",))
    assert vm.guest("blk.write 0 8192 4096 3").ok
    assert vm.guest("blk.zero 0 8192 1000").ok
    assert vm.guest("blk.is-zero 0 8192 1000").ok
    assert vm.guest("blk.verify 0 9192 100 3").ok
    assert vm.guest("blk.zero 0 9192 100 1").ok
    assert vm.guest("blk.is-zero 0 8192 1100").ok
    assert vm.guest("blk.flush 0").ok
    before = disk.stat().st_blocks
    assert vm.guest("blk.discard 0 8192 4096").ok
    assert vm.guest("blk.flush 0").ok
    wait_until(lambda: disk.stat().st_blocks < before, "blocks given back")


def test_a_readonly_disk_refuses_writes(start_vm: Start, disk: Path) -> None:
    before = zlib.crc32(disk.read_bytes())
    vm = start_vm(disks=(f"{disk},readonly=on",))
    assert vm.guest("blk.info 0").value("features") & 0x20
    answer = vm.guest("blk.write 0 0 8 1")
    assert not answer.ok and answer.value("status") == 1
    assert vm.guest("blk.read 0 0 8").ok
    vm.qmp.command("quit")
    assert vm.wait() == 0
    assert zlib.crc32(disk.read_bytes()) == before


def test_reset_and_again(start_vm: Start, disk: Path) -> None:
    vm = start_vm(disks=(disk,))
    for _ in range(5):
        assert vm.guest("blk.init 0").ok
        assert vm.guest("blk.stress 0 0 64 1 16").ok
        assert vm.guest("blk.reset 0").ok


def test_stop_and_cont_with_requests_in_flight(start_vm: Start, disk: Path) -> None:
    vm = start_vm("-smp", "2", disks=(disk,))
    assert vm.guest("echo").ok
    vm.send("blk.stress 0 0 2048 12 64\n")
    for _ in range(4):
        vm.qmp.command("stop")
        before = disk.stat().st_mtime_ns
        assert vm.qmp.command("query-status")["status"] == "paused"
        assert disk.stat().st_mtime_ns == before
        vm.qmp.command("cont")
    assert vm.script_answer(60).ok


def test_system_reset_with_requests_in_flight(start_vm: Start, disk: Path) -> None:
    vm = start_vm(disks=(disk,))
    assert vm.guest("echo").ok
    vm.send("blk.stress 0 0 2048 100 64\n")
    vm.qmp.command("system_reset")
    vm.wait_output(r"^ready\r?\n")
    assert vm.guest("blk.stress 0 0 256 2 16").ok


def test_the_worker_goes_with_the_vmm(start_vm: Start, disk: Path) -> None:
    vm = start_vm(disks=(disk,))
    assert vm.guest("blk.read 0 0 8").ok
    worker = vm.qmp.command("query-workers")[0]
    assert worker["state"] == "running"
    vm.process.kill()
    wait_until(lambda: not os.path.exists(f"/proc/{worker['pid']}"), "end of the worker")
    wait_until(lambda: not vm.processes(), "end of all processes")


# What the device may answer: a status (0 OK, 1 I/O error, 2 unsupported), or NEEDS_RESET (0x40),
# or silence to a request that has no place for an answer. Never OK for what can't be done.
BROKEN = ["loop", "self-loop", "long-loop", "outside-header", "outside-status", "bad-next",
          "bad-head", "short-header", "writable-header", "readonly-status", "empty-status",
          "only-header", "indirect-outside", "indirect-odd", "indirect-empty", "indirect-next",
          "indirect-nested", "available-jump"]
REFUSED = ["outside", "wrapping", "mmio-hole", "huge", "odd-length", "bad-type", "beyond",
           "far-beyond", "write-beyond", "discard-short", "discard-beyond", "discard-wrap",
           "discard-flags", "zero-beyond"]
# Odd, but with a meaning: no data at all; a table that says it is larger than what is used of it.
HARMLESS = ["no-data", "readonly-data", "indirect-huge"]


@pytest.mark.parametrize("attacks", [BROKEN, REFUSED, HARMLESS],
                         ids=["broken", "refused", "harmless"])
def test_hostile_requests(start_vm: Start, disk: Path, attacks: list[str]) -> None:
    content = disk.read_bytes()
    vm = start_vm(disks=(f"{disk},discard=unmap",))
    assert "status=0x0" in vm.guest("blk.hostile 0 none").text
    for attack in attacks:
        answer = vm.guest(f"blk.hostile 0 {attack}")
        status, device = answer.value("status"), answer.value("device")
        assert answer.ok, answer
        if attack in REFUSED:
            assert status in (1, 2) or device & 0x40, answer
        elif attack in BROKEN:
            assert status != 0 or attack == "available-jump", answer
        assert vm.guest("blk.init 0").ok, f"after {attack}"
        assert vm.guest("blk.read 0 0 8").value("crc") == zlib.crc32(content[: 8 * SECTOR])
    assert disk.read_bytes() == content
    assert vm.qmp.command("query-status")["status"] == "running"
