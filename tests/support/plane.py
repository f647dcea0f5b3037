"""A data plane around an image, driven without any worker process: for tests of the C code."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from native import _dataplane
from tests.support.capabilities import require
from tests.support.guest_ring import BlkRequest, GuestMemory, GuestRing

ffi, lib = _dataplane.ffi, _dataplane.lib


class Plane:
    """One plane with guest memory; `ring(i)` makes and `start(i)` starts queues."""

    def __init__(self, path: str, engine: str = "io_uring", queues: int = 1, direct: bool = False,
                 readonly: bool = False, unmap: bool = True, writeback: bool = True,
                 queue_size: int = 256, align: int = 512, memory: GuestMemory | None = None,
                 **fields: object) -> None:
        if engine == "io_uring":
            require("io_uring")
        flags = os.O_RDONLY if readonly else os.O_RDWR
        if direct and not Path(path).is_fifo():
            flags |= os.O_DIRECT
        self.fd = os.open(path, flags | os.O_CLOEXEC)
        size = os.fstat(self.fd).st_size
        self.memory = memory or GuestMemory()
        self.counters = ffi.new("struct sv_blk_counters[]", queues)
        disk = ffi.new("struct sv_disk *")
        disk.fd = self.fd
        disk.readonly = readonly
        disk.direct = direct
        disk.unmap = unmap
        disk.writeback = writeback
        disk.size = size
        disk.capacity = -(-size // 512)
        disk.align = align if direct else 1
        disk.memory_align = align if direct else 1
        disk.id = b"serial-of-the-test".ljust(20, b"\0")
        for name, value in fields.items():
            setattr(disk, name, value)
        kind = lib.SV_ENGINE_URING if engine == "io_uring" else lib.SV_ENGINE_THREADS
        error = ffi.new("int *")
        self.plane = lib.sv_plane_create(disk, queues, queue_size, kind, self.counters, error)
        assert self.plane, os.strerror(-error[0])
        self.check(lib.sv_plane_add_region(self.plane, self.memory.base, self.memory.size, 0,
                                           self.memory.fd))
        self.rings: dict[int, GuestRing] = {}

    @staticmethod
    def check(result: int) -> int:
        assert result >= 0, os.strerror(-result)
        return result

    def setup(self, ring: GuestRing, base: int = 0) -> Any:
        return ffi.new("struct sv_ring_setup *", {
            "size": ring.size, "desc": ring.desc, "avail": ring.avail, "used": ring.used,
            "features": ring.features, "base": base, "kick_fd": ring.kick_fd,
            "call_fd": ring.call_fd, "err_fd": ring.err_fd})

    def start(self, index: int = 0, size: int = 128, features: int = 1 << 32,
              base: int = 0, ring: GuestRing | None = None) -> GuestRing:
        if ring is None:
            ring = GuestRing(self.memory, size, features)
        self.rings[index] = ring
        self.check(lib.sv_queue_start(self.plane, index, self.setup(ring, base)))
        return ring

    def stop(self, index: int = 0) -> int:
        return int(lib.sv_queue_stop(self.plane, index))

    def broken(self, index: int = 0) -> str | None:
        reason = lib.sv_queue_broken(self.plane, index)
        return None if reason == ffi.NULL else ffi.string(reason).decode()

    def request(self, type_: int, sector: int = 0, data: bytes = b"", room: int = 0,
                index: int = 0, segments: int = 1, indirect: bool = False,
                change: Callable[[BlkRequest], None] | None = None) -> BlkRequest:
        """Do one request and wait for its end."""
        request = BlkRequest(self.memory, type_, sector, data, room, segments)
        if change:
            change(request)
        ring = self.rings[index]
        ring.add(request.buffers, indirect)
        ring.publish()
        ring.wait_used(1)
        return request

    def close(self) -> None:
        lib.sv_plane_destroy(self.plane)
        for ring in self.rings.values():
            ring.close()
        self.memory.close()
        os.close(self.fd)
