"""Consoles and random bytes: what a driver reads, with or without a back end that answers."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING, cast

import pytest

from shared.virtio import console
from vmm.devices.virtio_console import VirtioConsole
from vmm.devices.virtio_rng import VirtioRng
from vmm.devices.worker_state import WorkerState
from vmm.event_loop import EventLoop

if TYPE_CHECKING:
    from vmm.memory import GuestMemory

MEMORY = cast("GuestMemory", None)


@pytest.fixture
def loop() -> Iterator[EventLoop]:
    loop = EventLoop()
    yield loop
    loop.close()


@pytest.mark.parametrize("max_ports", [1, 2, 31])
def test_the_config_space(loop: EventLoop, max_ports: int) -> None:
    device = VirtioConsole("con", -1, MEMORY, loop, max_ports, WorkerState("state", 64))
    assert device.device_id == 3
    assert device.read_config(0, 12) == struct.pack("<HHII", 0, 0, max_ports, 0)
    assert device.read_config(4, 4) == struct.pack("<I", max_ports)
    assert device.read_config(8, 16) == bytes(16)
    assert device.read_config(4096, 4) == bytes(4)
    device.write_config(8, b"!\0\0\0")  # emerg_wr: nobody offered it
    assert device.features() == 1 | 2 | 1 << 28 | 1 << 29 | 1 << 32
    sizes = [128] * (2 * max_ports + 2)
    sizes[2:4] = [32, 32]
    assert list(device.queue_sizes) == sizes
    device.close()


def test_a_reset_forgets_which_ports_are_open(loop: EventLoop) -> None:
    state = WorkerState("state", console.STATE_BYTES)
    device = VirtioConsole("con", -1, MEMORY, loop, 1, state)
    device.reset()  # there is no state yet
    os.pwrite(state.fileno(), b"anything", 100)
    device.reset()
    assert os.pread(state.fileno(), console.STATE_BYTES, 0) == bytes(console.STATE_BYTES)
    device.close()
    state.close()


def test_a_state_can_be_neither_cut_nor_grown() -> None:
    state = WorkerState("state", 64)
    for length in (0, 63, 65):
        with pytest.raises(PermissionError):
            os.ftruncate(state.fileno(), length)
    assert state.fileno() == state.fileno()
    state.close()
    state.close()


def test_random_bytes_have_no_config_space(loop: EventLoop) -> None:
    device = VirtioRng("rng", -1, MEMORY, loop)
    assert device.device_id == 4
    assert device.read_config(0, 8) == bytes(8)
    assert device.features() == 1 << 28 | 1 << 29 | 1 << 32
    assert list(device.queue_sizes) == [256]
    device.close()
