"""The microvm: no PCI, a row of virtio-mmio slots, one 16550, ACPI in its hardware-reduced form.

Read `build` from top to bottom: it is the order of set-up, and each step stands where it does
for a reason (ARCHITECTURE.md, "Start-up"; measured):

1. the groundwork is under way (groundwork.py): RAM, KVM, the copy of the kernel;
2. what can be refused cheaply (images, taps, sockets, places) is opened and counted;
3. interrupts need KVM's VM, the guest's first instruction its kernel: waited for there;
4. the guest runs, while workers are asked for (parts.py) and devices made (placing.py): what it
   looks for too early waits.
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
from vmm.hypervisor.interface import HOLD_GUEST
from vmm.machine.drivers import DRIVERS
from vmm.machine.machine import Machine
from vmm.net.family import NetFamily
from vmm.vcpu import VcpuThread

TYPE_CHECKING = False  # importing typing would cost 10 ms of the start
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.cleanup import Cleanup
    from vmm.config.model import VmConfig
    from vmm.event_loop import EventLoop
    from vmm.machine.groundwork import Groundwork
    from vmm.worker.nursery import Nursery


class MicroVmBuilder:
    """Builds one microvm.

    :param on_vcpu_end: called as `on_vcpu_end(kind, vcpu)` on a vCPU's thread.
    :param take_nursery: gives the nursery; called when the guest runs, or will do so no sooner.
    """

    def __init__(self, config: VmConfig, groundwork: Groundwork, loop: EventLoop,
                 cleanup: Cleanup, on_vcpu_end: Callable[[int, VcpuThread], None],
                 take_nursery: Callable[[], Nursery | None]) -> None:
        self.config = config
        self.groundwork = groundwork
        self.nursery: Nursery | None = None
        self.loop = loop
        self.cleanup = cleanup
        self.on_vcpu_end = on_vcpu_end
        self._take_nursery = take_nursery
        self.machine = Machine()
        self.machine.memory = groundwork.memory
        self.machine.vm = groundwork.vm
        self.machine.thread_stages = thread_stages(config.sandbox)
        self._places: list[tuple[int, int, int]] = []  # base, size and GSI of each slot
        self.mmio = AddressSpace()
        self.ports = AddressSpace()

    def build(self) -> Machine:
        """The whole machine. Unless `-S` was given the guest runs, up to the first access that
        needs a device: `Machine.open` lets it go on.

        :raises VmmError: something can't be had; what was opened is closed by `cleanup`.
        """
        machine = self.machine
        machine.families = (BlockFamily(), NetFamily(self.config))
        self._open_nodes()
        if self.config.memory.prealloc:
            machine.memory.populate()
        self._make_chardevs()
        self._check_slots()
        machine.vm.wait()
        self._make_legacy()
        loading = self.groundwork.loading
        self._make_vcpus(setup.write_tables(machine.memory, self.config, loading, self._places))
        loading.wait()
        machine.kernel_end = loading.kernel.end
        machine.reload = self._reload
        if not self.config.frozen:
            machine.run_early()
        self.nursery = machine.nursery = self._take_nursery()
        from vmm.machine.parts import start_parts

        parts = start_parts(self)
        from vmm.machine.placing import place_devices

        place_devices(self, parts)
        return machine

    def _check_slots(self) -> None:
        """Whether there is a place for each device, and where."""
        drivers = [device.driver for device in self.config.devices if device.driver in DRIVERS]
        count = sum(not DRIVERS[driver].family for driver in drivers)
        for family in self.machine.families:
            own = [driver for driver in drivers if DRIVERS[driver].family == family.name]
            for driver in own[family.count:]:
                raise ConfigError(f"A maximum of {family.count} {family.name} replaceable devices "
                                  f"are supported: -device {driver} is one too many", "remove it")
            count += family.count
        try:
            self._places = [(layout.virtio_base(number), layout.VIRTIO_MMIO_SIZE,
                             layout.virtio_gsi(number)) for number in range(count)]
        except ValueError:
            raise ConfigError("IRQ number exhausted: there is no place for so many devices",
                              "remove a -device") from None

    def _reload(self) -> None:
        """Power-on again: interrupt controllers, kernel, tables, registers. RAM keeps the rest."""
        machine = self.machine
        machine.vm.reset()
        loading = Loading(machine.memory, self.config.boot, fresh=False)
        try:
            entry = setup.write_tables(machine.memory, self.config, loading, self._places)
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

    # ---- vCPUs -----------------------------------------------------------------------------

    def _make_vcpus(self, entry: setup.EntryPoint) -> None:
        machine = self.machine
        self.cleanup.push(machine.stop_vcpus)
        self.cleanup.push(machine.open)  # who waits can't end
        machine.vm.hold(HOLD_GUEST)
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
            if not self.config.frozen:
                vcpu.resume()  # up to the guest, which is held
