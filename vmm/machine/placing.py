"""The devices of a microvm come to their slots, while its guest takes its first steps.

What the guest looks for before it is there waits (`Vm.hold`).  Doorbells and interrupts
are made when a driver takes a device: KVM would wait for the running vCPUs here.
"""

from __future__ import annotations

from vmm.arch.x86_64 import layout
from vmm.machine.drivers import DRIVERS
from vmm.machine.machine import Device
from vmm.machine.slots import Slot
from vmm.transport.virtio_mmio import VirtioMmio

TYPE_CHECKING = False  # importing typing would cost 10 ms of the start
if TYPE_CHECKING:
    from vmm.devices.virtio_device import VirtioDevice
    from vmm.machine.family import Family
    from vmm.machine.microvm import MicroVmBuilder
    from vmm.machine.part import Part


def place_devices(builder: MicroVmBuilder, parts: list[Part]) -> None:
    """Families come first, each in its slots, empty ones included; then what stays for good.

    :raises VmmError: a device can't be made.
    """
    by_family: dict[str, list[Part]] = {}
    for part in parts:
        by_family.setdefault(DRIVERS[part.config.driver].family, []).append(part)
    for family in builder.machine.families:
        _fill(builder, family, by_family.get(family.name, []))
    for part in by_family.get("", []):
        _place(builder, part, None, 0)


def _fill(builder: MicroVmBuilder, family: Family, parts: list[Part]) -> None:
    machine = builder.machine
    family.first = len(machine.slots)
    for index, part in enumerate(parts):
        _place(builder, part, family, index)
    # The guest looks for devices when it boots: those that come later go where it has looked.
    for index in range(len(parts), family.count):
        device = family.make_empty("", machine.memory, builder.loop, builder.config)
        slot = _add_slot(builder, device, family, index, replaceable=True)
        device.rename(slot.empty_name)


def _place(builder: MicroVmBuilder, part: Part, family: Family | None, index: int) -> None:
    device = part.make(builder)
    slot = _add_slot(builder, device, family, index,
                     replaceable=family is not None and part.worker is not None)
    slot.occupant = Device(part.name, part.config.driver, slot.number, device,
                           slot.transport, part.worker, part.kind)
    builder.machine.devices[part.name] = slot.occupant


def _add_slot(builder: MicroVmBuilder, device: VirtioDevice, family: Family | None, index: int,
              replaceable: bool) -> Slot:
    machine = builder.machine
    number = len(machine.slots)
    base = layout.virtio_base(number)
    transport = VirtioMmio(machine.vm, machine.memory, base, layout.virtio_gsi(number), device,
                           lazy=True)
    builder.mmio.add(base, layout.VIRTIO_MMIO_SIZE, transport)
    slot = Slot(number, device, transport, replaceable, family, index)
    machine.slots.append(slot)
    return slot
