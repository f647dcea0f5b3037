"""The VM's life when a transition fails: the state it says it is in is the one it is in."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from vmm.cleanup import Cleanup
from vmm.config.model import VmConfig
from vmm.errors import DeviceError, VmmError
from vmm.event_loop import EventLoop
from vmm.qmp.events import Events
from vmm.vm import Vm


class Machine:
    """Notes what it is asked for; `fails` names what goes wrong."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.fails = ""
        self.vm = self

    def _note(self, name: str) -> None:
        self.calls.append(name)
        if name == self.fails:
            raise DeviceError(f"{name} failed")

    def pause_vcpus(self, deadline: float) -> None:
        self._note("pause_vcpus")

    def resume_vcpus(self) -> None:
        self._note("resume_vcpus")

    def pause_devices(self, deadline: float) -> None:
        self._note("pause_devices")

    def resume_devices(self) -> None:
        self._note("resume_devices")

    def reset(self) -> None:
        self._note("reset")

    def get_clock(self) -> bytes:
        return b""

    def set_clock(self, clock: bytes) -> None:
        pass


class Rig:
    def __init__(self) -> None:
        self.loop = EventLoop()
        self.events: list[str] = []
        events = Events()
        events.subscribe(lambda name, *rest: self.events.append(name))
        self.vm = Vm(VmConfig(), self.loop, events, Cleanup())
        self.machine = Machine()
        self.vm.machine = self.machine  # type: ignore[assignment]
        self.vm.run_state = "running"

    def change(self, name: str) -> Exception | None:
        """Run a transition to its end."""
        ended: list[Exception | None] = []
        getattr(self.vm, name)(ended.append)
        deadline = time.monotonic() + 5
        while not ended and time.monotonic() < deadline:
            self.loop.run_once(0.05)
        return ended[0]


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.loop.close()


@pytest.mark.parametrize("state", ["running", "paused"])
def test_a_reset_that_fails_leaves_a_paused_vm(rig: Rig, state: str) -> None:
    rig.vm.run_state = state
    rig.machine.fails = "reset"
    assert isinstance(rig.change("reset"), VmmError)
    assert rig.vm.run_state == "paused"
    assert rig.events == (["STOP"] if state == "running" else [])
    rig.machine.fails = ""
    assert rig.change("reset") is None
    assert rig.vm.run_state == "paused" and rig.events[-1] == "RESET"


def test_cont_that_fails_leaves_nothing_running(rig: Rig) -> None:
    assert rig.change("pause") is None
    rig.machine.fails = "resume_devices"
    rig.machine.calls.clear()
    assert isinstance(rig.change("resume"), DeviceError)
    assert rig.vm.run_state == "paused"
    assert rig.machine.calls == ["resume_devices", "pause_devices"]
    rig.machine.fails = ""
    assert rig.change("resume") is None
    assert rig.vm.run_state == "running"


def test_stop_that_fails_still_stops(rig: Rig) -> None:
    rig.machine.fails = "pause_devices"
    assert isinstance(rig.change("pause"), DeviceError)
    assert rig.vm.run_state == "paused" and rig.events == ["STOP"]


def test_no_thread_to_be_had(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    import _thread

    def refuse(*arguments: object) -> int:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(_thread, "start_new_thread", refuse)
    error = rig.change("pause")
    assert error is not None and "limit on threads" in str(error)
