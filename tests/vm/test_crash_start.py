"""Workers die while the guest's driver comes up and goes: in handshake, at DRIVER_OK, at reset."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from tests.support.killer import Killer, wait_quiet

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.support.test_vm import TestVm

    Start = Callable[..., TestVm]

pytestmark = pytest.mark.vm


def test_deaths_while_the_driver_comes_and_goes(start_vm: Start, tmp_path: Path) -> None:
    disk = tmp_path / "disk.img"
    disk.write_bytes(os.urandom(4 << 20))
    vm = start_vm("-smp", "2", disks=(f"{disk},direct=off",))
    vm.qmp.command("query-status")
    with Killer(vm.process.pid, 6, longest=400) as killer:
        rounds = 0
        while killer.kills < 6:
            assert vm.guest("blk.init 0").ok, vm.story()
            assert vm.guest(f"blk.overlap 0 0 4 1 {1 + rounds}").ok, vm.story()
            rounds += 1
    wait_quiet(vm.process.pid)
    assert vm.guest("blk.init 0").ok
    vm.qmp.command("query-status")
    assert not [event for event in vm.qmp.events if event["event"] == "WORKER_GIVEN_UP"]
