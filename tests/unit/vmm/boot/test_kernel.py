"""Kernel images: the right ones load where they should, each wrong field is named."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.vmm.boot.images import BASE, bzimage, elf, note
from vmm.arch.x86_64 import layout
from vmm.arch.x86_64.registers import ENTRY_64, ENTRY_PVH
from vmm.boot.loading import Loading
from vmm.config.model import BootConfig, MemoryConfig
from vmm.errors import KernelImageError
from vmm.memory import GuestMemory

MIB = 1 << 20
RAM = 32 * MIB

Load = Callable[..., Loading]


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    config = MemoryConfig()
    config.size = RAM
    memory = GuestMemory(config)
    yield memory
    memory.close()


@pytest.fixture
def load(memory: GuestMemory, tmp_path: Path) -> Load:
    """Load an image (bytes) or a path; returns when its bytes are in RAM."""

    def run(image: bytes | Path, fresh: bool = True) -> Loading:
        config = BootConfig()
        if isinstance(image, bytes):
            (tmp_path / "kernel").write_bytes(image)
            image = tmp_path / "kernel"
        config.kernel = str(image)
        loading = Loading(memory, config, fresh)
        loading.wait()
        return loading

    return run


def descriptors() -> set[str]:
    return {os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")
            if os.path.exists(f"/proc/self/fd/{fd}")}


# ---- what boots ----------------------------------------------------------------------------

def test_elf_goes_to_its_physical_addresses(load: Load, memory: GuestMemory) -> None:
    image = elf()
    kernel = load(image).kernel
    assert (kernel.mode, kernel.entry) == (ENTRY_64, BASE)
    assert memory.read(BASE, 0x2000) == image[0x1000:0x3000]
    assert memory.read(BASE + 0x2000, 0x1000) == image[0x3000:0x4000]
    assert kernel.end == BASE + 0x7000
    assert memory.read(0, MIB).strip(b"\0") == b"" and kernel.setup_header == b""


def test_what_follows_a_segment_is_cleared_when_ram_is_not_fresh(load: Load,
                                                                 memory: GuestMemory) -> None:
    memory.write(BASE, b"\xee" * 0x8000)
    load(elf(), fresh=False)
    assert memory.read(BASE + 0x3000, 0x4000) == bytes(0x4000)
    assert memory.read(BASE + 0x7000, 0x1000) == b"\xee" * 0x1000


@pytest.mark.parametrize("size", [4, 8])
def test_pvh_note_is_preferred(load: Load, size: int) -> None:
    notes = note(7, name=b"GNU\0", kind=18) + note(1, kind=5) + note(BASE + 0x10, size)
    kernel = load(elf(notes=notes)).kernel
    assert (kernel.mode, kernel.entry) == (ENTRY_PVH, BASE + 0x10)


def test_notes_without_a_pvh_entry_mean_the_64_bit_protocol(load: Load) -> None:
    notes = note(7, name=b"GNU\0", kind=18) + note(1, kind=5)
    assert load(elf(notes=notes)).kernel.mode == ENTRY_64
    assert load(elf(notes=b"")).kernel.mode == ENTRY_64


def test_bzimage_loads_at_1_mib_and_is_entered_past_its_head(load: Load,
                                                            memory: GuestMemory) -> None:
    image = bzimage()
    kernel = load(image).kernel
    assert (kernel.mode, kernel.entry) == (ENTRY_64, layout.KERNEL_START + 0x200)
    assert memory.read(layout.KERNEL_START, 0x3000) == image[0xA00:]
    assert kernel.setup_header == image[0x1F1:0x202 + 0x6A]
    assert kernel.end == BASE + 0x100000
    assert kernel.initrd_max == 0x7FFFFFFF and kernel.command_line_limit == 2047


@pytest.mark.parametrize(("fields", "end"), [
    ({"kernel_alignment": 16 * MIB, "pref_address": MIB}, 16 * MIB + 0x100000),
    ({"pref_address": MIB, "kernel_alignment": 4096}, 2 * MIB),
    ({"pref_address": MIB, "kernel_alignment": 4096, "init_size": 0}, MIB + 0x3000),
    ({"relocatable_kernel": 0}, BASE + 0x100000)])
def test_bzimage_needs_room_where_it_unpacks(load: Load, fields: dict[str, int],
                                             end: int) -> None:
    assert load(bzimage(**fields)).kernel.end == end


def test_bzimage_that_cannot_move_goes_where_it_wants(load: Load, memory: GuestMemory) -> None:
    image = bzimage(relocatable_kernel=0)
    assert load(image).kernel.entry == BASE + 0x200
    assert memory.read(BASE, 0x3000) == image[0xA00:]


def test_bzimage_defaults(load: Load) -> None:
    kernel = load(bzimage(setup_sects=0, initrd_addr_max=0, cmdline_size=0)).kernel
    assert kernel.initrd_max == layout.INITRD_MAX and kernel.command_line_limit == 255
    assert load(bzimage(cmdline_size=0xFFFFFFFF)).kernel.command_line_limit == (
        layout.COMMAND_LINE_LIMIT - 1)


def test_bzimage_syssize_may_round_up(load: Load) -> None:
    assert load(bzimage(0x2FF8, syssize=0x300)).kernel.segments[0].size == 0x2FF8


def test_anything_else_is_a_raw_image_for_16_mib(load: Load, memory: GuestMemory) -> None:
    kernel = load(b"\xf4" * 4097).kernel
    assert (kernel.mode, kernel.entry) == (ENTRY_64, 16 * MIB)
    assert memory.read(16 * MIB, 4098) == b"\xf4" * 4097 + b"\0"
    assert load(b"\xf4").kernel.end == 16 * MIB + 1


# ---- what is refused -----------------------------------------------------------------------

def refuse(load: Load, memory: GuestMemory, image: bytes | Path, match: str) -> None:
    before = descriptors()
    with pytest.raises(KernelImageError, match=match) as caught:
        load(image)
    assert "kernel" in caught.value.what and caught.value.hint
    assert "\n" not in str(caught.value)
    assert descriptors() == before, "no descriptor stays open"
    assert memory.read(0, MIB).strip(b"\0") == b"", "nothing is written where boot data goes"


FAR = 1 << 63
ELF_WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "32-bit": ({"ident": b"\x7fELF\x01\x01\x01" + bytes(9)}, "not a 64-bit x86 ELF"),
    "big-endian": ({"ident": b"\x7fELF\x02\x02\x01" + bytes(9)}, "not a 64-bit x86 ELF"),
    "ident version": ({"ident": b"\x7fELF\x02\x01\x00" + bytes(9)}, "not a 64-bit x86 ELF"),
    "machine": ({"machine": 183}, "not a 64-bit x86 ELF"),
    "relocatable object": ({"type": 1}, "ELF type 1 is not an executable"),
    "core dump": ({"type": 4}, "ELF type 4"),
    "phentsize": ({"phentsize": 32}, "program headers of 32 bytes"),
    "no headers": ({"phnum": 0}, "0 program headers"),
    "too many": ({"phnum": 65}, "65 program headers"),
    "phoff": ({"phoff": 0x4000 - 56}, "program header table at .* beyond the file's end"),
    "phoff wraps": ({"phoff": (1 << 64) - 8}, "program header table"),
    "entry": ({"entry": BASE + 0x7000}, "the entry 0x1007000 lies in no segment"),
    "entry below": ({"entry": BASE - 1}, "lies in no segment"),
    "entry virtual": ({"entry": 0xFFFFFFFF81000000}, "lies in no segment"),
    "pvh entry": ({"pvh": 0x10}, "the entry 0x10 lies in no segment"),
    "pvh size": ({"notes": note(0x10, 2)}, "PVH entry note has 2 bytes"),
    "note name": ({"notes": struct.pack("<III", 0xFFFFFFFF, 4, 18)}, "longer than its segment"),
    "note value": ({"notes": struct.pack("<III4s", 4, 0xFFFFFFF0, 18, b"Xen\0")},
                   "longer than its segment"),
    "no segment": ({"segments": [], "notes": note(1)}, "no segment is to be loaded"),
    "offset": ({"segments": [(0x3001, BASE, 0x1000, 0x1000)]}, "beyond the file's end"),
    "offset wraps": ({"segments": [((1 << 64) - 16, BASE, 32, 32)]}, "beyond the file's end"),
    "size": ({"segments": [(0x1000, BASE, FAR, FAR)]}, "lies beyond the file's end"),
    "more bytes than memory": ({"segments": [(0x1000, BASE, 0x1000, 0xFFF)]},
                               "more bytes in the file"),
    "bytes for no memory": ({"segments": [(0x1000, BASE, 0x1000, 0x1000),
                                          (0x1000, BASE + 0x2000, 8, 0)]},
                            "more bytes in the file"),
    "memory size": ({"segments": [(0x1000, BASE, 0x1000, RAM)]}, "memory for kernels is"),
    "memory size wraps": ({"segments": [(0x1000, BASE, 0x1000, (1 << 64) - BASE)]},
                          "memory for kernels is"),
    "over boot data": ({"segments": [(0x1000, 0x7000, 0x1000, 0x1000)], "entry": 0x7000},
                       "a segment goes to 0x7000"),
    "over the tables": ({"segments": [(0x1000, 0xFF000, 0x1000, 0x2000)], "entry": 0xFF000},
                        "a segment goes to 0xff000"),
    "high": ({"segments": [(0x1000, 1 << 32, 0x1000, 0x1000)], "entry": 1 << 32},
             "a segment goes to 0x100000000"),
    "overlap": ({"segments": [(0x1000, BASE, 0x1000, 0x2001),
                              (0x2000, BASE + 0x2000, 0x1000, 0x1000)]}, "two segments overlap"),
    "same twice": ({"segments": [(0x1000, BASE, 0x1000, 0x1000)] * 2}, "two segments overlap"),
}


@pytest.mark.parametrize("name", ELF_WRONG)
def test_wrong_elf_fields(load: Load, memory: GuestMemory, name: str) -> None:
    fields, match = ELF_WRONG[name]
    refuse(load, memory, elf(**fields), match)


@pytest.mark.parametrize("length", [5, 63])
def test_cut_elf_header(load: Load, memory: GuestMemory, length: int) -> None:
    refuse(load, memory, elf()[:length], "ELF header is cut short")


def test_long_notes(load: Load, memory: GuestMemory) -> None:
    image = bytearray(elf(notes=b""))
    struct.pack_into("<Q", image, 64 + 2 * 56 + 32, (64 << 10) + 1)
    refuse(load, memory, bytes(image), "65537 bytes of ELF notes")
    struct.pack_into("<Q", image, 64 + 2 * 56 + 32, 0x4000)
    refuse(load, memory, bytes(image), "ELF notes at 0x800 lies beyond")


BZIMAGE_WRONG: dict[str, tuple[dict[str, int], str]] = {
    "old protocol": ({"version": 0x20B}, "boot protocol 2.11 without a 64-bit entry"),
    "32-bit kernel": ({"xloadflags": 0x3E}, "without a 64-bit entry"),
    "zImage": ({"loadflags": 0}, "zImage"),
    "header length": ({"jump": 0x61}, "setup header ends at 0x263"),
    "setup_sects": ({"setup_sects": 255}, "promises 12288 bytes of kernel at 0x20000"),
    "syssize": ({"syssize": 0x301}, "promises 12304 bytes"),
    "syssize huge": ({"syssize": 0xFFFFFFFF}, "promises"),
    "syssize small": ({"syssize": 0x20}, "512 bytes of kernel are too few"),
    "syssize zero": ({"syssize": 0}, "0 bytes of kernel are too few"),
    "no alignment": ({"kernel_alignment": 0}, "kernel_alignment 0x0"),
    "odd alignment": ({"kernel_alignment": 0x300000}, "kernel_alignment 0x300000"),
    "huge alignment": ({"kernel_alignment": 0x80000000}, "kernel_alignment 0x80000000"),
    "alignment beyond RAM": ({"kernel_alignment": 64 * MIB}, "needs memory up to 0x4100000"),
    "init_size": ({"init_size": 0xFFFFFFFF}, "needs memory up to 0x100ffffff"),
    "pref_address": ({"pref_address": (1 << 64) - 1}, "needs memory up to"),
    "fixed and low": ({"relocatable_kernel": 0, "pref_address": 0x9000}, "goes to 0x9000"),
    "fixed and high": ({"relocatable_kernel": 0, "pref_address": (1 << 64) - 4096},
                       "memory for kernels is"),
}


@pytest.mark.parametrize("name", BZIMAGE_WRONG)
def test_wrong_bzimage_fields(load: Load, memory: GuestMemory, name: str) -> None:
    fields, match = BZIMAGE_WRONG[name]
    refuse(load, memory, bzimage(**fields), match)


def test_cut_bzimage(load: Load, memory: GuestMemory) -> None:
    refuse(load, memory, bzimage()[:0x280], "setup header is cut short")
    refuse(load, memory, bzimage()[:0xA00], "promises 12288 bytes of kernel")


def test_files_that_are_no_kernel(load: Load, memory: GuestMemory, tmp_path: Path) -> None:
    refuse(load, memory, b"", "the file is empty")
    refuse(load, memory, tmp_path / "missing-kernel", "No such file or directory")
    refuse(load, memory, tmp_path / "kernel\0x", "null byte")
    refuse(load, memory, tmp_path, "not a regular file")
    os.mkfifo(tmp_path / "kernel-pipe")
    refuse(load, memory, tmp_path / "kernel-pipe", "not a regular file")


def test_raw_image_that_does_not_fit(load: Load, memory: GuestMemory, tmp_path: Path) -> None:
    with (tmp_path / "big-kernel").open("wb") as file:
        file.truncate(RAM)
    refuse(load, memory, tmp_path / "big-kernel", "memory for kernels is")
