"""A blk worker's work: an image and options in, a served front end out.

The nursery (for the core) and `program.py` (alone) both end up here.
"""

from __future__ import annotations

import posix as os
import select
import time

from shared import throttling
from workers.blk.device import MAX_QUEUES, BlkDevice, choose_engine
from workers.blk.disk import Disk
from workers.blk.failures import Failures
from workers.errors import UsageError
from workers.service import DeviceService, flag, integer, map_page, text

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Container, Mapping

    from workers.nursery import Reporter

# Seconds for the front end to take the message that the capacity has changed.
CHANGE_LIMIT = 2.0


def _limits(options: Mapping[str, object]) -> dict[str, int]:
    value = options.get("throttling", {})
    if not isinstance(value, dict) or not set(value) <= set(throttling.OPTIONS):
        raise UsageError(f"Option throttling of a blk worker is {value!r}",
                         f"a map with {', '.join(throttling.OPTIONS)}")
    limits = {name: integer("blk", value, name, 0, 0, throttling.largest(name)) for name in value}
    complaint = throttling.complaint(limits)
    if complaint:
        raise UsageError(f"A blk worker's limits: {complaint}")
    return limits


class Service(DeviceService):
    """Everything that exists before the first byte of the front end is read.

    :param image: descriptor of the image; stays the caller's.
    :param options: see README.md.
    :param page: descriptor of the device's statistics page (shared/statistics.py), or None.
    :raises WorkerError, SharedError: an option or the image does not hold.
    """

    device: BlkDevice
    _failures: Failures  # while a front end is served

    def __init__(self, image: int, options: Mapping[str, object], page: int | None,
                 log: Callable[[str], None]) -> None:
        queues = integer("blk", options, "num-queues", 1, 1, MAX_QUEUES)
        queue_size = integer("blk", options, "queue-size", 256, 2, 1024)
        slot = flag("blk", options, "slot")
        disk = Disk(image, flag("blk", options, "readonly"),
                    text("blk", options, "discard", "ignore", ("ignore", "unmap")) == "unmap",
                    text("blk", options, "serial", ""), small_blocks=slot,
                    detect_zeroes=text("blk", options, "detect-zeroes", "off",
                                       ("off", "on", "unmap")))
        self.engine = choose_engine(text("blk", options, "aio", "auto"))
        super().__init__("blk", BlkDevice(disk, queues, queue_size, self.engine,
                                          map_page("blk", queues, page), log, slot), log)
        self.device.set_limits(_limits(options))

    def serve(self, fd: int, control: Reporter | None = None) -> None:
        """Also tell of I/O errors: the core, or without one the log."""
        self._failures = Failures(self.device, self._reporter(control))
        try:
            super().serve(fd, control)
        finally:
            # What failed last, while the rings were stopped.
            self._failures.collect()
            self._failures.close()

    def _reporter(self, control: Reporter | None) -> Callable[[str, int, int], None]:
        def report(operation: str, error: int, count: int) -> None:
            if control is None:
                self._log(f"{count} x {operation} failed: {os.strerror(error)}")
            else:
                control.tell("io-error", operation=operation, errno=error, count=count)
        return report

    def watch(self, poll: select.poll) -> None:
        """I/O errors, unless the next report of them has to wait."""
        waits = self._failures.wait_limit() is not None
        poll.register(self._failures.fileno(), 0 if waits else select.POLLIN)

    def wait_limit(self) -> float | None:
        """Until the next report of I/O errors."""
        limit = self._failures.wait_limit()
        return None if limit is None else 1000 * limit

    def attend(self, ready: Container[int], control: Reporter | None) -> None:
        """Errors to report; a capacity that the front end has to hear of."""
        self._failures.collect()
        self._tell_capacity()

    def _tell_capacity(self) -> None:
        if self.device.capacity_changed and self.backend is not None:
            self.device.capacity_changed = False
            self.backend.config_changed(time.monotonic() + CHANGE_LIMIT)

    def obey(self, order: Mapping[str, object]) -> object:
        """`resize`: look how large the image is; `limits` {throttling}."""
        match order.get("type"):
            case "resize":
                self.device.capacity_changed |= self.device.resize()
                self._tell_capacity()
            case "limits":
                self.device.set_limits(_limits(order))
            case _:
                return super().obey(order)
        return None
