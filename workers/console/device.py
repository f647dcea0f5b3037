"""virtio-console over vhost-user. The data plane is native (native/console)."""

from __future__ import annotations

from shared.errors import check
from shared.virtio import console
from workers.ring_device import RingDevice, ffi, lib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

assert lib.sv_console_state_size() <= console.STATE_BYTES
assert lib.SV_CONSOLE_MAX_PORTS == console.MAX_PORTS
assert lib.SV_CONSOLE_NAME_BYTES == console.MAX_NAME + 1


class Port:
    """One port as it is at the start.

    :param fd: a stream socket; stays the caller's.
    :param is_console: the driver makes a terminal of it.
    :param is_open: somebody is at the host's end.
    :param name: at most MAX_NAME bytes; empty: none.
    :param cols, rows: of the terminal at the host's end; 0: unknown.
    """

    __slots__ = ("cols", "fd", "is_console", "is_open", "name", "nr", "rows")

    def __init__(self, nr: int, fd: int, is_console: bool = False, is_open: bool = False,
                 name: bytes = b"", cols: int = 0, rows: int = 0) -> None:
        self.nr = nr
        self.fd = fd
        self.is_console = is_console
        self.is_open = is_open
        self.name = name
        self.cols = cols
        self.rows = rows


class ConsoleDevice(RingDevice):
    """One virtio-console device with several ports.

    :param page: a statistics page in writable memory, or None.
    :param state: writable memory of console.STATE_BYTES that a successor goes on with, or None.
    """

    def __init__(self, ports: Sequence[Port], max_ports: int, queue_size: int,
                 page: object | None, state: object | None, log: Callable[[str], None]) -> None:
        super().__init__("console", console.queue_count(max_ports), queue_size, page, log)
        native = ffi.new("struct sv_console_port[]", max_ports)
        for nr in range(max_ports):
            native[nr].fd = -1
        for port in ports:
            place = native[port.nr]
            place.fd, place.console, place.open = port.fd, port.is_console, port.is_open
            place.cols, place.rows, place.name = port.cols, port.rows, port.name
        self._state = ffi.NULL if state is None else ffi.from_buffer("char[]", state)
        error = ffi.new("int *")
        self.serve_with(lib.sv_console_create(
            native, max_ports, queue_size, self._counters,
            ffi.cast("struct sv_console_state *", self._state), error), error[0])

    def features(self) -> int:
        """virtio 1.2, 5.3.3."""
        return console.FEATURES

    def set_open(self, nr: int, is_open: bool) -> None:
        """Somebody came to the host's end of a port, or left.

        :raises SystemCallError: there is no such port.
        """
        check(lib.sv_console_set_open(self.native, nr, is_open), f"Port {nr}")

    def set_size(self, nr: int, cols: int, rows: int) -> None:
        """The terminal at the host's end has this size now.

        :raises SystemCallError: there is no such port.
        """
        check(lib.sv_console_set_size(self.native, nr, cols, rows), f"Port {nr}")
