"""What to tell when KVM can't go on: registers, exit data and the instruction's bytes."""

from __future__ import annotations

import os

from native._core import ffi, lib
from shared.errors import StratovirtError

TYPE_CHECKING = False  # importing typing for it would cost 10 ms of the start
if TYPE_CHECKING:
    from typing import Any

    from vmm.hypervisor.kvm_vcpu import KvmVcpu

REASONS = {0: "KVM_EXIT_UNKNOWN", 1: "KVM_EXIT_EXCEPTION", 4: "KVM_EXIT_DEBUG",
           5: "KVM_EXIT_HLT", 8: "KVM_EXIT_SHUTDOWN (triple fault)", 9: "KVM_EXIT_FAIL_ENTRY",
           17: "KVM_EXIT_INTERNAL_ERROR", 24: "KVM_EXIT_SYSTEM_EVENT"}
SUBERRORS = {1: "emulation failure", 2: "simultaneous exceptions", 3: "delivery of an event",
             4: "unexpected exit reason"}


def report(vcpu: KvmVcpu, native: Any) -> str:
    """Several lines; never raises, because what it tells about is bad enough."""
    lines = [f"vCPU {vcpu.index} can't go on: {_exit_line(native)}"]
    lines += _failure_lines(native)
    try:
        lines += _register_lines(vcpu)
    except StratovirtError as error:
        lines.append(f"no registers: {error}")
    return "\n".join(lines)


def _exit_line(native: Any) -> str:
    if native.run_errno:
        return f"KVM_RUN failed: {os.strerror(native.run_errno)}"
    failure = _failure(native)
    return REASONS.get(failure.reason, f"exit reason {failure.reason}")


def _failure(native: Any) -> Any:
    failure = ffi.new("struct sv_failure *")
    lib.sv_vcpu_failure(native, failure)
    return failure


def _failure_lines(native: Any) -> list[str]:
    failure = _failure(native)
    if native.run_errno:
        return []
    if failure.reason == lib.KVM_EXIT_FAIL_ENTRY:
        return [f"hardware entry failure reason {failure.hardware_reason:#x} "
                f"on host CPU {failure.cpu}"]
    if failure.reason != lib.KVM_EXIT_INTERNAL_ERROR:
        return [f"hardware exit reason {failure.hardware_reason:#x}"] if failure.reason == 0 else []
    name = SUBERRORS.get(failure.suberror, "?")
    lines = [f"suberror {failure.suberror} ({name})"]
    if failure.suberror == lib.KVM_INTERNAL_ERROR_EMULATION:
        code = bytes(failure.insn)[:failure.insn_size]
        lines.append(f"instruction bytes at rip: {code.hex(' ')}" if code else
                     "no instruction bytes: the fetch itself failed (rip outside RAM?)")
    data = " ".join(f"{word:#x}" for word in failure.data[0:failure.count])
    return [*lines, f"data: {data}" if data else "no data"]


def _register_lines(vcpu: KvmVcpu) -> list[str]:
    regs = vcpu.get_regs()
    sregs = vcpu.get_sregs()
    names = list(regs)
    lines = [" ".join(f"{name:>6}={regs[name]:016x}" for name in names[start:start + 4])
             for start in range(0, len(names), 4)]
    lines.append(" ".join(f"{name}={sregs[name]:x}"
                          for name in ("cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base")))
    for name in ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt"):
        s = sregs[name]
        lines.append(f"{name:>3} selector={s['selector']:04x} base={s['base']:016x} "
                     f"limit={s['limit']:08x} type={s['type']:x} dpl={s['dpl']} "
                     f"present={s['present']} l={s['l']} db={s['db']} "
                     f"unusable={s['unusable']}")
    lines.append(f"cpl={sregs['ss']['dpl']} " + " ".join(
        f"{name} base={sregs[name]['base']:016x} limit={sregs[name]['limit']:04x}"
        for name in ("gdt", "idt")))
    return lines
