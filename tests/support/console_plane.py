"""A virtio-console device without a worker process, and its driver: for tests of the C code."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tests.support.console_driver import F_MULTIPORT, F_SIZE, ConsoleDriver
from tests.support.guest_ring import F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1
from tests.support.ring_plane import RingPlane, ffi, lib

FEATURES = F_VERSION_1 | F_INDIRECT_DESC | F_EVENT_IDX | F_SIZE | F_MULTIPORT
CONSOLE_PORT: dict[str, Any] = {"console": True, "open": True}
SERIAL_PORT: dict[str, Any] = {"name": b"agent.channel.0", "open": True}


class ConsolePlane(RingPlane):
    """A virtio-console device; `host[nr]` is the host's end of a port.

    :param ports: by number: {"console", "open", "name", "cols", "rows"}.
    :param before: a device that died, whose memory and sockets this one takes over.
    """

    def __init__(self, ports: dict[int, dict[str, Any]], max_ports: int = 4,
                 state: object | None = None, before: ConsolePlane | None = None,
                 **options: Any) -> None:
        self.host: dict[int, socket.socket] = {}
        self.ends: dict[int, socket.socket] = {}
        if before is not None:
            self.host, self.ends = before.host, before.ends
            options["memory"] = before.memory
        self._state = state  # held as long as the data plane writes to it
        self.native = ffi.new("struct sv_console_port[]", max_ports)
        for nr in range(max_ports):
            self.native[nr].fd = -1
        for nr, fields in ports.items():
            self.native[nr].fd = self._connect(nr)
            for name, value in fields.items():
                setattr(self.native[nr], name, value)
        super().__init__(
            lambda counters, error: lib.sv_console_create(
                self.native, max_ports, 128, counters,
                ffi.NULL if state is None else ffi.cast("struct sv_console_state *", state),
                error),
            "struct sv_console_counters", 2 * max_ports + 2, **options)

    def _connect(self, nr: int) -> int:
        """The device's end of a port's socket."""
        if nr not in self.host:
            self.host[nr], self.ends[nr] = socket.socketpair()
            self.host[nr].settimeout(10)
        return self.ends[nr].fileno()

    def set_open(self, nr: int, is_open: bool) -> int:
        return int(lib.sv_console_set_open(self.device, nr, is_open))

    def close(self) -> None:
        if self.device:
            super().close()
            for end in (*self.host.values(), *self.ends.values()):
                end.close()


Make = Callable[..., tuple[ConsolePlane, ConsoleDriver]]


@contextmanager
def console_planes() -> Iterator[Make]:
    """Makes devices with their drivers: a console (port 0) and a serial port (2), if not told."""
    planes: list[ConsolePlane] = []

    def build(ports: dict[int, dict[str, Any]] | None = None, **options: Any
              ) -> tuple[ConsolePlane, ConsoleDriver]:
        options.setdefault("features", FEATURES)
        plane = ConsolePlane({0: CONSOLE_PORT, 2: SERIAL_PORT} if ports is None else ports,
                             **options)
        planes.append(plane)
        return plane, ConsoleDriver(plane.memory, lambda index: plane.start(index, 32))

    try:
        yield build
    finally:
        for plane in planes:
            plane.close()


def set_up(make: Make) -> tuple[ConsolePlane, ConsoleDriver]:
    """A console (port 0) and a serial port (2), set up and open."""
    plane, driver = make()
    driver.begin(0, 2)
    driver.set_up(0, 2)
    driver.messages(4)
    return plane, driver
