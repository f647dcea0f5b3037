"""A VM that a thread makes: whole when it has been waited for, else refused by the call's name."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.support import tiny_guest as asm
from tests.support.capabilities import require
from tests.support.tiny_guest import SIZE, TinyGuest
from vmm.config.model import MemoryConfig
from vmm.errors import HypervisorError
from vmm.hypervisor.interface import EXIT_RESET
from vmm.hypervisor.kvm import KvmHypervisor
from vmm.memory import GuestMemory

pytestmark = pytest.mark.vm


@pytest.fixture
def address() -> Iterator[int]:
    """Of a VM's memory in this process; no VM stays."""
    require("kvm")
    before = vms()
    config = MemoryConfig()
    config.size = SIZE
    memory = GuestMemory(config)
    yield memory.regions[0].user_addr
    assert vms() == before
    memory.close()


def vms() -> int:
    return sum(os.readlink(f"/proc/self/fd/{fd}") == "anon_inode:kvm-vm"
               for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}"))


def leaves(hypervisor: KvmHypervisor) -> list[tuple[int, int, int]]:
    """What KVM supports, by function, index and EAX: some registers hold the APIC id of the
    processor that asks."""
    return [row[:2] + row[3:4] for row in hypervisor.supported_cpuid()]


def test_it_runs_a_guest() -> None:
    require("kvm")
    guest = TinyGuest(asm.mov_eax(7), asm.mov_edx(0x600), asm.OUT_EAX, asm.RESET_PULSE,
                      begin=True)
    try:
        assert guest.wait_end() == EXIT_RESET
        assert len(guest.ports.writes) == 1
        guest.vm.wait()  # again: nothing to wait for
        guest.vm.reset()  # what it was created with is known
        other = KvmHypervisor()
        assert leaves(guest.hypervisor) == leaves(other)
        other.close()
    finally:
        guest.close()


def test_several_slots(address: int) -> None:
    hypervisor = KvmHypervisor()
    vm = hypervisor.begin_vm([(0, SIZE // 2, address), (1 << 32, SIZE // 2, address + SIZE // 2)])
    vm.wait()
    event = os.eventfd(0)
    vm.add_irqfd(5, event)  # there are interrupt controllers
    os.close(event)
    vm.close()
    hypervisor.close()


@pytest.mark.parametrize(("slots", "text"), [
    ([(1, 4096, 0)], r"map 0x1000 bytes of RAM at 0x1 \(slot 0\)"),
    ([(0, 4096, 4096), (0, 4096, 8192)], r"map 0x1000 bytes of RAM at 0x0 \(slot 1\)")])
def test_what_kvm_refuses_is_named(address: int, slots: list[tuple[int, int, int]],
                                   text: str) -> None:
    hypervisor = KvmHypervisor()
    vm = hypervisor.begin_vm([(gpa, size, address + offset) for gpa, size, offset in slots])
    with pytest.raises(HypervisorError, match=text):
        vm.wait()
    vm.close()
    hypervisor.close()


def test_no_vm_at_all(address: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KvmHypervisor, "_run_size", lambda self: 4096)
    hypervisor = KvmHypervisor()
    null = os.open("/dev/null", os.O_RDWR)
    os.dup2(null, hypervisor._fd)
    os.close(null)
    vm = hypervisor.begin_vm([(0, SIZE, address)])
    with pytest.raises(HypervisorError, match="cannot create a VM"):
        vm.wait()
    vm.close()
    hypervisor.close()


def test_closed_before_it_is_ready(address: int) -> None:
    for _ in range(20):
        hypervisor = KvmHypervisor()
        vm = hypervisor.begin_vm([(0, SIZE, address)])
        vm.close()
        vm.close()
        hypervisor.close()
