"""An rng worker's work: a source and options in, a served front end out.

The nursery (for the core) and `program.py` (alone) both end up here.
"""

from __future__ import annotations

import posix as os

from workers.errors import UsageError
from workers.ring_service import RingService
from workers.rng.device import RngDevice
from workers.service import integer, map_page

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

MAX_BYTES = 0xFFFFFFFF
MAX_PERIOD = 0xFFFFFFFF  # ms


class Service(RingService):
    """Everything that exists before the first byte of the front end is read.

    :param source: descriptor of random bytes; stays the caller's, and is made non-blocking.
    :param options: queue-size; max-bytes and period (ms), both or neither: the limit.
    :param page: descriptor of the device's statistics page, or None.
    :raises WorkerError, SharedError: an option does not hold.
    """

    def __init__(self, source: int, options: Mapping[str, object], page: int | None,
                 log: Callable[[str], None]) -> None:
        limit = integer("rng", options, "max-bytes", 0, 0, MAX_BYTES)
        period = integer("rng", options, "period", 0, 0, MAX_PERIOD)
        if bool(limit) != bool(period) or (limit and limit * 1000 < period):
            raise UsageError(f"An rng worker with the limit {limit} bytes in {period} ms",
                             "both or neither, and at least a byte a second")
        os.set_blocking(source, False)
        size = integer("rng", options, "queue-size", 256, 2, 1024)
        super().__init__("rng", RngDevice(source, limit, period, size, map_page("rng", 1, page),
                                          log), log)
