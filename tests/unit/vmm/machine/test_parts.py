"""What is known of a device before its module is loaded."""

from __future__ import annotations

from vmm.machine.microvm import FAMILIES
from vmm.machine.parts import PARTS


def test_places_are_counted_for_what_is_made() -> None:
    assert {driver: find().family for driver, find in PARTS.items()} == FAMILIES
