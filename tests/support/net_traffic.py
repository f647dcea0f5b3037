"""Verified frames between the bare-metal guest and `Peer`, there and back, while a test does its
worst."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.support.test_vm import TestVm

WINDOW = 32  # frames under way at most


class Traffic:
    """`with`: verified frames there and back, without end. Leaving waits for the last command.

    sent, lost, twice: counted until now; failed: what was wrong.
    """

    def __init__(self, vm: TestVm, count: int = 500) -> None:
        self.sent = self.lost = self.twice = self.runs = 0
        self.failed: list[str] = []
        self._vm = vm
        self._count = count
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)

    def _work(self) -> None:
        while not self._end.is_set() and not self.failed:
            try:
                answer = self._vm.guest(f"net.echo 0 {self._count} 0 {WINDOW}", 60)
            except AssertionError as error:
                self.failed.append(str(error))
                return
            if not answer.ok:
                self.failed.append(f"{answer}\n{self._vm.story()}")
                return
            self.sent += self._count
            self.lost += answer.value("lost")
            self.twice += answer.value("twice")
            self.runs += 1

    def __enter__(self) -> Traffic:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._end.set()
        self._thread.join(120)
        assert not self._thread.is_alive()
        assert not self.failed, self.failed[0]
