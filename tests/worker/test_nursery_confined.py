"""The nursery's own confinement, and what it removes when its core is gone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared.unix_socket import listen_unix
from tests.support.blk_worker import ROOT
from tests.support.sandbox import probe_nursery, started_blk
from vmm.event_loop import EventLoop
from vmm.worker.nursery import Nursery

pytestmark = pytest.mark.worker


def status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {k: v.strip() for k, _, v in (line.partition(":") for line in lines)}


def wait_confined(loop: EventLoop, nursery: Nursery) -> None:
    deadline = time.monotonic() + 10
    while status(nursery.pid)["Seccomp"] != "2":
        assert time.monotonic() < deadline, "the nursery was never confined"
        loop.run_once(0.05)


@pytest.fixture
def loop() -> Iterator[EventLoop]:
    loop = EventLoop()
    yield loop
    loop.close()


@pytest.fixture
def image(tmp_path: Path) -> Iterator[int]:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(1 << 20))
    fd = os.open(path, os.O_RDWR)
    yield fd
    os.close(fd)


def test_it_clones_workers_under_its_filter(loop: EventLoop, image: int) -> None:
    nursery = Nursery(loop)
    nursery.start()
    try:
        wait_confined(loop, nursery)
        facts = status(nursery.pid)
        assert facts["NoNewPrivs"] == "1"
        worker = started_blk(nursery, image)
        assert status(worker.pid)["Seccomp_filters"] == "2"
        assert not os.listdir(f"/proc/{nursery.pid}/root")
    finally:
        nursery.close()


FORBIDDEN: list[tuple[str, list[object]]] = [
    ("openat", [-100, "/etc/passwd", 0, 0]), ("execve", ["/bin/sh", 0, 0]),
    ("socket", [1, 1, 0]), ("connect", [0, 0, 0]), ("ptrace", [16, 1, 0, 0]), ("kill", [1, 9]),
    ("mount", ["", "/", "", 0, 0]), ("setns", [0, 0]), ("chroot", ["/"]), ("ftruncate", [0, 0]),
    ("pidfd_getfd", [0, 0, 0]), ("process_vm_readv", [1, 0, 0, 0, 0, 0]), ("bpf", [0, 0, 0]),
]


def test_what_it_forbids(loop: EventLoop, image: int) -> None:
    """A clone inherits it: tried by one before its own sandbox."""
    nursery = probe_nursery(loop)
    try:
        wait_confined(loop, nursery)
        for name, arguments in FORBIDDEN:
            worker = nursery.spawn("blk", "probe", {"image": image},
                                   {"attempt": "early", "arguments": [name, *arguments]})
            deadline = time.monotonic() + 10
            while worker.state != "dead":
                assert time.monotonic() < deadline
                loop.run_once(0.05)
            assert "refused system call" in worker.reason and f"({name})" in worker.reason
    finally:
        nursery.close()


CORE = """
import os, sys
from shared import unix_socket
from vmm.event_loop import EventLoop
from vmm.worker.nursery import Nursery
nursery = Nursery(EventLoop())
nursery.start()
unix_socket.on_name = nursery.remember
for path in sys.argv[1:]:
    unix_socket.listen_unix(path)
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("idle", [False, True])
def test_names_go_with_the_core(tmp_path: Path, idle: bool) -> None:
    """However it dies; but not what somebody else has put in their place."""
    paths = [tmp_path / name for name in ("a", "b", "taken")]
    core = subprocess.Popen([sys.executable, "-c", CORE, *map(str, paths)], cwd=ROOT,
                            env={**os.environ, "PYTHONPATH": str(ROOT)},
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert core.stdin is not None and core.stdout is not None
    assert core.stdout.readline() == "ready\n"
    if idle:
        nursery = int(Path(f"/proc/{core.pid}/task/{core.pid}/children").read_text())
        deadline = time.monotonic() + 10
        while status(nursery)["Seccomp"] != "2":
            assert time.monotonic() < deadline
            time.sleep(0.05)
    paths[2].unlink()
    other = listen_unix(str(paths[2]))
    core.send_signal(signal.SIGKILL)
    core.wait(10)
    deadline = time.monotonic() + 10
    while paths[0].exists() or paths[1].exists():
        assert time.monotonic() < deadline, "a name outlived the core"
        time.sleep(0.01)
    assert paths[2].exists()
    other.close()
    core.stdin.close()
    core.stdout.close()
