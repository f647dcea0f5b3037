"""virtio-blk over vhost-user: features, config space, queues. The data plane is native."""

from __future__ import annotations

import fcntl
import posix as os

from native import _dataplane
from shared.errors import SandboxError, SharedError, check
from shared.throttling import BURST, LIMITS
from shared.vhost_user import messages as m
from shared.vhost_user.backend_device import SERVED_FEATURES
from shared.virtio import blk
from shared.virtio.features import F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1
from workers.errors import DiskError
from workers.queue_device import DataPlane, QueueDevice
from workers.startup import restrict_rings

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from workers.blk.disk import Disk

ffi, lib = _dataplane.ffi, _dataplane.lib

MAX_QUEUES = 32


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


class BlkDevice(QueueDevice):
    """One virtio-blk device.

    :param engine: "io_uring" or "threads".
    :param page: a statistics page (shared/statistics.py) in writable memory, or None.
    :param slot: offer what every slot offers (shared/virtio/blk.py), whatever the image is: to
        write to a read-only one is an I/O error.
    :param log: called with a line of text for what the front end can't be told.
    """

    plane = DataPlane(_dataplane, "sv_plane", "sv_queue", "sv_ring_setup")
    protocol_features = SERVED_FEATURES

    def __init__(self, disk: Disk, queues: int, queue_size: int, engine: str,
                 page: object | None, log: Callable[[str], None],
                 slot: bool = False) -> None:
        super().__init__("blk", queues, queue_size, page, log)
        self._disk = disk
        self._slot = slot
        self._features = 0
        self._writeback = True
        self._dirty = [0] * queues  # writes that the last stop of each ring has synced
        self.capacity_changed = False  # without an order: the front end must still be told
        self._inflight_fd = -1
        kind = lib.SV_ENGINE_THREADS
        if engine == "io_uring":
            kind = lib.SV_ENGINE_URING if restrict_rings() else lib.SV_ENGINE_URING_FREE
        error = ffi.new("int *")
        self.adopt(lib.sv_plane_create(disk.native(), queues, queue_size, kind, self._counters,
                                       error), error[0], f"{queues} queues with {engine}",
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
        """Without FLUSH and CONFIG_WCE every write is durable when it completes (5.2.6.2).

        Front ends send the same again with each start of the rings: what the driver has chosen
        since the last reset holds.
        """
        if features != self._features or not features & blk.F_CONFIG_WCE:
            self._features = features
            self._set_writeback(bool(features & (blk.F_FLUSH | blk.F_CONFIG_WCE)))

    def _set_writeback(self, writeback: bool) -> None:
        self._writeback = writeback
        check(lib.sv_plane_set_writeback(self.native, writeback), "Can't sync the image")

    # ---- rings -----------------------------------------------------------------------------

    def prepare(self, place: Any) -> None:
        """Features are told with each ring."""
        place.features = self._features
        if not self._running:
            # The image may have grown since this worker was started, to take over some day.
            self.capacity_changed |= self.resize()

    def _halt(self, index: int) -> int:
        # Everything in flight finished and, if something was written, synced. Not only where a
        # ring is stopped: QEMU disables it first.
        base = super()._halt(index)
        counters = self._counters[index]
        written = counters.writes + counters.discards + counters.write_zeroes
        if written != self._dirty[index]:
            self._dirty[index] = written
            error = lib.sv_plane_sync(self.native)
            if error < 0:
                self._log(f"Can't sync the image: {os.strerror(-error)}")
        return base

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
        check(lib.sv_plane_set_inflight(self.native, fd, inflight.mmap_offset, inflight.mmap_size,
                                        inflight.queue_count, inflight.queue_size),
              "Can't use the in-flight buffer")

    def _forget_inflight_fd(self) -> None:
        if self._inflight_fd >= 0:
            os.close(self._inflight_fd)
        self._inflight_fd = -1

    def reset(self) -> None:
        """Features, write-back mode and the in-flight buffer as at the start."""
        check(lib.sv_plane_set_inflight(self.native, -1, 0, 0, 0, 0), "Can't reset")
        self._forget_inflight_fd()
        self._features = 0
        self._set_writeback(True)

    # ---- own: what the guest doesn't ask for -----------------------------------------------

    def set_limits(self, limits: Mapping[str, int]) -> None:
        """Limits by the names of shared/throttling.py, for all queues together, at once."""
        native = ffi.new("struct sv_limits *")
        for i, name in enumerate(LIMITS):
            native.rate[i] = limits.get(name, 0)
            native.burst[i] = limits.get(name + BURST, 0)
        check(lib.sv_plane_set_limits(self.native, native), "Can't set limits")

    def resize(self) -> bool:
        """Measure the image again; True: its capacity has changed, which the guest must hear.

        :raises DiskError: it can't be measured.
        """
        before = self._disk.capacity
        self._disk.measure()
        check(lib.sv_plane_resize(self.native, self._disk.size), "Can't resize the disk")
        return self._disk.capacity != before

    def failures(self, kind: int) -> tuple[int, int]:
        """How many requests of a kind (SV_BLK_READ to SV_BLK_ZERO) the host has failed, and the
        errno of the last one."""
        error = ffi.new("int *")
        return int(lib.sv_plane_failures(self.native, kind, error)), int(error[0])

    def watch_failures(self, fd: int) -> None:
        """Signal this eventfd for each of them. Before a ring runs."""
        check(lib.sv_plane_watch_failures(self.native, fd), "Can't watch for I/O errors")

    def close(self) -> None:
        """Also let go of the record of what is in flight."""
        super().close()
        self._forget_inflight_fd()
