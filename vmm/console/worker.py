"""What a console worker is given: the ports' sockets, its memory of the driver, its options."""

from __future__ import annotations

from shared.virtio.console import PORT_QUEUE_SIZE, queue_count
from vmm.errors import WorkerSpawnError
from vmm.worker.plain import PlainWorkers

TYPE_CHECKING = False  # importing typing would cost 10 ms of the start
if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmm.console.port import Port
    from vmm.devices.worker_state import WorkerState
    from vmm.worker.nursery import Nursery
    from vmm.worker.process import WorkerProcess


class ConsoleWorkers(PlainWorkers):
    """The workers that serve one console device, one after another.

    What they read and write are sockets whose other ends are ours: nobody waits for I/O.
    """

    __slots__ = ("_current", "_max_ports", "_ports", "_state")

    def __init__(self, nursery: Nursery, id: str, ports: Sequence[Port], max_ports: int,
                 state: WorkerState) -> None:
        fds = {f"port{port.nr}": port.worker_end for port in ports}
        super().__init__(nursery, "console", id, fds, self._describe)
        self._ports = ports
        self._max_ports = max_ports
        self._state = state
        self._current: WorkerProcess | None = None

    def _describe(self) -> dict[str, object]:
        return {"max-ports": self._max_ports, "num-queues": queue_count(self._max_ports),
                "queue-size": PORT_QUEUE_SIZE, "ports": [port.describe() for port in self._ports]}

    def spawn(self, opened: None, keep: bool = False) -> WorkerProcess:
        """See `PlainWorkers.spawn`; it hears from now on who comes and leaves."""
        try:
            self._fds["state"] = self._state.fileno()
        except OSError as error:
            raise WorkerSpawnError(f"No memory for the consoles of '{self._id}': "
                                   f"{error.strerror}") from error
        worker = self._current = super().spawn(opened, keep)
        for port in self._ports:
            port.serve_with(worker.orders)
        return worker
