"""Limits on requests and bytes a second, and what they must not hold up."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from shared.throttling import LIMITS
from tests.support.guest_ring import (
    DISCARD,
    F_EVENT_IDX,
    F_VERSION_1,
    FLUSH,
    IN,
    OK,
    OUT,
    BlkRequest,
    ranges,
)
from tests.support.plane import Plane, ffi, lib

pytestmark = pytest.mark.native

SIZE = 1 << 20
FEATURES = F_VERSION_1 | F_EVENT_IDX


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(SIZE))
    return path


def limit(plane: Plane, **limits: int) -> None:
    """iops_total=N, iops_total_max=N, …"""
    native = ffi.new("struct sv_limits *")
    for i, name in enumerate(LIMITS):
        native.rate[i] = limits.pop(name.replace("-", "_"), 0)
        native.burst[i] = limits.pop(name.replace("-", "_") + "_max", 0)
    assert not limits
    assert lib.sv_plane_set_limits(plane.plane, native) == 0


def put(plane: Plane, count: int, type_: int = IN, size: int = 512,
        index: int = 0) -> list[BlkRequest]:
    """Make `count` requests available at once."""
    requests = [BlkRequest(plane.memory, type_, i,
                           b"x" * size if type_ == OUT else b"", 0 if type_ == OUT else size)
                for i in range(count)]
    ring = plane.rings[index]
    for request in requests:
        ring.add(request.buffers)
    ring.publish()
    return requests


def seconds_for(plane: Plane, count: int, type_: int = IN, size: int = 512) -> float:
    start = time.monotonic()
    put(plane, count, type_, size)
    plane.rings[0].wait_used(count)
    return time.monotonic() - start


def test_names_are_in_the_order_of_the_enum() -> None:
    names = ("SV_LIMIT_OPS", "SV_LIMIT_READ_OPS", "SV_LIMIT_WRITE_OPS", "SV_LIMIT_BYTES",
             "SV_LIMIT_READ_BYTES", "SV_LIMIT_WRITE_BYTES")
    assert [getattr(lib, name) for name in names] == list(range(len(LIMITS)))


@pytest.mark.parametrize("engine", ["io_uring", "threads"])
def test_requests_beyond_the_burst_wait(image: Path, engine: str) -> None:
    plane = Plane(str(image), engine)
    limit(plane, iops_total=100, iops_total_max=10)
    plane.start(features=FEATURES)
    # 10 at once, 20 more at 100 a second.
    assert 0.19 < seconds_for(plane, 30) < 1.0
    assert plane.counters[0].throttled >= 1
    plane.close()


def test_a_burst_is_there_again_after_a_pause(image: Path) -> None:
    plane = Plane(str(image))
    limit(plane, iops_total=100, iops_total_max=20)
    plane.start(features=FEATURES)
    seconds_for(plane, 20)
    time.sleep(0.22)  # the pause itself: a burst's time
    throttled = plane.counters[0].throttled
    seconds_for(plane, 20)
    assert plane.counters[0].throttled == throttled
    plane.close()


def test_the_default_burst_is_100_ms(image: Path) -> None:
    plane = Plane(str(image))
    limit(plane, iops_total=200)
    plane.start(features=FEATURES)
    seconds_for(plane, 20)
    assert plane.counters[0].throttled == 0
    assert seconds_for(plane, 20) > 0.08
    plane.close()


@pytest.mark.parametrize(("name", "slow", "fast"), [
    ("bps_total", OUT, FLUSH), ("bps_read", IN, OUT), ("bps_write", OUT, IN),
    ("iops_read", IN, OUT), ("iops_write", OUT, IN)])
def test_each_limit_holds_what_it_names(image: Path, name: str, slow: int, fast: int) -> None:
    plane = Plane(str(image))
    limit(plane, **{name: 50 if name.startswith("iops") else 50 * 4096})
    plane.start(features=FEATURES)
    put(plane, 40, fast, 4096 if fast != FLUSH else 0)
    plane.rings[0].wait_used(40)
    assert plane.counters[0].throttled == 0
    assert 0.08 < seconds_for(plane, 10, slow, 4096) < 1.0
    plane.close()


def test_a_request_larger_than_the_burst_goes_and_the_next_pays(image: Path) -> None:
    plane = Plane(str(image))
    limit(plane, bps_total=1 << 20, bps_total_max=4096)
    plane.start(features=FEATURES)
    assert plane.request(OUT, 0, bytes(128 << 10)).status == OK
    assert plane.counters[0].throttled == 0
    start = time.monotonic()
    assert plane.request(IN, 0, room=512).status == OK
    assert time.monotonic() - start > 0.1  # 124 KiB at 1 MiB a second
    plane.close()


def test_discards_count_as_requests_not_as_bytes(image: Path) -> None:
    plane = Plane(str(image))
    limit(plane, bps_total=512)
    plane.start(features=FEATURES)
    for _ in range(20):
        assert plane.request(DISCARD, data=ranges((0, 2048, 0))).status == OK
    limit(plane, iops_write=1)
    assert plane.request(DISCARD, data=ranges((0, 8, 0))).status == OK
    put(plane, 1, OUT)
    plane.rings[0].wait_used(1)
    assert plane.counters[0].throttled == 1
    plane.close()


def test_stop_does_not_wait_for_limits(image: Path) -> None:
    plane = Plane(str(image))
    limit(plane, iops_total=1, iops_total_max=2)
    ring = plane.start(features=FEATURES)
    requests = put(plane, 10)
    ring.wait_used(2)
    start = time.monotonic()
    base = plane.stop()
    assert time.monotonic() - start < 0.5
    # The one that was held went; what lay behind it in the ring is still there.
    assert base == 3
    ring.wait_used(1)
    assert [request.status for request in requests[:3]] == [OK] * 3
    # Its token is owed: started again, the ring takes the next one a second later.
    plane.start(ring=ring, base=base)
    ring.wait_used(1)
    plane.close()


def test_queues_share_the_limit(image: Path) -> None:
    plane = Plane(str(image), queues=2)
    limit(plane, iops_total=100, iops_total_max=10)
    for index in range(2):
        plane.start(index, features=FEATURES)
    start = time.monotonic()
    for index in range(2):
        put(plane, 20, index=index)
    for index in range(2):
        plane.rings[index].wait_used(20)
    assert 0.28 < time.monotonic() - start < 1.5
    plane.close()


def test_limits_can_change_while_a_request_waits(image: Path) -> None:
    plane = Plane(str(image))
    limit(plane, bps_total=1, bps_total_max=512)
    ring = plane.start(features=FEATURES)
    put(plane, 2)
    ring.wait_used(1)
    limit(plane)
    ring.wait_used(1, 3.0)
    plane.close()


def test_a_waiting_queue_does_not_spin(image: Path) -> None:
    plane = Plane(str(image))
    limit(plane, iops_total=2, iops_total_max=2)
    ring = plane.start(features=FEATURES)
    put(plane, 5)
    ring.wait_used(2)
    ring.calls()
    woken = plane.counters[0].wakeups
    cpu = time.process_time()
    ring.wait_used(1)
    assert time.process_time() - cpu < 0.25  # mostly this test's own waiting
    assert plane.counters[0].wakeups - woken < 20
    plane.close()


@pytest.mark.parametrize("field", ["rate", "burst"])
def test_absurd_limits_are_refused(image: Path, field: str) -> None:
    plane = Plane(str(image))
    native = ffi.new("struct sv_limits *")
    getattr(native, field)[3] = (1 << 50) + 1
    assert lib.sv_plane_set_limits(plane.plane, native) < 0
    plane.close()


def test_a_broken_ring_still_ends_what_was_held(image: Path) -> None:
    plane = Plane(str(image))
    limit(plane, iops_total=5, iops_total_max=1)
    ring = plane.start(features=FEATURES)
    requests = put(plane, 2)
    ring.wait_used(1)
    ring.put_avail(0xFFFF)
    ring.publish()
    ring.wait_used(1)
    assert requests[1].status == OK
    assert ring.wait_error()
    plane.close()


def test_stop_while_many_threads_compete(image: Path) -> None:
    plane = Plane(str(image), queues=4)
    limit(plane, iops_total=10, iops_total_max=1)
    for index in range(4):
        plane.start(index, features=FEATURES)
        put(plane, 30, index=index)
    stops = [threading.Thread(target=plane.stop, args=(index,)) for index in range(4)]
    start = time.monotonic()
    for thread in stops:
        thread.start()
    for thread in stops:
        thread.join(5)
    assert time.monotonic() - start < 1.0
    plane.close()
