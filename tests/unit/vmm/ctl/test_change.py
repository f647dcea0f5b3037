"""Run states, the end of a VM, links."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from tests.support.scripted_vm import Raw, Refusal, ScriptedVm
from vmm.ctl import change, command_line, processes
from vmm.ctl.errors import CtlError, QmpRefused
from vmm.ctl.vms import Vm

if TYPE_CHECKING:
    from collections.abc import Callable

    Script = Callable[..., ScriptedVm]


def run(vm: ScriptedVm, *line: str) -> object:
    args = command_line.parse(line)
    action = {"quit": change.quit_vm, "link": change.set_link}.get(args.command, change.run_state)
    with Vm("web", vm.path).connect() as client:
        return action(client, args)


@pytest.mark.parametrize(("command", "name"), [
    ("stop", "stop"), ("cont", "cont"), ("reset", "system_reset"),
    ("powerdown", "system_powerdown")])
def test_run_states(script: Script, command: str, name: str) -> None:
    vm = script()
    assert run(vm, command, "web") == {}
    assert vm.asked(name) == [{}]


@pytest.mark.parametrize(("state", "up"), [("up", True), ("down", False)])
def test_links(script: Script, state: str, up: bool) -> None:
    vm = script()
    assert run(vm, "link", "web", "nic0", state) == {}
    assert vm.asked("set_link") == [{"name": "nic0", "up": up}]


@pytest.mark.parametrize(("error_class", "text"), [
    ("DeviceNotFound", r"web has no network card 'a\?'; stratoctl status web lists them"),
    ("GenericError", "web: no")])
def test_no_link(script: Script, error_class: str, text: str) -> None:
    with pytest.raises(CtlError, match=text):
        run(script({"set_link": Refusal("no", error_class)}), "link", "web", "a\x1b", "up")


# ---- the end -------------------------------------------------------------------------------


@pytest.mark.parametrize("answer", [Raw(b'{"return": {}}\n', close=True), Raw(b"", close=True)])
def test_quit(script: Script, answer: Raw) -> None:
    assert run(script({"quit": answer}), "quit", "web") == {}


def test_a_refusal_is_no_end(script: Script) -> None:
    with pytest.raises(QmpRefused):
        run(script({"quit": Refusal("no")}), "quit", "web")


@pytest.mark.parametrize("answer", [{}, Raw(b'{"return": {}}\n{"event": "SHUTDOWN"}\n')])
def test_a_vm_that_does_not_end(script: Script, answer: object,
                                monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(change, "QUIT_LIMIT", 0.2)
    with pytest.raises(CtlError, match=r"web has not ended within 0 s; look at its log$"):
        run(script({"quit": answer}), "quit", "web")


def test_rubbish_is_no_end(script: Script) -> None:
    with pytest.raises(CtlError, match="is not QMP"):
        run(script({"quit": Raw(b'{"return": {}}\nrubbish\n')}), "quit", "web")


def test_the_process_is_waited_for(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection closes before its images are free."""
    monkeypatch.setattr(change, "QUIT_LIMIT", 10.0)
    core = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"],
                            stdin=subprocess.PIPE)
    try:
        monkeypatch.setattr(processes.Snapshot, "is_core", lambda self, pid: True)
        monkeypatch.setattr(os, "pidfd_open", lambda pid, real=os.pidfd_open: real(core.pid))
        vm = script({"quit": Raw(b'{"return": {}}\n', close=True)})
        assert core.stdin is not None

        def end(*_: object) -> None:
            assert core.stdin is not None
            core.stdin.close()

        before = signal.signal(signal.SIGALRM, end)
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        began = time.monotonic()
        assert run(vm, "quit", "web") == {}
        assert time.monotonic() - began >= 0.25
        signal.signal(signal.SIGALRM, before)
    finally:
        core.kill()
        core.wait()


def test_a_process_that_stays(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who it is, the kernel says: nobody is told to kill what a VM has named."""
    monkeypatch.setattr(change, "QUIT_LIMIT", 0.2)
    monkeypatch.setattr(processes.Snapshot, "is_core", lambda self, pid: pid == os.getpid())
    vm = script({"quit": Raw(b'{"return": {}}\n', close=True),
                 "query-cpus-fast": [{"thread-id": 1}]})
    with pytest.raises(CtlError, match=f"look at its log; kill -9 {os.getpid()} ends it at once"):
        run(vm, "quit", "web")
