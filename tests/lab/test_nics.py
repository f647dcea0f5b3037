"""What Linux makes of our NICs: streams that outlive workers, offloads, empty slots, hot plug."""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING, Any

import pytest

from tests.lab import images
from tests.lab.lab import ROOT
from tests.lab.small_kernel import small_kernel

if TYPE_CHECKING:
    from collections.abc import Callable

    Play = Callable[..., dict[str, Any]]

pytestmark = pytest.mark.lab

SECONDS = 60
STREAMS = 2
PROMPT = 5.0  # seconds for what an empty NIC is asked, in an emulated machine


def shell(line: str, done: str) -> list[list[Any]]:
    """Have the guest's shell run a line; its last word is put together, unlike the echo."""
    return [["send", f"{line}; echo {done[:2]}''{done[2:]}\n"], ["output", done, SECONDS]]


def plug(ifname: str) -> list[list[Any]]:
    return [["qmp", "netdev_add", {"id": "net-1", "ifname": ifname}],
            ["qmp", "device_add", {"id": "net-1", "driver": "virtio-net-mmio", "addr": "0x1"}]]


STEPS: list[list[Any]] = [
    ["output", "L2 shell", SECONDS],
    ["qmp", "query-status"],  # connected: events come from now on
    ["run", "ip addr add 10.0.0.1/24 dev tap0"],
    # An empty NIC: whatever it is asked it answers at once.
    *shell("cat /proc/uptime; ifconfig eth1 10.0.1.2 netmask 255.255.255.0 up promisc; "
           "ifconfig eth1 allmulti; ifconfig eth1 hw ether 52:54:00:00:00:77 2>/dev/null; "
           "ifconfig eth1 -promisc; cat /proc/uptime; cat /sys/class/net/eth1/carrier", "empty-1"),
    *shell("ifconfig eth0 10.0.0.2 netmask 255.255.255.0 up; ping -c 2 -W 5 10.0.0.1", "ping-2"),
    ["run", "busybox ping -c 2 -W 5 10.0.0.2"],
    # The same bytes to and fro, while workers are replaced and killed.
    ["send", f"(for i in $(seq {STREAMS}); do nc 10.0.0.1 5001 </dev/vda; "
             "nc 10.0.0.1 5002 </dev/null | md5sum; done; echo st''reams-3) &\n"],
    ["run", "for i in $(seq 400); do ss -tn | grep -q 10.0.0.2 && break; sleep 0.05; done"],
    *([["run", "pkill -KILL -x sv-net-nic0"], ["event", "WORKER_RESTARTED", SECONDS]] * 2),
    ["qmp", "worker-restart", {"device": "nic0"}],
    ["output", "streams-3", 2 * SECONDS],
    *shell("cat /proc/net/dev", "figures-4"),
    # Another NIC comes, goes, and comes again.
    *plug("tap1"), ["run", "ip addr add 10.0.1.1/24 dev tap1"],
    *shell("cat /sys/class/net/eth1/carrier; ping -c 2 -W 5 10.0.1.1", "plugged-5"),
    ["qmp", "device_del", {"id": "net-1"}],
    *shell("cat /sys/class/net/eth1/carrier; ping -c 1 -W 1 10.0.1.1", "gone-6"),
    *plug("tap1"), ["run", "ip addr add 10.0.1.1/24 dev tap1"],
    *shell("ping -c 2 -W 5 10.0.1.1", "again-7"),
    ["qmp", "set_link", {"name": "nic0", "up": False}],
    *shell("cat /sys/class/net/eth0/carrier", "down-8"),
    ["qmp", "query-workers"], ["run", "cat /tmp/streams"],
    ["send", "poweroff -f\n"], ["event", "SHUTDOWN", SECONDS], ["exit", 20],
]


def between(console: str, first: str, last: str) -> str:
    return console[console.index(first):console.index(last)]


def per_packet(console: str) -> tuple[float, float]:
    """Bytes of a packet on eth0, received and sent."""
    line = re.search(r"eth0:(.*)", between(console, "streams-3", "figures-4"))
    assert line is not None
    numbers = [int(word) for word in line[1].split()]
    return numbers[0] / numbers[1], numbers[8] / numbers[9]


def test_nics_under_linux(play: Play) -> None:
    report = play({
        "arguments": ["-machine", "microvm", "-m", "256", "-smp", "2",
                      "-kernel", str(small_kernel()["vmlinux"]),
                      "-initrd", str(images.plain_initramfs()),
                      "-drive", "id=rootfs,file=/mnt/disk,direct=off,readonly=on",
                      "-device", "virtio-blk-device,drive=rootfs",
                      "-netdev", "tap,id=net0,ifname=tap0",
                      "-device", "virtio-net-device,netdev=net0,id=nic0"],
        "append": images.COMMAND_LINE, "steps": STEPS,
        "before": [f"cd {ROOT} && exec {sys.executable} -m tests.lab.streams /mnt/disk "
                   "/tmp/streams"],
    }, files={"disk": images.root_disk()}, timeout=300)
    console = report["console"]
    times = re.findall(r"^([\d.]+) [\d.]+\r?$", between(console, "L2 shell", "empty-1"), re.M)
    assert float(times[1]) - float(times[0]) < PROMPT
    lost = re.findall(r"(\d+)% packet loss", console)
    assert lost == ["0", "0", "100", "0"], console
    assert " 0% packet loss" in report["replies"][5], report["replies"][5]
    # Each stream whole, both ways.
    md5, size = images.md5(images.root_disk()), images.root_disk().stat().st_size
    assert report["replies"][-2].splitlines() == [f"{size} {md5}"] * STREAMS
    assert between(console, "ping-2", "streams-3").count(md5) == STREAMS
    # Segments are cut and joined by the hosts, not by the wire between them.
    received, sent = per_packet(console)
    assert received > 2000 and sent > 2000, (received, sent)
    kinds = [event["event"] for event in report["events"]]
    assert kinds.count("WORKER_CRASHED") == 2 and "WORKER_GIVEN_UP" not in kinds
    assert not [r for r in report["replies"] if isinstance(r, dict) and "error" in r]
    places = (("L2 shell", "empty-1"), ("figures-4", "plugged-5"), ("plugged-5", "gone-6"),
              ("again-7", "down-8"))
    carriers = [re.findall(r"^([01])\r?$", between(console, *place), re.M) for place in places]
    assert carriers == [["0"], ["1"], ["0"], ["0"]]
    assert report["exit"] == 0 and report["left"] == []
