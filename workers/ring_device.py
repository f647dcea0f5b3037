"""What the vhost-user devices on the engine for small devices (native/ring) have in common.

A kind adds its features and makes its native device.  The front end owns the config space, and
nothing in flight is recorded: what was not used when a back end ended is served again.
"""

from __future__ import annotations

from native import _devices
from shared.errors import SystemCallError, check
from shared.statistics import HEADER_BYTES, RECORDS, page_bytes
from shared.vhost_user import messages as m
from shared.vhost_user.backend import BackendDevice
from shared.vhost_user.backend_device import SERVED_FEATURES, RefusedError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from shared.memory_regions import MemoryRegion
    from shared.vhost_user.backend import Ring

ffi, lib = _devices.ffi, _devices.lib


class RingDevice(BackendDevice):
    """One device; a kind calls `adopt` with its native device in its own __init__.

    :param kind: of the statistics record (shared/statistics.py), and for messages.
    :param page: a statistics page in writable memory, or None.
    :param log: called with a line of text for what the front end can't be told.
    """

    protocol_features = SERVED_FEATURES & ~(m.PF_CONFIG | m.PF_INFLIGHT_SHMFD)

    def __init__(self, kind: str, queues: int, queue_size: int, page: object | None,
                 log: Callable[[str], None]) -> None:
        self.queue_count = queues
        self.max_queue_size = queue_size
        self.native: Any = ffi.NULL
        self._kind = kind
        self._log = log
        self._running: set[int] = set()
        self._record = RECORDS[kind]
        # Held as long as the data plane writes to it.
        self._page = ffi.from_buffer("uint8_t[]", bytearray(page_bytes(kind, queues))
                                     if page is None else page)
        self._counters = ffi.cast(f"struct sv_{kind}_counters *", self._page + HEADER_BYTES)
        assert self._record.bytes == ffi.sizeof(f"struct sv_{kind}_counters")

    def adopt(self, native: object, error: int) -> None:
        """Serve with this `struct sv_ring_device *`.

        :raises SystemCallError: it is NULL, because of `error` (a negative errno).
        """
        if native == ffi.NULL:
            raise SystemCallError(-error, f"Can't set up the queues of a {self._kind} worker",
                                  "raise RLIMIT_NOFILE")
        self.native = native

    # ---- what the guest reads --------------------------------------------------------------

    def set_features(self, features: int) -> None:
        """What the driver acknowledged."""
        check(lib.sv_ring_set_features(self.native, features), "Can't set features")

    def read_config(self, offset: int, size: int) -> bytes:
        """The front end has it."""
        return bytes(size)

    def write_config(self, offset: int, data: bytes, migration: bool) -> None:
        """The front end has it."""
        raise RefusedError(95, f"SET_CONFIG of a {self._kind} back end", "the front end owns it")

    # ---- guest memory ----------------------------------------------------------------------

    def set_memory(self, regions: Sequence[tuple[MemoryRegion, int]]) -> None:
        """Map these regions instead of all others."""
        check(lib.sv_ring_clear_regions(self.native), "Can't replace guest memory")
        for region, fd in regions:
            self.add_memory(region, fd)

    def add_memory(self, region: MemoryRegion, fd: int) -> None:
        """Map one more region."""
        check(lib.sv_ring_add_region(self.native, region.guest_addr, region.size,
                                     region.file_offset, fd),
              f"Can't map guest memory at {region.guest_addr:#x}")

    def remove_memory(self, region: MemoryRegion) -> None:
        """Unmap a region."""
        check(lib.sv_ring_remove_region(self.native, region.guest_addr, region.size),
              f"Can't unmap guest memory at {region.guest_addr:#x}")

    # ---- rings -----------------------------------------------------------------------------

    def start_ring(self, ring: Ring) -> None:
        """A ring that isn't enabled yet is served later."""
        if ring.enabled:
            self._run(ring)

    def enable_ring(self, ring: Ring, enabled: bool) -> None:
        """Disabled rings are not served; their index is kept."""
        if enabled:
            self._run(ring)
        elif ring.index in self._running:
            ring.base = self._halt(ring.index)

    def stop_ring(self, ring: Ring) -> int:
        """What was taken and not used is available again."""
        return self._halt(ring.index) if ring.index in self._running else ring.base

    def _run(self, ring: Ring) -> None:
        if ring.index in self._running:
            return
        place = ffi.new("struct sv_ring_place *")
        place.size = ring.size
        place.desc, place.avail, place.used = ring.desc, ring.avail, ring.used
        place.base = ring.base
        place.kick_fd, place.call_fd, place.err_fd = ring.kick_fd, ring.call_fd, ring.err_fd
        check(lib.sv_ring_start(self.native, ring.index, place),
              f"Can't start queue {ring.index}")
        self._running.add(ring.index)

    def _halt(self, index: int) -> int:
        reason = lib.sv_ring_broken(self.native, index)
        base = check(lib.sv_ring_stop(self.native, index), f"Can't stop queue {index}")
        self._running.discard(index)
        if reason != ffi.NULL:
            self._log(f"Queue {index} was broken by its driver: {ffi.string(reason).decode()}")
        return base

    def change_call(self, ring: Ring, fd: int) -> None:
        """Takes effect at once, the ring goes on."""
        check(lib.sv_ring_set_call(self.native, ring.index, fd), "Can't change the call fd")

    def get_inflight(self, queue_count: int, queue_size: int) -> tuple[m.Inflight, int]:
        """Never offered."""
        raise RefusedError(95, f"GET_INFLIGHT_FD of a {self._kind} back end")

    def set_inflight(self, inflight: m.Inflight, fd: int) -> None:
        """Never offered."""
        raise RefusedError(95, f"SET_INFLIGHT_FD of a {self._kind} back end")

    def reset(self) -> None:
        """As after power-on."""
        check(lib.sv_ring_reset(self.native), f"Can't reset a {self._kind} device")

    # ---- own -------------------------------------------------------------------------------

    @property
    def notify_fd(self) -> int:
        """Readable when the native device has something to tell; the reader empties it."""
        return int(lib.sv_ring_notify_fd(self.native))

    def counters(self) -> list[dict[str, int]]:
        """The counters of each queue."""
        return [self._record.decode(bytes(ffi.buffer(self._counters + i, self._record.bytes)),
                                    0)[0] for i in range(self.queue_count)]

    def close(self) -> None:
        """Stop everything, unmap everything. Descriptors of the host stay the caller's."""
        if self.native != ffi.NULL:
            lib.sv_ring_destroy(self.native)
            self.native = ffi.NULL
