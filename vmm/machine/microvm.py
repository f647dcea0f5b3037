"""The microvm: no PCI, a row of virtio-mmio slots, one 16550, ACPI in its hardware-reduced form.

Read `build` from top to bottom: it is the order of set-up, and each step stands where it does
for a reason (ARCHITECTURE.md, "Start-up"; measured):

1. what can be refused cheaply (images, sockets) is opened first;
2. memory slots go in before anything is on the I/O bus (0.1 ms against 5-11 ms);
3. the kernel is read on a thread while Python builds devices and tables;
4. workers come up meanwhile: their first message is sent before they exist.
"""

from __future__ import annotations

from vmm.arch.x86_64 import layout, setup
from vmm.arch.x86_64.topology import Topology
from vmm.block.image import open_image
from vmm.block.worker import BlockWorkers
from vmm.bus.address_space import AddressSpace
from vmm.chardev import create_chardev
from vmm.confinement import vcpu_confinement
from vmm.devices.ged import GenericEventDevice
from vmm.devices.serial import Serial
from vmm.devices.vhost_user import connect_backend
from vmm.devices.virtio_blk import VirtioBlk
from vmm.errors import ConfigError
from vmm.machine.machine import BlockNode, Device, Machine
from vmm.machine.slots import BLOCK_SLOTS, Slot, empty_name
from vmm.memory import GuestMemory
from vmm.transport.virtio_mmio import VirtioMmio
from vmm.vcpu import VcpuThread

TYPE_CHECKING = False  # importing typing would cost 10 ms of the start
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.cleanup import Cleanup
    from vmm.config.model import DeviceConfig, VmConfig
    from vmm.event_loop import EventLoop
    from vmm.hypervisor.kvm import KvmHypervisor
    from vmm.worker.nursery import Nursery
    from vmm.worker.process import WorkerProcess
    from vmm.worker.supervisor import Kind

    Served = tuple[WorkerProcess, Kind]

BLOCK_DRIVERS = ("virtio-blk-device", "vhost-user-blk-device")
WORKER_DRIVERS = ("virtio-blk-device",)  # those whose back end is a worker of ours


class MicroVmBuilder:
    """Builds one microvm; `on_vcpu_end(kind, vcpu)` is called on a vCPU's thread."""

    def __init__(self, config: VmConfig, hypervisor: KvmHypervisor, nursery: Nursery | None,
                 loop: EventLoop, cleanup: Cleanup,
                 on_vcpu_end: Callable[[int, VcpuThread], None]) -> None:
        self.config = config
        self.hypervisor = hypervisor
        self.nursery = nursery
        self.loop = loop
        self.cleanup = cleanup
        self.on_vcpu_end = on_vcpu_end
        self.machine = Machine()
        self.machine.nursery = nursery
        self.mmio = AddressSpace()
        self.ports = AddressSpace()

    def build(self) -> Machine:
        """The whole machine, vCPUs set up but not started.

        :raises VmmError: something can't be had; what was opened is closed by `cleanup`.
        """
        machine = self.machine
        self._open_images()
        self._make_memory()
        # A file behind -mem-path may hold an older life.
        fresh = self.config.memory.path is None
        loading = setup.start_loading(machine.memory, self.config.boot, fresh)
        self.cleanup.push(loading.cancel)
        workers = self._start_workers()
        machine.vm.create_irqchip()
        self._make_chardevs()
        self._make_legacy()
        self._make_devices(workers)
        self._make_vcpus(setup.write_tables(machine.memory, self.config, loading, self._slots()))
        machine.reload = self._reload
        return machine

    def _slots(self) -> list[tuple[int, int, int]]:
        return [(layout.virtio_base(slot.number), layout.VIRTIO_MMIO_SIZE,
                 layout.virtio_gsi(slot.number)) for slot in self.machine.slots]

    def _reload(self) -> None:
        """Power-on again: interrupt controllers, kernel, tables, registers. RAM keeps the rest."""
        machine = self.machine
        machine.vm.reset()
        loading = setup.start_loading(machine.memory, self.config.boot, fresh=False)
        entry = setup.write_tables(machine.memory, self.config, loading, self._slots())
        for vcpu in machine.vm.vcpus:
            setup.reset_vcpu(vcpu, entry, vcpu.index)

    # ---- back ends -------------------------------------------------------------------------

    def _open_images(self) -> None:
        for drive in self.config.drives.values():
            others = [node.image for node in self.machine.blocks.values()]
            try:
                image = open_image(drive, others=others)
            except ConfigError as error:
                option = f"-drive id={drive.id},file={drive.file}"
                raise ConfigError(f"{option}: {error.what}", error.hint) from error
            self.cleanup.push(image.close)
            self.machine.blocks[drive.id] = BlockNode(drive, image)

    def _start_workers(self) -> dict[int, Served]:
        """Ask the nursery for the worker of each device that needs one, by device number."""
        workers: dict[int, Served] = {}
        for number, device in enumerate(self.config.devices):
            if device.driver in WORKER_DRIVERS:
                workers[number] = self._start_block_worker(device, device_name(device, number))
        return workers

    def _start_block_worker(self, device: DeviceConfig, name: str) -> Served:
        node = self._take_block_node(device, name)
        assert self.nursery is not None  # every microvm has one
        kind = BlockWorkers(self.nursery, node, name, device.options)
        worker = kind.first()
        self.cleanup.push(worker.kill)
        return worker, kind

    def _take_block_node(self, device: DeviceConfig, name: str) -> BlockNode:
        drive_id = device.options.get("drive", "")
        node = self.machine.blocks.get(drive_id)
        if node is None:
            raise ConfigError(f"-device {device.driver}: there is no drive '{drive_id}'",
                              f"add -drive id={drive_id},file=…")
        if node.device_id is not None:
            raise ConfigError(f"-device {device.driver}: the drive '{drive_id}' already serves "
                              f"the device '{node.device_id}'", "give each device its own drive")
        node.device_id = name
        return node

    # ---- the board -------------------------------------------------------------------------

    def _make_memory(self) -> None:
        machine = self.machine
        machine.memory = GuestMemory(self.config.memory, self.config.machine.dump_guest_core)
        self.cleanup.push(machine.memory.close)
        machine.vm = self.hypervisor.create_vm()
        self.cleanup.push(machine.vm.close)
        for slot, region in enumerate(machine.memory.regions):
            machine.vm.set_memory(slot, region.guest_addr, region.size, region.user_addr)

    def _make_chardevs(self) -> None:
        for config in self.config.chardevs.values():
            if config.id in self._backend_chardevs():
                continue  # a vhost-user socket: the device connects it itself
            chardev = create_chardev(config, self.loop)
            self.cleanup.push(chardev.close)
            self.machine.chardevs[config.id] = chardev

    def _backend_chardevs(self) -> set[str]:
        return {device.options.get("chardev", "") for device in self.config.devices
                if device.driver.startswith("vhost-user-")}

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

    def _make_devices(self, workers: dict[int, Served]) -> None:
        disks = [(number, config) for number, config in enumerate(self.config.devices)
                 if config.driver in BLOCK_DRIVERS]
        for _, config in disks[BLOCK_SLOTS:]:
            raise ConfigError(f"A maximum of {BLOCK_SLOTS} block replaceable devices are "
                              f"supported: -device {config.driver} is one too many", "remove it")
        for number, config in disks:
            self._make_disk(config, device_name(config, number),
                            *workers.get(number, (None, None)))
        # The guest looks for disks when it boots: those that come later go where it has looked.
        while len(self.machine.slots) < BLOCK_SLOTS:
            number = len(self.machine.slots)
            device = VirtioBlk(empty_name(number), -1, self.machine.memory, self.loop,
                               foreign=False)
            self._add_slot(device, replaceable=True, lazy=True)

    def _make_disk(self, config: DeviceConfig, name: str, worker: WorkerProcess | None,
                   kind: Kind | None) -> None:
        if worker is not None:
            socket_fd = worker.take_socket()
        else:
            socket_fd = connect_backend(self.config.chardevs[config.options["chardev"]])
        device = VirtioBlk(name, socket_fd, self.machine.memory, self.loop,
                           num_queues=int(config.options.get("num-queues", "1"), 0),
                           queue_size=int(config.options.get("queue-size", "256"), 0),
                           foreign=worker is None)
        slot = self._add_slot(device, replaceable=worker is not None, lazy=False)
        slot.occupant = Device(name, config.driver, slot.number, device, slot.transport, worker,
                               kind)
        self.machine.devices[name] = slot.occupant

    def _add_slot(self, device: VirtioBlk, replaceable: bool, lazy: bool) -> Slot:
        machine = self.machine
        number = len(machine.slots)
        base = layout.virtio_base(number)
        transport = VirtioMmio(machine.vm, machine.memory, base, layout.virtio_gsi(number), device,
                               lazy)
        self.mmio.add(base, layout.VIRTIO_MMIO_SIZE, transport)
        slot = Slot(number, device, transport, replaceable)
        machine.slots.append(slot)
        return slot

    # ---- vCPUs -----------------------------------------------------------------------------

    def _make_vcpus(self, entry: setup.EntryPoint) -> None:
        machine = self.machine
        topology = Topology(self.config.cpu)
        rows = self.hypervisor.supported_cpuid()
        for index in range(self.config.cpu.count):
            handle = machine.vm.create_vcpu(topology.apic_id(index))  # its KVM id is its APIC id
            handle.index = index
            setup.setup_vcpu(handle, entry, index, topology, rows)
            machine.vcpus.append(VcpuThread(handle, self.mmio, self.ports, self.on_vcpu_end,
                                            vcpu_confinement(self.config.sandbox)))
        self.cleanup.push(machine.stop_vcpus)


def device_name(config: DeviceConfig, number: int) -> str:
    """The user's id, or one that no user can have given twice: `#DRIVER.N`."""
    return config.id or f"#{config.driver}.{number}"
