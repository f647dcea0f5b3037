"""What somebody who has taken over the worker of a small device can call: tried from inside."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest

from tests.support.capabilities import require
from tests.support.sandbox import probe_nursery
from tests.support.sandbox_probe import SMALL_KINDS
from vmm.event_loop import EventLoop
from vmm.worker.nursery import Nursery

pytestmark = pytest.mark.worker

MADV_REMOVE = 9

# What no small device may do; for what no worker may see test_sandbox.py.
REFUSED: list[tuple[str, tuple[object, ...]]] = [
    ("openat", (-100, "/etc/passwd", 0, 0)), ("openat2", (-100, "/", 0, 0)),
    ("unlink", ("/x",)), ("mkdir", ("/x", 0o700)), ("ftruncate", (0, 0)), ("fchmod", (0, 0)),
    ("socket", (1, 1, 0)), ("socketpair", (1, 1, 0, 0)), ("connect", (0, 0, 0)),
    ("bind", (0, 0, 0)), ("listen", (0, 0)), ("accept4", (0, 0, 0, 0)),
    ("setsockopt", (0, 0, 0, 0, 0)), ("kill", (1, 9)), ("tkill", (1, 9)), ("fork", ()),
    ("execve", ("/bin/sh", 0, 0)), ("unshare", (0x10000000,)), ("setns", (0, 0)),
    ("ptrace", (16, 1, 0, 0)), ("process_vm_readv", (1, 0, 0, 0, 0, 0)), ("setuid", (0,)),
    ("prctl", (38, 0, 0, 0, 0)), ("seccomp", (0, 0, 0)), ("bpf", (0, 0, 0)),
    ("userfaultfd", (0,)), ("keyctl", (0, 0, 0, 0, 0)), ("memfd_create", ("x", 0)),
    ("io_uring_setup", (1, 0)), ("io_uring_enter", (0, 0, 0, 0, 0, 0)), ("epoll_create1", (0,)),
    ("rt_sigaction", (11, 0, 0, 8)), ("prlimit64", (0, 7, 0, 0)),
    ("mmap", (0, 4096, 7, 0x22, -1, 0)), ("mprotect", (0, 4096, 4)),
    ("clone", (17, 0, 0, 0, 0)), ("ioctl", (0, 0x5412, 0)), ("ioctl", (0, 0xAE01, 0)),
    ("ioctl", (0, 0x400454D0, 0)), ("ioctl", (0, 0x40085203, 0)),  # RNDADDENTROPY
    ("fcntl", (0, 4, 0)), ("fcntl", (0, 1033, 0)), ("lseek", (0, 0, 0)),
    ("pread64", (0, 0, 0, 0)), ("pwrite64", (0, 0, 0, 0)), ("preadv2", (0, 0, 0, 0, 0, 0)),
    ("pwritev2", (0, 0, 0, 0, 0, 0)), ("fdatasync", (0,)), ("sendto", (0, 0, 0, 0, 0, 0)),
]


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    require("userns")
    require("landlock")
    loop = EventLoop()
    nursery = probe_nursery(loop)
    yield nursery
    nursery.close()
    loop.close()


def attempt(nursery: Nursery, kind: str, *arguments: object) -> str:
    """How the call ended: "result: …", or its name if the sandbox refused it."""
    worker = nursery.spawn(kind, "probe", {}, {"arguments": list(arguments)})
    deadline = time.monotonic() + 20
    while worker.state != "dead":
        assert time.monotonic() < deadline, "the probe didn't end"
        nursery.loop.run_once(0.05)
    worker.discard()  # nobody took its socket
    reason = worker.reason.partition(": ")[2] or worker.reason
    _, refused, call = reason.partition("its sandbox refused system call ")
    return call.partition("(")[2].rstrip(")") if refused else reason


@pytest.mark.parametrize("kind", SMALL_KINDS)
@pytest.mark.parametrize(("name", "arguments"), REFUSED,
                         ids=[f"{i}-{name}" for i, (name, _) in enumerate(REFUSED)])
def test_forbidden_system_calls_end_the_worker(nursery: Nursery, kind: str, name: str,
                                               arguments: tuple[object, ...]) -> None:
    assert attempt(nursery, kind, name, *arguments) == name


@pytest.mark.parametrize(("kind", "name", "arguments"), [
    ("rng", "writev", (1, 0, 0)), ("rng", "fallocate", (0, 3, 0, 4096)),
    ("rng", "madvise", (0, 4096, MADV_REMOVE)), ("balloon", "readv", (1, 0, 0)),
    ("balloon", "writev", (1, 0, 0)), ("balloon", "fallocate", (0, 3, 0, 4096))])
def test_what_another_kind_may(nursery: Nursery, kind: str, name: str,
                               arguments: tuple[object, ...]) -> None:
    assert attempt(nursery, kind, name, *arguments) == name


@pytest.mark.parametrize("kind", SMALL_KINDS)
@pytest.mark.parametrize("advice", [3, 8, 10, 12, 14, 20, 21, 22, 23, 25, 100, 101, 0x7FFFFFFF])
def test_memory_is_given_back_and_nothing_else(nursery: Nursery, kind: str, advice: int) -> None:
    """WILLNEED, FREE, DONTFORK, MERGEABLE, HUGEPAGE, COLD, …: nobody's need."""
    assert attempt(nursery, kind, "madvise", 0, 4096, advice) == "madvise"


def test_the_balloon_may_punch_holes_where_something_is_mapped(nursery: Nursery) -> None:
    assert attempt(nursery, "balloon", "madvise", 0, 4096, MADV_REMOVE) == "result: ENOMEM"


@pytest.mark.parametrize("kind", SMALL_KINDS)
def test_an_allowed_call_returns(nursery: Nursery, kind: str) -> None:
    assert attempt(nursery, kind, "getpid") == "result: ok 1"
    assert os.getpid() != 1
