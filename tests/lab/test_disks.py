"""What Linux makes of a disk that grows and of one whose host has no space left."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.lab import images
from tests.lab.small_kernel import small_kernel

if TYPE_CHECKING:
    from collections.abc import Callable

    Play = Callable[..., dict[str, Any]]

pytestmark = pytest.mark.lab

MIB = 1 << 20
SECONDS = 60


def shell(line: str, done: str) -> list[list[Any]]:
    """Have the guest's shell run a line; its last word is put together, unlike the echo."""
    return [["send", f"{line}; echo {done[:2]}''{done[2:]}\n"], ["output", done, SECONDS]]


def test_a_disk_grows_and_a_full_host_is_an_error(play: Play, tmp_path: Path) -> None:
    second = tmp_path / "second"
    second.write_bytes(bytes(MIB))
    steps: list[list[Any]] = [
        ["output", "L2 shell", SECONDS],
        *shell("cat /sys/block/vdb/size", "size-1"),
        ["qmp", "block_resize", {"node-name": "second", "size": 2 * MIB}],
        *shell("cat /sys/block/vdb/size; dd if=/dev/vda of=/dev/vdb bs=1M seek=1 count=1 "
               "conv=fsync 2>&1", "grown-2"),
        # A tmpfs with room for a quarter of what the disk promises.
        ["run", "mkdir -p /tmp/full && mount -t tmpfs -o size=256k x /tmp/full && "
                f"truncate -s {MIB} /tmp/full/disk"],
        ["qmp", "blockdev-add", {"node-name": "third", "file": {
            "driver": "file", "filename": "/tmp/full/disk"}, "cache": {"direct": False}}],
        ["qmp", "device_add", {"id": "third", "driver": "virtio-blk-mmio", "addr": "0x2"}],
        *shell("dd if=/dev/vda of=/dev/vdc bs=64k count=16 conv=fsync; echo status $?", "full-3"),
        *shell("dd if=/dev/vdb of=/dev/null bs=1M", "neighbour-4"),
        ["qmp", "query-status"], ["qmp", "query-blockstats"],
        ["send", "poweroff -f\n"], ["event", "SHUTDOWN", SECONDS], ["exit", 20],
    ]
    report = play({
        "arguments": ["-machine", "microvm", "-m", "256", "-kernel", str(small_kernel()["vmlinux"]),
                      "-initrd", str(images.plain_initramfs()),
                      "-drive", "id=rootfs,file=/mnt/disk,direct=off",
                      "-device", "virtio-blk-device,drive=rootfs,id=blk0",
                      "-drive", "id=second,file=/mnt/second,direct=off",
                      "-device", "virtio-blk-device,drive=second,id=blk1"],
        "append": images.COMMAND_LINE, "steps": steps,
    }, files={"disk": images.root_disk(), "second": second}, timeout=240)
    console = report["console"]
    assert "\n2048" in console and "\n4096" in console, console
    assert report["files"]["second"][MIB:] == images.root_disk().read_bytes()[:MIB]
    assert "dd: /dev/vdc: Input/output error" in console
    errors = [event["data"] for event in report["events"] if event["event"] == "BLOCK_IO_ERROR"]
    assert errors
    assert errors[0]["device"] == "third"
    assert errors[0]["node-name"] == "third"
    assert errors[0]["nospace"] is True
    assert {"running": True, "singlestep": False, "status": "running"} in report["replies"]
    assert report["exit"] == 0
