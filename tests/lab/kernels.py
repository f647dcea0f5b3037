"""Debian's kernels for the lab: downloaded, unpacked, the ELF image taken out of the bzImage."""

from __future__ import annotations

import functools
import lzma
import struct
from pathlib import Path
from typing import NamedTuple

from tests.lab import cache
from tests.lab.packages import candidate, dependency, download, unpack

OUTER = "linux-image-amd64"  # has KVM, 9p and vfio as modules
CLOUD = "linux-image-cloud-amd64"  # what runs in clouds: the unmodified guest


class Kernel(NamedTuple):
    """One kernel: `vmlinuz` (bzImage), `vmlinux` (ELF, PVH note), its modules by name."""

    release: str
    vmlinuz: Path
    vmlinux: Path
    modules: Path


@functools.cache
def debian_kernel(package: str = CLOUD) -> Kernel:
    """The kernel behind a meta package, from the cache or downloaded.

    :raises PackageError: it can't be had.
    """
    meta = cache.key_of(package, candidate(package), "1")

    def make(folder: Path) -> None:
        image = dependency(package, r"linux-image-[\w.+-]+")
        tree = unpack(download(image), folder)
        vmlinuz = next((tree / "boot").glob("vmlinuz-*"))
        (folder / "vmlinux").write_bytes(extract_elf(vmlinuz.read_bytes()))

    folder = cache.obtain(package, meta, make)
    vmlinuz = next((folder / "boot").glob("vmlinuz-*"))
    release = vmlinuz.name.removeprefix("vmlinuz-")
    return Kernel(release, vmlinuz, folder / "vmlinux", folder / "lib/modules" / release)


def extract_elf(image: bytes) -> bytes:
    """The ELF image inside a bzImage (boot protocol 2.08: payload_offset, payload_length)."""
    if image[0x202:0x206] != b"HdrS":
        raise ValueError("not a bzImage")
    start = (image[0x1F1] + 1) * 512
    offset, length = struct.unpack_from("<II", image, 0x248)
    payload = image[start + offset : start + offset + length]
    # Four bytes with the size follow the stream.
    if payload[:6] == b"\xfd7zXZ\0":
        return lzma.LZMADecompressor().decompress(payload)
    if payload[:4] == b"\x02\x21\x4c\x18":
        return lz4_legacy(payload[:-4])
    raise ValueError(f"the kernel's compression isn't known: {payload[:6]!r}")


def lz4_legacy(data: bytes) -> bytes:
    """Decompress LZ4's legacy frame: a magic, then blocks, each with its length before it."""
    out = bytearray()
    at = 4
    while at + 4 <= len(data):
        (length,) = struct.unpack_from("<I", data, at)
        _lz4_block(data[at + 4 : at + 4 + length], out)
        at += 4 + length
    return bytes(out)


def _lz4_block(block: bytes, out: bytearray) -> None:
    at, end = 0, len(block)
    while at < end:
        token = block[at]
        at += 1
        literals, match = token >> 4, token & 15
        if literals == 15:
            while (more := block[at]) == 255:
                literals += 255
                at += 1
            literals += more
            at += 1
        out += block[at : at + literals]
        at += literals
        if at >= end:
            return
        distance = block[at] | block[at + 1] << 8
        at += 2
        if match == 15:
            while (more := block[at]) == 255:
                match += 255
                at += 1
            match += more
            at += 1
        match += 4
        start = len(out) - distance
        if distance >= match:
            out += out[start : start + match]
        else:  # the copy overlaps itself: the last `distance` bytes, repeated
            out += (out[start:] * (match // distance + 1))[:match]


def module_files(kernel: Kernel, names: list[str]) -> list[Path]:
    """The files of `names` and of what they depend on, in the order to load them."""
    index = {path.name.split(".ko")[0].replace("-", "_"): path
             for path in kernel.modules.rglob("*.ko*")}
    builtin = {Path(line).stem.replace("-", "_")
               for line in (kernel.modules / "modules.builtin").read_text().split()}
    order: list[Path] = []

    def add(name: str) -> None:
        name = name.replace("-", "_")
        if name in builtin or not name:
            return
        if name not in index:
            raise ValueError(f"{kernel.release} has no module {name}")
        if index[name] in order:
            return
        for needed in module_dependencies(index[name]):
            add(needed)
        order.append(index[name])

    for name in names:
        add(name)
    return order


def module_dependencies(path: Path) -> list[str]:
    """What a module's `.modinfo` section says it depends on."""
    data = path.read_bytes()
    at = data.find(b"\0depends=")
    if at < 0:
        return []
    value = data[at + 9 : data.index(b"\0", at + 9)].decode()
    return [name for name in value.split(",") if name]
