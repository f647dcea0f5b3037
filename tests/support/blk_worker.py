"""A real blk worker process and a front end that drives it with rings in guest memory."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

from shared.memory_regions import MemoryRegion
from shared.vhost_user import messages as m
from shared.vhost_user.frontend import Frontend
from tests.support.capabilities import require
from tests.support.guest_ring import BlkRequest, GuestMemory, GuestRing

ROOT = Path(__file__).resolve().parents[2]
USER_BASE = 0x7F0000000000  # where the front end pretends to have guest memory mapped


def family(pid: int) -> list[int]:
    """A process and its children: a sandboxed program's worker is one."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [pid, *(int(word) for word in children.split())]


class BlkWorker:
    """`python -m workers.blk` on one end of a socketpair, our front end on the other."""

    def __init__(self, image: Path, *arguments: str, memory: GuestMemory | None = None) -> None:
        if "--aio=io_uring" in arguments:
            require("io_uring")
        ours, theirs = socket.socketpair()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "workers.blk", f"--fd={theirs.fileno()}",
             f"--blk-file={image}", *arguments],
            pass_fds=[theirs.fileno()], cwd=ROOT, stderr=subprocess.PIPE)
        theirs.close()
        self.frontend = Frontend(ours.detach(), "the worker", limit=10.0)
        self.memory = memory or GuestMemory()
        self.rings: dict[int, GuestRing] = {}
        self.inflight: tuple[m.Inflight, int] | None = None

    def connect(self, features: int | None = None) -> None:
        """Handshake, all features that are offered (or `features`), the memory table."""
        self.frontend.handshake()
        if features is None:
            features = self.frontend.features
        self.features = features
        self.frontend.set_features(features)
        region = MemoryRegion(self.memory.base, self.memory.size, USER_BASE, 0)
        self.frontend.set_mem_table([region], [self.memory.fd])
        self.frontend.finish()

    def _user(self, address: int) -> int:
        return address - self.memory.base + USER_BASE

    def track(self, queues: int, size: int) -> None:
        """Ask for an in-flight buffer."""
        self.inflight = self.frontend.get_inflight(queues, size)
        assert self.inflight is not None
        self.frontend.set_inflight(*self.inflight)

    def start(self, index: int = 0, size: int = 128, base: int = 0,
              ring: GuestRing | None = None) -> GuestRing:
        if ring is None:
            ring = GuestRing(self.memory, size, self.features)
        self.rings[index] = ring
        front = self.frontend
        front.set_vring_num(index, ring.size)
        front.set_vring_base(index, base)
        front.set_vring_addr(index, self._user(ring.desc), self._user(ring.avail),
                             self._user(ring.used))
        front.set_vring_call(index, ring.call_fd)
        front.set_vring_err(index, ring.err_fd)
        front.set_vring_kick(index, ring.kick_fd)
        front.set_vring_enable(index, True)
        front.finish()
        return ring

    def request(self, type_: int, sector: int = 0, data: bytes = b"", room: int = 0,
                index: int = 0, segments: int = 1, indirect: bool = False) -> BlkRequest:
        """Do one request and wait for its end."""
        request = BlkRequest(self.memory, type_, sector, data, room, segments)
        ring = self.rings[index]
        ring.add(request.buffers, indirect)
        ring.publish()
        ring.wait_used(1)
        return request

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(10)

    def close(self) -> str:
        """Disconnect, wait for the worker's end; what it said on stderr."""
        self.frontend.close()
        try:
            _, err = self.process.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        for ring in self.rings.values():
            ring.close()
        if self.inflight is not None:
            os.close(self.inflight[1])
        return err.decode()
