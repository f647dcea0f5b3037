"""Fuzz targets of the control channels: what a hostile worker may report to the core, what a broken
core may order of a worker.  And of what begins it all, the command line."""

from __future__ import annotations

import contextlib
import os
import socket
from typing import Any

from shared import log
from shared.control.channel import Channel, pair
from shared.control.codec import CodecError, encode
from shared.virtio import balloon
from tests.fuzz.guided.input import Input
from tests.support.command_lines import NUMBERS, PARTS, WHOLE, check
from tests.support.fake_nursery import FakeNursery
from vmm import cli
from vmm.devices.virtio_balloon import GuestStatistics
from vmm.errors import ConfigError
from vmm.worker.process import WorkerProcess
from workers.balloon.worker import Service as BalloonService
from workers.console.service import Service as ConsoleService
from workers.net.service import Service as NetService
from workers.null.worker import Service as NullService
from workers.nursery import Reporter

_TYPES = ("started", "log", "error", "done", "failed", "io-error", "died", "stats", "serve",
          "link", "open", "size")
_FIELDS = ("serial", "text", "stage", "stages", "engine", "signal", "call", "address", "operation",
           "errno", "count", "values", "up", "nr", "open", "cols", "rows", "queues", "queue-size",
           "mac", "device", "max-ports")
_WORDS = ("blk", "net", "console", "balloon", "read", "flush", "x" * 3000, b"\x52\x54abcd", b"",
          True, False, None, [], {}, 256, -1)


def _value(source: Input, depth: int = 3) -> object:
    kind = source.number(1)
    if kind < 0x80:
        return kind
    if kind < 0xC0:
        return _WORDS[kind % len(_WORDS)]
    if kind < 0xD0:
        return source.number(8)
    if kind < 0xE0:
        return source.bytes(kind & 15).decode("latin-1")
    if kind < 0xF0 or not depth:
        return source.bytes(kind & 15)
    return [_value(source, depth - 1) for _ in range(kind & 15)]


def _message(source: Input) -> bytes:
    """What encodes, or anything."""
    kind = source.number(1)
    if kind >= 0xE0:
        return source.bytes(source.number(1))
    fields = {_FIELDS[source.number(1) % len(_FIELDS)]: _value(source)
              for _ in range(kind >> 5)}
    with contextlib.suppress(CodecError):
        return encode({**fields, "type": _TYPES[kind % 32 % len(_TYPES)]})
    return b""


@contextlib.contextmanager
def _silence() -> Any:
    level, log._log.level = log._log.level, -1
    try:
        yield
    finally:
        log._log.level = level


def reports(data: bytes) -> None:
    """A worker's end of the control channel."""
    source = Input(data)
    nursery = FakeNursery()
    ours, theirs = pair()
    worker = WorkerProcess(nursery, 1, "balloon", "balloon", -1, ours)  # type: ignore[arg-type]
    statistics = GuestStatistics()
    worker.on_report = statistics.receive
    worker.pid = source.number(1)  # 0: the nursery has not answered
    answers: list[str] = []
    with _silence(), socket.socket(fileno=theirs) as end:
        end.setblocking(False)
        while source:
            if source.number(1) & 1:
                worker.orders.send("stats", answers.append)
            with contextlib.suppress(OSError):
                end.send(_message(source))
            nursery.loop.run_once(0)
            with contextlib.suppress(OSError):
                end.recv(1 << 16)
        # What a worker chooses is short.
        assert all(len(text) <= 2000 for text in (worker.reason, worker.engine, worker.lacks))
        assert len(worker.stages) <= 32 and len(statistics.values) <= len(balloon.STATISTICS)
        worker.failed("the input ends")
    assert nursery.forgotten == 1
    nursery.loop.close()


def _memory() -> int:
    fd = os.memfd_create("fuzz", os.MFD_CLOEXEC)
    os.ftruncate(fd, 1 << 16)
    return fd


def _events() -> int:
    return os.eventfd(0)


def _stream() -> int:
    """Connected to nobody any more."""
    ours, theirs = socket.socketpair()
    theirs.close()
    return ours.detach()


def orders(data: bytes) -> None:
    """The core's end of the control channel: each order is answered."""
    source = Input(data)
    ours, theirs = pair()
    core, reporter = Channel(ours, blocking=False), Reporter(theirs)
    ports = [socket.socketpair() for _ in range(2)]
    kind = source.number(1) % 4
    service: Any
    if kind == 0:
        service = NullService(reporter)
    elif kind == 1:
        service = NetService([-1], {"control": True}, None, None, lambda text: None)
    elif kind == 2:
        service = ConsoleService(
            {f"port{nr}": a.fileno() for nr, (a, _) in enumerate(ports)},
            {"max-ports": 2, "num-queues": 6, "ports": [{"nr": 0, "console": True}, {"nr": 1}]},
            lambda text: None)
    else:
        service = BalloonService({"num-queues": balloon.QUEUES}, None, lambda text: None)
    for _ in range(20):
        if not source:
            break
        fds = [(_memory, _events, _stream)[source.number(1) % 3]()
               for _ in range(source.number(1) % 4)]
        with contextlib.suppress(OSError):
            socket.send_fds(core._socket, [_message(source)], fds)
        for fd in fds:
            os.close(fd)
        order, got = reporter.receive_order() or ({}, [])
        if kind == 0:
            service._obey(order, got)
            for fd in list(service._connections):
                service._handle(fd)
        else:
            for fd in got:
                os.close(fd)
            service.answer(order, reporter)
        assert core.recv()[0]["type"] in ("done", "failed")
    service.close()
    core.close()
    reporter.close()
    for a, b in ports:
        a.close()
        b.close()


def command_line(data: bytes) -> None:
    """One that holds together, with what the input changes in it."""
    source = Input(data)
    left = source.number(4)
    groups = [list(group) for number, group in enumerate(WHOLE) if not left >> number & 1]
    while source and groups:
        kind = source.number(1)
        group = groups[source.number(1) % len(groups)]
        parts = group[1].split(",")
        at = source.number(1) % len(parts)
        key = parts[at].partition("=")[0]
        if kind < 0x40:
            parts[at] = f"{key}={NUMBERS[kind % len(NUMBERS)]}"
        elif kind < 0x80:
            parts.insert(at, PARTS[source.number(1) % len(PARTS)])
        elif kind < 0xA0:
            parts[at] = f"{key}={source.bytes(kind & 31).decode('utf-8', 'surrogateescape')}"
        elif kind < 0xC0:
            parts[at] = source.bytes(kind & 31).decode("utf-8", "surrogateescape")
        elif kind < 0xE0:
            del parts[at]
        else:
            groups.append([group[0], PARTS[source.number(1) % len(PARTS)]])
        group[1] = ",".join(parts)
    words = [word for group in groups for word in group]
    try:
        check(cli.parse(words))
    except cli.Answer:
        pass
    except ConfigError as error:
        assert error.what and len(error.what) < 5000
