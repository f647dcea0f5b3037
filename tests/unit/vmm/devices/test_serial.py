"""The glue between UART and chardev: nothing is lost, a full side holds up the other alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest

from vmm.devices.serial import Serial
from vmm.event_loop import EventLoop


class Uart:
    """Output in a list of chunks; its descriptor is readable while there is some."""

    def __init__(self) -> None:
        self.output_fd = os.eventfd(0, os.EFD_NONBLOCK)
        self.output = b""
        self.taken: list[bytes] = []

    def say(self, data: bytes) -> None:
        self.output += data
        os.eventfd_write(self.output_fd, 1)

    def take_output(self, most: int) -> bytes:
        if self.output:
            data, self.output = self.output[:most], self.output[most:]
            return data
        try:
            os.eventfd_read(self.output_fd)
        except BlockingIOError:
            pass
        return b""

    def put_input(self, data: bytes) -> int:
        self.taken.append(data)
        return len(data)


class Chardev:
    """Takes as many bytes as there is room for."""

    def __init__(self) -> None:
        self.room = 1 << 20
        self.written = b""
        self.resumed = 0
        self.on_input: Callable[[bytes], int] | None = None
        self.on_writable: Callable[[], None] | None = None

    def write(self, data: bytes) -> int:
        taken = data[:self.room]
        self.room -= len(taken)
        self.written += taken
        return len(taken)

    def resume_input(self) -> None:
        self.resumed += 1


class Console:
    def __init__(self) -> None:
        self.loop, self.uart, self.chardev = EventLoop(), Uart(), Chardev()
        self.serial = Serial(self.uart, self.chardev, self.loop)  # type: ignore[arg-type]


@pytest.fixture
def console() -> Iterator[Console]:
    result = Console()
    yield result
    os.close(result.uart.output_fd)
    result.loop.close()


def test_output_reaches_the_chardev(console: Console) -> None:
    console.uart.say(b"x" * 10_000)
    console.loop.run_once(1)
    assert console.chardev.written == b"x" * 10_000
    assert console.chardev.resumed


def test_input_reaches_the_uart(console: Console) -> None:
    assert console.chardev.on_input is not None
    assert console.chardev.on_input(b"typed") == 5
    assert console.uart.taken == [b"typed"]


def test_a_full_chardev_is_waited_for_without_spinning(console: Console) -> None:
    console.chardev.room = 3
    console.uart.say(b"abcdef")
    console.loop.run_once(1)
    assert console.chardev.written == b"abc"
    resumed = console.chardev.resumed
    console.uart.say(b"ghi")
    console.loop.run_once(0)
    assert console.chardev.resumed == resumed  # the UART's descriptor is not looked at
    console.chardev.room = 100
    assert console.chardev.on_writable is not None
    console.chardev.on_writable()
    assert console.chardev.written == b"abcdefghi"
    console.uart.say(b"jkl")
    console.loop.run_once(1)
    assert console.chardev.written == b"abcdefghijkl"


def test_a_guest_that_never_stops_leaves_others_their_turn(console: Console) -> None:
    console.uart.say(b"x" * (1 << 20))
    console.loop.run_once(1)
    assert 0 < len(console.chardev.written) < 1 << 20
    for _ in range(10):
        console.loop.run_once(1)
    assert len(console.chardev.written) == 1 << 20


def test_the_last_words_are_sent(console: Console) -> None:
    console.uart.say(b"bye")
    console.serial.close()
    assert console.chardev.written == b"bye"
    assert console.chardev.on_input is None and console.chardev.on_writable is None
