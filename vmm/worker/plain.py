"""Workers that need nothing but descriptors and options, and leave no I/O behind when they end."""

from __future__ import annotations

TYPE_CHECKING = False  # importing typing would cost 10 ms of the start
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.worker.nursery import Nursery
    from vmm.worker.process import WorkerProcess


class PlainWorkers:
    """The workers that serve one device, one after another (`Kind` of supervisor.py).

    :param kind: of workers, as the nursery knows it; id: the device's name.
    :param fds: descriptors by name, which stay the caller's as long as there are workers.
    :param options: called for each worker: what it is told may have changed meanwhile.
    """

    __slots__ = ("_fds", "_id", "_kind", "_nursery", "_options")

    def __init__(self, nursery: Nursery, kind: str, id: str, fds: dict[str, int],
                 options: Callable[[], dict[str, object]]) -> None:
        self._nursery = nursery
        self._kind = kind
        self._id = id
        self._fds = fds
        self._options = options

    def open(self, drained: bool, limit: float | None = None) -> None:
        """Everything is open."""

    def reopen(self) -> None:
        """The same."""

    def settle(self, opened: None) -> None:
        """Nothing of the last one is under way."""

    def discard(self, opened: None) -> None:
        """Nothing was made."""

    def spawn(self, opened: None, keep: bool = False) -> WorkerProcess:
        """Ask the nursery for the next one.

        :raises WorkerSpawnError: no nursery, or no descriptors.
        """
        return self._nursery.spawn(self._kind, self._id, self._fds, self._options())

    def first(self) -> WorkerProcess:
        """The first one, at the start of the VM."""
        return self.spawn(None)
