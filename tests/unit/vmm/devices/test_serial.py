"""The serial port's glue: nothing is lost, nothing spins, whoever is slow."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, cast

import pytest

from vmm.chardev.base import Chardev
from vmm.devices.serial import Serial
from vmm.event_loop import EventLoop

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vmm.hypervisor.interface import Uart


class FakeUart:
    """`output` waits in it; `output_fd` is readable as long as there is some."""

    def __init__(self) -> None:
        self.output = b""
        self.input = b""
        self.output_fd = os.eventfd(0, os.EFD_NONBLOCK)

    def guest_writes(self, data: bytes) -> None:
        self.output += data
        os.eventfd_write(self.output_fd, 1)

    def take_output(self, limit: int) -> bytes:
        data, self.output = self.output[:limit], self.output[limit:]
        if not self.output:
            try:
                os.eventfd_read(self.output_fd)
            except BlockingIOError:
                pass
        return data

    def put_input(self, data: bytes) -> int:
        self.input += data
        return len(data)


class SlowChardev(Chardev):
    """Takes `room` bytes."""

    def __init__(self, loop: EventLoop) -> None:
        super().__init__("c", "null", loop)
        self.room = 0
        self.taken = b""
        self.asked = 0

    def write(self, data: bytes) -> int:
        self.asked += 1
        count = min(self.room, len(data))
        self.taken += data[:count]
        self.room -= count
        return count


class Rig:
    def __init__(self) -> None:
        self.loop = EventLoop()
        self.uart = FakeUart()
        self.chardev = SlowChardev(self.loop)
        self.serial = Serial(cast("Uart", self.uart), self.chardev, self.loop)

    def step(self) -> None:
        self.loop.run_once(0)


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.loop.close()
    os.close(rig.uart.output_fd)


def test_output_goes_out(rig: Rig) -> None:
    rig.chardev.room = 1 << 20
    text = os.urandom(100_000)
    rig.uart.guest_writes(text)
    rig.step()
    assert rig.chardev.taken == text
    rig.serial.close()


def test_output_waits_for_room_without_spinning(rig: Rig) -> None:
    rig.chardev.room = 5
    rig.uart.guest_writes(b"0123456789")
    for _ in range(10):
        rig.step()
    assert rig.chardev.taken == b"01234" and rig.chardev.asked < 5
    rig.uart.guest_writes(b"ab")
    rig.step()
    assert rig.chardev.taken == b"01234"
    rig.chardev.room = 100
    assert rig.chardev.on_writable is not None
    rig.chardev.on_writable()
    assert rig.chardev.taken == b"0123456789ab"
    rig.uart.guest_writes(b"later")
    rig.step()
    assert rig.chardev.taken.endswith(b"later")
    rig.serial.close()


def test_what_came_last_is_sent_at_the_end(rig: Rig) -> None:
    rig.chardev.room = 100
    rig.uart.guest_writes(b"panic")
    rig.serial.close()
    assert rig.chardev.taken == b"panic"
    assert rig.chardev.on_input is None and rig.chardev.on_writable is None


def test_the_end_doesnt_wait_for_a_full_chardev(rig: Rig) -> None:
    rig.uart.guest_writes(b"panic")
    rig.step()
    rig.serial.close()
    assert rig.chardev.taken == b""


def test_input_reaches_the_guest(rig: Rig) -> None:
    assert rig.chardev.on_input is not None
    assert rig.chardev.on_input(b"ls\n") == 3
    assert rig.uart.input == b"ls\n"
    rig.serial.close()
