"""Disks come and go under Linux: empty slots answer, a mounted disk may go at any time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.lab import images
from tests.lab.small_kernel import small_kernel

if TYPE_CHECKING:
    from collections.abc import Callable

    Play = Callable[..., dict[str, Any]]

pytestmark = pytest.mark.lab

ADD = {"node-name": "drive-0", "file": {"driver": "file", "filename": "/mnt/extra"},
       "cache": {"direct": False}, "read-only": False}
PLUG = {"id": "drive-0", "driver": "virtio-blk-mmio", "addr": "0x1"}
SECONDS = 60


def shell(line: str, done: str) -> list[list[Any]]:
    """Have the guest's shell run a line; its last word is put together, unlike the echo."""
    return [["send", f"{line}; echo {done[:2]}''{done[2:]}\n"], ["output", done, SECONDS]]


STEPS: list[list[Any]] = [
    ["output", "L2 shell", SECONDS],
    *shell("cat /sys/block/vd?/size | tr '\\n' +; cat /sys/block/vd?/serial", "sizes-1"),
    *shell("dd if=/dev/vdf of=/dev/null bs=512 count=1 2>&1", "empty-1"),
    ["qmp", "blockdev-add", ADD], ["qmp", "device_add", PLUG],
    *shell("cat /sys/block/vdb/size", "size-2"),
    *shell("mkdir -p /m; mount /dev/vdb /m; cat /m/message; echo kept >/m/kept; sync", "mount-3"),
    ["qmp", "device_del", {"id": "drive-0"}],
    *shell("cat /sys/block/vdb/size; echo lost >/m/lost; sync; dd if=/dev/zero of=/m/new bs=64k "
           "count=4 conv=fsync; umount -l /m", "gone-4"),
    ["qmp", "blockdev-add", ADD], ["qmp", "device_add", PLUG],
    *shell("md5sum /dev/vdb >/dev/null; cat /sys/block/vdb/size", "again-5"),
    ["qmp", "query-block"],
    ["send", "poweroff -f\n"], ["event", "SHUTDOWN", SECONDS], ["exit", 20],
]


def test_disks_come_and_go_under_linux(play: Play) -> None:
    report = play({
        "arguments": ["-machine", "microvm", "-m", "256", "-kernel", str(small_kernel()["vmlinux"]),
                      "-initrd", str(images.plain_initramfs()), "-drive",
                      "id=rootfs,file=/mnt/disk,direct=off", "-device",
                      "virtio-blk-device,drive=rootfs,id=virtio-blk0"],
        "append": images.COMMAND_LINE, "steps": STEPS,
    }, files={"disk": images.root_disk(), "extra": images.root_disk()}, timeout=240)
    console = report["console"]
    size = images.root_disk().stat().st_size // 512
    assert f"{size}+0+0+0+0+0+" in console          # vda, and five empty disks
    assert "EXT4-fs error (device vdb)" in console   # errors, and no hang
    assert console.count(f"\n{size}\r\n") == 2, console  # plugged twice
    assert images.MESSAGE.strip() in console
    deleted = [event for event in report["events"] if event["event"] == "DEVICE_DELETED"]
    assert [event["data"]["device"] for event in deleted] == ["drive-0"]
    # What was acknowledged before the disk went is on it.
    assert b"kept\n" in report["files"]["extra"]
    assert report["exit"] == 0 and report["left"] == []
