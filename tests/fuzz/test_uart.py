"""The native UART against a guest that does anything in any order."""

from __future__ import annotations

import os
import random

import pytest

from native._core import ffi, lib

pytestmark = [pytest.mark.fuzz, pytest.mark.native]

DATA, IER, IIR, LCR, MCR, LSR = range(6)


@pytest.mark.parametrize("seed", range(20))
def test_random_accesses_keep_every_promise(seed: int) -> None:
    choose = random.Random(seed)
    irq_fd = os.eventfd(0, os.EFD_NONBLOCK)
    out = ffi.new("struct sv_uart **")
    assert lib.sv_uart_create(-1, 4, irq_fd, out) == 0
    uart = out[0]
    buffer = ffi.new("char[]", 1 << 17)
    lcr = mcr = 0
    sent = bytearray()
    taken = bytearray()
    try:
        for _ in range(5000):
            action = choose.random()
            if action < 0.45:
                offset, value = choose.randrange(10), choose.randrange(256)
                if offset == DATA and not lcr & 0x80 and not mcr & 0x10:
                    if lib.sv_uart_read(uart, LSR) & 0x20:
                        sent.append(value)
                    else:
                        offset = 7
                lib.sv_uart_write(uart, offset, value)
                lcr = value if offset == LCR else lcr
                mcr = value & 0x1F if offset == MCR else mcr
            elif action < 0.85:
                offset = choose.randrange(10)
                value = lib.sv_uart_read(uart, offset)
                assert offset < 8 or value == 0xFF
                if offset == LCR:
                    assert value == lcr
                if offset == IIR:
                    assert value & 0x30 == 0
            elif action < 0.95:
                data = choose.randbytes(choose.randrange(600))
                assert 0 <= lib.sv_uart_put_input(uart, data, len(data)) <= len(data)
            elif action < 0.97:
                for byte in choose.randbytes(choose.randrange(30000)):
                    if not lcr & 0x80 and not mcr & 0x10 and len(sent) - len(taken) < 65536:
                        sent.append(byte)
                    lib.sv_uart_write(uart, DATA, byte)
            else:
                limit = choose.randrange(1 << 17)
                taken += bytes(ffi.buffer(buffer, lib.sv_uart_take_output(uart, buffer, limit)))
        while count := lib.sv_uart_take_output(uart, buffer, 1 << 17):
            taken += bytes(ffi.buffer(buffer, count))
        assert taken == sent
    finally:
        lib.sv_uart_destroy(uart)
        os.close(irq_fd)
