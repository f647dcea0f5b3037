"""Builds the bare-metal test guests into build/guest, again only if a source changed.

    python tests/guest/build.py          prints the folder

guest.elf        PVH note (entered in 32-bit mode) and a 64-bit entry; BASE is 16 MiB
guest-64.elf     no note: a loader must use the 64-bit boot protocol
guest.raw        flat image for 16 MiB, entered at its first byte in 64-bit mode
guest.bzimage    the same inside a bzImage: setup header, 64-bit entry at +0x200
mini.elf         its first instruction is an `out`, then it ends
disk.elf         the same, after it has read the first sector of the first disk
"""

from __future__ import annotations

import fcntl
import hashlib
import struct
import subprocess
from pathlib import Path

HERE = Path(__file__).resolve().parent
OUT = HERE.parents[1] / "build" / "guest"
BASE = 0x1000000
FLAGS = ["-std=gnu11", "-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter", "-O2", "-g",
         "-ffreestanding", "-mno-red-zone", "-mgeneral-regs-only", "-fno-stack-protector",
         "-fcf-protection=none", "-fno-pic", "-mcmodel=kernel", "-fno-asynchronous-unwind-tables",
         "-fno-strict-aliasing"]
LINK = ["-nostdlib", "-static", "-no-pie", "-Wl,--build-id=none", "-Wl,-n",
        "-Wl,--no-warn-rwx-segments"]
SETUP_SECTORS = 4
PROTECTED_BASE = 0x100000


def guests() -> Path:
    """The folder with the guests, built if needed."""
    sources = sorted(p for p in HERE.iterdir() if p.suffix in (".c", ".h", ".S", ".ld", ".inc"))
    digest = hashlib.sha256(Path(__file__).read_bytes())
    for source in sources:
        digest.update(source.name.encode() + source.read_bytes())
    OUT.mkdir(parents=True, exist_ok=True)
    with (OUT / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        stamp = OUT / ".key"
        if not stamp.exists() or stamp.read_text() != digest.hexdigest():
            _build()
            stamp.write_text(digest.hexdigest())
    return OUT


def guest(name: str = "guest.elf") -> Path:
    """One of the guests by its file name."""
    return guests() / name


def _build() -> None:
    objects = []
    for source in sorted(HERE.glob("*.c")):
        objects.append(OUT / f"{source.stem}.o")
        _run("gcc", *FLAGS, "-c", source, "-o", objects[-1])
    _assemble("entry.S", "entry.o")
    _assemble("entry.S", "entry-pvh.o", "-DPVH")
    _link("guest-64.elf", BASE, OUT / "entry.o", *objects)
    _link("guest.elf", BASE, OUT / "entry-pvh.o", *objects)
    _run("objcopy", "-O", "binary", OUT / "guest-64.elf", OUT / "guest.raw")
    _link("guest-low.elf", PROTECTED_BASE + 0x200, OUT / "entry.o", *objects)
    _run("objcopy", "-O", "binary", OUT / "guest-low.elf", OUT / "guest-low.raw")
    payload = bytes(0x200) + (OUT / "guest-low.raw").read_bytes()
    (OUT / "guest.bzimage").write_bytes(bzimage(payload))
    _assemble("mini.S", "mini.o")
    _assemble("mini.S", "disk.o", "-DDISK")
    _link("mini.elf", BASE, OUT / "mini.o")
    _link("disk.elf", BASE, OUT / "disk.o")
    for name in ("mini.elf", "disk.elf"):
        _run("strip", OUT / name)


def bzimage(payload: bytes) -> bytes:
    """A bzImage (boot protocol 2.12) around a protected-mode `payload`, entered at +0x200."""
    setup = bytearray(512 * (SETUP_SECTORS + 1))
    fields = {
        0x1F1: ("<B", SETUP_SECTORS), 0x1F4: ("<I", (len(payload) + 15) // 16),
        0x1FE: ("<H", 0xAA55), 0x200: ("<H", 0x66EB), 0x202: ("4s", b"HdrS"),
        0x206: ("<H", 0x20C), 0x211: ("<B", 1), 0x214: ("<I", PROTECTED_BASE),
        0x22C: ("<I", 0x7FFFFFFF), 0x230: ("<I", 0x200000), 0x234: ("<B", 0), 0x235: ("<B", 21),
        0x236: ("<H", 1), 0x238: ("<I", 2047), 0x258: ("<Q", PROTECTED_BASE),
        0x260: ("<I", len(payload) + (16 << 20)),
    }
    for offset, (layout, value) in fields.items():
        struct.pack_into(layout, setup, offset, value)
    return bytes(setup) + payload + bytes(-len(payload) % 16)


def _assemble(source: str, target: str, *flags: str) -> None:
    _run("gcc", "-c", "-I", HERE, *flags, HERE / source, "-o", OUT / target)


def _link(target: str, base: int, *objects: Path) -> None:
    _run("gcc", *LINK, f"-Wl,--defsym=BASE={base:#x}", "-Wl,-T", f"-Wl,{HERE / 'guest.ld'}",
         *objects, "-o", OUT / target)


def _run(*command: str | Path) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise SystemExit(f"the test guest can't be built: {' '.join(map(str, command))}\n"
                         f"{result.stderr}")


if __name__ == "__main__":
    print(guests())
