"""`ps`, `status`, `events` of VMs that answer whatever they like."""

from __future__ import annotations

import json
import os
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.patience import PATIENT
from tests.support.scripted_vm import Raw, Refusal, ScriptedVm
from vmm.ctl import output, show, vms
from vmm.ctl.answers import MOST, dicts, inner, number, text
from vmm.ctl.errors import CtlError
from vmm.ctl.vms import Vm

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Script = Callable[..., ScriptedVm]

QUERIES = ("query-status", "query-name", "query-cpus-fast", "query-memory-size-summary",
           "query-balloon", "query-workers", "query-block", "query-nics", "query-chardev")
MEMBERS = ("status", "name", "thread-id", "base-memory", "actual", "device", "kind", "state",
           "pid", "restarts", "engine", "inserted", "image", "virtual-size", "ro", "file",
           "node-name", "qdev", "slot", "mac", "link-up", "queues", "netdev", "type", "ifname",
           "limits", "rx-bytes", "label", "filename")
GOOD: dict[str, Any] = {
    "query-status": {"status": "running", "running": True},
    "query-name": {"name": "title"},
    "query-cpus-fast": [{"thread-id": os.getpid()}],
    "query-memory-size-summary": {"base-memory": 1 << 30},
    "query-balloon": {"actual": 1 << 29},
    "query-workers": [{"device": "blk0", "kind": "blk", "state": "running", "pid": 5,
                       "restarts": 0, "engine": "io_uring", "counters": {}}],
    "query-block": [{"qdev": "blk0", "inserted": {
        "node-name": "d0", "ro": False, "file": "/a.img", "image": {"virtual-size": 1 << 20}}}],
    "query-nics": [{"slot": 0, "mac": "52:54:00:00:00:01", "queues": 1, "link-up": False,
                    "device": "nic0", "netdev": "net0", "type": "tap", "ifname": "tap7",
                    "limits": {"rx-bytes": 1 << 20, "tx-packets": 5000}},
                   {"slot": 1, "mac": "52:54:00:00:00:02", "queues": 1, "link-up": False}],
    "query-chardev": [{"label": "serial0", "filename": "pty:/dev/pts/7"}],
}

_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text() | st.sampled_from([-1, 1 << 63, 1 << 64, "running", "tap", "\x1b[2J", "\udcff"]),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(st.sampled_from(MEMBERS) | st.text(max_size=5), inner, max_size=6),
    max_leaves=25)


def test_the_whole_status(script: Script, capsys: pytest.CaptureFixture[str]) -> None:
    vm = Vm("web", script(GOOD).path)
    show.status(vm, True)
    told = json.loads(capsys.readouterr().out)
    assert (told["state"], told["title"], told["memory-bytes"]) == ("running", "title", 1 << 30)
    assert (told["pid"], told["balloon"]) == (os.getpid(), 1 << 29)
    assert told["nics"] == GOOD["query-nics"]
    assert told["processes"][0]["pid"] == os.getpid()
    show.status(vm, False)
    shown = capsys.readouterr().out
    nic = next(line for line in shown.splitlines() if "nic0" in line)
    assert nic.split() == ["0", "nic0", "down", "52:54:00:00:00:01", "1", "net0", "tap7",
                           "rx-bytes", "1.0", "MiB/s,", "tx-packets", "5.0k/s"]
    assert "52:54:00:00:00:02" not in shown  # an empty slot
    assert "of 1.0 GiB" in shown and "512 MiB" in shown


def test_a_vm_that_knows_nothing_of_ours(script: Script,
                                         capsys: pytest.CaptureFixture[str]) -> None:
    refusals: dict[str, Any] = dict.fromkeys(QUERIES, Refusal("no such command"))
    vm = Vm("web", script({**refusals, "query-status": {"status": "paused"}}).path)
    for as_json in (True, False):
        show.status(vm, as_json)
    assert "paused" in capsys.readouterr().out


@pytest.mark.parametrize(("nic", "tap", "link"), [
    ({"link-up": True, "type": "tap"}, "gone", "up"),
    ({"link-up": 1, "type": "vhost-user", "netdev": "n"}, "vhost-user", "?"),
    ({"link-up": [True], "type": []}, "?", "?")])
def test_links_and_back_ends(script: Script, capsys: pytest.CaptureFixture[str],
                             nic: dict[str, Any], tap: str, link: str) -> None:
    described = {"slot": 0, "device": "x", "mac": "m", "queues": 1, "netdev": "n", **nic}
    show.status(Vm("web", script({**GOOD, "query-nics": [described]}).path), False)
    line = next(line for line in capsys.readouterr().out.splitlines() if " m " in line)
    assert line.split() == ["0", "x", link, "m", "1", "n", tap]


@PATIENT
@given(answers=st.dictionaries(st.sampled_from(QUERIES), _VALUES, max_size=len(QUERIES)))
def test_any_answers(tmp_path_factory: pytest.TempPathFactory,
                     capsys: pytest.CaptureFixture[str], answers: dict[str, Any]) -> None:
    vm = ScriptedVm(tmp_path_factory.mktemp("vm", numbered=True) / "qmp.sock",
                    {**GOOD, **answers})
    try:
        target = Vm("web", vm.path)
        show.status(target, False)
        show.ps([target], "here", False)
        shown = capsys.readouterr().out
        assert all(c == "\n" or c.isprintable() for c in shown)
        show.status(target, True)
        show.ps([target], "here", True)
        for line in capsys.readouterr().out.splitlines():
            json.loads(line)
    finally:
        vm.close()


def test_answers_without_measure(script: Script, capsys: pytest.CaptureFixture[str]) -> None:
    workers = [{"device": "x" * 2000, "kind": ["y"]}] * (MOST + 100)
    vm = script({**GOOD, "query-workers": workers, "query-block": [5] * 9999})
    show.status(Vm("web", vm.path), False)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) < 3 * MOST  # a name of a thousand letters takes a second line
    assert max(map(len, lines)) <= 1000


# ---- ps ------------------------------------------------------------------------------------


def test_vms_that_do_not_answer(script: Script, tmp_path: Path,
                                capsys: pytest.CaptureFixture[str],
                                monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(show, "QUICK", 2.0)
    script(GOOD, name="good")
    script({**GOOD, "query-cpus-fast": Raw(b"")}, name="hung")
    script({**GOOD, "query-status": Raw(b"", close=True)}, name="ended")
    script(greeting={"hello": 1}, name="other")
    script({"query-status": {"status": "unreachable"}}, name="liar")
    began = time.monotonic()
    show.ps(vms.list_vms(f"{tmp_path}/run"), "here", True)
    assert time.monotonic() - began < 10
    listed = {vm["name"]: vm for vm in json.loads(capsys.readouterr().out)}
    assert listed["good"]["state"] == "running" and listed["good"]["pid"] == os.getpid()
    assert listed["good"]["memory-bytes"] == 1 << 30 and "thread" not in listed["good"]
    assert {name for name, vm in listed.items() if "reason" in vm} == {"hung", "ended", "other"}
    assert "no answer in time" in listed["hung"]["reason"]
    show.ps(vms.list_vms(f"{tmp_path}/run"), "here", False)
    assert "unreachable" in capsys.readouterr().out


def test_one_that_drips_is_given_up_as_a_whole(script: Script,
                                               monkeypatch: pytest.MonkeyPatch,
                                               capsys: pytest.CaptureFixture[str]) -> None:
    """Each answer in time, but all together not."""
    monkeypatch.setattr(show, "QUICK", 0.4)

    def slowly(_: object) -> object:
        time.sleep(0.15)  # time is what is tested
        return {"status": "running"}

    vm = script(dict.fromkeys(QUERIES, slowly))
    show.ps([Vm("web", vm.path)], "here", True)
    assert json.loads(capsys.readouterr().out)[0]["state"] == "unreachable"


def test_nothing_to_list(capsys: pytest.CaptureFixture[str]) -> None:
    show.ps([], "/run/\x1b", False)
    assert capsys.readouterr() == ("", "There are no VMs in /run/?\n")
    show.ps([], "/run", True)
    assert capsys.readouterr() == ("[]\n", "")


# ---- events --------------------------------------------------------------------------------


@pytest.mark.parametrize(("event", "line"), [
    ({"event": "STOP", "timestamp": {"seconds": 0, "microseconds": 5}},
     time.strftime("%F %T", time.localtime(0)) + ".000005 STOP "),
    ({"event": "A\x1b[2J", "data": {"x": "\x1b"}}, '- A?[2J {"x": "\\u001b"}'),
    ({"event": None, "timestamp": 5, "data": 7}, "- None 7"),
    ({"event": [1], "timestamp": {"seconds": "1", "microseconds": 0}}, "- [1] "),
    ({"event": "B", "timestamp": {"seconds": 1 << 62, "microseconds": 0}}, "- B "),
    ({"event": "C", "timestamp": {"seconds": True, "microseconds": 0}}, "- C "),
    ({"event": "D", "timestamp": {"seconds": 1}}, "- D ")])
def test_any_event(script: Script, capsys: pytest.CaptureFixture[str], event: object,
                   line: str) -> None:
    vm = script({"qmp_capabilities": Raw(b'{"return": {}}\n' + json.dumps(event).encode() + b"\n",
                                         close=True)})
    assert show.events(Vm("web", vm.path), False, None) == 0
    assert capsys.readouterr().out == line + "\n"


def test_so_many_events(script: Script, capsys: pytest.CaptureFixture[str]) -> None:
    vm = script()
    watcher = threading.Thread(target=lambda: show.events(Vm("web", vm.path), True, 2))
    watcher.start()
    deadline = time.monotonic() + 10
    while watcher.is_alive() and time.monotonic() < deadline:
        if vm.asked("qmp_capabilities"):
            vm.emit({"event": "STOP"})
        watcher.join(0.01)
    assert not watcher.is_alive()
    assert capsys.readouterr().out.splitlines() == ['{"event": "STOP"}'] * 2


def test_events_of_what_is_no_vm(script: Script) -> None:
    vm = script({"qmp_capabilities": Raw(b'{"return": {}}\n[]\n', close=True)})
    with pytest.raises(CtlError):
        show.events(Vm("web", vm.path), False, None)


# ---- taking answers apart ------------------------------------------------------------------


@PATIENT
@given(_VALUES, st.sampled_from(MEMBERS))
def test_what_is_not_there_is_nothing(answer: Any, name: str) -> None:
    assert isinstance(text(answer, name), str)
    assert isinstance(inner(answer, name), dict)
    value = number(answer, name)
    assert value is None or (type(value) is int and 0 <= value < 1 << 64)
    assert all(isinstance(entry, dict) for entry in dicts(answer))
    assert output.printable(answer).isprintable() or output.printable(answer) == ""
