"""Taps as the core opens them: by name, by descriptor; what is refused, and with which words."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from shared import tap
from tests.support.capabilities import require
from tests.support.net_namespace import NetNamespace
from vmm.config.model import NetdevConfig
from vmm.errors import ConfigError
from vmm.net.node import NetNode, check_others, open_netdev


@pytest.fixture
def namespace() -> Iterator[NetNamespace]:
    require("net_admin")
    namespace = NetNamespace()
    yield namespace
    namespace.close()


def by_name(name: str, queues: int = 1) -> NetdevConfig:
    config = NetdevConfig("n", "tap")
    config.ifname, config.queues = name, queues
    return config


def by_fds(*fds: int) -> NetdevConfig:
    config = NetdevConfig("n", "tap")
    config.fds, config.queues = list(fds), len(fds)
    return config


def refused(namespace: NetNamespace, config: NetdevConfig) -> str:
    with pytest.raises(ConfigError) as caught:
        namespace.run(lambda: open_netdev(config))
    text = str(caught.value)
    assert text.startswith("-netdev tap,id=n: ") and len(text.splitlines()) == 1
    return text


def flags(namespace: NetNamespace, name: str) -> str:
    return namespace.command(f"ip -o link show {name}").partition("<")[2].partition(">")[0]


# ---- by name -------------------------------------------------------------------------------------


def test_a_tap_that_exists_is_left_as_it_is(namespace: NetNamespace) -> None:
    namespace.persistent_tap("tap0", up=False)
    node = namespace.run(lambda: open_netdev(by_name("tap0")))
    assert len(node.taps) == 1 and not os.get_inheritable(node.taps[0])
    assert "UP" not in flags(namespace, "tap0").split(",")
    node.close()
    node.close()  # harmless
    assert node.taps == []
    assert "tap0" in namespace.command("ip -o link")


def test_one_that_does_not_is_made_and_brought_up(namespace: NetNamespace) -> None:
    node = namespace.run(lambda: open_netdev(by_name("fresh0", 2)))
    assert len(node.taps) == 2
    assert "UP" in flags(namespace, "fresh0").split(",")
    node.close()
    assert "fresh0" not in namespace.command("ip -o link")


def test_one_that_can_not_be_brought_up_serves_all_the_same(
        namespace: NetNamespace, monkeypatch: pytest.MonkeyPatch,
        capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(tap, "_SIOCSIFFLAGS", 0x89FF)
    node = namespace.run(lambda: open_netdev(by_name("fresh0")))
    assert len(node.taps) == 1
    assert "ip link set fresh0 up" in capfd.readouterr().err
    node.close()


def test_one_queue_of_a_tap_with_several(namespace: NetNamespace) -> None:
    namespace.persistent_tap("many0", 4)
    one = namespace.run(lambda: open_netdev(by_name("many0")))
    three = namespace.run(lambda: open_netdev(by_name("many0", 3)))
    assert (len(one.taps), len(three.taps)) == (1, 3)
    one.close()
    three.close()


def test_names_that_are_no_tap(namespace: NetNamespace) -> None:
    namespace.command("ip tuntap add tun0 mode tun")
    namespace.command("ip link add name br0 type bridge")
    namespace.persistent_tap("one0")
    for name in ("lo", "tun0", "br0"):
        assert f"'{name}' is not a tap" in refused(namespace, by_name(name))
    assert "multi_queue" in refused(namespace, by_name("one0", 2))


def test_a_busy_tap(namespace: NetNamespace) -> None:
    taps = namespace.tap("busy0")
    assert "Tap device already in use: 'busy0'" in refused(namespace, by_name("busy0"))
    os.close(taps[0])


def test_more_queues_than_are_free(namespace: NetNamespace) -> None:
    """What was opened before the one that failed is closed again."""
    before = len(os.listdir("/proc/self/fd"))
    taps = [namespace.run(lambda: open_netdev(by_name("many0", 16))) for _ in range(16)]
    assert "free queues" in refused(namespace, by_name("many0", 2))
    for node in taps:
        node.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_without_permission(namespace: NetNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object) -> int:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(tap.fcntl, "ioctl", denied)
    assert "ip tuntap add tap9 mode tap user NAME" in refused(namespace, by_name("tap9"))


def test_without_the_device(namespace: NetNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tap, "DEVICE", "/dev/net/none")
    assert "load the module tun" in refused(namespace, by_name("tap9"))


# ---- by descriptor -------------------------------------------------------------------------------


def test_descriptors_become_the_nodes_own(namespace: NetNamespace) -> None:
    taps = namespace.tap("two0", 2)
    os.set_blocking(taps[0], True)
    node = namespace.run(lambda: open_netdev(by_fds(*taps)))
    assert node.taps == taps and not os.get_blocking(taps[0])
    node.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(taps[0])


def test_descriptors_that_are_refused_stay_the_callers(namespace: NetNamespace) -> None:
    one, two, other = (namespace.tap("one0"), namespace.tap("two0", 2), namespace.tap("other0", 2))
    null = os.open("/dev/null", os.O_RDWR)
    with socket.socket(socket.AF_UNIX) as unix:
        for fds, text in (([null], "is no open tap"), ([unix.fileno()], "is no open tap"),
                          ([99999], "Bad file descriptor"), ([0], "standard input or output"),
                          ([two[0], 2], "standard input or output"),
                          ([two[0], null], "is no open tap"),
                          ([two[0], other[0]], "no queues of one interface"),
                          ([one[0], two[0]], "no queues of one interface")):
            assert text in refused(namespace, by_fds(*fds)), fds
    for fd in (*one, *two, *other, null):
        os.fstat(fd)
        os.close(fd)


def test_descriptors_of_the_wrong_kind(namespace: NetNamespace) -> None:
    namespace.command("ip tuntap add tun0 mode tun")

    def attach(name: str, kind: int) -> int:
        fd = os.open("/dev/net/tun", os.O_RDWR)
        tap.fcntl.ioctl(fd, tap.TUNSETIFF, tap._IFREQ.pack(name.encode(), kind))
        return fd

    for name, kind in (("tun0", 0x5001), ("plain0", 0x1002)):
        fd = namespace.run(lambda name=name, kind=kind: attach(name, kind))  # type: ignore[misc]
        assert "of the wrong kind" in refused(namespace, by_fds(fd))
        os.close(fd)


# ---- others --------------------------------------------------------------------------------------


def test_a_foreign_back_end_opens_nothing() -> None:
    config = NetdevConfig("n", "vhost-user")
    assert open_netdev(config).taps == []


def test_one_tap_for_two_back_ends() -> None:
    nodes = [NetNode(by_name("many0", 2), []), NetNode(by_fds(7), [])]
    check_others(by_name("tap0"), nodes)
    check_others(by_fds(8), nodes)
    with pytest.raises(ConfigError, match=r"already in use: 'many0': netdev 'n' has it"):
        check_others(by_name("many0"), nodes)


@pytest.mark.parametrize(("doomed", "state", "busy"), [
    (True, "running", True), (True, "starting", True), (True, "dead", False),
    (False, "running", False)])
def test_a_tap_is_free_when_its_last_worker_is_gone(doomed: bool, state: str, busy: bool) -> None:
    node = NetNode(by_name("tap0"), [])
    assert not node.is_busy()
    worker: Any = SimpleNamespace(is_doomed=doomed, state=state)
    node.workers = [worker]
    assert node.is_busy() is busy
