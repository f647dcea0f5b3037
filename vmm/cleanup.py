"""What has to be undone when the process ends, however it ends: files, sockets, workers.

`push` in the order of making, `run` undoes in the reverse order, each step once.  A step that
fails is reported and doesn't keep the others from running.
"""

from __future__ import annotations

from shared import log

TYPE_CHECKING = False  # importing typing would cost 10 ms of the start
if TYPE_CHECKING:
    from collections.abc import Callable


class Cleanup:
    """A stack of things to undo."""

    __slots__ = ("_steps",)

    def __init__(self) -> None:
        self._steps: list[Callable[[], object]] = []

    def push(self, step: Callable[[], object]) -> None:
        """Remember one step."""
        self._steps.append(step)

    def run(self) -> None:
        """Undo everything, last made first."""
        while self._steps:
            step = self._steps.pop()
            try:
                step()
            except Exception as error:
                log.exception("while cleaning up", error)
