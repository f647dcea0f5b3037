"""virtio-blk over vhost-user: features, config space, queues. The data plane is native."""

from __future__ import annotations

import fcntl
import posix as os

from native import _dataplane
from shared.errors import SandboxError, SharedError, SystemCallError, check
from shared.statistics import HEADER_BYTES, RECORDS, page_bytes
from shared.throttling import BURST, LIMITS
from shared.vhost_user import messages as m
from shared.vhost_user.backend import BackendDevice
from shared.virtio import blk
from shared.virtio.features import F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1
from workers.errors import DiskError
from workers.startup import restrict_rings

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from shared.memory_regions import MemoryRegion
    from shared.vhost_user.backend import Ring
    from workers.blk.disk import Disk

ffi, lib = _dataplane.ffi, _dataplane.lib

MAX_QUEUES = 32
RECORD = RECORDS["blk"]
assert RECORD.bytes == ffi.sizeof("struct sv_blk_counters")


def choose_engine(aio: str) -> str:
    """"io_uring" or "threads" for the option `aio`.

    :raises DiskError: io_uring was demanded and the host forbids it.
    :raises SandboxError: it was demanded, and the host can't restrict it.
    """
    if aio in ("threads", "off"):
        return "threads"
    error = lib.sv_uring_probe(restrict_rings())
    if error == 0:
        return "io_uring"
    if aio == "io_uring":
        if lib.sv_uring_probe(False) == 0:
            raise SandboxError("io-uring", f"the kernel can't restrict rings "
                                           f"({os.strerror(-error)})")
        raise DiskError(f"This host refuses io_uring: {os.strerror(-error)}",
                        "say aio=threads, or allow it (sysctl kernel.io_uring_disabled)")
    return "threads"


class BlkDevice(BackendDevice):
    """One virtio-blk device.

    :param engine: "io_uring" or "threads".
    :param page: a statistics page (shared/statistics.py) in writable memory, or None.
    :param slot: offer what every slot offers (shared/virtio/blk.py), whatever the image is: to
        write to a read-only one is an I/O error.
    :param log: called with a line of text for what the front end can't be told.
    """

    def __init__(self, disk: Disk, queues: int, queue_size: int, engine: str,
                 page: object | None, log: Callable[[str], None],
                 slot: bool = False) -> None:
        self.queue_count = queues
        self.max_queue_size = queue_size
        self._disk = disk
        self._log = log
        self._slot = slot
        self._features = 0
        self._writeback = True
        self._dirty = [0] * queues  # writes that the last stop of each ring has synced
        self._running: set[int] = set()
        self.capacity_changed = False  # without an order: the front end must still be told
        self._tracking = False
        self._inflight_fd = -1
        # Held as long as the data plane writes to it.
        self._page = ffi.from_buffer("uint8_t[]", bytearray(page_bytes("blk", queues))
                                     if page is None else page)
        self._counters = ffi.cast("struct sv_blk_counters *", self._page + HEADER_BYTES)
        error = ffi.new("int *")
        kind = lib.SV_ENGINE_THREADS
        if engine == "io_uring":
            kind = lib.SV_ENGINE_URING if restrict_rings() else lib.SV_ENGINE_URING_FREE
        self._plane = lib.sv_plane_create(disk.native(), queues, queue_size, kind,
                                          self._counters, error)
        if self._plane == ffi.NULL:
            raise SystemCallError(-error[0], f"Can't set up {queues} queues with {engine}",
                                  "raise RLIMIT_MEMLOCK and RLIMIT_NOFILE, or say aio=threads")

    # ---- what the guest reads --------------------------------------------------------------

    def features(self) -> int:
        """virtio 1.2, 5.2.3 and 6: everything that the data plane serves."""
        if self._slot:
            return blk.SLOT_BACKEND_FEATURES
        bits = (blk.F_SEG_MAX | blk.F_BLK_SIZE | blk.F_FLUSH | blk.F_TOPOLOGY
                | blk.F_CONFIG_WCE | F_INDIRECT_DESC | F_EVENT_IDX | F_VERSION_1)
        if self.queue_count > 1:
            bits |= blk.F_MQ
        if self._disk.readonly:
            return bits | blk.F_RO
        return bits | blk.F_DISCARD | blk.F_WRITE_ZEROES

    def config(self) -> blk.BlkConfig:
        """The config space as it is now."""
        disk = self._disk
        config = blk.BlkConfig()
        config.capacity = disk.capacity
        # A chain holds header and status as well, and may not be longer than the queue.
        config.seg_max = max(1, min(lib.SV_BLK_MAX_DATA_SEGMENTS, self.max_queue_size - 2))
        config.blk_size = disk.logical_block
        ratio = disk.physical_block // disk.logical_block
        config.physical_block_exp = min(ratio.bit_length() - 1, 255)
        config.min_io_size = min(disk.minimal_io // disk.logical_block, 0xFFFF)
        config.opt_io_size = disk.optimal_io // disk.logical_block
        config.writeback = int(self._writeback)
        config.num_queues = self.queue_count
        if self._slot or not disk.readonly:
            config.max_discard_sectors = lib.SV_BLK_MAX_SECTORS
            config.max_discard_segments = lib.SV_BLK_MAX_SEGMENTS
            config.discard_sector_alignment = disk.physical_block // blk.SECTOR
            config.max_write_zeroes_sectors = lib.SV_BLK_MAX_SECTORS
            config.max_write_zeroes_segments = lib.SV_BLK_MAX_SEGMENTS
            config.write_zeroes_may_unmap = int(disk.unmap)
        return config

    def read_config(self, offset: int, size: int) -> bytes:
        """Zeroes beyond the end."""
        return self.config().encode()[offset:offset + size].ljust(size, b"\0")

    def write_config(self, offset: int, data: bytes, migration: bool) -> None:
        """Only `writeback` can be written by a driver (5.2.4.2)."""
        if offset == blk.WRITEBACK_OFFSET and len(data) == 1 and data[0] <= 1:
            self._set_writeback(bool(data[0]))
        elif migration:
            # The destination's image decides everything else.
            at = blk.WRITEBACK_OFFSET - offset
            if 0 <= at < len(data):
                self._set_writeback(data[at] != 0)
        else:
            raise SharedError(f"SET_CONFIG of {len(data)} bytes at {offset}",
                              "only the byte `writeback` can be written, with 0 or 1")

    def set_features(self, features: int) -> None:
        """Without FLUSH and CONFIG_WCE every write is durable when it completes (5.2.6.2)."""
        self._features = features
        self._set_writeback(bool(features & (blk.F_FLUSH | blk.F_CONFIG_WCE)))

    def _set_writeback(self, writeback: bool) -> None:
        self._writeback = writeback
        check(lib.sv_plane_set_writeback(self._plane, writeback), "Can't sync the image")

    # ---- guest memory ----------------------------------------------------------------------

    def set_memory(self, regions: Sequence[tuple[MemoryRegion, int]]) -> None:
        """Map these regions instead of all others."""
        check(lib.sv_plane_clear_regions(self._plane), "Can't replace guest memory")
        for region, fd in regions:
            self.add_memory(region, fd)

    def add_memory(self, region: MemoryRegion, fd: int) -> None:
        """Map one more region."""
        check(lib.sv_plane_add_region(self._plane, region.guest_addr, region.size,
                                      region.file_offset, fd),
              f"Can't map guest memory at {region.guest_addr:#x}")

    def remove_memory(self, region: MemoryRegion) -> None:
        """Unmap a region."""
        check(lib.sv_plane_remove_region(self._plane, region.guest_addr, region.size),
              f"Can't unmap guest memory at {region.guest_addr:#x}")

    # ---- rings -----------------------------------------------------------------------------

    def start_ring(self, ring: Ring) -> None:
        """A ring that isn't enabled yet gets its thread later."""
        if ring.enabled:
            self._run(ring)

    def enable_ring(self, ring: Ring, enabled: bool) -> None:
        """Disabled rings have no thread; their index is kept."""
        if enabled:
            self._run(ring)
        elif ring.index in self._running:
            ring.base = self._halt(ring.index)

    def stop_ring(self, ring: Ring) -> int:
        """Everything in flight finished and, if something was written, synced."""
        if ring.index not in self._running:
            return ring.base
        base = self._halt(ring.index)
        counters = self._counters[ring.index]
        written = counters.writes + counters.discards + counters.write_zeroes
        if written != self._dirty[ring.index]:
            self._dirty[ring.index] = written
            error = lib.sv_plane_sync(self._plane)
            if error < 0:
                self._log(f"Can't sync the image: {os.strerror(-error)}")
        return base

    def _run(self, ring: Ring) -> None:
        if ring.index in self._running:
            return
        setup = ffi.new("struct sv_ring_setup *")
        setup.size = ring.size
        setup.desc, setup.avail, setup.used = ring.desc, ring.avail, ring.used
        setup.features = self._features
        setup.base = ring.base
        setup.kick_fd, setup.call_fd, setup.err_fd = ring.kick_fd, ring.call_fd, ring.err_fd
        if not self._running:
            # The image may have grown since this worker was started, to take over some day.
            self.capacity_changed |= self.resize()
        check(lib.sv_queue_start(self._plane, ring.index, setup),
              f"Can't start queue {ring.index}")
        self._running.add(ring.index)

    def _halt(self, index: int) -> int:
        reason = lib.sv_queue_broken(self._plane, index)
        base = check(lib.sv_queue_stop(self._plane, index), f"Can't stop queue {index}")
        self._running.discard(index)
        if reason != ffi.NULL:
            self._log(f"Queue {index} was broken by its driver: {ffi.string(reason).decode()}")
        return base

    def change_call(self, ring: Ring, fd: int) -> None:
        """Takes effect at once, the ring goes on."""
        check(lib.sv_queue_set_call(self._plane, ring.index, fd), "Can't change the call fd")

    # ---- requests in flight ----------------------------------------------------------------

    def get_inflight(self, queue_count: int, queue_size: int) -> tuple[m.Inflight, int]:
        """A sealed memfd: the other side can't make it shorter under our feet."""
        size = queue_count * lib.sv_inflight_size(queue_size)
        fd = os.memfd_create("vhost-user-inflight", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            # A write makes it as long: a worker may not shorten files, so it has no ftruncate.
            os.pwrite(fd, b"\0", size - 1)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS,
                        fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            inflight = m.Inflight(size, 0, queue_count, queue_size)
            self.set_inflight(inflight, fd)
        except BaseException:
            os.close(fd)
            raise
        self._forget_inflight_fd()
        self._inflight_fd = fd
        return inflight, fd

    def set_inflight(self, inflight: m.Inflight, fd: int) -> None:
        """Rings started from now on begin with what a predecessor left undone."""
        check(lib.sv_plane_set_inflight(self._plane, fd, inflight.mmap_offset, inflight.mmap_size,
                                        inflight.queue_count, inflight.queue_size),
              "Can't use the in-flight buffer")
        self._tracking = True

    def _forget_inflight_fd(self) -> None:
        if self._inflight_fd >= 0:
            os.close(self._inflight_fd)
        self._inflight_fd = -1

    def reset(self) -> None:
        """Features, write-back mode and the in-flight buffer as at the start."""
        check(lib.sv_plane_set_inflight(self._plane, -1, 0, 0, 0, 0), "Can't reset")
        self._forget_inflight_fd()
        self._tracking = False
        self._features = 0
        self._set_writeback(True)

    # ---- own: what the guest doesn't ask for -----------------------------------------------

    def set_limits(self, limits: Mapping[str, int]) -> None:
        """Limits by the names of shared/throttling.py, for all queues together, at once."""
        native = ffi.new("struct sv_limits *")
        for i, name in enumerate(LIMITS):
            native.rate[i] = limits.get(name, 0)
            native.burst[i] = limits.get(name + BURST, 0)
        check(lib.sv_plane_set_limits(self._plane, native), "Can't set limits")

    def resize(self) -> bool:
        """Measure the image again; True: its capacity has changed, which the guest must hear.

        :raises DiskError: it can't be measured.
        """
        before = self._disk.capacity
        self._disk.measure()
        check(lib.sv_plane_resize(self._plane, self._disk.size), "Can't resize the disk")
        return self._disk.capacity != before

    def failures(self, kind: int) -> tuple[int, int]:
        """How many requests of a kind (SV_BLK_READ to SV_BLK_ZERO) the host has failed, and the
        errno of the last one."""
        error = ffi.new("int *")
        return int(lib.sv_plane_failures(self._plane, kind, error)), int(error[0])

    def watch_failures(self, fd: int) -> None:
        """Signal this eventfd for each of them. Before a ring runs."""
        check(lib.sv_plane_watch_failures(self._plane, fd), "Can't watch for I/O errors")

    def counters(self) -> list[dict[str, int]]:
        """The counters of each queue."""
        return [RECORD.decode(bytes(ffi.buffer(self._counters + i, RECORD.bytes)), 0)[0]
                for i in range(self.queue_count)]

    def close(self) -> None:
        """Stop everything, unmap everything. The image stays the caller's."""
        if self._plane != ffi.NULL:
            lib.sv_plane_destroy(self._plane)
            self._plane = ffi.NULL
        self._forget_inflight_fd()
