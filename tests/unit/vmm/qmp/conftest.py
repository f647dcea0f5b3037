"""A QMP server over a fake VM, its loop in a thread."""

from __future__ import annotations

import gc
import os
import socket
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.fake_vm import FakeVm
from tests.support.qmp import QmpClient
from vmm.config.model import MonitorConfig
from vmm.qmp.server import QmpServer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


class Harness:
    """The real server with a fake VM, its loop on a thread of its own."""

    def __init__(self, folder: Path) -> None:
        self.path = str(folder / "qmp.sock")
        self.vm = FakeVm()
        self.server = QmpServer(self.vm)  # type: ignore[arg-type]
        monitor = MonitorConfig("unix")
        monitor.path = self.path
        self.server.listen([monitor])
        self.failures: list[BaseException] = []
        self.vm.loop.on_exception = self.failures.append
        self.thread = threading.Thread(target=self.vm.loop.run, daemon=True)
        self.thread.start()
        self.clients: list[QmpClient] = []

    def connect(self) -> QmpClient:
        client = QmpClient(self.path)
        self.clients.append(client)
        return client

    def raw(self) -> socket.socket:
        """A connection whose greeting is not read."""
        client = socket.socket(socket.AF_UNIX)
        client.settimeout(10)
        client.connect(self.path)
        return client

    def on_loop(self, function: Callable[[], Any]) -> Any:
        """Call on the loop's thread; return what it returns."""
        done = threading.Event()
        result: list[Any] = []

        def call() -> None:
            try:
                result.append(function())
            finally:
                done.set()

        self.vm.loop.call_soon(call)
        assert done.wait(10)
        return result[0]

    def emit(self, name: str, data: dict[str, object]) -> None:
        self.on_loop(lambda: self.vm.events.emit(name, data))

    def wait_for(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 10
        while not self.on_loop(condition):
            assert time.monotonic() < deadline
            time.sleep(0.005)

    def client_count(self) -> int:
        return len(self.server._clients)

    def close(self) -> None:
        for client in self.clients:
            client.socket.close()
        self.vm.loop.stop()
        self.thread.join(10)
        assert not self.thread.is_alive()
        self.server.close()
        self.vm.loop.close()
        assert self.failures == []


@pytest.fixture
def harness(tmp_path: Path) -> Iterator[Harness]:
    gc.collect()  # what earlier tests left to the collector
    before = len(os.listdir("/proc/self/fd"))
    harness = Harness(tmp_path)
    yield harness
    harness.close()
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before, "a descriptor leaked"


@pytest.fixture
def client(harness: Harness) -> QmpClient:
    return harness.connect()
