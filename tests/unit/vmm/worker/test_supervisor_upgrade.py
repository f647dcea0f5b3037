"""Live upgrade: one worker goes, another comes, nothing dies."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.unit.vmm.worker.fakes import Case
from vmm.errors import BackendError, DeviceError, StateError, WorkerSpawnError

if TYPE_CHECKING:
    pass


def test_upgrade(case: Case) -> None:
    old = case.worker
    results = case.restart()
    case.world.run()
    assert results == [None]
    assert case.vm.retired == 1 and case.kind.opened == [True]
    assert case.device.vhost.replaced == [(1100, True)]
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
    assert not case.device.vhost.replaced and not case.vm.told
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
    case.device.vhost.errors = [BackendError("not in time", "")]
    results = case.restart()
    case.world.run()
    assert isinstance(results[0], BackendError)
    assert old.put_down_with == "not in time" and case.kind.made[0].killed
    old.die()
    case.world.run()
    assert case.worker.pid == 101 and case.kind.opened == [True]
    assert case.kind.settled == 1


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
