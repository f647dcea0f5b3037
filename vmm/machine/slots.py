"""The slots of a microVM: visible to the guest from boot, whatever is in them.

A slot is one transport and one virtio device for the whole life of the VM; what changes is the
back end behind the device: nobody, the null back end, a worker.  Disks and NICs come and go in
the slots of their family (vmm/machine/family.py); every other device has a slot for good.
"""

from __future__ import annotations

TYPE_CHECKING = False  # importing typing would cost 10 ms of the start
if TYPE_CHECKING:
    from vmm.devices.slot_device import SlotDevice
    from vmm.devices.vhost_user import VhostUserDevice
    from vmm.devices.virtio_device import VirtioDevice
    from vmm.machine.family import Family
    from vmm.machine.machine import Device
    from vmm.transport.virtio_mmio import VirtioMmio


class Slot:
    """One slot.

    number: its place among all slots, from 0; index: its place in its family, from 0; family:
    None for a device that stays; occupant: the user's device in it; replaceable: a worker of
    ours serves it, or nobody, so that devices can come and go.
    """

    __slots__ = ("device", "family", "index", "number", "occupant", "replaceable", "transport")

    def __init__(self, number: int, device: VirtioDevice, transport: VirtioMmio,
                 replaceable: bool, family: Family | None = None, index: int = 0) -> None:
        self.number = number
        self.device = device
        self.transport = transport
        self.replaceable = replaceable
        self.family = family
        self.index = index
        self.occupant: Device | None = None

    @property
    def vhost(self) -> SlotDevice:
        """The device of a slot in a family."""
        assert self.family is not None
        return self.device  # type: ignore[return-value]

    @property
    def answered(self) -> VhostUserDevice:
        """The device of a slot where the null back end can answer (`has_null`)."""
        return self.device  # type: ignore[return-value]

    @property
    def empty_name(self) -> str:
        """What the slot's device is called in logs while nobody is in it."""
        return f"#{self.family.name}.{self.index}" if self.family is not None else self.device.id
