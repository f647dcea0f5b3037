"""The layout of statistics pages: what is written is read, and nothing else is believed."""

from __future__ import annotations

import itertools
import os
import struct

import pytest

from native import _dataplane, _devices
from shared import statistics
from shared.statistics import (
    BUCKETS,
    HEADER_BYTES,
    RECORDS,
    bucket_range,
    decode_page,
    encode_header,
    is_page_name,
    page_bytes,
    page_name,
)

ffi, lib = _dataplane.ffi, _dataplane.lib


def page(queues: int = 2, vm: str = "vm", device: str = "disk") -> bytearray:
    data = bytearray(page_bytes("blk", queues))
    data[:HEADER_BYTES] = encode_header("blk", queues, 4711, vm, device)
    return data


def test_the_record_is_the_c_structure() -> None:
    """Every field where the data plane has it."""
    record = RECORDS["blk"]
    assert record.bytes == ffi.sizeof("struct sv_blk_counters")
    assert lib.SV_BLK_BUCKETS == BUCKETS
    counters = ffi.new("struct sv_blk_counters *")
    for i in range(record.bytes // 8):
        ffi.cast("uint64_t *", counters)[i] = i
    values, histograms = record.decode(bytes(ffi.buffer(counters)), 0)
    arrays = {"failed": counters.failed, "invalid": counters.invalid}
    for name, value in values.items():
        prefix, _, rest = name.partition("_")
        if prefix in arrays:
            assert value == arrays[prefix][record.histograms.index(rest)], name
        elif name.endswith("_ns"):
            assert value == counters.total_ns[record.histograms.index(name[:-3])], name
        else:
            assert value == getattr(counters, name), name
    for i, name in enumerate(record.histograms):
        assert histograms[name] == list(counters.latency[i])


@pytest.mark.parametrize("kind", ["rng", "console", "balloon"])
def test_the_record_of_a_small_device_is_the_c_structure(kind: str) -> None:
    """What the engine counts, then what the kind does."""
    record, name = RECORDS[kind], f"struct sv_{kind}_counters"
    assert record.bytes == _devices.ffi.sizeof(name)
    counters = _devices.ffi.new(name + " *")
    for i in range(record.bytes // 8):
        _devices.ffi.cast("uint64_t *", counters)[i] = i
    for field, value in record.decode(bytes(_devices.ffi.buffer(counters)), 0)[0].items():
        place = counters.ring if hasattr(counters.ring, field) else counters
        assert value == getattr(place, field), field


def test_a_page_says_whose_it_is() -> None:
    data = page(vm="web", device="disk0")
    struct.pack_into("=Q", data, HEADER_BYTES + RECORDS["blk"].bytes, 77)  # reads of queue 1
    read = decode_page(bytes(data))
    assert read is not None
    assert (read.kind, read.core, read.vm, read.device) == ("blk", 4711, "web", "disk0")
    assert [queue["reads"] for queue in read.counters] == [0, 77]
    assert len(read.histograms[0]["read"]) == BUCKETS


@pytest.mark.parametrize(("at", "value"), [
    (0, b"X"), (8, struct.pack("=I", statistics.VERSION + 1)), (12, struct.pack("=I", 0)),
    (16, struct.pack("=I", 9)), (20, struct.pack("=I", 3)), (20, b"\xff" * 4),
    (24, struct.pack("=I", 8)), (28, struct.pack("=I", 64))])
def test_a_header_that_lies_is_no_page(at: int, value: bytes) -> None:
    data = page()
    data[at:at + len(value)] = value
    assert decode_page(bytes(data)) is None


def test_a_page_cut_anywhere_is_no_page() -> None:
    data = bytes(page(1))
    for length in (0, 1, HEADER_BYTES - 1, HEADER_BYTES, len(data) - 1):
        assert decode_page(data[:length]) is None
    assert decode_page(data) is not None


def test_random_bytes_behind_a_header_are_numbers() -> None:
    for _ in range(50):
        data = page(1)
        data[32:] = os.urandom(len(data) - 32)
        read = decode_page(bytes(data))
        assert read is not None
        assert read.vm.isprintable()
        assert read.device.isprintable()


def test_buckets_cover_every_time_once() -> None:
    ends = [bucket_range(bucket) for bucket in range(BUCKETS)]
    assert ends[0] == (0, 2048)
    assert ends[1] == (2048, 4096)
    assert ends[-1][1] == 1 << 63
    for (_, end), (start, _) in itertools.pairwise(ends):
        assert end == start


@pytest.mark.parametrize(("vm", "device"), [
    ("", "disk"), ("a/../b", "x y"), ("ü" * 200, "d" * 300), ("..", ".")])
def test_names_are_safe_file_names(vm: str, device: str) -> None:
    name = page_name(1, vm, device)
    assert is_page_name(name)
    assert name.isascii()
    assert len(name) < 200
    assert "/" not in name
    assert name.startswith(statistics.PREFIX + "1.")


@pytest.mark.parametrize("name", ["", "other", "stratovirt./../x", "stratovirt." + "x" * 250])
def test_other_files_are_not_ours(name: str) -> None:
    assert not is_page_name(name)
