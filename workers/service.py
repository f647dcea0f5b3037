"""What the work of all workers with one device has in common: options, memory, the loop, the life.

A worker is set up before it confines itself and reads the first byte of its front end: that is
its service.  It then serves the front end, and obeys the core.
"""

from __future__ import annotations

import mmap
import posix as os
import select

from shared.errors import StratovirtError
from shared.statistics import page_bytes
from shared.vhost_user.backend import Backend
from shared.vhost_user.errors import ConnectionLostError
from workers.errors import UsageError
from workers.startup import confine

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Container, Mapping, Sequence

    from workers.nursery import Reporter
    from workers.queue_device import QueueDevice

LATER = object()  # what `obey` returns for an order that takes its time


def descriptors(kind: str, fds: Mapping[str, int], *names: str) -> list[int]:
    """Those with these names.

    :raises UsageError: one is missing.
    """
    try:
        return [fds[name] for name in names]
    except KeyError as error:
        raise UsageError(f"A worker of kind {kind} without the descriptor {error}") from error


def integer(kind: str, options: Mapping[str, object], name: str, default: int, low: int,
            high: int) -> int:
    """The option as a number.

    :raises UsageError: it is none, or out of range.
    """
    value = options.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise UsageError(f"Option {name} of a {kind} worker is {value!r}", f"{low} to {high}")
    return value


def flag(kind: str, options: Mapping[str, object], name: str, default: bool = False) -> bool:
    """The option as yes or no.

    :raises UsageError: it is neither.
    """
    value = options.get(name, default)
    if not isinstance(value, bool):
        raise UsageError(f"Option {name} of a {kind} worker is {value!r}", "it is true or false")
    return value


def text(kind: str, options: Mapping[str, object], name: str, default: str,
         choices: Sequence[str] = ()) -> str:
    """The option as a text, one of `choices` if there are any.

    :raises UsageError: it is none.
    """
    value = options.get(name, default)
    if choices and value not in choices:
        raise UsageError(f"Option {name} of a {kind} worker is {value!r}",
                         f"use one of: {', '.join(choices)}")
    if not isinstance(value, str):
        raise UsageError(f"Option {name} of a {kind} worker is {value!r}", "it must be text")
    return value


def map_page(kind: str, queues: int, fd: int | None) -> mmap.mmap | None:
    """The device's statistics page (shared/statistics.py) in memory; None: it has none."""
    return None if fd is None else mmap.mmap(fd, page_bytes(kind, queues))


def map_state(kind: str, size: int, fd: int) -> mmap.mmap:
    """A file of `size` bytes for what a successor must know of the driver, in memory.

    :raises UsageError: it is too short.
    """
    if os.fstat(fd).st_size < size:
        raise UsageError(f"A {kind} worker's state is too short", f"{size} bytes")
    return mmap.mmap(fd, size)


class DeviceService:
    """Serves one device; a kind adds the orders that it obeys, and what else it waits for.

    :param log: called with a line of text for what nobody else can be told.
    """

    engine = ""  # what serves the rings: the core shows it

    def __init__(self, kind: str, device: QueueDevice, log: Callable[[str], None]) -> None:
        self.device = device
        self.backend: Backend | None = None  # while a front end is served
        self._kind = kind
        self._log = log

    # ---- for kinds -------------------------------------------------------------------------

    def obey(self, order: Mapping[str, object]) -> object:
        """Do what the core asks for.

        :return: LATER: the kind answers it when it is done; else it is answered now.
        :raises StratovirtError: it can't be done; the core is told why.
        """
        raise UsageError(f"A {self._kind} worker knows no {order.get('type')!r}")

    def watch(self, poll: select.poll) -> None:
        """Wait for further descriptors as well; before each wait."""

    def wait_limit(self) -> float | None:
        """Milliseconds after which `attend` is due whatever happens; None: no limit."""
        return None

    def attend(self, ready: Container[int], control: Reporter | None) -> None:
        """After each wait: what is due for the descriptors of `watch`, or by time."""

    # ---- life ------------------------------------------------------------------------------

    def run(self, name: str, vhost: int, reporter: Reporter) -> None:
        """The life of a worker that the nursery cloned, from its confinement on.

        :param name: of the process.
        :param vhost: the connected socket of the front end.
        :raises StratovirtError: what the core is told as the reason of the end.
        """
        stages = confine(name)
        reporter.tell("started", stages=list(stages), engine=self.engine)
        try:
            self.serve(vhost, reporter)
        except StratovirtError as error:
            reporter.log(f"{error}")
            raise
        finally:
            self.close()

    def serve(self, fd: int, control: Reporter | None = None) -> None:
        """Serve the front end on `fd` until it closes the connection.

        :param control: where orders come from and reports go to; None: nowhere.
        :raises VhostUserError: the front end broke the protocol.
        """
        self.backend = backend = Backend(self.device, fd, self._log)
        try:
            self._loop(backend, control)
        except ConnectionLostError:
            pass
        finally:
            self.backend = None
            backend.close()

    def _loop(self, backend: Backend, control: Reporter | None) -> None:
        poll = select.poll()
        poll.register(backend.fileno(), select.POLLIN)
        if control is not None:
            poll.register(control.fileno(), select.POLLIN)
        while True:
            self.watch(poll)
            ready = [fd for fd, _ in poll.poll(self.wait_limit())]
            if backend.fileno() in ready:
                backend.handle_one()
            self.attend(ready, control)
            if control is not None and control.fileno() in ready:
                order = control.receive()
                if order is None:
                    poll.unregister(control.fileno())
                    control = None
                else:
                    self.answer(order, control)

    def answer(self, order: Mapping[str, object], control: Reporter) -> None:
        """Obey an order; each is answered with its serial."""
        serial = order.get("serial")
        try:
            if self.obey(order) is not LATER:
                control.tell("done", serial=serial)
        except StratovirtError as error:
            control.tell("failed", serial=serial, text=str(error))

    def close(self) -> None:
        """Stop every queue."""
        self.device.close()
