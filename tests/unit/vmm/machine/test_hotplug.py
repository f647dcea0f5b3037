"""Plugging, one thing at a time, whatever order the wishes come in."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest

from vmm.errors import StateError
from vmm.machine.hotplug import Hotplug

if TYPE_CHECKING:
    from collections.abc import Callable

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
