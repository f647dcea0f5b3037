"""The native 16550A, register by register (PC16550D data sheet, 8.0)."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Iterator

import pytest

from native._core import ffi, lib

pytestmark = pytest.mark.native

DATA, IER, IIR, LCR, MCR, LSR, MSR, SCR = range(8)
RX, THR, LINE, MODEM = 1, 2, 4, 8
NONE = 0x01


class Uart:
    """A UART whose interrupt is an eventfd."""

    def __init__(self) -> None:
        self.irq_fd = os.eventfd(0, os.EFD_NONBLOCK)
        out = ffi.new("struct sv_uart **")
        assert lib.sv_uart_create(-1, 4, self.irq_fd, out) == 0
        self.uart = out[0]
        self.output_fd: int = lib.sv_uart_output_fd(self.uart)

    def read(self, offset: int) -> int:
        return int(lib.sv_uart_read(self.uart, offset))

    def write(self, offset: int, value: int) -> None:
        lib.sv_uart_write(self.uart, offset, value)

    def put(self, data: bytes) -> int:
        return int(lib.sv_uart_put_input(self.uart, data, len(data)))

    def take(self, limit: int = 1 << 20) -> bytes:
        buffer = ffi.new("char[]", limit)
        return bytes(ffi.buffer(buffer, lib.sv_uart_take_output(self.uart, buffer, limit)))

    def reset(self) -> None:
        lib.sv_uart_reset(self.uart)

    def interrupts(self) -> int:
        """How often the interrupt was raised since the last call."""
        try:
            return os.eventfd_read(self.irq_fd)
        except BlockingIOError:
            return 0

    def notified(self, wait: float = 0.0) -> bool:
        return bool(select.select([self.output_fd], [], [], wait)[0])

    def fill_output(self) -> None:
        for _ in range(lib.SV_UART_TX_SIZE):
            self.write(DATA, 0x2E)

    def close(self) -> None:
        lib.sv_uart_destroy(self.uart)
        os.close(self.irq_fd)


@pytest.fixture
def uart() -> Iterator[Uart]:
    device = Uart()
    yield device
    device.close()


def test_power_on_registers(uart: Uart) -> None:
    assert [uart.read(offset) for offset in (IER, IIR, LCR, MCR, LSR, SCR)] == [
        0, NONE, 0, 0, 0x60, 0]
    assert uart.read(MSR) == 0xB0
    assert uart.interrupts() == 0


def test_output_comes_out_in_order_and_notifies(uart: Uart) -> None:
    assert not uart.notified()
    for byte in b"hello":
        uart.write(DATA, byte)
    assert uart.notified(5)
    assert uart.take(2) == b"he"
    assert uart.notified(), "there is more"
    assert uart.take() == b"llo"
    assert not uart.notified()
    assert uart.take() == b""


def test_output_is_announced_in_batches(uart: Uart) -> None:
    """Each wake-up of the reader finds what collected meanwhile; nothing is forgotten."""
    wakes = 0
    received = 0
    start = time.monotonic()
    for _ in range(20):
        for _ in range(500):
            uart.write(DATA, 0x41)
            if uart.notified():
                wakes += 1
                received += len(uart.take())
    duration = time.monotonic() - start
    assert wakes <= 2 + duration / 0.001
    assert received or uart.notified(5)
    received += len(uart.take())
    assert received == 10_000
    assert not uart.notified(0.005)


def test_a_half_full_ring_is_announced_at_once(uart: Uart) -> None:
    uart.write(DATA, 0)
    assert uart.notified(5)
    uart.take()
    uart.write(DATA, 0)  # starts a batch
    for _ in range(lib.SV_UART_TX_SIZE // 2):
        uart.write(DATA, 0)
    assert uart.notified(5)


def test_output_wraps_around(uart: Uart) -> None:
    for round in range(20):
        data = bytes((round + i) % 251 for i in range(9973))
        for byte in data:
            uart.write(DATA, byte)
        assert uart.take() == data


def test_full_output_ring_clears_thre_until_there_is_room(uart: Uart) -> None:
    uart.write(IER, THR)
    uart.fill_output()
    uart.read(IIR)
    assert uart.read(LSR) & 0x60 == 0
    uart.write(DATA, 0x58)  # a driver that does not look loses it
    assert uart.read(IIR) == NONE
    uart.interrupts()
    assert uart.take(1) == b"."
    assert uart.read(LSR) & 0x60 == 0x60
    assert uart.interrupts() == 1
    assert uart.read(IIR) == THR
    assert b"X" not in uart.take()


def test_input_is_read_in_order(uart: Uart) -> None:
    assert uart.put(b"abc") == 3
    assert uart.read(LSR) & 1
    assert bytes(uart.read(DATA) for _ in range(3)) == b"abc"
    assert uart.read(LSR) & 1 == 0
    assert uart.read(DATA) == 0


def test_input_beyond_the_fifo_is_refused_and_room_is_announced(uart: Uart) -> None:
    size = lib.SV_UART_RX_SIZE
    assert uart.put(bytes(size + 100)) == size
    assert uart.put(b"x") == 0
    assert not uart.notified()
    for _ in range(size // 2):
        uart.read(DATA)
    assert uart.notified(5)
    assert uart.take() == b"", "taking clears the notice"
    assert not uart.notified()
    assert uart.put(bytes(size)) == size // 2


def test_receive_interrupt(uart: Uart) -> None:
    uart.put(b"a")
    assert uart.interrupts() == 0, "not enabled yet"
    uart.write(IER, RX)
    assert uart.interrupts() == 1
    assert uart.read(IIR) == 0x04
    uart.read(DATA)
    assert uart.read(IIR) == NONE
    uart.put(b"b")
    assert uart.interrupts() == 1
    uart.put(b"c")
    assert uart.interrupts() == 1, "once more: the first edge may have met a masked pin"


def test_fifo_trigger_level_and_timeout(uart: Uart) -> None:
    uart.write(IIR, 0x81)  # FCR: enabled, trigger at 8
    uart.write(IER, RX)
    uart.put(b"1234567")
    assert uart.read(IIR) == 0xCC, "below the level: character timeout"
    uart.put(b"8")
    assert uart.read(IIR) == 0xC4


def test_thr_interrupt_is_raised_by_enabling_and_cleared_by_iir(uart: Uart) -> None:
    uart.write(IER, THR)
    assert uart.interrupts() == 1
    assert uart.read(IIR) == 0x02
    assert uart.read(IIR) == NONE
    uart.write(IER, 0)
    uart.write(IER, THR)
    assert uart.interrupts() == 1, "enabling again reports again"
    assert uart.read(IIR) == 0x02
    uart.write(DATA, 0x41)
    uart.write(DATA, 0x42)
    assert uart.interrupts() == 1, "one edge for a burst"
    assert uart.read(IIR) == 0x02


def test_interrupt_priority(uart: Uart) -> None:
    uart.write(IIR, 0x01)
    uart.write(MCR, 0x10)
    uart.write(MCR, 0x00)  # modem lines changed
    uart.write(MCR, 0x10)
    for _ in range(lib.SV_UART_RX_SIZE + 1):
        uart.write(DATA, 0)  # looped back until it overran
    uart.write(IER, RX | THR | LINE | MODEM)
    assert uart.read(IIR) == 0xC6
    assert uart.read(LSR) & 2
    assert uart.read(LSR) & 2 == 0
    assert uart.read(IIR) == 0xC4
    uart.write(IIR, 0x03)  # FCR: empty the receive FIFO
    assert uart.read(IIR) == 0xC2
    assert uart.read(IIR) == 0xC0
    uart.read(MSR)
    assert uart.read(IIR) == 0xC1


def test_loopback_wires_modem_lines_and_data(uart: Uart) -> None:
    uart.write(MCR, 0x1A)  # loopback, OUT2, RTS: the test of Linux's driver
    assert uart.read(MSR) & 0xF0 == 0x90
    uart.write(MCR, 0x15)
    assert uart.read(MSR) & 0xF0 == 0x60
    assert uart.put(b"x") == 0, "the receiver is cut off"
    uart.write(DATA, 0x5A)
    assert uart.read(DATA) == 0x5A
    assert uart.take() == b""
    uart.write(MCR, 0)
    assert uart.notified(5), "input that was refused is welcome now"
    assert uart.read(MSR) & 0xF0 == 0xB0


def test_divisor_latch_hides_data_and_ier(uart: Uart) -> None:
    uart.write(IER, RX)
    uart.write(LCR, 0x83)
    uart.write(DATA, 0x34)
    uart.write(IER, 0x12)
    assert (uart.read(DATA), uart.read(IER)) == (0x34, 0x12)
    uart.write(LCR, 0x03)
    assert uart.read(IER) == RX
    assert uart.take() == b""


def test_it_is_detected_as_a_16550a_and_nothing_newer(uart: Uart) -> None:
    uart.write(IER, 0xFF)
    assert uart.read(IER) == 0x0F, "no sleep mode, no XScale unit enable"
    uart.write(IER, 0)
    uart.write(IIR, 0x21)
    assert uart.read(IIR) >> 5 == 6, "no 64-byte FIFO"
    uart.write(LCR, 0xBF)
    assert uart.read(IIR) != 0, "no EFR"
    uart.write(LCR, 0)
    uart.write(IIR, 0)
    assert uart.read(IIR) >> 6 == 0
    uart.write(SCR, 0xA5)
    assert uart.read(SCR) == 0xA5
    uart.write(MCR, 0xFF)
    assert uart.read(MCR) == 0x1F


def test_switching_the_fifo_empties_it(uart: Uart) -> None:
    uart.put(b"abc")
    uart.write(IIR, 0x01)
    assert uart.read(LSR) & 1 == 0
    uart.put(b"abc")
    uart.write(IIR, 0x00)
    assert uart.read(LSR) & 1 == 0


def test_reset_keeps_what_was_sent(uart: Uart) -> None:
    uart.write(DATA, 0x41)
    uart.put(b"x")
    uart.write(IER, 0x0F)
    uart.write(LCR, 3)
    uart.reset()
    assert [uart.read(offset) for offset in (IER, IIR, LCR, LSR)] == [0, NONE, 0, 0x60]
    assert uart.take() == b"A"


def test_unknown_registers_do_nothing(uart: Uart) -> None:
    for offset in (8, 1000, 0xFFFFFFFF):
        assert uart.read(offset) == 0xFF
        uart.write(offset, 0xFF)
    uart.write(LSR, 0)
    uart.write(MSR, 0)
    assert uart.read(LSR) == 0x60
