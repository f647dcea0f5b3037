"""A BackendDevice that records calls and serves a tiny config space; no ring is processed."""

from __future__ import annotations

import errno
import mmap
import os
from typing import TYPE_CHECKING

from shared.vhost_user.backend import BackendDevice, RefusedError, Ring
from shared.vhost_user.messages import Inflight

if TYPE_CHECKING:
    from collections.abc import Sequence

    from shared.memory_regions import MemoryRegion

FEATURES = (1 << 32) | (1 << 9) | (1 << 6)


class FakeBackendDevice(BackendDevice):
    """Records every call in `calls`; rings "process" nothing, `stop_ring` adds `served`."""

    def __init__(self, queue_count: int = 2, max_queue_size: int = 256) -> None:
        self.queue_count = queue_count
        self.max_queue_size = max_queue_size
        self.calls: list[tuple[object, ...]] = []
        self.config = bytearray(range(60))
        self.memory: dict[int, mmap.mmap] = {}
        self.served = 0
        self.acked = 0
        self.inflight_fd = -1
        self.fail: Exception | None = None  # raised by the next call that changes anything

    def _record(self, *call: object) -> None:
        self.calls.append(call)
        if self.fail is not None:
            error, self.fail = self.fail, None
            raise error

    def features(self) -> int:
        return FEATURES

    def set_features(self, features: int) -> None:
        self._record("set_features", features)
        self.acked = features

    def read_config(self, offset: int, size: int) -> bytes:
        if self.fail is not None:
            error, self.fail = self.fail, None
            raise error
        return bytes(self.config[offset:offset + size]).ljust(size, b"\0")

    def write_config(self, offset: int, data: bytes, migration: bool) -> None:
        if offset < 32 and not migration:
            raise RefusedError(errno.EACCES, "The field is read-only")
        self._record("write_config", offset, data, migration)
        self.config[offset:offset + len(data)] = data

    def set_memory(self, regions: Sequence[tuple[MemoryRegion, int]]) -> None:
        self._record("set_memory", [region for region, _ in regions])
        for mapping in self.memory.values():
            mapping.close()
        self.memory = {region.guest_addr: self._map(region, fd) for region, fd in regions}

    def add_memory(self, region: MemoryRegion, fd: int) -> None:
        self._record("add_memory", region)
        self.memory[region.guest_addr] = self._map(region, fd)

    def remove_memory(self, region: MemoryRegion) -> None:
        self._record("remove_memory", region)
        self.memory.pop(region.guest_addr).close()

    @staticmethod
    def _map(region: MemoryRegion, fd: int) -> mmap.mmap:
        return mmap.mmap(fd, region.file_offset + region.size)

    def start_ring(self, ring: Ring) -> None:
        self._record("start_ring", ring.index, ring.size, ring.desc, ring.avail, ring.used,
                     ring.base, ring.enabled)

    def stop_ring(self, ring: Ring) -> int:
        self._record("stop_ring", ring.index)
        return (ring.base + self.served) & 0xFFFF

    def enable_ring(self, ring: Ring, enabled: bool) -> None:
        self._record("enable_ring", ring.index, enabled)

    def change_call(self, ring: Ring, fd: int) -> None:
        self._record("change_call", ring.index, fd >= 0)

    def get_inflight(self, queue_count: int, queue_size: int) -> tuple[Inflight, int]:
        self._record("get_inflight", queue_count, queue_size)
        if self.inflight_fd >= 0:
            os.close(self.inflight_fd)
        self.inflight_fd = os.memfd_create("inflight")
        size = queue_count * (16 + 16 * queue_size)
        os.ftruncate(self.inflight_fd, size)
        return Inflight(size, 0, queue_count, queue_size), self.inflight_fd

    def set_inflight(self, inflight: Inflight, fd: int) -> None:
        self._record("set_inflight", inflight.mmap_size, inflight.queue_count)

    def reset(self) -> None:
        self._record("reset")
