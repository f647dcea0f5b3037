"""`set_link` and `netdev_replace` with workers that answer, fail, die or say nothing."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from shared.errors import SharedError
from vmm.config.model import NetdevConfig
from vmm.devices.virtio_net import VirtioNet
from vmm.errors import ConfigError, DeviceError, StateError, WorkerSpawnError
from vmm.event_loop import EventLoop
from vmm.net import change
from vmm.net.node import NetNode
from vmm.net.worker import NetWorkers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Done = Callable[[Exception | None], None]


class FakeOrders:
    """Keeps the orders; `answer` gives the next one its answer."""

    def __init__(self) -> None:
        self.sent: list[bool] = []
        self.waiting: list[Callable[[str], None]] = []
        self.fail = ""

    def send(self, kind: str, done: Callable[[str], None], *, up: bool) -> int:
        assert kind == "link"
        if self.fail:
            raise SharedError(self.fail)
        self.sent.append(up)
        self.waiting.append(done)
        return len(self.sent)

    def answer(self, problem: str = "") -> None:
        self.waiting.pop(0)(problem)


def fake_worker() -> Any:
    return SimpleNamespace(orders=FakeOrders(), state="running", is_doomed=False)


class FakeNursery:
    def __init__(self) -> None:
        self.spawned: list[tuple[dict[str, int], dict[str, object]]] = []

    def spawn(self, kind: str, device: str, fds: dict[str, int],
              options: dict[str, object]) -> Any:
        assert (kind, device) == ("net", "nic")
        self.spawned.append((dict(fds), options))
        return fake_worker()


class Opened(NetNode):
    """Only tells what it would close."""

    def __init__(self, config: NetdevConfig, taps: list[int], closed: list[list[int]]) -> None:
        super().__init__(config, taps)
        self._closed = closed

    def close(self) -> None:
        self._closed.append(self.taps)


class World:
    """A VM with one NIC and its worker."""

    def __init__(self) -> None:
        self.loop = EventLoop()
        self.nursery = FakeNursery()
        config = NetdevConfig("n", "tap")
        config.limits = {"rx-packets": 7}
        self.node = NetNode(config, [40])
        self.node.device_id = "nic"
        self.nic = VirtioNet("nic", -1, None, self.loop, foreign=False)  # type: ignore[arg-type]
        self.nic.show_nic()
        self.changes: list[bool] = []
        self.nic.on_config_change = lambda: self.changes.append(self.nic.nic_state.link_up)
        kind = NetWorkers(self.nursery, self.node, "nic", bytes(6), 256,  # type: ignore[arg-type]
                          self.nic.nic_state)
        self.device: Any = SimpleNamespace(id="nic", device=self.nic, kind=kind,
                                           worker=kind.first())
        self.nets = {"n": self.node}
        self.devices = {"nic": self.device}
        self.hotplug = SimpleNamespace(take_turn=self.take_turn,
                                       when_free=lambda node, then: then())
        self.supervisor = SimpleNamespace(restart=self.restart)
        self.restarts: list[Done] = []
        self.refusal: Exception | None = None
        self.opened: NetNode | Exception = DeviceError("nothing is opened")
        self.closed: list[list[int]] = []
        self.answers: list[Exception | None] = []

    def take_turn(self, action: Callable[[Done], None], done: Done) -> None:
        try:
            action(done)
        except DeviceError as error:
            done(error)

    def off_loop(self, work: Callable[[], None], finish: Done) -> None:
        try:
            work()
        except ConfigError as error:
            finish(error)
        else:
            finish(None)

    def family(self, name: str) -> Any:
        def opens(config: NetdevConfig, others: dict[str, NetNode]) -> NetNode:
            assert others == self.nets
            if isinstance(self.opened, Exception):
                raise self.opened
            return self.opened

        return SimpleNamespace(open=opens)

    def restart(self, name: str, done: Done) -> None:
        if self.refusal is not None:
            raise self.refusal
        self.restarts.append(done)

    def set_link(self, up: bool) -> None:
        change.set_link(self, self.device, up, self.answers.append)  # type: ignore[arg-type]

    def replace(self, taps: list[int], fds: list[int] | None = None) -> NetdevConfig:
        config = NetdevConfig("other", "tap")
        config.fds = fds or []
        config.limits = {"tx-bytes": 9}
        self.opened = Opened(config, taps, self.closed)
        change.replace_tap(self, self.device, config, self.answers.append)  # type: ignore[arg-type]
        return config



@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    world.nic.close()
    world.loop.close()


# ---- the link ------------------------------------------------------------------------------------


def test_it_is_answered_when_the_worker_has_obeyed(world: World) -> None:
    world.set_link(False)
    orders = world.device.worker.orders
    assert orders.sent == [False] and world.changes == [False] and world.answers == []
    orders.answer()
    assert world.answers == [None]


def test_all_workers_that_live_are_told(world: World) -> None:
    """One of them is about to take over: it has begun with the link as it was."""
    following = world.device.kind.spawn(None)
    ending = world.device.kind.spawn(None)
    ending.is_doomed = True
    gone = world.device.kind.spawn(None)
    gone.state = "dead"
    world.set_link(False)
    assert world.device.worker.orders.sent == following.orders.sent == [False]
    assert not ending.orders.sent and not gone.orders.sent
    following.orders.answer()
    assert world.answers == []
    world.device.worker.orders.answer()
    assert world.answers == [None]


def test_who_dies_hands_it_on(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    world.set_link(False)
    world.device.worker.orders.answer("the worker ended")
    assert world.answers == [None] and "was not told" in capfd.readouterr().err
    world.device.kind.spawn(None)
    assert world.nursery.spawned[-1][1]["link"] is False
    world.device.worker.orders.fail = "the worker is gone"
    world.set_link(True)
    for worker in world.node.workers[1:]:
        worker.orders.answer()
    assert world.answers == [None, None]


def test_nobody_to_tell(world: World) -> None:
    world.device.worker.state = "dead"
    world.set_link(False)
    assert world.answers == [None] and world.changes == [False]


def test_a_worker_that_does_not_answer(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(change, "LINK_LIMIT", 0.01)
    world.set_link(False)
    while not world.answers:
        world.loop.run_once(1.0)
    assert isinstance(world.answers[0], StateError)
    world.device.worker.orders.answer()  # too late
    assert len(world.answers) == 1


def test_a_foreign_back_end_can_not_be_told(world: World) -> None:
    world.device.kind = None
    world.set_link(False)
    assert world.answers == [None] and world.changes == [False]


# ---- another tap ---------------------------------------------------------------------------------


def test_the_next_worker_gets_the_new_tap_and_its_limits(world: World) -> None:
    config = world.replace([50])
    assert world.answers == []
    world.device.kind.spawn(None)
    fds, options = world.nursery.spawned[-1]
    assert fds["tap0"] == 50 and options["tx-bytes"] == 9 and "rx-packets" not in options
    world.restarts.pop()(None)
    assert world.answers == [None] and world.closed == [[40]]
    assert world.node.taps == [50] and world.node.config is config and config.id == "n"


@pytest.mark.parametrize("fds", [[], [50]])
@pytest.mark.parametrize("refused", [False, True])
def test_what_fails_leaves_everything_as_it_was(world: World, fds: list[int],
                                                refused: bool) -> None:
    before = world.node.config
    world.refusal = StateError("it is being replaced") if refused else None
    world.replace([50], fds)
    if not refused:
        world.restarts.pop()(DeviceError("the new worker did not start"))
    assert isinstance(world.answers[0], StateError if refused else DeviceError)
    assert world.node.taps == [40] and world.node.config is before
    # Handed over, it is the caller's again.
    assert world.closed == ([] if fds else [[50]])


def test_a_tap_that_can_not_be_opened(world: World) -> None:
    config = NetdevConfig("other", "tap")
    world.opened = ConfigError("busy")
    change.replace_tap(world, world.device, config, world.answers.append)  # type: ignore[arg-type]
    assert isinstance(world.answers[0], ConfigError) and world.node.taps == [40]
    assert not world.restarts


def test_another_number_of_queues(world: World) -> None:
    world.replace([50, 51])
    assert "use queues=1" in str(world.answers[0])
    assert world.closed == [[50, 51]] and not world.restarts


@pytest.mark.parametrize("what", ["no tap", "no worker", "gone"])
def test_nics_that_can_have_no_other_tap(world: World, what: str) -> None:
    if what == "no tap":
        world.nets = {}
    elif what == "no worker":
        world.device.worker = None
    else:
        world.devices = {}  # it went while this waited for its turn
    world.replace([50])
    assert "tap replacement" in str(world.answers[0]) and not world.closed


# ---- names ---------------------------------------------------------------------------------------


def test_nics_are_found_by_their_name_or_their_back_ends(world: World) -> None:
    vm: Any = world
    assert change.find_nic(vm, "nic") is world.device
    assert change.find_nic(vm, "n") is world.device
    assert change.find_nic(vm, "x") is None
    world.node.device_id = None
    assert change.find_nic(vm, "n") is None
    world.device.device = object()
    assert change.find_nic(vm, "nic") is None


# ---- what a worker is given ----------------------------------------------------------------------


def test_what_the_first_worker_is_given(world: World) -> None:
    fds, options = world.nursery.spawned[0]
    assert fds == {"state": world.nic.nic_state.fileno(), "tap0": 40}
    assert options == {"rx-packets": 7, "control": True, "queue-size": 256, "num-queues": 3,
                       "mac": bytes(6), "link": True}


def test_no_memory_for_its_state(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> int:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(type(world.nic.nic_state), "fileno", lambda self: fails())
    with pytest.raises(WorkerSpawnError, match="No memory for the NIC 'nic'"):
        world.device.kind.spawn(None)


def test_the_dead_are_forgotten(world: World) -> None:
    for _ in range(5):
        for worker in world.node.workers:
            worker.state = "dead"
        world.device.kind.spawn(None)
    assert len(world.node.workers) == 1
