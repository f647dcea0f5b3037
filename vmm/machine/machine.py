"""What every machine type is made of, and the operations that the VM's life needs from it.

`vmm/machine/microvm.py` (and later q35) builds the parts; this file pauses, resets and ends
them.  Nothing here knows addresses or slots.
"""

from __future__ import annotations

import _thread
import time

from shared import log
from vmm.errors import DeviceError, VmmError
from vmm.hypervisor.interface import HOLD_ACCESSES, HOLD_NOTHING

TYPE_CHECKING = False  # importing typing would cost 10 ms of the start
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vmm.block.family import BlockNode
    from vmm.chardev.base import Chardev
    from vmm.devices.ged import GenericEventDevice
    from vmm.devices.vhost_user import VhostUserDevice
    from vmm.devices.virtio_device import VirtioDevice
    from vmm.hypervisor.interface import Uart
    from vmm.hypervisor.kvm import KvmVm
    from vmm.machine.family import Family
    from vmm.machine.slots import Slot
    from vmm.memory import GuestMemory
    from vmm.net.node import NetNode
    from vmm.transport.virtio_mmio import VirtioMmio
    from vmm.vcpu import VcpuThread
    from vmm.worker.nursery import Nursery
    from vmm.worker.process import WorkerProcess
    from vmm.worker.supervisor import Kind


# Seconds that the first vCPU is given to get a processor, on which it is to run before anything
# else is done.
ENTRY_LIMIT = 0.002


class Device:
    """A device as users know it: id, driver, slot, and the worker that serves it (if any), with
    the way in which its successors come to be (`kind`)."""

    __slots__ = ("device", "driver", "id", "kind", "slot", "transport", "worker")

    def __init__(self, id: str, driver: str, slot: int, device: VirtioDevice,
                 transport: VirtioMmio, worker: WorkerProcess | None,
                 kind: Kind | None = None) -> None:
        self.id = id
        self.driver = driver
        self.slot = slot
        self.device = device
        self.transport = transport
        self.worker = worker
        self.kind = kind

    @property
    def vhost(self) -> VhostUserDevice:
        """The virtio device of one that has a worker."""
        assert self.kind is not None
        return self.device  # type: ignore[return-value]


class Machine:
    """The parts of one machine. Filled by a builder, then driven by `vmm/vm.py`."""

    def __init__(self) -> None:
        self.memory: GuestMemory
        self.vm: KvmVm
        self.uart: Uart | None = None
        self.ged: GenericEventDevice | None = None
        self.vcpus: list[VcpuThread] = []
        self.blocks: dict[str, BlockNode] = {}
        self.nets: dict[str, NetNode] = {}
        self.devices: dict[str, Device] = {}
        self.families: Sequence[Family] = ()  # whose slots come first
        self.slots: list[Slot] = []  # of virtio devices, empty ones included
        self.chardevs: dict[str, Chardev] = {}
        self.nursery: Nursery | None = None
        self.kernel_end = 0  # first guest-physical address behind it
        self.thread_stages = (True, True)  # see vmm/confinement.py
        self.reload: Callable[[], None]  # kernel, tables and vCPU registers as at power-on

    def family(self, name: str) -> Family:
        """The family of this name.

        :raises DeviceError: this machine has no such slots.
        """
        for family in self.families:
            if family.name == name:
                return family
        raise DeviceError(f"This machine has no slots for {name} devices", "start a microvm")

    # ---- vCPUs -----------------------------------------------------------------------------

    def start_vcpus(self) -> None:
        """Let the vCPUs enter the guest for the first time."""
        for vcpu in self.vcpus:
            vcpu.start()

    def watch_memory(self) -> bool:
        """Once the guest uses much of its RAM that becomes huge pages; False: not yet."""
        if self.memory.is_little_used():
            return False
        self.memory.start_huge_pages(self.kernel_end, *self.thread_stages)
        return True

    def pause_vcpus(self, deadline: float) -> None:
        """Kick every vCPU out of the guest and keep it out.

        :raises VmmError: one did not leave by `deadline` (monotonic seconds).
        """
        for vcpu in self.vcpus:
            vcpu.request_pause()
        for vcpu in self.vcpus:
            if not vcpu.wait_paused(deadline):
                raise VmmError(f"vCPU {vcpu.index} did not leave the guest in time",
                               "try stop again, or quit")

    def stop_vcpus(self) -> None:
        """End the vCPUs' threads, for good: before the VM is closed under them."""
        for vcpu in self.vcpus:
            vcpu.request_stop()
        for vcpu in self.vcpus:
            vcpu.join(time.monotonic() + 1.0)

    def resume_vcpus(self) -> None:
        """Let the vCPUs enter the guest again."""
        for vcpu in self.vcpus:
            vcpu.resume()

    def run_early(self) -> None:
        """Let the guest run, up to its first access that needs Python or a device."""
        self.vm.hold(HOLD_ACCESSES)
        self.vm.wait_entered(ENTRY_LIMIT)

    def open(self) -> None:
        """Everything is there: whatever the guest waits for goes on. Harmless if it doesn't."""
        self.vm.hold(HOLD_NOTHING)

    # ---- devices ---------------------------------------------------------------------------

    def pause_devices(self, deadline: float) -> None:
        """Drain, flush and stop every back end.

        :raises DeviceError: names those that were not at rest by `deadline`; the others are.
        """
        self._for_all("stop", lambda slot: slot.transport.pause(deadline))

    def resume_devices(self) -> None:
        """Start the rings again where they stopped."""
        self._for_each("start again", lambda slot: slot.transport.resume())

    def press_power_button(self) -> None:
        """Signal the ACPI power button (GED)."""
        if self.ged is None:
            raise DeviceError("This machine has no power button", "use quit")
        self.ged.press_power_button()

    def reset(self) -> None:
        """Everything as at power-on; the vCPUs are paused and stay so."""
        self._for_each("reset", lambda slot: slot.transport.reset())
        if self.uart is not None:
            self.uart.reset()
        if self.ged is not None:
            self.ged.reset()
        self.reload()

    def end(self, deadline: float) -> None:
        """The orderly end: vCPUs out for good, back ends drained and flushed, then let go.

        A back end that isn't done by `deadline` is cut off; nothing waits longer for it.
        """
        for vcpu in self.vcpus:
            vcpu.request_stop()
        # Whoever waits for a back end then is let go: us, a vCPU, a `stop` that is under way.
        watchdog = _Watchdog(deadline, self._cut_off)
        try:
            self._for_all("stop", lambda slot: slot.transport.pause(deadline))
        except DeviceError as error:
            log.warning(str(error))
        finally:
            watchdog.stop()
        for worker in self.nursery.workers if self.nursery is not None else ():
            worker.stopping = True  # it ends when its connection does: that is no crash
        for slot in self.slots:
            slot.device.close()
        for vcpu in self.vcpus:
            vcpu.join(max(deadline, time.monotonic() + 1.0))

    def _cut_off(self) -> None:
        for slot in self.slots:
            slot.device.abort()

    def _for_all(self, verb: str, action: Callable[[Slot], None]) -> None:
        """As `_for_each`, but at the same time: one that hangs takes no time from the others."""
        failed: list[str] = []

        def attempt(slot: Slot, done: _thread.LockType | None = None) -> None:
            try:
                action(slot)
            except VmmError as error:
                failed.append(f"device {slot.device.id} did not {verb}: {error.what}")
            except Exception as error:  # a defect of ours must not look like success
                log.exception(f"while device {slot.device.id} had to {verb}", error)
                failed.append(f"device {slot.device.id} did not {verb}: {error!r}")
            finally:
                if done is not None:
                    done.release()

        waits = []
        used = [slot for slot in self.slots if slot.device.is_in_use()]
        for slot in used[1:]:
            done = _thread.allocate_lock()
            done.acquire()
            _thread.start_new_thread(attempt, (slot, done))
            waits.append(done)
        for slot in self.slots:
            if slot not in used[1:]:
                attempt(slot)
        for done in waits:
            done.acquire()
        _complain(failed)

    def _for_each(self, verb: str, action: Callable[[Slot], None]) -> None:
        failed: list[str] = []
        for slot in self.slots:
            try:
                action(slot)
            except VmmError as error:
                failed.append(f"device {slot.device.id} did not {verb}: {error.what}")
        _complain(failed)


class _Watchdog:
    """Calls `bark` once, on a thread of its own, unless it was stopped by `deadline`."""

    __slots__ = ("_ended", "_stopped")

    def __init__(self, deadline: float, bark: Callable[[], None]) -> None:
        self._stopped = _thread.allocate_lock()
        self._ended = _thread.allocate_lock()
        self._stopped.acquire()
        self._ended.acquire()
        _thread.start_new_thread(self._wait, (deadline, bark))

    def _wait(self, deadline: float, bark: Callable[[], None]) -> None:
        try:
            if not self._stopped.acquire(True, max(0.0, deadline - time.monotonic())):
                bark()
        finally:
            self._ended.release()

    def stop(self) -> None:
        """Never bark from now on: when this returns nobody barks any more."""
        self._stopped.release()
        self._ended.acquire()


def _complain(failed: list[str]) -> None:
    if failed:
        raise DeviceError("; ".join(sorted(failed)), "query-workers shows the state of each")
