"""block_resize and BLOCK_IO_ERROR, from QMP to the guest and back."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.capabilities import require
from tests.support.guest import SECTOR
from tests.support.qmp import QmpError
from tests.support.test_vm import TestVm, wait_until

Start = Callable[..., TestVm]

pytestmark = pytest.mark.vm

MIB = 1 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(MIB))
    return path


def sectors(vm: TestVm) -> int:
    return vm.guest("blk.info 0").value("sectors")


def test_the_guest_sees_and_uses_a_larger_disk(start_vm: Start, disk: Path) -> None:
    vm = start_vm(disks=(disk,))
    assert sectors(vm) == MIB // SECTOR
    for arguments, size in (({"node_name": "d0"}, 2 * MIB), ({"device": "blk0"}, 3 * MIB),
                            ({"device": "d0"}, 4 * MIB)):
        assert vm.qmp.command("block_resize", size=size, **arguments) == {}
        entry = vm.qmp.command("query-block")[0]
        assert entry["inserted"]["image"]["virtual-size"] == size
        assert os.stat(disk).st_size == size
        wait_until(lambda size=size: sectors(vm) == size // SECTOR, "the guest sees the new size")
    assert vm.guest(f"blk.write 0 {3 * MIB // SECTOR} 64 5").ok
    assert vm.guest(f"blk.verify 0 {3 * MIB // SECTOR} 64 5").ok


def test_a_paused_vm_s_disk_can_grow(start_vm: Start, disk: Path) -> None:
    vm = start_vm(disks=(disk,))
    vm.qmp.command("stop")
    vm.qmp.command("block_resize", size=2 * MIB, node_name="d0")
    vm.qmp.command("cont")
    wait_until(lambda: sectors(vm) == 2 * MIB // SECTOR, "the guest sees the new size")


@pytest.mark.parametrize(("arguments", "error", "text"), [
    ({"size": 2 * MIB}, "GenericError", "'device' or 'node-name'"),
    ({"size": 2 * MIB, "device": "a", "node_name": "b"}, "GenericError", "'device' or"),
    ({"size": 2 * MIB, "device": "nobody"}, "DeviceNotFound", "nobody"),
    ({"size": 2 * MIB, "node_name": "nobody"}, "DeviceNotFound", "nobody"),
    ({"size": -1, "node_name": "d0"}, "GenericError", "'size'"),
    ({"size": 1 << 62, "node_name": "d0"}, "GenericError", "'size'"),
    ({"size": MIB + 1, "node_name": "d0"}, "GenericError", "multiple of 512"),
    ({"size": MIB - 512, "node_name": "d0"}, "GenericError", "smaller"),
    ({"size": (1 << 62) - 512, "node_name": "d0"}, "GenericError", "Can't grow"),
])
def test_what_can_t_be_is_refused(start_vm: Start, disk: Path, arguments: dict[str, object],
                                  error: str, text: str) -> None:
    vm = start_vm(disks=(disk,))
    with pytest.raises(QmpError, match=text) as caught:
        vm.qmp.command("block_resize", **arguments)
    assert caught.value.error["class"] == error
    assert os.stat(disk).st_size == MIB
    assert sectors(vm) == MIB // SECTOR


def test_a_read_only_disk_does_not_grow(start_vm: Start, disk: Path) -> None:
    vm = start_vm(disks=(f"{disk},readonly=on",))
    with pytest.raises(QmpError, match="read-only"):
        vm.qmp.command("block_resize", size=2 * MIB, node_name="d0")


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    require("root")
    folder = tmp_path / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(folder)], check=True)
    with (folder / "disk.img").open("wb") as file:
        file.truncate(MIB)
    yield folder / "disk.img"
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_host_disk_is_an_io_error_and_an_event(start_vm: Start, full_disk: Path,
                                                      disk: Path) -> None:
    vm = start_vm(disks=(f"{full_disk},direct=off", f"{disk},direct=off"))
    assert vm.qmp.command("query-status")["running"]
    assert vm.guest("blk.write 0 0 64 3").ok
    assert not vm.guest("blk.write 0 64 1984 4").ok
    assert vm.qmp.wait_event("BLOCK_IO_ERROR")["data"] == {
        "device": "blk0", "node-name": "d0", "operation": "write", "action": "report",
        "nospace": True, "reason": "No space left on device"}
    # The VM goes on, and so do this disk and its neighbour.
    assert vm.qmp.command("query-status")["status"] == "running"
    assert vm.guest("blk.verify 0 0 64 3").ok
    assert vm.guest("blk.write 1 0 2048 3").ok
    assert vm.guest("blk.verify 1 0 2048 3").ok


def test_an_image_that_shrinks_is_an_io_error_and_an_event(start_vm: Start, disk: Path) -> None:
    vm = start_vm(disks=(f"{disk},direct=off",))
    assert vm.qmp.command("query-status")["running"]  # connected: events are for who listens
    assert sectors(vm) == MIB // SECTOR  # the worker has measured it
    os.truncate(disk, MIB // 2)
    assert not vm.guest("blk.read 0 1500 8").ok
    data = vm.qmp.wait_event("BLOCK_IO_ERROR")["data"]
    assert (data["operation"], data["reason"]) == ("read", "the image has become shorter")
    assert vm.guest("blk.read 0 0 8").ok
