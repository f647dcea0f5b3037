"""What the supervisor does when workers die: attempts, pauses between them, the end of them.

The clock, the event loop, the device and the workers are fakes; everything runs when told to.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import pytest

from tests.unit.vmm.worker.fakes import Case
from vmm.errors import BackendError, DeviceError, WorkerSpawnError
from vmm.worker.supervisor import BACK_OFF, BUDGET, BUDGET_RATE, FRUITLESS_LIMIT

if TYPE_CHECKING:
    from vmm.machine.machine import Device


def test_a_dead_worker_is_replaced(case: Case) -> None:
    case.die()
    assert case.vm.names() == ["WORKER_CRASHED", "WORKER_RESTARTED"]
    assert case.vm.told[0][1] == {"device": "disk", "pid": 99, "reason": "killed by signal 9"}
    assert case.kind.settled == 1 and case.kind.kept == 0  # waits for the old I/O
    assert case.device.vhost.told_lost  # nobody waits for the dead
    assert case.device.vhost.replaced == [(1100, False)]
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
        case.device.vhost.errors = [BackendError("gone", "")] * 2
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
    case.vm.held.pop()()
    (connecting,) = case.vm.held
    case.vm.run_state = "shutdown"
    connecting()
    assert case.kind.made[0].killed and case.vm.names() == ["WORKER_CRASHED"]


def test_the_vm_ends_while_the_old_io_does(case: Case) -> None:
    case.vm.held = []
    case.worker.die()
    case.vm.held.pop()()
    (settling,) = case.vm.held
    assert case.kind.kept == 1 and not case.kind.settled
    case.vm.run_state = "shutdown"
    settling()
    assert case.kind.made[0].killed and case.kind.kept == 0
    assert case.vm.names() == ["WORKER_CRASHED"]


def test_no_ring_starts_before_the_old_io_has_ended(case: Case) -> None:
    """The next worker gets ready meanwhile; it holds the lock when it is connected, alone."""
    case.vm.held = []
    case.worker.die()
    case.vm.held.pop()()
    (settling,) = case.vm.held
    assert len(case.kind.made) == 1 and not case.device.vhost.replaced
    settling()
    assert case.kind.settled == 1 and case.kind.kept == 0
    assert not case.device.vhost.replaced
    case.vm.held.pop()()
    assert case.device.vhost.replaced == [(1100, False)]
    assert "WORKER_RESTARTED" in case.vm.names()


def test_a_worker_that_dies_before_its_turn_is_no_failure(case: Case) -> None:
    for number in range(10 * FRUITLESS_LIMIT):
        case.vm.held = []
        case.die()
        case.vm.held.pop()()
        case.kind.made[-1].die()
        for _ in range(2):
            case.vm.held.pop(0)()
        assert len(case.kind.made) == 2 * number + 2 and case.kind.kept == 0
        case.world.run(case.world.now + 10)
    assert case.vm.names().count("WORKER_RESTARTED") == 10 * FRUITLESS_LIMIT
    assert not case.vm.served_errors


def test_a_lock_that_can_t_be_had_is_the_end(case: Case) -> None:
    case.kind.settle_error = DeviceError("no locks", "")
    case.die()
    assert case.vm.names() == ["WORKER_CRASHED", "WORKER_GIVEN_UP"]
    assert case.kind.made[0].killed and case.kind.kept == 0


def test_a_worker_that_lies_is_put_down(case: Case) -> None:
    assert case.device.vhost.on_lost is not None
    case.device.vhost.on_lost("it talks nonsense")
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
    case.vm.held.pop()()
    (connecting,) = case.vm.held
    case.device.vhost.hung_up = True
    assert case.device.vhost.on_lost is not None
    case.device.vhost.on_lost("it closed the connection")
    case.world.run()
    connecting()
    assert case.worker is case.kind.made[0] and case.worker.put_down_with


def test_a_connection_lost_during_an_upgrade_that_fails_is_remembered(case: Case) -> None:
    case.vm.held = []
    answers = case.restart()
    case.device.vhost.hung_up = True
    case.kind.open_error = DeviceError("no such file", "")
    case.vm.held.pop()()
    assert isinstance(answers[0], DeviceError) and case.worker.put_down_with


def test_nobody_answers_for_the_given_up_before_the_io_has_ended(case: Case) -> None:
    case.kind.spawn_errors = [WorkerSpawnError("no", "")] * FRUITLESS_LIMIT
    case.die()
    case.world.run(case.world.now + 60)
    # Each attempt opened the image, and so did the end, whose lock nobody needs.
    assert case.kind.reopened + 1 == case.vm.names().count("WORKER_CRASHED")
    assert case.kind.opened == [False] and case.kind.kept == 0
    assert case.kind.discarded == FRUITLESS_LIMIT + 1 and case.vm.served_errors == 1


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


def test_a_host_that_lacks_a_stage_ends_the_start(case: Case) -> None:
    """Also where the worker's connection was lost, and a supervisor made, before its report."""
    case.worker.lacks = "landlock"
    case.die()
    assert case.vm.checked_sandboxes == 1 and not case.vm.names()


def test_a_stage_that_is_missing_later_is_a_crash(case: Case) -> None:
    case.die()
    case.worker.lacks = "landlock"
    case.die()
    assert not case.vm.checked_sandboxes and case.vm.names().count("WORKER_CRASHED") == 2
