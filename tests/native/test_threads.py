"""The threads of data planes: signals are the main thread's, but for those that end a process."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile

import pytest

from tests.support.net_plane import NetPlane
from tests.support.plane import Plane
from tests.support.ring_plane import RingPlane, rng_plane, until

pytestmark = pytest.mark.native

DEADLY = {signal.SIGSYS, signal.SIGABRT, signal.SIGSEGV, signal.SIGBUS, signal.SIGILL,
          signal.SIGFPE}
BLOCKED = {signal.SIGTERM, signal.SIGINT, signal.SIGCHLD, signal.SIGUSR1}


@contextmanager
def blk() -> Iterator[Plane]:
    with NamedTemporaryFile() as disk:
        disk.truncate(1 << 20)
        plane = Plane(disk.name, "threads")
        yield plane
        plane.close()


@contextmanager
def net() -> Iterator[NetPlane]:
    plane = NetPlane()
    yield plane
    plane.close()


@contextmanager
def small() -> Iterator[RingPlane]:
    source, other = os.pipe()
    os.set_blocking(source, False)
    plane = rng_plane(source)
    yield plane
    plane.close()
    os.close(source)
    os.close(other)


def blocked(thread: str) -> set[int]:
    status = Path(f"/proc/self/task/{thread}/status").read_text()
    mask = int(status.partition("SigBlk:")[2].split()[0], 16)
    return {number for number in range(1, 65) if mask >> (number - 1) & 1}


@pytest.mark.parametrize("kind", [blk, net, small])
def test_what_ends_a_process_is_not_blocked(
        kind: Callable[[], AbstractContextManager[Plane | NetPlane | RingPlane]]) -> None:
    """Blocked, the kernel would kill without the handler that tells why (sv_report_deaths)."""
    with kind() as plane:
        before = set(os.listdir("/proc/self/task"))
        plane.start(0)
        [thread] = set(os.listdir("/proc/self/task")) - before
        # The C library starts a thread with all blocked.
        until(lambda: not blocked(thread) & DEADLY)
        assert blocked(thread) >= BLOCKED
