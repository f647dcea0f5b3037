"""A hypervisor for tests: records every call, and runs a script instead of a guest.

    hypervisor = FakeHypervisor()
    vm = hypervisor.create_vm()
    vcpu = vm.create_vcpu(0)
    vcpu.script.append((EXIT_MMIO_READ, 0xF0100000, 4, 0))
    ...
    assert vcpu.answers == [0x74726976]

A vCPU whose script is empty "runs the guest" until it is kicked.
"""

from __future__ import annotations

import _thread

from vmm.errors import HypervisorError
from vmm.hypervisor.interface import (
    EXIT_KICKED,
    EXIT_UNKNOWN,
    Exit,
    Hypervisor,
    Uart,
    Vcpu,
    Vm,
)
from vmm.hypervisor.virtio_registers import VirtioRegisters

TYPE_CHECKING = False  # importing typing for it would cost 10 ms of the start
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


class FakeHypervisor(Hypervisor):
    """See `Hypervisor`. `vms` are those created; `fail_with` makes the next `create_vm` fail."""

    def __init__(self) -> None:
        self.vms: list[FakeVm] = []
        self.fail_with = ""
        self.closed = False
        self.cpuid: list[tuple[int, int, int, int, int, int, int]] = [
            (0x0, 0, 0, 0x16, 0x756E6547, 0x6C65746E, 0x49656E69),
            (0x1, 0, 0, 0x000806F8, 0, 0x80202001, 0x0F8BFBFF),
            (0xB, 0, 1, 0, 1, 0x100, 0),
            (0xB, 1, 1, 0, 1, 0x201, 0),
            (0x40000000, 0, 0, 0x40000001, 0x4B4D564B, 0x564B4D56, 0x4D),
            (0x80000000, 0, 0, 0x80000008, 0, 0, 0),
            (0x80000008, 0, 0, 0x3030, 0, 0, 0),
        ]

    def create_vm(self) -> FakeVm:
        """See `Hypervisor.create_vm`."""
        if self.fail_with:
            raise HypervisorError(self.fail_with)
        self.vms.append(FakeVm())
        return self.vms[-1]

    def supported_cpuid(self) -> Sequence[tuple[int, int, int, int, int, int, int]]:
        """See `Hypervisor.supported_cpuid`."""
        return self.cpuid

    def max_vcpus(self) -> int:
        """See `Hypervisor.max_vcpus`."""
        return 255

    def close(self) -> None:
        """See `Hypervisor.close`."""
        self.closed = True


class FakeVm(Vm):
    """See `Vm`. `calls` are (name, arguments...) in order; the rest is the state they made."""

    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []
        self.memory: dict[int, tuple[int, int, int, bool]] = {}
        self.irqfds: set[tuple[int, int]] = set()
        self.ioeventfds: set[tuple[int, int, int | None, int]] = set()
        self.virtio: dict[int, VirtioRegisters] = {}  # the same C as under KVM
        self.uart: FakeUart | None = None
        self.power_base = 0
        self.forwarded: list[tuple[int, int]] = []
        self.vcpus: list[FakeVcpu] = []
        self.clock = b"clock"
        self.closed = False

    def set_memory(self, slot: int, guest_addr: int, size: int, host_addr: int,
                   readonly: bool = False) -> None:
        """See `Vm.set_memory`."""
        self.calls.append(("set_memory", slot, guest_addr, size))
        self.memory[slot] = (guest_addr, size, host_addr, readonly)
        if size == 0:
            del self.memory[slot]

    def create_irqchip(self) -> None:
        """See `Vm.create_irqchip`."""
        self.calls.append(("create_irqchip",))

    def create_vcpu(self, index: int) -> FakeVcpu:
        """See `Vm.create_vcpu`."""
        self.calls.append(("create_vcpu", index))
        self.vcpus.append(FakeVcpu(index))
        return self.vcpus[-1]

    def add_irqfd(self, gsi: int, fd: int) -> None:
        """See `Vm.add_irqfd`."""
        self.calls.append(("add_irqfd", gsi, fd))
        if (gsi, fd) in self.irqfds:
            raise HypervisorError(f"irqfd {fd} of GSI {gsi} is there already")
        self.irqfds.add((gsi, fd))

    def remove_irqfd(self, gsi: int, fd: int) -> None:
        """See `Vm.remove_irqfd`."""
        self.calls.append(("remove_irqfd", gsi, fd))
        self.irqfds.remove((gsi, fd))

    def add_ioeventfd(self, address: int, size: int, value: int | None, fd: int) -> None:
        """See `Vm.add_ioeventfd`."""
        self.calls.append(("add_ioeventfd", address, size, value, fd))
        if any(entry[:3] == (address, size, value) for entry in self.ioeventfds):
            raise HypervisorError(f"an ioeventfd at {address:#x} is there already")
        self.ioeventfds.add((address, size, value, fd))

    def remove_ioeventfd(self, address: int, size: int, value: int | None, fd: int) -> None:
        """See `Vm.remove_ioeventfd`."""
        self.calls.append(("remove_ioeventfd", address, size, value, fd))
        self.ioeventfds.remove((address, size, value, fd))

    def add_virtio(self, base: int, device_id: int,
                   queue_sizes: Sequence[int]) -> VirtioRegisters:
        """See `Vm.add_virtio`."""
        self.calls.append(("add_virtio", base, device_id, tuple(queue_sizes)))
        if base in self.virtio:
            raise HypervisorError(f"a virtio device at {base:#x} is there already")
        self.virtio[base] = VirtioRegisters(device_id, queue_sizes)
        return self.virtio[base]

    def add_uart(self, port: int, gsi: int) -> FakeUart:
        """See `Vm.add_uart`."""
        self.calls.append(("add_uart", port, gsi))
        self.uart = FakeUart()
        return self.uart

    def forward_ports(self, port: int, count: int) -> None:
        """See `Vm.forward_ports`."""
        self.forwarded.append((port, count))

    def add_power_registers(self, base: int) -> None:
        """See `Vm.add_power_registers`."""
        self.calls.append(("add_power_registers", base))
        self.power_base = base

    def hold(self, what: int) -> None:
        """See `Vm.hold`."""
        self.calls.append(("hold", what))

    def wait_entered(self, limit: float) -> None:
        """See `Vm.wait_entered`."""

    def reset(self) -> None:
        """See `Vm.reset`."""
        self.calls.append(("reset",))

    def get_clock(self) -> bytes:
        """See `Vm.get_clock`."""
        self.calls.append(("get_clock",))
        return self.clock

    def set_clock(self, state: bytes) -> None:
        """See `Vm.set_clock`."""
        self.calls.append(("set_clock", state))

    def close(self) -> None:
        """See `Vm.close`."""
        self.closed = True


class FakeUart(Uart):
    """See `Uart`. Tests put the guest's output into `output` and find its input in `input`."""

    def __init__(self) -> None:
        self.output_fd = -1
        self.output = bytearray()
        self.input = bytearray()
        self.room = 1024
        self.resets = 0

    def take_output(self, limit: int) -> bytes:
        """See `Uart.take_output`."""
        taken = bytes(self.output[:limit])
        del self.output[:limit]
        return taken

    def put_input(self, data: bytes) -> int:
        """See `Uart.put_input`."""
        taken = data[:max(0, self.room - len(self.input))]
        self.input += taken
        return len(taken)

    def reset(self) -> None:
        """See `Uart.reset`."""
        self.resets += 1
        self.input.clear()


class FakeVcpu(Vcpu):
    """See `Vcpu`. `script` holds (kind, address, size, value) or a callable that gives one."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.script: list[tuple[int, int, int, int]
                          | Callable[[], tuple[int, int, int, int]]] = []
        self.pending: list[tuple[int, int, int, int]] = []  # further items of the last access
        self.answers: list[int] = []
        self.registers: dict[str, object] = {}  # what the setters were given, by their names
        self.bound = 0
        self.unbound = 0
        self.kicks = 0
        self.runs = 0
        self.finishes = 0
        self.closed = False
        self.in_guest = False
        self.initial_restored = 0
        self._exit = Exit()
        self._kicked = False
        self._lock = _thread.allocate_lock()
        self._bell = _thread.allocate_lock()  # released by a kick or a new script
        self._bell.acquire()

    def bind_thread(self) -> None:
        """See `Vcpu.bind_thread`."""
        self.bound += 1

    def unbind_thread(self) -> None:
        """See `Vcpu.unbind_thread`."""
        self.unbound += 1

    def run(self) -> Exit:
        """See `Vcpu.run`: the next entry of the script, or wait for a kick."""
        self.runs += 1
        self.in_guest = True
        while not self._kicked and not self.pending and not self.script:
            self._bell.acquire()
        self.in_guest = False
        if self.pending:
            return self._give(self.pending.pop(0))
        if self._kicked:
            self._kicked = False
            return self._give((EXIT_KICKED, 0, 0, 0))
        entry = self.script.pop(0)
        return self._give(entry() if callable(entry) else entry)

    def finish(self) -> Exit:
        """See `Vcpu.finish`."""
        self.finishes += 1
        return self._give(self.pending.pop(0) if self.pending else (EXIT_KICKED, 0, 0, 0))

    def _give(self, entry: tuple[int, int, int, int]) -> Exit:
        exit = self._exit
        exit.kind, exit.address, exit.size, exit.value = entry
        if exit.kind > EXIT_UNKNOWN:
            raise AssertionError(f"no such exit: {exit.kind}")
        return exit

    def wake(self) -> None:
        """Look at `script` again: call after appending to it while `run` waits."""
        with self._lock:
            if self._bell.locked():
                self._bell.release()

    def complete_read(self, value: int) -> None:
        """See `Vcpu.complete_read`."""
        self.answers.append(value)

    def kick(self) -> None:
        """See `Vcpu.kick`."""
        self.kicks += 1
        self._kicked = True
        self.wake()

    def counters(self) -> dict[str, int]:
        """See `Vcpu.counters`."""
        return {"served": 0, "forwarded": self.runs, "kicks": self.kicks}

    def error_report(self) -> str:
        """See `Vcpu.error_report`."""
        return f"fake vCPU {self.index} failed"

    def close(self) -> None:
        """See `Vcpu.close`."""
        self.closed = True

    # ---- registers: recorded -----------------------------------------------------------------

    def set_cpuid(self, rows: Sequence[tuple[int, int, int, int, int, int, int]]) -> None:
        """Recorded under "cpuid"."""
        self.registers["cpuid"] = list(rows)

    def set_regs(self, **fields: int) -> None:
        """Recorded under "regs"."""
        self.registers["regs"] = fields

    def get_regs(self) -> dict[str, int]:
        """What `set_regs` was given."""
        regs = self.registers.get("regs", {})
        return dict(regs) if isinstance(regs, dict) else {}

    def set_sregs(self, fields: dict[str, object]) -> None:
        """Recorded under "sregs"; fields that are not named keep their values."""
        self.registers["sregs"] = {**self.get_sregs(), **fields}

    def get_sregs(self) -> dict[str, object]:
        """What `set_sregs` was given."""
        sregs = self.registers.get("sregs", {})
        return dict(sregs) if isinstance(sregs, dict) else {}

    def set_msrs(self, values: Sequence[tuple[int, int]]) -> None:
        """Recorded under "msrs"."""
        self.registers["msrs"] = list(values)

    def set_fpu_default(self) -> None:
        """Recorded under "fpu"."""
        self.registers["fpu"] = "default"

    def set_lapic_lint(self) -> None:
        """Recorded under "lint"."""
        self.registers["lint"] = True

    def get_mp_state(self) -> int:
        """What `set_mp_state` was given, else 0 for vCPU 0 and 1 for the others."""
        state = self.registers.get("mp_state", 0 if self.index == 0 else 1)
        assert isinstance(state, int)
        return state

    def set_mp_state(self, value: int) -> None:
        """Recorded under "mp_state"."""
        self.registers["mp_state"] = value

    def tsc_khz(self) -> int:
        """A plausible frequency."""
        return 2_600_000

    def mark_paused(self) -> None:
        """Nothing to do."""

    def restore_initial(self) -> None:
        """Counted."""
        self.initial_restored += 1
