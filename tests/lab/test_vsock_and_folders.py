"""Sockets between host and guest, and a folder that virtiofsd shares, under Linux.

One VM for both, as Kata's sandboxes have them: the vsock is opened by who starts the VM, and the
chardev of the folder is said to be a server.
"""

from __future__ import annotations

import os
import re
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.lab import images
from tests.lab.lab import ROOT
from tests.lab.small_kernel import small_kernel
from tests.support.capabilities import VIRTIOFSD, require

if TYPE_CHECKING:
    from collections.abc import Callable

    Play = Callable[..., dict[str, Any]]

pytestmark = pytest.mark.lab

SECONDS = 60
CID = 1234567
MIB = 1 << 20
SHARED = "/tmp/shared"
HOST = f"cd {ROOT} && PYTHONDONTWRITEBYTECODE=1 {sys.executable} -m tests.lab.vsock_host"


def shell(line: str, done: str, seconds: int = SECONDS) -> list[list[Any]]:
    """Have the guest's shell run a line; its last word is put together, unlike the echo."""
    return [["send", f"{line}; echo {done[:2]}''{done[2:]}\n"], ["output", done, seconds]]


def wait_for(path: str) -> list[list[Any]]:
    return [["run", f"for n in $(seq 600); do [ -e {path} ] && break; sleep 0.1; done; ls {path}"]]


FOLDER_BOTH_WAYS = [
    *shell("mount -t virtiofs kataShared /mnt && cat /mnt/hello && md5sum /mnt/big", "fs-read"),
    *shell("ls /mnt/many | wc -l; dd if=/dev/urandom of=/mnt/made bs=64k count=32 conv=fsync "
           "2>/dev/null; mkdir /mnt/folder; mv /mnt/made /mnt/folder/moved; rm /mnt/many/7; "
           "md5sum /mnt/folder/moved", "fs-written"),
    ["run", f"cd {SHARED} && md5sum folder/moved big; ls made many/7; echo host >>hello"],
    *shell("tail -n 1 /mnt/hello", "fs-again"),
]
SOCKETS_BOTH_WAYS = [
    *shell("vsock echo 1000 & vsock send 2 2000 3000000", "vsock-sent"),
    ["run", f"{HOST} send {CID} 1000 2 {MIB}"],
    # A connection that lasts over stop and cont.
    ["run", f"({HOST} send {CID} 1000 1 {MIB} /tmp/go) >/tmp/sent 2>&1 &"],
    *wait_for("/tmp/go.half"),
    ["qmp", "stop"],
    ["run", "touch /tmp/go; sleep 0.5; cat /tmp/sent"],  # time enough to come back, if it could
    ["qmp", "query-status"], ["qmp", "cont"],
    ["run", "for n in $(seq 600); do [ -s /tmp/sent ] && break; sleep 0.1; done; cat /tmp/sent"],
]


def test_sockets_and_a_folder(play: Play, tmp_path: Path) -> None:
    require("virtiofsd")
    kernel = str(small_kernel()["vmlinux"])
    big = tmp_path / "big"
    big.write_bytes(os.urandom(8 * MIB))
    report = play({
        "before": [f"mkdir -p {SHARED}/many && cd {SHARED} && cp /mnt/big . && echo shared >hello "
                   f"&& touch $(seq -f many/%g 300) && exec {VIRTIOFSD} --socket-path=/tmp/fs.sock "
                   f"-o source={SHARED} -o cache=auto",
                   f"{HOST} echo 2000"],
        "await": ["/tmp/fs.sock"],
        "wrap": 'exec "$@" 3<>/dev/vhost-vsock',
        "arguments": ["-machine", "microvm,mem-share=on", "-m", "256", "-kernel", kernel,
                      "-initrd", str(images.vsock_initramfs()),
                      "-device", f"vhost-vsock-device,id=vsock-id,guest-cid={CID},vhostfd=3",
                      "-chardev", "socket,id=virtio_fs,path=/tmp/fs.sock,server,nowait",
                      "-device", "vhost-user-fs-device,chardev=virtio_fs,tag=kataShared,id=fs0"],
        "append": images.COMMAND_LINE,
        "steps": [
            ["output", "L2 shell", SECONDS],
            *FOLDER_BOTH_WAYS, *SOCKETS_BOTH_WAYS,
            *shell("cat /mnt/hello", "fs-after-cont"),
            # From power-on once more: both go on with the same back ends.
            ["qmp", "system_reset"], ["output", "L2 shell", SECONDS],
            *shell("mount -t virtiofs kataShared /mnt && md5sum </mnt/folder/moved && "
                   "vsock send 2 2000 100000", "after-reset"),
            # virtiofsd's death costs its device alone.
            ["run", "kill $(pidof virtiofsd)"],
            *shell("until grep -q 4f /sys/bus/virtio/devices/*/status; do sleep 0.1; done; "
                   "vsock send 2 2000 200000", "fs-dead"),
            ["qmp", "stop"], ["qmp", "cont"], *shell("vsock send 2 2000 300000", "fs-dead-cont"),
            # The address is this VM's, and free as soon as it is gone.
            ["run", f"{HOST} start {kernel} {CID}"],
            ["kill"],
            ["run", f"{HOST} start {kernel} {CID}"],
            ["run", "busybox rmmod vhost_vsock && echo nothing uses it"],
        ]}, files={"big": big}, timeout=300)
    check_folder(report, images.md5(big))
    check_sockets(report)
    assert report["exit"] == -signal.SIGKILL
    assert [reply for reply in report["replies"] if isinstance(reply, dict)] == [
        {}, {"running": False, "singlestep": False, "status": "paused"}, {}, {}, {}, {}]
    assert [event["event"] for event in report["events"]] == ["STOP", "RESUME", "RESET", "STOP",
                                                              "RESUME"]
    taken, free = [reply for reply in report["replies"] if str(reply).startswith("exit")]
    assert "exit 1" in taken and f"another VM has the guest-cid {CID}" in taken
    assert free.startswith("exit 0")
    assert report["replies"][-1] == "nothing uses it\n"


def check_folder(report: dict[str, Any], big: str) -> None:
    console = report["console"]
    assert "shared\r\n" in console and f"{big}  /mnt/big" in console and "\n300\r" in console
    written = re.search(r"(\w{32})  /mnt/folder/moved", console)
    assert written
    seen = next(reply for reply in report["replies"] if "folder/moved" in str(reply))
    assert f"{written[1]}  folder/moved\n{big}  big\n" in seen
    assert "'made': No such file" in seen and "'many/7': No such file" in seen
    assert console.count("host\r\n") >= 2  # written by the host after the guest had read it
    assert f"{written[1]}  -" in console


def check_sockets(report: dict[str, Any]) -> None:
    console, replies = report["console"], report["replies"]
    for size in (3_000_000, 100_000, 200_000, 300_000):
        assert f"sent {size} same" in console
    assert any(sorted(str(reply).splitlines()) == ["client 0: same", "client 1: same"]
               for reply in replies)
    # Nothing arrived while the VM stood still, everything after.
    stopped = replies.index({"running": False, "singlestep": False, "status": "paused"})
    assert replies[stopped - 1] == ""
    assert replies[stopped + 2] == "client 0: same\n"
