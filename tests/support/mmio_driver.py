"""A driver for a virtio-mmio slot, and guest memory over a test ring's RAM; no KVM."""

from __future__ import annotations

import os
import select

from shared.memory_regions import MemoryRegion
from tests.support.guest_ring import GuestMemory as RingMemory
from vmm.errors import MemoryAccessError
from vmm.transport import mmio_registers as r
from vmm.transport.virtio_mmio import VirtioMmio

USER_BASE = 0x7F00_0000_0000


class FakeGuestMemory:
    """vmm.memory.GuestMemory as transports and devices see it, over a test ring's memfd."""

    def __init__(self, ram: RingMemory) -> None:
        self.ram = ram
        self.fd = ram.fd
        self.regions = [ring_region(ram)]
        self.holds: list[bool] = []  # what hold_huge_pages was told

    def host_address(self, gpa: int, size: int) -> int:
        if not self.ram.base <= gpa <= gpa + size <= self.ram.base + self.ram.size:
            raise MemoryAccessError(f"{gpa:#x} is outside RAM")
        return USER_BASE + gpa

    def hold_huge_pages(self, held: bool) -> None:
        self.holds.append(held)

    def read(self, gpa: int, size: int) -> bytes:
        self.host_address(gpa, size)
        return self.ram.read(gpa, size)


def ring_region(ram: RingMemory) -> MemoryRegion:
    """The one region of a test ring's RAM."""
    return MemoryRegion(ram.base, ram.size, USER_BASE + ram.base, 0)


def readable(fd: int) -> bool:
    """Whether `fd` is readable now."""
    return bool(select.select([fd], [], [], 0)[0])


def drain(fd: int) -> int:
    """The counter of an eventfd, 0 if it is not set."""
    try:
        return os.eventfd_read(fd)
    except BlockingIOError:
        return 0


class MmioDriver:
    """What a guest's driver does with a virtio-mmio slot, step by step."""

    def __init__(self, transport: VirtioMmio) -> None:
        self.transport = transport
        self.registers = transport._registers
        self.forwarded: list[int] = []  # offsets of what Python had to serve

    def load(self, offset: int, size: int) -> int:
        """A read as the run loop makes it: C's, else Python's."""
        value = self.registers.read(offset, size)
        if value is None:
            self.forwarded.append(offset)
            value = self.transport.read(offset, size)
        return value

    def store(self, offset: int, size: int, value: int) -> None:
        """A write as the run loop makes it."""
        if not self.registers.write(offset, size, value):
            self.forwarded.append(offset)
            self.transport.write(offset, size, value)

    def read(self, register: int) -> int:
        return self.load(register, 4)

    def write(self, register: int, value: int) -> None:
        self.store(register, 4, value)

    @property
    def status(self) -> int:
        return self.read(r.STATUS)

    def add_status(self, bits: int) -> None:
        self.write(r.STATUS, self.status | bits)

    def reset(self) -> None:
        self.write(r.STATUS, 0)

    def features(self) -> int:
        result = 0
        for half in (0, 1):
            self.write(r.DEVICE_FEATURES_SEL, half)
            result |= self.read(r.DEVICE_FEATURES) << (32 * half)
        return result

    def take_features(self, features: int) -> bool:
        """Acknowledge, set features and FEATURES_OK; whether the device agreed."""
        self.add_status(r.ACKNOWLEDGE)
        self.add_status(r.DRIVER)
        for half in (0, 1):
            self.write(r.DRIVER_FEATURES_SEL, half)
            self.write(r.DRIVER_FEATURES, features >> (32 * half) & 0xFFFF_FFFF)
        self.add_status(r.FEATURES_OK)
        return bool(self.status & r.FEATURES_OK)

    def set_queue(self, index: int, size: int, desc: int, avail: int, used: int) -> bool:
        """Set a queue up; whether it became ready."""
        self.write(r.QUEUE_SEL, index)
        self.write(r.QUEUE_SIZE, size)
        for low, address in ((r.QUEUE_DESC_LOW, desc), (r.QUEUE_DRIVER_LOW, avail),
                             (r.QUEUE_DEVICE_LOW, used)):
            self.write(low, address & 0xFFFF_FFFF)
            self.write(low + 4, address >> 32)
        self.write(r.QUEUE_READY, 1)
        return bool(self.read(r.QUEUE_READY))

    def config(self, offset: int, size: int) -> int:
        return self.load(r.CONFIG + offset, size)
