"""The virtio-mmio transport, version 2 (virtio 1.2, 4.2.2).

One instance is one slot of 0x200 bytes.  The C run loop serves most registers
(native/core/virtio_mmio.c), KVM answers QueueNotify by ioeventfd.  Here comes, on a vCPU's
thread, where something happens: Status, QueueReady, writes of the config space; and what C
doesn't know: features and config space, which are told to it until they may have changed.

Other vCPUs may write what C serves at the same time.  So each value that a driver has drafted
there is read once, when it takes effect (features with FEATURES_OK, a queue with QueueReady),
then checked and used, and what C has is never looked at again.

Two locks: `_lock` is held over every access and may be held for as long as a back end takes to
answer; `_state_lock` guards status, generation, interrupt and what C is told for the callbacks
of the device, which come on the main loop and must never wait.
"""

from __future__ import annotations

import _thread
import posix as os
import time

from shared import log
from shared.fds import close_all
from shared.quota import LINES, LINES_RATE, Quota
from vmm.devices.virtio_device import QueueConfig
from vmm.errors import BackendError, MemoryAccessError, VmmError
from vmm.hypervisor.virtio_registers import CONFIG_SIZE
from vmm.transport import mmio_registers as r

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vmm.devices.virtio_device import VirtioDevice
    from vmm.hypervisor.interface import Vm
    from vmm.memory import GuestMemory

MASK_32 = 0xFFFF_FFFF
RESET_LIMIT = 10.0

# The three parts of a split ring: name, alignment, and size as (fixed, per entry) bytes
# (virtio 1.2, 2.7).
_PARTS = (("descriptor table", 16, 0, 16), ("driver area", 2, 6, 2), ("device area", 4, 6, 8))


class VirtioMmio:
    """One virtio-mmio slot; implements the AddressSpace handler (`read`, `write`).

    :param base: guest-physical address of the slot; gsi: its interrupt (edge).
    :param lazy: doorbells and interrupts are made when a driver first sets a status, without
        which no queue can be set up: a slot that no driver takes costs the start nothing.
    """

    def __init__(self, vm: Vm, memory: GuestMemory, base: int, gsi: int,
                 device: VirtioDevice, lazy: bool = False) -> None:
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
        self._wired = False
        self._config_fd = -1
        self._features = 0              # the driver's, as checked
        self._changes = 0               # of what the device shows
        self._registers = vm.add_virtio(base, device.device_id, device.queue_sizes)
        self._active = False            # the device was given its queues
        self._paused = False
        self._activate_on_resume = False
        # Bounded: a hostile guest, or its worker, could fill the log.
        self._lines = Quota(LINES, LINES_RATE)
        device.on_config_change = self._config_changed
        device.on_stale = self._stale
        device.on_failure = self._failed
        if not lazy:
            self._wire()

    def _wire(self) -> None:
        """Doorbells and interrupts, all of them or none.

        :raises OSError, VmmError: the host lacks descriptors or memory.
        """
        doorbell = self.base + r.QUEUE_NOTIFY
        fds: list[int] = []
        undo: list[tuple[Callable[..., None], tuple[int, ...]]] = []
        queues = []
        try:
            fds.append(_eventfd())
            self._vm.add_irqfd(self.gsi, fds[0])
            undo.append((self._vm.remove_irqfd, (self.gsi, fds[0])))
            for index in range(len(self.device.queue_sizes)):
                fds.append(_eventfd())
                fds.append(_eventfd())
                kick, call = fds[-2:]
                self._vm.add_ioeventfd(doorbell, 4, index, kick)
                undo.append((self._vm.remove_ioeventfd, (doorbell, 4, index, kick)))
                self._vm.add_irqfd(self.gsi, call)
                undo.append((self._vm.remove_irqfd, (self.gsi, call)))
                queues.append(QueueConfig(index, 0, kick, call))
        except (OSError, VmmError):
            for step, arguments in undo:
                step(*arguments)
            close_all(fds)
            raise
        self._config_fd = fds[0]
        self._queues = queues
        self._wired = True

    # ---- the AddressSpace handler ----------------------------------------------------------

    def read(self, offset: int, size: int) -> int:
        """A read of `size` bytes at `offset` that C left to us: it doesn't know the answer."""
        if offset >= r.CONFIG:
            return self._read_config(offset - r.CONFIG, size)
        return self._read_features() if offset == r.DEVICE_FEATURES and size == 4 else 0

    def write(self, offset: int, size: int, value: int) -> None:
        """A write of `size` bytes at `offset` that neither C nor an ioeventfd served."""
        if offset >= r.CONFIG:
            self._write_config(offset - r.CONFIG, size, value)
        elif offset == r.QUEUE_NOTIFY:
            # KVM signals aligned 32-bit writes itself, once the ioeventfd exists. What comes
            # here was raced past it or has an odd width: a kick must not be lost.
            self._notify(value & 0xFFFF)
        elif size == 4 and offset in (r.STATUS, r.QUEUE_READY):
            with self._lock:
                if offset == r.STATUS:
                    self._write_status(value & MASK_32)
                else:
                    self._write_queue_ready(value & 1 != 0)

    # ---- life ------------------------------------------------------------------------------

    def pause(self, deadline: float) -> None:
        """Stop the device where it is; a DRIVER_OK that comes meanwhile waits for `resume`.

        :raises DeviceError: not stopped by `deadline` (monotonic seconds).
        """
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
        return f"device {self.device.id}"

    # ---- features and status ---------------------------------------------------------------

    def _offered(self) -> int:
        """The features on offer, as C is told as well; none if the device fails."""
        changes = self._changes
        try:
            features = self.device.features()
        except VmmError as error:
            self._failed(str(error))
            return 0
        if self.device.keeps_shown:
            with self._state_lock:
                if changes == self._changes:  # else they may be older than the change
                    self._registers.set_offered(features)
        return features

    def _read_features(self) -> int:
        with self._lock:
            half = self._registers.device_features_sel()
            return self._offered() >> (32 * half) & MASK_32 if half <= 1 else 0

    def _write_status(self, value: int) -> None:
        if value == 0:
            self._reset()
            return
        if not self._wired:
            try:
                self._wire()
            except (OSError, VmmError) as error:
                self._failed(f"no doorbells and interrupts: {error}")
                return  # a driver that resets it tries again
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
            self._set_status(self._status | value)
        if new & r.DRIVER_OK:
            self._activate()

    def _set_status(self, status: int) -> None:
        self._status = status
        self._registers.set_status(status)

    def _features_acceptable(self) -> bool:
        """Take the driver's features: whatever it drafts from now on is nobody's affair."""
        self._features = self._registers.driver_features()
        unknown = self._features & ~self._offered()
        if unknown:
            self._complain(f"took features {unknown:#x} that were not on offer")
        return not unknown and bool(self._features & r.F_VERSION_1)

    def _activate(self) -> None:
        if self._paused:
            # A vCPU was in the middle of this write when `stop` came: guest memory must not
            # be touched before `cont`.
            self._activate_on_resume = True
            return
        if self._status & r.NEEDS_RESET:
            return
        # Live before the rings start: another vCPU may take the first interrupt at once.
        self._registers.set_live(True)
        self._active = True
        try:
            self.device.activate(self._features, self._queues)
        except VmmError as error:
            self._failed(str(error))

    def _reset(self) -> VmmError | None:
        """Device reset; an error means that the back end may still touch guest memory."""
        failure: VmmError | None = None
        self._activate_on_resume = False
        if self._active:
            try:
                self.device.reset()
            except VmmError as error:
                self._log_error(f"reset: {error}")
                failure = error
        self._active = False
        self._features = 0
        for queue in self._queues:
            queue.size = queue.desc = queue.avail = queue.used = 0
            queue.ready = False
        with self._state_lock:
            self._registers.reset()
            self._forget()  # the next driver is told what the device shows then
            # 4.2.2.1: a status of 0 says that the reset is complete. It isn't.
            self._set_status(r.NEEDS_RESET if failure is not None else 0)
        return failure

    # ---- queues ----------------------------------------------------------------------------

    def _write_queue_ready(self, ready: bool) -> None:
        index = self._registers.queue_sel()
        # Between FEATURES_OK and DRIVER_OK only, as 3.1.1 has it.
        if (index >= len(self._queues)
                or self._status & (r.FEATURES_OK | r.DRIVER_OK) != r.FEATURES_OK):
            return
        queue = self._queues[index]
        if ready and not queue.ready:
            size, *addresses = self._registers.queue(index)
            problem = self._queue_problem(index, size, addresses)
            if problem:
                self._violation(f"set up queue {index} wrongly: {problem}")
                return
            queue.size = size
            queue.desc, queue.avail, queue.used = addresses
        queue.ready = ready
        self._registers.set_ready(index, ready)

    def _queue_problem(self, index: int, size: int, addresses: Sequence[int]) -> str:
        """What is wrong with the driver's set-up of a queue; empty if nothing is."""
        if size == 0 or size & (size - 1) or size > self.device.queue_sizes[index]:
            return f"bad size {size}"
        for (name, align, fixed, entry), address in zip(_PARTS, addresses, strict=True):
            if address % align:
                return f"{name} at {address:#x} is not aligned to {align}"
            try:
                self._memory.host_address(address, fixed + entry * size)
            except MemoryAccessError:
                return f"{name} at {address:#x} is not in RAM"
        return ""

    def _notify(self, index: int) -> None:
        # No lock: a kick must not wait for a back end, and the list doesn't change.
        if index < len(self._queues):
            os.eventfd_write(self._queues[index].kick_fd, 1)

    # ---- config space ----------------------------------------------------------------------

    def _read_config(self, offset: int, size: int) -> int:
        device = self.device
        with self._lock:
            changes = self._changes
            try:
                if not device.keeps_shown:
                    return int.from_bytes(device.read_config(offset, size), "little")
                config = device.read_config(0, CONFIG_SIZE)
            except VmmError as error:
                self._failed(str(error))
                return 0
            with self._state_lock:
                if changes == self._changes:
                    self._registers.set_config(config)
            return int.from_bytes(config[offset:offset + size], "little")

    def _write_config(self, offset: int, size: int, value: int) -> None:
        with self._lock:
            if not self._status & r.DRIVER:
                return
            data = (value & ((1 << 8 * size) - 1)).to_bytes(size, "little")
            try:
                self.device.write_config(offset, data)
            except VmmError as error:
                self._failed(str(error))

    def _stale(self) -> None:
        """What the device shows may have changed (callback of the device, any thread)."""
        with self._state_lock:
            self._forget()

    def _forget(self) -> None:
        self._changes += 1
        self._registers.forget()

    # ---- what the device and a wrong driver cause ------------------------------------------

    def _config_changed(self) -> None:
        """The device's config space changed (callback of the device, any thread)."""
        with self._state_lock:
            self._forget()  # first: who reads the new generation must not read the old bytes
            self._generation = (self._generation + 1) & MASK_32
            self._registers.set_generation(self._generation)
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
            self._forget()
            if self._status & r.NEEDS_RESET:
                return
            self._set_status(self._status | r.NEEDS_RESET)
            # 2.1.2: a notification is due if DRIVER_OK is set.
            if self._status & r.DRIVER_OK:
                self._raise_config_interrupt()

    def _raise_config_interrupt(self) -> None:
        if self._config_fd >= 0:
            self._registers.raise_bits(r.INTERRUPT_CONFIG)
            os.eventfd_write(self._config_fd, 1)


def _eventfd() -> int:
    return os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
