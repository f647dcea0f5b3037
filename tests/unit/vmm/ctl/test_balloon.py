"""`balloon`: telling, setting, waiting, statistics."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.scripted_vm import Raw, Refusal, ScriptedVm
from vmm.ctl import balloon, command_line
from vmm.ctl.errors import CtlError, GoneError
from vmm.ctl.vms import Vm

if TYPE_CHECKING:
    from collections.abc import Callable

    Script = Callable[..., ScriptedVm]

GIB = 1 << 30
MIB = 1 << 20
INACTIVE = Refusal("No balloon device has been activated", "DeviceNotActive")


class Guest:
    """A guest with 4 GiB that comes to its target by so much at each look at it."""

    def __init__(self, step: int = 0, least: int = 0) -> None:
        self.actual = self.target = 4 * GIB
        self.step = step
        self.least = least
        self.answers: dict[str, Any] = {
            "query-memory-size-summary": {"base-memory": 4 * GIB},
            "balloon": self.set, "query-balloon": self.query,
            "query-balloon-stats": lambda _: {
                "actual": self.actual, "target": self.target, "age-ms": 10,
                "stats": {"free-memory": 5 * MIB, "major-faults": 1234, "swap-in": 4096,
                          "disk-caches": 1 << 63}}}

    def set(self, arguments: dict[str, Any]) -> object:
        self.target = arguments["value"]
        if not self.step:
            self.actual = self.target & ~4095
        return Raw(b'{"return": {}}\n{"event": "BALLOON_CHANGED", "data": {"actual": 1}}\n')

    def query(self, _: object) -> object:
        goal = max(self.target & ~4095, self.least)
        if self.actual > goal:
            self.actual = max(self.actual - self.step, goal)
        else:
            self.actual = min(self.actual + self.step, goal)
        return {"actual": self.actual}


def run(vm: ScriptedVm, *line: str) -> dict[str, Any]:
    with Vm("web", vm.path).connect() as client:
        return balloon.balloon(client, command_line.parse(("balloon", "web", *line)))


@pytest.fixture(autouse=True)
def _prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(balloon, "_POLL", 0.01)


def test_what_the_guest_has(script: Script) -> None:
    told = run(script(Guest().answers))
    assert told == {"total": 4 * GIB, "actual": 4 * GIB}
    assert balloon.describe("web", told) == "web: the guest has 4.0 GiB of 4.0 GiB"


@pytest.mark.parametrize(("size", "value"), [
    ("1G", GIB), ("1.5G", 3 * GIB // 2), ("50%", 2 * GIB), ("12.5%", GIB // 2),
    ("100%", 4 * GIB), ("4G", 4 * GIB)])
def test_sizes(script: Script, size: str, value: int) -> None:
    vm = script(Guest().answers)
    told = run(vm, size)
    assert vm.asked("balloon") == [{"value": value}]
    assert told == {"total": 4 * GIB, "target": value, "actual": value}
    assert "asked" not in balloon.describe("web", told)


def test_it_takes_its_time(script: Script) -> None:
    told = run(script(Guest(step=MIB).answers), "1G")
    assert told["actual"] == 4 * GIB - MIB
    assert balloon.describe("web", told) == (
        "web: the guest has 4.0 GiB of 4.0 GiB, and is asked to come to 1.0 GiB")


def test_waiting(script: Script) -> None:
    assert run(script(Guest(step=GIB).answers), "1000000K", "--wait")["actual"] == 1000000 << 10
    told = run(script(Guest(step=GIB).answers, name="odd"), f"{GIB + 5}", "--wait")
    assert (told["target"], told["actual"]) == (GIB + 5, GIB)  # whole pages


def test_a_guest_that_needs_its_memory(script: Script) -> None:
    vm = script(Guest(step=GIB, least=2 * GIB).answers)
    with pytest.raises(CtlError, match=r"web: the guest stays at 2.0 GiB, 1.0 GiB are asked for"):
        run(vm, "1G", "--wait", "--timeout", "0.2")


def test_progress_is_worth_waiting_for(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer than the limit in all, never that long without progress."""
    guest = Guest(step=32 * MIB)
    vm = script(guest.answers)
    # A second passes with each look at the guest.
    monkeypatch.setattr(balloon, "time", SimpleNamespace(
        monotonic=lambda: len(vm.asked("query-balloon"))))
    assert run(vm, "1G", "--wait", "--timeout", "3")["actual"] == GIB
    assert len(vm.asked("query-balloon")) >= 96


@pytest.mark.parametrize(("line", "text"), [
    (("5G",), "web has 4.0 GiB, not 5.0 GiB; 100% gives"),
    (("0.00001%",), "web: no guest lives on ")])
def test_sizes_that_cannot_be(script: Script, line: tuple[str, ...], text: str) -> None:
    vm = script(Guest().answers)
    with pytest.raises(CtlError, match=text):
        run(vm, *line)
    assert not vm.asked("balloon")


def test_a_share_of_nobody_knows_what(script: Script) -> None:
    vm = script({**Guest().answers, "query-memory-size-summary": Refusal("no such command")})
    with pytest.raises(CtlError, match="web does not tell how much memory it has; give a size"):
        run(vm, "50%")
    told = run(vm, "1G")
    assert told["total"] is None
    assert balloon.describe("web", told) == "web: the guest has 1.0 GiB"


@pytest.mark.parametrize("line", [(), ("1G",), ("--stats",)])
def test_no_balloon(script: Script, line: tuple[str, ...]) -> None:
    vm = script(dict.fromkeys(("balloon", "query-balloon", "query-balloon-stats"), INACTIVE))
    with pytest.raises(CtlError, match="web has no balloon, or its guest's driver is not up; "
                                       "start the VM with -device virtio-balloon-device"):
        run(vm, *line)


@pytest.mark.parametrize("answer", [{}, [], 5, {"actual": "1"}, {"actual": -1}, {"actual": True}])
def test_an_answer_that_says_nothing(script: Script, answer: object) -> None:
    with pytest.raises(CtlError, match="query-balloon says nothing usable"):
        run(script({"query-balloon": answer}))


def test_a_vm_that_ends_meanwhile(script: Script) -> None:
    vm = script({**Guest(step=1).answers, "query-balloon": Raw(b"", close=True)})
    with pytest.raises(GoneError):
        run(vm, "1G", "--wait")


# ---- statistics ----------------------------------------------------------------------------


def test_statistics(script: Script, capsys: pytest.CaptureFixture[str]) -> None:
    told = run(script(Guest().answers), "--stats")
    assert told["age-ms"] == 10 and told["target"] == 4 * GIB
    json.dumps(told)
    balloon.draw_statistics(told)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines == [["THE", "GUEST", "TELLS"], ["free-memory", "5.0", "MiB"],
                     ["major-faults", "1.2k"], ["swap-in", "4.0", "KiB"],
                     ["disk-caches", "8.0", "EiB"]]


@pytest.mark.parametrize("answer", [
    None, [], {"stats": []}, {"stats": {"a": "b", "c\x1b": -1, "d": None, "e": True}},
    {"age-ms": "x", "target": [], "stats": {}}])
def test_statistics_that_lie(script: Script, answer: object,
                             capsys: pytest.CaptureFixture[str]) -> None:
    told = run(script({**Guest().answers, "query-balloon-stats": answer}), "--stats")
    assert told["stats"] == {} and told["target"] is None
    balloon.draw_statistics(told)
    assert "\x1b" not in capsys.readouterr().out


def test_old_and_many(script: Script, capsys: pytest.CaptureFixture[str]) -> None:
    stats = {f"{n}\x1b{'x' * 100}": n for n in range(1000)}
    told = run(script({**Guest().answers, "query-balloon-stats": {
        "age-ms": 61_000, "stats": stats}}), "--stats")
    assert len(told["stats"]) == 100
    balloon.draw_statistics(told)
    assert capsys.readouterr().out.startswith("as the guest told 61 s ago\n")


def test_the_target_that_the_vm_took_is_told(script: Script) -> None:
    """With both: what was asked for, not what the VM says."""
    told = run(script(Guest(step=1).answers), "1G", "--stats")
    assert told["target"] == GIB
