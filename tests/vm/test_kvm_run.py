"""The run loop on /dev/kvm: accesses, kicks, pauses, ends. Guests of a few bytes."""

from __future__ import annotations

import _thread
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support import tiny_guest as asm
from tests.support.capabilities import require
from tests.support.tiny_guest import MMIO, TinyGuest, soon, wait_for
from vmm.errors import HypervisorError
from vmm.hypervisor.interface import (
    EXIT_INTERNAL_ERROR,
    EXIT_POWEROFF,
    EXIT_RESET,
    EXIT_SHUTDOWN,
    EXIT_UNKNOWN,
    HOLD_ACCESSES,
    HOLD_GUEST,
    HOLD_NOTHING,
)
from vmm.hypervisor.kvm import RESET_VALUE, SLEEP_TYPE_S5, KvmHypervisor

pytestmark = pytest.mark.vm

Boot = Callable[..., TinyGuest]
LONG = 20.0


@pytest.fixture
def boot() -> Iterator[Boot]:
    require("kvm")
    guests: list[TinyGuest] = []

    def start(*code: bytes, **options: bool) -> TinyGuest:
        guests.append(TinyGuest(*code, **options))
        return guests[-1]

    yield start
    for guest in guests:
        guest.close()


def test_port_accesses_of_every_width(boot: Boot) -> None:
    guest = boot(asm.mov_edx(0x604), asm.mov_eax(0x11223344), asm.OUT_AL, asm.OUT_AX,
                 asm.OUT_EAX, asm.IN_EAX, asm.STORE_EAX, asm.word(0x2000),
                 asm.IN_AX, asm.STORE_EAX, asm.word(0x2004), asm.RESET_PULSE, paused=True)
    guest.ports.answers = [0xAABBCCDD, 0x5566]
    guest.thread.start()
    assert guest.wait_end() == EXIT_RESET
    assert guest.ports.writes == [(4, 1, 0x44), (4, 2, 0x3344), (4, 4, 0x11223344)]
    assert guest.ports.reads == [(4, 4), (4, 2)]
    assert guest.memory.read(0x2000, 8) == bytes.fromhex("ddccbbaa 6655bbaa")


def test_mmio_accesses(boot: Boot) -> None:
    guest = boot(asm.mov_eax(0x11223344), asm.STORE_EAX, asm.word(MMIO + 8), asm.STORE_AL,
                 asm.word(MMIO + 3), asm.LOAD_EAX, asm.word(MMIO + 4), asm.STORE_EAX,
                 asm.word(0x2000), asm.LOAD_EAX, asm.word(MMIO + 0x2000), asm.STORE_EAX,
                 asm.word(0x2004), asm.RESET_PULSE, paused=True)
    guest.mmio.answers = [0xCAFEF00D]
    guest.thread.start()
    assert guest.wait_end() == EXIT_RESET
    assert guest.mmio.writes == [(8, 4, 0x11223344), (3, 1, 0x44)]
    assert guest.mmio.reads == [(4, 4)]
    assert guest.memory.read(0x2000, 8) == bytes.fromhex("0df0feca ffffffff")


def test_string_output_comes_item_by_item(boot: Boot) -> None:
    text = bytes(range(200))
    guest = boot(asm.mov_edx(0x610), asm.mov_esi(0x3000), asm.mov_ecx(200), asm.REP_OUTSB,
                 asm.mov_esi(0x3000), asm.mov_ecx(3), asm.REP_OUTSD, asm.RESET_PULSE, paused=True)
    guest.memory.write(0x3000, text)
    guest.thread.start()
    assert guest.wait_end() == EXIT_RESET
    assert guest.ports.writes[:200] == [(0x10, 1, byte) for byte in text]
    assert guest.ports.writes[200:] == [(0x10, 4, 0x03020100), (0x10, 4, 0x07060504),
                                        (0x10, 4, 0x0B0A0908)]


def test_string_input_comes_item_by_item(boot: Boot) -> None:
    guest = boot(asm.mov_edx(0x610), asm.mov_edi(0x3000), asm.mov_ecx(300), asm.REP_INSB,
                 asm.RESET_PULSE, paused=True)
    answers = [i * 7 & 0xFF for i in range(300)]
    guest.ports.answers = list(answers)
    guest.thread.start()
    assert guest.wait_end() == EXIT_RESET
    assert guest.memory.read(0x3000, 300) == bytes(answers)
    assert len(guest.ports.reads) == 300


def test_string_output_to_the_uart_stays_in_c(boot: Boot) -> None:
    text = b"hello from the guest\n" * 50
    guest = boot(asm.mov_edx(0x3F8), asm.mov_esi(0x3000), asm.mov_ecx(len(text)), asm.REP_OUTSB,
                 asm.RESET_PULSE, paused=True)
    guest.memory.write(0x3000, text)
    guest.thread.start()
    assert guest.wait_end() == EXIT_RESET
    assert guest.uart.take_output(1 << 16) == text
    counters = guest.vcpu.counters()
    assert counters["forwarded"] == 0
    assert counters["served"] == len(text) + 1


def test_absent_hardware_reads_all_ones_without_python(boot: Boot) -> None:
    guest = boot(asm.mov_eax(0x80000000), asm.mov_edx(0xCF8), asm.OUT_EAX, asm.mov_edx(0xCFC),
                 asm.IN_EAX, asm.STORE_EAX, asm.word(0x2000), asm.RESET_PULSE)
    assert guest.wait_end() == EXIT_RESET
    assert guest.memory.read(0x2000, 4) == b"\xff" * 4
    assert guest.vcpu.counters()["forwarded"] == 0


def test_interrupt_status_is_served_in_c(boot: Boot) -> None:
    """virtio 1.2, 4.2.2."""
    guest = boot(asm.LOAD_EAX, asm.word(MMIO + 0x260), asm.STORE_EAX, asm.word(0x2000),
                 asm.STORE_EAX, asm.word(MMIO + 0x264), asm.RESET_PULSE, paused=True)
    registers = guest.vm.add_virtio(MMIO + 0x200, 2, (256,))
    registers.raise_bits(2)
    registers.set_live(True)
    guest.thread.start()
    assert guest.wait_end() == EXIT_RESET
    assert guest.memory.read(0x2000, 4) == asm.word(3)
    assert registers.read(0x60, 4) == 1
    assert guest.mmio.reads == [] and guest.mmio.writes == []


def test_what_a_probe_asks_is_served_in_c(boot: Boot) -> None:
    slot = MMIO + 0x200

    def read(register: int, to: int) -> bytes:
        return asm.LOAD_EAX + asm.word(slot + register) + asm.STORE_EAX + asm.word(to)

    guest = boot(read(0, 0x2000), read(8, 0x2004), asm.mov_eax(1), asm.STORE_EAX,
                 asm.word(slot + 0x30), read(0x34, 0x2008), read(0x100, 0x200C),
                 asm.RESET_PULSE, paused=True)
    guest.vm.add_virtio(slot, 2, (256, 64)).set_config(b"disk")
    guest.thread.start()
    assert guest.wait_end() == EXIT_RESET
    assert guest.memory.read(0x2000, 16) == b"virt" + asm.word(2) + asm.word(64) + b"disk"
    assert guest.vcpu.counters()["forwarded"] == 0


def test_the_guest_is_held(boot: Boot) -> None:
    guest = boot(asm.mov_edx(0x3F8), asm.mov_eax(0x41), asm.OUT_AL, asm.RESET_PULSE, paused=True)
    guest.vm.hold(HOLD_GUEST)
    guest.thread.start()
    began = time.monotonic()
    guest.vm.wait_entered(0.05)
    assert time.monotonic() - began >= 0.05
    assert guest.uart.take_output(9) == b"" and not guest.exits
    guest.vm.hold(HOLD_ACCESSES)
    guest.vm.wait_entered(LONG)  # returns as soon as it is so
    assert guest.wait_end() == EXIT_RESET
    assert guest.uart.take_output(9) == b"A"  # C needs nobody for that


def test_accesses_wait_for_their_devices(boot: Boot) -> None:
    """Of all kinds, and one that C serves by then."""
    slot = MMIO + 0x200
    guest = boot(asm.LOAD_EAX, asm.word(slot), asm.STORE_EAX, asm.word(0x2000),
                 asm.mov_edx(0x604), asm.IN_EAX, asm.STORE_EAX, asm.word(0x2004),
                 asm.STORE_EAX, asm.word(MMIO + 8), asm.RESET_PULSE, paused=True)
    guest.vm.hold(HOLD_ACCESSES)
    guest.thread.start()
    time.sleep(0.05)  # it may have come to its first access
    assert guest.mmio.reads == [] and guest.memory.read(0x2000, 4) == bytes(4)
    guest.vm.add_virtio(slot, 2, (256,))
    guest.ports.answers = [7]
    guest.vm.hold(HOLD_NOTHING)
    assert guest.wait_end() == EXIT_RESET
    assert guest.memory.read(0x2000, 8) == b"virt" + asm.word(7)
    assert guest.mmio.reads == [] and guest.ports.reads == [(4, 4)]
    assert guest.mmio.writes == [(8, 4, 7)]


@pytest.mark.parametrize("what", [HOLD_GUEST, HOLD_ACCESSES])
def test_a_guest_that_was_held_ends_when_it_is_let_go(boot: Boot, what: int) -> None:
    """As a start that fails does it."""
    guest = boot(asm.LOAD_EAX, asm.word(MMIO), b"\xeb\xfe", paused=True)  # jmp $
    guest.vm.hold(what)
    guest.thread.start()
    guest.vm.hold(HOLD_NOTHING)
    guest.thread.request_stop()
    assert guest.thread.join(time.monotonic() + LONG)


@pytest.mark.parametrize(("offset", "value", "kind"), [
    (0, 0x20 | SLEEP_TYPE_S5 << 2, EXIT_POWEROFF), (2, RESET_VALUE, EXIT_RESET)])
def test_acpi_registers_end_the_guest(boot: Boot, offset: int, value: int, kind: int) -> None:
    guest = boot(asm.mov_eax(value), asm.STORE_AL, asm.word(0xF0000000 + offset), asm.JUMP_SELF,
                 paused=True)
    guest.vm.add_power_registers(0xF0000000)
    guest.thread.start()
    assert guest.wait_end() == kind


def test_ioeventfd_takes_the_write(boot: Boot) -> None:
    guest = boot(asm.mov_eax(1), asm.STORE_EAX, asm.word(MMIO + 0x50), asm.mov_eax(2),
                 asm.STORE_EAX, asm.word(MMIO + 0x50), asm.RESET_PULSE, paused=True)
    doorbell = os.eventfd(0, os.EFD_NONBLOCK)
    guest.vm.add_ioeventfd(MMIO + 0x50, 4, 1, doorbell)
    with pytest.raises(HypervisorError, match="ioeventfd"):
        guest.vm.add_ioeventfd(MMIO + 0x50, 4, 1, doorbell)
    guest.thread.start()
    assert guest.wait_end() == EXIT_RESET
    assert os.eventfd_read(doorbell) == 1
    assert guest.mmio.writes == [(0x50, 4, 2)], "another value goes on to the device"
    guest.vm.remove_ioeventfd(MMIO + 0x50, 4, 1, doorbell)
    with pytest.raises(HypervisorError):
        guest.vm.remove_ioeventfd(MMIO + 0x50, 4, 1, doorbell)
    os.close(doorbell)


def test_irqfd_is_added_once_and_removed(boot: Boot) -> None:
    guest = boot(asm.HLT, paused=True)
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    guest.vm.add_irqfd(5, fd)
    with pytest.raises(HypervisorError, match="GSI 5"):
        guest.vm.add_irqfd(5, fd)
    guest.vm.remove_irqfd(5, fd)
    guest.vm.add_irqfd(5, fd)
    guest.vm.remove_irqfd(5, fd)
    os.close(fd)


# ---- pauses and kicks ------------------------------------------------------------------------

SPIN = asm.JUMP_SELF
HALT = asm.HLT + asm.JUMP_SELF
PYTHON = asm.mov_edx(0x600) + asm.OUT_AL
NATIVE = asm.mov_edx(0x3FF) + asm.OUT_AL


@pytest.mark.parametrize("code", [SPIN, HALT, PYTHON + asm.jump_back(PYTHON),
                                  NATIVE + asm.jump_back(NATIVE)],
                         ids=["spinning", "halted", "served in Python", "served in C"])
def test_500_pauses_and_resumes(boot: Boot, code: bytes) -> None:
    guest = boot(code)
    for round in range(500):
        if round % 2:  # in the guest for sure; else wherever it is on its way there
            wait_for(lambda: not guest.thread.wait_paused(0), "entry into the guest")
        guest.thread.request_pause()
        assert guest.thread.wait_parked(soon())
        before = guest.vcpu.counters()
        guest.vcpu.get_regs()  # would wait for ever if the guest ran
        assert guest.vcpu.counters() == before
        guest.thread.resume()
    assert guest.vcpu.counters()["kicks"] >= 200


def test_no_kick_is_lost_whenever_it_comes(boot: Boot) -> None:
    """Bare `run` calls, kicked at random moments: before, at, during and after each."""
    guest = boot(NATIVE + asm.jump_back(NATIVE), paused=True)
    random.seed(1)
    rounds = 1000
    returned = 0
    ended = _thread.allocate_lock()
    ended.acquire()

    def run() -> None:
        nonlocal returned
        guest.vcpu.bind_thread()
        while returned < rounds:
            assert guest.vcpu.run().kind == 5
            returned += 1
        guest.vcpu.unbind_thread()
        ended.release()

    _thread.start_new_thread(run, ())
    for round in range(rounds):
        # Waits of 0..200 us land in the guest, at the entry and in the kick's own return.
        until = time.perf_counter() + random.choice((0, 0, 2e-5, 2e-4)) * random.random()
        while time.perf_counter() < until:
            pass
        guest.vcpu.kick()
        wait_for(lambda: returned > round, "end of a kicked run")  # noqa: B023
    assert ended.acquire(True, 20)


def test_a_kick_before_the_run_ends_it_at_once(boot: Boot) -> None:
    guest = boot(asm.HLT, paused=True)
    guest.vcpu.kick()
    guest.vcpu.kick()
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    guest.vcpu.bind_thread()
    try:
        assert guest.vcpu.run().kind == 5
        assert guest.vcpu.get_regs()["rip"] == asm.CODE, "no instruction ran"
        assert signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    finally:
        guest.vcpu.unbind_thread()
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == blocked


def test_registers_are_whole_after_a_pause_in_a_handler(boot: Boot) -> None:
    guest = boot(asm.mov_edx(0x600), asm.IN_EAX, asm.STORE_EAX, asm.word(0x2000),
                 asm.JUMP_SELF, paused=True)
    guest.ports.answers = [0x12345678]
    guest.ports.gate.acquire()
    guest.thread.start()
    wait_for(lambda: bool(guest.ports.reads))
    guest.thread.request_pause()
    assert guest.thread.wait_paused(soon())
    guest.ports.gate.release()
    assert guest.thread.wait_parked(soon())
    regs = guest.vcpu.get_regs()
    assert regs["rax"] == 0x12345678
    assert guest.memory.read(0x2000, 4) == bytes(4), "the guest did not go on"
    guest.thread.resume()
    wait_for(lambda: guest.memory.read(0x2000, 4) == asm.word(0x12345678))


def test_pause_in_the_middle_of_a_string_access(boot: Boot) -> None:
    guest = boot(asm.mov_edx(0x610), asm.mov_edi(0x3000), asm.mov_ecx(64), asm.REP_INSB,
                 asm.JUMP_SELF, paused=True)
    guest.ports.answers = list(range(64))
    guest.ports.gate.acquire()
    guest.thread.start()
    wait_for(lambda: bool(guest.ports.reads))
    guest.thread.request_pause()
    guest.ports.gate.release()
    assert guest.thread.wait_parked(soon())
    done = len(guest.ports.reads)
    assert guest.vcpu.get_regs()["rdi"] == 0x3000 + done
    guest.thread.resume()
    wait_for(lambda: len(guest.ports.reads) == 64)
    wait_for(lambda: guest.memory.read(0x3000, 64) == bytes(range(64)))


# ---- ends ------------------------------------------------------------------------------------

def test_triple_fault_is_a_shutdown(boot: Boot) -> None:
    guest = boot(asm.UD2)
    assert guest.wait_end() == EXIT_SHUTDOWN
    assert "KVM_EXIT_SHUTDOWN" in guest.vcpu.error_report()


def test_report_of_an_instruction_that_kvm_cannot_emulate(boot: Boot) -> None:
    ldmxcsr = b"\x0f\xae\x15" + asm.word(MMIO)  # of MMIO: no KVM emulates it
    guest = boot(asm.mov_eax(0x12345678), ldmxcsr)
    assert guest.wait_end() == EXIT_INTERNAL_ERROR
    report = guest.thread.report
    assert "vCPU 0 can't go on: KVM_EXIT_INTERNAL_ERROR" in report
    assert "suberror 1 (emulation failure)" in report
    assert "instruction bytes at rip: 0f ae 15 00 00 10 f0" in report
    assert "rax=0000000012345678" in report
    assert f"rip={asm.CODE + 5:016x}" in report
    assert "cr0=11 " in report and "cpl=0" in report


def test_report_of_a_fetch_from_nowhere_shows_no_bytes(boot: Boot) -> None:
    target = 0xF0200000
    guest = boot(b"\xe9" + asm.word((target - asm.CODE - 5) & 0xFFFFFFFF))
    assert guest.wait_end() == EXIT_INTERNAL_ERROR
    assert "no instruction bytes" in guest.thread.report
    assert f"rip={target:016x}" in guest.thread.report


def test_an_exit_that_nobody_knows_is_reported(boot: Boot) -> None:
    guest = boot(asm.HLT, irqchip=False)
    assert guest.wait_end() == EXIT_UNKNOWN
    assert "KVM_EXIT_HLT" in guest.thread.report


def test_a_vm_with_a_running_thread_cannot_be_closed(boot: Boot) -> None:
    guest = boot(asm.JUMP_SELF)
    with pytest.raises(HypervisorError, match="while its thread runs"):
        guest.vm.close()
    guest.thread.request_pause()
    assert guest.thread.wait_parked(soon())
    assert guest.vcpu.get_regs()["rip"] == asm.CODE


def test_uart_of_a_closed_vm_is_silent() -> None:
    require("kvm")
    vm = KvmHypervisor().create_vm()
    uart = vm.add_uart(0x3F8, 4)
    assert uart.take_output(0) == b"" and uart.take_output(-1) == b""
    vm.close()
    vm.close()
    assert uart.take_output(10) == b"" and uart.put_input(b"x") == 0
    uart.reset()


def test_reset_puts_the_vcpu_back(boot: Boot) -> None:
    guest = boot(asm.mov_eax(7), asm.mov_edx(0x600), asm.OUT_EAX, asm.RESET_PULSE)
    fresh = boot(asm.HLT, paused=True).vm.create_vcpu(1)
    for round in range(3):
        assert guest.wait_end() == EXIT_RESET
        assert len(guest.ports.writes) == round + 1
        guest.vm.reset()
        assert guest.vcpu.get_regs() == fresh.get_regs()
        assert guest.vcpu.get_sregs()["cr0"] == fresh.get_sregs()["cr0"]
        guest.load(guest.memory.read(asm.CODE, 64))
        guest.exits.clear()
        guest.thread.resume()
        wait_for(lambda: bool(guest.exits))


# ---- registers and host --------------------------------------------------------------------

def test_registers_round_trip(boot: Boot) -> None:
    guest = boot(asm.HLT, paused=True)
    vcpu = guest.vcpu
    vcpu.set_regs(rax=1, r15=(1 << 64) - 1, rip=0x1234)
    regs = vcpu.get_regs()
    assert (regs["rax"], regs["r15"], regs["rip"], regs["rflags"]) == (1, (1 << 64) - 1, 0x1234, 2)
    before = vcpu.get_sregs()
    vcpu.set_sregs({"cr3": 0x9000, "tr": {**before["tr"], "base": 0x5000}})
    after = vcpu.get_sregs()
    assert after["cr3"] == 0x9000 and after["tr"]["base"] == 0x5000
    assert after["cs"] == before["cs"]
    vcpu.set_sregs({"tr": {"base": 0x6000, "type": 11, "present": 1}, "idt": {"base": 8}})
    after = vcpu.get_sregs()
    assert after["tr"]["base"] == 0x6000 and after["tr"]["limit"] == 0, "absent fields are 0"
    assert after["idt"] == {"base": 8, "limit": 0}
    vcpu.set_cpuid(guest.hypervisor.supported_cpuid())
    vcpu.set_msrs([(0x277, 0x0007040600070406), (0x2FF, 0xC06)])
    assert vcpu.get_msrs([0x277, 0xDEAD0001, 0x2FF]) == [(0x277, 0x0007040600070406),
                                                         (0x2FF, 0xC06)]
    with pytest.raises(HypervisorError, match="MSR 0xdead0001"):
        vcpu.set_msrs([(0x277, 0x0007040600070406), (0xDEAD0001, 1)])
    vcpu.set_fpu_default()
    vcpu.set_lapic_lint()
    vcpu.set_mp_state(1)
    assert vcpu.get_mp_state() == 1
    assert vcpu.tsc_khz() > 100_000
    assert 0x174 in guest.hypervisor.msr_indices()
    assert guest.hypervisor.max_vcpus() >= 1


def test_clock_stands_still_between_get_and_set(boot: Boot) -> None:
    guest = boot(asm.HLT, paused=True)
    state = guest.vm.get_clock()
    time.sleep(0.02)  # the time that the guest must not see
    guest.vm.set_clock(state)
    now = int.from_bytes(guest.vm.get_clock()[:8], "little")
    assert 0 <= now - int.from_bytes(state[:8], "little") < 20_000_000
    with pytest.raises(HypervisorError):
        guest.vm.set_clock(b"short")


def test_supported_cpuid_names_kvm() -> None:
    require("kvm")
    rows = {(row[0], row[1]): row for row in KvmHypervisor().supported_cpuid()}
    assert rows[(0x40000000, 0)][4].to_bytes(4, "little") == b"KVMK"


@pytest.mark.parametrize(("path", "text"), [
    ("/nonexistent/kvm", "does not exist; enable virtualization"),
    ("/dev/null", "is not KVM"),
])
def test_what_is_not_kvm_is_refused(path: str, text: str) -> None:
    with pytest.raises(HypervisorError, match=text):
        KvmHypervisor(path)


def test_no_permission_names_the_remedy(tmp_path: Path) -> None:
    require("root")
    device = tmp_path / "kvm"
    device.touch(mode=0o600)
    for folder in (tmp_path, *tmp_path.parents):
        if folder.owner() == "root" and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o011)
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.setresuid(65534, 65534, 65534)
            KvmHypervisor(str(device))
        except HypervisorError as error:
            text = str(error)
            status = 0 if "No permission" in text and "usermod -aG kvm" in text else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
