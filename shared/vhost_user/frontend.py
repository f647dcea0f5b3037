"""The front end (core) side: requests to a back end, with time limits, every reply checked.

Requests without a reply of their own are *posted*: they carry NEED_REPLY where REPLY_ACK was
negotiated, and the next call that waits collects the acknowledgements in order, so that a
device's start costs one wait, not one a message.  Where REPLY_ACK is missing `finish` asks for
the features once more: a back end handles its messages in order.

A `Frontend` may be used from any thread, one call at a time; a sequence of calls that belongs
together is serialized by its owner.
"""

from __future__ import annotations

import _socket
import _thread
import posix as os
import time

from shared.fds import SEEK_END, close_all
from shared.vhost_user import messages as m
from shared.vhost_user.connection import Connection, Message
from shared.vhost_user.errors import PeerRefusedError, ProtocolError, TimedOutError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from shared.memory_regions import MemoryRegion
    from shared.vhost_user.errors import VhostUserError

# What the core can use of a back end.
WANTED_PROTOCOL = (m.PF_MQ | m.PF_REPLY_ACK | m.PF_CONFIG | m.PF_BACKEND_REQ
                   | m.PF_INFLIGHT_SHMFD | m.PF_CONFIGURE_MEM_SLOTS | m.PF_RESET_DEVICE
                   | m.PF_STATUS)
MAX_QUEUES = 256  # a vring index has 8 bits in SET_VRING_KICK and its kin
# More replies owed than this are collected on the way: both socket buffers stay far from full.
MAX_OWED = 48
DEFAULT_LIMIT = 5.0


class Frontend:
    """The core's end of one vhost-user connection.

    features: all bits of GET_FEATURES; protocol: negotiated protocol features;
    queue_count: what GET_QUEUE_NUM said, 0 if the back end doesn't tell.

    :param fd: connected socket; owned from now on.
    :param peer: names the back end in errors.
    :param abort_fd: readable: every wait ends with AbortedError.
    :param limit: seconds that a call without a deadline of its own may take.
    """

    def __init__(self, fd: int, peer: str, abort_fd: int = -1,
                 limit: float = DEFAULT_LIMIT) -> None:
        self.connection = Connection(fd, peer, abort_fd)
        self.peer = peer
        self.limit = limit
        self.features = 0
        self.protocol = 0
        self.queue_count = 0
        self._lock = _thread.allocate_lock()
        # What is still to come, in order: (request, payload kind of its reply, descriptors).
        self._owed: list[tuple[int, int, int]] = []
        self._unsynced = False        # something was posted that nothing has confirmed

    @property
    def broken(self) -> VhostUserError | None:
        """Why the connection can't be used any more, None while it is good."""
        return self.connection.broken

    # ---- session ---------------------------------------------------------------------------

    def handshake(self, wanted: int = WANTED_PROTOCOL, deadline: float | None = None) -> None:
        """Learn features, negotiate protocol features, become the owner.

        :param wanted: protocol features to take if they are on offer.
        :raises VhostUserError: here and in every other method: see shared/vhost_user/errors.py.
        """
        deadline = self._deadline(deadline)
        self.features = self._get_u64(m.GET_FEATURES, deadline)
        if self.features & m.F_PROTOCOL_FEATURES:
            offered = self._get_u64(m.GET_PROTOCOL_FEATURES, deadline)
            self.protocol = 0
            self._post(m.SET_PROTOCOL_FEATURES, m.encode_u64(offered & wanted), (), deadline)
            self.protocol = offered & wanted
        self._post(m.SET_OWNER, b"", (), deadline)
        if self.protocol & m.PF_MQ:
            count = self._get_u64(m.GET_QUEUE_NUM, deadline)
            if not 0 < count <= 0xFFFF:
                raise self.connection.protocol_error(f"says that it has {count} queues",
                                                     "1 to 65535 make sense")
            self.queue_count = min(count, MAX_QUEUES)
        self.finish(deadline)

    def set_features(self, features: int, deadline: float | None = None) -> None:
        """SET_FEATURES; the protocol-features bit is added where it is on offer. Posted."""
        features |= self.features & m.F_PROTOCOL_FEATURES
        self._post(m.SET_FEATURES, m.encode_u64(features), (), deadline)

    def open_backend_channel(self, deadline: float | None = None) -> int:
        """SET_BACKEND_REQ_FD: returns our end of a new socket, for `BackendChannel`. Posted."""
        ours, theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_STREAM)
        try:
            self._post(m.SET_BACKEND_REQ_FD, b"", (theirs.fileno(),), deadline)
            return ours.detach()
        finally:
            ours.close()
            theirs.close()

    def reset_device(self, deadline: float | None = None) -> None:
        """RESET_DEVICE (needs PF_RESET_DEVICE). Posted."""
        self._post(m.RESET_DEVICE, b"", (), deadline)

    def set_status(self, status: int, deadline: float | None = None) -> None:
        """SET_STATUS (needs PF_STATUS): the virtio device status. Posted."""
        self._post(m.SET_STATUS, m.encode_u64(status), (), deadline)

    def get_status(self, deadline: float | None = None) -> int:
        """GET_STATUS (needs PF_STATUS)."""
        return self._get_u64(m.GET_STATUS, self._deadline(deadline))

    # ---- memory ----------------------------------------------------------------------------

    def set_mem_table(self, regions: Sequence[MemoryRegion], fds: Sequence[int],
                      deadline: float | None = None) -> None:
        """SET_MEM_TABLE: at most 8 regions, one descriptor each. Posted."""
        assert len(regions) == len(fds) <= m.MAX_TABLE_REGIONS
        self._post(m.SET_MEM_TABLE, m.encode_memory_table(regions), fds, deadline)

    def get_max_mem_slots(self, deadline: float | None = None) -> int:
        """GET_MAX_MEM_SLOTS (needs PF_CONFIGURE_MEM_SLOTS)."""
        return self._get_u64(m.GET_MAX_MEM_SLOTS, self._deadline(deadline))

    def add_mem_region(self, region: MemoryRegion, fd: int,
                       deadline: float | None = None) -> None:
        """ADD_MEM_REG (needs PF_CONFIGURE_MEM_SLOTS). Posted."""
        self._post(m.ADD_MEM_REG, m.encode_memory_region(region), (fd,), deadline)

    def remove_mem_region(self, region: MemoryRegion, deadline: float | None = None) -> None:
        """REM_MEM_REG (needs PF_CONFIGURE_MEM_SLOTS). Posted."""
        self._post(m.REM_MEM_REG, m.encode_memory_region(region), (), deadline)

    # ---- rings -----------------------------------------------------------------------------

    def set_vring_num(self, index: int, size: int, deadline: float | None = None) -> None:
        """SET_VRING_NUM. Posted."""
        self._post(m.SET_VRING_NUM, m.encode_vring_state(index, size), (), deadline)

    def set_vring_base(self, index: int, base: int, deadline: float | None = None) -> None:
        """SET_VRING_BASE: next available index. Posted."""
        self._post(m.SET_VRING_BASE, m.encode_vring_state(index, base), (), deadline)

    def set_vring_addr(self, index: int, desc: int, avail: int, used: int,
                       deadline: float | None = None) -> None:
        """SET_VRING_ADDR: user addresses (`MemoryRegion.user_addr`). Posted."""
        self._post(m.SET_VRING_ADDR, m.encode_vring_addr(index, 0, desc, used, avail), (),
                   deadline)

    def set_vring_kick(self, index: int, fd: int, deadline: float | None = None) -> None:
        """SET_VRING_KICK: the ring starts. -1: the back end polls. Posted."""
        self._post_fd(m.SET_VRING_KICK, index, fd, deadline)

    def set_vring_call(self, index: int, fd: int, deadline: float | None = None) -> None:
        """SET_VRING_CALL; -1: no signal wanted. Posted."""
        self._post_fd(m.SET_VRING_CALL, index, fd, deadline)

    def set_vring_err(self, index: int, fd: int, deadline: float | None = None) -> None:
        """SET_VRING_ERR; -1: no signal wanted. Posted."""
        self._post_fd(m.SET_VRING_ERR, index, fd, deadline)

    def set_vring_enable(self, index: int, enabled: bool, deadline: float | None = None) -> None:
        """SET_VRING_ENABLE (needs F_PROTOCOL_FEATURES). Posted."""
        self._post(m.SET_VRING_ENABLE, m.encode_vring_state(index, int(enabled)), (), deadline)

    def get_vring_base(self, index: int, deadline: float | None = None) -> int:
        """GET_VRING_BASE: stops the ring; returns the next available index (16 bits)."""
        reply = self._ask(m.GET_VRING_BASE, m.encode_vring_state(index, 0),
                          self._deadline(deadline))
        got, base = m.decode_vring_state(reply.payload)
        if got != index or base > 0xFFFF:
            raise self.connection.protocol_error(
                f"answered GET_VRING_BASE for ring {index} with ring {got}, index {base:#x}")
        return base

    # ---- config space ----------------------------------------------------------------------

    def get_config(self, offset: int, size: int, deadline: float | None = None) -> bytes:
        """GET_CONFIG (needs PF_CONFIG): `size` bytes at `offset`, within 256.

        :raises PeerRefusedError: the back end has no such config space.
        """
        reply = self._ask(m.GET_CONFIG, m.encode_config(offset, bytes(size)),
                          self._deadline(deadline))
        if not reply.payload:
            raise PeerRefusedError(f"The {self.peer} refused to read {size} bytes of its config "
                                   f"space at {offset}", "it is of another kind, perhaps")
        try:
            got, data, _ = m.decode_config("The reply to GET_CONFIG", reply.payload)
        except ProtocolError as error:
            raise self.connection.protocol_error(f"lied: {error}") from None
        if got != offset or len(data) != size:
            raise self.connection.protocol_error(
                f"answered GET_CONFIG for {size} bytes at {offset} with {len(data)} at {got}")
        return data

    def set_config(self, offset: int, data: bytes, deadline: float | None = None) -> None:
        """SET_CONFIG (needs PF_CONFIG): the driver wrote to the config space. Posted."""
        self._post(m.SET_CONFIG, m.encode_config(offset, data), (), deadline)

    # ---- requests in flight ----------------------------------------------------------------

    def get_inflight(self, queue_count: int, queue_size: int,
                     deadline: float | None = None) -> tuple[m.Inflight, int] | None:
        """GET_INFLIGHT_FD (needs PF_INFLIGHT_SHMFD): description and descriptor, the caller's.

        None: the back end has no buffer to track requests with.
        """
        request = m.encode_inflight(m.Inflight(0, 0, queue_count, queue_size))
        reply = self._ask(m.GET_INFLIGHT_FD, request, self._deadline(deadline), max_fds=1)
        inflight = m.decode_inflight(reply.payload)
        fds = reply.take_fds()
        if inflight.mmap_size == 0:
            close_all(fds)
            return None
        size = _file_size(fds[0]) if fds else 0
        if not fds or inflight.mmap_offset + inflight.mmap_size > size:
            close_all(fds)
            raise self.connection.protocol_error(
                f"gave an in-flight buffer of {inflight.mmap_size} bytes at "
                f"{inflight.mmap_offset} in a file of {size}")
        return inflight, fds[0]

    def set_inflight(self, inflight: m.Inflight, fd: int, deadline: float | None = None) -> None:
        """SET_INFLIGHT_FD (needs PF_INFLIGHT_SHMFD). Posted."""
        self._post(m.SET_INFLIGHT_FD, m.encode_inflight(inflight), (fd,), deadline)

    # ---- waiting ---------------------------------------------------------------------------

    def finish(self, deadline: float | None = None) -> None:
        """Wait until the back end has done everything that was posted.

        :raises PeerRefusedError: it refused something; the rest was done.
        """
        deadline = self._deadline(deadline)
        with _Locked(self._lock, deadline, self.peer):
            self._collect(deadline)
            unsynced = self._unsynced
        if unsynced:
            self._get_u64(m.GET_FEATURES, deadline)

    def close(self) -> None:
        """Close the connection; a call that waits in another thread ends with an error."""
        self.connection.shutdown()
        with self._lock:
            self.connection.close()

    # ---- inside ----------------------------------------------------------------------------

    def _deadline(self, deadline: float | None) -> float:
        return time.monotonic() + self.limit if deadline is None else deadline

    def _post_fd(self, request: int, index: int, fd: int, deadline: float | None) -> None:
        value, fds = (index, (fd,)) if fd >= 0 else (index | m.VRING_NO_FD, ())
        self._post(request, m.encode_u64(value), fds, deadline)

    def _post(self, request: int, payload: bytes, fds: Sequence[int],
              deadline: float | None) -> None:
        deadline = self._deadline(deadline)
        acked = bool(self.protocol & m.PF_REPLY_ACK)
        with _Locked(self._lock, deadline, self.peer):
            if len(self._owed) >= MAX_OWED:
                self._collect(deadline)
            self.connection.send(request, payload, fds, need_reply=acked, deadline=deadline)
            if acked:
                self._owed.append((request, m.U64, 0))
            else:
                self._unsynced = True

    def _ask(self, request: int, payload: bytes, deadline: float,
             max_fds: int = 0) -> Message:
        """Send a request that has a reply of its own, and return that reply, checked.

        After a timeout the reply is still owed: the next call takes it off the stream first.
        """
        with _Locked(self._lock, deadline, self.peer):
            self.connection.send(request, payload, deadline=deadline)
            self._owed.append((request, m.FRONTEND_REQUESTS[request].reply, max_fds))
            reply = self._collect(deadline)
            assert reply is not None
            self._unsynced = False
            return reply

    def _get_u64(self, request: int, deadline: float) -> int:
        return m.decode_u64(self._ask(request, b"", deadline).payload)

    def _collect(self, deadline: float) -> Message | None:
        """Take everything owed off the stream; return the last reply.

        :raises PeerRefusedError: the first refusal among the acknowledgements.
        """
        refusal: PeerRefusedError | None = None
        reply: Message | None = None
        while self._owed:
            if reply is not None:
                reply.close()  # of a call that had given up waiting
            request, kind, max_fds = self._owed[0]
            reply = self._receive(request, kind, max_fds, deadline)
            self._owed.pop(0)
            row = m.FRONTEND_REQUESTS[request]
            code = m.decode_u64(reply.payload) if row.reply == m.NOTHING else 0
            if code and refusal is None:
                reason = os.strerror(code) if code < 200 else f"code {code:#x}"
                refusal = PeerRefusedError(f"The {self.peer} refused {row.name}: {reason}",
                                           "look at its log", code)
        if refusal is not None:
            if reply is not None:
                reply.close()
            raise refusal
        return reply

    def _receive(self, request: int, kind: int, max_fds: int, deadline: float) -> Message:
        row = m.FRONTEND_REQUESTS[request]
        reply = self.connection.recv(replies=True, deadline=deadline)
        try:
            if reply.request != request:
                raise ProtocolError(f"answered request {reply.request}",
                                    f"{row.name} ({request}) was asked")
            # An empty reply to GET_CONFIG is a refusal; its size is checked with its content.
            m.check_size(f"reply to {row.name}", kind, reply.payload)
            if len(reply.fds) > max_fds:
                raise ProtocolError(f"sent {len(reply.fds)} descriptors with a reply to "
                                    f"{row.name}", f"at most {max_fds} belong there")
        except ProtocolError as error:
            reply.close()
            raise self.connection.protocol_error(f"lied: {error.what}", error.hint) from None
        return reply


class BackendChannel:
    """Our end of the socket on which a back end makes requests of its own.

    :param on_config_change: called when the device's config space changed.
    """

    def __init__(self, fd: int, peer: str, on_config_change: Callable[[], None]) -> None:
        self.connection = Connection(fd, peer)
        self._on_config_change = on_config_change

    def fileno(self) -> int:
        """Readable when `handle_one` has something to do."""
        return self.connection.fileno()

    def handle_one(self, limit: float = 0.05) -> None:
        """Serve one request; a peer that sends half of one has `limit` seconds for the rest.

        A request that we don't serve is refused if it wants an answer, else ignored.

        :raises VhostUserError: the channel is over; `close` is the caller's.
        """
        deadline = time.monotonic() + limit
        message = self.connection.recv(replies=False, deadline=deadline)
        try:
            row = m.BACKEND_REQUESTS.get(message.request)
            done = False
            if row is not None:
                try:
                    row.check(message.payload, message.fds)
                except ProtocolError as error:
                    raise self.connection.protocol_error(f"lied: {error.what}",
                                                         error.hint) from None
                done = row.number == m.BACKEND_CONFIG_CHANGE_MSG
            if done:
                self._on_config_change()
            if message.need_reply:
                self.connection.send(message.request, m.encode_u64(0 if done else 1),
                                     reply=True, deadline=deadline)
        finally:
            message.close()

    def close(self) -> None:
        """Close the socket."""
        self.connection.close()


class _Locked:
    """`with` on a lock that is waited for until a deadline only."""

    __slots__ = ("_deadline", "_lock", "_peer")

    def __init__(self, lock: _thread.LockType, deadline: float, peer: str) -> None:
        self._lock = lock
        self._deadline = deadline
        self._peer = peer

    def __enter__(self) -> None:
        if not self._lock.acquire(True, max(0.0, self._deadline - time.monotonic())):
            raise TimedOutError(f"The {self._peer} keeps another request waiting",
                                "it hangs or is overloaded")

    def __exit__(self, *exc: object) -> None:
        self._lock.release()


def _file_size(fd: int) -> int:
    """Bytes of a file, 0 of anything else.

    Not by fstat: a vCPU's thread may not ask for the status of files (native/core/confine.c), and
    the C library makes a newfstatat of it.
    """
    try:
        return os.lseek(fd, 0, SEEK_END)
    except OSError:
        return 0
