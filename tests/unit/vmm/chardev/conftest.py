"""An event loop, and a frontend that takes what it likes."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

import pytest

from vmm.chardev import create_chardev
from vmm.config.model import ChardevConfig
from vmm.event_loop import EventLoop

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from vmm.chardev.base import Chardev


class Rig:
    """Makes chardevs on one loop; `received` is what frontends got as input."""

    def __init__(self) -> None:
        self.loop = EventLoop()
        self.received = b""
        self.room = 1 << 20
        self.made: list[Chardev] = []
        self.rounds = 0

    def make(self, kind: str, **options: object) -> Chardev:
        config = ChardevConfig("c0", kind)
        for name, value in options.items():
            setattr(config, name, value)
        chardev = create_chardev(config, self.loop)
        chardev.on_input = self.take
        self.made.append(chardev)
        return chardev

    def take(self, data: bytes) -> int:
        count = min(len(data), self.room)
        self.received += data[:count]
        self.room -= count
        return count

    def run_until(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + 5
        while not condition():
            assert time.monotonic() < deadline
            self.step(0.01)

    def step(self, timeout: float = 0) -> None:
        self.rounds += 1
        self.loop.call_later(timeout, lambda: None)
        self.loop.run_once(self.loop._next_timeout())

    def is_idle(self) -> bool:
        """Whether nothing keeps the loop awake."""
        return not self.loop._epoll.poll(0)


@pytest.fixture
def rig() -> Iterator[Rig]:
    before = len(os.listdir("/proc/self/fd"))
    rig = Rig()
    yield rig
    for chardev in rig.made:
        chardev.close()
        chardev.close()
    rig.loop.close()
    rig.made.clear()
    assert len(os.listdir("/proc/self/fd")) == before
