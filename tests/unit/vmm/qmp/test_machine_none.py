"""The real `Vm` behind the server, as libvirt starts it to ask what we can do: no machine."""

from __future__ import annotations

import threading

import pytest

from tests.support.qmp import QmpClient, QmpError
from vmm.cleanup import Cleanup
from vmm.config.model import MonitorConfig, VmConfig
from vmm.event_loop import EventLoop
from vmm.qmp.events import Events
from vmm.qmp.server import QmpServer
from vmm.vm import Vm


@pytest.fixture
def client(tmp_path):
    config = VmConfig()
    config.machine.kind = "none"
    loop, events, cleanup = EventLoop(), Events(), Cleanup()
    vm = Vm(config, loop, events, cleanup)
    server = QmpServer(vm)
    cleanup.push(server.close)
    monitor = MonitorConfig("unix")
    monitor.path = str(tmp_path / "qmp.sock")
    server.listen([monitor])
    vm.start(None)

    def serve() -> None:
        loop.run()
        cleanup.run()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    client = QmpClient(monitor.path)
    yield client
    loop.stop()
    thread.join(10)
    assert not thread.is_alive()
    loop.close()
    assert not (tmp_path / "qmp.sock").exists()
    client.close()


def test_probe(client):
    """The first commands of libvirt's probe, in its order."""
    for name in ("qmp_capabilities", "query-version", "query-target", "query-qmp-schema",
                 "query-commands", "query-kvm", "qom-list-types"):
        client.command(name)
    for typename in ("virtio-blk-pci", "vfio-pci", "pcie-root-port"):
        assert client.command("device-list-properties", typename=typename) == []
    for typename in ("memory-backend-file", "none-machine"):
        assert client.command("qom-list-properties", typename=typename) == []
    for name in ("query-machines", "query-cpu-definitions", "query-tpm-models", "query-tpm-types",
                 "query-command-line-options", "query-migrate-capabilities"):
        client.command(name)


@pytest.mark.parametrize("command", ["stop", "cont", "system_reset", "system_powerdown"])
def test_what_needs_a_machine_is_refused(client, command):
    with pytest.raises(QmpError, match=r"machine|prelaunch"):
        client.command(command)
    assert client.command("query-status")["status"] == "prelaunch"


def test_last_words_though_the_loop_ends_at_once(client):
    assert client.command("quit") == {}
    assert client.wait_event("SHUTDOWN")["data"] == {"guest": False, "reason": "host-qmp-quit"}
    with pytest.raises(EOFError):
        client.receive()
