"""A slot with a device that records what is asked of it, for tests of the transport."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tests.support.guest_ring import GuestMemory, GuestRing
from tests.support.mmio_driver import FakeGuestMemory, MmioDriver, drain
from vmm.devices.virtio_device import QueueConfig, VirtioDevice, shown
from vmm.hypervisor.fake import FakeVm
from vmm.transport import mmio_registers as r
from vmm.transport.virtio_mmio import VirtioMmio

BASE = 0xF0100000
GSI = 5
OFFERED = 1 << 32 | 1 << 9 | 1 << 6
RAM_BASE = 0x1_0000_0000  # needs the high halves of the address registers


class FakeDevice(VirtioDevice):
    offered: int = shown()
    config: bytes = shown()
    device_id = 2
    keeps_shown = True
    id = "disk0"
    queue_sizes = (256, 128)

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.offered = OFFERED
        self.config = bytes(range(64))
        self.activated: tuple[int, list[QueueConfig]] | None = None
        self.errors: dict[str, Exception] = {}
        self.written: list[tuple[int, bytes]] = []
        self.hook: Callable[[], None] = lambda: None

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if name in self.errors:
            raise self.errors[name]

    def features(self) -> int:
        if "features" in self.errors:
            raise self.errors["features"]
        return self.offered

    def read_config(self, offset: int, size: int) -> bytes:
        if "read_config" in self.errors:
            raise self.errors["read_config"]
        return self.config[offset:offset + size].ljust(size, b"\0")

    def write_config(self, offset: int, data: bytes) -> None:
        self._call("write_config")
        self.written.append((offset, data))

    def activate(self, features: int, queues: Sequence[QueueConfig]) -> None:
        self.hook()
        self.activated = (features, list(queues))
        self._call("activate")

    def reset(self) -> None:
        self._call("reset")

    def pause(self, deadline: float) -> None:
        self._call("pause")

    def resume(self) -> None:
        self._call("resume")

    def close(self) -> None:
        self._call("close")


class Slot:
    def __init__(self) -> None:
        self.ram = GuestMemory(1 << 20, RAM_BASE)
        self.ring = GuestRing(self.ram, 128)
        self.vm = FakeVm()
        self.device = FakeDevice()
        self.transport = VirtioMmio(self.vm, FakeGuestMemory(self.ram), BASE, GSI,  # type: ignore[arg-type]
                                    self.device)
        self.driver = MmioDriver(self.transport)

    @property
    def interrupt(self) -> int:
        return self.driver.read(r.INTERRUPT_STATUS)

    @property
    def config_interrupts(self) -> int:
        return drain(self.transport._config_fd)

    def negotiate(self) -> None:
        assert self.driver.take_features(OFFERED)

    def set_queue(self, index: int = 0) -> bool:
        ring = self.ring
        return self.driver.set_queue(index, 128, ring.desc, ring.avail, ring.used)

    def run(self) -> None:
        self.negotiate()
        assert self.set_queue()
        self.driver.add_status(r.DRIVER_OK)

    def close(self) -> None:
        self.transport.close()
        self.ring.close()
        self.ram.close()
