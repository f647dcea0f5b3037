"""One connection to one back end: what is said over it, and what it knows of the other side.

A device outlives its back ends (vmm/devices/vhost_user.py); a session is one of them.  Its
methods are called under the device's lock, raise the errors of the exchange as they come, and
leave the judgement to the device.
"""

from __future__ import annotations

import posix as os
import select
import time

from shared.memory_regions import RegionTable
from shared.vhost_user import messages as m
from shared.vhost_user.errors import ConnectionLostError, VhostUserError
from shared.vhost_user.frontend import BackendChannel, Frontend
from vmm.errors import BackendError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vmm.devices.virtio_device import QueueConfig
    from vmm.event_loop import EventLoop
    from vmm.memory import GuestMemory

    Inflight = tuple[m.Inflight, int]

DRAIN_POLL = 0.002

# Virtio status bits for back ends with PF_STATUS (virtio 1.2, 2.1).
_STATUS_STARTING = 1 | 2 | 8
_STATUS_RUNNING = _STATUS_STARTING | 4


class Session:
    """One back end.

    :param fd: connected to it; owned from now on.  It need not run yet.
    :param peer: names it in errors.
    :param abort_fd: readable: every wait ends.
    :param error_fd: what the back end signals when it can't serve a ring any more.
    :param foreign: not a worker of ours, and a device with requests: GET_VRING_BASE may not wait
        for those in flight.
    :param limit: seconds that an ordinary request may take.
    :param on_config_change, on_hang_up: called on the main loop; must not wait.
    """

    def __init__(self, fd: int, peer: str, memory: GuestMemory, loop: EventLoop, abort_fd: int,
                 error_fd: int, foreign: bool, limit: float, on_config_change: Callable[[], None],
                 on_hang_up: Callable[[], None]) -> None:
        self.peer = peer
        self.foreign = foreign
        self.greeted = False            # features are known
        self.stop_pending = False       # told to stop its rings, or to start them: not confirmed
        self.hung_up = False
        self._memory = memory
        self._loop = loop
        self._error_fd = error_fd
        self._on_config_change = on_config_change
        self._on_hang_up = on_hang_up
        self._frontend = Frontend(fd, peer, abort_fd, limit)
        self._channel: BackendChannel | None = None
        self._memory_sent = False
        self._watched_fd = fd
        loop.add(fd, select.EPOLLRDHUP, self._hung_up)

    @property
    def broken(self) -> bool:
        """The connection can't be used any more."""
        return self._frontend.broken is not None

    @property
    def features(self) -> int:
        """Virtio features on offer, once greeted."""
        return self._frontend.features

    @property
    def has_config(self) -> bool:
        """It has a config space."""
        return bool(self._frontend.protocol & m.PF_CONFIG)

    # ---- exchanges -------------------------------------------------------------------------

    def greet(self, queues: int, wanted: int, option: str) -> None:
        """The handshake, once.

        :param wanted: protocol features to take if they are on offer.
        :param option: the one that says how many queues there are to be.
        :raises BackendError: it has fewer than `queues` queues.
        """
        if self.greeted:
            return
        frontend = self._frontend
        frontend.handshake(wanted)
        if 0 < frontend.queue_count < queues:
            raise BackendError(f"The {self.peer} has {frontend.queue_count} queues, "
                               f"{queues} were asked for", f"lower {option}")
        if frontend.protocol & m.PF_BACKEND_REQ:
            fd = frontend.open_backend_channel()
            self._channel = BackendChannel(fd, self.peer, self._on_config_change)
            frontend.finish()
            self._loop.add(fd, select.EPOLLIN, self._channel_ready)
        self.greeted = True

    def get_config(self, offset: int, size: int) -> bytes:
        """GET_CONFIG."""
        return self._frontend.get_config(offset, size)

    def set_config(self, offset: int, data: bytes) -> None:
        """SET_CONFIG, confirmed."""
        self._frontend.set_config(offset, data)
        self._frontend.finish()

    def reset(self, deadline: float) -> None:
        """Virtio reset, by whichever way the back end knows."""
        if self._frontend.protocol & m.PF_RESET_DEVICE:
            self._frontend.reset_device(deadline)
        elif self._frontend.protocol & m.PF_STATUS:
            self._frontend.set_status(0, deadline)
        self._frontend.finish(deadline)

    def start(self, features: int, queues: Sequence[QueueConfig], bases: dict[int, int],
              inflight: Inflight | None, all_queues: int,
              config: tuple[int, bytes] | None = None) -> Inflight | None:
        """Set everything up and start the rings at `bases`; kick and call each once.

        :param config: what the driver has written to the config space, and where.
        :return: the record of requests in flight: the given one, or one that the back end made.
        """
        frontend = self._frontend
        # Until the back end has confirmed it all, some rings may run and some not.
        self.stop_pending = True
        frontend.set_features(features)
        if frontend.protocol & m.PF_STATUS:
            frontend.set_status(_STATUS_STARTING)
        if config is not None and self.has_config:
            frontend.set_config(*config)
        self._send_memory()
        inflight = self._send_inflight(queues, inflight, all_queues)
        for queue in queues:
            self._send_ring(queue, bases[queue.index])
        if frontend.features & m.F_PROTOCOL_FEATURES:
            for queue in queues:
                frontend.set_vring_enable(queue.index, True)
        if frontend.protocol & m.PF_STATUS:
            frontend.set_status(_STATUS_RUNNING)
        frontend.finish()
        self.stop_pending = False
        # What the guest kicked, or the old run called, while nobody listened.
        for queue in queues:
            os.eventfd_write(queue.kick_fd, 1)
            os.eventfd_write(queue.call_fd, 1)
        return inflight

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
                raise BackendError(f"The {self.peer} takes {slots} memory regions",
                                   f"{len(regions)} are needed: give the VM less memory")
            for region in regions:
                self._frontend.add_mem_region(region, self._memory.fd)
        else:
            raise BackendError(f"The {self.peer} takes {m.MAX_TABLE_REGIONS} memory regions",
                               f"{len(regions)} are needed: use another back end")
        self._memory_sent = True

    def _send_inflight(self, queues: Sequence[QueueConfig], inflight: Inflight | None,
                       all_queues: int) -> Inflight | None:
        if not self._frontend.protocol & m.PF_INFLIGHT_SHMFD or not queues:
            return inflight
        if inflight is None:
            inflight = self._frontend.get_inflight(all_queues, max(q.size for q in queues))
        if inflight is not None:
            self._frontend.set_inflight(*inflight)
        return inflight

    def _send_ring(self, queue: QueueConfig, base: int) -> None:
        table = RegionTable(self._memory.regions)
        index, size = queue.index, queue.size
        frontend = self._frontend
        frontend.set_vring_num(index, size)
        frontend.set_vring_base(index, base)
        frontend.set_vring_addr(index, table.to_user(queue.desc, 16 * size),
                                table.to_user(queue.avail, 6 + 2 * size),
                                table.to_user(queue.used, 6 + 8 * size))
        frontend.set_vring_err(index, self._error_fd)
        # Before the kick, which starts the ring: no completion may go unsignalled.
        frontend.set_vring_call(index, queue.call_fd)
        frontend.set_vring_kick(index, queue.kick_fd)

    # ---- stopping --------------------------------------------------------------------------

    def quiesce(self, queues: Sequence[QueueConfig], deadline: float) -> None:
        """Let a foreign back end finish what the guest has queued, before it is stopped.

        qemu-storage-daemon 7.2 gives up for good ("Error writing eventfd") when a request ends
        after GET_VRING_BASE, which closes the call descriptor.  If this takes too long the
        rings go on running, and the caller is told.

        :raises BackendError: it took too long.
        :raises ConnectionLostError: it is gone.
        """
        if self.broken or not self.foreign:
            return
        for queue in queues:
            # The guest may have been stopped between queueing and kicking.
            os.eventfd_write(queue.kick_fd, 1)
        for queue in queues:
            self._wait_used(queue, self._index(queue.avail), deadline)

    def stop(self, queues: Sequence[QueueConfig], bases: dict[int, int], deadline: float) -> None:
        """Stop every ring; where it stopped goes into `bases`."""
        self.stop_pending = True
        for queue in queues:
            bases[queue.index] = self._frontend.get_vring_base(queue.index, deadline)
        self.stop_pending = False

    def drain(self, queues: Sequence[QueueConfig], bases: dict[int, int], deadline: float) -> None:
        """Wait until a foreign back end has finished what it took before it stopped.

        :raises BackendError: it took too long.
        :raises ConnectionLostError: it is gone.
        """
        if self.foreign:
            for queue in queues:
                self._wait_used(queue, bases[queue.index], deadline)

    def _wait_used(self, queue: QueueConfig, index: int, deadline: float) -> None:
        """Wait until the used index of a split ring has reached `index`."""
        while self._index(queue.used) != index:
            if time.monotonic() + DRAIN_POLL > deadline:
                raise BackendError(f"The {self.peer} did not finish its requests in time",
                                   "it hangs, or its disk does")
            if self.hung_up:
                raise ConnectionLostError(f"The {self.peer} is gone with requests in flight",
                                          "look at its log")
            time.sleep(DRAIN_POLL)

    def used_index(self, queue: QueueConfig) -> int:
        """Where a back end that died without a word had come to, as the guest sees it."""
        return self._index(queue.used)

    def _index(self, ring_part: int) -> int:
        """`idx` of an available or used ring (virtio 1.2, 2.7.6, 2.7.8)."""
        return int.from_bytes(self._memory.read(ring_part + 2, 2), "little")

    # ---- its end ---------------------------------------------------------------------------

    def cut(self) -> None:
        """End the connection; the descriptor stays, as somebody may wait on it."""
        self._loop.remove(self._watched_fd)
        self._close_channel()
        self._frontend.connection.shutdown()

    def close(self) -> None:
        """Let go of the connection for good."""
        self._loop.remove(self._watched_fd)
        self._close_channel()
        self._frontend.close()

    def _close_channel(self) -> None:
        if self._channel is not None:
            self._loop.remove(self._channel.fileno())
            self._channel.close()
            self._channel = None

    # ---- callbacks on the main loop: no lock, no wait --------------------------------------

    def _hung_up(self, events: int) -> None:
        self._loop.remove(self._watched_fd)
        self.hung_up = True
        self._on_hang_up()

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
