"""Kata Containers' whole command line under Linux without ACPI: every device of a sandbox is
found by `virtio_mmio.device=` and used; then the sandbox ends as Kata ends it."""

from __future__ import annotations

import signal
import sys
from typing import TYPE_CHECKING, Any

import pytest

from tests.lab import images
from tests.lab.lab import ROOT
from tests.lab.small_kernel import small_kernel
from tests.lab.test_vsock_and_folders import shell
from tests.support.capabilities import VIRTIOFSD, require

if TYPE_CHECKING:
    from collections.abc import Callable

    Play = Callable[..., dict[str, Any]]

pytestmark = pytest.mark.lab

SECONDS = 60
CID = 4242
FOLDER = "/tmp/sandbox"
HOST = f"cd {ROOT} && PYTHONDONTWRITEBYTECODE=1 {sys.executable} -m tests.lab.vsock_host"
LINE = ("reboot=k panic=1 net.ifnames=0 pci=off iommu=off acpi=off console=ttyS0 quiet "
        "mitigations=off lpj=4000000")

# Its console's reader: connects as soon as it can.
LISTEN = """
import socket, sys, time
while True:
    peer = socket.socket(socket.AF_UNIX)
    try:
        peer.connect(sys.argv[1])
        break
    except OSError:
        time.sleep(0.05)
while data := peer.recv(4096):
    print(data.decode(), end="", flush=True)
"""

STEPS: list[list[Any]] = [
    ["output", "L2 shell", SECONDS],
    *shell("cat /sys/class/net/eth0/address /sys/block/vd?/size | tr '\\n' +", "found-1"),
    *shell("mount -o ro /dev/vda /mnt && cat /mnt/message && umount /mnt", "rootfs-2"),
    *shell("dd if=/dev/hwrng bs=64 count=1 2>/dev/null | wc -c", "rng-3"),
    *shell("echo from the guest >/dev/hvc0", "console-4"),
    *shell("mount -t virtiofs kataShared /mnt && cat /mnt/hello", "folder-5"),
    ["run", "busybox ip addr add 10.9.0.1/24 dev tapkata; busybox ip link set tapkata up"],
    *shell("ip addr add 10.9.0.2/24 dev eth0 && ip link set eth0 up && "
           "ping -c 2 -W 20 10.9.0.1 | grep received", "net-6"),
    *shell("vsock send 2 2000 100000", "vsock-7"),
    ["run", f"cat {FOLDER}/heard"],
    ["qmp", "query-workers"],
    ["kill"],
    ["run", f"for n in $(seq 100); do ls {FOLDER}/*.socket 2>/dev/null || break; sleep 0.1; done; "
            "ls /dev/shm"],
]


def test_a_sandbox_with_all_its_devices(play: Play) -> None:
    require("virtiofsd")
    report = play({
        "before": [f"mkdir -p {FOLDER}/shared && echo shared >{FOLDER}/shared/hello && "
                   f"exec {VIRTIOFSD} --socket-path=/tmp/fs.sock -o source={FOLDER}/shared",
                   f"{HOST} echo 2000",
                   f"mkdir -p {FOLDER} && exec {sys.executable} -c '{LISTEN}' "
                   f"{FOLDER}/console.socket >{FOLDER}/heard"],
        "await": ["/tmp/fs.sock"],
        "wrap": 'exec "$@" 3<>/dev/vhost-vsock',
        "arguments": [
            "-name", "sandbox-1", "-uuid", "8f3d1c52-6a4e-4b6f-9a3f-0d9c5f1b2a3c", "-smp", "1",
            "-m", "256", "-kernel", str(small_kernel()["vmlinux"]), "-D", f"{FOLDER}/log",
            "-disable-seccomp", "-machine", "type=microvm,dump-guest-core=off,mem-share=on",
            "-initrd", str(images.vsock_initramfs()),
            "-object", "rng-random,id=objrng0,filename=/dev/urandom",
            "-device", "virtio-rng-device,rng=objrng0,id=virtio-rng0",
            "-device", "virtio-serial-device,id=virtio-serial0",
            "-chardev", f"socket,id=charconsole0,path={FOLDER}/console.socket,server,nowait",
            "-device", "virtconsole,chardev=charconsole0,id=virtio-console0,nr=0",
            "-drive", "id=rootfs,file=/mnt/disk,readonly=on,direct=off",
            "-device", "virtio-blk-device,drive=rootfs,id=virtio-blk0",
            "-device", f"vhost-vsock-device,id=vsock-id,guest-cid={CID},vhostfd=3",
            "-netdev", "tap,id=tapkata,ifname=tapkata",
            "-device", "virtio-net-device,netdev=tapkata,id=tapkata,mac=02:42:ac:11:00:02",
            "-chardev", "socket,id=virtio_fs,path=/tmp/fs.sock,server,nowait",
            "-device", "vhost-user-fs-device,chardev=virtio_fs,tag=kataShared,id=virtio-fs0"],
        "append": LINE, "steps": STEPS}, files={"disk": images.root_disk()}, timeout=240)
    console, replies = report["console"], report["replies"]
    size = images.root_disk().stat().st_size // 512
    assert f"02:42:ac:11:00:02+{size}+0+0+0+0+0+" in console
    assert images.MESSAGE.strip() in console
    assert "\n64\r" in console
    assert "shared\r\n" in console
    assert "2 packets received" in console
    assert "sent 100000 same" in console
    heard, workers, left = replies[-3:]
    assert "from the guest" in heard
    assert sorted(w["kind"] for w in workers) == ["blk", "console", "net", "rng"]
    assert all(w["state"] == "running" and w["restarts"] == 0 for w in workers)
    assert report["exit"] == -signal.SIGKILL
    assert ".socket" not in left and "stratovirt" not in left
