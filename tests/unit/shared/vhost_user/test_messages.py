"""The wire format: numbers and sizes against the specification's C structures."""

from __future__ import annotations

import struct

import pytest

from shared.memory_regions import MemoryRegion
from shared.vhost_user import messages as m
from shared.vhost_user.errors import ProtocolError

REGION = MemoryRegion(0x1000, 0x2000, 0x7F00_0000_0000, 0x3000)


def test_numbers_run_without_a_gap() -> None:
    assert sorted(m.FRONTEND_REQUESTS) == list(range(1, 44))
    assert sorted(m.BACKEND_REQUESTS) == list(range(1, 9))


@pytest.mark.parametrize(("name", "number"), [
    ("GET_FEATURES", 1), ("SET_MEM_TABLE", 5), ("SET_VRING_ADDR", 9), ("SET_VRING_KICK", 12),
    ("GET_PROTOCOL_FEATURES", 15), ("SET_VRING_ENABLE", 18), ("SET_BACKEND_REQ_FD", 21),
    ("GET_CONFIG", 24), ("GET_INFLIGHT_FD", 31), ("RESET_DEVICE", 34), ("ADD_MEM_REG", 37),
    ("SET_STATUS", 39), ("SET_DEVICE_STATE_FD", 42),
])
def test_numbers_of_the_specification(name: str, number: int) -> None:
    assert m.FRONTEND_REQUESTS[number].name == name


def test_header() -> None:
    assert m.HEADER.pack(5, 9, 72) == struct.pack("=III", 5, 9, 72)


def test_layouts() -> None:
    assert m.encode_u64(1 << 63) == struct.pack("=Q", 1 << 63)
    assert m.encode_vring_state(3, 256) == struct.pack("=II", 3, 256)
    # vhost_vring_addr: used before avail.
    assert m.encode_vring_addr(1, 0, 0x10, 0x30, 0x20, 7) == struct.pack(
        "=IIQQQQ", 1, 0, 0x10, 0x30, 0x20, 7)
    region = struct.pack("=QQQQ", 0x1000, 0x2000, 0x7F00_0000_0000, 0x3000)
    assert m.encode_memory_table([REGION]) == struct.pack("=II", 1, 0) + region
    assert m.encode_memory_region(REGION) == bytes(8) + region
    assert m.encode_config(4, b"abc", 1) == struct.pack("=III", 4, 3, 1) + b"abc"
    inflight = struct.pack("=QQHH", 4096, 0, 2, 128)
    assert m.encode_inflight(m.Inflight(4096, 0, 2, 128)) == inflight + bytes(4)
    assert m.encode_inflight(m.Inflight(4096, 0, 2, 128), 20) == inflight
    assert m.encode_log(5, 6) == struct.pack("=QQ", 5, 6)


def test_round_trips() -> None:
    assert m.decode_u64(m.encode_u64(77)) == 77
    assert m.decode_vring_state(m.encode_vring_state(3, 9)) == (3, 9)
    assert m.decode_vring_addr(m.encode_vring_addr(1, 2, 3, 4, 5, 6)) == (1, 2, 3, 4, 5, 6)
    assert m.decode_memory_table(m.encode_memory_table([REGION, REGION])) == [REGION, REGION]
    assert m.decode_memory_region(m.encode_memory_region(REGION)) == REGION
    assert m.decode_config("X", m.encode_config(4, b"abc", 1)) == (4, b"abc", 1)
    inflight = m.decode_inflight(m.encode_inflight(m.Inflight(1, 2, 3, 4)))
    assert (inflight.mmap_size, inflight.mmap_offset) == (1, 2)
    assert (inflight.queue_count, inflight.queue_size) == (3, 4)


@pytest.mark.parametrize("count", [9, 1 << 31])
def test_memory_table_with_too_many_regions(count: int) -> None:
    payload = struct.pack("=II", count, 0) + bytes(32 * min(count, 9))
    with pytest.raises(ProtocolError, match=f"with {count} regions; at most 8"):
        m.decode_memory_table(payload)


@pytest.mark.parametrize("size", [*range(8), 9, 39, 41, 72])
def test_memory_table_of_a_wrong_size(size: int) -> None:
    payload = (struct.pack("=II", 1, 0) + bytes(64))[:size]
    with pytest.raises(ProtocolError, match="8 and 32 a region"):
        m.decode_memory_table(payload)


@pytest.mark.parametrize(("payload", "text"), [
    (b"", "payload of 0 bytes"),
    (bytes(11), "payload of 11 bytes"),
    (struct.pack("=III", 0, 4, 0) + b"abc", "says 4 bytes and carries 3"),
    (struct.pack("=III", 0, 2, 0) + b"abc", "says 2 bytes and carries 3"),
    (struct.pack("=III", 0, 0, 0), "with 0 bytes"),
    (struct.pack("=III", 254, 3, 0) + b"abc", "within 256"),
    (struct.pack("=III", 0xFFFFFFFF, 3, 0) + b"abc", "within 256"),
    (struct.pack("=III", 0, 257, 0) + bytes(257), "within 256"),
])
def test_config_that_does_not_fit(payload: bytes, text: str) -> None:
    with pytest.raises(ProtocolError, match=text):
        m.decode_config("GET_CONFIG", payload)


FIXED = {m.NOTHING: 0, m.U64: 8, m.VRING_STATE: 8, m.VRING_ADDR: 40, m.MEMORY_REGION: 40,
         m.LOG: 16, m.IOTLB: 32, m.VRING_AREA: 24, m.INFLIGHT: 24, m.SHARED_OBJECT: 16,
         m.TRANSFER: 8}
ROWS = [*m.FRONTEND_REQUESTS.values(), *m.BACKEND_REQUESTS.values()]


@pytest.mark.parametrize("row", [row for row in ROWS if row.payload in FIXED],
                         ids=lambda row: row.name)
def test_each_request_checks_its_size(row: m.Request) -> None:
    size = FIXED[row.payload]
    row.check(bytes(size), [0] * row.min_fds)
    for wrong in {size - 1, size + 1, 0, 4096} - {size, -1}:
        with pytest.raises(ProtocolError, match=f"{row.name} has a payload of {wrong} bytes"):
            row.check(bytes(wrong), [0] * row.min_fds)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_each_request_checks_its_descriptors(row: m.Request) -> None:
    payload = bytes(FIXED.get(row.payload, 8))
    row.check(payload, [0] * row.max_fds)
    for wrong in {row.min_fds - 1, row.max_fds + 1} - {-1}:
        with pytest.raises(ProtocolError, match=f"{row.name} came with {wrong} descriptors"):
            row.check(payload, [0] * wrong)
