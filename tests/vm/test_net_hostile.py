"""Drivers and back ends of NICs that do what no right one does: nobody else notices."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.killer import children, kill
from tests.support.net_peer import Peer
from tests.support.test_vm import wait_until
from tests.support.tree import ROOT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.support.net_namespace import NetNamespace
    from tests.support.test_vm import TestVm

    Start = Callable[..., TestVm]

pytestmark = pytest.mark.vm

MAC = "52:54:00:01:02:03"
MAC_BYTES = bytes.fromhex("525400010203")
NEEDS_RESET = 0x40
PROMPT = 3.0


def echoed(vm: TestVm, nic: int = 0, count: int = 100) -> None:
    answer = vm.guest(f"net.echo {nic} {count} 0", 60)
    assert answer.ok and answer.value("frames") == count, f"{answer}\n{vm.story()}"


# ---- drivers -------------------------------------------------------------------------------------

BREAK = ("loop", "self-loop", "outside", "outside-second", "wrapping", "mmio-hole", "huge",
         "bad-next", "bad-head", "available-jump", "indirect-outside", "indirect-odd",
         "indirect-empty", "indirect-nested", "empty")
BROKEN = [f"{queue}-{kind}" for queue in ("tx", "rx", "ctrl") for kind in BREAK]
BROKEN += ["tx-other-way", "rx-other-way", "rx-small", "ctrl-no-answer", "ctrl-readonly-answer",
           "ctrl-empty-answer", "ctrl-other-way"]
# Served, and thrown away: what a wire does with them.
DROPPED = ["tx-none", "tx-gso-type", "tx-gso-nothing", "tx-checksum-start", "tx-checksum-offset",
           "tx-header-length", "tx-only-header", "tx-short-header", "tx-runt", "tx-giant",
           "tx-indirect-huge"]
REFUSED = ["ctrl-only-answer", "ctrl-cut", "ctrl-endless-table"]


def test_rings_that_break_the_rules(start_nic_vm: Start, namespace: NetNamespace) -> None:
    """Each breaks its queue, the driver is told, and a reset repairs it."""
    vm = start_nic_vm(nic=f",mac={MAC}")
    with Peer(namespace):
        for kind in BROKEN:
            answer = vm.guest(f"net.hostile 0 {kind}")
            assert answer.ok and answer.value("used") == 0, answer
            assert answer.value("device") & NEEDS_RESET, answer
        echoed(vm)
    assert vm.qmp.command("query-workers")[0]["restarts"] == 0  # our worker took no harm


def test_frames_that_are_none(start_nic_vm: Start, namespace: NetNamespace) -> None:
    vm = start_nic_vm(nic=f",mac={MAC}")
    with Peer(namespace) as peer:
        for kind in DROPPED:
            answer = vm.guest(f"net.hostile 0 {kind}")
            assert answer.ok and answer.value("used") == 1, answer
            assert not answer.value("device") & NEEDS_RESET, answer
        echoed(vm)
        assert not [data for data in peer.wrong if len(data) > 1514]
    counters = vm.qmp.command("query-workers")[0]["counters"]
    assert counters["errors"] + counters["dropped"] >= 6


def test_commands_that_are_none(start_nic_vm: Start) -> None:
    vm = start_nic_vm(nic=f",mac={MAC}")
    for kind in REFUSED:
        answer = vm.guest(f"net.hostile 0 {kind}")
        assert answer.ok and answer.value("used") == 1, answer
    assert vm.guest("net.ctrl 0 0 0 01").ok


def test_rings_of_an_empty_slot(start_nic_vm: Start, namespace: NetNamespace) -> None:
    """The null worker goes on with the other slot, and with this one."""
    vm = start_nic_vm(netdev="")
    assert vm.guest("net.init 1").ok
    for kind in BROKEN:
        answer = vm.guest(f"net.hostile 0 {kind}")
        assert answer.ok and answer.value("device") & NEEDS_RESET, answer
    assert vm.guest("net.ctrl 1 0 0 01").ok and vm.guest("net.ctrl 0 0 0 01").ok
    null = vm.qmp.command("query-workers")[0]
    assert (null["kind"], null["restarts"]) == ("null", 0)
    vm.qmp.command("netdev_add", id="n", ifname="tap0")
    vm.qmp.command("device_add", id="n", driver="virtio-net-mmio")
    with Peer(namespace):
        echoed(vm)


# ---- a back end that is not ours -----------------------------------------------------------------


@contextlib.contextmanager
def back_end(namespace: NetNamespace, path: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    """Our net worker, run alone."""
    process = namespace.run(lambda: subprocess.Popen(
        [sys.executable, "-m", "workers.net", f"--socket-path={path}", "--tap=tap0", *options],
        cwd=ROOT, text=True, stderr=subprocess.PIPE))
    try:
        wait_until(lambda: path.exists() or process.poll() is not None, "the back end's socket")
        yield process
    finally:
        process.kill()
        process.communicate()


def foreign(start: Start, path: Path, *more: str) -> TestVm:
    return start("-chardev", f"socket,id=c,path={path}", "-netdev", "vhost-user,id=n,chardev=c",
                 "-device", f"virtio-net-device,netdev=n,id=nic0,mac={MAC}", *more, netdev="")


def refused(vm: TestVm, command: str, /, **arguments: Any) -> str:
    reply = vm.qmp.raw(json.dumps({"execute": command, "arguments": arguments}))
    assert "error" in reply, reply
    return str(reply["error"]["desc"])


def test_our_worker_as_a_foreign_back_end(start_nic_vm: Start, namespace: NetNamespace,
                                          tmp_path: Path) -> None:
    path = tmp_path / "nic.sock"
    with back_end(namespace, path) as process, Peer(namespace) as peer:
        vm = foreign(start_nic_vm, path, "-smp", "2")
        assert vm.guest("net.init 0").value("features") & (1 << 17 | 1 << 22) == 0  # CTRL_VQ, MQ
        assert vm.guest("net.info 0").value("mac") == int.from_bytes(MAC_BYTES, "big")
        for _ in range(3):
            echoed(vm)
            # Buffers that wait for frames hold up neither.
            began = time.monotonic()
            vm.qmp.command("stop")
            vm.qmp.command("cont")
            assert time.monotonic() - began < PROMPT
            echoed(vm)
            began = time.monotonic()
            vm.qmp.command("system_reset")
            vm.wait_output(r"^ready\r?\n", 20)
            assert time.monotonic() - began < PROMPT
        echoed(vm)
        assert not peer.wrong
        vm.qmp.command("set_link", name="nic0", up=False)
        assert vm.guest("net.info 0").value("status") == 0
        assert "not ours" in refused(vm, "device_del", id="nic0")
        assert "tap replacement" in refused(vm, "netdev_replace", id="nic0", ifname="tap1")
        assert "in use" in refused(vm, "netdev_del", id="n")
        assert "no worker" in refused(vm, "worker-restart", device="nic0")
        vm.qmp.command("quit")
        assert vm.wait() == 0
        assert process.wait(10) == 0


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_a_foreign_back_end_that_dies(start_nic_vm: Start, namespace: NetNamespace,
                                      tmp_path: Path, end: int) -> None:
    """The guest sees that its NIC failed; the other one, QMP and `stop` go on."""
    namespace.persistent_tap("tap1")
    path = tmp_path / "nic.sock"
    with back_end(namespace, path) as process:
        vm = foreign(start_nic_vm, path, "-netdev", "tap,id=b,ifname=tap1", "-device",
                     "virtio-net-device,netdev=b")
        with Peer(namespace):
            echoed(vm)
        os.kill(process.pid, end)
        process.wait(10)
        wait_until(lambda: vm.guest("net.info 0").value("device") & NEEDS_RESET, "a failed NIC")
        with Peer(namespace, "tap1"):
            echoed(vm, 1)
        for command in ("stop", "cont", "system_reset"):
            began = time.monotonic()
            vm.qmp.command(command)
            assert time.monotonic() - began < PROMPT
        vm.wait_output(r"^ready\r?\n", 20)
        assert not vm.guest("net.init 0").ok
        with Peer(namespace, "tap1"):
            echoed(vm, 1)
        vm.qmp.command("quit")
        assert vm.wait() == 0


def test_a_foreign_back_end_that_hangs(start_nic_vm: Start, namespace: NetNamespace,
                                       tmp_path: Path) -> None:
    path = tmp_path / "nic.sock"
    with back_end(namespace, path) as process:
        vm = foreign(start_nic_vm, path)
        with Peer(namespace):
            echoed(vm)
        served_by = [*children(process.pid), process.pid]  # it has a PID namespace
        for pid in served_by:
            os.kill(pid, signal.SIGSTOP)
        try:
            reply = vm.qmp.raw('{"execute":"stop"}', timeout=30)
            assert "nic0" in str(reply.get("error")), f"{reply}\n{vm.story()}"
            assert vm.qmp.command("query-status")["status"] == "paused"
            vm.qmp.command("quit")
            assert vm.wait() == 0
        finally:
            for pid in served_by:
                kill(pid, signal.SIGCONT)
