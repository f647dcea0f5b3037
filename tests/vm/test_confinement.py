"""A running VM's processes and threads are confined, and still do their work."""

from __future__ import annotations

import os
import signal
import sys
from typing import TYPE_CHECKING, Any

import pytest

from shared.sandbox.stages import DESCRIPTIONS
from tests.support.blk_worker import ROOT
from tests.support.guest import crc32
from tests.support.test_vm import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.support.test_vm import TestVm

    Start = Callable[..., TestVm]

pytestmark = pytest.mark.vm

KEPT = "0000000000005022"  # vmm/confinement.py, KEEP


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(os.urandom(1 << 20))
    return path


def running(vm: TestVm) -> dict[str, Any]:
    """The one worker, once it has said that it serves: the guest may be ready before."""
    workers: list[dict[str, Any]] = []

    def serves() -> bool:
        workers[:] = vm.qmp.command("query-workers")
        return [worker["state"] for worker in workers] == ["running"]

    wait_until(serves, "a worker that serves")
    return workers[0]


def facts(pid: int, tid: int) -> dict[str, str]:
    with open(f"/proc/{pid}/task/{tid}/status", encoding="ascii") as file:
        return {name: value.strip() for name, _, value in (line.partition(":") for line in file)}


def child(pid: int, name: str) -> int:
    with open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as file:
        for word in file.read().split():
            with open(f"/proc/{word}/comm", encoding="ascii") as comm:
                if comm.read().strip() == name:
                    return int(word)
    return 0


def test_threads_of_a_running_vm(start_vm: Start, disk: Path) -> None:
    vm = start_vm("-smp", "2", disks=(disk,))
    assert vm.guest("echo").ok
    pid = vm.process.pid
    wait_until(lambda: facts(pid, pid)["Seccomp"] == "2", "the main thread's confinement")
    root = os.geteuid() == 0
    assert facts(pid, pid)["CapEff"] == (KEPT if root else "0" * 16)
    vcpus = [cpu["thread-id"] for cpu in vm.qmp.command("query-cpus-fast")]
    assert len(vcpus) == 2
    for tid in vcpus:
        seen = facts(pid, tid)
        assert seen["Seccomp"] == "2" and seen["NoNewPrivs"] == "1"
        assert seen["CapEff"] == seen["CapPrm"] == "0" * 16
    worker = running(vm)
    expected = [name for name in DESCRIPTIONS if root or name != "uid"]
    assert worker["sandbox"] == expected
    # What needs other threads and processes goes on.
    vm.qmp.command("stop")
    vm.qmp.command("cont")
    assert vm.guest("blk.read 0 0 8").value("crc") == crc32(disk, 0, 8)


def test_a_killed_nursery_comes_back_through_the_keeper(start_vm: Start, disk: Path,
                                                        tmp_path: Path) -> None:
    vm = start_vm(disks=(disk,))
    assert vm.guest("echo").ok
    pid = vm.process.pid
    wait_until(lambda: child(pid, "sv-keeper") > 0, "the keeper")
    wait_until(lambda: facts(pid, pid)["Seccomp"] == "2", "the main thread's confinement")
    old = child(pid, "sv-nursery")
    os.kill(old, signal.SIGKILL)
    wait_until(lambda: not os.path.exists(f"/proc/{old}"), "the nursery's end")
    other = tmp_path / "other.img"
    other.write_bytes(os.urandom(1 << 20))
    node: dict[str, Any] = {"node-name": "drive-0", "driver": "raw",
                            "file": {"driver": "file", "filename": str(other)}}
    vm.qmp.command("blockdev-add", **node)
    vm.qmp.command("device_add", driver="virtio-blk-mmio", id="drive-0", drive="drive-0",
                   addr="0x1")
    assert vm.guest("blk.read 1 0 8").value("crc") == crc32(other, 0, 8)
    assert child(pid, "sv-nursery") not in (0, old)


def test_without_a_sandbox(start_vm: Start, disk: Path) -> None:
    vm = start_vm("-sandbox", "off", disks=(disk,))
    assert vm.guest("blk.read 0 0 8").value("crc") == crc32(disk, 0, 8)
    worker, = vm.qmp.command("query-workers")
    assert worker["sandbox"] == ["fds", "no-new-privs"]


def test_names_go_with_a_killed_core(start_vm: Start, disk: Path, tmp_path: Path) -> None:
    pidfile = tmp_path / "pid"
    vm = start_vm("-pidfile", pidfile, disks=(disk,))
    assert vm.guest("echo").ok
    assert vm.qmp_path.exists() and pidfile.exists()
    vm.process.kill()
    vm.process.wait(10)
    wait_until(lambda: not vm.qmp_path.exists() and not pidfile.exists(), "the end of the names")


# The product on a host without Landlock.
POOR = """
import sys
from native import _sandbox
from shared.sandbox import policy
rules = [policy._parse("landlock_create_ruleset: EOPNOTSUPP", "a poor host", "test")]
program = policy.compile_rules(rules, policy.NOTHING)
_sandbox.lib.sv_no_new_privs()
assert _sandbox.lib.sv_filter_install(program, len(program)) == 0
from vmm.__main__ import run
run()
"""


def test_a_host_that_lacks_a_stage(start_vm: Start, disk: Path) -> None:
    """The start fails, with a line that names stage and way out, which is one."""
    site = next(path for path in sys.path if path.endswith("site-packages"))
    code = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {site!r}]\n{POOR}"
    command = [sys.executable, "-I", "-S", "-c", code]
    vm = start_vm(disks=(disk,), command=command)
    assert vm.process.wait(20) == 1
    line = vm.errors.read_text().splitlines()[-1]
    assert line.startswith("stratovirt: Worker blk 'blk0' can't start")
    assert "stage 'landlock'" in line and "-sandbox on,landlock=off" in line
    # The parent of a daemon hears it too.
    vm = start_vm("-daemonize", disks=(disk,), command=command, serial=False)
    assert vm.process.wait(20) == 1
    assert "-sandbox on,landlock=off" in vm.errors.read_text()
    vm = start_vm("-sandbox", "on,landlock=off", disks=(disk,), command=command)
    assert vm.guest("blk.read 0 0 8").value("crc") == crc32(disk, 0, 8)
    worker, = vm.qmp.command("query-workers")
    assert "landlock" not in worker["sandbox"] and "seccomp" in worker["sandbox"]
