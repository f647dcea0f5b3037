"""A blk worker's work: an image and options in, a served front end out.

The nursery (for the core) and `program.py` (alone) both end up here.
"""

from __future__ import annotations

import mmap
import posix as os
import select
import time

from shared import throttling
from shared.errors import StratovirtError
from shared.statistics import page_bytes
from shared.vhost_user.backend import Backend
from shared.vhost_user.errors import ConnectionLostError
from workers.blk.device import MAX_QUEUES, BlkDevice, choose_engine
from workers.blk.disk import Disk
from workers.blk.failures import Failures
from workers.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from workers.nursery import Reporter

# Seconds for the front end to take the message that the capacity has changed.
CHANGE_LIMIT = 2.0


def _integer(options: Mapping[str, object], name: str, default: int, low: int, high: int) -> int:
    value = options.get(name, default)
    if not isinstance(value, int) or not low <= value <= high:
        raise UsageError(f"Option {name} of a blk worker is {value!r}", f"{low} to {high}")
    return value


def _text(options: Mapping[str, object], name: str, default: str,
          choices: Sequence[str] = ()) -> str:
    value = options.get(name, default)
    if choices and value not in choices:
        raise UsageError(f"Option {name} of a blk worker is {value!r}",
                         f"use one of: {', '.join(choices)}")
    if not isinstance(value, str):
        raise UsageError(f"Option {name} of a blk worker is {value!r}", "it must be text")
    return value


def _flag(options: Mapping[str, object], name: str) -> bool:
    value = options.get(name, False)
    if not isinstance(value, bool):
        raise UsageError(f"Option {name} of a blk worker is {value!r}", "it is true or false")
    return value


def _limits(options: Mapping[str, object]) -> dict[str, int]:
    value = options.get("throttling", {})
    if not isinstance(value, dict) or not set(value) <= set(throttling.OPTIONS):
        raise UsageError(f"Option throttling of a blk worker is {value!r}",
                         f"a map with {', '.join(throttling.OPTIONS)}")
    limits = {name: _integer(value, name, 0, 0, throttling.largest(name)) for name in value}
    complaint = throttling.complaint(limits)
    if complaint:
        raise UsageError(f"A blk worker's limits: {complaint}")
    return limits


class Service:
    """Everything that exists before the first byte of the front end is read.

    :param image: descriptor of the image; stays the caller's.
    :param options: see README.md.
    :param page: descriptor of the device's statistics page (shared/statistics.py), or None.
    :raises WorkerError, SharedError: an option or the image does not hold.
    """

    def __init__(self, image: int, options: Mapping[str, object], page: int | None,
                 log: Callable[[str], None]) -> None:
        self._log = log
        queues = _integer(options, "num-queues", 1, 1, MAX_QUEUES)
        queue_size = _integer(options, "queue-size", 256, 2, 1024)
        slot = _flag(options, "slot")
        disk = Disk(image, _flag(options, "readonly"),
                    _text(options, "discard", "ignore", ("ignore", "unmap")) == "unmap",
                    _text(options, "serial", ""), small_blocks=slot,
                    detect_zeroes=_text(options, "detect-zeroes", "off", ("off", "on", "unmap")))
        self.engine = choose_engine(_text(options, "aio", "auto"))
        memory = None if page is None else mmap.mmap(page, page_bytes("blk", queues))
        self.device = BlkDevice(disk, queues, queue_size, self.engine, memory, log, slot)
        self.device.set_limits(_limits(options))

    def serve(self, fd: int, control: Reporter | None = None) -> None:
        """Serve the front end on `fd` until it closes the connection.

        :param control: where orders come from and I/O errors go to; None: to the log.
        :raises VhostUserError: the front end broke the protocol.
        """
        backend = Backend(self.device, fd, self._log)
        failures = Failures(self.device, self._reporter(control))
        try:
            self._loop(backend, failures, control)
        except ConnectionLostError:
            pass
        finally:
            backend.close()
            # What failed last, while the rings were stopped.
            failures.collect()
            failures.close()

    def _loop(self, backend: Backend, failures: Failures, control: Reporter | None) -> None:
        poll = select.poll()
        poll.register(backend.fileno(), select.POLLIN)
        poll.register(failures.fileno(), select.POLLIN)
        if control is not None:
            poll.register(control.fileno(), select.POLLIN)
        while True:
            limit = failures.wait_limit()
            poll.modify(failures.fileno(), select.POLLIN if limit is None else 0)
            ready = [fd for fd, _ in poll.poll(None if limit is None else 1000 * limit)]
            if backend.fileno() in ready:
                backend.handle_one()
                if self.device.capacity_changed:
                    self.device.capacity_changed = False
                    backend.config_changed(time.monotonic() + CHANGE_LIMIT)
            if control is not None and control.fileno() in ready:
                message = control.receive()
                if message is None:
                    poll.unregister(control.fileno())
                    control = None
                else:
                    self._obey(message, backend, control)
            failures.collect()

    def _reporter(self, control: Reporter | None) -> Callable[[str, int, int], None]:
        def report(operation: str, error: int, count: int) -> None:
            if control is None:
                self._log(f"{count} x {operation} failed: {os.strerror(error)}")
            else:
                control.tell("io-error", operation=operation, errno=error, count=count)
        return report

    def _obey(self, message: Mapping[str, object], backend: Backend, control: Reporter) -> None:
        """Do what the core asks for; every order is answered with its serial."""
        serial = message.get("serial")
        try:
            match message.get("type"):
                case "resize":
                    if self.device.resize():
                        backend.config_changed(time.monotonic() + CHANGE_LIMIT)
                case "limits":
                    self.device.set_limits(_limits(message))
                case _:
                    raise UsageError(f"A blk worker knows no {message.get('type')!r}")
            control.tell("done", serial=serial)
        except StratovirtError as error:
            control.tell("failed", serial=serial, text=str(error))

    def close(self) -> None:
        """Stop every queue."""
        self.device.close()
