"""A slot at rest, and one that a driver runs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.fake_slot import Slot


@pytest.fixture
def slot() -> Iterator[Slot]:
    result = Slot()
    yield result
    result.close()


@pytest.fixture
def running(slot: Slot) -> Slot:
    slot.run()
    assert slot.driver.status == 0xF
    slot.device.calls.clear()
    return slot
