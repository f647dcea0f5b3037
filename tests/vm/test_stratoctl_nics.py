"""`stratoctl` and network cards: taps in a namespace of the test's, with VM and client in it."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from shared.tap import exists
from tests.support.capabilities import require
from tests.support.ctl import ctl, ctl_json
from tests.support.net_namespace import NetNamespace
from tests.support.net_peer import Peer
from tests.support.test_vm import TestVm, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Start = Callable[..., TestVm]

pytestmark = pytest.mark.vm


@pytest.fixture
def namespace() -> Iterator[NetNamespace]:
    require("net_admin")
    namespace = NetNamespace()
    yield namespace
    namespace.close()


class Host:
    """A VM `web`, and the client beside it."""

    def __init__(self, namespace: NetNamespace, run_dir: Path, start: Callable[[], TestVm]) -> None:
        self.namespace = namespace
        self.run_dir = run_dir
        self.vm = namespace.run(start)
        self.vm.wait_output(r"^ready")

    def ctl(self, *line: str | Path, **more: Any) -> str:
        return self.namespace.run(lambda: ctl(*line, "--run-dir", self.run_dir, **more))

    def json(self, *line: str | Path, **more: Any) -> Any:
        return self.namespace.run(lambda: ctl_json(*line, "--run-dir", self.run_dir, **more))

    def exists(self, name: str) -> bool:
        return self.namespace.run(lambda: exists(name))


@pytest.fixture
def host(namespace: NetNamespace, start_vm: Start, tmp_path: Path) -> Host:
    """With a NIC of the command line in the first slot."""
    run_dir = tmp_path / "run"
    (run_dir / "web").mkdir(parents=True)
    return Host(namespace, run_dir, lambda: start_vm(
        "-netdev", "tap,id=n0,ifname=tap0,rx-bytes=100000000",
        "-device", "virtio-net-device,netdev=n0,id=nic0,mac=52:54:00:00:00:07",
        "-chardev", f"socket,id=qmp,path={run_dir}/web/qmp.sock,server,nowait",
        "-mon", "chardev=qmp,mode=control"))


def nics(host: Host) -> list[dict[str, Any]]:
    return [nic for nic in host.json("status", "web")["nics"] if "device" in nic]


def test_status_shows_links(host: Host) -> None:
    first, second = host.json("status", "web")["nics"]
    assert first == {"slot": 0, "mac": "52:54:00:00:00:07", "queues": 1, "link-up": True,
                     "device": "nic0", "netdev": "n0", "type": "tap", "ifname": "tap0",
                     "limits": {"rx-bytes": 100_000_000}}
    assert (second["slot"], second["link-up"]) == (1, False)
    assert host.ctl("link", "web", "nic0", "down") == ""
    line = next(line for line in host.ctl("status", "web").splitlines() if " nic0 " in line
                and "tap0" in line)
    assert "down" in line and "52:54:00:00:00:07" in line and "rx-bytes 95.4 MiB/s" in line
    host.ctl("link", "web", "nic0", "up")
    assert nics(host)[0]["link-up"] is True
    assert "web has no network card 'x'" in host.ctl("link", "web", "x", "up", status=1)


def test_a_tap_by_name_comes_and_goes(host: Host) -> None:
    assert "There is no tap 'lan0'" in host.ctl("attach-nic", "web", "lan0", status=1)
    told = host.json("attach-nic", "web", "lan1", "--make", "--limit", "tx-packets=5000",
                     "--mac", "52:54:00:00:00:09")
    assert told == {"id": "net0", "slot": 1, "ifname": "lan1"}
    nic = nics(host)[1]
    assert (nic["ifname"], nic["mac"], nic["link-up"]) == ("lan1", "52:54:00:00:00:09", True)
    assert nic["limits"] == {"tx-packets": 5000}
    full = host.ctl("attach-nic", "web", status=1)
    assert "all 2 slots for network cards are occupied" in full
    assert host.json("detach", "web", "net0") == {"id": "net0"}
    # Its back end has gone with it, and so has the tap that was made for it.
    assert not host.exists("lan1")
    assert host.ctl("attach-nic", "web", "--id", "net0") == (
        "web: 'net0' is in slot 1, on the tap svtap0\n")


def test_a_tap_that_others_keep(host: Host) -> None:
    """Its name is all that the VM gets; it outlives the card."""
    keeper = host.namespace.tap("lan0", queues=2)
    os.close(keeper.pop())  # a queue is free
    assert host.json("attach-nic", "web", "lan0")["ifname"] == "lan0"
    assert nics(host)[1]["ifname"] == "lan0"
    host.ctl("detach", "web", "net0")
    assert host.exists("lan0")
    os.close(keeper.pop())


def test_what_fails_half_way_is_taken_back(host: Host) -> None:
    for line, text in (
            (("--mac", "01:00:5e:00:00:01"), "Mac address is illegal"),
            (("--addr", "0"), "occupied"), (("--addr", "7"), "no slot 7"),
            (("--queues", "2"), "no free slot has 2 queue pairs: slot 1 has 1"),
            (("--addr", "1", "--queues", "2"), "use queues=1"),
            (("--bridge", "br0"), "can't join the bridge 'br0'"),
            (("--id", "n0"), "already registered"), (("--id", "nic0"), "exists already"),
            (("tap0", "--make"), "There is an interface 'tap0' already"),
            (("tap0",), "already in use"), (("a b",), "can't be the name of an interface")):
        assert text in host.ctl("attach-nic", "web", *line, status=1), line
        assert len(nics(host)) == 1
        assert not host.exists("svtap0")
    host.ctl("attach-nic", "web", "--id", "again")
    assert nics(host)[1]["device"] == "again"


def test_top_counts_packets(host: Host) -> None:
    """What the guest sends and receives while we look, and what is lost with the link."""
    stop = threading.Event()
    with Peer(host.namespace) as peer:
        assert host.vm.guest(f"net.init 0 {(1 << 64) - 1:#x}").ok

        def load() -> None:
            while not stop.is_set():
                host.vm.guest("net.echo 0 200 0 32 0", 60)

        loader = threading.Thread(target=load)
        loader.start()
        seen: list[Any] = []

        def is_busy() -> bool:
            seen[:] = host.json("top", "web", "-n", "1", "-i", "1")
            nic, = seen[0]["devices"]
            return min(nic["in-per-second"], nic["out-per-second"]) > 0

        try:
            wait_until(is_busy, "packets both ways")
        finally:
            stop.set()
            loader.join()
        vm, = seen
        nic, = vm["devices"]
        assert (nic["device"], nic["kind"], nic["restarts"]) == ("nic0", "net", 0)
        for way in ("in", "out"):
            assert nic[f"{way}-bytes-per-second"] > 60 * nic[f"{way}-per-second"] > 0
        assert nic["per-second"]["packets"] == pytest.approx(
            nic["in-per-second"] + nic["out-per-second"], abs=1)
        before = nic["in-dropped"]
        host.ctl("link", "web", "nic0", "down")
        peer.send(bytes.fromhex("525400000007"), range(50))
        wait_until(lambda: host.json("top", "web", "-n", "1", "-i", "0.05")[0]["devices"][0][
            "in-dropped"] >= before + 50, "drops")
    host.ctl("attach-nic", "web")
    text = host.ctl("top", "web", "-n", "1", "-i", "0.1")
    assert "RX DROPS" in text and "nic0" in text and "net0" in text
    vm, = host.json("top", "web", "-n", "1", "-i", "0.1")
    assert {process["name"] for process in vm["processes"]} >= {"sv-net-nic0", "sv-net-net0"}


def test_completion_knows_nics(host: Host) -> None:
    where = ("--run-dir", str(host.run_dir))

    def complete(*words: str) -> list[str]:
        return host.namespace.run(lambda: ctl("__complete", *where, *words)).split()

    assert complete("detach", "web", "") == ["nic0"]
    assert complete("link", "web", "") == ["nic0"]
    assert complete("link", "web", "nic0", "u") == ["up"]


def test_a_vm_that_cannot_open_our_taps(namespace: NetNamespace, start_vm: Start,
                                        tmp_path: Path) -> None:
    """In another namespace: it gets descriptors of ours."""
    run_dir = tmp_path / "run"
    (run_dir / "web").mkdir(parents=True)
    other = NetNamespace()
    try:
        vm = other.run(lambda: start_vm(
            "-chardev", f"socket,id=qmp,path={run_dir}/web/qmp.sock,server,nowait",
            "-mon", "chardev=qmp,mode=control"))
        vm.wait_output(r"^ready")
        told = namespace.run(lambda: ctl_json("attach-nic", "web", "--run-dir", run_dir))
        assert namespace.run(lambda: exists(told["ifname"]))
        assert not other.run(lambda: exists(told["ifname"]))
        assert vm.qmp.command("query-nics")[0]["ifname"] == told["ifname"]
        vm.qmp.command("quit")
        assert vm.wait() == 0
        wait_until(lambda: not namespace.run(lambda: exists(told["ifname"])), "its end")
    finally:
        other.close()
