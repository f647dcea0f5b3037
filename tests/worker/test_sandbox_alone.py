"""A worker that runs alone goes into the same sandbox, after it has opened what it was told to."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.blk_worker import ROOT, BlkWorker, family
from tests.support.capabilities import require
from tests.support.guest_ring import IN, OK

pytestmark = pytest.mark.worker


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(os.urandom(1 << 20))
    return path


def clone_of(worker: BlkWorker) -> int:
    deadline = time.monotonic() + 10
    while len(found := family(worker.process.pid)) < 2:
        assert time.monotonic() < deadline and worker.process.poll() is None
        time.sleep(0.01)
    return found[1]


def facts(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def test_all_stages(image: Path) -> None:
    require("userns")
    worker = BlkWorker(image)
    worker.connect()
    worker.start()
    assert worker.request(IN, 3, room=512).status == OK
    pid = clone_of(worker)
    seen = facts(pid)
    assert seen["Seccomp"] == "2" and seen["NoNewPrivs"] == "1" and seen["CapEff"] == "0" * 16
    assert seen["NSpid"].split()[1:] == ["1"]
    if os.geteuid() == 0:
        assert int(seen["Uid"].split()[0]) >= 0x70000000
        assert not os.listdir(f"/proc/{pid}/root")
    # The process that was called holds nothing but its standard streams and the clone's pidfd.
    assert len(os.listdir(f"/proc/{worker.process.pid}/fd")) == 4
    assert worker.close() == ""
    assert worker.process.returncode == 0


def test_one_stage_less(image: Path) -> None:
    worker = BlkWorker(image, "--sandbox=on,seccomp=off,pid=off")
    worker.connect()
    seen = facts(clone_of(worker))
    assert seen["Seccomp"] == "0" and len(seen["NSpid"].split()) == 1
    assert worker.close() == ""


def test_no_sandbox(image: Path) -> None:
    worker = BlkWorker(image, "--sandbox=off")
    worker.connect()
    seen = facts(clone_of(worker))
    assert seen["Seccomp"] == "0" and seen["NoNewPrivs"] == "1"
    assert worker.close() == ""


@pytest.mark.parametrize(("value", "text"), [
    ("maybe", "neither on nor off"), ("on,landlock", "not STAGE=on"),
    ("on,bogus=off", "no stage 'bogus'"), ("on,fds=off", "no stage 'fds'")])
def test_bad_option(image: Path, value: str, text: str) -> None:
    done = subprocess.run([sys.executable, "-m", "workers.blk", "--fd=0", f"--blk-file={image}",
                           f"--sandbox={value}"], cwd=ROOT, capture_output=True, text=True,
                          timeout=20, check=False)
    assert done.returncode == 1
    assert text in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS])
def test_its_end_is_told(image: Path, number: signal.Signals) -> None:
    """Also by a signal, which the first process of a namespace would otherwise ignore."""
    worker = BlkWorker(image)
    worker.connect()
    os.kill(clone_of(worker), number)
    assert worker.process.wait(10) == 128 + number
    assert f"Ended by signal {number.value}" in worker.close()


def test_it_ends_with_the_process_that_was_called(image: Path) -> None:
    worker = BlkWorker(image)
    worker.connect()
    pid = clone_of(worker)
    worker.process.kill()
    worker.process.wait(10)
    deadline = time.monotonic() + 10
    while os.path.exists(f"/proc/{pid}"):
        assert time.monotonic() < deadline, "the clone outlived it"
        time.sleep(0.01)
    worker.close()
