"""A VM whose guest is a handful of bytes of machine code, in 32-bit protected mode.

    guest = TinyGuest(mov_al(0x41), out(0x3F8), hlt())

Flat segments, no paging, no IDT (limit 0: any fault is a triple fault), code at 0x1000, stack
below it, data wherever a test likes.  On KVM without hardware virtualization this mode is
emulated, one instruction in a fraction of a microsecond.
"""

from __future__ import annotations

import _thread
import time
from collections.abc import Callable

from vmm.bus.address_space import AddressSpace
from vmm.config.model import MemoryConfig
from vmm.hypervisor.kvm import KvmHypervisor
from vmm.memory import GuestMemory
from vmm.vcpu import VcpuThread

CODE = 0x1000
SIZE = 4 << 20
LIMIT = 20.0
MMIO = 0xF0100000  # where nothing is mapped


def soon(limit: float = LIMIT) -> float:
    """A deadline."""
    return time.monotonic() + limit


def wait_for(condition: Callable[[], bool], what: str = "condition") -> None:
    """Poll until `condition` holds."""
    deadline = soon()
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not reached"
        time.sleep(0.0005)


class Log:
    """A device that records accesses and answers reads with `answers` in turn, then 0."""

    def __init__(self) -> None:
        self.writes: list[tuple[int, int, int]] = []
        self.reads: list[tuple[int, int]] = []
        self.answers: list[int] = []
        self.gate = _thread.allocate_lock()  # hold it to stop the handlers

    def read(self, offset: int, size: int) -> int:
        self.reads.append((offset, size))
        with self.gate:
            pass
        return self.answers.pop(0) if self.answers else 0

    def write(self, offset: int, size: int, value: int) -> None:
        self.writes.append((offset, size, value))
        with self.gate:
            pass


class TinyGuest:
    """One vCPU, 4 MiB of RAM, `ports` at 0x600..0x6ff and `mmio` at MMIO..+0xfff in Python."""

    def __init__(self, *code: bytes, paused: bool = False, irqchip: bool = True,
                 path: str | None = None, begin: bool = False) -> None:
        config = MemoryConfig()
        config.size, config.path = SIZE, path
        self.memory = GuestMemory(config)
        self.hypervisor = KvmHypervisor()
        region = self.memory.regions[0]
        if begin:
            self.vm = self.hypervisor.begin_vm([(0, region.size, region.user_addr)])
            self.vm.wait()
        else:
            self.vm = self.hypervisor.create_vm()
            self.vm.set_memory(0, 0, region.size, region.user_addr)
            if irqchip:
                self.vm.create_irqchip()
        self.vcpu = self.vm.create_vcpu(0)
        self.uart = self.vm.add_uart(0x3F8, 4)
        self.ports, self.mmio = Log(), Log()
        ports, mmio = AddressSpace(), AddressSpace()
        ports.add(0x600, 0x100, self.ports)
        mmio.add(MMIO, 0x1000, self.mmio)
        self.exits: list[int] = []
        self.thread = VcpuThread(self.vcpu, mmio, ports, lambda kind, _: self.exits.append(kind))
        self.load(b"".join(code))
        if not paused:
            self.thread.start()

    def load(self, code: bytes) -> None:
        """Put `code` at its place and the registers to its start."""
        self.memory.write(CODE, code)
        flat = {"base": 0, "limit": 0xFFFFFFFF, "present": 1, "db": 1, "s": 1, "g": 1}
        data = {**flat, "selector": 16, "type": 3}
        sregs = dict.fromkeys(("ds", "es", "fs", "gs", "ss"), data)
        self.vcpu.set_sregs({**sregs, "cs": {**flat, "selector": 8, "type": 11},
                             "cr0": 0x11, "idt": {"base": 0, "limit": 0},
                             "gdt": {"base": 0, "limit": 0}})
        self.vcpu.set_regs(rip=CODE, rsp=CODE)

    def wait_end(self) -> int:
        """The kind of the exit that ended the guest."""
        wait_for(lambda: bool(self.exits), "end of the guest")
        assert self.thread.wait_parked(soon())
        return self.exits[-1]

    def close(self) -> None:
        """End the thread and free everything."""
        for device in (self.ports, self.mmio):
            if device.gate.locked():
                device.gate.release()
        self.thread.request_stop()
        assert self.thread.join(soon()), "the vCPU thread did not end"
        self.vm.close()
        self.hypervisor.close()
        self.memory.close()


def word(value: int) -> bytes:
    """Four bytes, little-endian."""
    return value.to_bytes(4, "little")


def mov_eax(value: int) -> bytes:
    """mov eax, imm32."""
    return b"\xb8" + word(value)


def mov_edx(value: int) -> bytes:
    """mov edx, imm32."""
    return b"\xba" + word(value)


def mov_ecx(value: int) -> bytes:
    """mov ecx, imm32."""
    return b"\xb9" + word(value)


def mov_esi(value: int) -> bytes:
    """mov esi, imm32."""
    return b"\xbe" + word(value)


def mov_edi(value: int) -> bytes:
    """mov edi, imm32."""
    return b"\xbf" + word(value)


OUT_AL, OUT_AX, OUT_EAX = b"\xee", b"\x66\xef", b"\xef"
IN_AL, IN_AX, IN_EAX = b"\xec", b"\x66\xed", b"\xed"
REP_OUTSB, REP_INSB, REP_OUTSD = b"\xf3\x6e", b"\xf3\x6c", b"\xf3\x6f"
HLT, UD2, JUMP_SELF = b"\xf4", b"\x0f\x0b", b"\xeb\xfe"
STORE_AL, STORE_EAX = b"\xa2", b"\xa3"  # + address
LOAD_AL, LOAD_EAX = b"\xa0", b"\xa1"  # + address
RESET_PULSE = b"\xb0\xfe\xe6\x64"  # mov al, 0xfe; out 0x64, al: ends the guest


def jump_back(code: bytes) -> bytes:
    """jmp rel32 to the start of `code`, which it follows."""
    return b"\xe9" + ((-(len(code) + 5)) & 0xFFFFFFFF).to_bytes(4, "little")
