"""Kernel images with anything in them: KernelImageError or inside RAM, nothing else."""

from __future__ import annotations

import os
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.vmm.boot.images import BASE, BZIMAGE_FIELDS, bzimage, elf
from vmm.arch.x86_64 import layout
from vmm.boot import kernel
from vmm.errors import KernelImageError

pytestmark = pytest.mark.fuzz

RAM_END = 64 << 20

NUMBERS = st.one_of(
    st.integers(0, 0x5000), st.integers(0, (1 << 64) - 1),
    st.sampled_from([0, 1, 0x7000, 0xA0000, 0x100000, BASE, RAM_END - 1, RAM_END, 1 << 31,
                     (1 << 31) - 1, (1 << 32) - 1, 1 << 32, 1 << 63, (1 << 63) - 1,
                     (1 << 64) - 1, (1 << 64) - 0x1000]))


def inspect(image: bytes) -> None:
    """Whatever is accepted lies in the file, in RAM, and above everything that we write."""
    fd = os.memfd_create("image")
    try:
        os.write(fd, image)
        try:
            found = kernel.inspect("kernel", fd, len(image), RAM_END)
        except KernelImageError as error:
            assert "\n" not in str(error) and error.hint
            return
    finally:
        os.close(fd)
    end = layout.KERNEL_START
    assert found.segments
    for segment in sorted(found.segments, key=lambda s: s.address):
        assert segment.address >= end
        assert 0 <= segment.size <= segment.memory_size
        assert segment.offset >= 0 and segment.offset + segment.size <= len(image)
        end = segment.address + segment.memory_size
    assert end <= found.end <= RAM_END
    assert any(s.address <= found.entry <= s.address + s.memory_size for s in found.segments)
    assert 0 < found.command_line_limit < layout.COMMAND_LINE_LIMIT
    assert len(found.setup_header) <= 0x290 - 0x1F1


SEGMENT = st.tuples(NUMBERS, NUMBERS, NUMBERS, NUMBERS)
WIDTHS = {"type": 16, "machine": 16, "version": 32, "entry": 64, "phoff": 64, "phentsize": 16,
          "phnum": 16}


@settings(max_examples=400, deadline=None)
@given(st.lists(SEGMENT, max_size=5), st.one_of(st.none(), st.binary(max_size=64)),
       st.dictionaries(st.sampled_from(sorted(WIDTHS)), NUMBERS, max_size=2))
def test_elf_fields(segments: list[tuple[int, ...]], notes: bytes | None,
                    fields: dict[str, int]) -> None:
    fields = {name: value & (1 << WIDTHS[name]) - 1 for name, value in fields.items()}
    inspect(elf(segments=segments, notes=notes, **fields))


@settings(max_examples=400, deadline=None)
@given(st.dictionaries(st.sampled_from(sorted(BZIMAGE_FIELDS)), NUMBERS, max_size=4),
       st.integers(0, 0x400))
def test_bzimage_fields(fields: dict[str, int], size: int) -> None:
    sizes = {name: 8 * struct.calcsize(form) for name, (_, form) in BZIMAGE_FIELDS.items()}
    fields = {name: value & (1 << sizes[name]) - 1 for name, value in fields.items()}
    inspect(bzimage(size, **fields))


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(["elf", "pvh", "bzimage"]), st.integers(0, 0x4000),
       st.lists(st.tuples(st.integers(0, 0x900), st.integers(0, 255)), max_size=12))
def test_flipped_bytes_and_cut_files(form: str, length: int,
                                     changes: list[tuple[int, int]]) -> None:
    image = bytearray({"elf": elf(), "pvh": elf(pvh=BASE), "bzimage": bzimage()}[form])
    for at, value in changes:
        image[at] = value
    inspect(bytes(image[:length] if length else image))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300),
       st.sampled_from([b"", b"\x7fELF\x02\x01\x01", bytes(0x202) + b"HdrS"]))
def test_random_bytes(data: bytes, head: bytes) -> None:
    inspect(head + data)
