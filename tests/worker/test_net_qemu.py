"""QEMU and an unmodified Linux driver use our net worker: pings, and streams both ways."""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.blk_worker import ROOT
from tests.support.capabilities import require
from tests.support.net_namespace import NetNamespace
from tests.support.test_vm import wait_until

pytestmark = pytest.mark.lab

SIZE = 8 << 20
# QEMU 7.2 without KVM crashes in msix_set_vector_notifiers() when a vhost device uses MSI-X.
NO_MSIX = "vectors=0"
COMMANDS = (
    "ifconfig eth0 10.0.0.2 up", "ping -c 3 10.0.0.1",
    "dd if=/dev/zero bs=64k count=128 | nc 10.0.0.1 5001",
    "nc 10.0.0.1 5002 </dev/null | md5sum", "cat /proc/net/dev", "poweroff -f")


@pytest.fixture
def namespace() -> Iterator[NetNamespace]:
    require("net_admin")
    namespace = NetNamespace()
    yield namespace
    namespace.close()


class Streams:
    """What the guest sends to port 5001, and what it gets from 5002."""

    def __init__(self, namespace: NetNamespace) -> None:
        self.received = b""
        self.sent = os.urandom(SIZE)
        self._threads = [threading.Thread(target=action, args=(namespace.listen(port),),
                                          daemon=True)
                         for port, action in ((5001, self._receive), (5002, self._send))]
        for thread in self._threads:
            thread.start()

    def _receive(self, server: socket.socket) -> None:
        with server, server.accept()[0] as peer:
            while part := peer.recv(1 << 16):
                self.received += part

    def _send(self, server: socket.socket) -> None:
        with server, server.accept()[0] as peer:
            peer.sendall(self.sent)

    def join(self) -> None:
        for thread in self._threads:
            thread.join(60)


@pytest.mark.parametrize("mergeable", ["on", "off"])
def test_linux_in_qemu(tmp_path: Path, namespace: NetNamespace, mergeable: str) -> None:
    require("qemu")
    require("lab")
    from tests.lab import images
    from tests.lab.small_kernel import small_kernel

    taps = namespace.tap()
    namespace.address("tap0", "10.0.0.1")
    streams = Streams(namespace)
    path = tmp_path / "net.sock"
    worker = subprocess.Popen([sys.executable, "-m", "workers.net", f"--socket-path={path}",
                               f"--tap-fds={taps[0]}"], cwd=ROOT, pass_fds=taps)
    try:
        wait_until(path.exists, "the worker's socket")
        result = subprocess.run([
            str(shutil.which("qemu-system-x86_64")), "-nodefaults", "-no-user-config",
            "-M", "q35", "-accel", "tcg", "-cpu", "max", "-m", "256",
            "-object", "memory-backend-memfd,id=ram,size=256M,share=on",
            "-machine", "memory-backend=ram", "-display", "none", "-no-reboot",
            "-chardev", f"socket,id=nic,path={path}",
            "-netdev", "vhost-user,id=net,chardev=nic",
            "-device", f"virtio-net-pci,netdev=net,mrg_rxbuf={mergeable},{NO_MSIX}",
            "-kernel", str(small_kernel()["bzImage"]), "-initrd", str(images.plain_initramfs()),
            "-append", images.command_line(*COMMANDS), "-serial", "stdio",
        ], timeout=90, check=False, capture_output=True, text=True)
        console = result.stdout + result.stderr
        assert "3 packets transmitted, 3 packets received, 0% packet loss" in console, console
        assert worker.wait(10) == 0
    finally:
        worker.kill()
        worker.wait()
        for fd in taps:
            os.close(fd)
    streams.join()
    assert streams.received == bytes(SIZE)
    assert hashlib.md5(streams.sent).hexdigest() in console
