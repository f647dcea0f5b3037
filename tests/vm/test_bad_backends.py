"""No back end, silent, slow, lying, hung or dead, holds up QMP, `stop`, `quit` or the guest."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.support import hostile_backend
from tests.support.hostile_backend import HostileBackend
from tests.support.test_vm import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support.test_vm import TestVm

    Start = Callable[..., TestVm]

pytestmark = pytest.mark.vm

# QMP answers within this, whatever a back end does. Generous: the machine is small and busy.
PROMPT = 2.0
END = 15.0

BEHAVIOURS = [hostile_backend.silent, hostile_backend.deaf_after_features,
              hostile_backend.garbage, hostile_backend.huge_reply, hostile_backend.hang_up,
              hostile_backend.flood, hostile_backend.dribble]
DEVICES = {"blk": ["-device", "vhost-user-blk-device,chardev=b,id=foreign"],
           "net": ["-netdev", "vhost-user,id=n,chardev=b", "-device",
                   "virtio-net-device,netdev=n,id=foreign"]}


def promptly(vm: TestVm, command: str) -> Any:
    """The command's result, which must come without delay."""
    began = time.monotonic()
    result = vm.qmp.command(command)
    assert time.monotonic() - began < PROMPT
    return result


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES.keys())
@pytest.mark.parametrize("behaviour", BEHAVIOURS, ids=lambda b: b.__name__)
def test_a_bad_back_end_holds_up_nothing(start_vm: Start, tmp_path: Path,
                                         behaviour: Callable[..., None],
                                         device: list[str]) -> None:
    path = tmp_path / "backend.sock"
    with HostileBackend(path, behaviour) as backend:
        vm = start_vm("-chardev", f"socket,id=b,path={path}", *device)
        assert backend.seen.wait(10)
        for _ in range(3):
            assert promptly(vm, "query-status")["status"] == "running"
        promptly(vm, "stop")
        assert promptly(vm, "query-status")["status"] == "paused"
        promptly(vm, "cont")
        # The guest sees a device that failed, not a hang.
        vm.wait_output("ready", 30)
        assert vm.guest("echo").ok
        vm.qmp.command("quit")
        assert vm.wait(END) == 0


def children(pid: int) -> set[int]:
    """The processes whose parent it is."""
    found = set()
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and int((entry / "stat").read_text().rsplit(")", 1)[1]
                                            .split()[1]) == pid:
                found.add(int(entry.name))
        except OSError:
            continue  # it has ended
    return found


def worker_pid(vm: TestVm) -> int:
    wait_until(lambda: vm.qmp.command("query-workers")[0]["state"] == "running", "a worker")
    pid = vm.qmp.command("query-workers")[0]["pid"]
    assert isinstance(pid, int)
    return pid


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(os.urandom(1 << 20))
    return path


def test_a_hung_worker_is_named_and_quit_ends(start_vm: Start, disk: Path) -> None:
    vm = start_vm("-smp", "2", disks=(disk,))
    assert vm.guest("blk.read 0 0 8").ok
    pid = worker_pid(vm)
    os.kill(pid, signal.SIGSTOP)
    assert promptly(vm, "query-status")["status"] == "running"
    reply = vm.qmp.raw('{"execute":"stop"}', timeout=30)
    assert "blk0" in reply["error"]["desc"]
    assert promptly(vm, "query-status")["status"] == "paused"
    vm.qmp.command("quit")
    assert vm.wait(END) == 0
    wait_until(lambda: not os.path.exists(f"/proc/{pid}"), "the hung worker's end", 5)


def events(vm: TestVm, name: str) -> list[dict[str, Any]]:
    vm.qmp.command("query-status")
    return [event["data"] for event in vm.qmp.events if event["event"] == name]


def test_a_killed_worker_is_replaced(start_vm: Start, disk: Path) -> None:
    vm = start_vm("-smp", "2", disks=(disk,))
    assert vm.guest("blk.read 0 0 8").ok
    pid = worker_pid(vm)
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: events(vm, "WORKER_RESTARTED"), "WORKER_RESTARTED", 10)
    crash, restart = events(vm, "WORKER_CRASHED")[0], events(vm, "WORKER_RESTARTED")[0]
    assert crash["device"] == restart["device"] == "blk0"
    assert crash["pid"] == pid and "signal 9" in crash["reason"]
    worker = vm.qmp.command("query-workers")[0]
    assert (worker["pid"], worker["state"], worker["restarts"]) == (restart["pid"], "running", 1)
    assert vm.guest("blk.read 0 0 8").ok
    promptly(vm, "stop")
    promptly(vm, "cont")
    assert vm.guest("blk.read 0 0 8").ok
    vm.qmp.command("quit")
    assert vm.wait(END) == 0


def test_the_cores_death_ends_everything(start_vm: Start, disk: Path) -> None:
    vm = start_vm(disks=(disk,))
    assert vm.guest("blk.read 0 0 8").ok
    pid = worker_pid(vm)
    others = children(vm.process.pid)
    assert pid in others and len(others) >= 2  # worker and nursery
    vm.process.kill()
    wait_until(lambda: not any(os.path.exists(f"/proc/{p}") for p in others),
               "the end of worker and nursery", 5)
