"""The null worker that the nursery cloned: one process for all empty slots of a VM.

It sleeps until a driver asks something of a slot.  Each slot has a connection of its own, which
comes over the control channel with the order "serve".
"""

from __future__ import annotations

import _stat as stat
import posix as os
import select

from shared.errors import StratovirtError
from shared.vhost_user.backend import Backend
from shared.virtio import console, net
from workers.errors import UsageError
from workers.null.device import NullBalloon, NullConsole, NullDisk, NullNic, empty_image
from workers.service import map_state
from workers.startup import confine

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from workers.nursery import Reporter

    NullDevice = NullDisk | NullNic | NullConsole | NullBalloon

MAX_CONNECTIONS = 64
MAC_BYTES = 6


class Connection:
    """One slot's."""

    def __init__(self, device: NullDevice, fd: int, log: Callable[[str], None]) -> None:
        self.device = device
        self.backend = Backend(device, fd, log)

    def close(self) -> None:
        """Stop its rings, unmap the guest."""
        self.backend.close()
        self.device.close()


class Service:
    """All connections, served one message at a time: none of them has much to say."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter
        self._image = empty_image()
        self._poll = select.poll()
        self._poll.register(reporter.fileno(), select.POLLIN)
        self._connections: dict[int, Connection] = {}

    def serve(self) -> None:
        """Until the core closes the control channel."""
        while True:
            for fd, _ in self._poll.poll():
                if fd == self._reporter.fileno():
                    order = self._reporter.receive_order()
                    if order is None:
                        return
                    self._obey(*order)
                elif fd in self._connections:
                    self._handle(fd)

    def _handle(self, fd: int) -> None:
        try:
            self._connections[fd].backend.handle_one()
        except StratovirtError:
            # The slot has another back end now; or its front end broke the protocol.
            self._poll.unregister(fd)
            self._connections.pop(fd).close()

    def _obey(self, message: Mapping[str, object], fds: list[int]) -> None:
        serial = message.get("serial")
        try:
            self._connect(message, fds)
            self._reporter.tell("done", serial=serial)
        except StratovirtError as error:
            self._reporter.tell("failed", serial=serial, text=str(error))
        finally:
            for fd in fds:
                os.close(fd)

    def _connect(self, message: Mapping[str, object], fds: list[int]) -> None:
        if (message.get("type") != "serve" or not fds
                or not stat.S_ISSOCK(os.fstat(fds[0]).st_mode)
                or len(self._connections) >= MAX_CONNECTIONS):
            raise UsageError(f"A null worker can't do this: {message!r:.200}")
        device = self._make_device(message, fds)
        connection = Connection(device, fds.pop(0), self._reporter.log)
        fd = connection.backend.fileno()
        self._connections[fd] = connection
        self._poll.register(fd, select.POLLIN)

    def _make_device(self, message: Mapping[str, object], fds: list[int]) -> NullDevice:
        queues, size, mac = (message.get(name) for name in ("queues", "queue-size", "mac"))
        if isinstance(queues, int) and isinstance(size, int):
            if message.get("device") == "blk" and len(fds) == 1:
                return NullDisk(queues, size, self._image, self._reporter.log)
            if (message.get("device") == "net" and len(fds) == 2 and isinstance(mac, bytes)
                    and len(mac) == MAC_BYTES):
                state = map_state("net", net.STATE_BYTES, fds[1])
                return NullNic(queues, size, mac, state, self._reporter.log)
            if message.get("device") == "console" and len(fds) == 2:
                state = map_state("console", console.STATE_BYTES, fds[1])
                return NullConsole(queues, size, state, self._reporter.log)
            if message.get("device") == "balloon" and len(fds) == 1:
                return NullBalloon(size, self._reporter.log)
        raise UsageError(f"A null worker can't be this: {message!r:.200}")

    def close(self) -> None:
        """Let go of everything."""
        for connection in self._connections.values():
            connection.close()
        self._connections = {}
        os.close(self._image)


def run(device: str, fds: dict[str, int], options: dict[str, object], reporter: Reporter) -> None:
    """Serve empty slots until the core is gone."""
    os.close(fds["vhost"])  # of no use: each slot has its own
    service = Service(reporter)
    stages = confine("sv-null")
    reporter.tell("started", stages=list(stages), engine="null")
    try:
        service.serve()
    finally:
        service.close()
