"""Where the server listens: unix, TCP and inherited sockets, and what that costs at the start."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shared.errors import StratovirtError
from tests.support.fake_vm import FakeVm
from vmm.config.model import MonitorConfig
from vmm.errors import ConfigError
from vmm.qmp.server import QmpServer

ROOT = Path(__file__).parents[4]


def serve_one(vm: FakeVm, server: QmpServer, client: socket.socket) -> bytes:
    client.setblocking(False)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        vm.loop.run_once(0.01)
        try:
            return client.recv(4096)
        except BlockingIOError:
            continue
    raise TimeoutError


def test_tcp_listener():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    vm = FakeVm()
    server = QmpServer(vm)
    monitor = MonitorConfig("tcp")
    monitor.host, monitor.port = "127.0.0.1", port
    server.listen([monitor])
    with socket.create_connection(("127.0.0.1", port)) as client:
        assert serve_one(vm, server, client).startswith(b'{"QMP"')
        server.close()
    vm.loop.close()


def test_inherited_listener(tmp_path):
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "s"))
    listener.listen()
    vm = FakeVm()
    server = QmpServer(vm)
    monitor = MonitorConfig("fd")
    monitor.chardev, monitor.fd = "charmonitor", listener.detach()
    server.listen([monitor])
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(tmp_path / "s"))
        assert serve_one(vm, server, client).startswith(b'{"QMP"')
        server.close()
    assert (tmp_path / "s").exists()  # not ours to remove
    vm.loop.close()


@pytest.mark.parametrize("make", [
    lambda: os.open("/dev/null", os.O_RDONLY), lambda: socket.socket(socket.AF_UNIX).detach(),
    lambda: 9999,
])
def test_inherited_descriptor_that_does_not_listen(make):
    monitor = MonitorConfig("fd")
    monitor.chardev, monitor.fd = "charmonitor", make()
    vm = FakeVm()
    server = QmpServer(vm)
    with pytest.raises(ConfigError, match=f"charmonitor.*descriptor {monitor.fd}"):
        server.listen([monitor])
    server.close()
    vm.loop.close()
    if monitor.fd != 9999:
        os.close(monitor.fd)


def test_socket_file_is_removed_at_the_end(tmp_path):
    vm = FakeVm()
    server = QmpServer(vm)
    monitor = MonitorConfig("unix")
    monitor.path = str(tmp_path / "qmp.sock")
    server.listen([monitor])
    assert Path(monitor.path).is_socket()
    server.close()
    assert not Path(monitor.path).exists()
    vm.loop.close()


def test_address_in_use_leaves_the_other_listener_alone(harness):
    vm = FakeVm()
    server = QmpServer(vm)
    monitor = MonitorConfig("unix")
    monitor.path = harness.path
    with pytest.raises(StratovirtError, match=harness.path):
        server.listen([monitor])
    server.close()
    vm.loop.close()
    assert harness.connect().command("query-name") == {"name": "fake"}


def test_listening_loads_nothing_slow(tmp_path):
    code = f"""
import sys
before = set(sys.modules)
sys.path.insert(0, {str(ROOT)!r})
from vmm.qmp.events import Events
from vmm.qmp.server import QmpServer
from vmm.event_loop import EventLoop
from vmm.config.model import MonitorConfig
class Vm:
    loop = EventLoop()
    events = Events()
server = QmpServer(Vm())
monitor = MonitorConfig("unix")
monitor.path = {str(tmp_path / "s")!r}
server.listen([monitor])
Vm.events.emit("STOP", {{}})
print(*sorted(set(sys.modules) - before))
server.close()
"""
    run = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True,
                         timeout=30, check=True)
    loaded = set(run.stdout.split())
    slow = {"json", "re", "socket", "typing", "enum", "dataclasses", "logging", "collections",
            "threading", "subprocess", "vmm.qmp.connection", "vmm.qmp.registry",
            "vmm.qmp.message"}
    assert not loaded & slow
