"""The registers of a virtio device that C serves (native/core/virtio.h, virtio_mmio.c).

The guest drafts features and queues there, from any vCPU and at any time, without Python; what
is read here is one reading of it, to be checked and used, never to be read again.  KVM's run
loop and the fake hypervisor have the same C behind it.
"""

from __future__ import annotations

from native._core import ffi, lib
from vmm.errors import HypervisorError

TYPE_CHECKING = False  # importing typing for it would cost 10 ms of the start
if TYPE_CHECKING:
    from collections.abc import Sequence

CONFIG_SIZE: int = lib.SV_VIRTIO_CONFIG_SIZE  # bytes that a slot has for a config space


class VirtioRegisters:
    """What C knows of one device. The setters want a lock of the caller's: one at a time, but
    for `raise_bits`.

    :raises HypervisorError: too many queues.
    """

    __slots__ = ("handle",)

    def __init__(self, device_id: int, queue_sizes: Sequence[int]) -> None:
        out = ffi.new("struct sv_virtio **")
        result = lib.sv_virtio_create(device_id, queue_sizes, len(queue_sizes), out)
        if result < 0:
            raise HypervisorError(f"A virtio device can't have {len(queue_sizes)} queues",
                                  f"there can be {lib.SV_VIRTIO_MAX_QUEUES}")
        self.handle = ffi.gc(out[0], lib.sv_virtio_put)

    # ---- what the driver sees ---------------------------------------------------------------

    def set_status(self, status: int) -> None:
        """The device status (virtio 1.2, 2.1)."""
        lib.sv_virtio_set_status(self.handle, status)

    def set_generation(self, generation: int) -> None:
        """ConfigGeneration. Who reads the new one reads no config space of before."""
        lib.sv_virtio_set_generation(self.handle, generation)

    def set_offered(self, features: int) -> None:
        """The features on offer, until `forget`: C answers for them from now on."""
        lib.sv_virtio_set_offered(self.handle, features)

    def set_config(self, config: bytes) -> None:
        """The config space, until `forget`; at most CONFIG_SIZE bytes, zeroes follow."""
        if lib.sv_virtio_set_config(self.handle, config, len(config)) < 0:
            raise ValueError(f"no room for a config space of {len(config)} bytes")

    def forget(self) -> None:
        """Let Python be asked for features and config space again."""
        lib.sv_virtio_forget(self.handle)

    def set_ready(self, index: int, ready: bool) -> None:
        """QueueReady of one queue; its draft is closed while it is 1."""
        lib.sv_virtio_set_ready(self.handle, index, ready)

    def set_live(self, live: bool) -> None:
        """Bit 0 of InterruptStatus reads as 1 (True), because the core can't see the back end's
        irqfd (ARCHITECTURE.md, "Interrupts"), or as stored (False)."""
        lib.sv_virtio_set_live(self.handle, live)

    def raise_bits(self, bits: int) -> None:
        """Set bits of InterruptStatus (1: used buffer, 2: configuration change); the caller
        signals the irqfd. Any thread."""
        lib.sv_virtio_raise(self.handle, bits)

    def reset(self) -> None:
        """No selector, feature, queue or interrupt is left of the last driver."""
        lib.sv_virtio_reset(self.handle)

    # ---- what the driver has drafted --------------------------------------------------------

    def driver_features(self) -> int:
        """The 64 bits of DriverFeatures."""
        return int(lib.sv_virtio_driver_features(self.handle))

    def device_features_sel(self) -> int:
        """DeviceFeaturesSel."""
        return int(lib.sv_virtio_device_features_sel(self.handle))

    def queue_sel(self) -> int:
        """QueueSel; there need not be such a queue."""
        return int(lib.sv_virtio_queue_sel(self.handle))

    def queue(self, index: int) -> tuple[int, int, int, int]:
        """Size and addresses of a queue: descriptor table, driver area, device area."""
        draft = ffi.new("struct sv_virtio_draft *")
        if lib.sv_virtio_queue(self.handle, index, draft) < 0:
            raise IndexError(index)
        return draft.size, draft.desc, draft.avail, draft.used

    # ---- accesses, as the run loop makes them -----------------------------------------------

    def read(self, offset: int, size: int) -> int | None:
        """What the guest reads from the slot; None: C leaves it to Python."""
        data = ffi.new("uint8_t[8]")
        if lib.sv_virtio_mmio(self.handle, offset, size, False, data) != lib.SV_SERVED:
            return None
        return int.from_bytes(ffi.buffer(data, size), "little")

    def write(self, offset: int, size: int, value: int) -> bool:
        """Whether C has taken what the guest wrote to the slot."""
        data = ffi.new("uint8_t[8]", value.to_bytes(8, "little"))
        return bool(lib.sv_virtio_mmio(self.handle, offset, size, True, data) == lib.SV_SERVED)
