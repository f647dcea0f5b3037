"""The back end (worker) side: requests from a front end, checked and turned into device calls.

`Backend` owns the socket, the descriptors and the session's state; `BackendDevice` is what a
device implements.  Every field of every request is checked here, so that a device sees only
ring addresses inside guest memory, sizes within its limits and features that it offered.

What a bad request gets: an acknowledgement with a positive errno if the front end asked for
one (REPLY_ACK), an empty GET_CONFIG reply, else the end of the connection: a front end that
doesn't ask could not learn otherwise that its request was not done.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import TYPE_CHECKING

from shared.errors import SharedError
from shared.fds import OwnedFd, close_all
from shared.memory_regions import MemoryRegion, RegionTable
from shared.vhost_user import messages as m
from shared.vhost_user.connection import Connection, Message
from shared.vhost_user.errors import ProtocolError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

MAX_MEMORY_SLOTS = 32
MAX_RING_SIZE = 32768

# What this implementation serves; a device takes a subset (`BackendDevice.protocol_features`).
SERVED_FEATURES = (m.PF_MQ | m.PF_REPLY_ACK | m.PF_CONFIG | m.PF_BACKEND_REQ
                   | m.PF_BACKEND_SEND_FD | m.PF_INFLIGHT_SHMFD | m.PF_CONFIGURE_MEM_SLOTS
                   | m.PF_RESET_DEVICE | m.PF_STATUS)


class Ring:
    """One split virtqueue as the front end set it up.

    desc, avail, used are guest-physical, each part checked to lie within one memory region;
    base is the next available index to take (16 bits); kick_fd is -1 if the front end wants
    polling, call_fd and err_fd are -1 if it wants no signal.  All three are non-blocking,
    owned by `Backend` and stay open while the ring runs with them.
    """

    __slots__ = ("_user", "avail", "base", "call", "desc", "enabled", "err", "index", "kick",
                 "size", "started", "used")

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
        self.desc = self.avail = self.used = 0
        self._user: tuple[int, int, int] | None = None
        for fd in (self.kick, self.call, self.err):
            fd.close()

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


class RefusedError(SharedError):
    """A request that won't be done. `code` is the positive errno of the acknowledgement."""

    def __init__(self, code: int, what: str, hint: str = "") -> None:
        super().__init__(what, hint)
        self.code = code


_Reply = tuple[bytes, tuple[int, ...]]


class Backend:
    """One session with one front end.

    :param fd: the connected vhost-user socket; owned from now on.
    :param on_refusal: called with a line of text for every refused request.
    """

    def __init__(self, device: BackendDevice, fd: int,
                 on_refusal: Callable[[str], None] | None = None) -> None:
        self.device = device
        self.connection = Connection(fd, "front end")
        self.channel: Connection | None = None
        self.rings = [Ring(index) for index in range(device.queue_count)]
        self.memory = RegionTable()
        self.owned = False
        self.acked_features = 0
        self.acked_protocol = 0
        self.status = 0
        self._on_refusal = on_refusal
        self._offered_protocol = device.protocol_features & SERVED_FEATURES

    # ---- life ------------------------------------------------------------------------------

    def fileno(self) -> int:
        """Readable when `handle_one` has something to do."""
        return self.connection.fileno()

    def serve(self) -> None:
        """Serve until the front end closes the connection.

        :raises ConnectionLostError: that happened (the normal end).
        :raises ProtocolError: the front end broke the protocol.
        """
        while True:
            self.handle_one()

    def handle_one(self, deadline: float | None = None) -> None:
        """Receive and serve one request.

        :raises VhostUserError: the connection is over; `close` is the caller's.
        """
        message = self.connection.recv(replies=False, deadline=deadline)
        try:
            self._dispatch(message)
        finally:
            message.close()

    def config_changed(self, deadline: float | None = None) -> bool:
        """Tell the front end that the config space changed; False if it did not ask to know.

        :raises VhostUserError: the back-end channel broke.
        """
        if self.channel is None or not self.acked_protocol & m.PF_CONFIG:
            return False
        self.channel.send(m.BACKEND_CONFIG_CHANGE_MSG, deadline=deadline)
        return True

    def close(self) -> None:
        """Stop every ring, unmap guest memory, close every descriptor."""
        try:
            self._stop_rings()
            self.device.set_memory(())
        finally:
            for ring in self.rings:
                ring.forget()
            if self.channel is not None:
                self.channel.close()
                self.channel = None
            self.connection.close()

    # ---- dispatch --------------------------------------------------------------------------

    def _dispatch(self, message: Message) -> None:
        row = m.FRONTEND_REQUESTS.get(message.request)
        acked = message.need_reply and bool(self.acked_protocol & m.PF_REPLY_ACK)
        try:
            handler = _HANDLERS.get(message.request)
            if row is None or handler is None:
                raise RefusedError(errno.EOPNOTSUPP, f"Request {message.request} is not served")
            row.check(message.payload, message.fds)
            self._check_feature(row)
            reply = handler(self, message)
        except (SharedError, OSError) as error:
            self._refuse(message, row, acked, error)
            return
        if reply is not None:
            self.connection.send(message.request, reply[0], reply[1], reply=True)
        elif acked:
            self.connection.send(message.request, m.encode_u64(0), reply=True)

    def _check_feature(self, row: m.Request) -> None:
        # Some front ends ask for these two before SET_PROTOCOL_FEATURES, and may.
        early = row.number in (m.GET_QUEUE_NUM, m.GET_MAX_MEM_SLOTS)
        have = self._offered_protocol if early else self.acked_protocol
        if row.feature & ~have:
            raise RefusedError(errno.EPERM, f"{row.name} without its protocol feature",
                               "negotiate it first")

    def _refuse(self, message: Message, row: m.Request | None, acked: bool,
                error: Exception) -> None:
        if self._on_refusal is not None:
            self._on_refusal(str(error))
        if row is not None and row.number == m.GET_CONFIG:
            self.connection.send(m.GET_CONFIG, b"", reply=True)
            return
        if (row is not None and row.reply != m.NOTHING) or not acked:
            raise self.connection.protocol_error(f"sent a request that can't be done: {error}")
        code = getattr(error, "code", 0) or getattr(error, "errno", 0) or errno.EINVAL
        self.connection.send(message.request, m.encode_u64(code), reply=True)

    # ---- features and session --------------------------------------------------------------

    def _get_features(self, message: Message) -> _Reply:
        return m.encode_u64(self.device.features() | m.F_PROTOCOL_FEATURES), ()

    def _set_features(self, message: Message) -> None:
        features = m.decode_u64(message.payload)
        unknown = features & ~(self.device.features() | m.F_PROTOCOL_FEATURES)
        if unknown:
            raise RefusedError(errno.EINVAL, f"SET_FEATURES with bits {unknown:#x} not on offer")
        if self._running():
            if (features ^ self.acked_features) & ~m.F_PROTOCOL_FEATURES:
                raise RefusedError(errno.EBUSY, "SET_FEATURES while a ring runs", "stop it first")
        else:
            self.device.set_features(features & ~m.F_PROTOCOL_FEATURES)
        self.acked_features = features
        if not features & m.F_PROTOCOL_FEATURES:
            for ring in self.rings:
                self._enable(ring, True)

    def _get_protocol_features(self, message: Message) -> _Reply:
        return m.encode_u64(self._offered_protocol), ()

    def _set_protocol_features(self, message: Message) -> None:
        features = m.decode_u64(message.payload)
        unknown = features & ~self._offered_protocol
        if unknown:
            raise RefusedError(errno.EINVAL,
                               f"SET_PROTOCOL_FEATURES with bits {unknown:#x} not on offer")
        self.acked_protocol = features

    def _set_owner(self, message: Message) -> None:
        self.owned = True

    def _reset_owner(self, message: Message) -> None:
        for ring in self.rings:
            self._enable(ring, False)

    def _reset_device(self, message: Message) -> None:
        self._reset()

    def _reset(self) -> None:
        self._stop_rings()
        for ring in self.rings:
            ring.enabled = False
            ring.forget()
        self.acked_features = 0
        self.status = 0
        self.device.reset()

    def _set_status(self, message: Message) -> None:
        status = m.decode_u64(message.payload)
        if status > 0xFF:
            raise RefusedError(errno.EINVAL, f"SET_STATUS {status:#x}", "it has 8 bits")
        if status == 0:
            self._reset()
        self.status = status

    def _get_status(self, message: Message) -> _Reply:
        return m.encode_u64(self.status), ()

    def _get_queue_num(self, message: Message) -> _Reply:
        return m.encode_u64(self.device.queue_count), ()

    def _set_backend_req_fd(self, message: Message) -> None:
        fd = message.take_fds()[0]
        if not stat.S_ISSOCK(os.fstat(fd).st_mode):
            close_all((fd,))
            raise RefusedError(errno.ENOTSOCK, "SET_BACKEND_REQ_FD is not a socket")
        if self.channel is not None:
            self.channel.close()
        self.channel = Connection(fd, "front end's back-end channel")

    # ---- config space ----------------------------------------------------------------------

    def _get_config(self, message: Message) -> _Reply:
        offset, data, flags = m.decode_config("GET_CONFIG", message.payload)
        content = self.device.read_config(offset, len(data))
        assert len(content) == len(data)
        return m.encode_config(offset, content, flags), ()

    def _set_config(self, message: Message) -> None:
        offset, data, flags = m.decode_config("SET_CONFIG", message.payload)
        if flags not in (m.CONFIG_WRITABLE, m.CONFIG_MIGRATION):
            raise RefusedError(errno.EINVAL, f"SET_CONFIG with flags {flags:#x}")
        self.device.write_config(offset, data, flags == m.CONFIG_MIGRATION)

    # ---- memory ----------------------------------------------------------------------------

    def _set_mem_table(self, message: Message) -> None:
        regions = m.decode_memory_table(message.payload)
        if len(regions) != len(message.fds):
            raise ProtocolError(f"SET_MEM_TABLE with {len(regions)} regions and "
                                f"{len(message.fds)} descriptors", "one each is needed")
        for region, fd in zip(regions, message.fds, strict=True):
            _check_backing(region, fd)
        table = RegionTable(regions)
        restart = self._stop_rings()
        self.device.set_memory(list(zip(regions, message.fds, strict=True)))
        self.memory = table
        self._start_rings(restart)

    def _get_max_mem_slots(self, message: Message) -> _Reply:
        return m.encode_u64(MAX_MEMORY_SLOTS), ()

    def _add_mem_reg(self, message: Message) -> None:
        region = m.decode_memory_region(message.payload)
        if len(self.memory.regions) >= MAX_MEMORY_SLOTS:
            raise RefusedError(errno.ENOSPC, f"More than {MAX_MEMORY_SLOTS} memory regions")
        _check_backing(region, message.fds[0])
        table = RegionTable(self.memory.regions)
        table.add(region)
        restart = self._stop_rings()
        try:
            self.device.add_memory(region, message.fds[0])
            self.memory = table
        finally:
            self._start_rings(restart)

    def _rem_mem_reg(self, message: Message) -> None:
        wanted = m.decode_memory_region(message.payload)
        table = RegionTable(self.memory.regions)
        region = table.remove(wanted.guest_addr, wanted.size, wanted.user_addr)
        restart = self._stop_rings()
        self.device.remove_memory(region)
        self.memory = table
        self._start_rings(restart)

    # ---- rings -----------------------------------------------------------------------------

    def _ring(self, name: str, index: int) -> Ring:
        if index >= len(self.rings):
            raise RefusedError(errno.EINVAL, f"{name} for ring {index}",
                               f"there are {len(self.rings)}")
        return self.rings[index]

    def _stopped_ring(self, name: str, index: int) -> Ring:
        ring = self._ring(name, index)
        if ring.started:
            raise RefusedError(errno.EBUSY, f"{name} while ring {index} runs", "stop it first")
        return ring

    def _set_vring_num(self, message: Message) -> None:
        index, size = m.decode_vring_state(message.payload)
        ring = self._stopped_ring("SET_VRING_NUM", index)
        limit = min(self.device.max_queue_size, MAX_RING_SIZE)
        if size == 0 or size & (size - 1) or size > limit:
            raise RefusedError(errno.EINVAL, f"SET_VRING_NUM {size}",
                               f"it must be a power of two, at most {limit}")
        ring.size = size

    def _set_vring_addr(self, message: Message) -> None:
        index, flags, desc, used, avail, _ = m.decode_vring_addr(message.payload)
        ring = self._ring("SET_VRING_ADDR", index)
        if flags:
            raise RefusedError(errno.EINVAL, f"SET_VRING_ADDR with flags {flags:#x}",
                               "logging is not on offer")
        if desc % 16 or avail % 2 or used % 4:
            raise RefusedError(errno.EINVAL, f"Ring {index} is not aligned (descriptors "
                               f"{desc:#x}, available {avail:#x}, used {used:#x})")
        if ring.started:
            if ring.user_addresses != (desc, avail, used):
                raise RefusedError(errno.EBUSY, f"SET_VRING_ADDR while ring {index} runs",
                                   "stop it first")
            return
        ring.set_user_addresses(desc, avail, used)

    def _set_vring_base(self, message: Message) -> None:
        index, base = m.decode_vring_state(message.payload)
        ring = self._stopped_ring("SET_VRING_BASE", index)
        if base > 0xFFFF:
            raise RefusedError(errno.EINVAL, f"SET_VRING_BASE {base:#x}", "it has 16 bits")
        ring.base = base

    def _get_vring_base(self, message: Message) -> _Reply:
        index, _ = m.decode_vring_state(message.payload)
        ring = self._ring("GET_VRING_BASE", index)
        if ring.started:
            self._stop(ring)
        for fd in (ring.kick, ring.call):
            fd.close()
        return m.encode_vring_state(index, ring.base), ()

    def _set_vring_enable(self, message: Message) -> None:
        index, value = m.decode_vring_state(message.payload)
        ring = self._ring("SET_VRING_ENABLE", index)
        if value > 1:
            raise RefusedError(errno.EINVAL, f"SET_VRING_ENABLE {value}", "it must be 0 or 1")
        self._enable(ring, value == 1)

    def _vring_fd(self, message: Message, name: str) -> tuple[Ring, int]:
        """Ring and descriptor of SET_VRING_KICK, CALL or ERR; -1 with the invalid-FD flag."""
        value = m.decode_u64(message.payload)
        if value & ~(m.VRING_INDEX_MASK | m.VRING_NO_FD):
            raise RefusedError(errno.EINVAL, f"{name} {value:#x}", "only bits 0 to 8 are defined")
        ring = self._ring(name, value & m.VRING_INDEX_MASK)
        if bool(value & m.VRING_NO_FD) == bool(message.fds):
            raise RefusedError(errno.EINVAL,
                               f"{name}: descriptor and invalid-FD flag contradict each other")
        if not message.fds:
            return ring, -1
        fd = message.take_fds()[0]
        os.set_blocking(fd, False)  # a descriptor that blocks could hang the data path
        return ring, fd

    def _set_vring_kick(self, message: Message) -> None:
        ring, fd = self._vring_fd(message, "SET_VRING_KICK")
        if ring.started:
            self._stop(ring)
        ring.kick.replace(fd)
        self._start(ring)

    def _set_vring_call(self, message: Message) -> None:
        ring, fd = self._vring_fd(message, "SET_VRING_CALL")
        if ring.started:
            self.device.change_call(ring, fd)
        ring.call.replace(fd)

    def _set_vring_err(self, message: Message) -> None:
        ring, fd = self._vring_fd(message, "SET_VRING_ERR")
        ring.err.replace(fd)

    def _running(self) -> bool:
        return any(ring.started for ring in self.rings)

    def _enable(self, ring: Ring, enabled: bool) -> None:
        if ring.enabled != enabled:
            ring.enabled = enabled
            if ring.started:
                self.device.enable_ring(ring, enabled)

    def _start(self, ring: Ring) -> None:
        if ring.size == 0 or ring.user_addresses is None:
            raise RefusedError(errno.EINVAL, f"Ring {ring.index} is started without size and "
                               "addresses", "send SET_VRING_NUM and SET_VRING_ADDR first")
        ring.locate(self.memory)
        self.device.start_ring(ring)
        ring.started = True

    def _stop(self, ring: Ring) -> None:
        # Whatever the device says about the index, the ring counts as stopped.
        ring.started = False
        ring.base = self.device.stop_ring(ring) & 0xFFFF

    def _stop_rings(self) -> list[Ring]:
        stopped = [ring for ring in self.rings if ring.started]
        for ring in stopped:
            self._stop(ring)
        return stopped

    def _start_rings(self, rings: Sequence[Ring]) -> None:
        for ring in rings:
            self._start(ring)

    # ---- requests in flight ----------------------------------------------------------------

    def _inflight(self, name: str, message: Message) -> m.Inflight:
        inflight = m.decode_inflight(message.payload)
        if self._running():
            raise RefusedError(errno.EBUSY, f"{name} while a ring runs", "stop it first")
        if not 0 < inflight.queue_count <= self.device.queue_count:
            raise RefusedError(errno.EINVAL, f"{name} for {inflight.queue_count} queues",
                               f"there are {self.device.queue_count}")
        size = inflight.queue_size
        if size == 0 or size > min(self.device.max_queue_size, MAX_RING_SIZE):
            raise RefusedError(errno.EINVAL, f"{name} for queues of {size}",
                               f"at most {self.device.max_queue_size}")
        return inflight

    def _get_inflight_fd(self, message: Message) -> _Reply:
        wanted = self._inflight("GET_INFLIGHT_FD", message)
        inflight, fd = self.device.get_inflight(wanted.queue_count, wanted.queue_size)
        return m.encode_inflight(inflight, len(message.payload)), (fd,)

    def _set_inflight_fd(self, message: Message) -> None:
        inflight = self._inflight("SET_INFLIGHT_FD", message)
        fd = message.fds[0]
        end = inflight.mmap_offset + inflight.mmap_size
        if inflight.mmap_size == 0 or end > _file_size(fd):
            raise RefusedError(errno.EINVAL, f"SET_INFLIGHT_FD with a buffer that ends at {end}",
                               f"its file has {_file_size(fd)} bytes")
        self.device.set_inflight(inflight, fd)


def _to_guest(table: RegionTable, user_addr: int, size: int) -> int:
    region, offset = table.translate_user(user_addr, size)
    return region.guest_addr + offset


def _file_size(fd: int) -> int:
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise RefusedError(errno.EINVAL, "Shared memory that is not a regular file",
                           "pass a memfd or a file on tmpfs or hugetlbfs")
    return status.st_size


def _check_backing(region: MemoryRegion, fd: int) -> None:
    """A region beyond the end of its file would kill us with SIGBUS at the first access."""
    region.check()
    size = _file_size(fd)
    if region.file_offset + region.size > size:
        raise RefusedError(errno.EINVAL, f"Memory region ends at {region.file_offset:#x} + "
                           f"{region.size:#x} of a file of {size:#x} bytes")


_HANDLERS: dict[int, Callable[[Backend, Message], _Reply | None]] = {
    m.GET_FEATURES: Backend._get_features,
    m.SET_FEATURES: Backend._set_features,
    m.SET_OWNER: Backend._set_owner,
    m.RESET_OWNER: Backend._reset_owner,
    m.SET_MEM_TABLE: Backend._set_mem_table,
    m.SET_VRING_NUM: Backend._set_vring_num,
    m.SET_VRING_ADDR: Backend._set_vring_addr,
    m.SET_VRING_BASE: Backend._set_vring_base,
    m.GET_VRING_BASE: Backend._get_vring_base,
    m.SET_VRING_KICK: Backend._set_vring_kick,
    m.SET_VRING_CALL: Backend._set_vring_call,
    m.SET_VRING_ERR: Backend._set_vring_err,
    m.GET_PROTOCOL_FEATURES: Backend._get_protocol_features,
    m.SET_PROTOCOL_FEATURES: Backend._set_protocol_features,
    m.GET_QUEUE_NUM: Backend._get_queue_num,
    m.SET_VRING_ENABLE: Backend._set_vring_enable,
    m.SET_BACKEND_REQ_FD: Backend._set_backend_req_fd,
    m.GET_CONFIG: Backend._get_config,
    m.SET_CONFIG: Backend._set_config,
    m.GET_INFLIGHT_FD: Backend._get_inflight_fd,
    m.SET_INFLIGHT_FD: Backend._set_inflight_fd,
    m.RESET_DEVICE: Backend._reset_device,
    m.GET_MAX_MEM_SLOTS: Backend._get_max_mem_slots,
    m.ADD_MEM_REG: Backend._add_mem_reg,
    m.REM_MEM_REG: Backend._rem_mem_reg,
    m.SET_STATUS: Backend._set_status,
    m.GET_STATUS: Backend._get_status,
}
