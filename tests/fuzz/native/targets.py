"""The fuzz targets in C: what each is built of, and honest inputs to start from.

An input is guest memory from its front and every decision from its end (harness/tape.h).
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
NATIVE = HERE.parents[2] / "native"
NEXT, WRITE, INDIRECT = 1, 2, 4


class Target(NamedTuple):
    """One target.

    `led`: what the harness has between itself and the system (harness/intercept.h); `plain`: the
    rest that is under test.
    """

    harness: list[Path]
    led: list[Path]
    plain: list[Path]
    seeds: Callable[[], list[bytes]]
    defines: tuple[str, ...] = ()


def _files(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((NATIVE / folder).glob("*.c"))]


# ---- rings: block requests -----------------------------------------------------------------------

def honest(type_: int, flags: int, more: int, indirect: bool = False, sector: int = 3,
           size: int = 1024, payload: bytes = b"", tape: bytes = b"") -> bytes:
    """One request of an honest driver, as an input (see rings.c for the layout)."""
    memory = bytearray(0x800)
    writable = not payload and type_ != 1
    size = len(payload) or size
    memory[0x400:0x410] = struct.pack("<IIQ", type_, 0, sector)
    memory[0x600:0x600 + len(payload)] = payload
    rows = [(0x400, 16, NEXT, 1), (0x600, size, NEXT | (WRITE if writable else 0), 2),
            (0x500, 1, WRITE, 0)]
    if size == 0:
        rows = [(0x400, 16, NEXT, 1), (0x500, 1, WRITE, 0)]
    table = b"".join(struct.pack("<QIHH", *row) for row in rows)
    if indirect:
        memory[0x300:0x300 + len(table)] = table
        table = struct.pack("<QIHH", 0x300, len(table), INDIRECT, 0)
    memory[:len(table)] = table
    memory[0x100:0x108] = struct.pack("<HHHH", 0, 1, 0, 0)
    return bytes([flags, more]) + bytes(memory) + tape


def rings() -> list[bytes]:
    """Each request by each way that it can take."""
    ranges = struct.pack("<QII", 8, 4, 0) + struct.pack("<QII", 40, 3, 1)
    found = []
    # Read from its end: base 0, one round of up to 8 requests.
    tape = bytes(16)
    for flags in (0, 3, 4, 8, 8 | 16, 32, 64, 64 | 32 | 8 | 16, 128, 128 | 8):
        for more in (0, 1, 2, 4, 8, 16):
            for type_, size, payload in ((0, 1024, b""), (1, 1024, b""), (1, 0, b"x" * 512),
                                         (4, 0, b""), (8, 20, b""), (11, 0, ranges[:16]),
                                         (13, 0, ranges)):
                indirect = bool(flags & 2)
                found.append(honest(type_, flags, more, indirect, size=size, payload=payload,
                                    tape=tape))
    return found


# ---- net -------------------------------------------------------------------------------------

def tape(*decisions: int) -> bytes:
    """Decisions in the order in which they are taken."""
    return bytes(decisions)[::-1]


def net() -> list[bytes]:
    """Frames both ways and commands, by the ways that they can take (net/world.h)."""
    slice_of = [9 + 16 * index for index in range(7)]
    # An act is a step of kind 8, then what it is: see act() and offer() in net/driver.c.
    buffers = [8, 0x21, 0, 0x00, 0x10, 14] * 4
    frames = [8, 4, 4, 1, 8, 4, 6, 2, 8, 4, 8, 3]
    transmit = [8, 0x21, 1, 0x01, 0x08, 11, 0x18, 10]
    command = [8, 0x31, 2, 0, 0, *range(9), 1, 0, 0x40]
    macs = [8, 0x31, 2, 1, 0, *range(9), 3, 2, 1, 0, 0x40]
    # Chains of many buffers, more of them than can be waited with.
    long = [8, 0x21, 0, 0xFC, 200, 0, 1, 0x00, 0] * 4
    # Some chains of a hundred buffers each, which frames take one by one.
    sparse = [8, 0x21, 0, 0xFC, 92, 0, 1, 0xF0, 0x00, 0x20, 0] * 8 + [8, 4, 6, 2] * 8
    # Buffers that are two each, in two regions.
    wide = [8, 0x21, 1, 0xFC, 0x30, 2, 1, 0xF0, 0x01, 0x18, 0x10]
    # A ring of 128 at a place of its own, and more frames than a batch has.
    large = [2 + 16, 7, 0, 0, *[7, 1, 1, 0x00, 0x08, 11] * 110]
    many = [2, 7, 0, 0, *[7, 1, 0, 0x00, 0x08, 16] * 80, 8, 4, 0xF2, 1]
    found = []
    for flags in (4, 4 | 16, 4 | 64, 128 | 4, 32 | 4):
        for more in (0, 1, 3, 7 | 8 | 16, 1 | 8 | 64):
            for steps in (long + frames + slice_of[:1] + long + frames + slice_of[:1] * 3,
                          large + slice_of[1:2] * 2, wide + slice_of[1:2],
                          many + slice_of[:1] * 2, sparse + slice_of[:1] * 3,
                          buffers + frames + slice_of[:1] * 3, transmit * 3 + slice_of[1:2] * 2,
                          command + slice_of[2:3], macs + slice_of[2:3] + [0xFF]):
                found.append(bytes([flags, more]) + bytes(0xA00) + tape(*steps))
    return found


# ---- devices on the engine for small devices -----------------------------------------------------

def devices(acts: list[list[int]], mores: tuple[int, ...]) -> Callable[[], list[bytes]]:
    """Honest inputs of a kind: each of these acts (devices/target.c), then time to serve it."""
    serve = [13, 0]

    def seeds() -> list[bytes]:
        return [bytes([flags, more]) + bytes(0xA00) + tape(*act, 10, 4, *serve, *act, *serve)
                for flags in (0, 3, 4, 8, 16, 32) for more in mores for act in acts]
    return seeds


# An act of the driver: step 10, its kind (2 offers a chain to queue kind / 8), what the chain is.
OFFERS = [[10, 2 + 8 * queue, *chain] for queue in range(8)
          for chain in ((0x00, 0x10, 12), (0xFC, 100, 0, 1, 0x00, 0))]
# A driver of a console: buffers for control messages; device, ports 0 and 1 are ready, and open.
SESSION = [*OFFERS[4] * 6, *(byte for message in (0, 3, 23, 6, 16) for byte in (8, 0, message)),
           10, 4 + 8 * 3, 13, 0, *OFFERS[4] * 6, *OFFERS[0], *OFFERS[8], 8, 2, 2, 8, 10, 1,
           13, 0, *OFFERS[4] * 6]
HARNESS = sorted((HERE / "harness").glob("*.c"))
NET = ([*sorted((HERE / "net").glob("*.c")), *HARNESS], _files("net", "limit"), _files("virtq"),
       net)


def _device(name: str, seeds: Callable[[], list[bytes]]) -> Target:
    common = [HERE / "devices/engine.c", HERE / "devices/target.c", *HARNESS]
    return Target([HERE / f"devices/{name}.c", *common], _files("ring", name, "limit"),
                  _files("virtq"), seeds)


TARGETS = {
    "rings": Target([HERE / "rings.c"], [],
                    [*_files("virtq", "blk"), NATIVE / "uring/io.c"], rings),
    "net": Target(*NET),
    "net-threads": Target(*NET, defines=("-DFUZZ_THREADS",)),
    "rng": _device("rng", devices(OFFERS[:2], (0, 1, 3))),
    # Step 8 is an act of the host's side, or a driver's message of the kind.
    "balloon": _device("balloon", devices(
        [*OFFERS[:10], *([8, 16 * queue + 3, pfn, step] for queue in range(5)
                        for pfn in (0, 2, 5, 6) for step in (1, 0))], (0, 1, 2, 3, 7))),
    "console": _device("console", devices(
        [*OFFERS, SESSION], (0, 1 + 4, 2 + 4 + 32 + 64, 2 + 4 + 8))),
}
