"""The back end against a scripted front end: every field wrong once."""

from __future__ import annotations

import errno
import os
import struct

import pytest

from shared.memory_regions import MemoryRegion
from shared.vhost_user import messages as m
from shared.vhost_user.errors import ConnectionLostError, ProtocolError
from tests.support.backend_session import AVAIL, DESC, REGION, SIZE, USED, USER, Session

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


@pytest.mark.parametrize("name", [m.SET_VRING_KICK, m.SET_VRING_CALL, m.SET_VRING_ERR])
def test_a_descriptor_that_can_not_be_used_does_not_stay_open(running: Session, name: int) -> None:
    useless = os.open("/", os.O_PATH)
    running.fds.append(useless)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        assert running.acked(name, m.encode_u64(0), (useless,)) == errno.EBADF
    assert len(os.listdir("/proc/self/fd")) == before
    assert running.backend.rings[0].started


def test_a_call_that_the_device_refuses_does_not_stay_open(running: Session) -> None:
    fd = running.eventfd()
    before = len(os.listdir("/proc/self/fd"))
    running.device.fail = OSError(errno.EMFILE, "no")
    assert running.acked(m.SET_VRING_CALL, m.encode_u64(0), (fd,)) == errno.EMFILE
    assert len(os.listdir("/proc/self/fd")) == before
