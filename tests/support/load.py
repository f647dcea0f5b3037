"""Verified load on a VM's disk for as long as it is wanted, while something else happens to it."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.support.test_vm import TestVm

SECTORS, ROUNDS = 1024, 4  # of one blk.stress
VERSIONS = 4               # of one blk.overlap


def stress_requests(sectors: int, rounds: int) -> int:
    """How many requests `blk.stress` makes (tests/guest/blk_commands.c)."""
    total = 0
    for number in range(rounds):
        chunk = 1 + number * 5 % 17
        total += -(-sectors // chunk) - (-sectors // (chunk + number % 3))
    return total


class Load:
    """`with`: the bare-metal guest writes, reads and verifies without end.

    Leaving waits for the last command, and raises what went wrong. Nobody else may talk to the
    guest meanwhile.

    :param depth: requests in flight.
    :param ways: "overlap": `blk.overlap`, whose writes overlap, but which the guest needs long to
        prepare and to check; "stress": `blk.stress`, which keeps the queue full. In turn, if both.
    """

    def __init__(self, vm: TestVm, depth: int, ways: tuple[str, ...] = ("overlap",)) -> None:
        self.requests = 0  # verified until now
        self.runs = 0
        self._vm = vm
        self._depth = depth
        self._ways = ways
        self._end = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, daemon=True)

    def _once(self) -> None:
        if self._ways[self.runs % len(self._ways)] == "stress":
            command = f"blk.stress 0 0 {SECTORS} {ROUNDS} {self._depth}"
            count = stress_requests(SECTORS, ROUNDS)
        else:
            command = f"blk.overlap 0 0 {self._depth} {VERSIONS} {1 + self.runs * VERSIONS}"
            count = 2 * self._depth * VERSIONS
        answer = self._vm.guest(command, 120)
        if not answer.ok:
            raise AssertionError(f"{answer}\n{self._vm.story()}")
        self.runs += 1
        self.requests += count

    def _work(self) -> None:
        try:
            while not self._end.is_set():
                self._once()
        except BaseException as error:
            self._error = error

    def goes_on(self) -> bool:
        """Nothing went wrong up to now."""
        return self._error is None

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._end.set()
        self._thread.join(180)
        if self._error is not None:
            raise self._error
        if self._thread.is_alive():
            raise AssertionError(f"the load does not end\n{self._vm.story()}")
