"""KVM: `/dev/kvm`, one virtual machine, its interrupts and doorbells.

All system calls go through `native._core`; what a vCPU needs on its hot path is set up here
and served in C (native/core/machine.c, vcpu.c).  The vCPU itself is in `kvm_vcpu.py`.
"""

from __future__ import annotations

import posix as os
from errno import EACCES, EBUSY, ENOENT, EPERM

from native._core import ffi, lib
from vmm.errors import HypervisorError
from vmm.hypervisor.interface import Hypervisor, Uart, Vm
from vmm.hypervisor.kvm_vcpu import KvmVcpu
from vmm.hypervisor.virtio_registers import VirtioRegisters

TYPE_CHECKING = False  # importing typing for it would cost 10 ms of the start
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

DEVICE = "/dev/kvm"
SLEEP_TYPE_S5: int = lib.SV_SLEEP_TYPE_S5  # SLP_TYP that powers off: say so in the DSDT
RESET_VALUE: int = lib.SV_RESET_VALUE  # say so in the FADT

# Three pages below the APIC for real mode on Intel hosts; the identity map is the page before.
IDENTITY_MAP = 0xFEF0C000
TSS = IDENTITY_MAP + 0x1000

REQUIRED = (
    ("KVM_CAP_IRQCHIP", lib.KVM_CAP_IRQCHIP),
    ("KVM_CAP_USER_MEMORY", lib.KVM_CAP_USER_MEMORY),
    ("KVM_CAP_SET_TSS_ADDR", lib.KVM_CAP_SET_TSS_ADDR),
    ("KVM_CAP_SET_IDENTITY_MAP_ADDR", lib.KVM_CAP_SET_IDENTITY_MAP_ADDR),
    ("KVM_CAP_EXT_CPUID", lib.KVM_CAP_EXT_CPUID),
    ("KVM_CAP_MP_STATE", lib.KVM_CAP_MP_STATE),
    ("KVM_CAP_VCPU_EVENTS", lib.KVM_CAP_VCPU_EVENTS),
    ("KVM_CAP_PIT2", lib.KVM_CAP_PIT2),
    ("KVM_CAP_IRQFD", lib.KVM_CAP_IRQFD),
    ("KVM_CAP_IOEVENTFD", lib.KVM_CAP_IOEVENTFD),
    ("KVM_CAP_ADJUST_CLOCK", lib.KVM_CAP_ADJUST_CLOCK),
    ("KVM_CAP_IMMEDIATE_EXIT", lib.KVM_CAP_IMMEDIATE_EXIT),
)


def check(result: int, what: str, hint: str = "dmesg may tell why") -> int:
    """Return `result`, or raise if it is a negative errno.

    :raises HypervisorError: with the errno's text.
    """
    if result < 0:
        raise HypervisorError(f"KVM: {what}: {os.strerror(-result)}", hint)
    return result


class Batch:
    """KVM's calls one after the other, on a thread of C: most of them wait for something."""

    __slots__ = ("_batch", "_calls", "_rows", "_whats")

    def __init__(self) -> None:
        self._rows: list[tuple[int, int, int, Any]] = []  # as struct sv_call
        self._whats: list[str] = []
        self._calls: Any = None
        self._batch: Any = None

    def add(self, fd: int, request: int, argument: Any, what: str) -> None:
        """One more call; `fd` may be SV_FIRST_RESULT. Before `start`."""
        self._rows.append((fd, 0, request, ffi.cast("void *", argument)))
        self._whats.append(what)

    def start(self) -> None:
        """Begin, and return at once. What arguments point to is the thread's until `wait`."""
        self._calls = ffi.new("struct sv_call[]", self._rows)
        out = ffi.new("struct sv_batch **")
        check(lib.sv_batch_start(self._calls, len(self._rows), out), "cannot start a thread",
              "check the limit on threads")
        self._batch = out[0]

    def wait(self) -> int:
        """Until all calls are done, or one has failed: what the first one returned."""
        if self._batch is not None:
            lib.sv_batch_wait(self._batch)
            self._batch = None
        return int(self._calls[0].result)

    def check(self) -> None:
        """:raises HypervisorError: a call failed; after `wait`."""
        for call, what in zip(self._calls, self._whats, strict=True):
            check(call.result, what)


class KvmHypervisor(Hypervisor):
    """`/dev/kvm`, opened and checked."""

    __slots__ = ("_cpuid", "_fd", "_path")

    def __init__(self, path: str = DEVICE) -> None:
        """:raises HypervisorError: missing, no permission, too old, or lacks a capability."""
        self._path = path
        self._cpuid: Any = None
        self._fd = _open_device(path)
        try:
            self._check()
        except BaseException:
            self.close()
            raise

    def _check(self) -> None:
        version = lib.sv_ioctl_value(self._fd, lib.KVM_GET_API_VERSION, 0)
        if version < 0:
            raise HypervisorError(f"{self._path} is not KVM: {os.strerror(-version)}",
                                  "it must be the Linux kernel's /dev/kvm")
        if version != lib.KVM_API_VERSION:
            raise HypervisorError(f"{self._path} answers API version {version}, not "
                                  f"{lib.KVM_API_VERSION}", "it must be the Linux kernel's KVM")
        missing = [name for name, number in REQUIRED
                   if lib.sv_ioctl_value(self._fd, lib.KVM_CHECK_EXTENSION, number) <= 0]
        if missing:
            raise HypervisorError(f"This host's KVM lacks {', '.join(missing)}",
                                  "use a newer kernel (5.10 or later)")

    def extension(self, number: int) -> int:
        """KVM_CHECK_EXTENSION: 0 if unsupported, else a positive value."""
        return max(0, int(lib.sv_ioctl_value(self._fd, lib.KVM_CHECK_EXTENSION, number)))

    def max_vcpus(self) -> int:
        """How many vCPUs the host allows in one VM."""
        return self.extension(lib.KVM_CAP_MAX_VCPUS)

    def create_vm(self) -> KvmVm:
        """KVM_CREATE_VM. See `Hypervisor.create_vm`."""
        vm = KvmVm(self._run_size())
        vm.fd = check(lib.sv_ioctl_value(self._fd, lib.KVM_CREATE_VM, 0), "cannot create a VM")
        return vm

    def begin_vm(self, slots: Sequence[tuple[int, int, int]]) -> KvmVm:
        """A VM with memory and interrupt controllers, made by a thread: it waits for KVM.

        Nothing but `KvmVm.wait` and `close` before `KvmVm.wait` has returned.

        :param slots: guest address, size, host address of each memory slot.
        """
        vm = KvmVm(self._run_size())
        batch = vm.batch = Batch()
        batch.add(self._fd, lib.KVM_CREATE_VM, 0, "cannot create a VM")
        for slot, (guest_addr, size, host_addr) in enumerate(slots):
            vm.set_memory(slot, guest_addr, size, host_addr)
        vm.create_irqchip()
        self._cpuid = _cpuid_table()
        batch.add(self._fd, lib.KVM_GET_SUPPORTED_CPUID, self._cpuid,
                  "cannot read the supported CPUID leaves")
        batch.start()
        return vm

    def _run_size(self) -> int:
        return check(lib.sv_ioctl_value(self._fd, lib.KVM_GET_VCPU_MMAP_SIZE, 0),
                     "cannot tell the size of a vCPU's shared area")

    def supported_cpuid(self) -> Sequence[tuple[int, int, int, int, int, int, int]]:
        """KVM_GET_SUPPORTED_CPUID. See `Hypervisor.supported_cpuid`."""
        table = self._cpuid
        if table is None:
            table = _cpuid_table()
            check(lib.sv_ioctl(self._fd, lib.KVM_GET_SUPPORTED_CPUID, table),
                  "cannot read the supported CPUID leaves")
        return [(e.function, e.index, e.flags, e.eax, e.ebx, e.ecx, e.edx)
                for e in table.entries[0:table.nent]]

    def msr_indices(self) -> list[int]:
        """KVM_GET_MSR_INDEX_LIST: the MSRs that make up a vCPU's state."""
        table = ffi.new("struct kvm_msr_list *", [1024, 1024])
        table.nmsrs = 1024
        check(lib.sv_ioctl(self._fd, lib.KVM_GET_MSR_INDEX_LIST, table),
              "cannot read the list of MSRs")
        return list(table.indices[0:table.nmsrs])

    def close(self) -> None:
        """Close /dev/kvm; VMs live on."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _cpuid_table() -> Any:
    count = 256
    table = ffi.new("struct kvm_cpuid2 *", [count, count])
    table.nent = count
    return table


def _open_device(path: str) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (EACCES, EPERM):
            raise HypervisorError(
                f"No permission to open {path}",
                "add your user to its group (usermod -aG kvm USER) and log in again") from error
        if error.errno == ENOENT:
            raise HypervisorError(
                f"{path} does not exist",
                "enable virtualization in the firmware and load kvm_intel or kvm_amd") from error
        if error.errno == EBUSY:
            raise HypervisorError(f"{path} is busy",
                                  "another hypervisor may hold the processor's extensions"
                                  ) from error
        raise HypervisorError(f"Cannot open {path}: {error.strerror}",
                              "load kvm_intel or kvm_amd") from error


class KvmVm(Vm):
    """One KVM virtual machine. See `Vm`."""

    __slots__ = ("_arguments", "_chips", "_machine", "_pit", "_run_size", "_uarts", "batch", "fd",
                 "vcpus")

    def __init__(self, run_size: int) -> None:
        self.fd = -1
        self.batch: Batch | None = None  # takes the calls, as long as there is one
        self._arguments: list[Any] = []  # of calls that were put off
        self._run_size = run_size
        self._uarts: list[KvmUart] = []
        self._chips: list[Any] = []  # PIC, PIC, IOAPIC as they were created
        self._pit: Any = None
        self.vcpus: list[KvmVcpu] = []
        out = ffi.new("struct sv_machine **")
        check(lib.sv_machine_create(out), "cannot prepare a machine")
        self._machine = out[0]

    def wait(self) -> None:
        """Until what `KvmHypervisor.begin_vm` began is done.

        :raises HypervisorError: KVM refused; names the call.
        """
        batch = self._join()
        if batch is not None:
            batch.check()

    def _join(self) -> Batch | None:
        batch, self.batch = self.batch, None
        if batch is not None:
            self.fd = max(-1, batch.wait())
            self._arguments.clear()
        return batch

    def _call(self, request: int, argument: Any, what: str) -> None:
        if self.batch is not None:
            self._arguments.append(argument)
            self.batch.add(lib.SV_FIRST_RESULT, request, argument, what)
        else:
            check(lib.sv_ioctl(self.fd, request, ffi.cast("void *", argument)), what)

    # ---- memory and interrupts --------------------------------------------------------------

    def set_memory(self, slot: int, guest_addr: int, size: int, host_addr: int,
                   readonly: bool = False) -> None:
        """See `Vm.set_memory`."""
        region = ffi.new("struct kvm_userspace_memory_region *")
        region.slot = slot
        region.flags = lib.KVM_MEM_READONLY if readonly else 0
        region.guest_phys_addr = guest_addr
        region.memory_size = size
        region.userspace_addr = host_addr
        self._call(lib.KVM_SET_USER_MEMORY_REGION, region,
                   f"cannot map {size:#x} bytes of RAM at {guest_addr:#x} (slot {slot})")

    def create_irqchip(self) -> None:
        """See `Vm.create_irqchip`."""
        self._call(lib.KVM_SET_IDENTITY_MAP_ADDR, ffi.new("uint64_t *", IDENTITY_MAP),
                   "cannot place the identity map")
        self._call(lib.KVM_SET_TSS_ADDR, TSS, "cannot place the TSS")
        self._call(lib.KVM_CREATE_IRQCHIP, 0, "cannot create the interrupt controllers")
        pit = ffi.new("struct kvm_pit_config *")
        # The speaker port 0x61 tells when PIT channel 2 expired: Linux calibrates by it.
        pit.flags = lib.KVM_PIT_SPEAKER_DUMMY
        self._call(lib.KVM_CREATE_PIT2, pit, "cannot create the PIT")
        for number in range(3):
            chip = ffi.new("struct kvm_irqchip *")
            chip.chip_id = number
            self._call(lib.KVM_GET_IRQCHIP, chip, f"cannot read interrupt controller {number}")
            self._chips.append(chip)
        self._pit = ffi.new("struct kvm_pit_state2 *")
        self._call(lib.KVM_GET_PIT2, self._pit, "cannot read the PIT")

    def reset(self) -> None:
        """Interrupt controllers, PIT and vCPUs as they were created; the vCPUs must be paused."""
        # The slave 8259 before its master, which else takes the slave's old interrupts over.
        for chip in reversed(self._chips):
            check(lib.sv_ioctl(self.fd, lib.KVM_SET_IRQCHIP, chip),
                  f"cannot reset interrupt controller {chip.chip_id}")
        check(lib.sv_ioctl(self.fd, lib.KVM_SET_PIT2, self._pit), "cannot reset the PIT")
        for vcpu in self.vcpus:
            vcpu.restore_initial()

    def create_vcpu(self, index: int) -> KvmVcpu:
        """See `Vm.create_vcpu`."""
        out = ffi.new("struct sv_vcpu **")
        check(lib.sv_vcpu_create(self.fd, index, self._run_size, self._machine, out),
              f"cannot create vCPU {index}", "use fewer vCPUs (-smp)")
        vcpu = KvmVcpu(index, out[0])
        self.vcpus.append(vcpu)
        if self._chips:
            vcpu.remember_initial()
        return vcpu

    def set_irq_line(self, gsi: int, level: bool) -> None:
        """KVM_IRQ_LINE: at once, where an irqfd on an IOAPIC pin goes through a kernel thread."""
        line = ffi.new("struct kvm_irq_level *")
        line.irq = gsi
        line.level = 1 if level else 0
        check(lib.sv_ioctl(self.fd, lib.KVM_IRQ_LINE, line), f"cannot set GSI {gsi}")

    def add_irqfd(self, gsi: int, fd: int) -> None:
        """See `Vm.add_irqfd`."""
        self._irqfd(gsi, fd, 0)

    def remove_irqfd(self, gsi: int, fd: int) -> None:
        """See `Vm.remove_irqfd`."""
        self._irqfd(gsi, fd, lib.KVM_IRQFD_FLAG_DEASSIGN)

    def _irqfd(self, gsi: int, fd: int, flags: int) -> None:
        irqfd = ffi.new("struct kvm_irqfd *")
        irqfd.fd = fd
        irqfd.gsi = gsi
        irqfd.flags = flags
        check(lib.sv_ioctl(self.fd, lib.KVM_IRQFD, irqfd), f"cannot set the irqfd of GSI {gsi}")

    def add_ioeventfd(self, address: int, size: int, value: int | None, fd: int) -> None:
        """See `Vm.add_ioeventfd`."""
        self._ioeventfd(address, size, value, fd, 0)

    def remove_ioeventfd(self, address: int, size: int, value: int | None, fd: int) -> None:
        """See `Vm.remove_ioeventfd`."""
        self._ioeventfd(address, size, value, fd, lib.KVM_IOEVENTFD_FLAG_DEASSIGN)

    def _ioeventfd(self, address: int, size: int, value: int | None, fd: int,
                   flags: int) -> None:
        ioeventfd = ffi.new("struct kvm_ioeventfd *")
        ioeventfd.addr = address
        ioeventfd.len = size
        ioeventfd.fd = fd
        ioeventfd.flags = flags
        if value is not None:
            ioeventfd.datamatch = value
            ioeventfd.flags |= lib.KVM_IOEVENTFD_FLAG_DATAMATCH
        check(lib.sv_ioctl(self.fd, lib.KVM_IOEVENTFD, ioeventfd),
              f"cannot set the ioeventfd at {address:#x}")

    # ---- what C serves ----------------------------------------------------------------------

    def add_virtio(self, base: int, device_id: int,
                   queue_sizes: Sequence[int]) -> VirtioRegisters:
        """See `Vm.add_virtio`."""
        registers = VirtioRegisters(device_id, queue_sizes)
        check(lib.sv_machine_add_virtio(self._machine, base, registers.handle),
              f"cannot serve a virtio device at {base:#x}",
              f"there can be {lib.SV_MAX_VIRTIO} virtio-mmio devices, one at an address")
        return registers

    def hold(self, what: int) -> None:
        """See `Vm.hold`."""
        lib.sv_machine_hold(self._machine, what)

    def wait_entered(self, limit: float) -> None:
        """See `Vm.wait_entered`."""
        lib.sv_machine_wait_entered(self._machine, int(limit * 1e9))

    def add_uart(self, port: int, gsi: int) -> KvmUart:
        """See `Vm.add_uart`."""
        out = ffi.new("struct sv_uart **")
        check(lib.sv_uart_create(self.fd, gsi, -1, out), "cannot create the serial port")
        uart = KvmUart(out[0])
        self._uarts.append(uart)
        check(lib.sv_machine_add_uart(self._machine, port, out[0]),
              f"cannot serve a serial port at {port:#x}", "there can be one serial port")
        return uart

    def add_power_registers(self, base: int) -> None:
        """See `Vm.add_power_registers`: SLP_TYP 5 powers off, reset value 1 resets."""
        check(lib.sv_machine_add_power(self._machine, base), "cannot serve the power registers")

    def forward_ports(self, port: int, count: int) -> None:
        """Bring accesses to ports that C answers as absent (CMOS, 8042 data, ...) to Python."""
        check(lib.sv_machine_forward_ports(self._machine, port, count),
              f"cannot serve {count} ports at {port:#x}")

    # ---- clock ------------------------------------------------------------------------------

    def get_clock(self) -> bytes:
        """See `Vm.get_clock`."""
        clock = ffi.new("struct kvm_clock_data *")
        check(lib.sv_ioctl(self.fd, lib.KVM_GET_CLOCK, clock), "cannot read the clock")
        return bytes(ffi.buffer(clock))

    def set_clock(self, state: bytes) -> None:
        """See `Vm.set_clock`. The vCPUs must be paused."""
        clock = ffi.new("struct kvm_clock_data *")
        if len(state) != ffi.sizeof("struct kvm_clock_data"):
            raise HypervisorError(f"A clock state of {len(state)} bytes can't be set",
                                  "it must come from get_clock of the same version")
        ffi.memmove(clock, state, len(state))
        # With the flags KVM would add the time that passed: the clock is to stand still.
        clock.flags = 0
        check(lib.sv_ioctl(self.fd, lib.KVM_SET_CLOCK, clock), "cannot set the clock")
        for vcpu in self.vcpus:
            vcpu.mark_paused()

    def close(self) -> None:
        """See `Vm.close`.

        :raises HypervisorError: a vCPU's thread has not ended; nothing more is freed.
        """
        self._join()
        for vcpu in self.vcpus:
            vcpu.close()
        self.vcpus.clear()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        if self._machine != ffi.NULL:
            lib.sv_machine_destroy(self._machine)
            self._machine = ffi.NULL
            for uart in self._uarts:
                uart.close()


class KvmUart(Uart):
    """See `Uart`. Once the VM is closed there is no output and no room for input."""

    __slots__ = ("_uart", "output_fd")

    def __init__(self, uart: Any) -> None:
        self._uart = uart
        self.output_fd = lib.sv_uart_output_fd(uart)

    def take_output(self, limit: int) -> bytes:
        """See `Uart.take_output`."""
        limit = min(limit, lib.SV_UART_TX_SIZE) if self._uart != ffi.NULL else 0
        if limit <= 0:
            return b""
        buffer = ffi.new("char[]", limit)
        return bytes(ffi.buffer(buffer, lib.sv_uart_take_output(self._uart, buffer, limit)))

    def put_input(self, data: bytes) -> int:
        """See `Uart.put_input`."""
        if self._uart == ffi.NULL:
            return 0
        return int(lib.sv_uart_put_input(self._uart, data, len(data)))

    def reset(self) -> None:
        """See `Uart.reset`. Output that the guest already sent can still be taken."""
        if self._uart != ffi.NULL:
            lib.sv_uart_reset(self._uart)

    def close(self) -> None:
        """Free it; its VM must be closed."""
        lib.sv_uart_destroy(self._uart)
        self._uart = ffi.NULL
