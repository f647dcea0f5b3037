"""The microvm: no PCI, a row of virtio-mmio slots, one 16550, ACPI in its hardware-reduced form.

Read `build` from top to bottom: it is the order of set-up, and each step stands where it does
for a reason (ARCHITECTURE.md, "Start-up"; measured):

1. the groundwork is under way (groundwork.py): RAM, KVM, the copy of the kernel;
2. what can be refused cheaply (images, sockets) is opened;
3. workers come up meanwhile: their first message is sent before they exist;
4. interrupts need KVM's VM, the guest's first instruction its kernel: waited for there.
"""

from __future__ import annotations

from vmm.arch.x86_64 import layout, setup
from vmm.arch.x86_64.topology import Topology
from vmm.block.family import BlockFamily, open_drive
from vmm.boot.loading import Loading
from vmm.bus.address_space import AddressSpace
from vmm.chardev import create_chardev
from vmm.confinement import thread_stages, vcpu_confinement
from vmm.devices.ged import GenericEventDevice
from vmm.devices.serial import Serial
from vmm.errors import ConfigError
from vmm.machine.machine import Device, Machine
from vmm.machine.part import Part, device_name
from vmm.machine.slots import Slot
from vmm.net.family import NetFamily
from vmm.transport.virtio_mmio import VirtioMmio
from vmm.vcpu import VcpuThread

TYPE_CHECKING = False  # importing typing would cost 10 ms of the start
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.cleanup import Cleanup
    from vmm.config.model import VmConfig
    from vmm.devices.virtio_device import VirtioDevice
    from vmm.event_loop import EventLoop
    from vmm.machine.family import Family
    from vmm.machine.groundwork import Groundwork
    from vmm.worker.nursery import Nursery


class MicroVmBuilder:
    """Builds one microvm; `on_vcpu_end(kind, vcpu)` is called on a vCPU's thread."""

    def __init__(self, config: VmConfig, groundwork: Groundwork, nursery: Nursery | None,
                 loop: EventLoop, cleanup: Cleanup,
                 on_vcpu_end: Callable[[int, VcpuThread], None]) -> None:
        self.config = config
        self.groundwork = groundwork
        self.nursery = nursery
        self.loop = loop
        self.cleanup = cleanup
        self.on_vcpu_end = on_vcpu_end
        self.machine = Machine()
        self.machine.nursery = nursery
        self.machine.memory = groundwork.memory
        self.machine.vm = groundwork.vm
        self.machine.thread_stages = thread_stages(config.sandbox)
        self.mmio = AddressSpace()
        self.ports = AddressSpace()

    def build(self) -> Machine:
        """The whole machine, vCPUs set up but not started.

        :raises VmmError: something can't be had; what was opened is closed by `cleanup`.
        """
        machine = self.machine
        machine.families = (BlockFamily(), NetFamily(self.config))
        self._open_nodes()
        if self.config.memory.prealloc:
            machine.memory.populate()
        parts = self._start_parts()
        self._make_chardevs()
        machine.vm.wait()
        self._make_legacy()
        self._make_devices(parts)
        loading = self.groundwork.loading
        self._make_vcpus(setup.write_tables(machine.memory, self.config, loading, self._slots()))
        loading.wait()
        machine.kernel_end = loading.kernel.end
        machine.reload = self._reload
        return machine

    def _slots(self) -> list[tuple[int, int, int]]:
        return [(layout.virtio_base(slot.number), layout.VIRTIO_MMIO_SIZE,
                 layout.virtio_gsi(slot.number)) for slot in self.machine.slots]

    def _reload(self) -> None:
        """Power-on again: interrupt controllers, kernel, tables, registers. RAM keeps the rest."""
        machine = self.machine
        machine.vm.reset()
        loading = Loading(machine.memory, self.config.boot, fresh=False)
        try:
            entry = setup.write_tables(machine.memory, self.config, loading, self._slots())
        finally:
            loading.cancel()
        loading.wait()
        for vcpu in machine.vm.vcpus:
            setup.reset_vcpu(vcpu, entry, vcpu.index)

    # ---- back ends -------------------------------------------------------------------------

    def _open_nodes(self) -> None:
        machine = self.machine
        for drive in self.config.drives.values():
            node = open_drive(drive, machine.blocks)
            self.cleanup.push(node.close)
            machine.blocks[drive.id] = node
        for netdev in self.config.netdevs.values():
            from vmm.net.node import open_netdev

            net = open_netdev(netdev)
            self.cleanup.push(net.close)
            machine.nets[netdev.id] = net

    def _start_parts(self) -> list[Part]:
        """The devices of the command line; their workers are asked for."""
        parts = []
        for number, device in enumerate(self.config.devices):
            find = PARTS.get(device.driver)
            if find is not None:  # else it belongs to another device
                part = find()(device, device_name(device, number))
                part.start(self)
                parts.append(part)
        return parts

    # ---- the board -------------------------------------------------------------------------

    def _make_chardevs(self) -> None:
        for config in self.config.chardevs.values():
            if config.id in self._backend_chardevs():
                continue  # a vhost-user socket: the device connects it itself
            chardev = create_chardev(config, self.loop)
            self.cleanup.push(chardev.close)
            self.machine.chardevs[config.id] = chardev

    def _backend_chardevs(self) -> set[str]:
        names = {device.options.get("chardev", "") for device in self.config.devices
                 if device.driver.startswith("vhost-user-")}
        return names | {netdev.chardev for netdev in self.config.netdevs.values()}

    def _make_legacy(self) -> None:
        machine = self.machine
        machine.vm.add_power_registers(layout.POWER_BASE)
        machine.ged = GenericEventDevice(machine.vm, layout.GED_GSI)
        self.cleanup.push(machine.ged.close)
        self.mmio.add(layout.GED_BASE, layout.GED_SIZE, machine.ged)
        if self.config.serial is not None:
            machine.uart = machine.vm.add_uart(layout.COM1_PORT, layout.COM1_GSI)
            serial = Serial(machine.uart, machine.chardevs[self.config.serial], self.loop)
            self.cleanup.push(serial.close)

    # ---- virtio ----------------------------------------------------------------------------

    def _make_devices(self, parts: list[Part]) -> None:
        for family in self.machine.families:
            self._make_family(family, [part for part in parts if part.family == family.name])
        for part in parts:
            if not part.family:
                self._place(part, None, 0)

    def _make_family(self, family: Family, parts: list[Part]) -> None:
        for part in parts[family.count:]:
            raise ConfigError(f"A maximum of {family.count} {family.name} replaceable devices are "
                              f"supported: -device {part.config.driver} is one too many",
                              "remove it")
        family.first = len(self.machine.slots)
        for index, part in enumerate(parts):
            self._place(part, family, index)
        # The guest looks for devices when it boots: those that come later go where it has looked.
        for index in range(len(parts), family.count):
            device = family.make_empty("", self.machine.memory, self.loop, self.config)
            slot = self._add_slot(device, family, index, replaceable=True, lazy=True)
            device.rename(slot.empty_name)

    def _place(self, part: Part, family: Family | None, index: int) -> None:
        device = part.make(self)
        slot = self._add_slot(device, family, index, lazy=False,
                              replaceable=family is not None and part.worker is not None)
        slot.occupant = Device(part.name, part.config.driver, slot.number, device,
                               slot.transport, part.worker, part.kind)
        self.machine.devices[part.name] = slot.occupant

    def _add_slot(self, device: VirtioDevice, family: Family | None, index: int,
                  replaceable: bool, lazy: bool) -> Slot:
        machine = self.machine
        number = len(machine.slots)
        try:
            base, gsi = layout.virtio_base(number), layout.virtio_gsi(number)
        except ValueError:
            raise ConfigError(f"IRQ number exhausted: there is no place for the device "
                              f"{device.id}", "remove a -device") from None
        transport = VirtioMmio(machine.vm, machine.memory, base, gsi, device, lazy)
        self.mmio.add(base, layout.VIRTIO_MMIO_SIZE, transport)
        slot = Slot(number, device, transport, replaceable, family, index)
        machine.slots.append(slot)
        return slot

    # ---- vCPUs -----------------------------------------------------------------------------

    def _make_vcpus(self, entry: setup.EntryPoint) -> None:
        machine = self.machine
        self.cleanup.push(machine.stop_vcpus)
        topology = Topology(self.config.cpu)
        rows = self.groundwork.hypervisor.supported_cpuid()
        for index in range(self.config.cpu.count):
            handle = machine.vm.create_vcpu(topology.apic_id(index))  # its KVM id is its APIC id
            handle.index = index
            setup.setup_vcpu(handle, entry, index, topology, rows)
            vcpu = VcpuThread(handle, self.mmio, self.ports, self.on_vcpu_end,
                              vcpu_confinement(self.config.sandbox))
            machine.vcpus.append(vcpu)
            vcpu.spawn()  # it confines itself meanwhile


def _disk() -> type[Part]:
    from vmm.block.part import DiskPart

    return DiskPart


def _foreign_disk() -> type[Part]:
    from vmm.block.part import ForeignDiskPart

    return ForeignDiskPart


def _nic() -> type[Part]:
    from vmm.net.part import NicPart

    return NicPart


def _vsock() -> type[Part]:
    from vmm.machine.vhost_parts import VsockPart

    return VsockPart


def _folder() -> type[Part]:
    from vmm.machine.vhost_parts import FolderPart

    return FolderPart


def _rng() -> type[Part]:
    from vmm.rng.part import RngPart

    return RngPart


def _serial() -> type[Part]:
    from vmm.console.part import SerialPart

    return SerialPart


def _balloon() -> type[Part]:
    from vmm.balloon.part import BalloonPart

    return BalloonPart


# What each -device is; imported when the command line names it.
PARTS: dict[str, Callable[[], type[Part]]] = {
    "virtio-blk-device": _disk,
    "vhost-user-blk-device": _foreign_disk,
    "virtio-net-device": _nic,
    "vhost-vsock-device": _vsock,
    "vhost-user-fs-device": _folder,
    "virtio-rng-device": _rng,
    "virtio-serial-device": _serial,
    "virtio-balloon-device": _balloon,
}
