"""Taps: names, and descriptors that are none. Real ones: tests/native/test_net.py."""

from __future__ import annotations

import os

import pytest

from shared import tap
from shared.tap import TapError, adopt_taps, check_name


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
