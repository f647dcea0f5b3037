"""vhost-user back ends that misbehave, behind a listening socket: for tests of the whole VM.

    with HostileBackend(path, silent) as backend: ...

A behaviour is called with the connected socket, on a thread of its own.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

HEADER = struct.Struct("<III")
REPLY = 0x1 | 0x4  # version 1, reply
GET_FEATURES = 1


class HostileBackend:
    """Listens at once; serves connections one after the other until closed."""

    def __init__(self, path: Path, behaviour: Callable[[socket.socket, threading.Event], None],
                 ) -> None:
        self.over = threading.Event()
        self.seen = threading.Event()  # the VM has connected
        self._behaviour = behaviour
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(os.fspath(path))
        self._listener.listen(4)
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                peer, _ = self._listener.accept()
            except OSError:
                return
            self.seen.set()
            with peer, contextlib.suppress(OSError, ValueError, struct.error):
                self._behaviour(peer, self.over)

    def __enter__(self) -> HostileBackend:
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(10)
        assert not self._thread.is_alive()


def silent(peer: socket.socket, over: threading.Event) -> None:
    """Reads nothing, says nothing."""
    over.wait()


def deaf_after_features(peer: socket.socket, over: threading.Event) -> None:
    """Answers the first question and then nothing more."""
    _answer_features(peer)
    over.wait()


def garbage(peer: socket.socket, over: threading.Event) -> None:
    """Answers with random bytes."""
    peer.recv(4096)
    peer.sendall(os.urandom(4096))
    over.wait()


def huge_reply(peer: socket.socket, over: threading.Event) -> None:
    """Promises four gigabytes of payload."""
    peer.recv(4096)
    peer.sendall(HEADER.pack(GET_FEATURES, REPLY, 0xFFFFFFFF))
    over.wait()


def hang_up(peer: socket.socket, over: threading.Event) -> None:
    """Closes at the first message."""
    peer.recv(1)


def flood(peer: socket.socket, over: threading.Event) -> None:
    """Answers features for ever, unasked."""
    peer.settimeout(0.2)
    while not over.is_set():
        with contextlib.suppress(TimeoutError):
            peer.sendall(HEADER.pack(GET_FEATURES, REPLY, 8) + bytes(8))


def dribble(peer: socket.socket, over: threading.Event) -> None:
    """Sends a right answer, one byte a second."""
    peer.recv(12)
    for byte in HEADER.pack(GET_FEATURES, REPLY, 8) + struct.pack("<Q", 1 << 30 | 1 << 32):
        if over.wait(1.0):
            return
        peer.sendall(bytes([byte]))
    over.wait()


def asks_for_a_window(peer: socket.socket, over: threading.Event) -> None:
    """Wants files mapped into a DAX window that nobody offered, on the only socket it has."""
    _answer_features(peer)
    request, need_reply = 6, 0x1 | 0x8  # FS_MAP, as virtiofsd's unmerged patches had it
    peer.sendall(HEADER.pack(request, need_reply, 256) + bytes(256))
    over.wait()


def _answer_features(peer: socket.socket) -> None:
    peer.recv(12)
    peer.sendall(HEADER.pack(GET_FEATURES, REPLY, 8) + struct.pack("<Q", 1 << 30 | 1 << 32))
