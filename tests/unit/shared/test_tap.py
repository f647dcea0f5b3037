"""Taps: names, and descriptors that are none. Real ones: tests/native/test_net.py."""

from __future__ import annotations

import os

import pytest

from shared import tap
from shared.tap import TapError, adopt_taps, check_name
from tests.support.capabilities import require
from tests.support.net_namespace import NetNamespace


@pytest.mark.parametrize("name", ["tap0", "a", "x" * 15, "t-1.2_3"])
def test_names(name: str) -> None:
    assert check_name(name) == name.encode()


@pytest.mark.parametrize("name", ["", "x" * 16, ".", "..", "a/b", "a b", "a\tb", "a\0b", "tap%d",
                                  "a:1", "\u00e9" * 8])
def test_names_that_no_interface_can_have(name: str) -> None:
    with pytest.raises(TapError):
        check_name(name)


def test_descriptors_that_are_no_taps() -> None:
    with open(os.devnull) as file, pytest.raises(TapError, match="is no open tap"):
        adopt_taps([file.fileno()])
    with pytest.raises(TapError, match="is no open tap"):
        adopt_taps([12345])
    adopt_taps([])


def test_without_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tap, "DEVICE", "/dev/net/none")
    with pytest.raises(TapError, match="load the module tun"):
        tap.open_tap("tap0")


def test_interfaces_that_are_there() -> None:
    assert tap.exists("lo")
    assert not tap.exists("none0")
    with pytest.raises(TapError, match="can't be the name"):
        tap.exists("a/b")


def test_interfaces_come_up() -> None:
    require("net_admin")
    namespace = NetNamespace()
    try:
        fds = namespace.tap("tap0", up=False)
        for _ in range(2):
            namespace.run(lambda: tap.bring_up("tap0"))
            assert "UP" in namespace.command("ip -o link show tap0")
        with pytest.raises(TapError, match="'none0' can't be brought up"):
            namespace.run(lambda: tap.bring_up("none0"))
        os.close(fds[0])
    finally:
        namespace.close()


def test_a_queue_that_fails_closes_those_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    require("net_admin")
    namespace = NetNamespace()
    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(tap, "HEADER_BYTES", 3)
    try:
        with pytest.raises(TapError, match="takes no headers of 3 bytes"):
            namespace.run(lambda: tap.open_tap("tap0", 4))
        assert len(os.listdir("/proc/self/fd")) == before
    finally:
        namespace.close()
