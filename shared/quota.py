"""How much the untrusted may cause: lines of the log, reports."""

from __future__ import annotations

import time

LINES, LINES_RATE = 32, 1.0  # of one worker or device, see Quota


class Quota:
    """How much somebody who isn't trusted may cause: so much at once, then so much a second.

    dropped: what was refused since a line told of it.
    """

    __slots__ = ("_burst", "_left", "_rate", "_since", "dropped")

    def __init__(self, burst: float, rate: float) -> None:
        self._burst = self._left = burst
        self._rate = rate
        self._since = time.monotonic()
        self.dropped = 0

    def take(self) -> bool:
        """Whether one more is within it."""
        now = time.monotonic()
        self._left = min(self._burst, self._left + self._rate * (now - self._since))
        self._since = now
        if self._left < 1.0:
            self.dropped += 1
            return False
        self._left -= 1.0
        return True

    def refund(self) -> None:
        """One of them was asked for."""
        self._left = min(self._burst, self._left + 1.0)

    def line(self, text: str) -> str:
        """A line for the log that they cause: as it is to be written; "" if it is left out."""
        dropped = self.dropped
        if not self.take():
            return ""
        self.dropped = 0
        return f"{text} ({dropped} lines before it were left out)" if dropped else text
