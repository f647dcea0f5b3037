"""What all vhost-user devices of workers have in common: guest memory and rings go to a C engine.

An engine (native/dataplane, native/net, native/ring) serves the rings; this is its life as the
back end (shared/vhost_user/backend.py) wants it.  A kind adds its features, makes its native
device and overrides what it does otherwise.
"""

from __future__ import annotations

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


class DataPlane:
    """The functions that every engine has, by its own names; all take a native device first.

    :param module: the native module.
    :param device: what the names of its functions begin with: DEVICE_add_region and so on.
    :param queue: the same of those for one queue: QUEUE_start and so on.
    :param ring: the struct that QUEUE_start takes.
    """

    __slots__ = ("add_region", "broken", "clear_regions", "destroy", "ffi", "remove_region", "ring",
                 "set_call", "start", "stop")

    def __init__(self, module: Any, device: str, queue: str, ring: str) -> None:
        lib = module.lib
        self.ffi = module.ffi
        self.ring = f"struct {ring} *"
        self.destroy = getattr(lib, f"{device}_destroy")
        self.clear_regions = getattr(lib, f"{device}_clear_regions")
        self.add_region = getattr(lib, f"{device}_add_region")
        self.remove_region = getattr(lib, f"{device}_remove_region")
        self.start = getattr(lib, f"{queue}_start")
        self.stop = getattr(lib, f"{queue}_stop")
        self.set_call = getattr(lib, f"{queue}_set_call")
        self.broken = getattr(lib, f"{queue}_broken")


class QueueDevice(BackendDevice):
    """One device; a kind calls `adopt` with its native device in its own __init__.

    The front end owns the config space, and nothing in flight is recorded (what was not used when
    a back end ended is served again), unless a kind says otherwise.

    :param kind: of the statistics record (shared/statistics.py), and for messages.
    :param page: a statistics page in writable memory, or None.
    :param log: called with a line of text for what the front end can't be told.
    """

    plane: DataPlane
    protocol_features = SERVED_FEATURES & ~(m.PF_CONFIG | m.PF_INFLIGHT_SHMFD)

    def __init__(self, kind: str, queues: int, queue_size: int, page: object | None,
                 log: Callable[[str], None]) -> None:
        ffi = self.plane.ffi
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

    def adopt(self, native: object, error: int, what: str, hint: str) -> None:
        """Serve with this native device.

        :raises SystemCallError: it is NULL, because of `error` (a negative errno); says `what`
            can't be set up, and what to do.
        """
        if native == self.plane.ffi.NULL:
            raise SystemCallError(-error, f"Can't set up {what}", hint)
        self.native = native

    # ---- what the guest reads --------------------------------------------------------------

    def read_config(self, offset: int, size: int) -> bytes:
        """The front end has it."""
        return bytes(size)

    def write_config(self, offset: int, data: bytes, migration: bool) -> None:
        """The front end has it."""
        raise RefusedError(95, f"SET_CONFIG of a {self._kind} back end", "the front end owns it")

    # ---- guest memory ----------------------------------------------------------------------

    def set_memory(self, regions: Sequence[tuple[MemoryRegion, int]]) -> None:
        """Map these regions instead of all others."""
        check(self.plane.clear_regions(self.native), "Can't replace guest memory")
        for region, fd in regions:
            self.add_memory(region, fd)

    def add_memory(self, region: MemoryRegion, fd: int) -> None:
        """Map one more region."""
        check(self.plane.add_region(self.native, region.guest_addr, region.size,
                                     region.file_offset, fd),
              f"Can't map guest memory at {region.guest_addr:#x}")

    def remove_memory(self, region: MemoryRegion) -> None:
        """Unmap a region."""
        check(self.plane.remove_region(self.native, region.guest_addr, region.size),
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
        """What was taken is used, or available again."""
        return self._halt(ring.index) if ring.index in self._running else ring.base

    def prepare(self, place: Any) -> None:
        """A ring is about to start: what the engine wants to know of it beside its place."""

    def _run(self, ring: Ring) -> None:
        if ring.index in self._running:
            return
        place = self.plane.ffi.new(self.plane.ring)
        place.size = ring.size
        place.desc, place.avail, place.used = ring.desc, ring.avail, ring.used
        place.base = ring.base
        place.kick_fd, place.call_fd, place.err_fd = ring.kick_fd, ring.call_fd, ring.err_fd
        self.prepare(place)
        check(self.plane.start(self.native, ring.index, place),
              f"Can't start queue {ring.index}")
        self._running.add(ring.index)

    def _halt(self, index: int) -> int:
        ffi = self.plane.ffi
        reason = self.plane.broken(self.native, index)
        base = check(self.plane.stop(self.native, index), f"Can't stop queue {index}")
        self._running.discard(index)
        if reason != ffi.NULL:
            self._log(f"Queue {index} was broken by its driver: {ffi.string(reason).decode()}")
        return base

    def change_call(self, ring: Ring, fd: int) -> None:
        """Takes effect at once, the ring goes on. One that isn't enabled takes it when it is: a
        queue that doesn't run would keep a copy open."""
        if ring.index not in self._running:
            return
        check(self.plane.set_call(self.native, ring.index, fd), "Can't change the call fd")

    def get_inflight(self, queue_count: int, queue_size: int) -> tuple[m.Inflight, int]:
        """Never offered."""
        raise RefusedError(95, f"GET_INFLIGHT_FD of a {self._kind} back end")

    def set_inflight(self, inflight: m.Inflight, fd: int) -> None:
        """Never offered."""
        raise RefusedError(95, f"SET_INFLIGHT_FD of a {self._kind} back end")

    # ---- own -------------------------------------------------------------------------------

    def counters(self) -> list[dict[str, int]]:
        """The counters of each queue, by the names of its record."""
        buffer = self.plane.ffi.buffer
        return [self._record.decode(bytes(buffer(self._counters + i, self._record.bytes)), 0)[0]
                for i in range(self.queue_count)]

    def close(self) -> None:
        """Stop everything, unmap everything. Descriptors of the host stay the caller's."""
        if self.native != self.plane.ffi.NULL:
            self.plane.destroy(self.native)
            self.native = self.plane.ffi.NULL
