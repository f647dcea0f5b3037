"""The whole VMM under a bare-metal guest: boot protocols, tables, vCPUs, timers, ends, pause."""

from __future__ import annotations

import itertools
import re
import signal
import time
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.test_vm import TestVm, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable

    Start = Callable[..., TestVm]

pytestmark = pytest.mark.vm

MIB = 1 << 20


@pytest.mark.parametrize(("kernel", "protocol"), [
    ("guest.elf", "pvh"), ("guest-64.elf", "64bit"), ("guest.raw", "64bit"),
    ("guest.bzimage", "64bit")])
def test_boots_every_kind_of_kernel(start_vm: Start, kernel: str, protocol: str) -> None:
    vm = start_vm(kernel=kernel)
    answer = vm.guest("mem")
    assert answer.ok and f"boot={protocol}" in answer.text
    assert 127 * MIB <= answer.value("ram") <= 128 * MIB


def test_command_line_reaches_the_guest_whole(start_vm: Start) -> None:
    vm = start_vm("-append", "first=1 second=äö", append="third")
    answer = vm.guest("cmdline")
    assert answer.text.startswith("cmdline first=1 second=äö third")


@pytest.mark.parametrize("kernel", ["guest.elf", "guest-64.elf", "guest.bzimage"])
def test_initrd_reaches_the_guest_whole(start_vm: Start, kernel: str, tmp_path: Path) -> None:
    initrd = tmp_path / "initrd"
    initrd.write_bytes(bytes(range(251)) * 4321)
    answer = start_vm("-initrd", initrd, kernel=kernel).guest("initrd")
    assert answer.ok and answer.value("size") == initrd.stat().st_size
    assert answer.value("crc") == zlib.crc32(initrd.read_bytes())


def test_memory_map_holds_no_overlap(start_vm: Start) -> None:
    notes = start_vm(memory=256).guest("mem").notes
    ranges = sorted((int(a, 16), int(b, 16))
                    for note in notes for a, b in re.findall(r"(0x\w+)\+(0x\w+)", note))
    assert all(a + b <= c for (a, b), (c, _) in itertools.pairwise(ranges))


GAP, HIGH = 0xC000_0000, 1 << 32  # RAM ends below the first and goes on at the second


@pytest.mark.parametrize("kernel", ["guest.elf", "guest-64.elf"])
@pytest.mark.parametrize("memory", [3072, 3073, 4096, 20480])
def test_memory_below_and_above_four_gigabytes(start_vm: Start, memory: int,
                                               kernel: str) -> None:
    vm = start_vm(memory=memory, kernel=kernel)
    answer = vm.guest("mem")
    above = memory * MIB - GAP
    assert (memory - 1) * MIB < answer.value("ram") <= memory * MIB
    ranges = [tuple(int(word, 16) for word in found)
              for note in answer.notes if note.endswith("type=1")
              for found in re.findall(r"(0x\w+)\+(0x\w+)", note)]
    assert [pair for pair in ranges if pair[0] >= HIGH] == ([(HIGH, above)] if above else [])
    assert max(start + size for start, size in ranges if start < HIGH) == GAP
    ends = [GAP - 0x10000, *([HIGH, HIGH + above - 0x10000] if above else [])]
    for address in ends:
        assert vm.guest(f"memory.fill {address:#x} 0x10000 {address >> 16 & 7}").ok
    for address in ends:
        assert vm.guest(f"memory.check {address:#x} 0x10000 {address >> 16 & 7}").ok
    assert vm.guest(f"read32 {GAP:#x}").text == "read32 0xffffffff"
    # Only what the guest touched is there: the memfd is filled page by page.
    rollup = Path(f"/proc/{vm.process.pid}/smaps_rollup").read_text()
    shared = re.search(r"Pss_Shmem: +(\d+) kB", rollup)
    assert shared is not None and int(shared[1]) < 16 << 10


@pytest.mark.parametrize("kernel", ["guest.elf", "guest-64.elf"])
def test_firmware_tables_have_right_checksums(start_vm: Start, kernel: str) -> None:
    vm = start_vm("-smp", "3", kernel=kernel)
    acpi = vm.guest("acpi")
    assert acpi.ok and acpi.value("cpus") == 3
    assert {note.split()[1] for note in acpi.notes} >= {"XSDT", "FACP", "APIC", "DSDT"}
    table = vm.guest("mptable")
    assert table.ok and table.value("cpus") == 3 and table.value("ioapics") == 1


def test_clock_and_timers(start_vm: Start) -> None:
    vm = start_vm()
    assert vm.guest("clock").value("ns") > 0
    assert vm.guest("timer 5").ok
    assert vm.guest("deadline 10").ok
    assert vm.guest("sleep 5").ok


def test_long_input_arrives_whole(start_vm: Start) -> None:
    vm = start_vm()
    assert vm.guest("echo " + "x" * 900).ok
    assert not vm.guest("unknown").ok


@pytest.mark.parametrize("count", [1, 2, 5])
def test_processors_start_and_work(start_vm: Start, count: int) -> None:
    vm = start_vm("-smp", str(count))
    answer = vm.guest("smp")
    assert answer.ok and answer.value("cpus") == count
    assert vm.guest("smp.lock 50").ok
    assert vm.guest("smp.work 100000").ok
    if count > 1:
        assert vm.guest("smp.ipi 50").ok
    assert len(vm.qmp.command("query-cpus")) == count


def test_254_processors(start_vm: Start) -> None:
    vm = start_vm("-smp", "254", memory=256)
    answer = vm.guest("smp", timeout=60)
    assert answer.ok and answer.value("cpus") == 254 and answer.value("largest-id") == 253


@pytest.mark.parametrize(("smp", "shifts", "counts"), [
    ("4", (0, 0), (1, 1)),
    ("6,sockets=1,cores=3,threads=2", (1, 3), (2, 6)),
    ("8,sockets=2,dies=1,clusters=2,cores=1,threads=2", (1, 2), (2, 4)),
    ("16,sockets=2,dies=2,cores=2,threads=2", (1, 3), (2, 8)),
])
def test_every_processor_is_told_its_place(start_vm: Start, smp: str, shifts: tuple[int, int],
                                           counts: tuple[int, int]) -> None:
    """CPUID leaves 1 and 0xB on each; an APIC id counts threads, cores, dies, sockets up."""
    vm = start_vm("-smp", smp)
    threads, package = counts
    places = []
    for level, (shift, count) in enumerate(zip(shifts, counts, strict=True)):
        for note in vm.guest(f"smp.cpuid 0xb {level}").notes:
            apic_id, *registers = (int(word, 0) for word in note[3:].split())
            assert registers == [shift, count, level + 1 << 8 | level, apic_id]
            if level:
                places.append(apic_id)
    for note in vm.guest("smp.cpuid 1").notes:
        apic_id, _, ebx, *_ = (int(word, 0) for word in note[3:].split())
        assert ebx >> 24 == apic_id and ebx >> 16 & 0xFF >= package
    assert len(set(places)) == len(places) == int(smp.partition(",")[0])
    by_package = [place >> shifts[1] for place in places]
    assert all(by_package.count(number) == package for number in by_package)
    by_core = [place >> shifts[0] for place in places]
    assert all(by_core.count(number) == threads for number in by_core)


def test_trap_in_the_guest_is_the_guests_affair(start_vm: Start) -> None:
    vm = start_vm()
    answer = vm.guest("trap")
    assert not answer.ok and answer.value("vector") == 6
    assert vm.guest("echo").ok


@pytest.mark.parametrize("end", ["poweroff", "reboot", "triple", "port64"])
def test_ends_by_the_guest(start_vm: Start, end: str) -> None:
    vm = start_vm()
    assert vm.guest("echo").ok
    qmp = vm.qmp
    vm.send(f"{end}\n")
    event = qmp.wait_event("SHUTDOWN")
    assert event["data"] == {"guest": True, "reason": "guest-shutdown"}
    assert vm.wait() == 0
    assert not vm.qmp_path.exists()
    wait_until(lambda: not vm.processes(), "end of all processes")


def test_a_triple_fault_is_told_with_registers(start_vm: Start, tmp_path: Path) -> None:
    vm = start_vm("-D", tmp_path / "log")
    assert vm.guest("echo").ok
    vm.send("triple\n")
    assert vm.wait() == 0
    log = (tmp_path / "log").read_text().lower()
    assert "triple fault" in log
    assert all(name in log for name in ("rip", "rsp", "cr3", "rflags"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_ends_by_a_signal(start_vm: Start, number: signal.Signals) -> None:
    vm = start_vm()
    assert vm.guest("echo").ok
    qmp = vm.qmp
    vm.process.send_signal(number)
    assert qmp.wait_event("SHUTDOWN")["data"] == {"guest": False, "reason": "host-signal"}
    assert vm.wait() == 0


def test_quit_returns_before_the_event(start_vm: Start) -> None:
    vm = start_vm()
    assert vm.guest("echo").ok
    assert vm.qmp.command("quit") == {}
    assert vm.qmp.wait_event("SHUTDOWN")["data"] == {"guest": False, "reason": "host-qmp-quit"}
    assert vm.wait() == 0


def test_quit_while_the_guest_spins(start_vm: Start) -> None:
    vm = start_vm("-smp", "2", append="script=smp;spin")
    vm.wait_output(r"^ok smp ")
    vm.qmp.command("quit")
    assert vm.wait() == 0


def test_pause_stops_the_guest_and_resume_lets_it_go_on(start_vm: Start) -> None:
    vm = start_vm(append="script=ticker,20,500")
    vm.wait_output(r"^note tick 3\r?\n")
    qmp = vm.qmp
    qmp.command("stop")
    assert [event["event"] for event in qmp.events] == ["STOP"]
    assert qmp.command("query-status")["status"] == "paused"
    time.sleep(0.1)  # what was on its way has arrived
    before = len(vm.output)
    time.sleep(0.4)  # twenty ticks' time, in which none may come
    assert len(vm.output) == before
    qmp.command("cont")
    assert qmp.command("query-status")["status"] == "running"
    vm.wait_output(r"^note tick \d+\r?\n")


def test_guest_clock_stands_still_while_paused(start_vm: Start) -> None:
    vm = start_vm()
    first = vm.guest("clock").value("ns")
    began = time.monotonic_ns()
    vm.qmp.command("stop")
    time.sleep(0.5)  # the pause that the guest mustn't see
    vm.qmp.command("cont")
    second = vm.guest("clock").value("ns")
    assert second - first < time.monotonic_ns() - began - 400_000_000


def test_frozen_at_start(start_vm: Start) -> None:
    vm = start_vm("-S")
    assert vm.qmp.command("query-status")["running"] is False
    assert vm.output == b""
    vm.qmp.command("cont")
    assert vm.guest("echo").ok


def test_system_reset_boots_again(start_vm: Start) -> None:
    vm = start_vm("-smp", "2")
    assert vm.guest("smp").ok
    vm.qmp.command("system_reset")
    assert vm.qmp.wait_event("RESET")["data"]["guest"] is False
    vm.wait_output(r"^ready\r?\n")
    assert vm.guest("smp").value("cpus") == 2


def test_power_button_raises_an_interrupt(start_vm: Start) -> None:
    vm = start_vm()
    assert vm.guest("echo").ok
    vm.send("wait.gsi 16 10000\n")
    vm.wait_output(r"^note waiting")
    vm.qmp.command("system_powerdown")
    assert vm.script_answer().ok
    assert vm.qmp.wait_event("POWERDOWN")["data"] == {}


@pytest.mark.parametrize("command", ["bad-fetch"])
def test_internal_error_is_reported_and_leaves_the_vm_to_quit(start_vm: Start,
                                                              command: str) -> None:
    vm = start_vm()
    assert vm.guest("echo").ok
    qmp = vm.qmp
    vm.send(f"{command}\n")
    qmp.wait_event("STOP")
    assert qmp.command("query-status") == {
        "running": False, "singlestep": False, "status": "internal-error"}
    wait_until(lambda: "rip" in vm.error_text().lower(), "report with registers")
    qmp.command("quit")
    assert vm.wait() == 0


def test_absent_registers_and_ports_do_no_harm(start_vm: Start) -> None:
    vm = start_vm()
    assert vm.guest("read32 0xe0000000").text == "read32 0xffffffff"
    assert vm.guest("write32 0xe0000000 1").ok
    assert vm.guest("inb 0x2f8").ok
    assert vm.guest("outb 0x80 1").ok
    assert vm.guest("echo").ok
