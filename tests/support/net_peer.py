"""The other side of a tap: frames with numbers, to and from the bare-metal guest, verified.

Their content is what tests/guest/net_user.c builds and checks.
"""

from __future__ import annotations

import socket
import struct
import threading
from typing import TYPE_CHECKING

from tests.support.test_vm import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tests.support.net_namespace import NetNamespace

PEER = bytes.fromhex("525400ddeeff")
ETHERTYPE = b"\x88\xb5"  # IEEE: for experiments
SHORTEST, LONGEST = 60, 1514
_FIXED = struct.Struct("<HQ")  # length of the whole frame, number
_AT = 14
_HEAD = _AT + _FIXED.size
_MASK = (1 << 64) - 1
_SO_RCVBUFFORCE = 33
_WORDS = 8192  # of the longest frame
_INDEX = int.from_bytes(b"".join(
    ((index + 1) * 0xBF58476D1CE4E5B9 & _MASK).to_bytes(8, "little")
    for index in range(_WORDS)), "little")


def frame(number: int, length: int, to: bytes, source: bytes = PEER) -> bytes:
    """Frame `number` of a test, `length` bytes."""
    rest = length - _HEAD
    word = ((number + 1) * 0x9E3779B97F4A7C15 & _MASK).to_bytes(8, "little")
    bits = int.from_bytes((word * (rest // 8 + 1))[:rest], "little")
    index = _INDEX & (1 << 8 * rest) - 1
    return (to + source + ETHERTYPE + _FIXED.pack(length, number)
            + (bits ^ index).to_bytes(rest, "little"))


def mixed_length(number: int) -> int:
    """The length of frame `number` where the guest was asked for mixed ones."""
    if number % 4 < 2:
        return SHORTEST if number % 4 else LONGEST
    return SHORTEST + number * 7919 % 1455


class Peer:
    """Receives the guest's frames on a thread, ticks them off, and sends them back if `echo`.

    numbers: of the frames that came, in their order; wrong: those whose content isn't right, the
    first few; macs: who sent them.
    """

    def __init__(self, namespace: NetNamespace, name: str = "tap0", echo: bool = True) -> None:
        self.numbers: list[int] = []
        self.wrong: list[bytes] = []
        self.macs: set[bytes] = set()
        self.echo = echo
        self.socket = namespace.packet_socket(name)
        self.socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 64 << 20)
        self.socket.settimeout(0.1)
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def _work(self) -> None:
        while not self._end.is_set():
            try:
                data = self.socket.recv(70000)
            except TimeoutError:
                continue
            except OSError:
                continue  # the interface is down, or gone
            if data[12:14] == ETHERTYPE and len(data) >= SHORTEST:
                self._take(data)

    def _take(self, data: bytes) -> None:
        length, number = _FIXED.unpack_from(data, _AT)
        source = data[6:12]
        if length != len(data) or data[_HEAD:] != frame(number, length, bytes(6))[_HEAD:]:
            self.wrong.append(data)
            return
        self.numbers.append(number)
        self.macs.add(source)
        if self.echo:
            self.send_raw(source + PEER + data[12:])

    def send_raw(self, data: bytes) -> None:
        """One frame towards the guest."""
        try:
            self.socket.send(data)
        except OSError:
            pass  # the interface is down, or its queue is full: a frame is lost

    def send(self, to: bytes, numbers: Iterable[int], length: int = 0) -> None:
        """Frames towards the guest; length 0: mixed."""
        for number in numbers:
            self.send_raw(frame(number, length or mixed_length(number), to))

    def wait(self, count: int, timeout: float = 10) -> None:
        """Until so many different frames have come."""
        wait_until(lambda: len(set(self.numbers)) >= count, f"{count} frames on the tap", timeout)

    def clear(self) -> None:
        """Forget what came."""
        self.numbers, self.wrong, self.macs = [], [], set()

    def close(self) -> None:
        """End the thread."""
        self._end.set()
        self._thread.join(10)
        self.socket.close()

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
