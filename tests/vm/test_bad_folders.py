"""No virtiofsd, silent, lying or gone, holds up QMP, `stop`, `quit` or what else the guest does.

The guest drives the device's registers by hand; tests/unit/vmm/devices/test_virtio_fs.py has more
kinds of bad ones, tests/lab a good one.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import pytest

from tests.support import hostile_backend
from tests.support.hostile_backend import HostileBackend
from tests.support.test_vm import wait_until
from vmm.arch.x86_64 import layout
from vmm.transport import mmio_registers as r

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.support.test_vm import TestVm

    Start = Callable[..., TestVm]

pytestmark = pytest.mark.vm

PROMPT = 2.0  # seconds for QMP, on a small and busy machine
END = 15.0
SLOTS = 8     # disks and NICs stand before


class Registers:
    """Those of the first device behind disks and NICs, as the guest sees them."""

    def __init__(self, vm: TestVm) -> None:
        self.vm = vm
        self.base = layout.virtio_base(SLOTS)

    def read(self, register: int) -> int:
        return int(self.vm.guest(f"read32 {self.base + register:#x}").text.split()[-1], 0)

    def write(self, register: int, value: int) -> None:
        assert self.vm.guest(f"write32 {self.base + register:#x} {value}").ok


def folder(path: Path) -> list[str]:
    """As Kata has it: whatever the chardev says, the VMM connects."""
    return ["-chardev", f"socket,id=virtio_fs,path={path},server,nowait",
            "-device", "vhost-user-fs-device,chardev=virtio_fs,tag=shared,id=fs0"]


def promptly(vm: TestVm, command: str) -> Any:
    """The command's result, which must come without delay."""
    began = time.monotonic()
    result = vm.qmp.command(command)
    assert time.monotonic() - began < PROMPT
    return result


@pytest.mark.parametrize("behaviour", [
    hostile_backend.silent, hostile_backend.garbage, hostile_backend.hang_up,
    hostile_backend.asks_for_a_window], ids=lambda b: b.__name__)
def test_a_bad_virtiofsd_holds_up_nothing(start_vm: Start, tmp_path: Path,
                                          behaviour: Callable[..., None]) -> None:
    path = tmp_path / "fs.sock"
    with HostileBackend(path, behaviour) as backend:
        vm = start_vm("-smp", "2", *folder(path))
        assert backend.seen.wait(10)
        registers = Registers(vm)
        assert registers.read(r.DEVICE_ID) == 26
        # What the core knows needs nobody.
        assert registers.read(r.CONFIG) == int.from_bytes(b"shar", "little")
        assert registers.read(r.STATUS) == 0
        registers.write(r.STATUS, r.ACKNOWLEDGE | r.DRIVER)
        # The features are asked of virtiofsd: the vCPU waits, nobody else.
        vm.send(f"read32 {registers.base + r.DEVICE_FEATURES:#x}\n")
        assert promptly(vm, "query-status")["status"] == "running"
        vm.wait_output(r"ok read32 0x0\b", END)
        assert registers.read(r.STATUS) & r.NEEDS_RESET
        promptly(vm, "stop")
        promptly(vm, "cont")
        registers.write(r.STATUS, 0)
        assert registers.read(r.STATUS) == 0
        assert vm.guest("echo").ok
        vm.qmp.command("quit")
        assert vm.wait(END) == 0


def test_the_start_wants_somebody_who_listens(start_vm: Start, tmp_path: Path) -> None:
    vm = start_vm(*folder(tmp_path / "nobody.sock"))
    wait_until(lambda: vm.process.poll() is not None, "the refusal")
    assert vm.wait() == 1
    assert "-chardev socket,id=virtio_fs: cannot connect to" in vm.error_text()
