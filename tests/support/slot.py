"""A blk worker's service in this process, its control channel and a front end before it."""

from __future__ import annotations

import os
import socket
import threading
import time
from pathlib import Path

from shared.control.channel import Channel, Message, pair
from shared.memory_regions import MemoryRegion
from shared.vhost_user import messages as m
from shared.vhost_user.errors import VhostUserError
from shared.vhost_user.frontend import BackendChannel, Frontend
from tests.support.blk_worker import USER_BASE
from tests.support.guest_ring import BlkRequest, GuestMemory, GuestRing, readable
from workers.blk.service import Service
from workers.nursery import Reporter


class Slot:
    """A worker's service on a thread (with the option `slot`), a front end before it."""

    def __init__(self, path: Path, direct: bool = False, page: int | None = None,
                 started: bool = True, **options: object) -> None:
        readonly = options.get("readonly", False)
        flags = os.O_RDONLY if readonly else os.O_RDWR
        self.image = os.open(path, flags | (os.O_DIRECT if direct else 0))
        self.service = Service(self.image, {"slot": True, **options}, page, print)
        ours, theirs = socket.socketpair()
        control, worker = pair()
        self.control = Channel(control, blocking=False)
        self._reporter = Reporter(worker)
        self.thread = threading.Thread(target=self.service.serve,
                                       args=(theirs.detach(), self._reporter))
        self.thread.start()
        self.frontend = Frontend(ours.detach(), "the worker", limit=10.0)
        self.frontend.handshake()
        self.features = self.frontend.features & ~m.F_PROTOCOL_FEATURES
        self.memory = GuestMemory()
        self.frontend.set_features(self.frontend.features)
        region = MemoryRegion(self.memory.base, self.memory.size, USER_BASE, 0)
        self.frontend.set_mem_table([region], [self.memory.fd])
        self.ring = GuestRing(self.memory, 256, self.features)
        if started:
            self.start()

    def start(self) -> None:
        front, ring = self.frontend, self.ring
        front.set_vring_num(0, ring.size)
        front.set_vring_base(0, 0)
        front.set_vring_addr(0, *(address - self.memory.base + USER_BASE
                                  for address in (ring.desc, ring.avail, ring.used)))
        front.set_vring_call(0, ring.call_fd)
        front.set_vring_kick(0, ring.kick_fd)
        front.set_vring_enable(0, True)
        front.finish()

    def request(self, type_: int, sector: int = 0, data: bytes = b"", room: int = 0) -> BlkRequest:
        request = BlkRequest(self.memory, type_, sector, data, room)
        self.ring.add(request.buffers)
        self.ring.publish()
        self.ring.wait_used(1)
        return request

    def report(self, deadline: float) -> Message:
        """The worker's next message."""
        left = max(0.0, deadline - time.monotonic())
        assert readable(self.control.fileno(), left), "the worker reports nothing"
        return self.control.recv()[0]

    def watch_config(self) -> threading.Event:
        """Set when the worker says that the config space has changed."""
        changed = threading.Event()
        channel = BackendChannel(self.frontend.open_backend_channel(), "the worker", changed.set)
        self.frontend.finish()

        def serve() -> None:
            try:
                while True:
                    channel.handle_one(20.0)
            except VhostUserError:
                channel.connection.close()

        threading.Thread(target=serve, daemon=True).start()
        return changed

    def close(self) -> None:
        self.frontend.close()
        self.thread.join(10)
        assert not self.thread.is_alive()
        self.service.close()
        self.control.close()
        self._reporter.close()
        self.ring.close()
        self.memory.close()
        os.close(self.image)
