"""NICs come and go: the manual's commands, at every moment of a guest's life, under traffic."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.killer import children, kill
from tests.support.net_peer import PEER, Peer
from tests.support.test_vm import VmFailure, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support.net_namespace import NetNamespace
    from tests.support.test_vm import Answer, TestVm

    Start = Callable[..., TestVm]

pytestmark = pytest.mark.vm

PROMPT = 3.0  # seconds; generous, as the machine is small and busy
MAC = "52:54:00:01:02:03"
MAC_BYTES = bytes.fromhex("525400010203")


@pytest.fixture
def vm(start_nic_vm: Start) -> TestVm:
    return start_nic_vm("-smp", "2", netdev="")


def add(vm: TestVm, name: str = "net-0", addr: str = "0x0", ifname: str = "tap0",
        **more: Any) -> None:
    """As the manual has it: the id names the back end."""
    vm.qmp.command("netdev_add", id=name, ifname=ifname)
    vm.qmp.command("device_add", id=name, driver="virtio-net-mmio", addr=addr, **more)


def remove(vm: TestVm, name: str = "net-0") -> None:
    vm.qmp.command("device_del", id=name)


def refused(vm: TestVm, command: str, **arguments: Any) -> str:
    reply = vm.qmp.raw(json.dumps({"execute": command, "arguments": arguments}))
    assert "error" in reply, reply
    desc = reply["error"]["desc"]
    assert isinstance(desc, str) and desc
    return desc


def echoed(vm: TestVm, nic: int = 0, count: int = 200) -> Answer:
    answer = vm.guest(f"net.echo {nic} {count} 0", 60)
    assert answer.ok and answer.value("frames") == count, f"{answer}\n{vm.story()}"
    return answer


def link(vm: TestVm, nic: int = 0) -> int:
    return vm.guest(f"net.info {nic}").value("status")


def worker_of(vm: TestVm, name: str = "net-0") -> int:
    pid = next(w["pid"] for w in vm.qmp.command("query-workers") if w["device"] == name)
    assert isinstance(pid, int)
    return pid


# ---- the manual ----------------------------------------------------------------------------------


def test_the_manuals_commands(vm: TestVm, namespace: NetNamespace) -> None:
    add(vm)
    assert link(vm) == 1
    with Peer(namespace) as peer:
        echoed(vm)
        assert not peer.wrong
    first = vm.qmp.raw('{"execute":"device_del","arguments":{"id":"net-0"}}')
    assert first == {"return": {}}
    event = vm.qmp.events[-1]
    assert event["event"] == "DEVICE_DELETED"
    assert event["data"] == {"device": "net-0", "path": "net-0"}
    assert link(vm) == 0
    assert vm.guest("net.send 0 300 0").ok  # into the void, but no hang
    assert "not found" in refused(vm, "netdev_del", id="net-0")  # it went with the device


def test_same_ids_at_once_again_and_again(vm: TestVm, namespace: NetNamespace) -> None:
    """The tap is free when `device_del` is answered: for this VM, and for anybody."""
    for _ in range(15):
        add(vm)
        remove(vm)
        os.close(namespace.open("tap0"))
    add(vm)
    with Peer(namespace):
        echoed(vm)
    wait_until(lambda: len(children(vm.process.pid, "sv-net")) == 1, "the end of the workers")


def test_pipelined(vm: TestVm) -> None:
    cycle = [("netdev_add", {"id": "n", "ifname": "tap0"}),
             ("device_add", {"id": "n", "driver": "virtio-net-mmio", "addr": "0x1"}),
             ("device_del", {"id": "n"})] * 6
    vm.qmp.command("query-status")
    vm.qmp.socket.sendall("".join(json.dumps({"execute": name, "arguments": arguments})
                                  for name, arguments in cycle).encode())
    answers: list[dict[str, Any]] = []
    while len(answers) < len(cycle):
        answer = vm.qmp.receive()
        if "event" not in answer:
            answers.append(answer)
    assert answers == [{"return": {}}] * len(cycle)


def test_a_tap_of_the_vms_own_comes_and_goes(vm: TestVm, namespace: NetNamespace) -> None:
    for _ in range(3):
        add(vm, ifname="fresh0")
        assert "fresh0" in namespace.command("ip -o link")
        with Peer(namespace, "fresh0"):
            echoed(vm, count=50)
        remove(vm)
        assert "fresh0" not in namespace.command("ip -o link")


def test_a_driver_that_is_up_is_told(vm: TestVm, namespace: NetNamespace) -> None:
    assert vm.guest("net.init 1").ok
    before = vm.guest("net.info 1").value("changes")
    began = time.monotonic()
    add(vm, addr="0x1")
    wait_until(lambda: vm.guest("net.info 1").value("changes") > before, "a config interrupt")
    assert time.monotonic() - began < PROMPT
    assert link(vm, 1) == 1
    with Peer(namespace):
        echoed(vm, 1)
    remove(vm)
    wait_until(lambda: vm.guest("net.info 1").value("changes") > before + 1, "another one")
    assert link(vm, 1) == 0


@pytest.mark.parametrize("used", [False, True])
def test_while_paused(vm: TestVm, namespace: NetNamespace, used: bool) -> None:
    if used:
        assert vm.guest("net.init 0").ok
    vm.qmp.command("stop")
    add(vm)
    remove(vm)
    add(vm)
    assert vm.qmp.command("query-status")["status"] == "paused"
    vm.qmp.command("cont")
    with Peer(namespace):
        echoed(vm)


def test_before_the_guest_runs(start_nic_vm: Start, namespace: NetNamespace) -> None:
    vm = start_nic_vm("-S", netdev="")
    add(vm, mac=MAC)
    vm.qmp.command("cont")
    assert vm.guest("net.info 0").value("mac") == int.from_bytes(MAC_BYTES, "big")
    with Peer(namespace):
        echoed(vm)


def test_unplugged_and_plugged_under_traffic(vm: TestVm, namespace: NetNamespace) -> None:
    add(vm)
    answers: list[Any] = []
    with Peer(namespace) as peer:
        assert vm.guest("net.init 0").ok
        thread = threading.Thread(
            target=lambda: answers.append(vm.guest("net.echo 0 6000 0 64", 90)))
        thread.start()
        for _ in range(6):
            seen = len(peer.numbers)
            wait_until(lambda: len(peer.numbers) > seen + 100, "traffic")  # noqa: B023
            began = time.monotonic()
            remove(vm)
            assert time.monotonic() - began < PROMPT
            add(vm)
        thread.join(90)
    assert answers and answers[0].ok, answers
    assert answers[0].value("frames") > 4000 and not peer.wrong


def test_before_the_driver_is_up(vm: TestVm, namespace: NetNamespace) -> None:
    """It starts and stops all the time."""
    stop = threading.Event()
    hung: list[Exception] = []

    def probe() -> None:
        try:
            while not stop.is_set():
                for command in ("net.init 0", "net.send 0 10 60", "net.reset 0"):
                    if not vm.guest(command).ok:
                        raise VmFailure(command)
        except Exception as error:
            hung.append(error)

    thread = threading.Thread(target=probe)
    thread.start()
    try:
        for _ in range(12):
            add(vm)
            remove(vm)
        add(vm)
    finally:
        stop.set()
        thread.join(40)
    assert not hung, hung
    with Peer(namespace):
        echoed(vm)


# ---- empty slots ---------------------------------------------------------------------------------


def test_empty_slots_answer_at_once(vm: TestVm) -> None:
    for nic in (0, 1):
        assert vm.guest(f"net.init {nic}").ok
        began = time.monotonic()
        for command in ("0 0 00", "0 1 01", "1 0 0000000000000000", "1 1 525400000001", "2 0 0100",
                        "3 0", "5 0 0000000000000000"):
            assert vm.guest(f"net.ctrl {nic} {command}").ok, command
        assert vm.guest(f"net.ctrl {nic} 0 0 07").text == "net.ctrl ack=1"
        assert vm.guest(f"net.send {nic} 300 0").ok
        assert time.monotonic() - began < PROMPT
        assert link(vm, nic) == 0
    assert len(children(vm.process.pid, "sv-null")) == 1  # one for all


def test_unused_slots_cost_no_process(vm: TestVm) -> None:
    assert vm.guest("echo").ok
    assert not children(vm.process.pid, "sv-null") and not children(vm.process.pid, "sv-net")


def passes(vm: TestVm, namespace: NetNamespace, to: bytes, own: bytes, tag: bytes = b"") -> bool:
    """Whether such a frame comes, before one to the guest's `own` address."""
    with Peer(namespace, echo=False) as peer:
        peer.send_raw(to + PEER + tag + b"\x90\x00" + bytes(60))
        peer.send(own, [1], 60)
        answer = vm.guest("net.recv 0 1 1")
        assert answer.ok, answer
        return answer.value("other") > 0


def test_what_a_driver_asked_of_an_empty_slot_holds(vm: TestVm, namespace: NetNamespace) -> None:
    assert vm.guest("net.init 0").ok
    own = vm.guest("net.info 0").value("mac").to_bytes(6, "big")
    assert vm.guest("net.ctrl 0 0 0 00").ok
    assert vm.guest("net.ctrl 0 2 0 0700").ok
    assert vm.guest("net.ctrl 0 1 0 010000005254000000990000000000").text == "net.ctrl ack=0"
    add(vm)
    for _ in range(2):
        assert passes(vm, namespace, bytes.fromhex("525400000099"), own)
        assert not passes(vm, namespace, bytes.fromhex("525400000098"), own)
        assert passes(vm, namespace, own, own, b"\x81\x00\x00\x07")
        assert not passes(vm, namespace, own, own, b"\x81\x00\x00\x08")
        kill(worker_of(vm))  # and for who comes after the one that came
    assert vm.guest("net.ctrl 0 2 0 0800").ok
    remove(vm)
    assert vm.guest("net.ctrl 0 2 1 0700").ok
    add(vm)
    assert passes(vm, namespace, own, own, b"\x81\x00\x00\x08")
    assert not passes(vm, namespace, own, own, b"\x81\x00\x00\x07")
    assert vm.guest("net.init 0").ok  # the driver begins afresh
    assert passes(vm, namespace, bytes.fromhex("525400000098"), own)


def test_an_address_that_a_driver_has_set_holds(vm: TestVm, namespace: NetNamespace) -> None:
    assert vm.guest("net.init 0").ok
    assert vm.guest("net.ctrl 0 0 0 00").ok
    assert vm.guest("net.ctrl 0 1 1 525400000077").ok
    before = vm.guest("net.info 0").value("mac").to_bytes(6, "big")
    add(vm)
    own = bytes.fromhex("525400000077")
    assert not passes(vm, namespace, before, own)


def test_the_null_worker_may_die(vm: TestVm, namespace: NetNamespace) -> None:
    assert vm.guest("net.init 0").ok and vm.guest("net.init 1").ok
    assert vm.guest("net.ctrl 0 2 0 0700").ok
    for _ in range(3):
        before = set(children(vm.process.pid, "sv-null"))
        for pid in before:
            kill(pid)
        wait_until(lambda gone=before: set(children(vm.process.pid, "sv-null")) - gone,
                   "another null worker")
        for nic in (0, 1):
            assert vm.guest(f"net.send {nic} 300 0").ok
            assert vm.guest(f"net.ctrl {nic} 0 0 00").ok
    add(vm)
    own = vm.guest("net.info 0").value("mac").to_bytes(6, "big")
    assert passes(vm, namespace, own, own, b"\x81\x00\x00\x07")


def test_the_null_worker_dies_as_a_nic_comes(vm: TestVm, namespace: NetNamespace) -> None:
    assert vm.guest("net.init 0").ok
    for _ in range(5):
        for pid in children(vm.process.pid, "sv-null"):
            kill(pid)
        add(vm)
        with Peer(namespace):
            echoed(vm, count=50)
        remove(vm)
        assert vm.guest("net.send 0 300 0").ok


# ---- what is kept, and what is not ---------------------------------------------------------------


def test_addresses_of_nics_that_come(vm: TestVm, namespace: NetNamespace) -> None:
    namespace.persistent_tap("tap1")
    assert vm.guest("net.init 0").ok and vm.guest("net.init 1").ok
    slots = [vm.guest(f"net.info {nic}").value("mac") for nic in (0, 1)]
    given = int.from_bytes(MAC_BYTES, "big")
    add(vm, mac=MAC)
    assert vm.guest("net.info 0").value("mac") == given
    vm.qmp.command("netdev_add", id="b", ifname="tap1")
    assert f"Another NIC has the address {MAC}" in refused(
        vm, "device_add", id="b", driver="virtio-net-mmio", addr="0x1", mac=MAC)
    vm.qmp.command("device_add", id="b", driver="virtio-net-mmio", addr="0x1")
    assert vm.guest("net.info 1").value("mac") == slots[1]
    remove(vm, "b")
    remove(vm)
    # The address moves to the other slot: who comes to the first one then has another one.
    add(vm, "b", "0x1", "tap1", mac=MAC)
    add(vm)
    macs = [vm.guest(f"net.info {nic}").value("mac") for nic in (0, 1)]
    assert macs[1] == given and macs[0] != given


def test_a_driver_that_is_up_keeps_its_address(vm: TestVm, namespace: NetNamespace) -> None:
    assert vm.guest("net.init 0").ok
    assert vm.guest("net.ctrl 0 0 0 00").ok
    own = vm.guest("net.info 0").value("mac").to_bytes(6, "big")
    add(vm, mac=MAC)
    assert not passes(vm, namespace, MAC_BYTES, own)
    assert vm.guest("net.init 0").ok
    assert vm.guest("net.ctrl 0 0 0 00").ok
    assert not passes(vm, namespace, own, MAC_BYTES)


def test_nothing_is_kept(vm: TestVm) -> None:
    """Descriptors, processes and pages of NICs that came and went are gone."""
    assert vm.guest("net.init 0").ok

    def count() -> tuple[int, ...]:
        pid = vm.process.pid
        return (len(os.listdir(f"/proc/{pid}/fd")), len(children(pid)),
                len(os.listdir(f"/proc/{pid}/task")),
                sum(f".{pid}." in name for name in os.listdir("/dev/shm")))

    def cycle() -> None:
        add(vm)
        assert vm.guest("net.send 0 10 0").ok
        remove(vm)

    for _ in range(2):
        cycle()
    wait_until(lambda: not children(vm.process.pid, "sv-net"), "the end of the workers")
    wait_until(lambda: children(vm.process.pid, "sv-keeper"), "what comes after the start")
    before = count()
    for _ in range(12):
        cycle()
    wait_until(lambda: count() <= before, "everything to be given back", 10)


def test_a_nic_of_the_command_line_makes_way(start_nic_vm: Start, namespace: NetNamespace) -> None:
    """Its queue pairs stay the slot's."""
    namespace.persistent_tap("many0", 2)
    vm = start_nic_vm(netdev="ifname=many0,queues=2", nic=f",mac={MAC},host_mtu=1600")
    assert vm.guest("net.init 0").ok
    assert vm.guest("net.ctrl 0 4 0 0200").ok
    with Peer(namespace, "many0"):
        echoed(vm)
    remove(vm, "nic0")
    assert link(vm) == 0 and vm.guest("net.ctrl 0 4 0 0100").ok
    vm.qmp.command("netdev_add", id="one", ifname="tap0")
    assert "use queues=2" in refused(vm, "device_add", id="one", driver="virtio-net-mmio")
    vm.qmp.command("netdev_del", id="one")
    vm.qmp.command("netdev_add", id="n", ifname="many0", queues=2)
    vm.qmp.command("device_add", id="n", driver="virtio-net-mmio")
    assert vm.guest("net.ctrl 0 4 0 0200").ok
    with Peer(namespace, "many0"):
        echoed(vm)
        assert vm.guest("net.info 0").value("mtu") == 1600


def test_plugged_nics_are_looked_after(vm: TestVm, namespace: NetNamespace) -> None:
    add(vm)
    with Peer(namespace):
        echoed(vm)
        kill(worker_of(vm))
        echoed(vm)
        vm.qmp.command("worker-restart", device="net-0")
        echoed(vm)
        vm.qmp.command("system_reset")
        vm.wait_output(r"^ready\r?\n", 20)
        echoed(vm)
    remove(vm)
    wait_until(lambda: not children(vm.process.pid, "sv-net"), "the end of the worker")


def test_the_worker_dies_when_its_device_goes(vm: TestVm, namespace: NetNamespace) -> None:
    assert vm.guest("net.init 0").ok
    for _ in range(6):
        add(vm)
        kill(worker_of(vm))
        remove(vm)
        assert vm.guest("net.send 0 300 0").ok
    add(vm)
    with Peer(namespace):
        echoed(vm)


def test_a_hung_worker_can_be_unplugged(vm: TestVm, namespace: NetNamespace) -> None:
    add(vm)
    assert vm.guest("net.init 0").ok
    victim = worker_of(vm)
    kill(victim, signal.SIGSTOP)
    reply = vm.qmp.raw('{"execute":"device_del","arguments":{"id":"net-0"}}', timeout=40)
    assert reply == {"return": {}}
    assert vm.guest("net.send 0 300 0").ok
    add(vm)
    with Peer(namespace):
        echoed(vm)


# ---- descriptors ---------------------------------------------------------------------------------


def getfd(vm: TestVm, name: str, fd: int) -> None:
    vm.qmp.send_fds(json.dumps({"execute": "getfd", "arguments": {"fdname": name}}), [fd])
    assert vm.qmp.receive() == {"return": {}}


def test_descriptors_over_qmp(vm: TestVm, namespace: NetNamespace) -> None:
    """As libvirt plugs a NIC: getfd, netdev_add, device_add; device_del, netdev_del."""
    vm.qmp.command("query-status")
    for argument in ("fd", "fds"):
        taps = namespace.tap("handed0")
        getfd(vm, "tapfd-net0", taps[0])
        os.close(taps[0])
        vm.qmp.command("netdev_add", type="tap", id="hostnet0", **{argument: "tapfd-net0"})
        vm.qmp.command("device_add", id="net0", driver="virtio-net-mmio", netdev="hostnet0",
                       mac=MAC)
        with Peer(namespace, "handed0"):
            echoed(vm)
        assert "in use" in refused(vm, "netdev_del", id="hostnet0")
        remove(vm, "net0")
        assert "handed0" not in namespace.command("ip -o link")


def test_descriptors_come_back_after_an_error(vm: TestVm, namespace: NetNamespace) -> None:
    vm.qmp.command("query-status")
    taps = namespace.tap("handed0", 2)
    null = os.open("/dev/null", os.O_RDWR)
    for name, fd in (("a", taps[0]), ("b", taps[1]), ("null", null)):
        getfd(vm, name, fd)
        os.close(fd)
    assert "no open tap" in refused(vm, "netdev_add", id="n", fds="a:null")
    assert "'c'" in refused(vm, "netdev_add", id="n", fds="a:b:c")
    assert "given twice" in refused(vm, "netdev_add", id="n", fds="a:a")
    assert "queues=3" in refused(vm, "netdev_add", id="n", fds="a:b", queues=3)
    assert "conflict" in refused(vm, "netdev_add", id="n", fds="a:b", ifname="tap0")
    assert "conflict" in refused(vm, "netdev_add", id="n", fds="a", fd="b")
    assert "no name" in refused(vm, "netdev_add", id="n", fd="5")
    vm.qmp.command("netdev_add", id="n", fds="a:b")
    assert "'a'" in refused(vm, "closefd", fdname="a")
    vm.qmp.command("closefd", fdname="null")
    assert "2 queues" in refused(vm, "device_add", id="n", driver="virtio-net-mmio")
    vm.qmp.command("netdev_del", id="n")
    assert "handed0" not in namespace.command("ip -o link")


# ---- what is refused -----------------------------------------------------------------------------


def test_what_is_refused(vm: TestVm, namespace: NetNamespace) -> None:
    namespace.persistent_tap("many0", 4)
    namespace.command("ip tuntap add tun0 mode tun")
    assert "Tap device is missing" in refused(vm, "netdev_add", id="n")
    assert "can't be the name" in refused(vm, "netdev_add", id="n", ifname="a/b")
    assert "is not a tap" in refused(vm, "netdev_add", id="n", ifname="lo")
    assert "is not a tap" in refused(vm, "netdev_add", id="n", ifname="tun0")
    assert "multi_queue" in refused(vm, "netdev_add", id="n", ifname="tap0", queues=2)
    assert "'type'" in refused(vm, "netdev_add", id="n", type="vhost-user", chardev="c")
    assert "'type'" in refused(vm, "netdev_add", id="n", type="bridge")
    for bad in ({"queues": 0}, {"queues": 17}, {"rx-packets": -1}, {"tx-bytes": 1 << 51},
                {"vhost": "on"}, {"ifname": 5}, {"colour": "red"}):
        refused(vm, "netdev_add", **{"id": "n", "ifname": "tap0", **bad})
    fd = namespace.open("tap0")
    assert "already in use" in refused(vm, "netdev_add", id="n", ifname="tap0")
    os.close(fd)
    vm.qmp.command("netdev_add", id="n", ifname="many0")
    assert "already registered" in refused(vm, "netdev_add", id="n", ifname="tap0")
    assert "netdev 'n' has it" in refused(vm, "netdev_add", id="m", ifname="many0")
    assert "no netdev 'x'" in refused(vm, "device_add", id="x", driver="virtio-net-mmio")
    assert "no slot 2" in refused(vm, "device_add", id="n", driver="virtio-net-mmio", addr="2")
    for mac in ("1", "52:54:00:12:34:5g", "01:00:5e:00:00:01", "00:00:00:00:00:00"):
        assert "Mac address" in refused(vm, "device_add", id="n", driver="virtio-net-mmio", mac=mac)
    vm.qmp.command("device_add", id="n", driver="virtio-net-mmio", addr="0x1")
    vm.qmp.command("netdev_add", id="m", ifname="tap0")
    assert "occupied already by 'n'" in refused(vm, "device_add", id="m", addr="1",
                                                driver="virtio-net-mmio")
    assert "already serves" in refused(vm, "device_add", id="p", netdev="n", addr="0",
                                       driver="virtio-net-mmio")
    vm.qmp.command("netdev_del", id="m")
    assert "not found" in refused(vm, "netdev_del", id="m")
    assert "not found" in refused(vm, "device_del", id="m")
    assert "not found" in refused(vm, "blockdev-del", **{"node-name": "n"})
