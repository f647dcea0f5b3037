"""A front end that speaks to our back end message by message, for tests of the back end."""

from __future__ import annotations

import os
import socket
import time

from shared.memory_regions import MemoryRegion
from shared.vhost_user import messages as m
from shared.vhost_user.backend import Backend
from shared.vhost_user.connection import Connection
from tests.support.fake_backend import FakeBackendDevice

SIZE = 1 << 20
USER = 0x7F00_0000_0000
REGION = MemoryRegion(0x10_0000, SIZE, USER, 0)
DESC, AVAIL, USED = USER, USER + 0x1000, USER + 0x2000


class Session:
    """A front end that speaks message by message; the back end answers in the same thread."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        self.device = FakeBackendDevice()
        self.refusals: list[str] = []
        self.backend = Backend(self.device, theirs.detach(), self.refusals.append)
        self.front = Connection(ours.detach(), "back end")
        self.fds: list[int] = []
        self.ram = self.memfd(SIZE)

    def memfd(self, size: int) -> int:
        fd = os.memfd_create("ram")
        os.ftruncate(fd, size)
        self.fds.append(fd)
        return fd

    def eventfd(self) -> int:
        fd = os.eventfd(0)
        self.fds.append(fd)
        return fd

    def tell(self, request: int, payload: bytes = b"", fds: tuple[int, ...] = (),
             need_reply: bool = False) -> None:
        self.front.send(request, payload, fds, need_reply=need_reply)
        self.backend.handle_one(time.monotonic() + 5)

    def ask(self, request: int, payload: bytes = b"") -> bytes:
        self.tell(request, payload)
        reply = self.front.recv(replies=True, deadline=time.monotonic() + 5)
        assert reply.request == request
        self.fds += reply.take_fds()
        return reply.payload

    def acked(self, request: int, payload: bytes = b"", fds: tuple[int, ...] = ()) -> int:
        """Send with NEED_REPLY, return the acknowledgement."""
        self.tell(request, payload, fds, need_reply=True)
        reply = self.front.recv(replies=True, deadline=time.monotonic() + 5)
        assert (reply.request, reply.fds) == (request, [])
        return m.decode_u64(reply.payload)

    def done(self, request: int, payload: bytes = b"", fds: tuple[int, ...] = ()) -> None:
        assert self.acked(request, payload, fds) == 0, self.refusals

    def negotiate(self, protocol: int | None = None) -> None:
        offered = m.decode_u64(self.ask(m.GET_PROTOCOL_FEATURES))
        self.tell(m.SET_PROTOCOL_FEATURES, m.encode_u64(offered if protocol is None else protocol))
        self.tell(m.SET_OWNER)

    def configure(self, index: int = 0, size: int = 64) -> None:
        """Features, memory and everything of a ring but its kick."""
        self.done(m.SET_FEATURES, m.encode_u64(1 << 32 | m.F_PROTOCOL_FEATURES))
        self.done(m.SET_MEM_TABLE, m.encode_memory_table([REGION]), (self.ram,))
        self.done(m.SET_VRING_NUM, m.encode_vring_state(index, size))
        self.done(m.SET_VRING_BASE, m.encode_vring_state(index, 5))
        self.done(m.SET_VRING_ADDR, m.encode_vring_addr(index, 0, DESC, USED, AVAIL))
        self.done(m.SET_VRING_CALL, m.encode_u64(index), (self.eventfd(),))

    def start(self, index: int = 0) -> None:
        self.configure(index)
        self.done(m.SET_VRING_KICK, m.encode_u64(index), (self.eventfd(),))
        self.done(m.SET_VRING_ENABLE, m.encode_vring_state(index, 1))

    def close(self) -> None:
        self.front.close()
        self.backend.close()
        for fd in self.fds:
            os.close(fd)
