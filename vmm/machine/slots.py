"""The slots of a microVM: visible to the guest from boot, whatever is in them.

A slot is one transport and one virtio device for the whole life of the VM; what changes is the
back end behind the device: nobody, the null back end, a worker.
"""

from __future__ import annotations

TYPE_CHECKING = False  # importing typing would cost 10 ms of the start
if TYPE_CHECKING:
    from vmm.devices.virtio_blk import VirtioBlk
    from vmm.machine.machine import Device
    from vmm.transport.virtio_mmio import VirtioMmio

BLOCK_SLOTS = 6  # vda..vdf


class Slot:
    """One slot.

    number: its place, from 0; occupant: the user's device in it; replaceable: a worker of ours
    serves it, or nobody, so that disks can come and go.
    """

    __slots__ = ("device", "number", "occupant", "replaceable", "transport")

    def __init__(self, number: int, device: VirtioBlk, transport: VirtioMmio,
                 replaceable: bool) -> None:
        self.number = number
        self.device = device
        self.transport = transport
        self.replaceable = replaceable
        self.occupant: Device | None = None


def empty_name(number: int) -> str:
    """What an empty slot's device is called in logs."""
    return f"#slot.{number}"
