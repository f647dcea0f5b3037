"""Net workers die at any instant, under verified frames: a pause, and some frames are lost."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.killer import Killer, children, kill, wait_quiet
from tests.support.net_peer import Peer
from tests.support.net_traffic import WINDOW, Traffic
from tests.support.test_vm import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support.net_namespace import NetNamespace
    from tests.support.test_vm import TestVm

    Start = Callable[..., TestVm]

pytestmark = pytest.mark.vm

MAC = "52:54:00:01:02:03"
ALL = (1 << 64) - 1
F_MRG_RXBUF, F_EVENT_INDEX = 1 << 15, 1 << 29
KILLS = 30


@pytest.fixture
def vm(start_nic_vm: Start) -> TestVm:
    vm = start_nic_vm("-smp", "2", nic=f",mac={MAC}")
    assert vm.guest("net.init 0").ok
    vm.qmp.command("query-status")  # connected: events come from now on
    return vm


def events(vm: TestVm, name: str) -> list[dict[str, Any]]:
    vm.qmp.command("query-status")
    return [event["data"] for event in vm.qmp.events if event["event"] == name]


def echoed(vm: TestVm, count: int = 200) -> None:
    answer = vm.guest(f"net.echo 0 {count} 0", 60)
    assert answer.ok and answer.value("frames") == count, f"{answer}\n{vm.story()}"


@pytest.mark.parametrize(("mask", "kills"), [(ALL, KILLS), (ALL & ~F_MRG_RXBUF, 4),
                                             (ALL & ~F_EVENT_INDEX, 4), (1 << 32, 4)],
                         ids=["all", "no mergeable", "no event index", "bare"])
def test_kills_under_traffic(vm: TestVm, namespace: NetNamespace, mask: int, kills: int) -> None:
    assert vm.guest(f"net.init 0 {mask:#x}").ok
    with Peer(namespace) as peer:
        with Traffic(vm) as traffic, \
                Killer(vm.process.pid, kills, seed=kills + mask, prefix="sv-net") as killer:
            wait_until(lambda: killer.kills >= kills or traffic.failed, "the kills", 60)
        wait_quiet(vm.process.pid, prefix="sv-net")
        echoed(vm)
        assert not peer.wrong
    # In flight: what the guest had sent or was to get; its own limit is the window.
    assert traffic.lost <= (killer.kills + 1) * WINDOW
    # Some are killed while they take over.
    assert len(events(vm, "WORKER_RESTARTED")) > killer.kills // 2
    assert not events(vm, "WORKER_GIVEN_UP")
    assert vm.qmp.command("query-workers")[0]["restarts"] == len(events(vm, "WORKER_CRASHED"))


def test_kills_of_nursery_and_worker(vm: TestVm, namespace: NetNamespace) -> None:
    with Peer(namespace) as peer:
        with Traffic(vm) as traffic, \
                Killer(vm.process.pid, 3, 500, nursery=True, prefix="sv-net") as killer:
            wait_until(lambda: killer.kills >= 3 or traffic.failed, "the kills", 60)
        wait_quiet(vm.process.pid, prefix="sv-net")
        echoed(vm)
        assert not peer.wrong


def test_live_upgrades_under_traffic(vm: TestVm, namespace: NetNamespace) -> None:
    """Without a loss: what the old one has taken it delivers, the rest the new one."""
    def packets() -> int:
        counters: dict[str, int] = vm.qmp.command("query-workers")[0]["counters"]
        return counters["packets"]

    with Peer(namespace) as peer:
        with Traffic(vm) as traffic:
            wait_until(lambda: traffic.runs, "traffic")
            before = packets()
            pids = set()
            for _ in range(5):
                vm.qmp.command("worker-restart", device="nic0")
                pids |= set(children(vm.process.pid, "sv-net"))
                after = packets()
                assert after > before  # the figures go on
                before = after
            runs = traffic.runs
            wait_until(lambda: traffic.runs > runs or traffic.failed, "traffic")
        assert not peer.wrong
        assert len(peer.numbers) == traffic.sent
    assert (traffic.lost, traffic.twice) == (0, 0)
    assert len(pids) >= 5 and not events(vm, "WORKER_CRASHED")


def test_a_worker_dies_while_the_vm_is_paused(vm: TestVm, namespace: NetNamespace) -> None:
    with Peer(namespace):
        echoed(vm)
        vm.qmp.command("stop")
        kill(wait_quiet(vm.process.pid, prefix="sv-net")[0])
        wait_until(lambda: events(vm, "WORKER_RESTARTED"), "another worker", 10)
        vm.qmp.command("cont")
        echoed(vm)


@pytest.mark.parametrize("command", ["stop", "system_reset"])
def test_a_worker_dies_while_the_vm_changes(vm: TestVm, namespace: NetNamespace,
                                            command: str) -> None:
    with Peer(namespace):
        for _ in range(4):
            echoed(vm, 50)
            kill(wait_quiet(vm.process.pid, prefix="sv-net")[0])
            vm.qmp.command(command)
            if command == "stop":
                vm.qmp.command("cont")
            else:
                vm.wait_output(r"^ready\r?\n", 20)
        echoed(vm)


def test_what_the_driver_has_set_outlives_workers(vm: TestVm, namespace: NetNamespace) -> None:
    other = bytes.fromhex("525400000099")
    assert vm.guest("net.ctrl 0 0 0 00").ok
    assert vm.guest(f"net.ctrl 0 1 1 {other.hex()}").ok
    with Peer(namespace, echo=False) as peer:
        for round_ in range(4):
            kill(wait_quiet(vm.process.pid, prefix="sv-net")[0])
            wait_until(lambda: len(events(vm, "WORKER_RESTARTED")) > round_,  # noqa: B023
                       "another worker")
            peer.send(bytes.fromhex("525400010203"), [1], 60)
            peer.send(other, [2], 60)
            answer = vm.guest("net.recv 0 1 2")
            assert answer.ok and answer.value("other") == 0, answer


def test_who_dies_again_and_again_is_given_up(vm: TestVm, namespace: NetNamespace) -> None:
    """The guest sees its link go, and its NIC lose everything; the rest of the VM goes on."""
    with Peer(namespace):
        echoed(vm)
    assert vm.guest("net.ctrl 0 0 0 00").ok
    deadline = time.monotonic() + 30
    while not (given := events(vm, "WORKER_GIVEN_UP")):
        for pid in children(vm.process.pid, "sv-net"):
            kill(pid)
        assert time.monotonic() < deadline
    assert given[0]["device"] == "nic0" and "died before they served" in given[0]["reason"]
    wait_until(lambda: children(vm.process.pid, "sv-null"), "the null worker")
    wait_until(lambda: vm.guest("net.info 0").value("changes") == 1, "a config interrupt")
    assert vm.guest("net.info 0").value("status") == 0
    assert vm.guest("net.send 0 300 0").ok and vm.guest("net.ctrl 0 0 0 01").ok
    vm.qmp.command("set_link", name="nic0", up=True)
    assert vm.guest("net.info 0").value("status") == 0  # nobody serves it
    vm.qmp.command("stop")
    vm.qmp.command("cont")
    assert vm.guest("net.init 0").ok and vm.guest("net.send 0 300 0").ok
    vm.qmp.command("device_del", id="nic0")
    vm.qmp.command("netdev_add", id="n", ifname="tap0")
    vm.qmp.command("device_add", id="n", driver="virtio-net-mmio")
    assert vm.guest("net.info 0").value("status") == 1
    with Peer(namespace):
        echoed(vm)


def test_the_neighbour_notices_nothing(start_nic_vm: Start, namespace: NetNamespace) -> None:
    namespace.persistent_tap("tap1")
    vm = start_nic_vm("-smp", "2", "-netdev", "tap,id=b,ifname=tap1", "-device",
                      "virtio-net-device,netdev=b,id=nic1", nic=f",mac={MAC}")
    assert vm.guest("net.init 0").ok and vm.guest("net.init 1").ok
    with Peer(namespace), Peer(namespace, "tap1"):
        victim = next(w["pid"] for w in vm.qmp.command("query-workers") if w["device"] == "nic1")
        with Traffic(vm) as traffic:
            wait_until(lambda: traffic.runs, "traffic")
            kill(victim)
            runs = traffic.runs
            wait_until(lambda: traffic.runs > runs + 1 or traffic.failed, "traffic")
        assert (traffic.lost, traffic.twice) == (0, 0)
        answer = vm.guest("net.echo 1 100 0")
        assert answer.ok and answer.value("frames") == 100


def test_a_null_worker_that_dies_again_and_again_holds_up_nothing(start_nic_vm: Start,
                                                                  namespace: NetNamespace) -> None:
    vm = start_nic_vm("-smp", "2", netdev="")
    assert vm.guest("net.init 0").ok
    deadline = time.monotonic() + 60
    while not vm.guest("net.info 0").value("device") & 0x40:  # DEVICE_NEEDS_RESET
        for pid in children(vm.process.pid, "sv-null"):
            kill(pid)
        assert time.monotonic() < deadline
    for command in ("stop", "cont", "stop", "cont"):
        began = time.monotonic()
        vm.qmp.command(command)
        assert time.monotonic() - began < 3
    vm.qmp.command("netdev_add", id="n", ifname="tap0")
    vm.qmp.command("device_add", id="n", driver="virtio-net-mmio")
    assert vm.guest("net.init 0").ok
    with Peer(namespace):
        echoed(vm)
