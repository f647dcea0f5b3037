"""The back end (worker) side: requests from a front end, checked and turned into device calls.

`Backend` owns the socket, the descriptors and the session's state; `BackendDevice`
(backend_device.py) is what a device implements.  Every field of every request is checked here.

What a bad request gets: an acknowledgement with a positive errno if the front end asked for
one (REPLY_ACK), an empty GET_CONFIG reply, else the end of the connection: a front end that
doesn't ask could not learn otherwise that its request was not done.
"""

from __future__ import annotations

import _stat as stat
import errno
import posix as os

from shared.errors import RegionError, SharedError
from shared.fds import close_all
from shared.memory_regions import MemoryRegion, RegionTable
from shared.vhost_user import messages as m
from shared.vhost_user.backend_device import SERVED_FEATURES, BackendDevice, RefusedError, Ring
from shared.vhost_user.connection import Connection, Message
from shared.vhost_user.errors import ProtocolError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["Backend", "BackendDevice", "RefusedError", "Ring"]

MAX_MEMORY_SLOTS = 32
MAX_RING_SIZE = 32768

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
        return m.encode_u64(self.device.announced_queues or self.device.queue_count), ()

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
        if any(ring.waits for ring in self.rings):
            raise RefusedError(errno.EINVAL, "SET_MEM_TABLE without the memory of a ring that "
                               "runs", "stop it first")

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
        try:
            self.device.remove_memory(region)
            self.memory = table
        finally:
            self._start_rings(restart)

    # ---- rings -----------------------------------------------------------------------------

    def _ring(self, name: str, index: int) -> Ring:
        if index >= len(self.rings):
            raise RefusedError(errno.EINVAL, f"{name} for ring {index}",
                               f"there are {len(self.rings)}")
        return self.rings[index]

    def _stopped_ring(self, name: str, index: int) -> Ring:
        ring = self._ring(name, index)
        if ring.runs:
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
        if ring.runs:
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
        """Ring and descriptor of SET_VRING_KICK, CALL or ERR; -1 with the invalid-FD flag.

        The descriptor is the message's, until the ring takes it: what fails before leaks none.
        """
        value = m.decode_u64(message.payload)
        if value & ~(m.VRING_INDEX_MASK | m.VRING_NO_FD):
            raise RefusedError(errno.EINVAL, f"{name} {value:#x}", "only bits 0 to 8 are defined")
        ring = self._ring(name, value & m.VRING_INDEX_MASK)
        if bool(value & m.VRING_NO_FD) == bool(message.fds):
            raise RefusedError(errno.EINVAL,
                               f"{name}: descriptor and invalid-FD flag contradict each other")
        if not message.fds:
            return ring, -1
        fd = message.fds[0]
        os.set_blocking(fd, False)  # a descriptor that blocks could hang the data path
        return ring, fd

    def _set_vring_kick(self, message: Message) -> None:
        ring, fd = self._vring_fd(message, "SET_VRING_KICK")
        self._stop(ring)
        message.take_fds()
        ring.kick.replace(fd)
        self._start(ring)

    def _set_vring_call(self, message: Message) -> None:
        ring, fd = self._vring_fd(message, "SET_VRING_CALL")
        if ring.started:
            self.device.change_call(ring, fd)
        message.take_fds()
        ring.call.replace(fd)

    def _set_vring_err(self, message: Message) -> None:
        ring, fd = self._vring_fd(message, "SET_VRING_ERR")
        message.take_fds()
        ring.err.replace(fd)

    def _running(self) -> bool:
        return any(ring.runs for ring in self.rings)

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
        started, ring.started, ring.waits = ring.started, False, False
        if started:
            ring.base = self.device.stop_ring(ring) & 0xFFFF

    def _stop_rings(self) -> list[Ring]:
        stopped = [ring for ring in self.rings if ring.runs]
        for ring in stopped:
            self._stop(ring)
        return stopped

    def _start_rings(self, rings: Sequence[Ring]) -> None:
        """Go on after a change of guest memory. QEMU removes a region that it is about to add in
        another size while rings in it run: those wait for it."""
        for ring in rings:
            try:
                self._start(ring)
            except RegionError:
                ring.waits = True

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
