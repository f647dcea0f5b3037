"""What somebody who has taken over a NIC's worker can reach: its tap's frames, and nothing else."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared.virtio import net
from tests.support.capabilities import require
from tests.support.net_namespace import NetNamespace
from tests.support.sandbox import probe_nursery
from vmm.event_loop import EventLoop
from vmm.worker.nursery import Nursery

pytestmark = pytest.mark.worker

# linux/if_tun.h, linux/sockios.h: what would change the host's interface, or attach to another.
IOCTLS = {
    "TUNSETIFF": 0x400454CA, "TUNSETPERSIST": 0x400454CB, "TUNSETOWNER": 0x400454CC,
    "TUNSETLINK": 0x400454CD, "TUNSETGROUP": 0x400454CE, "TUNSETNOCSUM": 0x400454C8,
    "TUNSETDEBUG": 0x400454C9, "TUNGETFEATURES": 0x800454CF, "TUNSETTXFILTER": 0x400454D1,
    "TUNGETIFF": 0x800454D2, "TUNGETSNDBUF": 0x800454D3, "TUNSETSNDBUF": 0x400454D4,
    "TUNATTACHFILTER": 0x401054D5, "TUNDETACHFILTER": 0x401054D6, "TUNGETVNETHDRSZ": 0x800454D7,
    "TUNSETVNETHDRSZ": 0x400454D8, "TUNSETIFINDEX": 0x400454DA, "TUNGETFILTER": 0x801054DB,
    "TUNSETVNETLE": 0x400454DC, "TUNSETVNETBE": 0x400454DE, "TUNSETSTEERINGEBPF": 0x800454E0,
    "TUNSETFILTEREBPF": 0x800454E1, "TUNSETCARRIER": 0x400454E2, "TUNGETDEVNETNS": 0x54E3,
    "SIOCGIFHWADDR": 0x8927, "SIOCSIFHWADDR": 0x8924, "SIOCSIFFLAGS": 0x8914,
    "SIOCGIFCONF": 0x8912, "SIOCBRADDIF": 0x89A2, "SIOCGSKNS": 0x894C, "FIONREAD": 0x541B,
    "FIOASYNC": 0x5452, "KVM_CREATE_VM": 0xAE01,
}
AF_UNIX, AF_INET, AF_INET6, AF_NETLINK, AF_PACKET, AF_VSOCK = 1, 2, 10, 16, 17, 40
# A descriptor's name stands for its number; the null worker has no tap, but asks all the same.
REFUSED: dict[str, tuple[object, ...]] = {
    **{f"ioctl {name}": ("ioctl", "tap0", number, 0) for name, number in IOCTLS.items()},
    **{f"socket {family}": ("socket", family, 3, 0)
       for family in (AF_UNIX, AF_INET, AF_INET6, AF_NETLINK, AF_PACKET, AF_VSOCK)},
    "open": ("openat", -100, "/dev/net/tun", 2, 0), "open a file": ("openat", -100, "/x", 0, 0),
    "connect": ("connect", "tap0", 0, 0), "bind": ("bind", "tap0", 0, 0),
    "sendto": ("sendto", "tap0", 0, 0, 0, 0, 0), "setsockopt": ("setsockopt", "tap0", 0, 0, 0, 0),
    "socketpair": ("socketpair", 1, 1, 0, 0), "accept": ("accept4", "tap0", 0, 0, 0),
    "setns": ("setns", "tap0", 0x40000000), "unshare": ("unshare", 0x40000000),
    "ftruncate": ("ftruncate", "state", 0), "fallocate": ("fallocate", "state", 3, 0, 4096),
    "splice": ("splice", "tap0", 0, "state", 0, 1, 0),
    "sendfile": ("sendfile", "tap0", "state", 0, 1),
    "bpf": ("bpf", 0, 0, 0), "fork": ("fork",), "kill": ("kill", 1, 9),
    "execve": ("execve", "/bin/sh", 0, 0), "io_uring": ("io_uring_setup", 1, 0),
    "ptrace": ("ptrace", 16, 1, 0, 0), "nonblocking": ("fcntl", "tap0", 4, 0),
}
TUNSETOFFLOAD, TUNSETQUEUE = 0x400454D0, 0x400454D9


class Prober:
    """Starts probes, with a tap or without."""

    def __init__(self) -> None:
        self.loop = EventLoop()
        self.nursery = probe_nursery(self.loop)
        self.bare: Nursery | None = None
        self.namespace = NetNamespace()
        self.tap = self.namespace.tap()[0]
        self.state = os.memfd_create("state")
        os.ftruncate(self.state, net.STATE_BYTES)

    def attempt(self, kind: str, *arguments: object, seccomp: bool = True) -> str:
        """How the call ended: "result: …", or "refused NAME"."""
        nursery = self.nursery
        if not seccomp:
            self.bare = nursery = self.bare or probe_nursery(self.loop, ("seccomp",))
        fds = {"tap0": self.tap} if kind == "net" else {}
        given = [-1 if kind == "null" and a == "tap0" else a for a in arguments]
        worker = nursery.spawn(kind, "probe", {**fds, "state": self.state},
                               {"arguments": given, "num-queues": 3})
        deadline = time.monotonic() + 20
        while worker.state != "dead":
            assert time.monotonic() < deadline, "the probe didn't end"
            self.loop.run_once(0.05)
        reason = worker.reason.partition(": ")[2] or worker.reason
        _, refused, call = reason.partition("its sandbox refused system call ")
        return "refused " + call.partition("(")[2].rstrip(")") if refused else reason

    def close(self) -> None:
        self.nursery.close()
        if self.bare is not None:
            self.bare.close()
        self.loop.close()
        os.close(self.tap)
        os.close(self.state)
        self.namespace.close()


@pytest.fixture(scope="module")
def prober() -> Iterator[Prober]:
    require("userns")
    require("landlock")
    require("net_admin")
    prober = Prober()
    yield prober
    prober.close()


@pytest.mark.parametrize("kind", ["net", "null"])
@pytest.mark.parametrize("arguments", REFUSED.values(), ids=REFUSED.keys())
def test_forbidden_system_calls_end_the_worker(prober: Prober, kind: str,
                                               arguments: tuple[object, ...]) -> None:
    assert prober.attempt(kind, *arguments) == f"refused {arguments[0]}"


def test_what_the_tap_is_needed_for(prober: Prober) -> None:
    assert prober.attempt("net", "ioctl", "tap0", TUNSETOFFLOAD, 0) == "result: ok 0"
    assert prober.attempt("net", "ioctl", "tap0", TUNSETQUEUE, 0) == "result: EFAULT"
    assert prober.attempt("null", "ioctl", "tap0", TUNSETOFFLOAD, 0) == "refused ioctl"
    assert prober.attempt("null", "writev", "tap0", 0, 0) == "refused writev"
    assert prober.attempt("net", "fcntl", "state", 1033, 0) == "refused fcntl"  # F_ADD_SEALS


def test_without_the_filter_there_is_no_network_either(prober: Prober) -> None:
    """Namespaces and the lack of a root file system hold by themselves."""
    for kind in ("net", "null"):
        assert prober.attempt(kind, "openat", -100, "/dev/net/tun", 2, 0,
                              seccomp=False) == "result: ENOENT"
        assert prober.attempt(kind, "setns", "state", 0x40000000,
                              seccomp=False) == "result: EINVAL"
    # A tap made in a worker's namespace would be alone there; its own is attached for good.
    assert prober.attempt("net", "ioctl", "tap0", IOCTLS["TUNSETIFF"], 0,
                          seccomp=False) == "result: EFAULT"


def test_what_a_worker_holds() -> None:
    """Its own tap, its two connections, memory; seen from outside."""
    require("userns")
    require("net_admin")
    loop = EventLoop()
    nursery = Nursery(loop)
    namespace = NetNamespace()
    taps = [namespace.tap(name)[0] for name in ("t0", "t1")]
    state = os.memfd_create("state")
    os.ftruncate(state, net.STATE_BYTES)
    try:
        workers = []
        for number, tap in enumerate(taps):
            workers.append(nursery.spawn("net", f"nic{number}", {"tap0": tap, "state": state}, {
                "control": True, "num-queues": 3, "queue-size": 64, "mac": bytes(6)}))
            assert workers[-1].wait_started(time.monotonic() + 20), workers[-1].reason
        for number, worker in enumerate(workers):
            folder = Path(f"/proc/{worker.pid}/fd")
            links = [os.readlink(entry) for entry in folder.iterdir()]
            assert sum(link == "/dev/net/tun" for link in links) == 1
            assert sum(link.startswith("socket:") for link in links) == 2
            rest = {link for link in links
                    if link != "/dev/net/tun" and not link.startswith("socket:")}
            assert all(link.startswith(("/memfd:", "anon_inode:[eventfd]", "/dev/shm/",
                                        "/dev/null")) for link in rest), rest
            facts = [(entry.parent.parent / "fdinfo" / entry.name).read_text()
                     for entry in folder.iterdir() if os.readlink(entry) == "/dev/net/tun"]
            assert f"iff:\tt{number}" in facts[0]
    finally:
        nursery.close()
        loop.close()
        for fd in (*taps, state):
            os.close(fd)
        namespace.close()
