"""What the tests of the supervisor share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import pytest

from tests.unit.vmm.worker.fakes import Case
from vmm.worker import supervisor as module
from vmm.worker.supervisor import Ward

if TYPE_CHECKING:
    from vmm.machine.machine import Device


@pytest.fixture
def case(monkeypatch: pytest.MonkeyPatch) -> Case:
    case = Case()
    monkeypatch.setattr(module, "time", case.world)
    # What was made before knows the real time.
    case.supervisor._wards["disk"] = Ward(cast("Device", case.device), cast("Any", case.kind))
    case.supervisor._adopt(case.supervisor._wards["disk"])
    case.world.now += 10.0  # it has served for a while
    return case
