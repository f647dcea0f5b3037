"""What is undone at the end: in reverse order, each once, whatever fails."""

from __future__ import annotations

import pytest

from vmm.cleanup import Cleanup


def test_last_made_first_undone() -> None:
    cleanup, done = Cleanup(), []
    for number in range(3):
        cleanup.push(lambda number=number: done.append(number))
    cleanup.run()
    cleanup.run()
    assert done == [2, 1, 0]


def test_a_step_that_fails_keeps_no_other_from_running(capfd: pytest.CaptureFixture[str]) -> None:
    cleanup, done = Cleanup(), []

    def fail() -> None:
        raise OSError("gone already")

    cleanup.push(lambda: done.append("first"))
    cleanup.push(fail)
    cleanup.push(lambda: done.append("last"))
    cleanup.run()
    assert done == ["last", "first"]
    assert "gone already" in capfd.readouterr().err


def test_a_step_may_push_another() -> None:
    cleanup, done = Cleanup(), []
    cleanup.push(lambda: cleanup.push(lambda: done.append("late")))
    cleanup.run()
    assert done == ["late"]
