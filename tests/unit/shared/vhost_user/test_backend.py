"""The back end against a scripted front end: every request, every field wrong once."""

from __future__ import annotations

import errno
import os
import socket
import struct
import time
from collections.abc import Iterator

import pytest

from shared.memory_regions import MemoryRegion
from shared.vhost_user import messages as m
from shared.vhost_user.backend import Backend
from shared.vhost_user.connection import Connection
from shared.vhost_user.errors import ConnectionLostError, ProtocolError
from tests.support.fake_backend import FEATURES, FakeBackendDevice

SIZE = 1 << 20
USER = 0x7F00_0000_0000
REGION = MemoryRegion(0x10_0000, SIZE, USER, 0)
DESC, AVAIL, USED = USER, USER + 0x1000, USER + 0x2000


class Session:
    """A front end that speaks message by message; the back end answers in the same thread."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        self.device = FakeBackendDevice()
        self.refusals: list[str] = []
        self.backend = Backend(self.device, theirs.detach(), self.refusals.append)
        self.front = Connection(ours.detach(), "back end")
        self.fds: list[int] = []
        self.ram = self.memfd(SIZE)

    def memfd(self, size: int) -> int:
        fd = os.memfd_create("ram")
        os.ftruncate(fd, size)
        self.fds.append(fd)
        return fd

    def eventfd(self) -> int:
        fd = os.eventfd(0)
        self.fds.append(fd)
        return fd

    def tell(self, request: int, payload: bytes = b"", fds: tuple[int, ...] = (),
             need_reply: bool = False) -> None:
        self.front.send(request, payload, fds, need_reply=need_reply)
        self.backend.handle_one(time.monotonic() + 5)

    def ask(self, request: int, payload: bytes = b"") -> bytes:
        self.tell(request, payload)
        reply = self.front.recv(replies=True, deadline=time.monotonic() + 5)
        assert reply.request == request
        self.fds += reply.take_fds()
        return reply.payload

    def acked(self, request: int, payload: bytes = b"", fds: tuple[int, ...] = ()) -> int:
        """Send with NEED_REPLY, return the acknowledgement."""
        self.tell(request, payload, fds, need_reply=True)
        reply = self.front.recv(replies=True, deadline=time.monotonic() + 5)
        assert (reply.request, reply.fds) == (request, [])
        return m.decode_u64(reply.payload)

    def done(self, request: int, payload: bytes = b"", fds: tuple[int, ...] = ()) -> None:
        assert self.acked(request, payload, fds) == 0, self.refusals

    def negotiate(self, protocol: int | None = None) -> None:
        offered = m.decode_u64(self.ask(m.GET_PROTOCOL_FEATURES))
        self.tell(m.SET_PROTOCOL_FEATURES, m.encode_u64(offered if protocol is None else protocol))
        self.tell(m.SET_OWNER)

    def configure(self, index: int = 0, size: int = 64) -> None:
        """Features, memory and everything of a ring but its kick."""
        self.done(m.SET_FEATURES, m.encode_u64(1 << 32 | m.F_PROTOCOL_FEATURES))
        self.done(m.SET_MEM_TABLE, m.encode_memory_table([REGION]), (self.ram,))
        self.done(m.SET_VRING_NUM, m.encode_vring_state(index, size))
        self.done(m.SET_VRING_BASE, m.encode_vring_state(index, 5))
        self.done(m.SET_VRING_ADDR, m.encode_vring_addr(index, 0, DESC, USED, AVAIL))
        self.done(m.SET_VRING_CALL, m.encode_u64(index), (self.eventfd(),))

    def start(self, index: int = 0) -> None:
        self.configure(index)
        self.done(m.SET_VRING_KICK, m.encode_u64(index), (self.eventfd(),))
        self.done(m.SET_VRING_ENABLE, m.encode_vring_state(index, 1))

    def close(self) -> None:
        self.front.close()
        self.backend.close()
        for fd in self.fds:
            os.close(fd)


@pytest.fixture
def session() -> Iterator[Session]:
    before = len(os.listdir("/proc/self/fd"))
    result = Session()
    result.negotiate()
    yield result
    result.close()
    assert len(os.listdir("/proc/self/fd")) == before, "descriptors leaked"


@pytest.fixture
def running(session: Session) -> Session:
    session.start()
    session.device.calls.clear()
    return session


# ---- the good way --------------------------------------------------------------------------


def test_features(session: Session) -> None:
    assert m.decode_u64(session.ask(m.GET_FEATURES)) == FEATURES | m.F_PROTOCOL_FEATURES
    assert m.decode_u64(session.ask(m.GET_QUEUE_NUM)) == 2
    assert m.decode_u64(session.ask(m.GET_MAX_MEM_SLOTS)) == 32
    session.done(m.SET_FEATURES, m.encode_u64(1 << 9 | m.F_PROTOCOL_FEATURES))
    assert session.device.calls == [("set_features", 1 << 9)]


def test_a_ring_starts_with_its_kick(session: Session) -> None:
    session.configure()
    assert not any(call[0] == "start_ring" for call in session.device.calls)
    session.done(m.SET_VRING_KICK, m.encode_u64(0), (session.eventfd(),))
    # Guest-physical, disabled until SET_VRING_ENABLE.
    assert session.device.calls[-1] == ("start_ring", 0, 64, 0x10_0000, 0x10_1000, 0x10_2000, 5,
                                        False)
    ring = session.backend.rings[0]
    assert ring.kick_fd >= 0
    assert ring.call_fd >= 0
    assert not os.get_blocking(ring.kick_fd)
    session.done(m.SET_VRING_ENABLE, m.encode_vring_state(0, 1))
    session.done(m.SET_VRING_ENABLE, m.encode_vring_state(0, 1))
    session.done(m.SET_VRING_ENABLE, m.encode_vring_state(0, 0))
    assert session.device.calls[-2:] == [("enable_ring", 0, True), ("enable_ring", 0, False)]


def test_without_protocol_features_rings_are_enabled_at_once(session: Session) -> None:
    session.configure()
    session.done(m.SET_FEATURES, m.encode_u64(1 << 32))
    session.done(m.SET_VRING_KICK, m.encode_u64(0), (session.eventfd(),))
    assert session.device.calls[-1][-1] is True


def test_get_vring_base_stops(running: Session) -> None:
    running.device.served = 3
    assert m.decode_vring_state(running.ask(m.GET_VRING_BASE, m.encode_vring_state(0, 0))) == (0, 8)
    assert running.device.calls == [("stop_ring", 0)]
    assert running.backend.rings[0].kick_fd == -1
    assert running.backend.rings[0].call_fd == -1
    # Asked again, it says the same and stops nothing.
    assert m.decode_vring_state(running.ask(m.GET_VRING_BASE, m.encode_vring_state(0, 0))) == (0, 8)
    assert running.device.calls == [("stop_ring", 0)]
    running.done(m.SET_VRING_KICK, m.encode_u64(0), (running.eventfd(),))
    assert running.device.calls[-1][:2] == ("start_ring", 0)
    assert running.device.calls[-1][6] == 8


def test_base_wraps_at_16_bits(running: Session) -> None:
    running.device.served = 0xFFFF
    assert m.decode_vring_state(running.ask(m.GET_VRING_BASE, m.encode_vring_state(0, 0))) == (0, 4)


def test_polling_without_descriptors(session: Session) -> None:
    session.configure()
    session.done(m.SET_VRING_CALL, m.encode_u64(m.VRING_NO_FD))
    session.done(m.SET_VRING_KICK, m.encode_u64(m.VRING_NO_FD))
    assert session.backend.rings[0].kick_fd == -1
    assert session.backend.rings[0].call_fd == -1
    assert session.device.calls[-1][0] == "start_ring"


def test_call_changes_while_running(running: Session) -> None:
    running.done(m.SET_VRING_CALL, m.encode_u64(0), (running.eventfd(),))
    running.done(m.SET_VRING_CALL, m.encode_u64(m.VRING_NO_FD))
    assert running.device.calls == [("change_call", 0, True), ("change_call", 0, False)]


def test_a_new_kick_restarts(running: Session) -> None:
    running.done(m.SET_VRING_KICK, m.encode_u64(0), (running.eventfd(),))
    assert [call[0] for call in running.device.calls] == ["stop_ring", "start_ring"]


def test_memory_changes_with_rings_at_rest(running: Session) -> None:
    more = MemoryRegion(0x100_0000, 0x1000, USER + 0x1000_0000, 0)
    running.done(m.ADD_MEM_REG, m.encode_memory_region(more), (running.ram,))
    running.done(m.REM_MEM_REG, m.encode_memory_region(more))
    running.done(m.SET_MEM_TABLE, m.encode_memory_table([REGION, more]),
                 (running.ram, running.ram))
    assert [call[0] for call in running.device.calls] == [
        "stop_ring", "add_memory", "start_ring", "stop_ring", "remove_memory", "start_ring",
        "stop_ring", "set_memory", "start_ring"]


def test_rem_mem_reg_closes_a_descriptor_that_came(session: Session) -> None:
    session.done(m.ADD_MEM_REG, m.encode_memory_region(REGION), (session.ram,))
    session.done(m.REM_MEM_REG, m.encode_memory_region(REGION), (session.ram,))
    assert session.backend.memory.regions == []


def test_memory_that_no_longer_holds_a_running_ring(running: Session) -> None:
    other = MemoryRegion(0x100_0000, SIZE, USER + 0x1000_0000, 0)
    assert running.acked(m.SET_MEM_TABLE, m.encode_memory_table([other]),
                         (running.ram,)) == errno.EINVAL
    assert not running.backend.rings[0].started


def test_config(session: Session) -> None:
    reply = session.ask(m.GET_CONFIG, m.encode_config(4, bytes(8)))
    assert m.decode_config("", reply)[:2] == (4, bytes(range(4, 12)))
    reply = session.ask(m.GET_CONFIG, m.encode_config(56, bytes(8)))
    assert m.decode_config("", reply)[1] == bytes([56, 57, 58, 59, 0, 0, 0, 0])
    session.done(m.SET_CONFIG, m.encode_config(32, b"\x01"))
    session.done(m.SET_CONFIG, m.encode_config(0, b"\x01", m.CONFIG_MIGRATION))
    assert session.device.calls == [("write_config", 32, b"\x01", False),
                                    ("write_config", 0, b"\x01", True)]


def test_config_change_goes_over_the_back_end_channel(session: Session) -> None:
    assert session.backend.config_changed() is False
    ours, theirs = socket.socketpair()
    session.done(m.SET_BACKEND_REQ_FD, b"", (theirs.fileno(),))
    assert session.backend.config_changed() is True
    assert ours.recv(100) == struct.pack("=III", 2, 1, 0)
    session.done(m.SET_BACKEND_REQ_FD, b"", (theirs.fileno(),))  # replaced, the old one closed
    ours.close()
    theirs.close()
    with pytest.raises(ConnectionLostError):
        session.backend.config_changed()


@pytest.mark.parametrize("size", [20, 24])
def test_inflight(session: Session, size: int) -> None:
    reply = session.ask(m.GET_INFLIGHT_FD, m.encode_inflight(m.Inflight(0, 0, 2, 128), size))
    assert len(reply) == size
    inflight = m.decode_inflight(reply)
    assert (inflight.queue_count, inflight.queue_size) == (2, 128)
    assert os.fstat(session.fds[-1]).st_size == inflight.mmap_size
    session.done(m.SET_INFLIGHT_FD, m.encode_inflight(inflight, size), (session.fds[-1],))
    assert session.device.calls[-1] == ("set_inflight", inflight.mmap_size, 2)
    os.close(session.device.inflight_fd)


def test_status_and_reset(running: Session) -> None:
    running.done(m.SET_STATUS, m.encode_u64(0xF))
    assert m.decode_u64(running.ask(m.GET_STATUS)) == 0xF
    running.done(m.SET_STATUS, m.encode_u64(0))
    assert running.device.calls == [("stop_ring", 0), ("reset",)]
    assert running.backend.rings[0].size == 0
    assert running.backend.memory.regions == [REGION]


def test_reset_device(running: Session) -> None:
    running.done(m.RESET_DEVICE)
    assert running.device.calls == [("stop_ring", 0), ("reset",)]
    assert running.acked(m.SET_VRING_KICK, m.encode_u64(0), (running.eventfd(),)) == errno.EINVAL


def test_reset_owner_disables(running: Session) -> None:
    running.done(m.RESET_OWNER)
    assert running.device.calls == [("enable_ring", 0, False)]


def test_close_stops_and_unmaps(running: Session) -> None:
    running.backend.close()
    assert running.device.calls == [("stop_ring", 0), ("set_memory", [])]


# ---- every field wrong ---------------------------------------------------------------------

EINVAL, EBUSY = errno.EINVAL, errno.EBUSY


def region(guest: int = 0x10_0000, size: int = SIZE, user: int = USER, offset: int = 0) -> bytes:
    return m.encode_memory_region(MemoryRegion(guest, size, user, offset))


@pytest.mark.parametrize(("request_", "payload", "code"), [
    (m.SET_FEATURES, m.encode_u64(1 << 9 | 1 << 63), EINVAL),
    (m.SET_PROTOCOL_FEATURES, m.encode_u64(1 << 14), EINVAL),
    (m.SET_VRING_NUM, m.encode_vring_state(2, 64), EINVAL),
    (m.SET_VRING_NUM, m.encode_vring_state(0xFFFFFFFF, 64), EINVAL),
    (m.SET_VRING_NUM, m.encode_vring_state(0, 0), EINVAL),
    (m.SET_VRING_NUM, m.encode_vring_state(0, 65), EINVAL),
    (m.SET_VRING_NUM, m.encode_vring_state(0, 512), EINVAL),
    (m.SET_VRING_NUM, m.encode_vring_state(0, 1 << 31), EINVAL),
    (m.SET_VRING_BASE, m.encode_vring_state(2, 0), EINVAL),
    (m.SET_VRING_BASE, m.encode_vring_state(0, 0x10000), EINVAL),
    (m.SET_VRING_ADDR, m.encode_vring_addr(2, 0, DESC, USED, AVAIL), EINVAL),
    (m.SET_VRING_ADDR, m.encode_vring_addr(0, 1, DESC, USED, AVAIL), EINVAL),
    (m.SET_VRING_ADDR, m.encode_vring_addr(0, 2, DESC, USED, AVAIL), EINVAL),
    (m.SET_VRING_ADDR, m.encode_vring_addr(0, 0, DESC + 8, USED, AVAIL), EINVAL),
    (m.SET_VRING_ADDR, m.encode_vring_addr(0, 0, DESC, USED + 2, AVAIL), EINVAL),
    (m.SET_VRING_ADDR, m.encode_vring_addr(0, 0, DESC, USED, AVAIL + 1), EINVAL),
    (m.SET_VRING_ENABLE, m.encode_vring_state(2, 1), EINVAL),
    (m.SET_VRING_ENABLE, m.encode_vring_state(0, 2), EINVAL),
    (m.SET_VRING_KICK, m.encode_u64(2 | m.VRING_NO_FD), EINVAL),
    (m.SET_VRING_KICK, m.encode_u64(0x200 | m.VRING_NO_FD), EINVAL),
    (m.SET_VRING_KICK, m.encode_u64(1 << 63 | m.VRING_NO_FD), EINVAL),
    (m.SET_VRING_KICK, m.encode_u64(0), EINVAL),
    (m.SET_VRING_CALL, m.encode_u64(2 | m.VRING_NO_FD), EINVAL),
    (m.SET_VRING_CALL, m.encode_u64(0), EINVAL),
    (m.SET_VRING_ERR, m.encode_u64(2 | m.VRING_NO_FD), EINVAL),
    (m.SET_VRING_ERR, m.encode_u64(0), EINVAL),
    (m.SET_STATUS, m.encode_u64(0x100), EINVAL),
    (m.SET_CONFIG, m.encode_config(32, b"\x01", 2), EINVAL),
    (m.SET_CONFIG, m.encode_config(0, b"\x01"), errno.EACCES),
    (m.SET_CONFIG, m.encode_config(256, b"\x01"), EINVAL),
    (m.SET_MEM_TABLE, m.encode_memory_table([REGION]), EINVAL),       # no descriptor
    (m.REM_MEM_REG, region(), EINVAL),                                # never added
    (m.SET_VRING_ENDIAN, m.encode_vring_state(0, 0), errno.EOPNOTSUPP),
    (m.SEND_RARP, bytes(8), errno.EOPNOTSUPP),
    (m.IOTLB_MSG, bytes(32), None),                                   # has a reply of its own
    (0, b"", errno.EOPNOTSUPP),
    (44, b"", errno.EOPNOTSUPP),
    (0xFFFFFFFF, b"x" * 100, errno.EOPNOTSUPP),
])
def test_wrong_values_are_refused(session: Session, request_: int, payload: bytes,
                                  code: int | None) -> None:
    if code is None:
        with pytest.raises(ProtocolError):
            session.tell(request_, payload, need_reply=True)
        return
    assert session.acked(request_, payload) == code
    assert len(session.refusals) == 1
    assert session.device.calls == []
    session.ask(m.GET_FEATURES)  # the session goes on


def test_wrong_values_without_reply_ack_end_the_session(session: Session) -> None:
    with pytest.raises(ProtocolError, match="SET_VRING_NUM 65"):
        session.tell(m.SET_VRING_NUM, m.encode_vring_state(0, 65))
    with pytest.raises(ProtocolError):
        session.backend.handle_one()


def test_need_reply_counts_only_where_it_was_negotiated() -> None:
    session = Session()
    session.negotiate(m.PF_MQ)
    session.tell(m.SET_VRING_NUM, m.encode_vring_state(0, 64), need_reply=True)
    assert session.ask(m.GET_QUEUE_NUM) == m.encode_u64(2)  # no acknowledgement came before
    with pytest.raises(ProtocolError):
        session.tell(m.SET_VRING_NUM, m.encode_vring_state(0, 65), need_reply=True)
    session.close()


@pytest.mark.parametrize(("request_", "payload", "fds"), [
    (m.GET_CONFIG, m.encode_config(0, b"x"), 0), (m.SET_CONFIG, m.encode_config(32, b"x"), 0),
    (m.SET_BACKEND_REQ_FD, b"", 1), (m.GET_INFLIGHT_FD, bytes(24), 0), (m.RESET_DEVICE, b"", 0),
    (m.ADD_MEM_REG, region(), 1), (m.REM_MEM_REG, region(), 0), (m.GET_STATUS, b"", 0),
    (m.SET_STATUS, bytes(8), 0),
])
def test_requests_without_their_protocol_feature(request_: int, payload: bytes, fds: int) -> None:
    session = Session()
    session.negotiate(m.PF_REPLY_ACK)
    if request_ == m.GET_CONFIG:
        assert session.ask(request_, payload) == b""
    elif m.FRONTEND_REQUESTS[request_].reply:
        with pytest.raises(ProtocolError, match="without its protocol feature"):
            session.tell(request_, payload)
    else:
        assert session.acked(request_, payload, (session.ram,) * fds) == errno.EPERM
    session.close()


@pytest.mark.parametrize("payload", [
    b"", bytes(11), struct.pack("=III", 0, 8, 0), struct.pack("=III", 0, 0, 0),
    struct.pack("=III", 250, 8, 0) + bytes(8), struct.pack("=III", 0, 300, 0) + bytes(300),
])
def test_get_config_answers_nonsense_with_nothing(session: Session, payload: bytes) -> None:
    assert session.ask(m.GET_CONFIG, payload) == b""


def test_get_vring_base_of_a_ring_that_is_not(session: Session) -> None:
    with pytest.raises(ProtocolError, match="GET_VRING_BASE for ring 2"):
        session.tell(m.GET_VRING_BASE, m.encode_vring_state(2, 0))


SERVED = [m.FRONTEND_REQUESTS[n] for n in (
    m.SET_FEATURES, m.SET_OWNER, m.RESET_OWNER, m.SET_MEM_TABLE, m.SET_VRING_NUM,
    m.SET_VRING_ADDR, m.SET_VRING_BASE, m.SET_VRING_KICK, m.SET_VRING_CALL, m.SET_VRING_ERR,
    m.SET_PROTOCOL_FEATURES, m.SET_VRING_ENABLE, m.SET_BACKEND_REQ_FD, m.SET_CONFIG,
    m.SET_INFLIGHT_FD, m.RESET_DEVICE, m.ADD_MEM_REG, m.REM_MEM_REG, m.SET_STATUS)]
GETTERS = [m.FRONTEND_REQUESTS[n] for n in (
    m.GET_FEATURES, m.GET_VRING_BASE, m.GET_PROTOCOL_FEATURES, m.GET_QUEUE_NUM,
    m.GET_INFLIGHT_FD, m.GET_MAX_MEM_SLOTS, m.GET_STATUS)]
RIGHT_SIZE = {m.NOTHING: 0, m.U64: 8, m.VRING_STATE: 8, m.VRING_ADDR: 40, m.MEMORY_TABLE: 40,
              m.MEMORY_REGION: 40, m.CONFIG: 13, m.INFLIGHT: 24}


@pytest.mark.parametrize("row", SERVED, ids=lambda row: row.name)
def test_wrong_size(session: Session, row: m.Request) -> None:
    right = RIGHT_SIZE[row.payload]
    for size in {max(right - 1, 0), right + 1} - {right}:
        assert session.acked(row.number, bytes(size), (session.ram,) * row.min_fds) == EINVAL
    assert session.device.calls == []


@pytest.mark.parametrize("row", GETTERS, ids=lambda row: row.name)
def test_wrong_size_of_a_question(session: Session, row: m.Request) -> None:
    with pytest.raises(ProtocolError, match=f"{row.name} has a payload"):
        session.tell(row.number, bytes(RIGHT_SIZE[row.payload] + 1))


# More than 8 are refused by the connection.
@pytest.mark.parametrize("row", [row for row in SERVED if row.max_fds < m.MAX_FDS],
                         ids=lambda row: row.name)
def test_too_many_descriptors(session: Session, row: m.Request) -> None:
    payload = bytes(RIGHT_SIZE[row.payload])
    assert session.acked(row.number, payload, (session.ram,) * (row.max_fds + 1)) == EINVAL
    assert session.device.calls == []


@pytest.mark.parametrize("row", [row for row in SERVED if row.min_fds], ids=lambda row: row.name)
def test_missing_descriptor(session: Session, row: m.Request) -> None:
    assert session.acked(row.number, bytes(RIGHT_SIZE[row.payload])) == EINVAL


@pytest.mark.parametrize(("regions", "fds"), [
    ([REGION], 0), ([REGION], 2), ([], 1), ([REGION] * 2, 2),          # counts; overlap
    ([MemoryRegion(0, 0, USER, 0)], 1),                                # empty
    ([MemoryRegion(0, SIZE + 1, USER, 0)], 1),                         # beyond the file
    ([MemoryRegion(0, SIZE, USER, 1)], 1),
    ([MemoryRegion(0, 1 << 63, USER, 1 << 63)], 1),
    ([MemoryRegion((1 << 64) - 1, SIZE, USER, 0)], 1),                 # wraps
    ([MemoryRegion(0, SIZE, (1 << 64) - 1, 0)], 1),
])
def test_memory_tables_that_do_not_hold(session: Session, regions: list[MemoryRegion],
                                        fds: int) -> None:
    assert session.acked(m.SET_MEM_TABLE, m.encode_memory_table(regions),
                         (session.ram,) * fds) == EINVAL
    assert session.device.calls == []


def test_memory_that_is_no_file(session: Session) -> None:
    fd = session.eventfd()
    assert session.acked(m.SET_MEM_TABLE, m.encode_memory_table([REGION]), (fd,)) == EINVAL
    assert session.acked(m.ADD_MEM_REG, region(), (fd,)) == EINVAL


def test_memory_regions_one_by_one(session: Session) -> None:
    session.done(m.ADD_MEM_REG, region(), (session.ram,))
    assert session.acked(m.ADD_MEM_REG, region(), (session.ram,)) == EINVAL
    assert session.acked(m.ADD_MEM_REG, region(user=0), (session.ram,)) == EINVAL
    assert session.acked(m.ADD_MEM_REG, region(guest=0x20_0000, user=0, offset=1),
                         (session.ram,)) == EINVAL
    for wrong in (region(guest=0), region(size=SIZE - 1), region(user=0)):
        assert session.acked(m.REM_MEM_REG, wrong) == EINVAL
    session.done(m.REM_MEM_REG, region(offset=99))  # the offset is ignored
    for i in range(32):
        session.done(m.ADD_MEM_REG, region(guest=i << 20, user=USER + (i << 20)), (session.ram,))
    assert session.acked(m.ADD_MEM_REG, region(guest=1 << 40, user=0),
                         (session.ram,)) == errno.ENOSPC


@pytest.mark.parametrize(("request_", "payload", "fds", "code"), [
    (m.SET_FEATURES, m.encode_u64(0), 0, EBUSY),
    (m.SET_VRING_NUM, m.encode_vring_state(0, 32), 0, EBUSY),
    (m.SET_VRING_BASE, m.encode_vring_state(0, 1), 0, EBUSY),
    (m.SET_VRING_ADDR, m.encode_vring_addr(0, 0, DESC + 16, USED, AVAIL), 0, EBUSY),
    (m.SET_INFLIGHT_FD, m.encode_inflight(m.Inflight(4096, 0, 2, 64)), 1, EBUSY),
    (m.SET_VRING_ADDR, m.encode_vring_addr(0, 0, DESC, USED, AVAIL), 0, 0),  # no change
    (m.SET_FEATURES, m.encode_u64(1 << 32 | m.F_PROTOCOL_FEATURES), 0, 0),
])
def test_what_a_running_ring_forbids(running: Session, request_: int, payload: bytes, fds: int,
                                     code: int) -> None:
    assert running.acked(request_, payload, (running.ram,) * fds) == code
    assert running.device.calls == []


@pytest.mark.parametrize("missing", [m.SET_VRING_NUM, m.SET_VRING_ADDR, m.SET_MEM_TABLE])
def test_kick_of_a_ring_that_is_not_set_up(session: Session, missing: int) -> None:
    if missing != m.SET_MEM_TABLE:
        session.done(m.SET_MEM_TABLE, m.encode_memory_table([REGION]), (session.ram,))
    if missing != m.SET_VRING_NUM:
        session.done(m.SET_VRING_NUM, m.encode_vring_state(0, 64))
    if missing != m.SET_VRING_ADDR:
        session.done(m.SET_VRING_ADDR, m.encode_vring_addr(0, 0, DESC, USED, AVAIL))
    assert session.acked(m.SET_VRING_KICK, m.encode_u64(0), (session.eventfd(),)) == EINVAL
    assert not session.backend.rings[0].started


@pytest.mark.parametrize(("desc", "used", "avail"), [
    (USER + SIZE - 16, USED, AVAIL), (DESC, USER + SIZE - 8, AVAIL), (DESC, USED, USER + SIZE - 8),
    (USER - 16, USED, AVAIL), (0, USED, AVAIL), ((1 << 64) - 16, USED, AVAIL),
])
def test_rings_outside_of_memory(session: Session, desc: int, used: int, avail: int) -> None:
    session.configure()
    session.done(m.SET_VRING_ADDR, m.encode_vring_addr(0, 0, desc, used, avail))
    assert session.acked(m.SET_VRING_KICK, m.encode_u64(0), (session.eventfd(),)) == EINVAL
    assert not session.backend.rings[0].started


@pytest.mark.parametrize("inflight", [
    m.Inflight(4096, 0, 0, 64), m.Inflight(4096, 0, 3, 64), m.Inflight(4096, 0, 2, 0),
    m.Inflight(4096, 0, 2, 257), m.Inflight(0, 0, 2, 64), m.Inflight(SIZE + 1, 0, 2, 64),
    m.Inflight(SIZE, 1, 2, 64), m.Inflight((1 << 64) - 1, (1 << 64) - 1, 2, 64),
])
def test_inflight_buffers_that_do_not_hold(session: Session, inflight: m.Inflight) -> None:
    assert session.acked(m.SET_INFLIGHT_FD, m.encode_inflight(inflight),
                         (session.ram,)) == EINVAL
    assert session.device.calls == []


def test_back_end_channel_must_be_a_socket(session: Session) -> None:
    assert session.acked(m.SET_BACKEND_REQ_FD, b"", (session.eventfd(),)) == errno.ENOTSOCK


def test_errors_of_the_device_are_refusals(session: Session) -> None:
    session.device.fail = OSError(errno.ENOMEM, "no")
    assert session.acked(m.SET_MEM_TABLE, m.encode_memory_table([REGION]),
                         (session.ram,)) == errno.ENOMEM
    assert session.backend.memory.regions == []
    session.device.fail = OSError(errno.EIO, "no")
    assert session.ask(m.GET_CONFIG, m.encode_config(0, b"x")) == b""


def test_end_of_the_front_end(session: Session) -> None:
    session.front.close()
    with pytest.raises(ConnectionLostError):
        session.backend.serve()
