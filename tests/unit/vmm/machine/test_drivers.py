"""The table of devices: what it names exists."""

from __future__ import annotations

import pytest

from vmm.block.family import BlockFamily
from vmm.machine.drivers import DRIVERS
from vmm.machine.part import Part
from vmm.net.family import NetFamily


@pytest.mark.parametrize("name", DRIVERS)
def test_what_makes_it(name: str) -> None:
    part = DRIVERS[name].part()
    assert issubclass(part, Part) and part.make is not Part.make


def test_families() -> None:
    families = {driver.family for driver in DRIVERS.values()}
    assert families == {"", BlockFamily.name, NetFamily.name}
