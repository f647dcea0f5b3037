"""What a WorkerProcess needs of the nursery: an event loop, and somebody who listens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmm.event_loop import EventLoop

if TYPE_CHECKING:
    from vmm.worker.process import WorkerProcess


class FakeNursery:
    """Makes no workers."""

    def __init__(self) -> None:
        self.loop = EventLoop()
        self.main_thread = 0
        self.io_errors: list[object] = []
        self.forgotten = 0

    def on_io_error(self, worker: WorkerProcess, message: object) -> None:
        self.io_errors.append(message)

    def forget(self, worker: WorkerProcess) -> None:
        self.forgotten += 1
