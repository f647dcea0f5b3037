"""NIC slots as QMP sees them, without a machine."""

from __future__ import annotations

from typing import Any

from vmm.config.model import NetdevConfig


class FakeNetNode:
    def __init__(self, id: str, device_id: str) -> None:
        self.config = NetdevConfig(id, "tap")
        self.config.limits["rx-bytes"] = 1 << 20
        self.device_id = device_id
        self.taps: list[int] = []


class FakeFamily:
    name = "net"


class FakeNic:
    def __init__(self) -> None:
        self.mac = b"\x52\x54\0\x12\x34\x56"
        self.pairs = 1
        self.link_is_up = True


class FakeOccupant:
    def __init__(self, id: str) -> None:
        self.id = id


class FakeSlot:
    def __init__(self, index: int, occupant: FakeOccupant | None) -> None:
        self.index = index
        self.family: FakeFamily | None = FakeFamily()
        self.occupant = occupant
        self.device = FakeNic()


def slots(nets: dict[str, Any]) -> list[FakeSlot]:
    """Two, with `nic0` on `net0`, which comes to `nets`, in the first."""
    nets["net0"] = FakeNetNode("net0", "nic0")
    return [FakeSlot(0, FakeOccupant("nic0")), FakeSlot(1, None)]
