"""Limits, zeroes and statistics of a disk, from the command line to the guest."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from shared.statistics import FOLDER, decode_page
from tests.support.guest import SECTOR
from tests.support.test_vm import TestVm, wait_until

Start = Callable[..., TestVm]

pytestmark = pytest.mark.vm

MIB = 1 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(os.urandom(MIB))
    return path


def counters(vm: TestVm) -> dict[str, int]:
    return dict(vm.qmp.command("query-workers")[0]["counters"])


def test_a_limit_holds_and_stop_does_not_wait_for_it(start_vm: Start, disk: Path) -> None:
    limits = "throttling.iops-total=5,throttling.iops-total-max=8"
    vm = start_vm(disks=(f"{disk},direct=off,{limits}",))
    assert vm.guest("blk.info 0").ok
    inserted = vm.qmp.command("query-block")[0]["inserted"]
    assert (inserted["iops"], inserted["iops_max"]) == (5, 8)
    # Many more than there are tokens, eight at a time.
    vm.send("blk.read 0 0 64 8 1\n")
    wait_until(lambda: counters(vm)["throttled"] > 0, "the limit holds")
    began = time.monotonic()
    vm.qmp.command("stop")
    assert time.monotonic() - began < 1.5
    served = counters(vm)["reads"]
    assert served < 64
    vm.qmp.command("cont")
    wait_until(lambda: counters(vm)["reads"] > served + 1, "it goes on")
    began = time.monotonic()
    vm.qmp.command("quit")
    assert vm.wait() == 0
    assert time.monotonic() - began < 4


def test_zeroes_give_space_back(start_vm: Start, disk: Path) -> None:
    vm = start_vm(disks=(f"{disk},direct=off,discard=unmap,detect-zeroes=unmap",))
    before = os.stat(disk).st_blocks * SECTOR
    assert vm.guest("blk.discard 0 0 512").ok
    assert vm.guest("blk.zero 0 512 512 1").ok
    assert os.stat(disk).st_blocks * SECTOR <= before - 512 * SECTOR * 2
    assert vm.guest("blk.is-zero 0 512 512").ok


def test_figures_by_qmp_and_by_page(start_vm: Start, disk: Path) -> None:
    vm = start_vm("-name", "figures", disks=(f"{disk},direct=off,discard=unmap",))
    assert vm.guest("blk.write 0 0 64 1").ok
    assert vm.guest("blk.read 0 0 128").ok
    assert vm.guest("blk.flush 0").ok
    assert vm.guest("blk.discard 0 0 64").ok
    assert not vm.guest(f"blk.read 0 {MIB // SECTOR} 8").ok
    stats = vm.qmp.command("query-blockstats")[0]["stats"]
    assert stats["wr_bytes"] == 64 * SECTOR
    assert stats["rd_bytes"] == 128 * SECTOR
    assert stats["unmap_bytes"] == 64 * SECTOR
    assert (stats["flush_operations"], stats["unmap_operations"]) == (1, 1)
    assert stats["invalid_rd_operations"] >= 1
    assert stats["failed_rd_operations"] == 0
    for kind in ("rd", "wr", "flush", "unmap"):
        assert 0 < stats[f"{kind}_total_time_ns"] < 60_000_000_000
    found = list(Path(FOLDER).glob("stratovirt.*.figures.blk0"))
    page = decode_page(found[0].read_bytes())
    assert page is not None
    assert (page.vm, page.device) == ("figures", "blk0")
    assert page.counters[0]["written_bytes"] == 64 * SECTOR
    assert sum(page.histograms[0]["write"]) == stats["wr_operations"]
    vm.qmp.command("quit")
    assert vm.wait() == 0
    assert not found[0].exists()


def test_the_page_goes_with_a_vm_that_is_killed(start_vm: Start, disk: Path) -> None:
    vm = start_vm("-name", "killed", disks=(f"{disk},direct=off",))
    assert vm.guest("blk.info 0").ok
    assert list(Path(FOLDER).glob("stratovirt.*.killed.blk0"))
    vm.process.kill()
    vm.wait()
    wait_until(lambda: not list(Path(FOLDER).glob("stratovirt.*.killed.blk0")),
               "the nursery removes the page")
