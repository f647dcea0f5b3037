"""The host's side of AF_VSOCK in the lab's L1.

    python -m tests.lab.vsock_host send CID PORT CLIENTS SIZE [GO]  to an echo in the guest
    python -m tests.lab.vsock_host echo PORT                        for the guest to send to
    python -m tests.lab.vsock_host start KERNEL CID                 a VM with this address

`send` prints "same" for each client whose bytes came back.  With GO it makes the file GO.half when
half is there and back, and sends the rest once the file GO exists.  `start` ends the VM, if it
doesn't refuse, and prints its exit status and errors.
"""

from __future__ import annotations

import os
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path

from tests.support.test_vm import TestVm, wait_until

LIMIT = 60.0


def main(mode: str, *arguments: str) -> None:
    """Run one mode."""
    if mode == "send":
        cid, port, clients, size = map(int, arguments[:4])
        go = arguments[4] if len(arguments) > 4 else ""
        threads = [threading.Thread(target=send, args=(cid, port, size, number, go))
                   for number in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    elif mode == "echo":
        echo(int(arguments[0]))
    else:
        start(*arguments)


def send(cid: int, port: int, size: int, number: int, go: str) -> None:
    """One client: `size` bytes there and back."""
    data = os.urandom(size)
    with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as peer:
        peer.settimeout(LIMIT)
        peer.connect((cid, port))
        half = size // 2 if go else size
        back = exchange(peer, data[:half])
        if go:
            with open(f"{go}.half", "w"):
                pass
            deadline = time.monotonic() + LIMIT
            while not os.path.exists(go) and time.monotonic() < deadline:
                time.sleep(0.01)
            back += exchange(peer, data[half:])
        peer.shutdown(socket.SHUT_WR)
        assert peer.recv(1) == b""
    print(f"client {number}:", "same" if back == data else f"{len(back)} other bytes", flush=True)


def exchange(peer: socket.socket, data: bytes) -> bytes:
    """Send `data` while as many bytes come back."""
    writer = threading.Thread(target=peer.sendall, args=(data,))
    writer.start()
    back = bytearray()
    while len(back) < len(data):
        part = peer.recv(1 << 16)
        assert part, f"{len(back)} of {len(data)} bytes came back"
        back += part
    writer.join()
    return bytes(back)


def echo(port: int) -> None:
    """Answer every connection with what comes, until killed."""
    server = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    server.bind((socket.VMADDR_CID_ANY, port))
    server.listen()

    def answer(peer: socket.socket) -> None:
        with peer:
            while data := peer.recv(1 << 16):
                peer.sendall(data)

    while True:
        peer, _ = server.accept()
        threading.Thread(target=answer, args=(peer,), daemon=True).start()


def start(kernel: str, cid: str) -> None:
    """A VM that opens /dev/vhost-vsock itself; it ends at once, if it doesn't refuse."""
    with TestVm(Path(tempfile.mkdtemp()), "-kernel", kernel, "-S",
                "-device", f"vhost-vsock-device,guest-cid={cid}") as vm:
        wait_until(lambda: vm.qmp_path.exists() or vm.process.poll() is not None, "QMP", LIMIT)
        if vm.process.poll() is None:
            vm.qmp.command("quit")
        print(f"exit {vm.wait()}: {vm.error_text()}")


if __name__ == "__main__":
    main(*sys.argv[1:])
