"""What a worker may tell the core: every report with the fields wrong, and too many of them."""

from __future__ import annotations

import contextlib
import os
import time
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shared import log, quota
from shared.control.channel import Channel, pair
from shared.control.codec import CodecError, encode
from shared.quota import LINES, LINES_RATE, Quota
from shared.virtio.balloon import STATISTICS
from tests.support.fake_nursery import FakeNursery
from vmm.devices.virtio_balloon import GuestStatistics
from vmm.worker import process as module
from vmm.worker.process import DEAD, RUNNING, STARTING, WorkerProcess

if TYPE_CHECKING:
    from collections.abc import Iterator


class Case:
    """A worker whose process is a child of ours that sleeps, and its end of the channel."""

    def __init__(self, lines: list[str]) -> None:
        self.lines = lines
        self.nursery = FakeNursery()
        self.loop = self.nursery.loop
        ours, theirs = pair()
        self.worker = WorkerProcess(self.nursery, 1, "blk", "disk", -1, ours)  # type: ignore[arg-type]
        self.channel = Channel(theirs, blocking=False)
        self.ended: list[str] = []
        self.worker.on_end = self.ended.append
        self.pid = 0

    def clone(self) -> None:
        """The nursery has made it."""
        self.pid = os.posix_spawn("/bin/sleep", ["sleep", "60"], {})
        self.worker.cloned(self.pid, os.pidfd_open(self.pid))

    def tell(self, **message: object) -> None:
        self.channel.send(message)
        self.loop.run_once(0)

    def flood(self, data: bytes) -> None:
        """Many times, whether somebody reads it or not."""
        for _ in range(2 * module._REPORTS):
            with contextlib.suppress(OSError):
                self.channel._socket.send(data)
            self.loop.run_once(0)

    def start(self) -> None:
        self.clone()
        self.tell(type="started", stages=["seccomp"], engine="test")
        assert self.worker.state == RUNNING

    def wait_for_end(self) -> str:
        deadline = time.monotonic() + 10
        while not self.ended:
            assert time.monotonic() < deadline
            self.loop.run_once(0.1)
        return self.ended[0]

    def close(self) -> None:
        if self.worker.state != DEAD:
            self.worker.on_end = None
            self.worker.close()
        if self.worker.state != DEAD:
            self.worker.failed("the test ends")
        self.channel.close()
        self.loop.close()


@pytest.fixture
def case(monkeypatch: pytest.MonkeyPatch) -> Iterator[Case]:
    lines: list[str] = []
    monkeypatch.setattr(log, "warning", lines.append)
    monkeypatch.setattr(log, "error", lines.append)
    case = Case(lines)
    yield case
    case.close()


def test_what_the_host_lacks_is_told_before_the_start(case: Case) -> None:
    case.clone()
    case.tell(type="error", text="no landlock", stage="landlock")
    assert case.worker.state == STARTING
    assert (case.worker.lacks, case.worker.reason) == ("landlock", "no landlock")


def test_who_has_started_can_lack_nothing(case: Case) -> None:
    """It could end the VM, which is told to end where the host can't have a sandbox."""
    case.start()
    case.tell(type="error", text="I lie", stage="landlock")
    assert (case.worker.lacks, case.worker.reason) == ("", "I lie")


def test_who_says_so_before_it_is_known_can_lack_nothing(case: Case) -> None:
    case.tell(type="started", stages=[], engine="test")
    case.tell(type="error", text="I lie", stage="landlock")
    assert case.worker.state == STARTING and case.worker.lacks == ""


def test_a_flood_of_lines_is_cut_and_told_of(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(quota, "time", type("Clock", (), {"monotonic": lambda: now[0]}))
    case.worker._lines = Quota(LINES, LINES_RATE)
    case.worker._reports = Quota(module._REPORTS, module._REPORTS_RATE)
    case.start()
    for number in range(200):
        case.tell(type="log", text=f"line {number}")
    assert len(case.lines) == LINES
    now[0] += 1.0 / LINES_RATE
    case.tell(type="log", text="again")
    assert case.lines[-1] == (f"Worker blk 'disk': again ({200 - LINES} lines before it "
                              "were left out)")
    assert case.worker.state == RUNNING


@pytest.mark.parametrize("flood", [
    {"type": "log", "text": "x"}, {"type": "nonsense"}, {"type": "started"},
    {"type": "done", "serial": 1}, {"type": "io-error"}, {}])
def test_a_flood_of_reports_ends_the_worker(case: Case, flood: dict[str, object]) -> None:
    case.start()
    case.flood(encode(flood))
    assert case.wait_for_end() == "killed by signal 9: it sends more reports than it may"
    assert not case.worker.stopping  # as a crash
    # What it sent before its end is not looked at for ever.
    assert len(case.lines) <= LINES + 2


def test_messages_that_are_none_end_the_worker_too(case: Case) -> None:
    case.start()
    case.flood(b"\xff")
    assert "more reports" in case.wait_for_end()
    assert len(case.lines) <= LINES + 2


def test_answers_to_orders_are_free(case: Case) -> None:
    case.start()
    answers: list[str] = []
    for _ in range(2 * module._REPORTS):
        serial = case.worker.orders.send("resize", answers.append)
        case.tell(type="stats", values=[])  # what was asked for
        case.tell(type="done", serial=serial)
        case.channel.recv()
    assert len(answers) == 2 * module._REPORTS
    assert case.worker.state == RUNNING and not case.ended


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.text(max_size=30)
    | st.binary(max_size=30) | st.just("x" * 30000),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner,
                                                                max_size=3), max_leaves=5)
KINDS = ("started", "log", "error", "done", "failed", "io-error", "died", "stats", "port")
FIELDS = ("text", "stage", "stages", "engine", "serial", "signal", "call", "address", "operation",
          "errno", "count", "values", "port")
TAGS = st.builds(lambda values: {"type": "stats", "values": values},
                 st.lists(st.integers(-1, 40) | VALUES, max_size=40))
REPORTS = TAGS | st.builds(
    lambda kind, fields: {"type": kind, **fields}, st.sampled_from(KINDS) | VALUES,
    st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=5))


@settings(max_examples=300, deadline=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(reports=st.lists(REPORTS, max_size=8))
def test_any_fields(case: Case, reports: list[dict[str, Any]]) -> None:
    """No exception on the main loop, nothing kept that is large."""
    statistics = GuestStatistics()
    case.worker.on_report = statistics.receive
    case.worker._reports = Quota(module._REPORTS, module._REPORTS_RATE)
    for report in reports:
        try:
            case.tell(**report)
        except CodecError:
            continue  # a test's own message that is too long
    worker = case.worker
    assert isinstance(worker.reason, str) and len(worker.reason) <= module._TEXT_LIMIT
    assert len(worker.engine) <= 32 and len(worker.lacks) <= 64
    assert set(statistics.values) <= set(STATISTICS)
    assert all(0 <= value < 1 << 64 for value in statistics.values.values())
    assert len(worker.stages) <= 32 and all(len(stage) <= 64 for stage in worker.stages)
