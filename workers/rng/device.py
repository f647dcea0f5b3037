"""virtio-rng over vhost-user. The data plane is native (native/rng)."""

from __future__ import annotations

from shared.virtio import rng
from workers.ring_device import RingDevice, ffi, lib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


class RngDevice(RingDevice):
    """One virtio-rng device.

    :param source: non-blocking descriptor of random bytes; stays the caller's.
    :param max_bytes: of the guest in `period` milliseconds, on average; 0: no limit.
    """

    def __init__(self, source: int, max_bytes: int, period: int, queue_size: int,
                 page: object | None, log: Callable[[str], None]) -> None:
        super().__init__("rng", 1, queue_size, page, log)
        error = ffi.new("int *")
        self.serve_with(lib.sv_rng_create(source, max_bytes, period, queue_size, self._counters,
                                     error), error[0])

    def features(self) -> int:
        """virtio 1.2, 5.4.3: none but those of every device."""
        return rng.FEATURES
