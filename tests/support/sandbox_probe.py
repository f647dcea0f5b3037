"""What a hostile guest would run inside a worker: attempts to get out, one a worker.

`main` is a nursery whose blk workers are probes: they take the same steps into the same sandbox
as a real one, with an image, rings and channels, then make the attempt that their options name
and report how it ended ("result: …").  What the filter refuses ends them, with its report.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import struct
from typing import TYPE_CHECKING

from shared.sandbox import policy
from shared.virtio.net import STATE_BYTES
from workers import nursery
from workers.blk.service import Service
from workers.net import service as net
from workers.null.device import NullNic
from workers.service import map_state
from workers.startup import confine

if TYPE_CHECKING:
    from collections.abc import Callable

    from workers.nursery import Reporter

AT_FDCWD = -100
SMALL_KINDS = ("balloon", "console", "rng")
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long


def call(name: str, *arguments: object) -> str:
    """Make a system call; the error's name, or "ok" and what it returned."""
    number = policy.lib.sv_system_call_number(name.encode())
    arguments = tuple(a.encode() if isinstance(a, str) else a for a in arguments)
    given = [ctypes.c_char_p(a) if isinstance(a, bytes) else
             ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    ctypes.set_errno(0)
    result = libc.syscall(ctypes.c_long(number), *given)
    return f"ok {result}" if result >= 0 else errno.errorcode[ctypes.get_errno()]


def capabilities() -> str:
    """Every set: effective, permitted, inheritable as bits; bounding and ambient as counts."""
    header = ctypes.create_string_buffer(struct.pack("=II", 0x20080522, 0))  # version 3, self
    data = ctypes.create_string_buffer(24)
    assert call("capget", header, data) == "ok 0"
    bounding = sum(libc.prctl(23, cap, 0, 0, 0) == 1 for cap in range(64))
    ambient = sum(libc.prctl(47, 1, cap, 0, 0) == 1 for cap in range(64))
    bits = libc.prctl(27, 0, 0, 0, 0)
    return f"{any(data.raw)} {bounding} {ambient} {bits:#x}"


def connect(family: int, *address: int) -> str:
    """A stream socket that connects to an address given as bytes."""
    fd = libc.socket(family, 1, 0)
    if fd < 0:
        return "socket: " + errno.errorcode[ctypes.get_errno()]
    where = struct.pack("=H", family) + bytes(address)
    if family == 2:  # AF_INET: port and address, then nothing
        where = struct.pack("=H", family) + bytes(address[1:]).ljust(14, b"\0")
    return call("connect", fd, where, len(where))


def register(ring: Ring, opcode: int) -> str:
    """io_uring_register on the data plane's ring."""
    return call("io_uring_register", ring.fd, opcode, 0, 0)


def find_ring(entries: int) -> tuple[int, mmap.mmap]:
    """The first descriptor that has submission entries to map, and these (IORING_OFF_SQES)."""
    for fd in range(3, 64):
        try:
            return fd, mmap.mmap(fd, entries * 64, offset=0x10000000)
        except (OSError, ValueError):
            continue
    raise AssertionError("no ring")


class Ring:
    """The io_uring ring that the data plane made, driven by hand."""

    def __init__(self, entries: int) -> None:
        self.fd, self.sqes = find_ring(entries)
        # Where things are in the mapping depends on the size alone: ask a ring of our own.
        params = ctypes.create_string_buffer(120)
        fd = int(call("io_uring_setup", entries, params).split()[1])
        os.close(fd)
        self.sq = struct.unpack_from("=10I", params.raw, 40)
        self.cq = struct.unpack_from("=10I", params.raw, 80)
        self.memory = mmap.mmap(self.fd, 4096 + entries * 48, offset=0)

    def submit(self, opcode: int, flags: int, fd: int = 0) -> str:
        """One operation of nothing; the error's name of its completion."""
        tail = struct.unpack_from("=I", self.memory, self.sq[1])[0]
        head = struct.unpack_from("=I", self.memory, self.cq[0])[0]
        self.sqes[0:64] = struct.pack("=BBHiQQI", opcode, flags, 0, fd, 0, 0, 0).ljust(64, b"\0")
        struct.pack_into("=I", self.memory, self.sq[6], 0)
        struct.pack_into("=I", self.memory, self.sq[1], tail + 1)
        result = call("io_uring_enter", self.fd, 1, 1, 1, 0, 0)
        if result != "ok 1":
            return result
        mask = struct.unpack_from("=I", self.memory, self.cq[2])[0]
        done = struct.unpack_from("=i", self.memory, self.cq[5] + 16 * (head & mask) + 8)[0]
        struct.pack_into("=I", self.memory, self.cq[0], head + 1)
        return errno.errorcode[-done] if done < 0 else f"ok {done}"


ATTEMPTS: dict[str, Callable[..., str]] = {
    "call": call,
    "capabilities": capabilities,
    "connect": connect,
    "listdir": lambda path: str(os.listdir(path)),
    "abort": lambda: str(libc.abort()),
    "segv": lambda: str(ctypes.string_at(8)),
    "raise": lambda: str(1 // 0),
    "deep": lambda: recurse(0),
}


def recurse(depth: int) -> str:
    """Never ends by itself."""
    return recurse(depth + 1)


def run(device: str, fds: dict[str, int], options: dict[str, object], reporter: Reporter) -> None:
    """What a real worker does, but for serving. "early": the attempt comes before the sandbox."""
    if options["attempt"] == "early":
        reporter.tell("error", text=f"result: {call(*options['arguments'])}")
        return
    service = Service(fds["image"], {"queue-size": 64}, fds.get("counters"), reporter.log)
    attempt, arguments = options["attempt"], options["arguments"]
    assert isinstance(attempt, str) and isinstance(arguments, list)
    ring = Ring(64) if attempt in ("ring", "register") else None
    stages = confine(f"sv-blk-{device}")
    reporter.tell("started", stages=list(stages), engine=service.engine)
    if ring is not None:
        result = (ring.submit(*arguments) if attempt == "ring" else
                  register(ring, *arguments))
    else:
        result = ATTEMPTS[attempt](*arguments)
    reporter.tell("error", text=f"result: {result}")


def run_small(device: str, fds: dict[str, int], options: dict[str, object],
              reporter: Reporter) -> None:
    """A probe under the filter of another kind of worker, without its data plane."""
    arguments = options["arguments"]
    assert isinstance(arguments, list)
    stages = confine(f"sv-{device}")
    reporter.tell("started", stages=list(stages), engine="")
    reporter.tell("error", text=f"result: {call(*arguments)}")


def run_nic(device: str, fds: dict[str, int], options: dict[str, object],
            reporter: Reporter) -> None:
    """What a net worker does, or the null worker for a NIC without `tap0`, but for serving. Among
    the arguments the name of a descriptor stands for its number."""
    held: object
    if "tap0" in fds:
        held = net.Service([fds["tap0"]], {"control": True}, None, fds["state"], reporter.log)
        name = "net"
    else:
        held = NullNic(1, 256, bytes(6), map_state("net", STATE_BYTES, fds["state"]), reporter.log)
        name = "null"
    arguments = options["arguments"]
    assert isinstance(arguments, list)
    stages = confine(f"sv-{name}")
    reporter.tell("started", stages=list(stages), engine="")
    result = call(*(fds.get(a, a) if isinstance(a, str) else a for a in arguments))
    reporter.tell("error", text=f"result: {result}")
    del held


def main() -> None:
    """As workers.nursery.main, with probes."""
    probes = {"blk": run, "net": run_nic, "null": run_nic, **dict.fromkeys(SMALL_KINDS, run_small)}
    nursery.KINDS = tuple(probes)
    nursery.entry = probes.__getitem__
    nursery.main()
