"""Interrupts into a halted guest: the native UART's, and an irqfd's. Real mode, 8259."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from native._core import ffi, lib
from tests.support import tiny_guest as asm
from tests.support.capabilities import require
from tests.support.tiny_guest import TinyGuest, wait_for
from vmm.vcpu import VcpuThread

pytestmark = pytest.mark.vm

HANDLER = 0x1800
PIC_BASE = 0x20


def out_imm(port: int, value: int) -> bytes:
    """mov al, value; out port, al."""
    return bytes((0xB0, value, 0xE6, port))


def out_dx(port: int, value: int) -> bytes:
    """mov dx, port; mov al, value; out dx, al (16-bit code)."""
    return b"\xba" + port.to_bytes(2, "little") + bytes((0xB0, value, 0xEE))


ECHO = bytes((0xBA, 0xF8, 0x03, 0xEC, 0xEE))  # mov dx, 0x3f8; in al, dx; out dx, al
TELL = bytes((0xBA, 0x00, 0x06, 0xEE))  # mov dx, 0x600; out dx, al
END_OF_INTERRUPT = bytes((0xB0, 0x20, 0xE6, 0x20, 0xCF))  # ...; iret
READY = bytes((0xBA, 0xFF, 0x06, 0xEE))  # mov dx, 0x6ff; out dx, al
WAIT = bytes((0xFB, 0xF4, 0xEB, 0xFC))  # sti; hlt; jmp


class RealModeGuest(TinyGuest):
    """Halts for ever; runs `handler` on each interrupt `line` of the master 8259."""

    def __init__(self, line: int, prepare: bytes, handler: bytes) -> None:
        super().__init__(paused=True)
        pic = out_imm(0x20, 0x11) + out_imm(0x21, PIC_BASE) + out_imm(0x21, 4)
        pic += out_imm(0x21, 1) + out_imm(0x21, 0xFF & ~(1 << line))
        self.memory.write(asm.CODE, pic + prepare + READY + WAIT)
        self.memory.write(HANDLER, handler + END_OF_INTERRUPT)
        self.memory.write(4 * (PIC_BASE + line), HANDLER.to_bytes(4, "little"))
        real = {"base": 0, "limit": 0xFFFF, "selector": 0, "present": 1, "s": 1, "type": 3}
        self.vcpu.set_sregs({
            **dict.fromkeys(("ds", "es", "fs", "gs", "ss"), real), "cs": {**real, "type": 11},
            "cr0": 0x60000010, "idt": {"base": 0, "limit": 0x3FF}})
        self.vcpu.set_regs(rip=asm.CODE, rsp=asm.CODE)
        self.vcpu.set_lapic_lint()
        self.thread.start()
        wait_for(lambda: bool(self.ports.writes), "set-up of the guest")
        self.ports.writes.clear()


@pytest.fixture
def guests() -> Iterator[list[TinyGuest]]:
    require("kvm")
    made: list[TinyGuest] = []
    yield made
    for guest in made:
        guest.close()


def test_uart_input_wakes_the_guest_every_time(guests: list[TinyGuest]) -> None:
    guest = RealModeGuest(4, out_dx(0x3F9, 1), ECHO)
    guests.append(guest)
    output = bytearray()

    def echoed(byte: int) -> bool:
        output.extend(guest.uart.take_output(10))
        return output[-1:] == bytes((byte,))

    for number in range(300):
        assert guest.uart.put_input(bytes((number & 0xFF,))) == 1
        wait_for(lambda: echoed(number & 0xFF), "echo")  # noqa: B023
    assert len(output) == 300
    assert guest.vcpu.counters()["forwarded"] == 1, "that it is ready"


def test_irqfd_wakes_the_guest_every_time(guests: list[TinyGuest]) -> None:
    guest = RealModeGuest(5, b"", TELL)
    guests.append(guest)
    call = os.eventfd(0, os.EFD_NONBLOCK)
    guest.vm.add_irqfd(5, call)
    for number in range(300):
        os.eventfd_write(call, 1)
        wait_for(lambda: len(guest.ports.writes) > number, "interrupt")  # noqa: B023
    guest.vm.remove_irqfd(5, call)
    os.close(call)


def test_interrupt_while_paused_comes_after_resume(guests: list[TinyGuest]) -> None:
    guest = RealModeGuest(5, b"", TELL)
    guests.append(guest)
    for number in range(50):
        guest.thread.request_pause()
        assert guest.thread.wait_parked(asm.soon())
        guest.vm.set_irq_line(5, True)
        guest.vm.set_irq_line(5, False)
        assert len(guest.ports.writes) == number
        guest.thread.resume()
        wait_for(lambda: len(guest.ports.writes) == number + 1, "interrupt")  # noqa: B023


@pytest.mark.parametrize("line", [3, 5, 9, 12])
def test_a_reset_forgets_interrupts_of_the_last_life(guests: list[TinyGuest], line: int) -> None:
    """One of the slave 8259, left over in the master, would reach the next kernel as vector 7."""
    guest = TinyGuest(asm.HLT, paused=True)
    guests.append(guest)

    def chips() -> list[bytes]:
        states = []
        for number in range(3):
            chip = ffi.new("struct kvm_irqchip *")
            chip.chip_id = number
            assert lib.sv_ioctl(guest.vm.fd, lib.KVM_GET_IRQCHIP, chip) == 0
            states.append(bytes(ffi.buffer(chip)))
        return states

    fresh = chips()
    guest.vm.set_irq_line(line, True)
    guest.vm.set_irq_line(line, False)
    assert chips() != fresh
    guest.vm.reset()
    assert chips() == fresh


# ---- application processors ------------------------------------------------------------------

SPURIOUS = 0xFEE000F0  # Intel SDM vol. 3, 11.4.7.2: bit 8 enables the APIC
ICR_LOW, ICR_HIGH = 0xFEE00300, 0xFEE00310  # 11.6.1
INIT, STARTUP_AT_0X8000 = 0x4500, 0x4608
AP_CODE = 0x8000


def store(address: int, value: int) -> bytes:
    """mov eax, value; mov [address], eax (32-bit code)."""
    return asm.mov_eax(value) + asm.STORE_EAX + asm.word(address)


def test_start_up_ipi_starts_a_second_vcpu(guests: list[TinyGuest]) -> None:
    guest = TinyGuest(store(SPURIOUS, 0x1FF), store(ICR_HIGH, 1 << 24), store(ICR_LOW, INIT),
                      store(ICR_LOW, STARTUP_AT_0X8000), asm.HLT, paused=True)
    guests.append(guest)
    guest.memory.write(AP_CODE, out_dx(0x605, 0xA9) + b"\xf4\xeb\xfd")
    second = VcpuThread(guest.vm.create_vcpu(1), guest.thread._mmio, guest.thread._ports,
                        lambda kind, _: guest.exits.append(kind))
    try:
        second.start()
        for _ in range(20):  # it waits inside KVM_RUN: a kick must get it out
            wait_for(lambda: not second.wait_paused(0), "entry into KVM")
            second.request_pause()
            assert second.wait_parked(asm.soon())
            assert second.vcpu.counters()["forwarded"] == 0
            second.resume()
        guest.thread.start()
        wait_for(lambda: bool(guest.ports.writes), "access of the second vCPU")
        assert guest.ports.writes == [(5, 1, 0xA9)]
        assert second.vcpu.counters()["forwarded"] == 1
        assert guest.exits == []
    finally:
        second.request_stop()
        assert second.join(asm.soon())
