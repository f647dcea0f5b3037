"""MAC addresses: those that people write, those that we make up."""

from __future__ import annotations

import pytest

from vmm.net.mac import MacSource, format_mac, parse_mac

UUID = "8f3d1c52-6a4e-4b6f-9a3f-0d9c5f1b2a3c"


@pytest.mark.parametrize(("text", "mac"), [
    ("52:54:00:12:34:56", "525400123456"), ("52:54:00:AB:Cd:eF", "525400abcdef"),
    ("02:00:00:00:00:00", "020000000000"), ("fe:ff:ff:ff:ff:ff", "feffffffffff")])
def test_addresses(text: str, mac: str) -> None:
    assert parse_mac(text) == bytes.fromhex(mac)
    assert format_mac(bytes.fromhex(mac)) == text.lower()


@pytest.mark.parametrize("text", [
    "", "52:54:00:12:34", "52:54:00:12:34:56:78", "52:54:00:12:34:5", "52:54:00:12:34:567",
    "52:54:00:12:34:5g", "525400123456", "52-54-00-12-34-56", "52:54:00:12:34:+1",
    "52:54:00:12:34:-1", "52:54:00:12:34: 1", "52:54:00:12:34:1_", "\u0665\u0662:54:00:12:34:56",
    "00:00:00:00:00:00", "01:00:5e:00:00:01", "ff:ff:ff:ff:ff:ff", "53:54:00:12:34:56"])
def test_what_no_nic_can_have(text: str) -> None:
    assert parse_mac(text) is None


def test_a_uuid_gives_the_same_ones_at_each_start() -> None:
    first, second = MacSource(UUID), MacSource(UUID)
    taken = [first.take() for _ in range(3)]
    assert taken == [second.take() for _ in range(3)]
    assert len(set(taken)) == 3
    assert MacSource(UUID[:-1] + "d").take() != taken[0]


def test_without_a_uuid_they_are_random() -> None:
    assert len({MacSource("").take() for _ in range(20)}) > 18


def test_they_are_locally_administered_and_unicast() -> None:
    mac = MacSource("").take()
    assert mac[:3] == b"\x52\x54\x00" and mac[0] & 2 and not mac[0] & 1


def test_chosen_ones_are_left_out() -> None:
    free = MacSource(UUID)
    expected = [free.take() for _ in range(4)]
    source = MacSource(UUID)
    source.reserve(expected[0])
    source.reserve(expected[2])
    assert [source.take(), source.take()] == [expected[1], expected[3]]


def test_after_the_last_one_comes_the_first() -> None:
    source = MacSource(UUID)
    source._next = 0xFFFFFF
    assert [source.take(), source.take()] == [b"\x52\x54\x00\xff\xff\xff", b"\x52\x54\x00\0\0\0"]
