"""Plugging and unplugging: slots, names, and what fails half-way."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import pytest

from shared import tap
from shared.tap import TapError
from tests.support.scripted_vm import Raw, Refusal, ScriptedVm, after_other_events
from vmm.ctl import command_line, devices, processes
from vmm.ctl.errors import CtlError, GoneError, NoAnswerError
from vmm.ctl.vms import Vm

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Script = Callable[..., ScriptedVm]

NAMED = "attach-disk", "web", "/data.img"


def occupied(*slots: int, total: int = 6) -> Callable[[dict[str, Any]], object]:
    """A VM's `device_add`."""
    def answer(arguments: dict[str, Any]) -> object:
        slot = int(arguments["addr"], 16)
        if slot >= total:
            return Refusal(f"A maximum of block {total} replaceable devices are supported: there "
                           f"is no slot {slot}; use 0 to {total - 1}")
        if slot in slots:
            return Refusal(f"The slot {slot} is occupied already by 'x'.; choose another one")
        return {}
    return answer


def run(vm: ScriptedVm, *line: str) -> dict[str, Any]:
    args = command_line.parse(line)
    action = {"attach-disk": devices.attach_disk, "attach-nic": devices.attach_nic,
              "detach": devices.detach}[args.command]
    with Vm("web", vm.path).connect() as client:
        return action(client, args)


# ---- disks ---------------------------------------------------------------------------------


def test_a_disk_with_everything(script: Script) -> None:
    vm = script({"device_add": occupied(0, 1)})
    told = run(vm, *NAMED, "--read-only", "--cached", "--discard", "--serial", "S1", "--limit",
               "bps-total=10M", "--limit", "iops-read-max=500", "--id", "mine")
    assert told == {"id": "mine", "slot": 2}
    assert vm.asked("blockdev-add") == [{
        "node-name": "mine", "read-only": True, "discard": "unmap", "cache": {"direct": False},
        "file": {"driver": "file", "filename": "/data.img"},
        "throttling.bps-total": 10 << 20, "throttling.iops-read-max": 500}]
    assert vm.asked("device_add")[-1] == {"id": "mine", "driver": "virtio-blk-mmio",
                                          "serial": "S1", "addr": "0x2"}
    assert not vm.asked("blockdev-del")


def test_a_relative_image_is_ours(script: Script, tmp_path: Path,
                                  monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    vm = script({"device_add": occupied()})
    run(vm, "attach-disk", "web", "x.img")
    assert vm.asked("blockdev-add")[0]["file"]["filename"] == f"{tmp_path}/x.img"


@pytest.mark.parametrize(("answers", "line", "text"), [
    ({"device_add": occupied(3)}, ("--addr", "3"), "The slot 3 is occupied"),
    ({"device_add": occupied()}, ("--addr", "9"), "there is no slot 9"),
    ({"device_add": occupied(*range(6))}, (), "web: all 6 slots are occupied; detach a device"),
    ({"device_add": occupied(total=0)}, (), "there is no slot 0"),
    ({"device_add": occupied(*range(99), total=99)}, (), "web: no slot is free"),
    ({"device_add": Refusal("no worker")}, (), "web: no worker")])
def test_what_fails_half_way_is_taken_back(script: Script, answers: dict[str, Any],
                                           line: tuple[str, ...], text: str) -> None:
    vm = script(answers)
    with pytest.raises(CtlError, match=text):
        run(vm, *NAMED, *line)
    assert vm.asked("blockdev-del") == [{"node-name": "disk0"}]


def test_a_refusal_to_take_back_is_no_news(script: Script) -> None:
    vm = script({"device_add": Refusal("no worker"), "blockdev-del": Refusal("in use")})
    with pytest.raises(CtlError, match="no worker"):
        run(vm, *NAMED)


def test_a_back_end_that_was_there_is_left_alone(script: Script) -> None:
    vm = script({"blockdev-add": Refusal("mine is already registered.")})
    with pytest.raises(CtlError, match="already registered"):
        run(vm, *NAMED, "--id", "mine")
    assert not vm.asked("blockdev-del") and not vm.asked("device_add")


def test_a_vm_that_hangs_while_it_plugs(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its answer comes at last: it isn't taken for the one to what takes back."""
    monkeypatch.setattr(devices, "_PLUG_LIMIT", 0.1)
    monkeypatch.setattr(devices, "_UNDO_LIMIT", 0.1)
    vm = script({"device_add": Raw(b""), "blockdev-del": Raw(b"")})
    with pytest.raises(NoAnswerError):
        run(vm, *NAMED)
    assert vm.asked("blockdev-del") == [{"node-name": "disk0"}]


def test_a_vm_that_ends_while_it_plugs(script: Script) -> None:
    with pytest.raises(GoneError):
        run(script({"device_add": Raw(b"", close=True)}), *NAMED)


def test_interrupted_while_it_plugs(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    vm = script()

    def interrupt(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(devices, "_plug", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(vm, *NAMED)
    assert vm.asked("blockdev-del") == [{"node-name": "disk0"}]


# ---- names ---------------------------------------------------------------------------------


def test_the_first_name_that_is_free(script: Script) -> None:
    vm = script({
        "query-block": [{"qdev": "disk0", "inserted": {"node-name": "disk1"}}, {"device": "disk2"},
                        {"qdev": ["disk4"]}, {"qdev": {}, "inserted": 5}, 7],
        "query-workers": [{"device": "disk3"}, {"device": 4}],
        "query-nics": [{"device": "disk5", "netdev": "disk6"}],
        "device_add": occupied()})
    assert run(vm, *NAMED)["id"] == "disk4"


def test_somebody_was_faster(script: Script) -> None:
    def add(arguments: dict[str, Any]) -> object:
        taken = arguments["node-name"] in ("disk0", "disk1")
        return Refusal(f"{arguments['node-name']} is already registered.") if taken else {}

    vm = script({"blockdev-add": add, "device_add": occupied()})
    assert run(vm, *NAMED)["id"] == "disk2"
    assert not vm.asked("blockdev-del")


def test_all_names_are_taken(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "MAX_IDS", 3)
    vm = script({"blockdev-add": Refusal("x is already registered.")})
    with pytest.raises(CtlError, match="web: no name is free; choose one with --id"):
        run(vm, *NAMED)


def test_names_that_qmp_cannot_say(script: Script) -> None:
    vm = script()
    with pytest.raises(CtlError, match=r"The name of /a\?b is not UTF-8"):
        run(vm, "attach-disk", "web", "/a\udcffb")
    with pytest.raises(CtlError, match="The name of the device is not UTF-8"):
        run(vm, *NAMED, "--id", "a\udcff")
    assert not vm.asked("blockdev-add")


# ---- NICs ----------------------------------------------------------------------------------


def nics(*slots: tuple[int, str]) -> list[dict[str, Any]]:
    """(queue pairs, device or "") of each slot."""
    return [{"slot": i, "queues": queues, "mac": "m", "link-up": bool(device),
             **({"device": device} if device else {})} for i, (queues, device) in enumerate(slots)]


@pytest.fixture
def _taps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tap, "exists", lambda name: name.startswith("tap"))


@pytest.mark.usefixtures("_taps")
@pytest.mark.parametrize(("slots", "line", "slot", "queues"), [
    (nics((1, ""), (1, "")), (), 0, 1),
    (nics((1, "a"), (1, "")), (), 1, 1),
    (nics((4, ""), (1, "")), (), 0, 4),             # a slot keeps the shape that it had at boot
    (nics((4, ""), (1, "")), ("--queues", "1"), 1, 1),
    (nics((4, ""), (1, "")), ("--addr", "1"), 1, 1),
    (nics((4, ""), (1, "")), ("--addr", "0"), 0, 4),
    (nics((4, ""), (1, "")), ("--addr", "0", "--queues", "2"), 0, 2),  # the VM will say no
    (Refusal("no such command"), (), 0, 1),
    ([{"slot": "0"}, {"slot": -1}, {"queues": 4}, 5, {"slot": 1, "queues": "x"}], (), 1, 1)])
def test_slots_of_nics(script: Script, slots: object, line: tuple[str, ...], slot: int,
                       queues: int) -> None:
    vm = script({"query-nics": slots, "device_add": occupied()})
    told = run(vm, "attach-nic", "web", "tap0", *line)
    assert told == {"id": "net0", "slot": slot, "ifname": "tap0"}
    assert vm.asked("netdev_add") == [{"id": "net0", "ifname": "tap0", "queues": queues}]
    assert vm.asked("device_add") == [{"id": "net0", "driver": "virtio-net-mmio",
                                       "addr": hex(slot)}]


@pytest.mark.usefixtures("_taps")
def test_a_nic_with_everything(script: Script) -> None:
    vm = script({"device_add": occupied()})
    run(vm, "attach-nic", "web", "tap0", "--mac", "52:54:00:00:00:07", "--id", "lan", "--limit",
        "rx-bytes=100M", "--limit", "tx-packets=5000", "--queues", "2", "--addr", "1")
    assert vm.asked("netdev_add") == [{"id": "lan", "ifname": "tap0", "queues": 2,
                                       "rx-bytes": 100 << 20, "tx-packets": 5000}]
    assert vm.asked("device_add") == [{"id": "lan", "driver": "virtio-net-mmio",
                                       "mac": "52:54:00:00:00:07", "addr": "0x1"}]


@pytest.mark.usefixtures("_taps")
@pytest.mark.parametrize(("slots", "line", "text"), [
    (nics((1, "a"), (1, "b")), (), "web: all 2 slots for network cards are occupied; detach"),
    (nics((1, "a"), (1, "")), ("--queues", "4"),
     "web: no free slot has 4 queue pairs: slot 1 has 1; leave --queues away")])
def test_no_slot_for_a_nic(script: Script, slots: object, line: tuple[str, ...],
                           text: str) -> None:
    vm = script({"query-nics": slots})
    with pytest.raises(CtlError, match=text):
        run(vm, "attach-nic", "web", "tap0", *line)
    assert not vm.asked("netdev_add")


@pytest.mark.usefixtures("_taps")
def test_a_nic_that_fails_half_way(script: Script) -> None:
    vm = script({"device_add": Refusal("no worker")})
    with pytest.raises(CtlError, match="no worker"):
        run(vm, "attach-nic", "web", "tap0")
    assert vm.asked("netdev_del") == [{"id": "net0"}]


@pytest.mark.usefixtures("_taps")
def test_a_slip_of_the_pen(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    """A VM with the right to do so would make the tap."""
    vm = script({"device_add": occupied()})
    with pytest.raises(CtlError, match="There is no tap 'tpa0'; --make makes it; or: ip tuntap"):
        run(vm, "attach-nic", "web", "tpa0")
    with pytest.raises(TapError, match="can't be the name of an interface"):
        monkeypatch.setattr(tap, "exists", tap.check_name)
        run(vm, "attach-nic", "web", "a b")
    # Its interfaces may be others than ours.
    monkeypatch.setattr(tap, "exists", lambda name: False)
    for other in (False, None):
        monkeypatch.setattr(processes, "same_network", lambda pid, other=other: other)
        assert run(vm, "attach-nic", "web", "tpa0")["ifname"] == "tpa0"


class FakeTaps:
    """Taps that are pipes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[tuple[str, int]] = []
        self.fds: list[int] = []
        self.up: list[str] = []
        self.bridges: list[tuple[str, str]] = []
        monkeypatch.setattr(tap, "make_tap", self._make)
        monkeypatch.setattr(tap, "bring_up", self.up.append)
        monkeypatch.setattr(tap, "join_bridge", lambda *names: self.bridges.append(names))

    def _make(self, name: str, queues: int) -> tuple[str, list[int]]:
        self.made.append((name, queues))
        self.fds = [os.open(os.devnull, os.O_RDONLY) for _ in range(queues)]
        return name or "svtap7", list(self.fds)

    def all_closed(self) -> bool:
        def is_open(fd: int) -> bool:
            try:
                os.fstat(fd)
            except OSError:
                return False
            return True
        return not any(map(is_open, self.fds))


@pytest.fixture
def taps(monkeypatch: pytest.MonkeyPatch) -> FakeTaps:
    return FakeTaps(monkeypatch)


@pytest.mark.parametrize(("line", "made"), [
    ((), ("", 2)), (("lan0", "--make"), ("lan0", 2)), (("--bridge", "br0"), ("", 2)),
    (("lan0", "--make", "--bridge", "br0"), ("lan0", 2))])
def test_a_tap_is_made_and_handed_over(script: Script, taps: FakeTaps, line: tuple[str, ...],
                                       made: tuple[str, int]) -> None:
    vm = script({"query-nics": nics((2, "")), "device_add": occupied()})
    told = run(vm, "attach-nic", "web", *line)
    assert told == {"id": "net0", "slot": 0, "ifname": made[0] or "svtap7"}
    assert taps.made == [made] and taps.up == [told["ifname"]]
    assert taps.bridges == ([(told["ifname"], "br0")] if "--bridge" in line else [])
    names = [asked["fdname"] for asked in vm.asked("getfd")]
    assert len(names) == vm.descriptors == 2
    assert vm.asked("netdev_add") == [{"id": "net0", "fds": ":".join(names)}]
    assert taps.all_closed()


@pytest.mark.parametrize("refused", ["getfd", "netdev_add", "device_add"])
def test_a_tap_that_was_made_in_vain(script: Script, taps: FakeTaps, refused: str) -> None:
    """Neither descriptors nor a back end are left behind."""
    vm = script({"query-nics": nics((2, "")), refused: Refusal("no")})
    with pytest.raises(CtlError, match="web: no"):
        run(vm, "attach-nic", "web")
    assert taps.all_closed()
    taken_back = {"getfd": 0, "netdev_add": 2, "device_add": 0}
    assert len(vm.asked("closefd")) == taken_back[refused]
    assert len(vm.asked("netdev_del")) == (refused == "device_add")


def test_a_bridge_that_is_none(script: Script, taps: FakeTaps,
                               monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise TapError("no bridge")

    monkeypatch.setattr(tap, "join_bridge", refuse)
    vm = script()
    with pytest.raises(TapError):
        run(vm, "attach-nic", "web", "--bridge", "br0")
    assert taps.all_closed() and not vm.asked("netdev_add")


# ---- unplugging ----------------------------------------------------------------------------


def gone(device: str, events: int = 0) -> Callable[[object], Raw]:
    return after_other_events(events, "DEVICE_DELETED", {"device": device, "path": device})


@pytest.mark.parametrize("events", [0, 100])
def test_detach(script: Script, events: int) -> None:
    vm = script({"device_del": gone("disk0", events)})
    assert run(vm, "detach", "web", "disk0") == {"id": "disk0"}
    assert vm.asked("device_del") == [{"id": "disk0"}]


def test_the_event_comes_later(script: Script) -> None:
    """As on a machine whose guest is asked first."""
    def answer(_: object) -> Raw:
        event = {"event": "DEVICE_DELETED", "data": {"device": "disk0"}}
        return Raw(b'{"return": {}}\n' + json.dumps(event).encode() + b"\n")

    assert run(script({"device_del": answer}), "detach", "web", "disk0") == {"id": "disk0"}


@pytest.mark.parametrize("answer", [Raw(b""), {}, gone("disk1")])
def test_a_guest_that_does_not_let_go(script: Script, answer: object) -> None:
    vm = script({"device_del": answer})
    with pytest.raises(CtlError, match=r"web: 'disk0' has not gone within 0.1 s; it may"):
        run(vm, "detach", "web", "disk0", "--timeout", "0.1")


@pytest.mark.parametrize(("answer", "text"), [
    (Refusal("Device x not found; query-workers lists the devices"),
     r"web has no disk or network card 'a\?b'; stratoctl status web lists them"),
    (Refusal("Device x can't be unplugged"), "web: Device x can't be unplugged"),
    (Raw(b"", close=True), "web: the VM closed the connection; has it ended")])
def test_what_cannot_be_unplugged(script: Script, answer: object, text: str) -> None:
    with pytest.raises(CtlError, match=text):
        run(script({"device_del": answer}), "detach", "web", "a\x1bb")
