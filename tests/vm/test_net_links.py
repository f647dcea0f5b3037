"""`set_link` and `netdev_replace`: what changes on a NIC whose driver is up."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.killer import children, kill
from tests.support.net_peer import Peer
from tests.support.test_vm import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.support.net_namespace import NetNamespace
    from tests.support.test_vm import TestVm

    Start = Callable[..., TestVm]

pytestmark = pytest.mark.vm

MAC = "52:54:00:01:02:03"
MAC_BYTES = bytes.fromhex("525400010203")


@pytest.fixture
def vm(start_nic_vm: Start) -> TestVm:
    vm = start_nic_vm("-smp", "2", nic=f",mac={MAC}")
    assert vm.guest("net.init 0").ok
    return vm


@pytest.fixture
def peer(namespace: NetNamespace, vm: TestVm) -> Iterator[Peer]:
    with Peer(namespace) as peer:
        yield peer


def echoed(vm: TestVm, count: int = 100) -> None:
    answer = vm.guest(f"net.echo 0 {count} 0", 60)
    assert answer.ok and answer.value("frames") == count, f"{answer}\n{vm.story()}"


def refused(vm: TestVm, command: str, /, **arguments: Any) -> str:
    reply = vm.qmp.raw(json.dumps({"execute": command, "arguments": arguments}), timeout=40)
    assert "error" in reply, reply
    return str(reply["error"]["desc"])


def status(vm: TestVm) -> int:
    return vm.guest("net.info 0").value("status")


def wait_told(vm: TestVm, times: int) -> None:
    """Until the driver has had so many config interrupts."""
    wait_until(lambda: vm.guest("net.info 0").value("changes") == times, "a config interrupt")


def is_cut(vm: TestVm, peer: Peer) -> bool:
    """No frame comes through, neither way."""
    peer.clear()
    peer.send(MAC_BYTES, range(50), 60)
    assert vm.guest("net.send 0 50 60").ok
    answer = vm.guest("net.recv 0 1 0 200")
    return not peer.numbers and answer.value("buffers") == 0


# ---- the link ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("command", "argument"), [("set_link", "name"), ("netlink_set", "id")])
@pytest.mark.parametrize("name", ["nic0", "net0"])
def test_the_link_goes_down_and_up(vm: TestVm, peer: Peer, command: str, argument: str,
                                   name: str) -> None:
    echoed(vm)
    assert status(vm) == 1
    vm.qmp.command(command, **{argument: name}, up=False)
    assert status(vm) == 0
    wait_told(vm, 1)
    assert is_cut(vm, peer)
    vm.qmp.command(command, **{argument: name}, up=True)
    assert status(vm) == 1
    wait_told(vm, 2)
    echoed(vm)


def test_a_link_that_is_down_stays_so(vm: TestVm, peer: Peer) -> None:
    """Through another worker, `stop`, a reset and another tap; the next NIC's is up."""
    vm.qmp.command("set_link", name="nic0", up=False)
    worker = next(iter(children(vm.process.pid, "sv-net")))
    kill(worker)
    wait_until(lambda: set(children(vm.process.pid, "sv-net")) - {worker}, "another worker")
    assert is_cut(vm, peer)
    vm.qmp.command("worker-restart", device="nic0")
    assert is_cut(vm, peer)
    vm.qmp.command("stop")
    vm.qmp.command("cont")
    assert is_cut(vm, peer)
    vm.qmp.command("system_reset")
    vm.wait_output(r"^ready\r?\n", 20)
    assert vm.guest("net.init 0").ok
    assert is_cut(vm, peer)
    vm.qmp.command("device_del", id="nic0")
    vm.qmp.command("netdev_add", id="n", ifname="tap0")
    vm.qmp.command("device_add", id="n", driver="virtio-net-mmio")
    assert status(vm) == 1
    echoed(vm)


def test_the_link_while_the_vm_is_paused(vm: TestVm, peer: Peer) -> None:
    vm.qmp.command("stop")
    vm.qmp.command("set_link", name="nic0", up=False)
    vm.qmp.command("cont")
    assert status(vm) == 0
    wait_told(vm, 1)
    assert is_cut(vm, peer)


def test_the_link_while_workers_change(vm: TestVm, peer: Peer) -> None:
    """Who takes over meanwhile has heard of it too."""
    from tests.support.qmp import QmpClient

    with QmpClient(str(vm.qmp_path)) as other:
        other.command("qmp_capabilities")
        for _ in range(5):
            other.socket.sendall(b'{"execute":"worker-restart","arguments":{"device":"nic0"}}')
            for up in (False, True, False):
                vm.qmp.command("set_link", name="nic0", up=up)
            while "event" in other.receive():
                pass  # the upgrade has ended
            assert is_cut(vm, peer)
            vm.qmp.command("set_link", name="nic0", up=True)
            echoed(vm)


def test_a_worker_that_does_not_hear_of_it(vm: TestVm) -> None:
    vm.qmp.command("query-status")
    worker = next(iter(children(vm.process.pid, "sv-net")))
    kill(worker, signal.SIGSTOP)
    try:
        began = time.monotonic()
        assert "does not answer" in refused(vm, "set_link", name="nic0", up=False)
        assert time.monotonic() - began < 10
        assert status(vm) == 0  # the driver was told
        wait_told(vm, 1)
    finally:
        kill(worker, signal.SIGCONT)


def test_a_worker_that_dies_when_told(vm: TestVm, peer: Peer) -> None:
    vm.qmp.command("query-status")
    for up in (False, True, False):
        for pid in children(vm.process.pid, "sv-net"):
            kill(pid)
        vm.qmp.command("set_link", name="nic0", up=up)
    wait_until(lambda: children(vm.process.pid, "sv-net"), "another worker")
    assert is_cut(vm, peer)
    vm.qmp.command("set_link", name="nic0", up=True)
    echoed(vm)


def test_links_that_are_refused(vm: TestVm) -> None:
    assert "no net dev x" in refused(vm, "set_link", name="x", up=True)
    assert "no net dev" in refused(vm, "netlink_set", id="#net.1", up=True)
    for bad in ({"name": "nic0"}, {"up": True}, {"name": "nic0", "up": "on"},
                {"name": "", "up": True}, {"id": "nic0", "up": True}):
        refused(vm, "set_link", **bad)


# ---- another tap ---------------------------------------------------------------------------------


def test_another_tap_under_traffic(vm: TestVm, namespace: NetNamespace, peer: Peer) -> None:
    namespace.persistent_tap("tap1")
    answers: list[Any] = []
    with Peer(namespace, "tap1") as other:
        thread = threading.Thread(
            target=lambda: answers.append(vm.guest("net.echo 0 8000 0 64", 90)))
        thread.start()
        wait_until(lambda: len(peer.numbers) > 200, "traffic")
        vm.qmp.command("netdev_replace", id="nic0", ifname="tap1")
        os.close(namespace.open("tap0"))  # free at once
        wait_until(lambda: len(other.numbers) > 200, "traffic on the other tap")
        vm.qmp.command("netdev_replace", id="net0", ifname="tap0")
        thread.join(90)
    assert answers and answers[0].ok and not peer.wrong and not other.wrong
    # What was on its way back by the tap that it no longer has is lost.
    assert answers[0].value("frames") >= 8000 - 2 * 64, answers
    info = vm.guest("net.info 0")
    assert (info.value("status"), info.value("changes")) == (1, 0)  # the driver noticed nothing


def test_the_next_worker_has_the_other_tap_too(vm: TestVm, namespace: NetNamespace) -> None:
    namespace.persistent_tap("tap1")
    vm.qmp.command("netdev_replace", id="nic0", ifname="tap1")
    with Peer(namespace, "tap1"):
        for pid in children(vm.process.pid, "sv-net"):
            kill(pid)
        echoed(vm)
    vm.qmp.command("device_del", id="nic0")
    os.close(namespace.open("tap1"))
    assert "not found" in refused(vm, "netdev_del", id="net0")


def test_another_tap_by_descriptor_and_with_limits(vm: TestVm, namespace: NetNamespace) -> None:
    vm.qmp.command("query-status")
    taps = namespace.tap("handed0")
    vm.qmp.send_fds(json.dumps({"execute": "getfd", "arguments": {"fdname": "t"}}), taps)
    assert vm.qmp.receive() == {"return": {}}
    os.close(taps[0])
    vm.qmp.command("netdev_replace", id="nic0", fd="t", **{"tx-packets": 100})
    with Peer(namespace, "handed0", echo=False) as peer:
        began = time.monotonic()
        assert vm.guest("net.send 0 60 60").ok
        peer.wait(60)
        assert time.monotonic() - began > 0.25  # ten at once, then 100 a second


def test_taps_that_are_refused(vm: TestVm, namespace: NetNamespace, peer: Peer) -> None:
    namespace.persistent_tap("many0", 2)
    taps = namespace.tap("handed0", 2)
    for number, fd in enumerate(taps):
        vm.qmp.send_fds(json.dumps({"execute": "getfd", "arguments": {"fdname": f"t{number}"}}),
                        [fd])
        assert vm.qmp.receive() == {"return": {}}
        os.close(fd)
    assert "queues=1" in refused(vm, "netdev_replace", id="nic0", ifname="many0", queues=2)
    assert "queues=1" in refused(vm, "netdev_replace", id="nic0", fds="t0:t1")
    assert "netdev 'net0' has it" in refused(vm, "netdev_replace", id="nic0", ifname="tap0")
    assert "is not a tap" in refused(vm, "netdev_replace", id="nic0", ifname="lo")
    assert "Tap device is missing" in refused(vm, "netdev_replace", id="nic0")
    assert "no net dev x" in refused(vm, "netdev_replace", id="x", ifname="tap1")
    for name in ("t0", "t1"):  # they wait for the next command
        vm.qmp.command("closefd", fdname=name)
    assert "handed0" not in namespace.command("ip -o link")
    os.close(namespace.tap("many0", 2)[0])  # nobody has it
    echoed(vm)


def test_another_tap_of_a_hung_worker(vm: TestVm, namespace: NetNamespace, peer: Peer) -> None:
    """It is ended, and who follows has the tap that it had."""
    namespace.persistent_tap("tap1")
    echoed(vm)
    worker = next(iter(children(vm.process.pid, "sv-net")))
    kill(worker, signal.SIGSTOP)
    assert "in time" in refused(vm, "netdev_replace", id="nic0", ifname="tap1")
    wait_until(lambda: set(children(vm.process.pid, "sv-net")) - {worker}, "another worker")
    echoed(vm)
    wait_until(lambda: len(children(vm.process.pid, "sv-net")) == 1, "no other one")
    os.close(namespace.open("tap1"))


def test_a_nic_that_goes_while_it_is_to_have_another_tap(vm: TestVm,
                                                         namespace: NetNamespace) -> None:
    namespace.persistent_tap("tap1")
    vm.qmp.command("query-status")
    vm.qmp.socket.sendall(b"".join(json.dumps(command).encode() for command in (
        {"execute": "device_del", "arguments": {"id": "nic0"}},
        {"execute": "netdev_replace", "arguments": {"id": "nic0", "ifname": "tap1"}})))
    answers = []
    while len(answers) < 2:
        answer = vm.qmp.receive()
        if "event" not in answer:
            answers.append(answer)
    assert answers[0] == {"return": {}} and "nic0" in answers[1]["error"]["desc"]
    os.close(namespace.open("tap1"))
