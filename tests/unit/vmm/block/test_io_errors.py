"""BLOCK_IO_ERROR from a worker's reports, which nobody trusts; orders and their answers."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from shared.control.channel import Channel, ChannelClosed, pair
from tests.support.fake_vm import FakeVm, FakeWorker
from vmm.block import io_errors
from vmm.block.io_errors import IoErrors
from vmm.worker.orders import MAX_WAITING, Orders


class Emitted:
    def __init__(self) -> None:
        self.vm = FakeVm()
        self.events: list[tuple[str, Any]] = []
        self.vm.events.subscribe(lambda name, data, when: self.events.append((name, data)))
        self.errors = IoErrors(self.vm.events, self.vm.blocks)  # type: ignore[arg-type]

    def report(self, device: str = "disk0", **message: object) -> None:
        self.errors.report(FakeWorker(device), message)  # type: ignore[arg-type]


@pytest.mark.parametrize(("operation", "told"), [
    ("read", "read"), ("write", "write"), ("flush", "write"), ("discard", "write"),
    ("write-zeroes", "write")])
def test_a_report_becomes_an_event(operation: str, told: str) -> None:
    emitted = Emitted()
    emitted.report(operation=operation, errno=errno.EIO, count=3)
    assert emitted.events == [("BLOCK_IO_ERROR", {
        "device": "disk0", "node-name": "rootfs", "operation": told, "action": "report",
        "nospace": False, "reason": "Input/output error"})]


def test_a_full_disk_and_a_shorter_image_have_reasons_of_their_own() -> None:
    emitted = Emitted()
    emitted.report(operation="write", errno=errno.ENOSPC)
    emitted.report(operation="read", errno=errno.ENODATA)
    assert emitted.events[0][1]["nospace"] is True
    assert emitted.events[0][1]["reason"] == "No space left on device"
    assert emitted.events[1][1]["nospace"] is False
    assert emitted.events[1][1]["reason"] == "the image has become shorter"


def test_a_device_without_a_node_is_named_all_the_same() -> None:
    emitted = Emitted()
    emitted.report("other", operation="read", errno=errno.EIO)
    assert emitted.events[0][1]["device"] == "other"
    assert "node-name" not in emitted.events[0][1]


def test_a_flood_makes_one_event_a_second_for_each_device_and_operation(
        monkeypatch: pytest.MonkeyPatch) -> None:
    emitted = Emitted()
    now = [100.0]
    monkeypatch.setattr(io_errors.time, "monotonic", lambda: now[0])
    for _ in range(10000):
        emitted.report(operation="read", errno=errno.EIO)
    assert len(emitted.events) == 1
    emitted.report(operation="write", errno=errno.EIO)
    emitted.report("other", operation="read", errno=errno.EIO)
    assert len(emitted.events) == 3
    now[0] += 1
    emitted.report(operation="read", errno=errno.EIO)
    assert len(emitted.events) == 4


@pytest.mark.parametrize("message", [
    {}, {"operation": "format"}, {"operation": 5}, {"operation": None}, {"operation": b"read"},
    {"operation": ["read"]},
    {"operation": {"read": 1}}])
def test_nonsense_is_dropped(message: dict[str, object]) -> None:
    emitted = Emitted()
    emitted.report(**message)
    assert emitted.events == []


@pytest.mark.parametrize("number", [None, "EIO", -5, 0, 1 << 62, True])
def test_an_errno_that_is_none_is_eio(number: object) -> None:
    emitted = Emitted()
    emitted.report(operation="read", errno=number, count="many")
    if number is True:  # errno 1, by Python's lights
        assert emitted.events[0][1]["reason"] == "Operation not permitted"
    else:
        assert emitted.events[0][1]["reason"] == "Input/output error"


def channels() -> tuple[Orders, Channel, Channel]:
    ours, theirs = (Channel(fd, blocking=False) for fd in pair())
    return Orders(ours), ours, theirs


def test_an_order_is_answered_once() -> None:
    orders, _, theirs = channels()
    answers: list[str] = []
    serial = orders.send("resize", answers.append)
    assert theirs.recv()[0] == {"type": "resize", "serial": serial}
    orders.answered({"type": "done", "serial": serial})
    orders.answered({"type": "failed", "serial": serial, "text": "late"})
    assert answers == [""]


def test_refusals_end_of_worker_and_forgotten_orders() -> None:
    orders, _, _ = channels()
    answers: list[str] = []
    orders.answered({"type": "failed", "serial": orders.send("a", answers.append),
                     "text": "no\nway"})
    orders.answered({"type": "failed", "serial": orders.send("a", answers.append)})
    orders.answered({"type": "failed", "serial": orders.send("a", answers.append),
                     "text": "x" * 5000})
    assert orders.forget(orders.send("a", answers.append))
    assert not orders.forget(1)
    orders.send("a", answers.append)
    orders.abandon("it ended")
    orders.abandon("it ended")
    assert answers == ["no way", "the worker refused", "x" * 500, "it ended"]


@pytest.mark.parametrize("serial", [None, "1", 2, -1, b"1", True])
def test_answers_that_nobody_asked_for_are_ignored(serial: object) -> None:
    orders, _, _ = channels()
    answers: list[str] = []
    orders.send("a", answers.append)
    orders.send("a", answers.append)
    orders.answered({"type": "done", "serial": serial})
    assert answers == ([""] if serial in (2, True) else [])


def test_a_worker_that_never_answers_gets_a_bounded_number_of_orders() -> None:
    orders, _, theirs = channels()
    answers: list[str] = []
    for _ in range(MAX_WAITING):
        orders.send("a", answers.append)
        theirs.recv()
    assert orders.send("a", answers.append) == 0
    assert answers == ["the worker answers nothing"]


def test_a_worker_that_never_reads_or_is_gone() -> None:
    orders, _, theirs = channels()
    with pytest.raises(ChannelClosed):
        for _ in range(MAX_WAITING):
            orders.send("a", lambda text: None, padding="x" * 30000)
    theirs.close()
    with pytest.raises(ChannelClosed):
        orders.send("a", lambda text: None)
