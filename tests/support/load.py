"""Verified load on a VM's disk for as long as it is wanted, while something else happens to it."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.support.test_vm import TestVm


class Load:
    """`with`: the bare-metal guest makes overlapping writes (`blk.overlap`) without end.

    Leaving waits for the last command, and raises what went wrong. Nobody else may talk to the
    guest meanwhile.
    """

    def __init__(self, vm: TestVm, lanes: int, versions: int = 4, disk: int = 0) -> None:
        self.requests = 0  # verified until now
        self.longest = 0.0  # seconds: the longest wait of the guest for a completion
        self.runs = 0
        self._vm = vm
        self._command = f"blk.overlap {disk} 0 {lanes} {versions}"
        self._salt = 1
        self._versions = versions
        self._end = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, daemon=True)

    def _work(self) -> None:
        try:
            while not self._end.is_set():
                answer = self._vm.guest(f"{self._command} {self._salt}", 60)
                if not answer.ok:
                    raise AssertionError(f"{answer}\n{self._vm.story()}")
                self._salt += self._versions
                self.runs += 1
                self.requests += answer.value("requests")
                self.longest = max(self.longest, answer.value("longest-us") / 1e6)
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
