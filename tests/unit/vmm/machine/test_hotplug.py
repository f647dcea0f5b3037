"""Plugging, one thing at a time, whatever order the wishes come in."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest

from vmm.errors import BackendError, DeviceError, StateError, VmmError
from vmm.machine import hotplug as hotplug_module
from vmm.machine.hotplug import Hotplug

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.machine.machine import Device
    from vmm.machine.slots import Slot

    Done = Callable[[Exception | None], None]


class Work:
    """Actions that end when the test says so."""

    def __init__(self) -> None:
        self.vm = SimpleNamespace(run_state="running")
        self.hotplug = Hotplug(cast("object", self.vm), None, None)  # type: ignore[arg-type]
        self.started: list[str] = []
        self.ended: list[tuple[str, Exception | None]] = []
        self.waiting: dict[str, Done] = {}

    def want(self, name: str, then: Callable[[], None] = lambda: None) -> None:
        def action(done: Done) -> None:
            self.started.append(name)
            self.waiting[name] = done

        def ended(error: Exception | None) -> None:
            self.ended.append((name, error))
            then()

        self.hotplug.take_turn(action, ended)

    def finish(self, name: str) -> None:
        self.waiting.pop(name)(None)


@pytest.fixture
def work() -> Work:
    return Work()


def test_one_at_a_time_in_order(work: Work) -> None:
    for name in "abc":
        work.want(name)
    assert work.started == ["a"]
    work.finish("a")
    assert work.started == ["a", "b"]
    work.finish("b")
    work.finish("c")
    assert [name for name, _ in work.ended] == ["a", "b", "c"]
    work.want("d")
    assert work.started[-1] == "d"


def test_a_wish_that_an_answer_leads_to_is_served_once(work: Work) -> None:
    """A client's next command is taken from its buffer when the one before is answered."""
    work.want("add", lambda: work.want("plug"))
    work.finish("add")
    assert work.started == ["add", "plug"]
    work.finish("plug")
    assert [name for name, _ in work.ended] == ["add", "plug"]


def test_a_failure_makes_way_for_the_next(work: Work) -> None:
    def broken(done: Done) -> None:
        raise StateError("no", "never")

    work.want("first")
    work.hotplug.take_turn(broken, lambda error: work.ended.append(("broken", error)))
    work.want("last")
    work.finish("first")
    assert work.started == ["first", "last"]
    assert isinstance(dict(work.ended)["broken"], StateError)


def test_nothing_is_plugged_into_a_vm_that_ends(work: Work) -> None:
    work.vm.run_state = "shutdown"
    work.want("late")
    (_, error), = work.ended
    assert isinstance(error, StateError) and work.started == []


# ---- a disk that does not answer ---------------------------------------------------------------


class Stuck:
    """A device whose worker hangs, and whose I/O does not end after its death."""

    def __init__(self, ends: bool) -> None:
        self.ends = ends
        self.calls: list[str] = []
        self.worker = SimpleNamespace(kill=lambda: self.calls.append("kill"), stopping=True,
                                      reason="")
        self.kind = SimpleNamespace(open=self.open, discard=lambda fd: None)
        self.device = SimpleNamespace(
            kick_fds=lambda: [7, 8],
            lost=lambda text: self.calls.append("lost"), is_in_use=lambda: True,
            is_without_backend=lambda: True, rename=lambda name: None,
            show_empty=lambda: self.calls.append("empty"), on_config_change=lambda: None)
        family = SimpleNamespace(nodes=lambda machine: {})
        self.slot = SimpleNamespace(number=1, device=self.device, answered=self.device,
                                    vhost=self.device,
                                    replaceable=True, occupant=None, family=family,
                                    empty_name="#block.1")
        self.slot.occupant = SimpleNamespace(id="d", worker=self.worker, kind=self.kind,
                                             device=self.device, vhost=self.device)
        self.machine = SimpleNamespace(slots=[self.slot],
                                       devices={"d": self.slot.occupant})
        self.vm = SimpleNamespace(
            run_state="running", off_loop=self.off_loop, events=SimpleNamespace(
                emit=lambda name, data: self.calls.append(name)),
            nursery=lambda: SimpleNamespace(pages=SimpleNamespace(drop=lambda name: None)),
            supervisor=SimpleNamespace(watch=lambda device: self.calls.append("watch")))
        self.watched: dict[int, Callable[[int], None]] = {}
        self.vm.loop = SimpleNamespace(add=self.watch, remove=self.watched.pop)
        null = SimpleNamespace(attach=self.attach,
                               release=lambda device: self.calls.append("release"))
        self.hotplug = Hotplug(self.vm, self.machine, null)  # type: ignore[arg-type]

    def watch(self, fd: int, events: int, handler: Callable[[int], None]) -> None:
        assert fd not in self.watched
        self.watched[fd] = handler

    def open(self, drained: bool, limit: float) -> int:
        self.calls.append("wait")
        if not self.ends:
            raise StateError("I/O is still under way", "wait")
        return 0

    def attach(self, device: object, done: Done) -> None:
        self.calls.append("null")
        done(None)

    def off_loop(self, work: Callable[[], None], finish: Done) -> None:
        try:
            work()
        except VmmError as error:
            finish(error)
        else:
            finish(None)


def test_nobody_answers_before_the_io_has_ended() -> None:
    stuck = Stuck(ends=True)
    answers: list[Exception | None] = []
    stuck.hotplug._evict(cast("Slot", stuck.slot), cast("Device", stuck.slot.occupant),
                         answers.append)
    assert stuck.calls == ["kill", "lost", "wait", "null", "kill", "empty",
                           "DEVICE_DELETED"]
    assert answers == [None] and stuck.machine.devices == {}


def test_a_device_whose_io_does_not_end_stays() -> None:
    stuck = Stuck(ends=False)
    answers: list[Exception | None] = []
    stuck.hotplug._evict(cast("Slot", stuck.slot), cast("Device", stuck.slot.occupant),
                         answers.append)
    # Nor does the null back end come back to it, should its worker be made anew.
    assert stuck.calls == ["kill", "lost", "wait", "release", "watch"]
    assert isinstance(answers[0], StateError)
    assert list(stuck.machine.devices) == ["d"] and not stuck.worker.stopping


@pytest.mark.parametrize(("brings", "calls"), [(True, []), (False, ["null"])])
def test_a_disk_whose_worker_comes_back_gets_no_null_back_end(brings: bool,
                                                              calls: list[str]) -> None:
    """A driver may start the device, or `cont` come, while the last one's I/O is under way."""
    stuck = Stuck(ends=True)
    stuck.vm.supervisor.brings_worker = lambda device: brings
    stuck.hotplug.needed(cast("Slot", stuck.slot))
    assert stuck.calls == calls and not stuck.watched


def test_an_empty_slot_gets_the_null_back_end_when_its_driver_kicks() -> None:
    stuck = Stuck(ends=True)
    stuck.slot.occupant = None
    for _ in range(2):  # the driver resets and starts it again, or `cont` comes
        stuck.hotplug.needed(cast("Slot", stuck.slot))
        assert stuck.calls == [] and sorted(stuck.watched) == [7, 8]
    stuck.watched[8](1)
    assert stuck.calls == ["null"] and not stuck.watched
    stuck.hotplug.needed(cast("Slot", stuck.slot))
    stuck.device.is_in_use = lambda: False  # the driver reset it, and kicks all the same
    stuck.watched[7](1)
    assert stuck.calls == ["null"] and not stuck.watched


def test_a_kick_that_is_seen_when_a_disk_has_come() -> None:
    """Its worker has died since: the next one answers, not the null back end."""
    stuck = Stuck(ends=True)
    disk, stuck.slot.occupant = stuck.slot.occupant, None
    stuck.vm.supervisor.brings_worker = lambda device: True
    stuck.hotplug.needed(cast("Slot", stuck.slot))
    plugging: list[Done] = []
    stuck.hotplug.take_turn(plugging.append, lambda error: None)
    stuck.watched[7](1)
    stuck.slot.occupant = disk
    plugging[0](None)
    assert stuck.calls == [] and not stuck.hotplug._queue


@pytest.mark.parametrize("null", [True, False])
def test_a_driver_that_starts_a_disk_while_it_goes(null: bool) -> None:
    """Its back end was not in use when it was looked at, and is when it is let go of."""
    stuck = Stuck(ends=True)
    used = [False]
    stuck.device.is_in_use = lambda: used[0]

    def detach(deadline: float) -> None:
        used[0] = True
        raise BackendError("it is in use", "drain it first")

    def connect(device: object) -> int:
        stuck.calls.append("connect")
        if not null:
            raise StateError("no null worker", "")
        return 99

    stuck.device.detach = detach
    stuck.device.replace_backend = lambda fd, deadline, drain: stuck.calls.append(f"{fd} {drain}")
    stuck.hotplug._null.connect = connect  # type: ignore[method-assign]
    answers: list[Exception | None] = []
    stuck.hotplug._replace_by_null(cast("Slot", stuck.slot), answers.append)
    assert stuck.calls == ["connect", *["99 True"] * null]
    assert len(answers) == 1 and (answers[0] is None) is null


def test_no_null_worker_leaves_the_disk_where_it_was() -> None:
    stuck = Stuck(ends=True)
    stuck.worker.state = "running"

    def connect(device: object) -> int:
        raise StateError("no null worker", "")

    stuck.hotplug._null.connect = connect  # type: ignore[method-assign]
    timers: list[Callable[[], None]] = []
    stuck.vm.loop = SimpleNamespace(call_later=lambda delay, call: timers.append(call))
    releases = [False, True]
    stuck.vm.supervisor.release = lambda device: releases.pop(0)
    answers: list[Exception | None] = []
    stuck.hotplug.delete_device("d", answers.append)
    timers.pop()()  # from a timer: nobody above catches anything
    assert isinstance(answers[0], StateError) and stuck.calls == ["watch"]
    assert not stuck.worker.stopping and not stuck.hotplug._queue


# ---- back ends that somebody still has ---------------------------------------------------------


class Waiting:
    """A VM whose timers are run by hand."""

    def __init__(self) -> None:
        self.timers: list[Callable[[], None]] = []
        self.busy = True
        self.node = SimpleNamespace(is_busy=lambda: self.busy, device_id=None,
                                    close=lambda: self.calls.append("close"))
        self.calls: list[str] = []
        self.nodes = {"n": self.node}
        family = SimpleNamespace(nodes=lambda machine: self.nodes, backend="netdev",
                                 add="netdev_add")
        vm = SimpleNamespace(run_state="running", loop=SimpleNamespace(
            call_later=lambda delay, call: self.timers.append(call)))
        self.hotplug = Hotplug(vm, None, None)  # type: ignore[arg-type]
        self.hotplug.delete_node(family, "n",  # type: ignore[arg-type]
                                 lambda error: self.calls.append(f"answer {error}"))

    def run(self) -> None:
        timers, self.timers = self.timers, []
        for call in timers:
            call()


def test_a_back_end_is_free_when_it_is_answered() -> None:
    waiting = Waiting()
    for _ in range(3):
        waiting.run()
        assert waiting.calls == [] and waiting.nodes
    waiting.busy = False
    waiting.run()
    assert waiting.calls == ["close", "answer None"] and not waiting.nodes and not waiting.timers


def test_nobody_waits_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hotplug_module, "FREE_LIMIT", 0.0)
    waiting = Waiting()
    while waiting.timers:
        waiting.run()
    assert waiting.calls == ["close", "answer None"]


@pytest.mark.parametrize(("family", "null"), [(True, True), (False, True), (False, False)])
def test_a_device_that_is_given_up(family: bool, null: bool) -> None:
    """That of a family shows it before the null back end answers for it."""
    stuck = Stuck(ends=True)
    stuck.device.show_failed = lambda: stuck.calls.append("failed")
    stuck.device.has_null = null
    stuck.slot.answered = stuck.device
    stuck.slot.occupant.slot = 0
    if not family:
        stuck.slot.family = None
    answers: list[Exception | None] = []
    stuck.hotplug.give_up(cast("Device", stuck.slot.occupant), answers.append)
    if null:
        assert stuck.calls == [*["failed"] * family, "lost", "null"] and answers == [None]
    else:
        assert stuck.calls == [] and isinstance(answers[0], DeviceError)
    stuck.machine.devices = {}
    stuck.hotplug.give_up(cast("Device", stuck.slot.occupant), answers.append)
    assert answers[1] is None  # it went meanwhile
