"""Orders of a core that is broken: a worker answers each, obeys none that makes no sense, and goes
on serving."""

from __future__ import annotations

import contextlib
import os
import socket
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.control.channel import Channel, pair
from shared.virtio import balloon
from workers.balloon.worker import Service as BalloonService
from workers.blk.service import Service as BlkService
from workers.console.service import Service as ConsoleService
from workers.net.service import Service as NetService
from workers.null import worker as null
from workers.nursery import Reporter

if TYPE_CHECKING:
    from collections.abc import Callable

VALUES = st.recursive(
    st.none() | st.booleans() | st.sampled_from([
        0, 1, 2, 3, 5, 31, 32, 33, 64, 65, 256, 1024, 1025, 65535, 65536, -1, 1 << 31, 1 << 63,
        (1 << 64) - 1]) | st.text(max_size=10) | st.binary(max_size=10) | st.just(b"\x52\x54abcd"),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner,
                                                                max_size=2), max_leaves=4)
FIELDS = ("serial", "up", "throttling", "nr", "open", "cols", "rows", "queues", "queue-size", "mac",
          "device", "max-ports", "text")
TYPES = ("serve", "link", "resize", "limits", "open", "size", "stats", "")
DEVICES = ("blk", "net", "console", "balloon", "rng")
ORDERS = st.builds(
    lambda kind, serial, fields: {"type": kind, "serial": serial, **fields},
    st.sampled_from(TYPES) | VALUES, st.integers(0, 100),
    st.fixed_dictionaries({}, optional={
        **dict.fromkeys(FIELDS, VALUES), "device": st.sampled_from(DEVICES) | VALUES,
        "queues": st.integers(0, 10) | VALUES, "queue-size": st.just(256) | VALUES,
        "mac": st.just(b"\x52\x54abcd") | VALUES}))


def memfd(size: int) -> int:
    fd = os.memfd_create("test", os.MFD_CLOEXEC)
    os.ftruncate(fd, size)
    return fd


def stream() -> int:
    """One end of a connection whose other end is closed."""
    ours, theirs = socket.socketpair()
    theirs.close()
    return ours.detach()


DESCRIPTORS: dict[str, Callable[[], int]] = {
    "stream": stream, "memory": lambda: memfd(1 << 16), "empty": lambda: memfd(0),
    "event": lambda: os.eventfd(0), "null": lambda: os.open("/dev/null", os.O_RDWR),
    "folder": lambda: os.open("/", os.O_RDONLY)}


class Case:
    """One kind of worker and the core's end of its control channel."""

    def __init__(self, kind: str) -> None:
        ours, theirs = pair()
        self.core = Channel(ours, blocking=False)
        self.reporter = Reporter(theirs)
        self.lines: list[str] = []
        self.fds: list[int] = []
        self.service: Any = getattr(self, f"_{kind}")()

    def _keep(self, fd: int) -> int:
        self.fds.append(fd)
        return fd

    def _net(self) -> object:
        return NetService([-1], {"control": True}, None, None, self.lines.append)

    def _blk(self) -> object:
        return BlkService(self._keep(memfd(1 << 20)), {"aio": "threads"}, None, self.lines.append)

    def _console(self) -> object:
        ports = [{"nr": 0, "console": True}, {"nr": 1}]
        return ConsoleService({"port0": self._keep(stream()), "port1": self._keep(stream())},
                              {"max-ports": 2, "num-queues": 6, "ports": ports},
                              self.lines.append)

    def _balloon(self) -> object:
        return BalloonService({"num-queues": balloon.QUEUES}, None, self.lines.append)

    def _null(self) -> object:
        return null.Service(self.reporter)

    def obey(self, order: dict[str, object], descriptors: list[str]) -> None:
        service = self.service
        if isinstance(service, null.Service):
            service._obey(order, [DESCRIPTORS[name]() for name in descriptors])
            for fd in list(service._connections):
                service._handle(fd)
        else:
            service.answer(order, self.reporter)

    def close(self) -> None:
        self.service.close()
        self.core.close()
        self.reporter.close()
        for fd in self.fds:
            os.close(fd)


@pytest.mark.parametrize("kind", ["null", "net", "blk", "console", "balloon"])
@settings(max_examples=120, deadline=None)
@given(order=ORDERS, descriptors=st.lists(st.sampled_from(sorted(DESCRIPTORS)), max_size=3)
       | st.sampled_from([["stream"], ["stream", "memory"]]))
def test_any_order_is_answered(kind: str, order: dict[str, object], descriptors: list[str]
                               ) -> None:
    with contextlib.closing(Case(kind)) as case:
        before = len(os.listdir("/proc/self/fd"))
        case.obey(order, descriptors)
        answer, _ = case.core.recv()
        assert answer["serial"] == order["serial"]
        assert answer["type"] in ("done", "failed")
        assert answer["type"] == "done" or answer["text"]
        assert len(os.listdir("/proc/self/fd")) == before, "a descriptor leaked"


def test_what_is_no_socket_does_not_end_the_null_worker() -> None:
    """It serves every empty slot of the VM."""
    order: dict[str, object] = {"type": "serve", "serial": 1, "device": "blk", "queues": 1,
                                "queue-size": 256}
    with contextlib.closing(Case("null")) as case:
        case.obey(order, ["memory"])
        assert case.core.recv()[0]["type"] == "failed"
        case.obey(order, ["stream"])
        assert case.core.recv()[0]["type"] == "done"
