"""Taps that are made, brought up and put on a bridge, in a namespace of their own."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from typing import TYPE_CHECKING

import pytest

from shared.tap import TapError, bring_up, close_all, exists, join_bridge, make_tap, tap_name
from tests.support.capabilities import require
from tests.support.net_namespace import NetNamespace

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.native

SIOCBRADDBR = 0x89A0


@pytest.fixture
def namespace() -> Iterator[NetNamespace]:
    require("net_admin")
    namespace = NetNamespace()
    yield namespace
    namespace.close()


def add_bridge(name: str) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, SIOCBRADDBR, struct.pack("16s", name.encode()))


@pytest.mark.parametrize("queues", [1, 4])
def test_a_free_name_is_found(namespace: NetNamespace, queues: int) -> None:
    def scene() -> None:
        first, fds = make_tap("", queues)
        second, more = make_tap("", queues)
        assert first != second
        assert first.startswith("svtap")
        assert [tap_name(fd) for fd in fds] == [first] * queues
        close_all(fds)
        assert not exists(first)  # it goes with its last descriptor
        assert exists(second)
        close_all(more)

    namespace.run(scene)


@pytest.mark.parametrize("queues", [1, 2])
def test_what_is_there_is_not_taken(namespace: NetNamespace, queues: int) -> None:
    """With several queues the kernel would hand out one more of somebody else's tap."""
    def scene() -> None:
        before = len(os.listdir("/proc/self/fd"))
        name, fds = make_tap("mine", queues)
        assert name == "mine"
        with pytest.raises(TapError, match="There is an interface 'mine' already"):
            make_tap("mine", queues)
        close_all(fds)
        assert len(os.listdir("/proc/self/fd")) == before

    namespace.run(scene)


def test_a_port_of_a_bridge(namespace: NetNamespace) -> None:
    def scene() -> None:
        add_bridge("br0")
        name, fds = make_tap("")
        bring_up(name)
        join_bridge(name, "br0")
        with pytest.raises(TapError, match="can't join the bridge 'br0'"):
            join_bridge(name, "br0")  # it has joined
        for port, bridge in (("lo", "br1"), ("nothing", "br0"), (name, name)):
            with pytest.raises(TapError, match="can't join the bridge"):
                join_bridge(port, bridge)
        close_all(fds)

    namespace.run(scene)


def test_an_interface_that_has_gone(namespace: NetNamespace) -> None:
    def scene() -> None:
        with pytest.raises(TapError, match="can't be brought up"):
            bring_up("nothing")
        with open(os.devnull) as file, pytest.raises(TapError, match="is no open tap"):
            tap_name(file.fileno())

    namespace.run(scene)
