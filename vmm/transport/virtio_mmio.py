"""The virtio-mmio transport, version 2 (virtio 1.2, 4.2.2).

One instance is one slot of 0x200 bytes.  The C run loop answers InterruptStatus and
InterruptACK, KVM answers QueueNotify by ioeventfd; everything else comes here, on a vCPU
thread.  A slot without a device has device id 0, which drivers skip (4.2.2: "placeholder").

Two locks: `_lock` is held over every register access and may be held for as long as a back
end takes to answer; `_state_lock` guards status, generation and interrupt for the callbacks
of the device, which come on the main loop and must never wait.
"""

from __future__ import annotations

import _thread
import posix as os
import time

from shared import log
from shared.quota import LINES, LINES_RATE, Quota
from vmm.devices.virtio_device import QueueConfig
from vmm.errors import BackendError, MemoryAccessError, VmmError
from vmm.transport import mmio_registers as r

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.devices.virtio_device import VirtioDevice
    from vmm.hypervisor.interface import InterruptStatus, Vm
    from vmm.memory import GuestMemory

MASK_32 = 0xFFFF_FFFF
RESET_LIMIT = 10.0

# Alignment of the three parts of a split ring, and their sizes as (fixed, per entry) bytes
# (virtio 1.2, 2.7).
_PARTS = (("descriptor table", "desc", 16, 0, 16), ("driver area", "avail", 2, 6, 2),
          ("device area", "used", 4, 6, 8))


class VirtioMmio:
    """One virtio-mmio slot; implements the AddressSpace handler (`read`, `write`).

    :param base: guest-physical address of the slot; gsi: its interrupt (edge).
    :param device: None makes an empty slot.
    :param lazy: doorbells and interrupts are made when a driver first writes a register: a
        slot that no driver looks at costs the start nothing.
    """

    def __init__(self, vm: Vm, memory: GuestMemory, base: int, gsi: int,
                 device: VirtioDevice | None, lazy: bool = False) -> None:
        self.base = base
        self.gsi = gsi
        self.device = device
        self._vm = vm
        self._memory = memory
        self._lock = _thread.allocate_lock()
        self._state_lock = _thread.allocate_lock()
        self._status = 0
        self._generation = 0
        self._queues: list[QueueConfig] = []
        self._config_fd = -1
        self._interrupt: InterruptStatus | None = None
        self._active = False            # the device was given its queues
        self._paused = False
        self._activate_on_resume = False
        # Bounded: a hostile guest, or its worker, could fill the log.
        self._lines = Quota(LINES, LINES_RATE)
        self._clear_selectors()
        if device is not None:
            device.on_config_change = self._config_changed
            device.on_failure = self._failed
            if not lazy:
                self._wire(device)

    def _clear_selectors(self) -> None:
        self._device_features_sel = 0
        self._driver_features_sel = 0
        self._driver_features = 0
        self._queue_sel = 0

    def _wire(self, device: VirtioDevice) -> None:
        self._interrupt = self._vm.add_interrupt_status(self.base)
        self._config_fd = _eventfd()
        self._vm.add_irqfd(self.gsi, self._config_fd)
        for index in range(len(device.queue_sizes)):
            queue = QueueConfig(index, 0, _eventfd(), _eventfd())
            self._queues.append(queue)
            self._vm.add_ioeventfd(self.base + r.QUEUE_NOTIFY, 4, index, queue.kick_fd)
            self._vm.add_irqfd(self.gsi, queue.call_fd)

    # ---- the AddressSpace handler ----------------------------------------------------------

    def read(self, offset: int, size: int) -> int:
        """A read of `size` bytes at `offset` that C did not serve."""
        if offset >= r.CONFIG:
            return self._read_config(offset - r.CONFIG, size)
        if size != 4 or offset % 4:
            return 0  # 4.2.2.2: the driver MUST only use 32-bit aligned accesses here
        if self.device is None:
            return _EMPTY_SLOT.get(offset, 0)
        if offset in (r.STATUS, r.CONFIG_GENERATION):
            with self._state_lock:
                return self._status if offset == r.STATUS else self._generation
        reader = _READERS.get(offset)
        if reader is None:
            return 0
        with self._lock:
            return reader(self)

    def write(self, offset: int, size: int, value: int) -> None:
        """A write of `size` bytes at `offset` that neither C nor an ioeventfd served."""
        if self.device is None:
            return
        if offset >= r.CONFIG:
            self._write_config(offset - r.CONFIG, size, value)
        elif offset == r.QUEUE_NOTIFY:
            # KVM signals aligned 32-bit writes itself, once the ioeventfd exists. What comes
            # here was raced past it or has an odd width: a kick must not be lost.
            self._notify(value & 0xFFFF)
        elif size == 4:
            writer = _WRITERS.get(offset)
            if writer is not None:
                with self._lock:
                    if self._interrupt is None:
                        self._wire(self.device)
                    writer(self, value & MASK_32)

    # ---- life ------------------------------------------------------------------------------

    def pause(self, deadline: float) -> None:
        """Stop the device where it is; a DRIVER_OK that comes meanwhile waits for `resume`.

        :raises DeviceError: not stopped by `deadline` (monotonic seconds).
        """
        if self.device is None:
            return
        # Set before the lock is waited for: a vCPU that holds it may be about to activate.
        self._paused = True
        self._acquire(deadline)
        try:
            if self._active:
                self.device.pause(deadline)
        finally:
            self._lock.release()

    def resume(self) -> None:
        """Start the device where `pause` stopped it.

        A back end that can't go on doesn't keep the VM from it: the guest sees
        DEVICE_NEEDS_RESET, as if it had failed while running.

        :raises DeviceError: a vCPU still waits for the back end.
        """
        if self.device is None:
            return
        self._acquire(time.monotonic() + RESET_LIMIT)
        try:
            if not self._paused:
                return
            self._paused = False
            if self._activate_on_resume:
                self._activate_on_resume = False
                self._activate()
            elif self._active:
                self.device.resume()
        except VmmError as error:
            self._failed(str(error))
        finally:
            self._lock.release()

    def reset(self) -> None:
        """As at power-on (machine reset).

        :raises DeviceError: the back end did not let go of guest memory in time.
        """
        if self.device is None:
            return
        self._acquire(time.monotonic() + RESET_LIMIT)
        try:
            error = self._reset()
        finally:
            self._lock.release()
        if error is not None:
            raise error

    def close(self) -> None:
        """Take interrupts and doorbells from KVM and close their descriptors (unplug)."""
        for queue in self._queues:
            self._vm.remove_ioeventfd(self.base + r.QUEUE_NOTIFY, 4, queue.index, queue.kick_fd)
            self._vm.remove_irqfd(self.gsi, queue.call_fd)
            os.close(queue.kick_fd)
            os.close(queue.call_fd)
        self._queues = []
        if self._config_fd >= 0:
            self._vm.remove_irqfd(self.gsi, self._config_fd)
            os.close(self._config_fd)
            self._config_fd = -1

    def _acquire(self, deadline: float) -> None:
        if not self._lock.acquire(True, max(0.0, deadline - time.monotonic())):
            raise BackendError(f"{self._name()}: a request of the guest is still waiting for "
                               "the back end", "try again, or look at the back end's log")

    def _name(self) -> str:
        return f"device {self.device.id}" if self.device is not None else "empty slot"

    # ---- features and status ---------------------------------------------------------------

    def _offered(self) -> int:
        assert self.device is not None
        try:
            return self.device.features()
        except VmmError as error:
            self._failed(str(error))
            return 0

    def _read_features(self) -> int:
        if self._device_features_sel > 1:
            return 0
        return self._offered() >> (32 * self._device_features_sel) & MASK_32

    def _write_features(self, value: int) -> None:
        # 3.1.1: features are written between DRIVER and FEATURES_OK.
        status = self._status
        if self._driver_features_sel > 1 or not status & r.DRIVER or status & r.FEATURES_OK:
            return
        shift = 32 * self._driver_features_sel
        self._driver_features &= ~(MASK_32 << shift)
        self._driver_features |= value << shift

    def _write_status(self, value: int) -> None:
        if value == 0:
            self._reset()
            return
        old = self._status
        value &= 0xFF & ~r.NEEDS_RESET
        # 2.1.1: the driver MUST NOT clear a bit; only a reset does.
        if (old & ~r.NEEDS_RESET) & ~value:
            self._violation(f"cleared status bits (from {old:#x} to {value:#x})")
            return
        new = value & ~old
        if new & r.FEATURES_OK and not self._features_acceptable():
            value &= ~r.FEATURES_OK  # 2.1.2: how a device refuses
            new &= ~r.FEATURES_OK
        if new & r.DRIVER_OK and not value & r.FEATURES_OK:
            self._violation("set DRIVER_OK without FEATURES_OK")
            return
        with self._state_lock:
            self._status |= value
        if new & r.DRIVER_OK:
            self._activate()

    def _features_acceptable(self) -> bool:
        unknown = self._driver_features & ~self._offered()
        if unknown:
            self._complain(f"took features {unknown:#x} that were not on offer")
        return not unknown and bool(self._driver_features & r.F_VERSION_1)

    def _activate(self) -> None:
        if self._paused:
            # A vCPU was in the middle of this write when `stop` came: guest memory must not
            # be touched before `cont`.
            self._activate_on_resume = True
            return
        if self._status & r.NEEDS_RESET:
            return
        assert self.device is not None and self._interrupt is not None
        # Live before the rings start: another vCPU may take the first interrupt at once.
        self._interrupt.set_live(True)
        self._active = True
        try:
            self.device.activate(self._driver_features, self._queues)
        except VmmError as error:
            self._failed(str(error))

    def _reset(self) -> VmmError | None:
        """Device reset; an error means that the back end may still touch guest memory."""
        assert self.device is not None
        if self._interrupt is None:
            return None  # no driver has ever looked at it
        failure: VmmError | None = None
        self._activate_on_resume = False
        if self._active:
            try:
                self.device.reset()
            except VmmError as error:
                self._log_error(f"reset: {error}")
                failure = error
        self._active = False
        self._clear_selectors()
        for queue in self._queues:
            queue.size = queue.desc = queue.avail = queue.used = 0
            queue.ready = False
        self._interrupt.clear()
        with self._state_lock:
            # 4.2.2.1: a status of 0 says that the reset is complete. It isn't.
            self._status = r.NEEDS_RESET if failure is not None else 0
        return failure

    # ---- queues ----------------------------------------------------------------------------

    def _selected(self) -> QueueConfig | None:
        return self._queues[self._queue_sel] if self._queue_sel < len(self._queues) else None

    def _configurable(self) -> QueueConfig | None:
        """The selected queue if it may be set up now: FEATURES_OK, not DRIVER_OK, not ready."""
        queue = self._selected()
        return queue if queue is not None and not queue.ready and self._setting_up() else None

    def _setting_up(self) -> bool:
        return self._status & (r.FEATURES_OK | r.DRIVER_OK) == r.FEATURES_OK

    def _read_queue_size_max(self) -> int:
        assert self.device is not None
        sizes = self.device.queue_sizes
        return sizes[self._queue_sel] if self._queue_sel < len(sizes) else 0

    def _read_queue_ready(self) -> int:
        queue = self._selected()
        return int(queue is not None and queue.ready)

    def _write_queue_size(self, value: int) -> None:
        queue = self._configurable()
        if queue is not None:
            queue.size = value

    def _write_queue_ready(self, value: int) -> None:
        queue = self._selected()
        if queue is None or not self._setting_up():
            return
        if value & 1 and not queue.ready:
            problem = self._queue_problem(queue)
            if problem:
                self._violation(f"set up queue {queue.index} wrongly: {problem}")
                return
        queue.ready = bool(value & 1)

    def _queue_problem(self, queue: QueueConfig) -> str:
        """What is wrong with the driver's set-up of a queue; empty if nothing is."""
        assert self.device is not None
        size = queue.size
        if size == 0 or size & (size - 1) or size > self.device.queue_sizes[queue.index]:
            return f"bad size {size}"
        for name, field, align, fixed, entry in _PARTS:
            address: int = getattr(queue, field)
            if address % align:
                return f"{name} at {address:#x} is not aligned to {align}"
            try:
                self._memory.host_address(address, fixed + entry * size)
            except MemoryAccessError:
                return f"{name} at {address:#x} is not in RAM"
        return ""

    def _write_address(self, field: str, high: bool, value: int) -> None:
        queue = self._configurable()
        if queue is None:
            return
        old: int = getattr(queue, field)
        new = (old & MASK_32) | value << 32 if high else (old & ~MASK_32) | value
        setattr(queue, field, new)

    def _notify(self, index: int) -> None:
        # No lock: a kick must not wait for a back end, and the list doesn't change.
        if index < len(self._queues):
            os.eventfd_write(self._queues[index].kick_fd, 1)

    # ---- config space ----------------------------------------------------------------------

    def _read_config(self, offset: int, size: int) -> int:
        if self.device is None:
            return 0
        with self._lock:
            try:
                return int.from_bytes(self.device.read_config(offset, size), "little")
            except VmmError as error:
                self._failed(str(error))
                return 0

    def _write_config(self, offset: int, size: int, value: int) -> None:
        assert self.device is not None
        with self._lock:
            if not self._status & r.DRIVER:
                return
            data = (value & ((1 << 8 * size) - 1)).to_bytes(size, "little")
            try:
                self.device.write_config(offset, data)
            except VmmError as error:
                self._failed(str(error))

    # ---- what the device and a wrong driver cause ------------------------------------------

    def _config_changed(self) -> None:
        """The device's config space changed (callback of the device, any thread)."""
        with self._state_lock:
            self._generation = (self._generation + 1) & MASK_32
            if self._status & r.DRIVER_OK:
                self._raise_config_interrupt()

    def _failed(self, text: str) -> None:
        """The device can't go on (callback of the device, any thread)."""
        self._log_error(text)
        self._set_needs_reset()

    def _log_error(self, text: str) -> None:
        line = self._lines.line(text)
        if line:
            log.error(f"{self._name()}: {line}")

    def _violation(self, text: str) -> None:
        self._complain(f"{text}; it must reset the device")
        self._set_needs_reset()

    def _complain(self, text: str) -> None:
        line = self._lines.line(text)
        if line:
            log.warning(f"{self._name()}: the guest's driver {line}")

    def _set_needs_reset(self) -> None:
        with self._state_lock:
            if self._status & r.NEEDS_RESET:
                return
            self._status |= r.NEEDS_RESET
            # 2.1.2: a notification is due if DRIVER_OK is set.
            if self._status & r.DRIVER_OK:
                self._raise_config_interrupt()

    def _raise_config_interrupt(self) -> None:
        if self._interrupt is not None and self._config_fd >= 0:
            self._interrupt.raise_bits(r.INTERRUPT_CONFIG)
            os.eventfd_write(self._config_fd, 1)


def _eventfd() -> int:
    return os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)


_EMPTY_SLOT = {r.MAGIC_VALUE: r.MAGIC, r.VERSION_REGISTER: r.VERSION, r.VENDOR_ID: r.VENDOR}

_READERS: dict[int, Callable[[VirtioMmio], int]] = {
    r.MAGIC_VALUE: lambda t: r.MAGIC,
    r.VERSION_REGISTER: lambda t: r.VERSION,
    r.DEVICE_ID: lambda t: t.device.device_id if t.device is not None else 0,
    r.VENDOR_ID: lambda t: r.VENDOR,
    r.DEVICE_FEATURES: VirtioMmio._read_features,
    r.QUEUE_SIZE_MAX: VirtioMmio._read_queue_size_max,
    r.QUEUE_READY: VirtioMmio._read_queue_ready,
    # 4.2.2: the length of a shared memory region that doesn't exist is -1; we have none.
    r.SHM_LEN_LOW: lambda t: MASK_32,
    r.SHM_LEN_HIGH: lambda t: MASK_32,
    r.SHM_BASE_LOW: lambda t: MASK_32,
    r.SHM_BASE_HIGH: lambda t: MASK_32,
}


def _set_device_features_sel(transport: VirtioMmio, value: int) -> None:
    transport._device_features_sel = value


def _set_driver_features_sel(transport: VirtioMmio, value: int) -> None:
    transport._driver_features_sel = value


def _set_queue_sel(transport: VirtioMmio, value: int) -> None:
    transport._queue_sel = value


_WRITERS: dict[int, Callable[[VirtioMmio, int], None]] = {
    r.DEVICE_FEATURES_SEL: _set_device_features_sel,
    r.DRIVER_FEATURES: VirtioMmio._write_features,
    r.DRIVER_FEATURES_SEL: _set_driver_features_sel,
    r.QUEUE_SEL: _set_queue_sel,
    r.QUEUE_SIZE: VirtioMmio._write_queue_size,
    r.QUEUE_READY: VirtioMmio._write_queue_ready,
    r.STATUS: VirtioMmio._write_status,
    r.QUEUE_DESC_LOW: lambda t, v: t._write_address("desc", False, v),
    r.QUEUE_DESC_HIGH: lambda t, v: t._write_address("desc", True, v),
    r.QUEUE_DRIVER_LOW: lambda t, v: t._write_address("avail", False, v),
    r.QUEUE_DRIVER_HIGH: lambda t, v: t._write_address("avail", True, v),
    r.QUEUE_DEVICE_LOW: lambda t, v: t._write_address("used", False, v),
    r.QUEUE_DEVICE_HIGH: lambda t, v: t._write_address("used", True, v),
}
