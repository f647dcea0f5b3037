"""The null worker as the core sees it: one for all, again when it dies, not for ever."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from vmm.errors import BackendError, WorkerSpawnError
from vmm.worker import null as null_module
from vmm.worker.null import NullBackend

if TYPE_CHECKING:
    from collections.abc import Callable

    Done = Callable[[Exception | None], None]


class FakeOrders:
    def __init__(self) -> None:
        self.sent: list[tuple[str, dict[str, Any]]] = []
        self.fds: list[list[int]] = []

    def send(self, name: str, done: object, fds: list[int], **values: Any) -> None:
        self.sent.append((name, values))
        self.fds.append(fds)


class FakeDevice:
    """A slot's device."""

    def __init__(self, used: bool = True) -> None:
        self.used = used
        self.plugged = False  # somebody else serves it
        self.calls: list[str] = []

    def is_in_use(self) -> bool:
        return self.used

    def null_order(self) -> tuple[dict[str, object], list[int]]:
        return {"queues": 1}, []

    def replace_backend(self, fd: int, deadline: float, drain: bool) -> None:
        os.close(fd)
        assert not drain
        self.calls.append("replaced")

    def detach(self, deadline: float, forsaken: bool = False) -> None:
        if self.used and not forsaken:
            raise BackendError("it is in use")
        self.calls.append("forsaken" if forsaken else "detached")

    def has_lost_backend(self) -> bool:
        return not self.plugged

    def on_failure(self, text: str) -> None:
        self.calls.append(text)


class World:
    """A VM without anything but slots."""

    def __init__(self) -> None:
        self.workers: list[SimpleNamespace] = []
        self.run_state = "running"
        self.turns: list[tuple[Callable[[Done], None], Done]] = []
        self.hotplug = SimpleNamespace(take_turn=lambda action, done:
                                       self.turns.append((action, done)))
        self.null = NullBackend(self)  # type: ignore[arg-type]

    def nursery(self) -> SimpleNamespace:
        return SimpleNamespace(spawn=self.spawn)

    def spawn(self, kind: str, name: str, fds: object, options: object) -> SimpleNamespace:
        assert (kind, name) == ("null", null_module.NAME)
        worker = SimpleNamespace(state="starting", restarts=0, orders=FakeOrders(), on_end=None)
        self.workers.append(worker)
        return worker

    def off_loop(self, work: Callable[[], None], finish: Done) -> None:
        try:
            work()
        except BackendError as error:
            finish(error)
        else:
            finish(None)

    def attach(self, device: FakeDevice) -> None:
        errors: list[Exception | None] = []
        self.null.attach(device, errors.append)  # type: ignore[arg-type]
        assert errors == [None]

    def die(self) -> None:
        self.workers[-1].state = "dead"
        self.workers[-1].on_end("killed")

    def take_turns(self) -> None:
        while self.turns:
            action, done = self.turns.pop(0)
            action(done)


@pytest.fixture
def world() -> World:
    return World()


def test_one_worker_for_all(world: World) -> None:
    devices = [FakeDevice() for _ in range(6)]
    for device in devices:
        world.attach(device)
    assert len(world.workers) == 1
    assert world.workers[0].orders.sent == [("serve", {"queues": 1})] * 6
    assert all(len(fds) == 1 for fds in world.workers[0].orders.fds)
    assert all(device.calls == ["replaced"] for device in devices)


def test_it_comes_back_in_its_turn(world: World) -> None:
    used, unused, plugged = FakeDevice(), FakeDevice(), FakeDevice()
    for device in (used, unused, plugged):
        world.attach(device)
    unused.used = False
    world.die()
    assert len(world.workers) == 1  # whatever happens to a slot now has to end first
    world.null.release(plugged)  # type: ignore[arg-type]  # a disk came meanwhile
    world.take_turns()
    assert used.calls == ["replaced", "replaced"]
    assert unused.calls == ["replaced", "detached"]
    assert plugged.calls == ["replaced"]
    assert len(world.workers) == 2 and world.workers[1].restarts == 1
    world.die()
    world.take_turns()
    assert unused.calls == ["replaced", "detached"]  # it is not its affair any more


def test_a_driver_that_starts_just_then(world: World) -> None:
    device = FakeDevice()
    world.attach(device)
    answers = iter((False, True))
    device.is_in_use = lambda: next(answers)  # type: ignore[method-assign]
    world.die()
    world.take_turns()
    assert device.calls == ["replaced", "replaced"]


def test_it_is_given_up(world: World) -> None:
    device = FakeDevice()
    world.attach(device)
    for _ in range(int(null_module.BUDGET) + 2):
        if device.calls[-1] != "replaced":
            break
        world.die()
        world.take_turns()
    assert "again and again" in device.calls[-2] and device.calls[-1] == "forsaken"
    assert not world.turns


def test_what_has_another_back_end_is_not_forsaken(world: World) -> None:
    plugged, again = FakeDevice(), FakeDevice()
    for device in (plugged, again):
        world.attach(device)
    world.null._budget = 0.0
    world.die()
    plugged.plugged = True  # a NIC came before this had its turn
    world.attach(again)     # a driver started it again
    world.take_turns()
    assert "forsaken" not in plugged.calls and "forsaken" not in again.calls


def test_the_end_of_the_vm_is_no_death(world: World) -> None:
    world.attach(FakeDevice())
    world.run_state = "shutdown"
    world.die()
    assert not world.turns


def test_no_worker_to_be_had(world: World) -> None:
    def refuse(*_: object) -> None:
        raise WorkerSpawnError("no processes left")

    world.spawn = refuse  # type: ignore[assignment,method-assign]
    errors: list[Exception | None] = []
    world.null.attach(FakeDevice(), errors.append)  # type: ignore[arg-type]
    assert isinstance(errors[0], WorkerSpawnError)


def test_a_device_sends_its_descriptors_along(world: World) -> None:
    device = FakeDevice()
    device.null_order = lambda: ({"device": "net"}, [71, 72])  # type: ignore[method-assign]
    world.attach(device)
    orders = world.workers[0].orders
    assert orders.sent == [("serve", {"device": "net"})]
    assert orders.fds[0][1:] == [71, 72]


def test_a_device_that_has_no_descriptors_to_give(world: World) -> None:
    def fails() -> tuple[dict[str, object], list[int]]:
        raise OSError(24, "Too many open files")

    device = FakeDevice()
    device.null_order = fails  # type: ignore[method-assign]
    errors: list[Exception | None] = []
    before = len(os.listdir("/proc/self/fd"))
    world.null.attach(device, errors.append)  # type: ignore[arg-type]
    assert isinstance(errors[0], WorkerSpawnError) and "Too many open files" in str(errors[0])
    assert len(os.listdir("/proc/self/fd")) == before
