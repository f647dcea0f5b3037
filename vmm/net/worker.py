"""What a net worker is given: the tap's descriptors, its memory of the driver, its options."""

from __future__ import annotations

from shared.errors import SharedError
from vmm.errors import WorkerSpawnError
from vmm.worker.plain import PlainWorkers

TYPE_CHECKING = False  # importing typing would cost 10 ms of the start
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.devices.virtio_net import NicState
    from vmm.net.node import NetNode
    from vmm.worker.nursery import Nursery
    from vmm.worker.process import WorkerProcess


class NetWorkers(PlainWorkers):
    """The workers that serve one NIC, one after another.

    Reads and writes of a tap end with the process that does them: nobody waits for I/O.

    :param mac: what the driver is told when it probes; state: what they share.
    """

    __slots__ = ("_mac", "_node", "_queue_size", "_state")

    def __init__(self, nursery: Nursery, node: NetNode, id: str, mac: bytes, queue_size: int,
                 state: NicState) -> None:
        super().__init__(nursery, "net", id, {}, self._describe)
        self._node = node
        self._mac = mac
        self._queue_size = queue_size
        self._state = state

    def _describe(self) -> dict[str, object]:
        return {**self._node.config.limits, "control": True, "queue-size": self._queue_size,
                "num-queues": 2 * len(self._node.taps) + 1, "mac": self._mac,
                "link": self._state.link_up}

    def spawn(self, opened: None, keep: bool = False) -> WorkerProcess:
        """See `PlainWorkers.spawn`; the tap may be another one by now (netdev_replace)."""
        try:
            self._fds = {"state": self._state.fileno()}
        except OSError as error:
            raise WorkerSpawnError(f"No memory for the NIC '{self._id}': "
                                   f"{error.strerror}") from error
        self._fds.update((f"tap{i}", fd) for i, fd in enumerate(self._node.taps))
        worker = super().spawn(opened, keep)
        self._node.workers = [*self._living(), worker]
        return worker

    def _living(self) -> list[WorkerProcess]:
        return [worker for worker in self._node.workers if worker.state != "dead"]

    def tell_link(self, told: Callable[[str], None]) -> int:
        """Tell all workers, one that is about to take over too, whether the link is up; how many.
        `told(problem)` comes for each of them, "" if it has obeyed. Main loop."""
        living = [worker for worker in self._living() if not worker.is_doomed]
        for worker in living:
            try:
                worker.orders.send("link", told, up=self._state.link_up)
            except SharedError as error:
                told(str(error))
        return len(living)
