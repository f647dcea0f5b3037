"""The descriptors that clients handed in with `getfd`, until a command uses them by name."""

from __future__ import annotations

from shared.fds import OwnedFd
from vmm.qmp.errors import DeviceNotFound, QmpError

MAX_FDS = 256  # a NIC takes two for each of its queue pairs


class FdStore:
    """Names for descriptors; shared by all clients, because managers reconnect in between."""

    def __init__(self) -> None:
        self._fds: dict[str, OwnedFd] = {}

    def __len__(self) -> int:
        return len(self._fds)

    def check_room(self, name: str) -> None:
        """:raises QmpError: `name` is new and there are too many already."""
        if name not in self._fds and len(self._fds) >= MAX_FDS:
            raise QmpError(f"{MAX_FDS} descriptors are waiting to be used already",
                           "use closefd for those that aren't needed")

    def put(self, name: str, fd: int) -> None:
        """Own `fd` as `name`; one that had this name before is closed."""
        self._fds.setdefault(name, OwnedFd()).replace(fd)

    def take(self, name: str) -> int:
        """Give up and return the descriptor `name`: the caller closes it from now on.

        :raises DeviceNotFound: there is none.
        """
        owned = self._fds.pop(name, None)
        if owned is None:
            raise DeviceNotFound(f"There is no file descriptor named '{name[:100]}'",
                                 "hand it in with getfd first")
        return owned.take()

    def close(self) -> None:
        """Close all that nobody took."""
        for owned in self._fds.values():
            owned.close()
        self._fds.clear()
