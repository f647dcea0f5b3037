"""A small device around the engine for small devices (native/ring), without a worker process."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

from native import _devices
from tests.support.guest_ring import F_VERSION_1, GuestMemory, GuestRing

ffi, lib = _devices.ffi, _devices.lib


def threads() -> int:
    """How many threads this process has."""
    return len(os.listdir("/proc/self/task"))


def until(condition: Callable[[], bool], limit: float = 10.0) -> None:
    """Wait for a condition."""
    deadline = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.002)  # between two looks


class RingPlane:
    """A device with guest memory and rings.

    :param create: makes the native device out of the counters and the place for the errno.
    :param counters: the C type of a queue's record.
    """

    def __init__(self, create: Callable[[Any, Any], Any], counters: str, queues: int = 1,
                 features: int = F_VERSION_1, memory: GuestMemory | None = None) -> None:
        self.memory = memory or GuestMemory()
        self.features = features
        self.counters = ffi.new(f"{counters}[]", queues)
        error = ffi.new("int *")
        self.device = create(self.counters, error)
        assert self.device, os.strerror(-error[0])
        self.check(lib.sv_ring_add_region(self.device, self.memory.base, self.memory.size, 0,
                                          self.memory.fd))
        self.check(lib.sv_ring_set_features(self.device, features))
        self.rings: dict[int, GuestRing] = {}

    @staticmethod
    def check(result: int) -> int:
        assert result >= 0, os.strerror(-result)
        return result

    def try_start(self, index: int, ring: GuestRing, base: int = 0, **fields: int) -> int:
        """0 or a negative errno; `fields`: of the place, instead of the ring's."""
        place: Any = ffi.new("struct sv_ring_place *", {
            "size": ring.size, "desc": ring.desc, "avail": ring.avail, "used": ring.used,
            "base": base, "kick_fd": ring.kick_fd, "call_fd": ring.call_fd,
            "err_fd": ring.err_fd, **fields})
        return int(lib.sv_ring_start(self.device, index, place))

    def start(self, index: int = 0, size: int = 64, base: int = 0,
              ring: GuestRing | None = None, **fields: int) -> GuestRing:
        ring = ring or GuestRing(self.memory, size, self.features)
        self.rings[index] = ring
        self.check(self.try_start(index, ring, base, **fields))
        return ring

    def stop(self, index: int = 0) -> int:
        return int(lib.sv_ring_stop(self.device, index))

    def broken(self, index: int = 0) -> str | None:
        reason = lib.sv_ring_broken(self.device, index)
        return None if reason == ffi.NULL else ffi.string(reason).decode()

    def offer(self, length: int, index: int = 0, pieces: int = 1,
              kick: bool = True) -> tuple[int, int]:
        """A chain with room for `length` bytes; its head and address."""
        address = self.memory.alloc(length, 16)
        self.memory.fill(address, length, 0)
        step = -(-length // pieces)
        head = self.rings[index].add([(address + at, min(step, length - at), True)
                                      for at in range(0, length, step)])
        self.rings[index].publish(kick)
        return head, address

    def die(self) -> None:
        """Its memory, rings and sockets are a successor's from now on."""
        lib.sv_ring_destroy(self.device)
        self.device = None

    def close(self) -> None:
        if not self.device:
            return
        lib.sv_ring_destroy(self.device)
        self.device = None
        for ring in self.rings.values():
            ring.close()
        self.memory.close()


def rng_plane(source: int, max_bytes: int = 0, period: int = 0, size: int = 64,
              **options: Any) -> RingPlane:
    """A virtio-rng device."""
    return RingPlane(lambda counters, error: lib.sv_rng_create(source, max_bytes, period, size,
                                                               counters, error),
                     "struct sv_rng_counters", **options)
