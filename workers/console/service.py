"""A console worker's work: ports and options in, a served front end out."""

from __future__ import annotations

import _stat as stat
import posix as os

from shared.virtio.console import (
    MAX_NAME,
    MAX_PORTS,
    PORT_QUEUE_SIZE,
    STATE_BYTES,
    queue_count,
)
from workers.console.device import ConsoleDevice, Port
from workers.errors import UsageError
from workers.ring_service import RingService
from workers.service import flag, integer, map_page, map_state

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_PORT_OPTIONS = {"nr", "console", "open", "name", "cols", "rows"}


def _name(port: Mapping[str, object]) -> bytes:
    value = port.get("name", "")
    data = value.encode() if isinstance(value, str) else b"\0"
    if len(data) > MAX_NAME or b"\0" in data:
        raise UsageError(f"A console worker's port with the name {value!r:.300}",
                         f"a text of at most {MAX_NAME} bytes")
    return data


def parse_ports(options: Mapping[str, object], max_ports: int, fds: Mapping[str, int]
                ) -> list[Port]:
    """The ports that the options describe, with their descriptors.

    :raises UsageError: one does not hold.
    """
    ports: list[Port] = []
    described = options.get("ports", [])
    if not isinstance(described, list) or not described or len(described) > max_ports:
        raise UsageError("A console worker without ports, or with too many",
                         f"1 to {max_ports} maps in the option ports")
    for port in described:
        if not isinstance(port, dict) or not set(port) <= _PORT_OPTIONS or "nr" not in port:
            raise UsageError(f"A console worker's port {port!r:.300}",
                             f"a map of {', '.join(sorted(_PORT_OPTIONS))}")
        nr = integer("console", port, "nr", 0, 0, max_ports - 1)
        fd = fds.get(f"port{nr}", -1)
        if fd < 0 or not stat.S_ISSOCK(os.fstat(fd).st_mode) or nr in [p.nr for p in ports]:
            raise UsageError(f"A console worker's port {nr} without a socket, or twice",
                             f"one descriptor port{nr}")
        ports.append(Port(nr, fd, flag("console", port, "console"),
                          flag("console", port, "open"), _name(port),
                          integer("console", port, "cols", 0, 0, 0xFFFF),
                          integer("console", port, "rows", 0, 0, 0xFFFF)))
    return ports


class Service(RingService):
    """Everything that exists before the first byte of the front end is read.

    :param fds: port0, port1, …; statistics (a page) and state (a file of STATE_BYTES) if the
        core wants them. They stay the caller's.
    :param options: see README.md.
    :raises WorkerError, SharedError: an option does not hold.
    """

    def __init__(self, fds: Mapping[str, int], options: Mapping[str, object],
                 log: Callable[[str], None]) -> None:
        max_ports = integer("console", options, "max-ports", MAX_PORTS, 1, MAX_PORTS)
        queues = queue_count(max_ports)
        integer("console", options, "num-queues", queues, queues, queues)
        ports = parse_ports(options, max_ports, fds)
        size = integer("console", options, "queue-size", PORT_QUEUE_SIZE, 2, 1024)
        state = fds.get("state")
        device = ConsoleDevice(
            ports, max_ports, size, map_page("console", queues, fds.get("statistics")),
            None if state is None else map_state("console", STATE_BYTES, state), log)
        super().__init__("console", device, log)
        self._console = device

    def obey(self, order: Mapping[str, object]) -> None:
        """`open` {nr, open}: somebody is at the host's end, or not; `size` {nr, cols, rows}."""
        match order.get("type"):
            case "open":
                self._console.set_open(self._nr(order), flag("console", order, "open"))
            case "size":
                self._console.set_size(self._nr(order),
                                       integer("console", order, "cols", 0, 0, 0xFFFF),
                                       integer("console", order, "rows", 0, 0, 0xFFFF))
            case _:
                super().obey(order)

    def _nr(self, order: Mapping[str, object]) -> int:
        return integer("console", order, "nr", -1, 0, MAX_PORTS - 1)
