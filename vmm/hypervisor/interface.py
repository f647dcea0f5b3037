"""What a machine and its devices ask of a hypervisor: two implementations, KVM and a fake.

`vmm/hypervisor/kvm.py` speaks to /dev/kvm through `native._core`; `vmm/hypervisor/fake.py`
records every call and lets tests drive exits, so that machine and device tests need no
/dev/kvm.  The base classes below define the calls; each implementation derives from them.

Order of set-up (measured, ARCHITECTURE.md): memory slots, then `create_irqchip`, then vCPUs,
then ioeventfds and irqfds.  A slot that comes after the irqchip waits 5-11 ms.
"""

from __future__ import annotations

TYPE_CHECKING = False  # importing typing for it would cost 10 ms of the start
if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmm.hypervisor.virtio_registers import VirtioRegisters

# Why `Vcpu.run` came back to Python.
EXIT_IO_READ = 1        # a port read that C does not serve: complete it with `complete_read`
EXIT_IO_WRITE = 2       # a port write
EXIT_MMIO_READ = 3      # an MMIO read that C does not serve: complete it with `complete_read`
EXIT_MMIO_WRITE = 4     # an MMIO write
EXIT_KICKED = 5         # `kick` was called: look at the pause and stop requests
EXIT_SHUTDOWN = 6       # triple fault
EXIT_RESET = 7          # the guest wrote 0xFE to port 0x64 or the ACPI reset register
EXIT_POWEROFF = 8       # the guest entered S5
EXIT_INTERNAL_ERROR = 9  # KVM_EXIT_INTERNAL_ERROR or FAIL_ENTRY: `error_report` tells
EXIT_UNKNOWN = 10       # any other exit: `error_report` tells

# What `Vm.hold` holds; the same numbers as SV_HOLD_* in native/core/core.h.
HOLD_NOTHING = 0
HOLD_ACCESSES = 1
HOLD_GUEST = 2


class Exit:
    """One exit that C could not serve. Reused by the vCPU: read it before the next `run`.

    kind: EXIT_*; address: port or guest-physical address; size: 1, 2, 4 or 8 bytes;
    value: little-endian integer that the guest wrote (0 for reads).
    """

    __slots__ = ("address", "kind", "size", "value")

    def __init__(self) -> None:
        self.kind = 0
        self.address = 0
        self.size = 0
        self.value = 0


class Vcpu:
    """One virtual CPU. `run` belongs to the thread that owns it, `kick` to any thread."""

    __slots__ = ("index",)

    index: int

    def run(self) -> Exit:
        """Run the guest with the GIL released until an exit that C can't serve, or a kick."""
        raise NotImplementedError

    def finish(self) -> Exit:
        """Finish the access of the last exit without running the guest.

        EXIT_KICKED when done (the registers are whole); or the next item of a string or split
        access, to be handled like one that came from `run`.
        """
        raise NotImplementedError

    def complete_read(self, value: int) -> None:
        """Give the guest the result of the read exit just returned by `run`."""
        raise NotImplementedError

    def bind_thread(self) -> None:
        """Called once by the vCPU's own thread before its first `run` (signal set-up)."""
        raise NotImplementedError

    def unbind_thread(self) -> None:
        """The thread's last call: kicks go nowhere from now on, its signals are as before."""
        raise NotImplementedError

    def kick(self) -> None:
        """Make `run` return EXIT_KICKED soon, and at once if it is entered later. Any thread."""
        raise NotImplementedError

    def counters(self) -> dict[str, int]:
        """How many exits C served ("served"), Python was handed ("forwarded"), "kicks"."""
        raise NotImplementedError

    def error_report(self) -> str:
        """Registers, control registers, exit data and instruction bytes, several lines."""
        raise NotImplementedError

    def close(self) -> None:
        """Free the vCPU. Its thread must have ended."""
        raise NotImplementedError


class Uart:
    """The native 16550A at one port range; served in C on the vCPU thread.

    The guest's output collects in a bounded native ring; `output_fd` becomes readable when
    there is some, at the latest a millisecond later, and stays so until `take_output` emptied
    the ring.  When the ring is full LSR.THRE stays clear until `take_output` made room.  It
    also becomes readable when `put_input` had to refuse bytes and there is room again.
    """

    __slots__ = ()

    output_fd: int

    def take_output(self, limit: int) -> bytes:
        """Return at most `limit` bytes that the guest sent, b"" if there are none."""
        raise NotImplementedError

    def put_input(self, data: bytes) -> int:
        """Offer bytes to the receive FIFO; return how many fitted."""
        raise NotImplementedError

    def reset(self) -> None:
        """Power-on state of all registers; both FIFOs emptied."""
        raise NotImplementedError


class Vm:
    """One virtual machine: memory slots, interrupts, doorbells, vCPUs."""

    __slots__ = ()

    def set_memory(self, slot: int, guest_addr: int, size: int, host_addr: int,
                   readonly: bool = False) -> None:
        """KVM_SET_USER_MEMORY_REGION; size 0 removes the slot."""
        raise NotImplementedError

    def create_irqchip(self) -> None:
        """In-kernel LAPIC, IOAPIC, PIC and PIT, TSS and identity-map addresses."""
        raise NotImplementedError

    def create_vcpu(self, index: int) -> Vcpu:
        """KVM_CREATE_VCPU; registers and CPUID are set by vmm/arch through the vCPU's own calls."""
        raise NotImplementedError

    def add_irqfd(self, gsi: int, fd: int) -> None:
        """KVM_IRQFD, edge: writing the eventfd raises the GSI."""
        raise NotImplementedError

    def remove_irqfd(self, gsi: int, fd: int) -> None:
        """KVM_IRQFD with DEASSIGN."""
        raise NotImplementedError

    def add_ioeventfd(self, address: int, size: int, value: int | None, fd: int) -> None:
        """KVM_IOEVENTFD on MMIO: a write of `size` bytes (of `value`, if given) signals `fd`."""
        raise NotImplementedError

    def remove_ioeventfd(self, address: int, size: int, value: int | None, fd: int) -> None:
        """KVM_IOEVENTFD with DEASSIGN."""
        raise NotImplementedError

    def add_virtio(self, base: int, device_id: int,
                   queue_sizes: Sequence[int]) -> VirtioRegisters:
        """A virtio-mmio slot at `base`, most of whose registers are served in C.

        :param device_id: virtio 1.2, 5; 0 makes a placeholder, all of which C serves.
        :param queue_sizes: the largest size of each queue.
        :raises HypervisorError: there are too many, or one is there already.
        """
        raise NotImplementedError

    def add_uart(self, port: int, gsi: int) -> Uart:
        """A native 16550A at `port`, with interrupt `gsi` (edge)."""
        raise NotImplementedError

    def forward_ports(self, port: int, count: int) -> None:
        """Bring accesses to ports that C answers as absent (CMOS, 8042 data, ...) to Python."""
        raise NotImplementedError

    def hold(self, what: int) -> None:
        """What waits on the vCPUs' threads from now on, without the GIL: HOLD_NOTHING;
        HOLD_ACCESSES, those that C can't serve, so that the guest may run while its devices are
        still being made; HOLD_GUEST, the guest itself."""
        raise NotImplementedError

    def wait_entered(self, limit: float) -> None:
        """Until a vCPU that HOLD_GUEST kept from the guest goes on; `limit` seconds at most."""
        raise NotImplementedError

    def reset(self) -> None:
        """Interrupt controllers, PIT and vCPUs as they were created; the vCPUs are paused."""
        raise NotImplementedError

    def add_power_registers(self, base: int) -> None:
        """ACPI sleep-control (base+0), sleep-status (base+1) and reset (base+2) registers in C.

        A write that enters S5 (SLP_TYP 5: the DSDT must say so) ends `Vcpu.run` with
        EXIT_POWEROFF, a write of the reset value (1: the FADT must say so) with EXIT_RESET
        (ACPI 6.4, 4.8.3.6, 4.8.3.7). Accesses are of one byte.
        """
        raise NotImplementedError

    def get_clock(self) -> bytes:
        """KVM_GET_CLOCK, as opaque bytes for `set_clock`."""
        raise NotImplementedError

    def set_clock(self, state: bytes) -> None:
        """KVM_SET_CLOCK, and KVM_KVMCLOCK_CTRL on every vCPU whose guest enabled kvmclock."""
        raise NotImplementedError

    def close(self) -> None:
        """Close every descriptor of the VM."""
        raise NotImplementedError


class Hypervisor:
    """The entry: opens the hypervisor, creates VMs, tells what the host supports."""

    __slots__ = ()

    def max_vcpus(self) -> int:
        """How many vCPUs the host allows in one VM."""
        raise NotImplementedError

    def close(self) -> None:
        """Let go of the hypervisor; VMs live on."""
        raise NotImplementedError

    def create_vm(self) -> Vm:
        """:raises HypervisorError: no access, too old, or the host refuses."""
        raise NotImplementedError

    def supported_cpuid(self) -> Sequence[tuple[int, int, int, int, int, int, int]]:
        """KVM_GET_SUPPORTED_CPUID rows: function, index, flags, eax, ebx, ecx, edx."""
        raise NotImplementedError
