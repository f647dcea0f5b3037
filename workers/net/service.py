"""A net worker's work: taps and options in, a served front end out.

The nursery (for the core) and `program.py` (alone) both end up here.
"""

from __future__ import annotations

import mmap
import posix as os
import select

from shared.errors import StratovirtError
from shared.statistics import page_bytes
from shared.vhost_user.backend import Backend
from shared.vhost_user.errors import ConnectionLostError
from shared.virtio.net import MAX_PAIRS, STATE_BYTES
from workers.errors import UsageError
from workers.net.device import NetDevice

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from workers.nursery import Reporter

MAX_RATE = 1 << 50
DEFAULT_MAC = b"\x52\x54\x00\x12\x34\x56"  # of a device whose front end keeps the address


def _integer(options: Mapping[str, object], name: str, default: int, low: int, high: int) -> int:
    value = options.get(name, default)
    if not isinstance(value, int) or not low <= value <= high:
        raise UsageError(f"Option {name} of a net worker is {value!r}", f"{low} to {high}")
    return value


class Service:
    """Everything that exists before the first byte of the front end is read.

    :param taps: a descriptor for each queue pair; they stay the caller's.
    :param options: see README.md.
    :param page: descriptor of the device's statistics page (shared/statistics.py), or None.
    :param state: descriptor of a file of STATE_BYTES for what a successor must know, or None.
    :raises WorkerError, SharedError: an option or a tap does not hold.
    """

    engine = "tap"

    def __init__(self, taps: Sequence[int], options: Mapping[str, object], page: int | None,
                 state: int | None, log: Callable[[str], None]) -> None:
        self._log = log
        if not 1 <= len(taps) <= MAX_PAIRS:
            raise UsageError(f"A net worker with {len(taps)} taps", f"1 to {MAX_PAIRS}")
        control = options.get("control", False) is True
        mac = options.get("mac", DEFAULT_MAC)
        if not isinstance(mac, bytes) or len(mac) != 6:
            raise UsageError(f"Option mac of a net worker is {mac!r}", "6 bytes")
        limits = [(_integer(options, f"{way}-packets", 0, 0, MAX_RATE),
                   _integer(options, f"{way}-bytes", 0, 0, MAX_RATE)) for way in ("rx", "tx")]
        link = options.get("link", True)
        if not isinstance(link, bool):
            raise UsageError(f"Option link of a net worker is {link!r}", "it is true or false")
        queues = 2 * len(taps) + control
        self.device = NetDevice(
            taps, control, _integer(options, "queue-size", 256, 2, 1024), mac, limits,
            None if page is None else mmap.mmap(page, page_bytes("net", queues)),
            None if state is None else map_state(state), log)
        self.device.set_link(link)

    def serve(self, fd: int, control: Reporter | None = None) -> None:
        """Serve the front end on `fd` until it closes the connection.

        :param control: where orders come from, or None.
        :raises VhostUserError: it broke the protocol.
        """
        backend = Backend(self.device, fd, self._log)
        try:
            self._loop(backend, control)
        except ConnectionLostError:
            pass
        finally:
            backend.close()

    def _loop(self, backend: Backend, control: Reporter | None) -> None:
        poll = select.poll()
        poll.register(backend.fileno(), select.POLLIN)
        if control is not None:
            poll.register(control.fileno(), select.POLLIN)
        while True:
            ready = [fd for fd, _ in poll.poll()]
            if backend.fileno() in ready:
                backend.handle_one()
            if control is not None and control.fileno() in ready:
                message = control.receive()
                if message is None:
                    poll.unregister(control.fileno())
                    control = None
                else:
                    self._obey(message, control)

    def _obey(self, message: Mapping[str, object], control: Reporter) -> None:
        """Do what the core asks for; every order is answered with its serial."""
        serial, up = message.get("serial"), message.get("up")
        try:
            if message.get("type") != "link" or not isinstance(up, bool):
                raise UsageError(f"A net worker knows no {message.get('type')!r}")
            self.device.set_link(up)
            control.tell("done", serial=serial)
        except StratovirtError as error:
            control.tell("failed", serial=serial, text=str(error))

    def close(self) -> None:
        """Stop every queue."""
        self.device.close()


def map_state(fd: int) -> mmap.mmap:
    """The file for what a driver has set, in memory.

    :raises UsageError: it is too short.
    """
    if os.fstat(fd).st_size < STATE_BYTES:
        raise UsageError("A net worker's state is too short", f"{STATE_BYTES} bytes")
    return mmap.mmap(fd, STATE_BYTES)
