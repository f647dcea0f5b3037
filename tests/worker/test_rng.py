"""The rng worker: as the core starts it, alone, and as a program with a command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared.vhost_user import messages as m
from tests.support.blk_worker import ROOT
from tests.support.ring_worker import Nest, RingWorker, alone
from workers.errors import UsageError
from workers.rng.program import RngProgram, open_source
from workers.rng.service import Service

pytestmark = pytest.mark.worker


@pytest.fixture
def nest() -> Iterator[Nest]:
    nest = Nest()
    yield nest
    nest.close()


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    out, into = os.pipe()
    yield out, into
    for fd in (out, into):
        os.close(fd)


# ---- as the core starts it -------------------------------------------------------------------

def test_bytes_of_the_source(nest: Nest, pipe: tuple[int, int]) -> None:
    process = nest.spawn("rng", {"source": pipe[0]}, {"queue-size": 64})
    worker = RingWorker(process.take_socket())
    worker.connect()
    ring = worker.start(size=64)
    for text in (b"first", b"second"):
        head, address = worker.offer(64)
        os.write(pipe[1], text)
        assert ring.wait_used(1) == [(head, len(text))]
        assert worker.memory.read(address, len(text)) == text
    counters, = process.counters
    assert counters["bytes"] == 11
    assert counters["chains"] == 2
    assert "seccomp" in process.stages
    worker.frontend.close()
    assert nest.gone(process) == "exit code 0"


def test_the_next_one_goes_on(nest: Nest, pipe: tuple[int, int]) -> None:
    """A worker that is killed leaves a request behind; its successor serves it, and counts on."""
    process = nest.spawn("rng", {"source": pipe[0]}, {})
    worker = RingWorker(process.take_socket())
    worker.connect()
    ring = worker.start(size=16)
    os.write(pipe[1], b"one")
    worker.offer(3)
    ring.wait_used(1)
    head, _ = worker.offer(8)
    nest.until(lambda: process.counters[0]["starved"] > 0)
    process.kill()
    nest.gone(process)
    worker.frontend.close()
    os.write(pipe[1], b"two")
    process = nest.spawn("rng", {"source": pipe[0]}, {})
    successor = RingWorker(process.take_socket(), worker.memory, worker.rings)
    successor.connect()
    successor.start(ring=ring, base=ring.used_idx)
    assert ring.wait_used(1) == [(head, 3)]
    assert process.counters[0]["bytes"] == 6
    successor.frontend.close()


def test_what_it_negotiates(nest: Nest) -> None:
    source = os.open("/dev/urandom", os.O_RDONLY)
    process = nest.spawn("rng", {"source": source}, {})
    os.close(source)
    worker = RingWorker(process.take_socket())
    worker.connect()
    assert worker.features & ~m.F_PROTOCOL_FEATURES == 1 << 32 | 1 << 29 | 1 << 28
    assert not worker.frontend.protocol & (m.PF_CONFIG | m.PF_INFLIGHT_SHMFD)
    worker.frontend.close()


def test_an_order_that_it_does_not_know(nest: Nest, pipe: tuple[int, int]) -> None:
    process = nest.spawn("rng", {"source": pipe[0]}, {})
    assert "'resize'" in nest.order(process, "resize")
    assert process.state == "running"
    process.discard()


def test_a_stopped_ring_is_quiet(nest: Nest, pipe: tuple[int, int]) -> None:
    process = nest.spawn("rng", {"source": pipe[0]}, {})
    worker = RingWorker(process.take_socket())
    worker.connect()
    ring = worker.start(size=16)
    worker.offer(8)
    assert worker.frontend.get_vring_base(0) == 0
    os.write(pipe[1], b"x")
    assert ring.take_used() == []
    worker.start(ring=ring)
    assert ring.wait_used(1)[0][1] == 1
    worker.frontend.set_vring_enable(0, False)
    worker.frontend.finish()
    head, _ = worker.offer(8)
    os.write(pipe[1], b"y")
    worker.frontend.get_status()  # served after the ring was disabled
    assert ring.take_used() == []
    worker.frontend.set_vring_enable(0, True)
    worker.frontend.finish()
    assert ring.wait_used(1) == [(head, 1)]
    worker.frontend.close()


def test_a_broken_ring_is_told(nest: Nest, pipe: tuple[int, int]) -> None:
    process = nest.spawn("rng", {"source": pipe[0]}, {})
    worker = RingWorker(process.take_socket())
    worker.connect()
    ring = worker.start(size=16)
    ring.add([(worker.memory.base, 8, False)])
    ring.publish()
    assert ring.wait_error()
    worker.frontend.get_vring_base(0)
    assert process.counters[0]["broken"] == 1
    worker.frontend.close()
    nest.gone(process)


@pytest.mark.parametrize("options", [
    {"max-bytes": 64}, {"period": 10}, {"max-bytes": 1, "period": 4_000_000}, {"queue-size": 1},
    {"queue-size": 2048}, {"max-bytes": -1, "period": 1}, {"max-bytes": "9", "period": 1},
    {"queue-size": True}, {"max-bytes": 1 << 32, "period": 1000}])
def test_options_that_do_not_hold(options: dict[str, object], pipe: tuple[int, int]) -> None:
    with pytest.raises(UsageError):
        Service(pipe[0], options, None, print)


def test_without_its_descriptor(nest: Nest) -> None:
    worker = nest.nursery.spawn("rng", "dev", {}, {})
    assert not worker.wait_started(time.monotonic() + 20)
    assert "'source'" in worker.reason


# ---- alone -----------------------------------------------------------------------------------

def test_alone(tmp_path: Path) -> None:
    with alone("rng", "--queue-size=32") as (worker, process):
        worker.connect()
        ring = worker.start(size=32)
        head, address = worker.offer(4096)
        assert ring.wait_used(1) == [(head, 4096)]
        assert len(set(worker.memory.read(address, 4096))) > 200
        worker.frontend.close()
        assert process.wait(20) == 0
        assert process.stderr is not None and process.stderr.read() == ""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "workers.rng", *arguments], cwd=ROOT, text=True,
                          capture_output=True, timeout=30, check=False)


def test_capabilities_and_help() -> None:
    assert json.loads(run("--print-capabilities").stdout) == {"type": "rng"}
    text = run("--help").stdout
    for option in ("socket-path", "fd", "filename", "max-bytes", "period", "queue-size",
                   "sandbox"):
        assert f"--{option}" in text


@pytest.mark.parametrize("arguments", [
    [], ["--fd=3", "--socket-path=/x"], ["--fd=x"], ["--fd=3", "--queue-size=100"],
    ["--fd=3", "--max-bytes=64"], ["--fd=3", "--period=64"], ["--fd=3", "--speed=9"], ["rng"],
    ["--fd=3", "--max-bytes=0", "--period=9"], ["--fd"]])
def test_bad_command_lines(arguments: list[str]) -> None:
    with pytest.raises(UsageError):
        RngProgram().parse(arguments)


@pytest.mark.parametrize("name", ["/etc/passwd", "/", "/dev/nothing-here"])
def test_sources_that_are_none(name: str) -> None:
    with pytest.raises(UsageError, match=name):
        open_source(name)


def test_one_line_for_an_error() -> None:
    result = run("--fd=3", "--filename=/etc/passwd")
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1 and "/etc/passwd" in result.stderr
