"""One KVM vCPU: its run loop (in C), and its registers as plain dicts and lists.

Register values travel as plain data: `{"rip": 0x1000, ...}`; a segment as
`{"base":, "limit":, "selector":, "type":, "present":, "dpl":, "db":, "s":, "l":, "g":, "avl":,
"unusable":}`, a descriptor table as `{"base":, "limit":}`.  All of them belong to moments at
which the vCPU is not running: before `start`, or paused.
"""

from __future__ import annotations

import posix as os

from native._core import ffi, lib
from vmm.errors import HypervisorError
from vmm.hypervisor.interface import Exit, Vcpu

TYPE_CHECKING = False  # importing typing for it would cost 10 ms of the start
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

GENERAL = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp", "r8", "r9", "r10", "r11",
           "r12", "r13", "r14", "r15", "rip", "rflags")
SEGMENTS = ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")
SEGMENT_FIELDS = ("base", "limit", "selector", "type", "present", "dpl", "db", "s", "l", "g",
                  "avl", "unusable")
TABLES = ("gdt", "idt")
TABLE_FIELDS = ("base", "limit")
CONTROL = ("cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base")

# LAPIC register offsets (Intel SDM vol. 3, 11.4.1).
LAPIC_LVT_LINT0 = 0x350
LAPIC_LVT_LINT1 = 0x360
DELIVERY_EXTINT = 0x700
DELIVERY_NMI = 0x400

# MSRs by which a guest gives KVM memory to write to (Linux Documentation/virt/kvm/x86/msr.rst):
# kvmclock (old and new), asynchronous page faults, steal time, PV EOI.
PARAVIRTUAL_MSRS = (0x12, 0x4B564D01, 0x4B564D02, 0x4B564D03, 0x4B564D04)


class KvmVcpu(Vcpu):
    """See `Vcpu`."""

    __slots__ = ("_exit", "_initial", "_vcpu")

    def __init__(self, index: int, vcpu: Any) -> None:
        self.index = index
        self._vcpu = vcpu
        self._exit = Exit()
        self._initial: list[tuple[int, Any]] = []

    # ---- running ----------------------------------------------------------------------------

    def bind_thread(self) -> None:
        """See `Vcpu.bind_thread`."""
        self._check(lib.sv_vcpu_bind(self._vcpu), "cannot set up its thread's signals")

    def unbind_thread(self) -> None:
        """The thread's last call: kicks go nowhere from now on."""
        lib.sv_vcpu_unbind(self._vcpu)

    def run(self) -> Exit:
        """See `Vcpu.run`."""
        vcpu = self._vcpu
        exit = self._exit
        kind = exit.kind = lib.sv_vcpu_run(vcpu)
        if kind < 5:  # EXIT_KICKED: those before it carry an access
            exit.address = vcpu.exit_address
            exit.size = vcpu.exit_size
            exit.value = vcpu.exit_value
        return exit

    def finish(self) -> Exit:
        """Finish the access of the last exit without running the guest.

        EXIT_KICKED when done and the vCPU's registers are whole; or the next item of a string
        or split access, to be handled the same way.
        """
        vcpu = self._vcpu
        exit = self._exit
        exit.kind = lib.sv_vcpu_finish(vcpu)
        exit.address = vcpu.exit_address
        exit.size = vcpu.exit_size
        exit.value = vcpu.exit_value
        return exit

    def complete_read(self, value: int) -> None:
        """See `Vcpu.complete_read`. Bits beyond the access's size are ignored."""
        lib.sv_vcpu_complete_read(self._vcpu, value & 0xFFFFFFFFFFFFFFFF)

    def kick(self) -> None:
        """See `Vcpu.kick`."""
        lib.sv_vcpu_kick(self._vcpu)

    def counters(self) -> dict[str, int]:
        """Exits served in C, exits forwarded to Python, kicks taken."""
        vcpu = self._vcpu
        return {"served": vcpu.served, "forwarded": vcpu.forwarded, "kicks": vcpu.kicks}

    def error_report(self) -> str:
        """See `Vcpu.error_report`."""
        from vmm.hypervisor.kvm_report import report  # only when it failed

        return report(self, self._vcpu)

    def close(self) -> None:
        """See `Vcpu.close`.

        :raises HypervisorError: its thread has not ended.
        """
        if self._vcpu != ffi.NULL:
            self._check(lib.sv_vcpu_destroy(self._vcpu), "cannot be freed while its thread runs")
            self._vcpu = ffi.NULL

    # ---- registers --------------------------------------------------------------------------

    def get_regs(self) -> dict[str, int]:
        """General registers, rip and rflags."""
        regs = self._get("struct kvm_regs *", lib.KVM_GET_REGS, "registers")
        return {name: getattr(regs, name) for name in GENERAL}

    def set_regs(self, **fields: int) -> None:
        """Set all general registers; those not named become 0, rflags 2."""
        regs = ffi.new("struct kvm_regs *", {"rflags": 2, **fields})
        self._set(lib.KVM_SET_REGS, regs, "registers")

    def get_sregs(self) -> dict[str, Any]:
        """Segments, descriptor tables, control registers, EFER, APIC base."""
        sregs = self._get("struct kvm_sregs *", lib.KVM_GET_SREGS, "system registers")
        fields: dict[str, Any] = {name: getattr(sregs, name) for name in CONTROL}
        for name in SEGMENTS:
            segment = getattr(sregs, name)
            fields[name] = {field: getattr(segment, field) for field in SEGMENT_FIELDS}
        for name in TABLES:
            table = getattr(sregs, name)
            fields[name] = {"base": table.base, "limit": table.limit}
        return fields

    def set_sregs(self, fields: dict[str, Any]) -> None:
        """Set the named system registers; the others keep their values.

        A segment or table that is named is replaced: its absent fields become 0.
        """
        sregs = self._get("struct kvm_sregs *", lib.KVM_GET_SREGS, "system registers")
        for name, value in fields.items():
            if isinstance(value, dict):  # cffi would leave absent fields as they are
                absent = TABLE_FIELDS if name in TABLES else SEGMENT_FIELDS
                value = {**dict.fromkeys(absent, 0), **value}
            setattr(sregs, name, value)
        self._set(lib.KVM_SET_SREGS, sregs, "system registers")

    def set_cpuid(self, rows: Sequence[tuple[int, int, int, int, int, int, int]]) -> None:
        """KVM_SET_CPUID2: rows of function, index, flags, eax, ebx, ecx, edx."""
        table = ffi.new("struct kvm_cpuid2 *", [len(rows), list(rows)])
        self._set(lib.KVM_SET_CPUID2, table, "CPUID")

    def set_msrs(self, values: Sequence[tuple[int, int]]) -> None:
        """KVM_SET_MSRS: pairs of index and value.

        :raises HypervisorError: names the first MSR that KVM refused.
        """
        table = ffi.new("struct kvm_msrs *", [len(values), [
            {"index": index, "data": value} for index, value in values]])
        done = self._check(lib.sv_ioctl(self._vcpu.fd, lib.KVM_SET_MSRS, table),
                           "cannot set its MSRs")
        if done != len(values):
            raise HypervisorError(f"KVM: vCPU {self.index}: MSR {values[done][0]:#x} can't be "
                                  f"set to {values[done][1]:#x}", "the host does not support it")

    def get_msrs(self, indices: Sequence[int]) -> list[tuple[int, int]]:
        """KVM_GET_MSRS: pairs of index and value; those that KVM refuses are left out."""
        found: list[tuple[int, int]] = []
        start = 0
        while start < len(indices):
            part = indices[start:start + 256]
            table = ffi.new("struct kvm_msrs *", [len(part), [
                {"index": index} for index in part]])
            done = self._check(lib.sv_ioctl(self._vcpu.fd, lib.KVM_GET_MSRS, table),
                               "cannot read its MSRs")
            found += [(entry.index, entry.data) for entry in table.entries[0:done]]
            # KVM stops at the first one that it refuses.
            start += done if done == len(part) else done + 1
        return found

    def set_fpu_default(self) -> None:
        """x87 and SSE as after FNINIT and at reset (Intel SDM vol. 1, 8.1.5, 11.6.4)."""
        fpu = ffi.new("struct kvm_fpu *", {"fcw": 0x37F, "mxcsr": 0x1F80})
        self._set(lib.KVM_SET_FPU, fpu, "FPU")

    def set_lapic_lint(self) -> None:
        """LINT0 = ExtINT (from the PIC), LINT1 = NMI, as firmware leaves them."""
        lapic = self._get("struct kvm_lapic_state *", lib.KVM_GET_LAPIC, "LAPIC")
        registers = ffi.buffer(lapic)
        for offset, mode in ((LAPIC_LVT_LINT0, DELIVERY_EXTINT), (LAPIC_LVT_LINT1, DELIVERY_NMI)):
            registers[offset:offset + 4] = mode.to_bytes(4, "little")
        self._set(lib.KVM_SET_LAPIC, lapic, "LAPIC")

    def get_mp_state(self) -> int:
        """KVM_MP_STATE_*: 0 runnable, 1 uninitialized (waits for a start-up IPI), 3 halted."""
        state = self._get("struct kvm_mp_state *", lib.KVM_GET_MP_STATE, "MP state")
        return int(state.mp_state)

    def set_mp_state(self, value: int) -> None:
        """See `get_mp_state`."""
        state = ffi.new("struct kvm_mp_state *", [value])
        self._set(lib.KVM_SET_MP_STATE, state, "MP state")

    def tsc_khz(self) -> int:
        """The guest's TSC frequency in kHz, 0 if KVM can't tell."""
        return max(0, int(lib.sv_ioctl_value(self._vcpu.fd, lib.KVM_GET_TSC_KHZ, 0)))

    def mark_paused(self) -> None:
        """KVM_KVMCLOCK_CTRL: the guest's watchdogs must not count the pause.

        Refused by KVM (EINVAL) while the guest does not use kvmclock: ignored.
        """
        lib.sv_ioctl_value(self._vcpu.fd, lib.KVM_KVMCLOCK_CTRL, 0)

    # ---- power-on state ---------------------------------------------------------------------

    def remember_initial(self) -> None:
        """Keep the present state for `restore_initial`: call before the vCPU first runs."""
        self._initial = [
            (set_request, self._get(kind, get_request, what))
            for kind, get_request, set_request, what in (
                ("struct kvm_lapic_state *", lib.KVM_GET_LAPIC, lib.KVM_SET_LAPIC, "LAPIC"),
                ("struct kvm_sregs *", lib.KVM_GET_SREGS, lib.KVM_SET_SREGS, "system registers"),
                ("struct kvm_xcrs *", lib.KVM_GET_XCRS, lib.KVM_SET_XCRS, "XCRs"),
                ("struct kvm_debugregs *", lib.KVM_GET_DEBUGREGS, lib.KVM_SET_DEBUGREGS,
                 "debug registers"),
                ("struct kvm_vcpu_events *", lib.KVM_GET_VCPU_EVENTS, lib.KVM_SET_VCPU_EVENTS,
                 "pending events"),
                ("struct kvm_regs *", lib.KVM_GET_REGS, lib.KVM_SET_REGS, "registers"),
                ("struct kvm_mp_state *", lib.KVM_GET_MP_STATE, lib.KVM_SET_MP_STATE,
                 "MP state"))]

    def restore_initial(self) -> None:
        """System reset: what `remember_initial` kept; CPUID, FPU and most MSRs are left alone.

        :raises HypervisorError: nothing was remembered, or KVM refused.
        """
        if not self._initial:
            raise HypervisorError(f"vCPU {self.index} has no initial state", "remember it first")
        for request, state in self._initial:
            self._set(request, state, "initial state")
        # KVM must not write into memory that the next kernel uses for something else.
        present = [index for index, _ in self.get_msrs(PARAVIRTUAL_MSRS)]
        self.set_msrs([(index, 0) for index in present])

    # ---- helpers ----------------------------------------------------------------------------

    def _get(self, kind: str, request: int, what: str) -> Any:
        state = ffi.new(kind)
        self._check(lib.sv_ioctl(self._vcpu.fd, request, state), f"cannot read its {what}")
        return state

    def _set(self, request: int, state: Any, what: str) -> None:
        self._check(lib.sv_ioctl(self._vcpu.fd, request, state), f"cannot set its {what}")

    def _check(self, result: int, what: str) -> int:
        if result < 0:
            raise HypervisorError(f"KVM: vCPU {self.index}: {what}: {os.strerror(-result)}",
                                  "dmesg may tell why")
        return int(result)
