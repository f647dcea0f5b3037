"""The VM's life when a transition fails: the state it says it is in is the one it is in."""

from __future__ import annotations

import _thread
import threading
import time
from collections.abc import Callable, Iterator

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
        self.resetting = threading.Event()
        self.may_reset = threading.Event()
        self.may_reset.set()

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
        self.resetting.set()
        self.may_reset.wait(10)
        self._note("reset")

    def end(self, deadline: float) -> None:
        self._note("end")

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
    def refuse(*arguments: object) -> int:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(_thread, "start_new_thread", refuse)
    error = rig.change("pause")
    assert error is not None and "limit on threads" in str(error)


def test_the_end_waits_for_a_reset(rig: Rig) -> None:
    """What the reset writes to is closed when the loop has ended."""
    rig.machine.may_reset.clear()
    rig.vm.reset(lambda error: None)
    assert rig.machine.resetting.wait(5)
    rig.vm.quit()
    deadline = time.monotonic() + 5
    while "end" not in rig.machine.calls and time.monotonic() < deadline:
        time.sleep(0.001)
    threading.Timer(0.05, rig.machine.may_reset.set).start()
    rig.loop.run()
    assert rig.machine.calls == ["pause_vcpus", "end", "reset"]


@pytest.mark.parametrize("name", ["pause", "reset"])
def test_nothing_begins_after_the_end(rig: Rig, monkeypatch: pytest.MonkeyPatch,
                                      name: str) -> None:
    """The thread of a change may get its first turn late."""
    threads: list[tuple[Callable[[], None], tuple[()]]] = []
    with monkeypatch.context() as patch:
        patch.setattr(_thread, "start_new_thread", lambda *args: threads.append(args))
        ended: list[Exception | None] = []
        getattr(rig.vm, name)(ended.append)
    rig.vm.quit()
    rig.loop.run()
    threads[0][0](*threads[0][1])
    assert rig.machine.calls == ["end"]
    rig.loop.run_once(1)
    assert len(ended) == 1 and ended[0] is not None
