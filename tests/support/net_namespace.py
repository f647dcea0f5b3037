"""A network namespace of a test's own, kept by a thread; descriptors opened in it stay in it."""

from __future__ import annotations

import ctypes
import fcntl
import queue
import socket
import struct
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from shared.tap import open_tap

T = TypeVar("T")

_CLONE_NEWNET = 0x40000000
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _SIOCSIFMTU, _IFF_UP = 0x8913, 0x8914, 0x8922, 1
_SIOCSIFADDR, _SIOCSIFNETMASK = 0x8916, 0x891C
_ETH_P_ALL = 3
_SOL_PACKET, _PACKET_VNET_HDR, _PACKET_IGNORE_OUTGOING = 263, 15, 23


def _flags(control: socket.socket, name: str) -> int:
    request = fcntl.ioctl(control, _SIOCGIFFLAGS, struct.pack("16sh14x", name.encode(), 0))
    return int(struct.unpack("16xh14x", request)[0])


class NetNamespace:
    """`run(function)` runs it inside; `close()` lets go of the namespace."""

    def __init__(self) -> None:
        self._jobs: queue.Queue[tuple[Callable[[], Any], queue.Queue[Any]] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()
        self.run(self._enter)

    def _enter(self) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.unshare(_CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "unshare(CLONE_NEWNET)")
        # Nothing but the test's frames on its interfaces.
        ipv6 = Path("/proc/sys/net/ipv6/conf/default/disable_ipv6")
        if ipv6.exists():
            ipv6.write_text("1")

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            function, answer = job
            try:
                answer.put((function(), None))
            except BaseException as error:
                answer.put((None, error))

    def run(self, function: Callable[[], T]) -> T:
        answer: queue.Queue[Any] = queue.Queue()
        self._jobs.put((function, answer))
        result, error = answer.get()
        if error is not None:
            raise error
        return result  # type: ignore[no-any-return]

    def tap(self, name: str = "tap0", queues: int = 1, up: bool = True) -> list[int]:
        """Descriptors of a new tap, up."""
        fds = self.run(lambda: open_tap(name, queues))
        if up:
            self.up(name)
        return fds

    def command(self, line: str) -> str:
        """Run a program inside, `ip` above all; its standard output."""
        done = self.run(lambda: subprocess.run(line.split(), capture_output=True, text=True,
                                               timeout=30, check=False))
        assert done.returncode == 0, f"{line}: {done.stderr}"
        return done.stdout

    def persistent_tap(self, name: str = "tap0", queues: int = 1, up: bool = True) -> None:
        """A tap that stays when nobody has it open, as managers make them."""
        self.command(f"ip tuntap add {name} mode tap vnet_hdr"
                     f"{' multi_queue' if queues > 1 else ''}")
        if up:
            self.up(name)

    def open(self, name: str) -> int:
        """A descriptor of a tap that exists: refused while somebody else has it."""
        return self.run(lambda: open_tap(name))[0]

    def up(self, name: str, mtu: int = 1500) -> None:
        def action() -> None:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
                flags = _flags(control, name)
                fcntl.ioctl(control, _SIOCSIFMTU, struct.pack("16si12x", name.encode(), mtu))
                fcntl.ioctl(control, _SIOCSIFFLAGS,
                            struct.pack("16sh14x", name.encode(), flags | _IFF_UP))

        self.run(action)

    def is_up(self, name: str) -> bool:
        """Whether there is such an interface, and it is up."""
        def action() -> bool:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
                try:
                    return bool(_flags(control, name) & _IFF_UP)
                except OSError:
                    return False

        return self.run(action)

    def address(self, name: str, address: str) -> None:
        """Give the interface an IPv4 address (/24)."""
        def action() -> None:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
                for request, text in ((_SIOCSIFADDR, address), (_SIOCSIFNETMASK, "255.255.255.0")):
                    fcntl.ioctl(control, request, struct.pack(
                        "16sHH4s8x", name.encode(), socket.AF_INET, 0, socket.inet_aton(text)))

        self.run(action)

    def listen(self, port: int) -> socket.socket:
        """A TCP socket that listens inside."""
        server = self.run(lambda: socket.create_server(("0.0.0.0", port)))
        server.settimeout(60)
        return server

    def packet_socket(self, name: str = "tap0", headers: bool = False) -> socket.socket:
        """A raw socket on the host's side of the tap; `headers`: with a virtio_net_hdr (10)."""
        def action() -> socket.socket:
            peer = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_ALL))
            if headers:
                peer.setsockopt(_SOL_PACKET, _PACKET_VNET_HDR, 1)
            peer.setsockopt(_SOL_PACKET, _PACKET_IGNORE_OUTGOING, 1)
            peer.bind((name, 0))
            peer.settimeout(10)
            return peer

        return self.run(action)

    def close(self) -> None:
        self._jobs.put(None)
        self._thread.join(10)
