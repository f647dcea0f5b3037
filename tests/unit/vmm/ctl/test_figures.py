"""From samples to figures, and their course; which VMs are looked at."""

from __future__ import annotations

import json
import os
import socket
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.scripted_vm import Raw, ScriptedVm
from tests.support.stat_pages import page
from vmm.ctl import figures, processes, targets
from vmm.ctl.errors import CtlError
from vmm.ctl.figures import Figures, History, Watch
from vmm.ctl.processes import Member, Process, Snapshot, Usage
from vmm.ctl.targets import Targets
from vmm.ctl.vms import Vm

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Script = Callable[..., ScriptedVm]

ME = os.getpid()


class FakeSample:
    """(pid, started, CPU seconds) of each process of the VM 7."""

    def __init__(self, when: float, *members: tuple[int, int, float]) -> None:
        self.when = when
        self.pages: dict[tuple[int, str], Any] = {}
        used = Usage()
        for pid, started, cpu in members:
            member = Member(Process(pid, "x", "S", 1, 0, started), 0)
            member.cpu = cpu
            used.members.append(member)
        self.usage = {7: used} if members else {}


def cpu(before: FakeSample, now: FakeSample) -> float:
    return Figures("web", 7, before, now).cpu  # type: ignore[arg-type]


def test_cpu_time() -> None:
    assert cpu(FakeSample(1, (7, 1, 5.0)), FakeSample(3, (7, 1, 6.0), (8, 2, 9.0))) == 0.5
    assert cpu(FakeSample(1), FakeSample(2, (7, 1, 5.0))) == 0
    # A pid that another process has by now, and time that goes backwards.
    assert cpu(FakeSample(1, (7, 1, 5.0)), FakeSample(2, (7, 2, 100.0))) == 0
    assert cpu(FakeSample(1, (7, 1, 5.0)), FakeSample(2, (7, 1, 4.0))) == 0
    assert cpu(FakeSample(1, (7, 1, 5.0)), FakeSample(1, (7, 1, 5.0))) == 0


def test_a_course_is_forgotten_with_its_vm() -> None:
    history = History()
    vm = Figures("web", 7, FakeSample(1), FakeSample(2, (7, 1, 1.0)))  # type: ignore[arg-type]
    for _ in range(100):
        history.add([vm])
    assert len(history.of(7, "")) == figures._POINTS
    history.add([])
    assert not history.of(7, "") and not history._past


# ---- which VMs -----------------------------------------------------------------------------


@pytest.fixture
def _core(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process, which listens on the scripts' sockets, is a VM."""
    monkeypatch.setattr(Snapshot, "is_core", lambda self, pid: pid == ME)


@pytest.mark.usefixtures("_core")
def test_vms_of_a_run_directory_come_and_go(script: Script, tmp_path: Path) -> None:
    found = Targets(None, f"{tmp_path}/run", False)
    assert found.find() == {}
    vm = script()
    assert found.find() == {ME: "web"}
    assert vm.commands == []  # nobody was asked anything
    os.unlink(vm.path)
    assert found.find() == {}
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(vm.path)
    assert found.find() == {}


@pytest.mark.usefixtures("_core")
def test_a_vm_is_connected_to_once(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    vm = script()
    found = Targets([Vm("web", vm.path)], "", False)
    assert found.find() == {ME: "web"}
    monkeypatch.setattr(targets, "connect_unix", None)
    assert found.find() == {ME: "web"}
    os.unlink(vm.path)  # it is about to end; its process is there still
    assert found.find() == {ME: "web"}


@pytest.mark.usefixtures("_core")
def test_a_pid_that_another_process_has_by_now(script: Script,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    vm = script()
    found = Targets([Vm("web", vm.path)], "", False)
    assert found.find() == {ME: "web"}
    monkeypatch.setattr(processes, "read_process",
                        lambda pid: Process(pid, "x", "S", 1, 0, 12345))
    assert found.find() == {}


def test_one_that_was_named_must_be_there(script: Script, tmp_path: Path,
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "QUICK", 0.2)
    for path, text in ((f"{tmp_path}/missing", "No such file"),
                       (script({}, greeting=Raw(b"")).path, "no answer in time")):
        with pytest.raises(CtlError, match=text):
            Targets([Vm("web", path)], "", False).find()


@pytest.mark.usefixtures("_core")
def test_later_it_may_go(script: Script) -> None:
    vm = script()
    found = Targets([Vm("web", vm.path)], "", False)
    found.find()
    vm.close()
    os.unlink(vm.path)
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(vm.path)
        assert found.find() == {}


def test_a_socket_that_was_handed_in(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    """We made it, as a manager would; the VM says who it is, and only a VM is believed."""
    monkeypatch.setattr(Snapshot, "is_core", lambda self, pid: pid == 1)
    found = Targets([Vm("web", script({"query-cpus-fast": [{"thread-id": 1}]}).path)], "", False)
    assert found.find() == {1: "web"}
    liar = script({"query-cpus-fast": [{"thread-id": os.getppid()}]}, name="liar")
    assert Targets([Vm("liar", liar.path)], "", False).find() == {ME: "liar"}


@pytest.mark.parametrize("pid", [0, 1 << 22])
def test_a_vm_that_cannot_be_seen(script: Script, monkeypatch: pytest.MonkeyPatch,
                                  pid: int) -> None:
    """It is in another name space, or /proc hides processes of others (hidepid)."""
    monkeypatch.setattr(targets, "peer_of", lambda sock: (pid, -1))
    monkeypatch.setattr(Snapshot, "is_core", lambda self, pid: True)
    vm = Vm("web", script().path)
    with pytest.raises(CtlError, match="The processes of web can't be seen from here"):
        Targets([vm], "", False).find()


def test_a_run_directory_that_cannot_be_read() -> None:
    assert Targets(None, "/dev/null", True).find() == {}
    with pytest.raises(CtlError, match="Can't read the run directory"):
        Targets(None, "/dev/null", False).find()


# ---- watching ------------------------------------------------------------------------------


@pytest.mark.usefixtures("_core")
def test_watching(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = [page("blk", {"reads": 1}, vm="title")]
    monkeypatch.setattr("vmm.ctl.sample.read_pages", lambda: shown)
    vm = script()
    watch = Watch(Targets([Vm("web", vm.path)], "", False))
    shown[:] = [page("blk", {"reads": 5}, vm="title")]
    found, = watch.take()
    assert (found.name, found.pid) == ("web", ME)
    assert found.devices[0].totals["reads"] == 5 and found.devices[0].rates["reads"] > 0
    json.dumps(found.as_json(), allow_nan=False)
    assert not watch.ended([found])
    assert watch.ended([])


@pytest.mark.parametrize(("vm", "name"), [("title", "title"), ("", f"pid {ME}")])
def test_vms_without_a_name_here(monkeypatch: pytest.MonkeyPatch, vm: str, name: str) -> None:
    monkeypatch.setattr("vmm.ctl.sample.read_pages", lambda: [page("blk", {}, vm=vm)])
    watch = Watch(Targets(None, "/missing", True))
    found, = watch.take()
    assert found.name == name
    assert not watch.ended([])  # others may come
