"""A NIC on a tap: verified frames both ways, with every kind of driver, through the VM's life."""

from __future__ import annotations

import os
import struct
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.killer import children
from tests.support.net_peer import PEER, Peer
from tests.support.test_vm import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support.net_namespace import NetNamespace
    from tests.support.test_vm import Answer, TestVm

    Start = Callable[..., TestVm]

pytestmark = pytest.mark.vm

MAC = "52:54:00:01:02:03"
MAC_BYTES = bytes.fromhex("525400010203")
F_CSUM, F_MRG_RXBUF, F_STATUS, F_CTRL_VQ, F_MQ = 1 << 0, 1 << 15, 1 << 16, 1 << 17, 1 << 22
F_INDIRECT, F_EVENT_INDEX = 1 << 28, 1 << 29
ALL = (1 << 64) - 1
DRIVERS = {"all": ALL, "no mergeable": ALL & ~F_MRG_RXBUF, "no event index": ALL & ~F_EVENT_INDEX,
           "no control queue": ALL & ~F_CTRL_VQ, "bare": 1 << 32}


def echoed(vm: TestVm, count: int = 500, size: int = 0, window: int = 32, pair: int = 0) -> Answer:
    """Frames there and back, none lost, none wrong."""
    answer = vm.guest(f"net.echo 0 {count} {size} {window} {pair}", 60)
    assert answer.ok, f"{answer}\n{vm.story()}"
    assert answer.value("frames") == count, f"{answer}\n{vm.story()}"
    assert answer.value("twice") == answer.value("bad") == 0, answer
    return answer


def counters(vm: TestVm, name: str = "nic0") -> dict[str, int]:
    found: dict[str, int] = next(worker["counters"] for worker in vm.qmp.command("query-workers")
                                 if worker["device"] == name)
    return found


# ---- frames ------------------------------------------------------------------------------------


@pytest.mark.parametrize("features", DRIVERS.values(), ids=DRIVERS.keys())
def test_frames_both_ways(start_nic_vm: Start, namespace: NetNamespace, features: int) -> None:
    vm = start_nic_vm("-smp", "2", nic=f",mac={MAC}")
    assert vm.guest(f"net.init 0 {features:#x}").ok
    with Peer(namespace, echo=False) as peer:
        assert vm.guest("net.send 0 600 0").ok  # more than the ring holds
        peer.wait(600)
        assert peer.numbers == list(range(600)) and not peer.wrong
        assert peer.macs == {MAC_BYTES}
        peer.send(MAC_BYTES, range(200))
        answer = vm.guest("net.recv 0 200")
        assert answer.ok and answer.value("late") == 0, answer
        peer.echo = True
        echoed(vm)
    assert not peer.wrong


def test_small_buffers_are_merged(start_nic_vm: Start, namespace: NetNamespace) -> None:
    vm = start_nic_vm(nic=f",mac={MAC}")
    assert vm.guest(f"net.init 0 {ALL:#x} 0 200").ok  # eight for the longest frame
    with Peer(namespace) as peer:
        answer = echoed(vm, 300, 1514, 16)
        assert answer.value("buffers") == 300 * 8
    assert not peer.wrong


def test_buffers_that_are_too_small_lose_frames(start_nic_vm: Start,
                                                namespace: NetNamespace) -> None:
    vm = start_nic_vm(nic=f",mac={MAC}")
    assert vm.guest(f"net.init 0 {ALL & ~F_MRG_RXBUF:#x} 0 200").ok
    with Peer(namespace) as peer:
        peer.send(MAC_BYTES, range(20), 1514)
        peer.send(MAC_BYTES, range(20, 40), 100)
        answer = vm.guest("net.recv 0 20 20")
        assert answer.ok and answer.value("largest") == 100, answer


def tcp_frame(payload: int) -> bytes:
    """(virtio_net_hdr, frame): a TCP segment to be cut to 1448 bytes."""
    ip = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 40 + payload, 1, 0, 64, 6, 0,
                     bytes([10, 0, 0, 1]), bytes([10, 0, 0, 2]))
    tcp = struct.pack(">HHIIBBHHH", 1000, 2000, 1, 1, 0x50, 0x10, 1000, 0, 0)
    header = struct.pack("<BBHHHH", 1, 1, 54, 1448, 34, 16)
    return header + MAC_BYTES + PEER + b"\x08\x00" + ip + tcp + os.urandom(payload)


def test_large_frames_stay_whole(start_nic_vm: Start, namespace: NetNamespace) -> None:
    vm = start_nic_vm(nic=f",mac={MAC}")
    with namespace.packet_socket(headers=True) as peer:
        for size in (3000, 40000, 65000):
            assert vm.guest(f"net.gso 0 {size} 1448").ok
            received = peer.recv(70000)
            while received[22:24] != b"\x08\x00":
                received = peer.recv(70000)  # nothing but the guest's
            assert received[1] == 1 and len(received) == 10 + 54 + size  # GSO_TCPV4
            peer.send(tcp_frame(size))
            answer = vm.guest("net.recv 0 1 0 200")
            assert answer.value("largest") == 54 + size, answer
            assert answer.value("header") & 0xFFFF == 0x101  # NEEDS_CSUM, GSO_TCPV4


def test_a_driver_without_offloads_gets_small_frames(start_nic_vm: Start,
                                                     namespace: NetNamespace) -> None:
    vm = start_nic_vm(nic=f",mac={MAC}")
    assert vm.guest(f"net.init 0 {1 << 32 | F_MRG_RXBUF:#x}").ok
    with namespace.packet_socket(headers=True) as peer:
        peer.send(tcp_frame(20000))
        answer = vm.guest("net.recv 0 1 0 200")
        assert answer.value("largest") <= 1514 and answer.value("other") == 14, answer
        assert answer.value("header") == 0


def test_what_query_workers_counts(start_nic_vm: Start, namespace: NetNamespace) -> None:
    vm = start_nic_vm(nic=f",mac={MAC}")
    with Peer(namespace):
        echoed(vm, 100, 1000)
    seen = counters(vm)
    assert (seen["packets"], seen["bytes"], seen["broken"]) == (200, 200_000, 0)
    worker = vm.qmp.command("query-workers")[0]
    assert (worker["kind"], worker["engine"], worker["state"]) == ("net", "tap", "running")


# ---- what the driver is told -------------------------------------------------------------------


def test_the_config_space(start_nic_vm: Start) -> None:
    vm = start_nic_vm(nic=f",mac={MAC},host_mtu=9000,queue-size=1024")
    info = vm.guest("net.info 0")
    assert info.value("mac") == int.from_bytes(MAC_BYTES, "big")
    assert (info.value("status"), info.value("max-pairs"), info.value("mtu")) == (1, 1, 9000)
    empty = vm.guest("net.info 1")
    assert (empty.value("status"), empty.value("mtu")) == (0, 0)
    assert empty.value("mac") not in (0, info.value("mac"))
    assert vm.guest("net.count").text == "net.count 2"


def test_addresses_that_nobody_gave(start_nic_vm: Start) -> None:
    uuid = "8f3d1c52-6a4e-4b6f-9a3f-0d9c5f1b2a3c"
    seen = []
    for arguments in ((), (), ("-uuid", uuid), ("-uuid", uuid)):
        vm = start_nic_vm(*arguments)
        seen.append((vm.guest("net.info 0").value("mac"), vm.guest("net.info 1").value("mac")))
        vm.qmp.command("quit")
        assert vm.wait() == 0
    assert seen[2] == seen[3]  # with a UUID: the same at each start
    assert len({mac for pair in seen[:3] for mac in pair}) == 6
    assert all(mac >> 24 == 0x525400 for pair in seen for mac in pair)


def test_two_nics(start_nic_vm: Start, namespace: NetNamespace) -> None:
    namespace.persistent_tap("tap1")
    vm = start_nic_vm("-netdev", "tap,id=b,ifname=tap1", "-device", "virtio-net-device,netdev=b")
    with Peer(namespace) as first, Peer(namespace, "tap1") as second:
        for nic in (0, 1):
            answer = vm.guest(f"net.echo {nic} 100 0")
            assert answer.ok and answer.value("frames") == 100
        assert len(first.numbers) == len(second.numbers) == 100
        assert first.macs != second.macs
    assert len(children(vm.process.pid, "sv-net")) == 2


def test_a_tap_that_the_vm_makes(start_nic_vm: Start, namespace: NetNamespace) -> None:
    vm = start_nic_vm(netdev="ifname=fresh0")
    assert vm.guest("net.init 0").ok
    with Peer(namespace, "fresh0"):
        echoed(vm, 50)
    vm.qmp.command("quit")
    assert vm.wait() == 0
    assert "fresh0" not in namespace.command("ip -o link")
    assert "tap0" in namespace.command("ip -o link")


def test_descriptors_that_are_handed_over(start_nic_vm: Start, namespace: NetNamespace) -> None:
    """As libvirt and Kata do."""
    taps = namespace.tap("handed0", 2)
    for fd in taps:
        os.set_inheritable(fd, True)
    try:
        vm = start_nic_vm(netdev=f"fds={taps[0]}:{taps[1]},vhost=on,vhostfds=7:8",
                          nic=f",mac={MAC},mq=on", pass_fds=tuple(taps))
    finally:
        for fd in taps:
            os.close(fd)
    assert vm.guest("net.info 0").value("max-pairs") == 2
    with Peer(namespace, "handed0"):
        echoed(vm, 50)


def test_many_pairs(start_nic_vm: Start, namespace: NetNamespace) -> None:
    namespace.persistent_tap("many0", 4)
    vm = start_nic_vm("-smp", "2", netdev="ifname=many0,queues=4", nic=f",mac={MAC}")
    info = vm.guest("net.info 0")
    assert (info.value("max-pairs"), info.value("pairs")) == (4, 4)
    with Peer(namespace, "many0") as peer:
        echoed(vm, 200)  # one pair, until the driver asks for more
        assert vm.guest("net.ctrl 0 4 0 0400").ok
        for pair in range(4):
            echoed(vm, 200, pair=pair)
        for pairs in ("0000", "0500"):
            assert vm.guest(f"net.ctrl 0 4 0 {pairs}").text == "net.ctrl ack=1"
        for pairs in ("0100", "0300", "0400"):
            assert vm.guest(f"net.ctrl 0 4 0 {pairs}").ok
            echoed(vm, 100)
        vm.qmp.command("worker-restart", device="nic0")
        echoed(vm, 200, pair=3)
        # A driver that knows no pairs has its control queue as the third one.
        assert vm.guest(f"net.init 0 {ALL & ~F_MQ:#x}").ok
        assert vm.guest("net.ctrl 0 0 0 00").ok
        echoed(vm, 200)
        vm.qmp.command("worker-restart", device="nic0")
        assert vm.guest("net.ctrl 0 0 0 01").ok
        echoed(vm, 200)
    assert not peer.wrong


def test_as_many_pairs_as_there_can_be(start_nic_vm: Start, namespace: NetNamespace) -> None:
    namespace.persistent_tap("many0", 16)
    vm = start_nic_vm(netdev="ifname=many0,queues=16", nic=f",mac={MAC}")
    assert vm.guest("net.info 0").value("max-pairs") == 16
    with Peer(namespace, "many0"):
        assert vm.guest("net.ctrl 0 4 0 0400").ok  # as many as this driver can have
        echoed(vm, 100, pair=3)


# ---- the control queue -------------------------------------------------------------------------


def test_commands_of_the_control_queue(start_nic_vm: Start, namespace: NetNamespace) -> None:
    vm = start_nic_vm(nic=f",mac={MAC}")
    assert vm.guest("net.init 0").ok
    other = bytes.fromhex("525400000099")

    def passes(to: bytes, tag: bytes = b"") -> bool:
        with Peer(namespace) as peer:
            peer.send_raw(to + PEER + tag + b"\x90\x00" + bytes(60))
            peer.send(MAC_BYTES, [1], 60)  # it comes after what was sent before
            answer = vm.guest("net.recv 0 1 1")
            assert answer.ok, answer
            return answer.value("other") > 0

    assert passes(other)  # until the driver says what it wants
    assert vm.guest("net.ctrl 0 0 0 00").ok  # not promiscuous
    assert not passes(other)
    assert vm.guest(f"net.ctrl 0 1 0 01000000{other.hex()}00000000").ok  # the MAC table
    assert passes(other)
    assert not passes(MAC_BYTES, b"\x81\x00\x00\x07")  # VLAN 7
    assert vm.guest("net.ctrl 0 2 0 0700").ok
    assert passes(MAC_BYTES, b"\x81\x00\x00\x07")
    assert vm.guest("net.ctrl 0 3 0").ok  # an announcement that nobody asked for
    for bad in ("0 0 02", "0 9 01", "1 0 ffffffff", "1 1 01005e000001", "2 0 0010", "3 1",
                "4 0 0100", "9 0", "5 0 80"):
        assert vm.guest(f"net.ctrl 0 {bad}").text == "net.ctrl ack=1", bad
    assert vm.guest("net.reset 0").ok and vm.guest("net.init 0").ok
    assert passes(bytes.fromhex("525400000098"))  # forgotten


# ---- the life of the VM ------------------------------------------------------------------------


def test_frames_wait_while_the_vm_is_paused(start_nic_vm: Start, namespace: NetNamespace) -> None:
    vm = start_nic_vm(nic=f",mac={MAC}")
    with Peer(namespace) as peer:
        echoed(vm, 100)
        for round_ in range(3):
            vm.qmp.command("stop")
            peer.send(MAC_BYTES, range(100 * round_, 100 * round_ + 100))
            vm.qmp.command("cont")
            answer = vm.guest(f"net.recv 0 100 {100 * round_}")
            assert answer.ok and answer.value("late") == 0, answer
            echoed(vm, 100)


def test_stop_and_cont_under_traffic(start_nic_vm: Start, namespace: NetNamespace) -> None:
    vm = start_nic_vm("-smp", "2", nic=f",mac={MAC}")
    with Peer(namespace):
        assert vm.guest("net.init 0").ok
        answers: list[Any] = []
        thread = threading.Thread(target=lambda: answers.append(
            vm.guest("net.echo 0 5000 0 64", 60)))
        thread.start()
        for _ in range(8):
            vm.qmp.command("stop")
            vm.qmp.command("cont")
        thread.join(60)
    assert answers[0].ok and answers[0].value("frames") == 5000, answers
    assert answers[0].value("twice") == 0


def test_reset_and_quit(start_nic_vm: Start, namespace: NetNamespace) -> None:
    vm = start_nic_vm(nic=f",mac={MAC}")
    with Peer(namespace):
        for _ in range(3):
            echoed(vm, 50)
            assert vm.guest("net.ctrl 0 1 1 525400000099").ok
            assert vm.guest("net.ctrl 0 0 0 00").ok
            vm.qmp.command("system_reset")
            vm.wait_output(r"^ready\r?\n", 20)
        echoed(vm, 50)  # to the address of the NIC, not to the one that the last driver set
        vm.qmp.command("quit")
        assert vm.wait() == 0
    wait_until(lambda: not vm.processes(), "the end of all processes", 5)


@pytest.mark.parametrize("signal", ["quit", "kill"])
def test_the_end_under_a_flood(start_nic_vm: Start, namespace: NetNamespace, signal: str) -> None:
    vm = start_nic_vm("-smp", "2", nic=f",mac={MAC}")
    assert vm.guest("net.init 0").ok
    vm.qmp.command("query-status")
    vm.send("net.flood 0 5000 1000\n")
    wait_until(lambda: counters(vm)["packets"] > 100, "traffic")
    began = time.monotonic()
    processes = set(children(vm.process.pid))
    if signal == "quit":
        vm.qmp.command("quit")
        assert vm.wait() == 0
    else:
        vm.process.kill()
        vm.process.wait(10)
    wait_until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in processes),
               "the end of the workers", 5)
    assert time.monotonic() - began < 5
    wait_until(lambda: not vm.qmp_path.exists(), "the removal of its socket", 5)
    assert not [entry for entry in os.listdir("/dev/shm") if f".{vm.process.pid}." in entry]
    # The tap is free: the next VM has it at once.
    other = start_nic_vm(nic=f",mac={MAC}")
    with Peer(namespace):
        echoed(other, 50)


def test_limits(start_nic_vm: Start, namespace: NetNamespace) -> None:
    """Received: 1,000 a second, 100 of them at once; sent: 100,000 bytes a second."""
    vm = start_nic_vm(netdev="ifname=tap0,rx-packets=1000,tx-bytes=100000", nic=f",mac={MAC}")
    assert vm.guest("net.init 0").ok
    with Peer(namespace, echo=False) as peer:
        began = time.monotonic()
        peer.send(MAC_BYTES, range(400), 60)
        assert vm.guest("net.recv 0 400 0").ok
        assert 0.25 < time.monotonic() - began < 5
        began = time.monotonic()
        assert vm.guest("net.send 0 40 1000").ok
        assert 0.25 < time.monotonic() - began < 5
        peer.wait(40)
        # What a limit holds back holds up neither `stop` nor a reset.
        vm.send("net.send 0 400 1000\n")
        wait_until(lambda: len(peer.numbers) > 45, "a few of them")
        began = time.monotonic()
        vm.qmp.command("stop")
        assert time.monotonic() - began < 2
        vm.qmp.command("system_reset")
        vm.qmp.command("cont")
        vm.wait_output(r"^ready\r?\n", 20)
        assert time.monotonic() - began < 5


def test_a_tap_that_is_removed(start_nic_vm: Start, namespace: NetNamespace) -> None:
    """The guest goes on with a NIC that loses everything, through resets and restarts."""
    vm = start_nic_vm(nic=f",mac={MAC}")
    with Peer(namespace):
        echoed(vm, 50)
    namespace.command("ip link del tap0")
    assert vm.guest("net.send 0 300 0").ok
    assert vm.guest("net.ctrl 0 0 0 00").ok
    assert vm.guest("net.init 0").ok
    vm.qmp.command("stop")
    vm.qmp.command("cont")
    vm.qmp.command("worker-restart", device="nic0")
    assert vm.guest("net.send 0 300 0").ok
    # Another one brings it back.
    namespace.persistent_tap("tap1")
    vm.qmp.command("netdev_replace", id="nic0", ifname="tap1")
    with Peer(namespace, "tap1"):
        echoed(vm, 50)
