"""The loop of a worker on the engine for small devices: front end, core, and the device itself."""

from __future__ import annotations

import posix as os
import select

from shared.errors import StratovirtError
from shared.vhost_user.backend import Backend
from shared.vhost_user.errors import ConnectionLostError
from workers.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from workers.nursery import Reporter
    from workers.ring_device import RingDevice


LATER = object()  # what `obey` returns for an order that takes its time


def integer(kind: str, options: Mapping[str, object], name: str, default: int, low: int,
            high: int) -> int:
    """The option as a number.

    :raises UsageError: it is none, or out of range.
    """
    value = options.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise UsageError(f"Option {name} of a {kind} worker is {value!r}", f"{low} to {high}")
    return value


class RingService:
    """Serves one device; a kind adds the orders that it obeys and what it has to tell."""

    engine = "thread"

    def __init__(self, kind: str, device: RingDevice, log: Callable[[str], None]) -> None:
        self.device = device
        self._kind = kind
        self._log = log

    def obey(self, order: Mapping[str, object]) -> object:
        """Do what the core asks for.

        :return: LATER: the kind answers it when it is done; else it is answered now.
        :raises StratovirtError: it can't be done; the core is told why.
        """
        raise UsageError(f"A {self._kind} worker knows no {order.get('type')!r}")

    def told(self, control: Reporter | None) -> None:
        """The native device has something to tell (sv_ring_notify)."""

    def serve(self, fd: int, control: Reporter | None = None) -> None:
        """Serve the front end on `fd` until it closes the connection.

        :param control: where orders come from; None: nowhere.
        :raises VhostUserError: the front end broke the protocol.
        """
        backend = Backend(self.device, fd, self._log)
        try:
            self._loop(backend, control)
        except ConnectionLostError:
            pass
        finally:
            backend.close()

    def _loop(self, backend: Backend, control: Reporter | None) -> None:
        notify = self.device.notify_fd
        poll = select.poll()
        for fd in (backend.fileno(), notify):
            poll.register(fd, select.POLLIN)
        if control is not None:
            poll.register(control.fileno(), select.POLLIN)
        while True:
            ready = [fd for fd, _ in poll.poll()]
            if backend.fileno() in ready:
                backend.handle_one()
            if notify in ready:
                os.eventfd_read(notify)
                self.told(control)
            if control is not None and control.fileno() in ready:
                order = control.receive()
                if order is None:
                    poll.unregister(control.fileno())
                    control = None
                else:
                    self._answer(order, control)

    def _answer(self, order: Mapping[str, object], control: Reporter) -> None:
        """Every order is answered with its serial."""
        serial = order.get("serial")
        try:
            if self.obey(order) is not LATER:
                control.tell("done", serial=serial)
        except StratovirtError as error:
            control.tell("failed", serial=serial, text=str(error))

    def close(self) -> None:
        """Stop every queue."""
        self.device.close()
