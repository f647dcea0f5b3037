"""What a device behind our vhost-user back end implements, and what it is given.

`Backend` (backend.py) checks every field of every request first, so that a device sees only
ring addresses inside guest memory, sizes within its limits and features that it offered.
"""

from __future__ import annotations

from shared.errors import SharedError
from shared.fds import OwnedFd
from shared.vhost_user import messages as m

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from shared.memory_regions import MemoryRegion, RegionTable

# What this implementation serves; a device takes a subset (`BackendDevice.protocol_features`).
SERVED_FEATURES = (m.PF_MQ | m.PF_REPLY_ACK | m.PF_CONFIG | m.PF_BACKEND_REQ
                   | m.PF_BACKEND_SEND_FD | m.PF_INFLIGHT_SHMFD | m.PF_CONFIGURE_MEM_SLOTS
                   | m.PF_RESET_DEVICE | m.PF_STATUS)


class RefusedError(SharedError):
    """A request that won't be done. `code` is the positive errno of the acknowledgement."""

    def __init__(self, code: int, what: str, hint: str = "") -> None:
        super().__init__(what, hint)
        self.code = code


class Ring:
    """One split virtqueue as the front end set it up.

    desc, avail, used are guest-physical, each part checked to lie within one memory region;
    base is the next available index to take (16 bits); kick_fd is -1 if the front end wants
    polling, call_fd and err_fd are -1 if it wants no signal.  All three are non-blocking,
    owned by `Backend` and stay open while the ring runs with them.

    started: the device serves it; waits: the front end has started it, but guest memory lacks a
    part of it for now.
    """

    __slots__ = ("_user", "avail", "base", "call", "desc", "enabled", "err", "index", "kick",
                 "size", "started", "used", "waits")

    def __init__(self, index: int) -> None:
        self.index = index
        self.kick = OwnedFd()
        self.call = OwnedFd()
        self.err = OwnedFd()
        self.started = False
        self.enabled = False
        self.forget()

    def forget(self) -> None:
        """Back to the state before any SET_VRING_*; the descriptors are closed."""
        self.size = 0
        self.base = 0
        self.waits = False
        self.desc = self.avail = self.used = 0
        self._user: tuple[int, int, int] | None = None
        for fd in (self.kick, self.call, self.err):
            fd.close()

    @property
    def runs(self) -> bool:
        """The front end has started it, and not stopped it."""
        return self.started or self.waits

    @property
    def kick_fd(self) -> int:
        """Readable when the driver added buffers, -1: poll."""
        return self.kick.fd

    @property
    def call_fd(self) -> int:
        """To signal when buffers were used, -1: don't."""
        return self.call.fd

    @property
    def err_fd(self) -> int:
        """To signal when the ring can't be served any more, -1: don't."""
        return self.err.fd

    @property
    def user_addresses(self) -> tuple[int, int, int] | None:
        """(desc, avail, used) as SET_VRING_ADDR gave them, None before it."""
        return self._user

    def set_user_addresses(self, desc: int, avail: int, used: int) -> None:
        """Remember the front end's addresses; `locate` translates them."""
        self._user = (desc, avail, used)

    def locate(self, table: RegionTable) -> None:
        """Translate to guest-physical addresses.

        :raises RegionError: a part is not inside one region.
        """
        assert self._user is not None
        desc, avail, used = self._user
        self.desc = _to_guest(table, desc, 16 * self.size)
        self.avail = _to_guest(table, avail, 6 + 2 * self.size)
        self.used = _to_guest(table, used, 6 + 8 * self.size)


class BackendDevice:
    """What a device implements. All calls come on the thread that runs `Backend.serve`.

    Any method may raise SharedError or OSError: the request is then refused.
    """

    queue_count: int = 1          # rings 0 .. queue_count - 1 exist
    announced_queues: int = 0     # what GET_QUEUE_NUM says; 0: queue_count (a NIC: queue pairs)
    max_queue_size: int = 1024    # largest ring accepted
    protocol_features: int = SERVED_FEATURES

    def features(self) -> int:
        """The virtio feature bits on offer (no vhost-user bit among them)."""
        raise NotImplementedError

    def set_features(self, features: int) -> None:
        """What the driver acknowledged: a subset of `features`. No ring runs."""
        raise NotImplementedError

    def read_config(self, offset: int, size: int) -> bytes:
        """Exactly `size` bytes of the config space; zeroes beyond its end; both within 256."""
        raise NotImplementedError

    def write_config(self, offset: int, data: bytes, migration: bool) -> None:
        """SET_CONFIG; refuse read-only fields unless `migration`."""
        raise NotImplementedError

    def set_memory(self, regions: Sequence[tuple[MemoryRegion, int]]) -> None:
        """Replace guest memory by these regions with their descriptors. No ring runs.

        Sizes are checked against the descriptors' files.  The descriptors are closed after
        the call: map them (file_offset need not be aligned to a huge page).  An empty
        sequence unmaps everything.
        """
        raise NotImplementedError

    def add_memory(self, region: MemoryRegion, fd: int) -> None:
        """One more region; as `set_memory`."""
        raise NotImplementedError

    def remove_memory(self, region: MemoryRegion) -> None:
        """Unmap a region that was added. No ring runs."""
        raise NotImplementedError

    def start_ring(self, ring: Ring) -> None:
        """Serve the ring from `ring.base` on; look at it at once, a kick may have been lost.

        With `ring.enabled` False, take no request until `enable_ring`.
        """
        raise NotImplementedError

    def stop_ring(self, ring: Ring) -> int:
        """Finish what is in flight, flush, stop; returns the next available index (16 bits).

        When it returns nothing touches guest memory or the kick and call descriptors of this
        ring any more.
        """
        raise NotImplementedError

    def enable_ring(self, ring: Ring, enabled: bool) -> None:
        """A started ring was enabled or disabled (`ring.enabled` is already set)."""
        raise NotImplementedError

    def change_call(self, ring: Ring, fd: int) -> None:
        """A running ring has a new call descriptor `fd` (-1: none).

        The old one, `ring.call_fd`, is closed after the call.
        """
        raise NotImplementedError

    def get_inflight(self, queue_count: int, queue_size: int) -> tuple[m.Inflight, int]:
        """Make the zeroed buffer that tracks requests in flight, use it from the next start.

        :return: its description and a descriptor that stays the device's.
        """
        raise NotImplementedError

    def set_inflight(self, inflight: m.Inflight, fd: int) -> None:
        """Take over the buffer of a predecessor: requests in flight are done again at start.

        The file is at least mmap_offset + mmap_size long; `fd` is closed after the call.
        """
        raise NotImplementedError

    def reset(self) -> None:
        """Virtio reset: forget features, config changes and in-flight buffer; keep memory."""
        raise NotImplementedError


def _to_guest(table: RegionTable, user_addr: int, size: int) -> int:
    region, offset = table.translate_user(user_addr, size)
    return region.guest_addr + offset
