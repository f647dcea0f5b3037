"""Kernel images: what they are, where they go, how they are entered; nothing in them is believed.

Three kinds (compat-decisions, "kernels"): a bzImage (Linux Documentation/arch/x86/boot.rst), an
ELF vmlinux (entered by its PVH note if it has one, else by the 64-bit boot protocol), and
StratoVirt's raw image, which is anything else: copied to 16 MiB and entered there.

Headers are read and checked here, the bytes are copied by `loading.Loading`.
"""

from __future__ import annotations

import _stat as stat
import posix as os
from _struct import Struct, unpack_from

from vmm.arch.x86_64 import layout
from vmm.arch.x86_64.registers import ENTRY_64, ENTRY_PVH
from vmm.errors import KernelImageError

_COMMAND_LINE_DEFAULT = 2047  # kernels that don't say

# bzImage: offsets in the file.
_SETUP_START = 0x1F1
_SETUP_MAX = 0x290  # the header may grow up to where boot_params has other fields
_HDRS = b"HdrS"
_VERSION_64 = 0x20C
_XLF_KERNEL_64 = 1
_ENTRY_64_OFFSET = 0x200
_SETUP_NEEDED = 0x264  # init_size, the last field that we read, ends here
_MAX_ALIGNMENT = 1 << 30

# ELF (System V ABI; elf.h).
_ELF_HEADER = Struct("<16sHHIQQQIHHHHHH")
_PROGRAM_HEADER = Struct("<IIQQQQQQ")
_ELF_64_LITTLE = b"\x7fELF\x02\x01\x01"
_ET_EXEC, _ET_DYN, _EM_X86_64 = 2, 3, 62
_PT_LOAD, _PT_NOTE = 1, 4
_MAX_PROGRAM_HEADERS = 64
_MAX_NOTES = 64 << 10
_XEN_PHYS32_ENTRY = 18


class Segment:
    """`size` bytes at `offset` of the file go to `address`; up to `memory_size` follow zeroes."""

    __slots__ = ("address", "memory_size", "offset", "size")

    def __init__(self, address: int, offset: int, size: int, memory_size: int) -> None:
        self.address = address
        self.offset = offset
        self.size = size
        self.memory_size = memory_size


class Kernel:
    """What a checked image asks for. `end`: first byte that an initrd may use."""

    __slots__ = ("command_line_limit", "end", "entry", "initrd_max", "mode", "segments",
                 "setup_header")

    def __init__(self, mode: int, entry: int, segments: list[Segment]) -> None:
        self.mode = mode
        self.entry = entry
        self.segments = segments
        self.setup_header = b""
        self.initrd_max = layout.INITRD_MAX
        self.command_line_limit = _COMMAND_LINE_DEFAULT
        self.end = max((s.address + s.memory_size for s in segments), default=0)


def open_regular_file(option: str, path: str) -> tuple[int, int]:
    """Open for reading; returns descriptor and size.

    :raises KernelImageError: names the option, the path and what to do.
    """
    try:
        # Not to hang on a FIFO before it is known to be none.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise KernelImageError(f"{option} {path}: {reason}", "name a file that can be read"
                               ) from None
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        os.close(fd)
        raise KernelImageError(f"{option} {path}: not a regular file", "name a kernel image"
                               if option == "-kernel" else "name an image file")
    return fd, status.st_size


def inspect(path: str, fd: int, size: int, ram_end: int) -> Kernel:
    """Check an image's headers.

    :param ram_end: end of the RAM that starts at 0.
    :raises KernelImageError: names the field that doesn't hold.
    """
    image = _Image(path, fd, size, ram_end)
    head = image.head
    if head.startswith(b"\x7fELF"):
        kernel = _inspect_elf(image)
    elif head[0x202:0x206] == _HDRS:
        kernel = _inspect_bzimage(image)
    elif size:
        kernel = Kernel(ENTRY_64, layout.RAW_KERNEL, [Segment(layout.RAW_KERNEL, 0, size, size)])
    else:
        raise image.error("the file is empty")
    for segment in kernel.segments:
        image.check_segment(segment)
    if kernel.end > ram_end:
        raise image.error(f"the kernel needs memory up to {kernel.end:#x}, RAM ends at "
                          f"{ram_end:#x}", "give the VM more memory with -m")
    return kernel


class _Image:
    """One file under inspection: its head, its bounds, and errors that name it."""

    __slots__ = ("fd", "head", "path", "ram_end", "size")

    def __init__(self, path: str, fd: int, size: int, ram_end: int) -> None:
        self.path = path
        self.fd = fd
        self.size = size
        self.ram_end = ram_end
        self.head = self.read(0, min(size, 4096), "the header")

    def error(self, what: str, hint: str = "the file is damaged: take another") -> KernelImageError:
        return KernelImageError(f"-kernel {self.path}: {what}", hint)

    def read(self, offset: int, size: int, what: str) -> bytes:
        if offset + size > self.size:
            raise self.error(f"{what} at {offset:#x} lies beyond the file's end")
        try:
            data = os.pread(self.fd, size, offset)
        except OSError as error:
            raise self.error(f"{what} can't be read: {error.strerror}", "check the disk"
                             ) from error
        if len(data) != size:
            raise self.error(f"{what} at {offset:#x} was cut off while it was read",
                             "another program changes the file: wait for it")
        return data

    def check_segment(self, segment: Segment) -> None:
        end = segment.address + segment.memory_size
        if segment.size > segment.memory_size:
            raise self.error(f"a segment at {segment.address:#x} has more bytes in the file "
                             f"({segment.size:#x}) than in memory ({segment.memory_size:#x})")
        if segment.offset + segment.size > self.size:
            raise self.error(f"a segment of {segment.size:#x} bytes at offset "
                             f"{segment.offset:#x} lies beyond the file's end")
        if segment.address < layout.KERNEL_START or end > self.ram_end:
            raise self.error(f"a segment goes to {segment.address:#x}-{end:#x}, memory for "
                             f"kernels is {layout.KERNEL_START:#x}-{self.ram_end:#x}",
                             "give the VM more memory with -m, or take another kernel")


def _inspect_bzimage(image: _Image) -> Kernel:
    head = image.head
    if len(head) < _SETUP_MAX:
        raise image.error("the setup header is cut short")
    version, = unpack_from("<H", head, 0x206)
    if version < _VERSION_64 or not head[0x236] & _XLF_KERNEL_64:
        raise image.error(f"boot protocol {version >> 8}.{version & 255:02} without a 64-bit "
                          "entry", "take a 64-bit kernel, Linux 3.8 or newer")
    if not head[0x211] & 1:
        raise image.error("this is a zImage, which loads low", "take a bzImage")
    offset = ((head[_SETUP_START] or 4) + 1) * 512
    size = unpack_from("<I", head, 0x1F4)[0] * 16
    if offset >= image.size or size > image.size - offset + 15:
        raise image.error(f"the header promises {size} bytes of kernel at {offset:#x}, the file "
                          f"has {max(0, image.size - offset)}")
    size = min(size, image.size - offset)
    if size <= _ENTRY_64_OFFSET:
        raise image.error(f"{size} bytes of kernel are too few")
    header_end = min(0x202 + head[0x201], _SETUP_MAX)
    if header_end < _SETUP_NEEDED:
        raise image.error(f"the setup header ends at {header_end:#x}, boot protocol 2.12 needs "
                          f"it up to {_SETUP_NEEDED:#x}")
    prefers, init_size = unpack_from("<QI", head, 0x258)
    load, runs = prefers, prefers
    if head[0x234]:  # relocatable: it moves up to its alignment, at least to where it prefers
        alignment, = unpack_from("<I", head, 0x230)
        if not 0 < alignment <= _MAX_ALIGNMENT or alignment & (alignment - 1):
            raise image.error(f"kernel_alignment {alignment:#x} is no power of two up to "
                              f"{_MAX_ALIGNMENT:#x}")
        load = layout.KERNEL_START
        runs = max(load + alignment - 1 & -alignment, prefers)
    kernel = Kernel(ENTRY_64, load + _ENTRY_64_OFFSET, [Segment(load, offset, size, size)])
    kernel.setup_header = head[_SETUP_START:header_end]
    kernel.initrd_max = unpack_from("<I", head, 0x22C)[0] or layout.INITRD_MAX
    limit, = unpack_from("<I", head, 0x238)
    kernel.command_line_limit = min(limit or 255, layout.COMMAND_LINE_LIMIT - 1)
    kernel.end = max(load + size, runs + init_size)  # it unpacks itself in init_size bytes
    return kernel


def _inspect_elf(image: _Image) -> Kernel:
    if len(image.head) < _ELF_HEADER.size:
        raise image.error("the ELF header is cut short")
    (ident, kind, machine, _, entry, table, _, _, _, entry_size, count, *_
     ) = _ELF_HEADER.unpack_from(image.head)
    if not ident.startswith(_ELF_64_LITTLE) or machine != _EM_X86_64:
        raise image.error("not a 64-bit x86 ELF file", "take an x86-64 kernel")
    if kind not in (_ET_EXEC, _ET_DYN):
        raise image.error(f"ELF type {kind} is not an executable", "take a vmlinux")
    if entry_size != _PROGRAM_HEADER.size or not 0 < count <= _MAX_PROGRAM_HEADERS:
        raise image.error(f"{count} program headers of {entry_size} bytes are not what an ELF "
                          f"kernel has (1 to {_MAX_PROGRAM_HEADERS} of 56)")
    headers = image.read(table, count * entry_size, "the program header table")
    segments: list[Segment] = []
    pvh: int | None = None
    for number in range(count):
        kind, _, offset, _, address, size, memory_size, _ = _PROGRAM_HEADER.unpack_from(
            headers, number * entry_size)
        if kind == _PT_LOAD and (size or memory_size):
            segments.append(Segment(address, offset, size, memory_size))
        elif kind == _PT_NOTE and pvh is None:
            pvh = _find_pvh_note(image, offset, size)
    if not segments:
        raise image.error("no segment is to be loaded")
    _check_overlap(image, segments)
    kernel = Kernel(ENTRY_64 if pvh is None else ENTRY_PVH, entry if pvh is None else pvh,
                    segments)
    if not any(s.address <= kernel.entry < s.address + s.memory_size for s in segments):
        raise image.error(f"the entry {kernel.entry:#x} lies in no segment")
    return kernel


def _check_overlap(image: _Image, segments: list[Segment]) -> None:
    end = 0
    for segment in sorted(segments, key=lambda s: s.address):
        if segment.address < end:
            raise image.error(f"two segments overlap at {segment.address:#x}")
        end = segment.address + segment.memory_size


def _find_pvh_note(image: _Image, offset: int, size: int) -> int | None:
    """The 32-bit physical entry of XEN_ELFNOTE_PHYS32_ENTRY, if the notes have one."""
    if size > _MAX_NOTES:
        raise image.error(f"{size} bytes of ELF notes are more than {_MAX_NOTES}")
    notes = image.read(offset, size, "the ELF notes")
    at = 0
    while at + 12 <= len(notes):
        name_size, value_size, kind = unpack_from("<III", notes, at)
        name_at = at + 12
        value_at = name_at + (name_size + 3 & ~3)
        at = value_at + (value_size + 3 & ~3)
        if value_at + value_size > len(notes):
            raise image.error("an ELF note is longer than its segment")
        if kind == _XEN_PHYS32_ENTRY and notes[name_at:name_at + name_size] == b"Xen\0":
            if value_size not in (4, 8):
                raise image.error(f"the PVH entry note has {value_size} bytes, not 4 or 8")
            return int.from_bytes(notes[value_at:value_at + value_size], "little")
    return None
