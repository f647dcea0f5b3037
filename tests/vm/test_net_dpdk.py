"""DPDK's test program as a guest's NIC: a vhost-user back end that is nobody's relation."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.support.capabilities import require
from tests.support.net_peer import Peer
from tests.support.test_vm import wait_until
from tests.vm.test_net_hostile import MAC_BYTES, echoed, foreign

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.support.net_namespace import NetNamespace
    from tests.support.test_vm import TestVm

    Start = Callable[..., TestVm]

pytestmark = pytest.mark.vm

TAP = "dtap0"


@pytest.fixture
def testpmd(namespace: NetNamespace, tmp_path: Path) -> Iterator[Path]:
    """The socket of one that polls between a vhost-user port and a tap of its own."""
    require("dpdk")
    path = tmp_path / "dpdk.sock"
    line = ["dpdk-testpmd", "--no-huge", "--no-shconf", "-m", "128", "--no-pci", "--no-telemetry",
            "--lcores", "0@0,1@0", "--vdev", f"net_vhost0,iface={path},queues=1",
            "--vdev", f"net_tap0,iface={TAP}", "--", "--forward-mode=io", "--auto-start",
            "--total-num-mbufs=8192"]
    process = namespace.run(lambda: subprocess.Popen(
        line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    try:
        wait_until(lambda: process.poll() is not None or namespace.is_up(TAP), "DPDK's tap")
        assert process.poll() is None, process.communicate()[0]
        yield path
    finally:
        process.kill()
        process.communicate()


def test_frames_through_dpdk(start_nic_vm: Start, namespace: NetNamespace, testpmd: Path) -> None:
    with Peer(namespace, TAP) as peer:
        vm = foreign(start_nic_vm, testpmd, "-smp", "2")
        assert vm.guest("net.init 0").value("features") & 1 << 17 == 0  # no control queue
        assert vm.guest("net.info 0").value("mac") == int.from_bytes(MAC_BYTES, "big")
        for _ in range(2):
            echoed(vm)
            vm.qmp.command("stop")
            vm.qmp.command("cont")
            echoed(vm)
            vm.qmp.command("system_reset")
            vm.wait_output(r"^ready\r?\n", 20)
        echoed(vm)
        assert not peer.wrong
        vm.qmp.command("quit")
        assert vm.wait() == 0
