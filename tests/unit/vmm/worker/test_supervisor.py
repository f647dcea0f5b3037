"""What the supervisor does when workers die: attempts, pauses between them, the end of them.

The clock, the event loop, the device and the workers are fakes; everything runs when told to.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import pytest

from vmm.errors import BackendError, DeviceError, StateError, WorkerSpawnError
from vmm.worker import supervisor as module
from vmm.worker.supervisor import BACK_OFF, BUDGET, BUDGET_RATE, FRUITLESS_LIMIT, Supervisor, Ward

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.machine.machine import Device
    from vmm.vm import Vm

    Done = Callable[[Exception | None], None]


class World:
    """The clock, and all that waits: in place of the event loop and of threads."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.timers: list[tuple[float, Callable[[], None]]] = []
        self.soon: list[Callable[[], None]] = []

    def monotonic(self) -> float:
        return self.now

    def call_soon(self, callback: Callable[[], None]) -> None:
        self.soon.append(callback)

    def call_later(self, delay: float, callback: Callable[[], None]) -> None:
        self.timers.append((self.now + delay, callback))

    def run(self, until: float = 0.0) -> None:
        """Everything that is due; the clock goes on to `until` at most."""
        while self.soon or any(when <= max(until, self.now) for when, _ in self.timers):
            if self.soon:
                self.soon.pop(0)()
                continue
            when, callback = min(self.timers, key=lambda timer: timer[0])
            self.timers.remove((when, callback))
            self.now = max(self.now, when)
            callback()
        self.now = max(self.now, until)


class FakeWorker:
    def __init__(self, pid: int) -> None:
        self.kind, self.device, self.pid = "blk", "disk", pid
        self.state, self.reason = "running", ""
        self.restarts = 0
        self.killed = self.put_down_with = ""
        self.starts = True
        self.on_end: Callable[[str], None] | None = None

    def take_socket(self) -> int:
        return 1000 + self.pid

    def wait_started(self, deadline: float) -> bool:
        return self.starts

    def kill(self) -> None:
        self.killed = "killed"

    def discard(self) -> None:
        self.killed = "discarded"

    def put_down(self, reason: str) -> None:
        self.put_down_with = reason

    def die(self, reason: str = "killed by signal 9") -> None:
        self.state, self.reason = "dead", reason
        if self.on_end is not None:
            self.on_end(reason)


class FakeBackedDevice:
    def __init__(self) -> None:
        self.undone = 0
        self.on_lost: Callable[[str], None] | None = None
        self.replaced: list[tuple[int, bool]] = []
        self.told_lost: list[str] = []
        self.hung_up = False
        self.errors: list[Exception] = []  # of the next replacements

    def has_lost_backend(self) -> bool:
        return self.hung_up

    def lost(self, text: str) -> None:
        self.told_lost.append(text)

    def replace_backend(self, fd: int, deadline: float, drain: bool) -> None:
        self.replaced.append((fd, drain))
        if self.errors:
            raise self.errors.pop(0)


class FakeKind:
    """Makes workers with rising pids."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.made: list[FakeWorker] = []
        self.opened: list[bool] = []
        self.discarded = 0
        self.wait = 0.0  # how long the old I/O takes
        self.open_error: Exception | None = None
        self.spawn_errors: list[Exception] = []
        self.stillborn = 0  # so many more don't start

    def open(self, drained: bool, limit: float | None = None) -> str:
        self.opened.append(drained)
        self.world.now += self.wait
        if self.open_error is not None:
            raise self.open_error
        return "image"

    def discard(self, opened: str) -> None:
        self.discarded += 1

    def spawn(self, opened: str) -> FakeWorker:
        if self.spawn_errors:
            raise self.spawn_errors.pop(0)
        worker = FakeWorker(100 + len(self.made))
        if self.stillborn:
            self.stillborn -= 1
            worker.starts, worker.reason = False, "it is stillborn"
        self.made.append(worker)
        return worker


class FakeDevice:
    def __init__(self, kind: FakeKind) -> None:
        self.id = "disk"
        self.device = FakeBackedDevice()
        self.kind = kind
        self.worker: FakeWorker | None = FakeWorker(99)


class FakeVm:
    def __init__(self, world: World) -> None:
        self.run_state = "running"
        self.loop = world
        self.events = self
        self.told: list[tuple[str, dict[str, Any]]] = []
        self.served_errors = 0
        self.retired = 0
        self.held: list[Callable[[], None]] | None = None  # threads that don't get on

    def emit(self, name: str, data: dict[str, Any]) -> None:
        self.told.append((name, data))

    def names(self) -> list[str]:
        return [name for name, _ in self.told]

    def off_loop(self, work: Callable[[], None], finish: Done) -> None:
        def run() -> None:
            error: Exception | None = None
            try:
                work()
            except Exception as caught:
                error = caught
            finish(error)

        if self.held is not None:
            self.held.append(run)
        else:
            self.loop.call_soon(run)

    def serve_errors(self, device: FakeDevice) -> None:
        self.served_errors += 1

    def retire_nursery(self) -> None:
        self.retired += 1


class Case:
    def __init__(self) -> None:
        self.world = World()
        self.vm = FakeVm(self.world)
        self.kind = FakeKind(self.world)
        self.device = FakeDevice(self.kind)
        self.supervisor = Supervisor(cast("Vm", self.vm))
        self.supervisor.watch(cast("Device", self.device))

    @property
    def worker(self) -> FakeWorker:
        assert self.device.worker is not None
        return self.device.worker

    def die(self, after: float = 1.0) -> None:
        """The worker dies after it has lived for so long."""
        self.world.run(self.world.now + after)
        self.worker.die()
        self.world.run()

    def restart(self) -> list[Exception | None]:
        results: list[Exception | None] = []
        self.supervisor.restart("disk", results.append)
        return results


@pytest.fixture
def case(monkeypatch: pytest.MonkeyPatch) -> Case:
    case = Case()
    monkeypatch.setattr(module, "time", case.world)
    # What was made before knows the real time.
    case.supervisor._wards["disk"] = Ward(cast("Device", case.device), cast("Any", case.kind))
    case.supervisor._adopt(case.supervisor._wards["disk"])
    case.world.now += 10.0  # it has served for a while
    return case


# ---- deaths ----------------------------------------------------------------------------------


def test_a_dead_worker_is_replaced(case: Case) -> None:
    case.die()
    assert case.vm.names() == ["WORKER_CRASHED", "WORKER_RESTARTED"]
    assert case.vm.told[0][1] == {"device": "disk", "pid": 99, "reason": "killed by signal 9"}
    assert case.kind.opened == [False]  # waits for the old I/O
    assert case.device.device.told_lost  # nobody waits for the dead
    assert case.device.device.replaced == [(1100, False)]
    assert case.worker.pid == 100 and case.worker.restarts == 1


def test_the_gap_counts_from_the_death(case: Case) -> None:
    case.kind.wait = 0.25
    case.die()
    assert case.vm.told[1][1]["gap-us"] == 250_000
    assert case.supervisor._wards["disk"].waited == pytest.approx(0.25)


def test_the_successor_is_watched_too(case: Case) -> None:
    for _ in range(10):
        case.die()
    assert case.vm.names().count("WORKER_RESTARTED") == 10
    assert case.worker.restarts == 10


def test_one_that_died_before_it_was_watched(case: Case) -> None:
    case.worker.on_end = None
    case.worker.die()
    case.supervisor.watch(cast("Device", case.device))
    case.world.run(case.world.now + 1)
    assert "WORKER_RESTARTED" in case.vm.names()


@pytest.mark.parametrize("failure", ["spawn", "replace", "start"])
def test_one_that_dies_during_recovery_is_followed(case: Case, failure: str) -> None:
    if failure == "spawn":
        case.kind.spawn_errors = [WorkerSpawnError("no nursery", "")] * 2
    elif failure == "replace":
        case.device.device.errors = [BackendError("gone", "")] * 2
    else:
        case.kind.stillborn = 2
    case.die()
    case.world.run(case.world.now + 10)
    assert case.vm.names() == ["WORKER_CRASHED"] * 3 + ["WORKER_RESTARTED"]
    if failure != "spawn":
        assert [worker.killed for worker in case.kind.made] == ["killed", "killed", ""]
    assert case.worker is case.kind.made[-1]
    assert case.supervisor._wards["disk"].fruitless == 2


def test_attempts_come_less_and_less_often(case: Case) -> None:
    case.kind.stillborn = FRUITLESS_LIMIT - 1
    begin = case.world.now + 1.0
    case.die()
    times = []
    while case.world.timers:
        times.append(min(when for when, _ in case.world.timers) - begin)
        case.world.run(min(when for when, _ in case.world.timers))
    pauses = [b - a for a, b in zip([0.0, *times], times, strict=False)]
    assert pauses == pytest.approx(BACK_OFF[1:])


def test_who_achieves_nothing_is_given_up(case: Case) -> None:
    case.kind.stillborn = 1000
    case.die()
    case.world.run(case.world.now + 60)
    assert case.vm.names() == ["WORKER_CRASHED"] * (FRUITLESS_LIMIT + 1) + ["WORKER_GIVEN_UP"]
    assert "stillborn" in case.vm.told[-1][1]["reason"]
    assert case.vm.served_errors == 1 and not case.world.timers
    assert len(case.kind.made) == FRUITLESS_LIMIT


def test_a_short_life_is_fruitless_a_longer_one_is_not(case: Case) -> None:
    for _ in range(FRUITLESS_LIMIT - 1):
        case.die(0.01)
        case.world.run(case.world.now + 0.6)  # ... but the next lives beyond the limit
    assert "WORKER_GIVEN_UP" not in case.vm.names()
    for _ in range(FRUITLESS_LIMIT + 1):
        case.worker.die()
        case.world.run(case.world.now)
        case.world.run(case.world.now + max(BACK_OFF))
        ward = case.supervisor._wards["disk"]
        ward.served_since = case.world.now  # it dies at once
    assert case.vm.served_errors == 1


def test_too_many_deaths_in_a_window_are_the_end(case: Case) -> None:
    deaths = 0
    while not case.vm.served_errors and deaths < 1000:
        case.die(0.1)  # ten a second, and each has served
        deaths += 1
    assert deaths == pytest.approx(BUDGET / (1 - 0.1 * BUDGET_RATE), abs=3)
    assert f"{BUDGET_RATE:.0f} times a second" in case.vm.told[-1][1]["reason"]


def test_deaths_now_and_then_are_never_the_end(case: Case) -> None:
    for _ in range(1000):
        case.die(1.01 / BUDGET_RATE)
    assert not case.vm.served_errors


def test_an_image_that_is_gone_is_the_end(case: Case) -> None:
    case.kind.open_error = DeviceError("no such file", "")
    case.die()
    assert case.vm.names() == ["WORKER_CRASHED", "WORKER_GIVEN_UP"]


def test_the_end_of_the_vm_is_the_end_of_it_all(case: Case) -> None:
    case.vm.held = []
    case.worker.die()
    (opening,) = case.vm.held
    case.vm.run_state = "shutdown"
    opening()
    assert case.kind.discarded == 1 and not case.kind.made
    case.worker.die()
    assert case.vm.names() == ["WORKER_CRASHED"]


def test_the_vm_ends_while_a_worker_connects(case: Case) -> None:
    case.vm.held = []
    case.worker.die()
    case.vm.held.pop()()
    (connecting,) = case.vm.held
    case.vm.run_state = "shutdown"
    connecting()
    assert case.kind.made[0].killed and case.vm.names() == ["WORKER_CRASHED"]


def test_a_worker_that_lies_is_put_down(case: Case) -> None:
    assert case.device.device.on_lost is not None
    case.device.device.on_lost("it talks nonsense")
    case.world.run()
    assert case.worker.put_down_with == "it talks nonsense"
    case.worker.die("killed by signal 9: it talks nonsense")
    case.world.run()
    assert "WORKER_RESTARTED" in case.vm.names()


def test_a_connection_lost_while_its_worker_connects_is_remembered(case: Case) -> None:
    """`lost` comes before the worker counts as serving, and never again."""
    case.vm.held = []
    case.worker.die()
    case.vm.held.pop()()
    (connecting,) = case.vm.held
    case.device.device.hung_up = True
    assert case.device.device.on_lost is not None
    case.device.device.on_lost("it closed the connection")
    case.world.run()
    connecting()
    assert case.worker is case.kind.made[0] and case.worker.put_down_with


def test_a_connection_lost_during_an_upgrade_that_fails_is_remembered(case: Case) -> None:
    case.vm.held = []
    answers = case.restart()
    case.device.device.hung_up = True
    case.kind.open_error = DeviceError("no such file", "")
    case.vm.held.pop()()
    assert isinstance(answers[0], DeviceError) and case.worker.put_down_with


def test_nobody_answers_for_the_given_up_before_the_io_has_ended(case: Case) -> None:
    case.kind.spawn_errors = [WorkerSpawnError("no", "")] * FRUITLESS_LIMIT
    case.die()
    case.world.run(case.world.now + 60)
    # Each attempt opened the image, and so did the end, whose lock nobody needs.
    assert len(case.kind.opened) == case.vm.names().count("WORKER_CRASHED")
    assert case.kind.discarded == 1 and case.vm.served_errors == 1


def test_who_is_given_up_gets_no_worker(case: Case) -> None:
    device = cast("Device", case.device)
    assert case.supervisor.brings_worker(device)
    case.kind.open_error = DeviceError("no such file", "")
    case.worker.die()
    assert case.supervisor.brings_worker(device)
    case.world.run()
    assert not case.supervisor.brings_worker(device)
    case.supervisor.release(device)
    assert not case.supervisor.brings_worker(device)


def test_a_device_that_was_released_is_nobodys(case: Case) -> None:
    assert case.supervisor.release(cast("Device", case.device))
    case.worker.die()
    case.world.run()
    assert not case.vm.told
    with pytest.raises(DeviceError):
        case.restart()


def test_a_device_is_not_released_in_the_middle(case: Case) -> None:
    case.vm.held = []
    case.worker.die()
    assert not case.supervisor.release(cast("Device", case.device))


# ---- live upgrade ----------------------------------------------------------------------------


def test_upgrade(case: Case) -> None:
    old = case.worker
    results = case.restart()
    case.world.run()
    assert results == [None]
    assert case.vm.retired == 1 and case.kind.opened == [True]
    assert case.device.device.replaced == [(1100, True)]
    assert old.killed and old.on_end is None
    assert case.worker.pid == 100 and case.worker.restarts == 1
    assert case.vm.names() == ["WORKER_RESTARTED"]
    case.die()
    assert case.worker.pid == 101  # it is looked after


@pytest.mark.parametrize("when", ["open", "spawn", "start"])
def test_an_upgrade_that_fails_early_leaves_the_old_one_alone(case: Case, when: str) -> None:
    """New code that doesn't even start is no reason to end what works."""
    old = case.worker
    if when == "open":
        case.kind.open_error = DeviceError("no such file", "")
    elif when == "spawn":
        case.kind.spawn_errors = [WorkerSpawnError("no nursery", "")]
    else:
        case.kind.stillborn = 1
    results = case.restart()
    case.world.run()
    assert isinstance(results[0], Exception)
    assert case.worker is old and not old.killed and not old.put_down_with
    assert not case.device.device.replaced and not case.vm.told
    case.kind.open_error = None
    case.die()
    assert case.vm.names() == ["WORKER_CRASHED", "WORKER_RESTARTED"]


@pytest.mark.parametrize("when", ["open", "spawn", "start"])
def test_the_old_one_dies_while_an_upgrade_fails(case: Case, when: str) -> None:
    case.vm.held = []
    old = case.worker
    results = case.restart()
    if when == "open":
        case.kind.open_error = DeviceError("no such file", "")
    elif when == "spawn":
        case.kind.spawn_errors = [WorkerSpawnError("no nursery", "")]
    else:
        case.kind.stillborn = 1
        case.vm.held.pop(0)()
    old.die()
    assert not case.vm.told  # whoever upgrades notices
    case.vm.held.pop(0)()
    assert isinstance(results[0], Exception)
    assert case.vm.names()[0] == "WORKER_CRASHED"
    case.kind.open_error = None
    while case.vm.held:
        case.vm.held.pop(0)()
    assert case.vm.names() == ["WORKER_CRASHED", "WORKER_RESTARTED"]


def test_one_that_does_not_drain_is_put_down(case: Case) -> None:
    old = case.worker
    case.device.device.errors = [BackendError("not in time", "")]
    results = case.restart()
    case.world.run()
    assert isinstance(results[0], BackendError)
    assert old.put_down_with == "not in time" and case.kind.made[0].killed
    old.die()
    case.world.run()
    assert case.worker.pid == 101 and case.kind.opened == [True, False]


def test_one_thing_at_a_time(case: Case) -> None:
    case.vm.held = []
    case.restart()
    with pytest.raises(StateError, match="upgrading"):
        case.restart()


def test_nobody_to_restart(case: Case) -> None:
    with pytest.raises(DeviceError, match="query-workers"):
        case.supervisor.restart("other", lambda error: None)


def test_the_vm_ends_during_an_upgrade(case: Case) -> None:
    case.vm.held = []
    results = case.restart()
    case.vm.held.pop(0)()
    case.vm.run_state = "shutdown"
    case.vm.held.pop(0)()
    assert isinstance(results[0], StateError) and case.kind.made[0].killed
