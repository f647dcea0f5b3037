"""The config space of a slot whose disk changes while a driver reads it."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import pytest

from vmm.devices.virtio_blk import VirtioBlk
from vmm.event_loop import EventLoop

if TYPE_CHECKING:
    from vmm.memory import GuestMemory


def test_the_last_disks_answer_does_not_outlive_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk goes between its worker's answer and the moment at which it would be kept."""
    device = VirtioBlk("slot", -1, cast("GuestMemory", None), EventLoop())
    device.show_disk(readonly=False)

    def fetch(offset: int, size: int) -> bytes:
        device.show_empty()
        return b"\xff" * size

    monkeypatch.setattr(device, "_fetch_config", fetch)
    device.read_config(0, 8)
    assert device.read_config(0, 8) == bytes(8)  # no capacity
