"""NICs in slots: which back ends fit, which addresses they get."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest

from vmm.config.model import DeviceConfig, NetdevConfig, VmConfig
from vmm.devices.virtio_net import VirtioNet
from vmm.errors import ConfigError
from vmm.event_loop import EventLoop
from vmm.net import node as node_module
from vmm.net.family import NetFamily
from vmm.net.mac import format_mac
from vmm.net.node import NetNode

GIVEN = bytes.fromhex("525400010203")


class Slots:
    """The two slots of a machine, empty."""

    def __init__(self, config: VmConfig | None = None) -> None:
        self.loop = EventLoop()
        self.config = config or VmConfig()
        self.family = NetFamily(self.config)
        self.devices = [self.family.make_empty(f"#net.{index}", cast("Any", None), self.loop,
                                               self.config) for index in range(2)]

    def plug(self, index: int, mac: str = "", taps: int = 1) -> VirtioNet:
        device = self.devices[index]
        config = NetdevConfig(f"n{index}", "tap")
        options = {"mac": mac}
        node = NetNode(config, [-1] * taps)
        kind = self.family.workers(cast("Any", None), node, f"nic{index}", device, options)
        assert kind._mac == device.next_mac
        self.family.warn(f"nic{index}", device, node, options)
        self.family.show(device, node, options)
        return device

    def close(self) -> None:
        for device in self.devices:
            device.close()
        self.loop.close()


@pytest.fixture
def slots() -> Iterator[Slots]:
    slots = Slots()
    yield slots
    slots.close()


def test_empty_slots_have_addresses_of_their_own(slots: Slots) -> None:
    first, second = (device.mac for device in slots.devices)
    assert first != second and not slots.devices[0].is_present


def test_a_nic_without_address_gets_the_slots(slots: Slots,
                                              capfd: pytest.CaptureFixture[str]) -> None:
    before = slots.devices[0].mac
    assert slots.plug(0).mac == before
    assert not capfd.readouterr().err  # nothing that a driver would have to learn


def test_a_given_address_is_told_of(slots: Slots, capfd: pytest.CaptureFixture[str]) -> None:
    before = slots.devices[0].mac
    assert slots.plug(0, format_mac(GIVEN)).mac == GIVEN
    text = capfd.readouterr().err
    assert format_mac(GIVEN) in text and format_mac(before) in text


def test_no_two_nics_have_one_address(slots: Slots) -> None:
    slots.plug(0, format_mac(GIVEN))
    with pytest.raises(ConfigError, match=f"Another NIC has the address {format_mac(GIVEN)}"):
        slots.plug(1, format_mac(GIVEN))
    assert not slots.devices[1].is_present
    slots.devices[0].show_empty()
    assert slots.plug(1, format_mac(GIVEN)).mac == GIVEN  # it has moved
    assert slots.plug(0).mac != GIVEN


def test_the_next_nic_of_a_slot_has_the_last_ones_address(slots: Slots) -> None:
    """A driver that is up uses it."""
    slots.plug(0, format_mac(GIVEN)).show_empty()
    assert slots.plug(0).mac == GIVEN


def test_addresses_of_the_command_line_are_not_made_up_again() -> None:
    config = VmConfig()
    config.uuid = "8f3d1c52-6a4e-4b6f-9a3f-0d9c5f1b2a3c"
    plain = Slots(config)
    macs = [device.mac for device in plain.devices]
    plain.close()
    config.devices = [DeviceConfig("virtio-net-device", "a", {"mac": format_mac(macs[0])}),
                      DeviceConfig("virtio-blk-device", "b", {})]
    other = Slots(config)
    assert other.devices[0].mac == macs[1] and other.devices[1].mac not in macs
    other.close()


def test_back_ends_that_do_not_fit(slots: Slots) -> None:
    with pytest.raises(ConfigError, match="has 2 queues, the NIC of this slot has 1"):
        slots.plug(0, taps=2)
    node = NetNode(NetdevConfig("f", "vhost-user"), [])
    with pytest.raises(ConfigError, match="'f' is a vhost-user back end: it can't come"):
        slots.family.workers(cast("Any", None), node, "nic", slots.devices[0], {})


def test_what_there_is_no_back_end_for(slots: Slots) -> None:
    assert "there is no netdev 'x'" in str(slots.family.not_found("x"))


def test_the_others_are_asked_before_anything_is_opened(
        slots: Slots, monkeypatch: pytest.MonkeyPatch) -> None:
    config = NetdevConfig("n", "tap")
    config.ifname = "tap0"
    opened: list[NetdevConfig] = []
    monkeypatch.setattr(node_module, "open_netdev", opened.append)
    slots.family.open(config, {})
    assert opened == [config]
    with pytest.raises(ConfigError, match="already in use"):
        slots.family.open(config, {"m": SimpleNamespace(config=config)})  # type: ignore[dict-item]
    assert opened == [config]
