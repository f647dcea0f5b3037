"""Real workers of small devices, as the core starts them or alone, and a driver for their rings."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from shared.vhost_user.frontend import Frontend
from tests.support.blk_worker import ROOT, BlkWorker
from tests.support.guest_ring import GuestMemory, GuestRing
from vmm.event_loop import EventLoop
from vmm.worker.nursery import Nursery
from vmm.worker.process import WorkerProcess


class RingWorker(BlkWorker):
    """The driver of a worker that serves this end of a socketpair."""

    def __init__(self, fd: int, memory: GuestMemory | None = None,
                 rings: dict[int, GuestRing] | None = None) -> None:
        self.frontend = Frontend(fd, "the worker", limit=20.0)
        self.memory = memory or GuestMemory()
        self.rings = rings or {}
        self.inflight = None

    def offer(self, length: int, index: int = 0) -> tuple[int, int]:
        """A chain with room for `length` bytes; its head and address."""
        address = self.memory.alloc(length, 16)
        head = self.rings[index].add([(address, length, True)])
        self.rings[index].publish()
        return head, address


class Nest:
    """A nursery and its workers."""

    def __init__(self, off: tuple[str, ...] = ()) -> None:
        self.loop = EventLoop()
        self.nursery = Nursery(self.loop, off)
        self.nursery.start()

    def spawn(self, kind: str, fds: dict[str, int], options: dict[str, object],
              name: str = "dev") -> WorkerProcess:
        worker = self.nursery.spawn(kind, name, fds, options)
        assert worker.wait_started(time.monotonic() + 60), worker.reason
        return worker

    def order(self, worker: WorkerProcess, kind: str, **fields: Any) -> str:
        """What the worker answers: "" or what went wrong."""
        answers: list[str] = []
        worker.orders.send(kind, answers.append, **fields)
        self.until(lambda: bool(answers))
        return answers[0]

    def until(self, condition: Callable[[], bool], limit: float = 30.0) -> None:
        """Run the loop until the condition holds."""
        deadline = time.monotonic() + limit
        while not condition():
            assert time.monotonic() < deadline, "it did not happen in time"
            self.loop.run_once(0.05)

    def gone(self, worker: WorkerProcess) -> str:
        """Wait for its end; the reason."""
        self.until(partial(_is_dead, worker))
        return worker.reason

    def close(self) -> None:
        self.nursery.close()
        self.loop.close()


def _is_dead(worker: WorkerProcess) -> bool:
    return worker.state == "dead"


@contextmanager
def alone(kind: str, *arguments: str) -> Iterator[tuple[RingWorker, subprocess.Popen[str]]]:
    """`python -m workers.KIND` on a socketpair."""
    ours, theirs = socket.socketpair()
    process = subprocess.Popen(
        [sys.executable, "-m", f"workers.{kind}", f"--fd={theirs.fileno()}", *arguments],
        pass_fds=[theirs.fileno()], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    theirs.close()
    worker = RingWorker(ours.detach())
    try:
        yield worker, process
    finally:
        worker.frontend.close()
        try:
            process.communicate(timeout=20)
        finally:
            process.kill()
            process.wait()
        for ring in worker.rings.values():
            ring.close()


def close_all(*fds: int) -> None:
    for fd in fds:
        os.close(fd)
