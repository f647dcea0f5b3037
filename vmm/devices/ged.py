"""The ACPI Generic Event Device: one event register, one interrupt (ACPI 6.4, 5.6.9).

The guest's `_EVT` method reads the register, which clears it, and turns bits into Notify.
"""

from __future__ import annotations

import _thread
import posix as os

TYPE_CHECKING = False  # importing typing would cost 10 ms of the start
if TYPE_CHECKING:
    from vmm.hypervisor.interface import Vm

POWER_BUTTON = 1  # the bit that the DSDT's _EVT knows (vmm/arch/x86_64/acpi.py)


class GenericEventDevice:
    """Power button and, later, hotplug notices. `press_power_button` is for the main thread."""

    def __init__(self, vm: Vm, gsi: int) -> None:
        self._vm = vm
        self._gsi = gsi
        self._events = 0
        self._lock = _thread.allocate_lock()  # vCPU threads read, the main thread sets
        self._irq_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        vm.add_irqfd(gsi, self._irq_fd)

    def press_power_button(self) -> None:
        """Set the event and raise the interrupt; the guest's ACPI does the rest."""
        with self._lock:
            self._events |= POWER_BUTTON
        os.eventfd_write(self._irq_fd, 1)

    def read(self, offset: int, size: int) -> int:
        """The event register; reading clears it. Other widths and offsets read as 0."""
        if offset != 0 or size != 4:
            return 0
        with self._lock:
            events, self._events = self._events, 0
        return events

    def write(self, offset: int, size: int, value: int) -> None:
        """Ignored: the register is read-only."""

    def reset(self) -> None:
        """System reset: no event is pending."""
        with self._lock:
            self._events = 0

    def close(self) -> None:
        """Let go of the interrupt; the VM may already be closed."""
        os.close(self._irq_fd)
