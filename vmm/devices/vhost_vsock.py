"""virtio-vsock (virtio 1.2, 5.10), served by the kernel's vhost: sockets between guest and host.

The kernel has the rings rx and tx.  The event queue is the core's, which has one thing to say
there: that all connections are gone, as the guest goes on somewhere else (`transport_reset`).

What stays is set up by the main thread at the start; a vCPU's thread, on which DRIVER_OK and
resets come, may only start and stop what is there (native/core/confine.c).  The kernel answers
every request at once, so there is nothing to wait for or to abort.
"""

from __future__ import annotations

import _thread
import posix as os
import select
from errno import EADDRINUSE, EBUSY, EINVAL

from shared import log
from shared.errors import SystemCallError
from vmm.devices.virtio_device import VirtioDevice, nothing
from vmm.errors import BackendError, ConfigError, MemoryAccessError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmm.devices.vhost_kernel import KernelVsock
    from vmm.devices.virtio_device import QueueConfig
    from vmm.event_loop import EventLoop
    from vmm.memory import GuestMemory

DEVICE_ID_VSOCK = 19
RX, TX, EVENT = range(3)
QUEUE_SIZE = 256

# virtio 1.2, 5.10.3: STREAM, SEQPACKET; 6: INDIRECT_DESC, EVENT_IDX, VERSION_1.  Not
# ACCESS_PLATFORM: there is no IOMMU.  VHOST_F_LOG_ALL (bit 26) is vhost's alone, never on offer
# to a driver: it goes into `set_features` beside these once dirty pages are logged.
FEATURES = 1 << 0 | 1 << 1 | 1 << 28 | 1 << 29 | 1 << 32

# virtio 1.2, 2.7.5: flags of a descriptor.
_WRITE, _INDIRECT = 2, 4
_TRANSPORT_RESET = 0  # 5.10.6.7: the id of the event, le32

IDLE, RUNNING, PAUSED, CLOSED = range(4)


class VhostVsock(VirtioDevice):
    """The guest's end of AF_VSOCK.

    :param kernel: owned from now on, whatever happens.
    :param guest_cid: the guest's address, 3 to 4294967294.
    :param option: what the user wrote, for errors.
    :raises ConfigError: the address is taken, or the kernel's end belongs to somebody else.
    """

    device_id = DEVICE_ID_VSOCK
    keeps_shown = True
    queue_sizes = (QUEUE_SIZE,) * 3

    def __init__(self, id: str, kernel: KernelVsock, guest_cid: int, memory: GuestMemory,
                 loop: EventLoop, option: str = "") -> None:
        self.id = id
        self.on_config_change = nothing
        self.on_failure = _nothing_with_text
        self.guest_cid = guest_cid
        self.state = IDLE
        self._kernel = kernel
        self._memory = memory
        self._loop = loop
        self._lock = _thread.allocate_lock()
        self._negotiated = 0
        self._queues: dict[int, QueueConfig] = {}
        self._bases = {RX: 0, TX: 0}  # next available index of each stopped ring
        self._error_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        try:
            self._features = self._set_up(option or f"device {id}")
        except ConfigError:
            os.close(self._error_fd)
            kernel.close()
            raise
        loop.add(self._error_fd, select.EPOLLIN, self._ring_error)

    def _set_up(self, option: str) -> int:
        """The features that kernel and core have."""
        kernel, cid = self._kernel, self.guest_cid
        try:
            kernel.set_owner()
            kernel.set_guest_cid(cid)
            features = kernel.features() & FEATURES
            kernel.set_memory(self._memory.regions)
            for index in (RX, TX):
                kernel.set_vring_err(index, self._error_fd)
        except SystemCallError as error:
            raise ConfigError(*_explain(option, cid, error)) from error
        return features

    # ---- VirtioDevice ----------------------------------------------------------------------

    def features(self) -> int:
        """See `VirtioDevice.features`."""
        return self._features

    def read_config(self, offset: int, size: int) -> bytes:
        """See `VirtioDevice.read_config`: le64 guest_cid (5.10.4)."""
        config = self.guest_cid.to_bytes(8, "little")
        return config[offset:offset + size].ljust(size, b"\0")

    def write_config(self, offset: int, data: bytes) -> None:
        """Ignored: nothing is writable."""

    def activate(self, features: int, queues: Sequence[QueueConfig]) -> None:
        """See `VirtioDevice.activate`.

        :raises BackendError: the driver left rx or tx out, or the kernel refused.
        """
        with self._lock:
            if self.state != IDLE:
                raise BackendError(f"The vsock {self.id} is already started", "reset the device")
            ready = {queue.index: queue for queue in queues if queue.ready}
            if RX not in ready or TX not in ready:
                raise BackendError(f"The driver of {self.id} set DRIVER_OK without its rx and tx "
                                   "queues", "virtio 1.2, 5.10.2")
            self._negotiated = features
            self._queues = ready
            self._bases = {RX: 0, TX: 0}
            self._start()

    def reset(self) -> None:
        """See `VirtioDevice.reset`. The host's ends of connections stay until the guest, or
        they, notice."""
        with self._lock:
            if self.state == CLOSED:
                return
            self._stop()
            self.state = IDLE
            self._queues = {}

    def pause(self, deadline: float) -> None:
        """See `VirtioDevice.pause`. What the host sends meanwhile waits in the kernel."""
        with self._lock:
            if self.state != RUNNING:
                return
            self._stop()
            self.state = PAUSED
            try:
                self._bases = {index: self._kernel.vring_base(index) for index in (RX, TX)}
            except SystemCallError as error:
                raise self._refused(error) from error

    def resume(self) -> None:
        """See `VirtioDevice.resume`."""
        with self._lock:
            if self.state == PAUSED:
                self._start()

    def close(self) -> None:
        """Give the address back; harmless when closed."""
        with self._lock:
            if self.state == CLOSED:
                return
            try:
                self._stop()  # who handed in a vhostfd may have kept a copy of it
            except BackendError as error:
                log.warning(str(error))
            self.state = CLOSED
            self._queues = {}
            self._loop.remove(self._error_fd)
            os.close(self._error_fd)
            self._kernel.close()

    # ---- the event queue -------------------------------------------------------------------

    def transport_reset(self) -> bool:
        """Tell the driver that every connection is gone (5.10.6.7): after the guest was restored
        elsewhere, while its vCPUs stand still.

        :return: False: the driver left no buffer for events.
        """
        with self._lock:
            queue = self._queues.get(EVENT)
            if queue is None:
                return False
            try:
                return self._put_event(queue, _TRANSPORT_RESET.to_bytes(4, "little"))
            except MemoryAccessError as error:
                log.warning(f"Device {self.id}: the driver's event queue is broken: {error}")
                return False

    def _put_event(self, queue: QueueConfig, event: bytes) -> bool:
        """Use the next buffer of the queue. Every one is used at once, so that the used index
        is where the available ring stands (split rings: 2.7.6, 2.7.8)."""
        def number(address: int, size: int) -> int:
            return int.from_bytes(self._memory.read(address, size), "little")

        index = number(queue.used + 2, 2)
        if number(queue.avail + 2, 2) == index:
            return False
        slot = index % queue.size
        head = number(queue.avail + 4 + 2 * slot, 2)
        if head >= queue.size:
            log.warning(f"Device {self.id}: the driver's event queue has no descriptor {head}")
            return False
        entry = self._memory.read(queue.desc + 16 * head, 16)
        address, length = int.from_bytes(entry[:8], "little"), int.from_bytes(entry[8:12], "little")
        flags = int.from_bytes(entry[12:14], "little")
        if flags & (_WRITE | _INDIRECT) != _WRITE or length < len(event):
            log.warning(f"Device {self.id}: the driver's buffer for events has {length} bytes and "
                        f"flags {flags:#x}")
            return False
        self._memory.write(address, event)
        self._memory.write(queue.used + 4 + 8 * slot, head.to_bytes(4, "little")
                           + len(event).to_bytes(4, "little"))
        self._memory.write(queue.used + 2, ((index + 1) & 0xFFFF).to_bytes(2, "little"))
        os.eventfd_write(queue.call_fd, 1)
        return True

    # ---- inside: all under the lock --------------------------------------------------------

    def _start(self) -> None:
        kernel, memory = self._kernel, self._memory
        served = [self._queues[RX], self._queues[TX]]
        try:
            kernel.set_features(self._negotiated)
            for queue in served:
                kernel.set_vring(queue.index, queue.size, self._bases[queue.index],
                                 memory.host_address(queue.desc, 16 * queue.size),
                                 memory.host_address(queue.avail, 6 + 2 * queue.size),
                                 memory.host_address(queue.used, 6 + 8 * queue.size))
                kernel.set_vring_call(queue.index, queue.call_fd)
                kernel.set_vring_kick(queue.index, queue.kick_fd)
            kernel.set_running(True)
        except SystemCallError as error:
            raise self._refused(error) from error
        self.state = RUNNING
        # What was kicked, or called, while it stood still.
        for queue in served:
            os.eventfd_write(queue.kick_fd, 1)
            os.eventfd_write(queue.call_fd, 1)

    def _stop(self) -> None:
        if self.state == RUNNING:
            try:
                self._kernel.set_running(False)
            except SystemCallError as error:
                raise self._refused(error) from error

    def _refused(self, error: SystemCallError) -> BackendError:
        return BackendError(f"The kernel's vsock refused {self.id}: {error.what}",
                            "the kernel's log may tell why")

    # ---- callback on the main loop: no lock, no wait ---------------------------------------

    def _ring_error(self, events: int) -> None:
        try:
            os.eventfd_read(self._error_fd)
        except BlockingIOError:
            return
        self.on_failure("the driver put into a queue what the kernel can't serve")


def _explain(option: str, cid: int, error: SystemCallError) -> tuple[str, str]:
    """What went wrong at the start, and what to do."""
    if error.errno == EADDRINUSE:
        return f"{option}: another VM has the guest-cid {cid}", "choose another one"
    if error.errno == EBUSY:
        return (f"{option}: another process owns this vhostfd",
                "hand in one that was just opened")
    if error.errno == EINVAL and error.what.startswith("VHOST_VSOCK_SET_GUEST_CID"):
        return f"{option}: the kernel keeps the guest-cid {cid} for itself", "choose another one"
    return f"{option}: {error.what}", "the kernel's log may tell why"


def _nothing_with_text(text: str) -> None:
    pass
