"""Where the initial RAM disk goes."""

from __future__ import annotations

import pytest

from vmm.arch.x86_64.registers import ENTRY_64
from vmm.boot import initrd
from vmm.boot.kernel import Kernel, Segment
from vmm.errors import KernelImageError

MIB = 1 << 20
RAM = 64 * MIB


@pytest.fixture
def kernel() -> Kernel:
    return Kernel(ENTRY_64, 16 * MIB, [Segment(16 * MIB, 0, MIB, MIB)])


@pytest.mark.parametrize("size", [1, 4095, 4096, 4097, MIB])
def test_as_high_as_ram_goes(kernel: Kernel, size: int) -> None:
    address, length = initrd.place("x", size, kernel, RAM)
    assert length == size and address % 4096 == 0
    assert RAM - 4096 < address + size <= RAM


def test_never_above_what_the_kernel_accepts(kernel: Kernel) -> None:
    kernel.initrd_max = 32 * MIB - 1
    address, size = initrd.place("x", 10000, kernel, RAM)
    assert address + size <= 32 * MIB < address + size + 4096
    kernel.initrd_max = 0xFFFFFFFF
    assert initrd.place("x", 4096, kernel, RAM)[0] == RAM - 4096


def test_exactly_between_kernel_and_end(kernel: Kernel) -> None:
    room = RAM - kernel.end
    assert initrd.place("x", room, kernel, RAM) == (kernel.end, room)
    with pytest.raises(KernelImageError, match=r"-initrd x: .* don't fit .*-m"):
        initrd.place("x", room + 1, kernel, RAM)


def test_what_does_not_fit(kernel: Kernel) -> None:
    with pytest.raises(KernelImageError, match="don't fit"):
        initrd.place("x", 2 * RAM, kernel, RAM)
    kernel.initrd_max = 0
    with pytest.raises(KernelImageError, match="don't fit"):
        initrd.place("x", 100, kernel, RAM)


def test_an_empty_one(kernel: Kernel) -> None:
    with pytest.raises(KernelImageError, match="the file is empty"):
        initrd.place("x", 0, kernel, RAM)
