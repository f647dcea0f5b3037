"""A guest's RAM becomes huge pages, without being asked and without the guest's notice."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.capabilities import require
from tests.support.test_vm import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support.test_vm import TestVm

    Start = Callable[..., TestVm]

pytestmark = pytest.mark.vm

MIB = 1 << 20
AT = 64 * MIB
LENGTH = 32 * MIB


def huge_bytes(vm: TestVm) -> int:
    """How much of guest RAM the core has mapped as huge pages."""
    text = Path(f"/proc/{vm.process.pid}/smaps").read_text()
    found = re.search(r"guest-ram.*?ShmemPmdMapped: +(\d+) kB", text, re.S)
    assert found
    return int(found[1]) << 10


def thread(vm: TestVm) -> Path:
    """The thread that makes them."""
    return next(task for task in Path(f"/proc/{vm.process.pid}/task").iterdir()
                if (task / "comm").read_text() == "sv-huge-pages\n")


@pytest.fixture(autouse=True)
def _huge() -> None:
    require("huge_memfd")


def test_what_a_guest_fills_is_huge_and_unchanged(start_vm: Start) -> None:
    vm = start_vm(memory=256)
    assert vm.guest("echo").ok
    assert huge_bytes(vm) == 0  # it uses little
    for byte in range(1, 6):  # while it is being made
        assert vm.guest(f"memory.fill {AT} {LENGTH} {byte}").ok
        assert vm.guest(f"memory.check {AT} {LENGTH} {byte}").ok
    wait_until(lambda: huge_bytes(vm) >= LENGTH, "huge pages")
    assert vm.guest(f"memory.check {AT} {LENGTH} 5").ok
    vm.qmp.command("stop")
    vm.qmp.command("cont")
    vm.qmp.command("system_reset")
    vm.wait_output(r"^ready\r?\n")
    assert vm.guest("echo").ok


def test_the_thread_is_confined(start_vm: Start) -> None:
    vm = start_vm(memory=256)
    assert vm.guest("echo").ok
    with pytest.raises(StopIteration):
        thread(vm)  # there is nothing to do for it yet
    assert vm.guest(f"memory.fill {AT} {LENGTH} 1").ok
    wait_until(lambda: any(task.read_text() == "sv-huge-pages\n" for task in
                           Path(f"/proc/{vm.process.pid}/task").glob("*/comm")), "the thread")

    def facts() -> dict[str, str]:
        lines = (thread(vm) / "status").read_text().splitlines()
        return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}

    wait_until(lambda: facts()["Seccomp"] == "2", "its confinement")
    assert facts()["CapEff"] == facts()["CapPrm"] == "0" * 16
    assert facts()["NoNewPrivs"] == "1"
