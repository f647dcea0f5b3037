"""The vCPU thread: dispatch, pause gate, end. The guest is a script (fake hypervisor)."""

from __future__ import annotations

import _thread
import time
from collections.abc import Callable, Iterator

import pytest

from vmm.bus.address_space import AddressSpace
from vmm.hypervisor.fake import FakeVcpu
from vmm.hypervisor.interface import (
    EXIT_INTERNAL_ERROR,
    EXIT_IO_READ,
    EXIT_IO_WRITE,
    EXIT_MMIO_READ,
    EXIT_MMIO_WRITE,
    EXIT_POWEROFF,
    EXIT_RESET,
    EXIT_SHUTDOWN,
    EXIT_UNKNOWN,
)
from vmm.vcpu import VcpuThread

LIMIT = 10.0


def soon() -> float:
    return time.monotonic() + LIMIT


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = soon()
    while not condition():
        assert time.monotonic() < deadline, "condition not reached"
        time.sleep(0.001)


class Device:
    """Answers 0x42; `hold` blocks its handlers until `release`."""

    def __init__(self) -> None:
        self.log: list[tuple[str, int, int, int]] = []
        self.error: Exception | None = None
        self.gate = _thread.allocate_lock()
        self.entered = _thread.allocate_lock()
        self.entered.acquire()

    def hold(self) -> None:
        self.gate.acquire()

    def release(self) -> None:
        self.gate.release()

    def _pass(self) -> None:
        if self.entered.locked():
            self.entered.release()
        with self.gate:
            pass
        if self.error is not None:
            raise self.error

    def read(self, offset: int, size: int) -> int:
        self._pass()
        self.log.append(("read", offset, size, 0))
        return 0x42

    def write(self, offset: int, size: int, value: int) -> None:
        self._pass()
        self.log.append(("write", offset, size, value))


class Rig:
    """A vCPU thread with a device at MMIO 0x1000 and another at port 0x100."""

    def __init__(self) -> None:
        self.vcpu = FakeVcpu(3)
        self.mmio_device, self.port_device = Device(), Device()
        mmio, ports = AddressSpace(), AddressSpace()
        mmio.add(0x1000, 0x100, self.mmio_device)
        ports.add(0x100, 8, self.port_device)
        self.exits: list[int] = []
        self.thread = VcpuThread(self.vcpu, mmio, ports, self._on_exit)

    def _on_exit(self, kind: int, thread: VcpuThread) -> None:
        assert thread is self.thread
        self.exits.append(kind)

    def script(self, *entries: tuple[int, int, int, int]) -> None:
        self.vcpu.script.extend(entries)
        self.vcpu.wake()


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig()
    yield made
    for device in (made.mmio_device, made.port_device):
        if device.gate.locked():
            device.gate.release()
    made.thread.request_stop()
    assert made.thread.join(soon())


def test_exits_reach_the_devices_and_reads_are_answered(rig: Rig) -> None:
    rig.script((EXIT_MMIO_WRITE, 0x1010, 4, 7), (EXIT_MMIO_READ, 0x1020, 2, 0),
               (EXIT_IO_WRITE, 0x101, 1, 9), (EXIT_IO_READ, 0x102, 1, 0),
               (EXIT_MMIO_READ, 0x9000, 4, 0), (EXIT_IO_READ, 0x3000, 2, 0))
    rig.thread.start()
    wait_for(lambda: len(rig.vcpu.answers) == 4)
    assert rig.mmio_device.log == [("write", 0x10, 4, 7), ("read", 0x20, 2, 0)]
    assert rig.port_device.log == [("write", 1, 1, 9), ("read", 2, 1, 0)]
    assert rig.vcpu.answers == [0x42, 0x42, 0xFFFFFFFF, 0xFFFF]


def test_it_does_not_run_before_start(rig: Rig) -> None:
    rig.script((EXIT_IO_WRITE, 0x100, 1, 1))
    assert rig.thread.thread_id > 0, "known before the start (-S)"
    assert rig.thread.wait_parked(soon())
    assert rig.vcpu.runs == 0 and rig.vcpu.bound == 1
    rig.thread.start()
    wait_for(lambda: bool(rig.port_device.log))


def test_pause_and_resume(rig: Rig) -> None:
    rig.thread.start()
    for round in range(200):
        rig.thread.request_pause()
        assert rig.thread.wait_paused(soon())
        assert rig.thread.wait_parked(soon())
        runs = rig.vcpu.runs
        rig.script((EXIT_IO_WRITE, 0x100, 1, round))
        assert rig.vcpu.runs == runs, "it must not run while paused"
        rig.thread.resume()
        wait_for(lambda: len(rig.port_device.log) == round + 1)  # noqa: B023


def test_pause_twice_and_resume_once(rig: Rig) -> None:
    rig.thread.start()
    rig.thread.request_pause()
    rig.thread.request_pause()
    assert rig.thread.wait_parked(soon())
    rig.thread.resume()
    rig.thread.resume()
    rig.script((EXIT_IO_WRITE, 0x100, 1, 1))
    wait_for(lambda: bool(rig.port_device.log))


def test_a_handler_that_waits_counts_as_paused_but_not_as_parked(rig: Rig) -> None:
    rig.mmio_device.hold()
    rig.script((EXIT_MMIO_WRITE, 0x1000, 4, 1), (EXIT_MMIO_WRITE, 0x1004, 4, 2))
    rig.thread.start()
    assert rig.mmio_device.entered.acquire(True, LIMIT)
    rig.thread.request_pause()
    assert rig.thread.wait_paused(time.monotonic() + 1)
    assert not rig.thread.wait_parked(time.monotonic() + 0.05)
    runs = rig.vcpu.runs
    rig.mmio_device.release()
    assert rig.thread.wait_parked(soon())
    assert rig.vcpu.runs == runs, "finishing the access must not run the guest"
    assert rig.vcpu.finishes == 1
    assert len(rig.mmio_device.log) == 1
    rig.thread.resume()
    wait_for(lambda: len(rig.mmio_device.log) == 2)


def test_all_items_of_an_access_are_finished_before_parking(rig: Rig) -> None:
    rig.port_device.hold()
    rig.script((EXIT_IO_WRITE, 0x100, 1, 1))
    rig.thread.start()
    assert rig.port_device.entered.acquire(True, LIMIT)
    rig.vcpu.pending = [(EXIT_IO_WRITE, 0x100, 1, 2), (EXIT_IO_READ, 0x100, 1, 0)]
    rig.thread.request_pause()
    rig.port_device.release()
    assert rig.thread.wait_parked(soon())
    assert [entry[0] for entry in rig.port_device.log] == ["write", "write", "read"]
    assert rig.vcpu.answers == [0x42]


def test_wait_paused_gives_up_at_its_deadline(rig: Rig) -> None:
    rig.thread.start()
    wait_for(lambda: rig.vcpu.in_guest)
    before = time.monotonic()
    assert not rig.thread.wait_paused(before + 0.05)
    assert time.monotonic() - before < 5
    assert not rig.thread.join(time.monotonic() + 0.05)


@pytest.mark.parametrize("kind", [EXIT_SHUTDOWN, EXIT_RESET, EXIT_POWEROFF])
def test_ends_are_told_and_the_thread_parks(rig: Rig, kind: int) -> None:
    rig.script((kind, 0, 0, 0), (EXIT_IO_WRITE, 0x100, 1, 1))
    rig.thread.start()
    wait_for(lambda: rig.exits == [kind])
    assert rig.thread.wait_parked(soon())
    assert rig.port_device.log == []
    assert rig.thread.report == ""
    rig.thread.resume()  # after a system_reset
    wait_for(lambda: bool(rig.port_device.log))


@pytest.mark.parametrize("kind", [EXIT_INTERNAL_ERROR, EXIT_UNKNOWN])
def test_failures_come_with_a_report(rig: Rig, kind: int) -> None:
    rig.script((kind, 0, 0, 0))
    rig.thread.start()
    wait_for(lambda: rig.exits == [kind])
    assert rig.thread.report == "fake vCPU 3 failed"


def test_a_broken_handler_is_reported_and_nothing_else_runs(rig: Rig) -> None:
    rig.mmio_device.error = ValueError("broken device")
    rig.script((EXIT_MMIO_WRITE, 0x1000, 4, 1), (EXIT_IO_WRITE, 0x100, 1, 1))
    rig.thread.start()
    wait_for(lambda: rig.exits == [EXIT_INTERNAL_ERROR])
    assert "ValueError: broken device" in rig.thread.report
    assert rig.thread.wait_parked(soon())
    assert rig.port_device.log == []


def test_stop_ends_a_running_a_parked_and_an_unstarted_thread() -> None:
    for prepare in (lambda rig: rig.thread.start(), lambda rig: rig.thread.spawn(),
                    lambda rig: None):
        rig = Rig()
        prepare(rig)
        rig.thread.request_stop()
        assert rig.thread.join(soon())
        assert rig.vcpu.bound == rig.vcpu.unbound


def test_stop_while_a_handler_waits(rig: Rig) -> None:
    rig.mmio_device.hold()
    rig.script((EXIT_MMIO_WRITE, 0x1000, 4, 1), (EXIT_MMIO_WRITE, 0x1000, 4, 1))
    rig.thread.start()
    assert rig.mmio_device.entered.acquire(True, LIMIT)
    rig.thread.request_stop()
    assert rig.thread.wait_paused(time.monotonic() + 1)
    rig.mmio_device.release()
    assert rig.thread.join(soon())
    assert len(rig.mmio_device.log) == 1


def test_a_vcpu_that_cannot_be_bound_reports_and_ends(rig: Rig) -> None:
    def fail() -> None:
        raise OSError(22, "no signals")

    rig.vcpu.bind_thread = fail  # type: ignore[method-assign]
    rig.thread.start()
    assert rig.thread.join(soon())
    assert rig.exits == [EXIT_INTERNAL_ERROR]
    assert "no signals" in rig.thread.report
