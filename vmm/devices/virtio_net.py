"""virtio-net (virtio 1.2, 5.1) behind vhost-user: the config space is the core's."""

from __future__ import annotations

from shared.virtio import net
from vmm.devices.slot_device import SlotDevice
from vmm.devices.virtio_device import QueueConfig, nothing, shown
from vmm.devices.worker_state import WorkerState

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vmm.event_loop import EventLoop
    from vmm.memory import GuestMemory

# What a foreign back end may carry. Its control queue stays out, and with it more than one queue
# pair: vhost-user has no message for what a driver says there.
_FOREIGN_FEATURES = net.BASE | net.UFO
_CORE_FEATURES = net.F_MAC | net.F_STATUS


class NicState(WorkerState):
    """What outlives a NIC's workers: what the driver has set over the control queue, and whether
    somebody has taken the link down (`set_link`)."""

    link_up: bool = shown()

    def __init__(self) -> None:
        super().__init__("net-state", net.STATE_BYTES)
        self.on_stale: Callable[[], None] = nothing
        self.link_up = True


class VirtioNet(SlotDevice):
    """One NIC.

    :param socket_fd: -1 makes the NIC of an empty slot, whose link is down.
    :param foreign: the back end is not a worker of ours: no control queue.
    :param pairs: queue pairs that the guest sees.
    :param mac: 6 bytes. :param mtu: that the driver is told, 0: none.
    :param state: what its first worker was given; owned from now on.

    is_present: a NIC is in the slot, and served; next_mac: that of the one which comes to it.

    As with disks a driver reads features, MAC address and MTU only when it probes: what is on
    offer never changes, and who serves the slot next honours it.  What the driver sets over the
    control queue is kept in memory that outlives workers (`nic_state`).
    """

    device_id = net.DEVICE_ID
    keeps_shown = True
    mac: bytes = shown()
    is_present: bool = shown()
    has_requests = False  # a receive buffer waits for a frame, for ever if none comes

    def __init__(self, id: str, socket_fd: int, memory: GuestMemory, loop: EventLoop,
                 foreign: bool, pairs: int = 1, queue_size: int = 256, mac: bytes = bytes(6),
                 mtu: int = 0, state: NicState | None = None) -> None:
        sizes = [queue_size] * 2 * pairs
        if not foreign:
            sizes.append(net.CONTROL_QUEUE_SIZE)
        self.pairs = pairs
        self.mac = self.next_mac = mac
        self.core_features = _CORE_FEATURES | (net.F_MTU if mtu else 0)
        self._mtu = mtu
        self._slot_features = 0 if foreign else net.slot_features(pairs)
        self.nic_state = state or NicState()
        self.nic_state.on_stale = self._state_changed
        self.is_present = socket_fd >= 0
        super().__init__(id, socket_fd, memory, loop, sizes,
                         _FOREIGN_FEATURES if foreign else self._slot_features, foreign)

    # ---- NICs come and go ------------------------------------------------------------------

    def show_empty(self) -> None:
        """See `SlotDevice.show_empty`: the link is down; that of the next NIC is up."""
        self.is_present = False
        self.nic_state.link_up = True

    def show_failed(self) -> None:
        """See `SlotDevice.show_failed`: the link is down, whatever `set_link` says."""
        self.is_present = False
        self.on_config_change()

    def show_nic(self) -> None:
        """A worker serves a NIC in this slot now; the guest is to be told."""
        self.mac = self.next_mac
        self.is_present = True

    def set_link(self, up: bool) -> None:
        """What the driver is told of the link; main loop."""
        self.nic_state.link_up = up
        self.on_config_change()

    def _state_changed(self) -> None:
        self.on_stale()  # that of the transport, which comes later

    @property
    def link_is_up(self) -> bool:
        """What the driver is told."""
        return self.is_present and self.nic_state.link_up

    def null_order(self) -> tuple[dict[str, object], list[int]]:
        """See `VirtioDevice.null_order`."""
        return {"device": "net", "queues": self.pairs, "queue-size": max(self.queue_sizes),
                "mac": self.mac}, [self.nic_state.fileno()]

    # ---- VirtioDevice ----------------------------------------------------------------------

    def features(self) -> int:
        """See `VirtioDevice.features`; waits for nobody but a foreign back end."""
        if self._slot_features:
            return self._slot_features | self.core_features
        return super().features()

    def activate(self, features: int, queues: Sequence[QueueConfig]) -> None:
        """See `VirtioDevice.activate`. The control queue is a worker's last ring, and follows the
        pairs that the driver may use: one, if it knows no MQ (5.1.2)."""
        if self._slot_features and not features & net.F_MQ:
            queues = [_renumbered(queue, 2 * self.pairs) if queue.index == 2 else queue
                      for queue in queues if queue.index <= 2]
        super().activate(features, queues)

    def read_config(self, offset: int, size: int) -> bytes:
        """See `VirtioDevice.read_config`."""
        status = net.STATUS_LINK_UP if self.link_is_up else 0
        config = net.encode_config(self.mac, status, self.pairs, self._mtu)
        return config[offset:offset + size].ljust(size, b"\0")

    def reset(self) -> None:
        """See `VirtioDevice.reset`: what the driver has set is forgotten too."""
        super().reset()
        self.nic_state.forget()

    def close(self) -> None:
        """See `VirtioDevice.close`."""
        super().close()
        self.nic_state.close()

    def _announced_queues(self) -> int:
        return self.pairs  # of a NIC back ends count pairs


def _renumbered(queue: QueueConfig, index: int) -> QueueConfig:
    other = QueueConfig(index, queue.size, queue.kick_fd, queue.call_fd)
    other.ready = queue.ready
    other.desc, other.avail, other.used = queue.desc, queue.avail, queue.used
    return other
