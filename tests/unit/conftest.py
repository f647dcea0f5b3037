"""What every unit test gets: its event loops end with it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from vmm.event_loop import EventLoop

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True)
def _loops_end(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Close the loops that a test leaves: collected at any later time, their descriptors would
    vanish under a test that counts its own."""
    loops: list[EventLoop] = []
    start = EventLoop.__init__

    def record(loop: EventLoop) -> None:
        start(loop)
        loops.append(loop)

    monkeypatch.setattr(EventLoop, "__init__", record)
    yield
    for loop in loops:
        if not loop._epoll.closed:
            loop.close()
