"""A virtio device whose queues a vhost-user back end serves: a worker of ours, or a foreign one.

Nothing here trusts the back end: every request has a time limit and `abort` ends every wait.
A back end that refuses or is slow keeps its connection; one that vanishes, lies or says nothing
at all loses it, and the device stays broken until a new one is made.  Either way the guest sees
DEVICE_NEEDS_RESET and the VM goes on.

States: NEW (nothing said yet) → IDLE (features known) ⇄ RUNNING ⇄ PAUSED; any → BROKEN, CLOSED.
PAUSED with `_stop_pending` means that the back end was told to stop its rings, or to start
them, and has not confirmed it: what comes next stops them first.
`_lock` is held over every exchange.  Callbacks on the main loop never take it.
"""

from __future__ import annotations

import _thread
import os
import select
import time

from shared.errors import SharedError
from shared.memory_regions import RegionTable
from shared.vhost_user import messages as m
from shared.vhost_user.errors import PeerRefusedError, TimedOutError, VhostUserError
from shared.vhost_user.frontend import BackendChannel, Frontend
from vmm.devices.virtio_device import QueueConfig, VirtioDevice
from vmm.errors import BackendError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmm.config.model import ChardevConfig
    from vmm.event_loop import EventLoop
    from vmm.memory import GuestMemory

NEW, IDLE, RUNNING, PAUSED, BROKEN, CLOSED = range(6)

# Seconds for ordinary requests; a worker that is just being started needs some of it.
REQUEST_LIMIT = 5.0
# Seconds for a reset: requests in flight have to end first, and a disk may be slow.
RESET_LIMIT = 10.0
DRAIN_POLL = 0.002

# Virtio status bits for back ends with PF_STATUS (virtio 1.2, 2.1).
_STATUS_STARTING = 1 | 2 | 8
_STATUS_RUNNING = _STATUS_STARTING | 4


class VhostUserDevice(VirtioDevice):
    """Base of the devices behind vhost-user; a subclass knows features and config space.

    :param socket_fd: connected to the back end, which need not run yet; owned from now on.
    :param queue_sizes: largest size of each queue that the guest sees.
    :param feature_mask: virtio features that this core and this device type can carry.
    :param foreign: not a worker of ours: GET_VRING_BASE may not wait for requests in flight.
    """

    def __init__(self, id: str, socket_fd: int, memory: GuestMemory, loop: EventLoop,
                 queue_sizes: Sequence[int], feature_mask: int, foreign: bool) -> None:
        self.id = id
        self.queue_sizes = tuple(queue_sizes)
        self.on_config_change = _nothing
        self.on_failure = _nothing_with_text
        self.state = NEW
        self._peer = f"back end of {id}"
        self._memory = memory
        self._loop = loop
        self._feature_mask = feature_mask
        self._foreign = foreign
        self._abort_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._error_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._frontend = Frontend(socket_fd, self._peer, self._abort_fd, REQUEST_LIMIT)
        self._channel: BackendChannel | None = None
        self._lock = _thread.allocate_lock()
        self._stop_pending = False
        self._hung_up_seen = False
        self._trouble = ""               # why the state is BROKEN
        self._memory_sent = False
        self._features = 0               # negotiated with the driver
        self._queues: list[QueueConfig] = []
        self._bases: dict[int, int] = {}  # next available index of each stopped ring
        self._inflight: tuple[m.Inflight, int] | None = None
        self._watched_fd = self._frontend.connection.fileno()
        loop.add(self._watched_fd, select.EPOLLRDHUP, self._hung_up)
        loop.add(self._error_fd, select.EPOLLIN, self._ring_error)

    # ---- VirtioDevice ----------------------------------------------------------------------

    def features(self) -> int:
        """The back end's features that this core can carry. Waits for its first answer.

        :raises BackendError: it doesn't come, or the back end is of no use.
        """
        with _Held(self, REQUEST_LIMIT):
            self._ready()
            return self._frontend.features & self._feature_mask

    def activate(self, features: int, queues: Sequence[QueueConfig]) -> None:
        """See `VirtioDevice.activate`.

        :raises BackendError: the back end refused, failed or is too slow.
        """
        with _Held(self, REQUEST_LIMIT):
            self._ready()
            if self.state != IDLE:
                raise BackendError(f"The {self._peer} is already started", "reset the device")
            self._features = features
            self._queues = [queue for queue in queues if queue.ready]
            self._bases = {queue.index: 0 for queue in self._queues}
            self._start()

    def reset(self) -> None:
        """See `VirtioDevice.reset`.

        :raises BackendError: rings could not be stopped; guest memory may still be touched.
        """
        deadline = time.monotonic() + RESET_LIMIT
        with _Held(self, RESET_LIMIT):
            if self.state not in (RUNNING, PAUSED):
                # A dead back end touches nothing; one that hangs was cut off, as far as we can.
                return
            self._stop(deadline)
            with _Guarded(self):
                if self._frontend.protocol & m.PF_RESET_DEVICE:
                    self._frontend.reset_device(deadline)
                elif self._frontend.protocol & m.PF_STATUS:
                    self._frontend.set_status(0, deadline)
                self._frontend.finish(deadline)
            self._drop_inflight()
            self.state = IDLE

    def pause(self, deadline: float) -> None:
        """See `VirtioDevice.pause`."""
        with _Held(self, deadline - time.monotonic()):
            if self.state in (RUNNING, PAUSED):
                self._stop(deadline)

    def resume(self) -> None:
        """See `VirtioDevice.resume`.

        :raises BackendError: the back end failed meanwhile.
        """
        with _Held(self, REQUEST_LIMIT):
            if self.state == BROKEN:
                raise self._broken_error()
            if self.state == PAUSED:
                if self._stop_pending:
                    self._stop(time.monotonic() + REQUEST_LIMIT)
                self._start()

    def abort(self) -> None:
        """End every wait for the back end, now and in future. Any thread; never waits."""
        if self.state != CLOSED:
            os.eventfd_write(self._abort_fd, 1)

    def close(self) -> None:
        """Cut the connection; harmless when closed. Rings should have been stopped before."""
        if self.state == CLOSED:
            return
        self.abort()
        self._loop.remove(self._watched_fd)
        self._loop.remove(self._error_fd)
        with self._lock:
            self.state = CLOSED
            self._close_channel()
            self._drop_inflight()
            self._frontend.close()
            os.close(self._abort_fd)
            os.close(self._error_fd)

    def write_config(self, offset: int, data: bytes) -> None:
        """Ignored: subclasses forward what is writable."""

    # ---- for subclasses --------------------------------------------------------------------

    def _fetch_config(self, offset: int, size: int) -> bytes:
        """GET_CONFIG; the back end is asked every time."""
        with _Held(self, REQUEST_LIMIT):
            self._ready()
            if not self._frontend.protocol & m.PF_CONFIG:
                raise BackendError(f"The {self._peer} has no config space",
                                   "this device needs one with protocol feature CONFIG")
            with _Guarded(self):
                return self._frontend.get_config(offset, size)

    def _forward_config(self, offset: int, data: bytes) -> None:
        """SET_CONFIG."""
        with _Held(self, REQUEST_LIMIT):
            self._ready()
            if self._frontend.protocol & m.PF_CONFIG:
                with _Guarded(self):
                    self._frontend.set_config(offset, data)
                    self._frontend.finish()

    def _config_went_stale(self) -> None:
        """The back end says that its config space changed (main loop; must not wait)."""
        self.on_config_change()

    # ---- inside: all under the lock --------------------------------------------------------

    def _ready(self) -> None:
        """Handshake, once, by whoever comes first."""
        if self.state in (BROKEN, CLOSED):
            raise self._broken_error()
        if self.state != NEW:
            return
        with _Guarded(self):
            frontend = self._frontend
            frontend.handshake()
            if 0 < frontend.queue_count < len(self.queue_sizes):
                raise BackendError(
                    f"The {self._peer} has {frontend.queue_count} queues, "
                    f"{len(self.queue_sizes)} were asked for", "lower num-queues")
            if frontend.protocol & m.PF_BACKEND_REQ:
                self._open_channel()
        self.state = IDLE

    def _open_channel(self) -> None:
        fd = self._frontend.open_backend_channel()
        self._channel = BackendChannel(fd, self._peer, self._config_went_stale)
        self._frontend.finish()
        self._loop.add(fd, select.EPOLLIN, self._channel_ready)

    def _start(self) -> None:
        """Set everything up, start the rings, kick and call each once."""
        # Until the back end has confirmed it all, some rings may run and some not.
        self.state = PAUSED
        self._stop_pending = True
        with _Guarded(self):
            self._send_all()
        self._stop_pending = False
        self.state = RUNNING
        # What the guest kicked, or the old run called, while nobody listened.
        for queue in self._queues:
            os.eventfd_write(queue.kick_fd, 1)
            os.eventfd_write(queue.call_fd, 1)

    def _send_all(self) -> None:
        frontend = self._frontend
        frontend.set_features(self._features)
        if frontend.protocol & m.PF_STATUS:
            frontend.set_status(_STATUS_STARTING)
        self._send_memory()
        self._send_inflight()
        for queue in self._queues:
            self._send_ring(queue)
        if frontend.features & m.F_PROTOCOL_FEATURES:
            for queue in self._queues:
                frontend.set_vring_enable(queue.index, True)
        if frontend.protocol & m.PF_STATUS:
            frontend.set_status(_STATUS_RUNNING)
        frontend.finish()

    def _send_memory(self) -> None:
        # Once a connection. One message sets the whole table; ADD_MEM_REG is for more regions
        # than it holds, and for hotplug.
        if self._memory_sent:
            return
        regions = self._memory.regions
        if len(regions) <= m.MAX_TABLE_REGIONS:
            self._frontend.set_mem_table(regions, [self._memory.fd] * len(regions))
        elif self._frontend.protocol & m.PF_CONFIGURE_MEM_SLOTS:
            slots = self._frontend.get_max_mem_slots()
            if slots < len(regions):
                raise BackendError(f"The {self._peer} takes {slots} memory regions",
                                   f"{len(regions)} are needed: give the VM less memory")
            for region in regions:
                self._frontend.add_mem_region(region, self._memory.fd)
        else:
            raise BackendError(f"The {self._peer} takes {m.MAX_TABLE_REGIONS} memory regions",
                               f"{len(regions)} are needed: use another back end")
        self._memory_sent = True

    def _send_inflight(self) -> None:
        if not self._frontend.protocol & m.PF_INFLIGHT_SHMFD or not self._queues:
            return
        if self._inflight is None:
            size = max(queue.size for queue in self._queues)
            self._inflight = self._frontend.get_inflight(len(self.queue_sizes), size)
        if self._inflight is not None:
            self._frontend.set_inflight(*self._inflight)

    def _send_ring(self, queue: QueueConfig) -> None:
        table = RegionTable(self._memory.regions)
        index, size = queue.index, queue.size
        frontend = self._frontend
        frontend.set_vring_num(index, size)
        frontend.set_vring_base(index, self._bases[index])
        frontend.set_vring_addr(index, table.to_user(queue.desc, 16 * size),
                                table.to_user(queue.avail, 6 + 2 * size),
                                table.to_user(queue.used, 6 + 8 * size))
        frontend.set_vring_err(index, self._error_fd)
        # Before the kick, which starts the ring: no completion may go unsignalled.
        frontend.set_vring_call(index, queue.call_fd)
        frontend.set_vring_kick(index, queue.kick_fd)

    def _stop(self, deadline: float) -> None:
        """Stop every ring and wait until nothing is in flight; RUNNING becomes PAUSED."""
        if self.state == RUNNING and self._foreign:
            self._quiesce(deadline)
        if self.state == RUNNING or self._stop_pending:
            self.state = PAUSED
            self._stop_pending = True
            with _Guarded(self):
                for queue in self._queues:
                    self._bases[queue.index] = self._frontend.get_vring_base(queue.index, deadline)
            self._stop_pending = False
        if self._foreign:
            for queue in self._queues:
                self._wait_used(queue, self._bases[queue.index], deadline)

    def _quiesce(self, deadline: float) -> None:
        """Let a foreign back end finish what the guest has queued, before it is stopped.

        qemu-storage-daemon 7.2 gives up for good ("Error writing eventfd") when a request ends
        after GET_VRING_BASE, which closes the call descriptor.  If this takes too long the
        rings go on running, and the caller is told.
        """
        if self._frontend.broken is not None:
            return
        for queue in self._queues:
            # The guest may have been stopped between queueing and kicking.
            os.eventfd_write(queue.kick_fd, 1)
        for queue in self._queues:
            self._wait_used(queue, self._index(queue.avail), deadline)

    def _wait_used(self, queue: QueueConfig, index: int, deadline: float) -> None:
        """Wait until the used index of a split ring has reached `index`."""
        while self._index(queue.used) != index:
            if time.monotonic() + DRAIN_POLL > deadline:
                raise BackendError(f"The {self._peer} did not finish its requests in time",
                                   "it hangs, or its disk does")
            if self._hung_up_seen:
                raise BackendError(f"The {self._peer} is gone with requests in flight",
                                   "look at its log")
            time.sleep(DRAIN_POLL)

    def _index(self, ring_part: int) -> int:
        """`idx` of an available or used ring (virtio 1.2, 2.7.6, 2.7.8)."""
        return int.from_bytes(self._memory.read(ring_part + 2, 2), "little")

    def _drop_inflight(self) -> None:
        # A buffer belongs to one life of the driver: after a reset a new one is asked for.
        if self._inflight is not None:
            os.close(self._inflight[1])
            self._inflight = None

    def _break(self, error: Exception) -> None:
        """Close the connection; the device is of no use until it is made anew."""
        self.state = BROKEN
        self._trouble = str(error)
        self._loop.remove(self._watched_fd)
        self._close_channel()
        self._frontend.connection.shutdown()

    def _close_channel(self) -> None:
        if self._channel is not None:
            self._loop.remove(self._channel.fileno())
            self._channel.close()
            self._channel = None

    def _broken_error(self) -> BackendError:
        if self.state == CLOSED:
            return BackendError(f"The {self._peer} is closed", "the device is gone")
        return BackendError(f"The {self._peer} failed before: {self._trouble}",
                            "look at the back end's log")

    # ---- callbacks on the main loop: no lock, no wait --------------------------------------

    def _hung_up(self, events: int) -> None:
        """The back end closed the socket, or died."""
        self._loop.remove(self._watched_fd)
        self._hung_up_seen = True
        if self.state in (RUNNING, PAUSED):
            self.on_failure(f"The {self._peer} is gone; look at its log")

    def _ring_error(self, events: int) -> None:
        try:
            os.eventfd_read(self._error_fd)
        except BlockingIOError:
            return
        self.on_failure(f"The {self._peer} can't serve a queue any more; look at its log")

    def _channel_ready(self, events: int) -> None:
        channel = self._channel
        if channel is None:
            return
        fd = channel.fileno()
        try:
            channel.handle_one(0.0)
        except VhostUserError:
            # Only config changes come this way; a dead back end shows on the main socket too.
            if fd >= 0:
                self._loop.remove(fd)


class _Held:
    """`with`: the device's lock, waited for with a limit in seconds."""

    __slots__ = ("_device", "_limit")

    def __init__(self, device: VhostUserDevice, limit: float) -> None:
        self._device = device
        self._limit = limit

    def __enter__(self) -> None:
        if not self._device._lock.acquire(True, max(0.0, self._limit)):
            raise BackendError(f"The {self._device._peer} keeps another request waiting",
                               "it hangs or is overloaded")

    def __exit__(self, *exc: object) -> None:
        self._device._lock.release()


class _Guarded:
    """`with`: errors of the exchange inside come out as BackendError.

    They break the device, unless the connection is still good: a refusal, or a timeout with no
    message cut.
    """

    __slots__ = ("_device",)

    def __init__(self, device: VhostUserDevice) -> None:
        self._device = device

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        device = self._device
        if isinstance(error, BackendError):
            device._break(error)
        elif isinstance(error, (SharedError, OSError)):
            mild = isinstance(error, (PeerRefusedError, TimedOutError))
            if not mild or device._frontend.broken is not None or device.state == NEW:
                device._break(error)
            raise BackendError(f"Device {device.id}: {error}") from error


def connect_backend(config: ChardevConfig) -> int:
    """See vmm/devices/vhost_socket.py, which only VMs with a foreign back end load."""
    from vmm.devices.vhost_socket import connect_backend as connect

    return connect(config)


def _nothing() -> None:
    pass


def _nothing_with_text(text: str) -> None:
    pass
