"""virtio-blk (virtio 1.2, 5.2) behind vhost-user: the config space comes from the back end."""

from __future__ import annotations

from shared.virtio import blk
from vmm.devices.slot_device import SlotDevice
from vmm.devices.virtio_device import shown

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm.event_loop import EventLoop
    from vmm.memory import GuestMemory

DEVICE_ID_BLOCK = 2

# virtio 1.2, 5.2.3: SIZE_MAX, SEG_MAX, GEOMETRY, RO, BLK_SIZE, FLUSH, TOPOLOGY, CONFIG_WCE, MQ,
# DISCARD, WRITE_ZEROES.
F_CONFIG_WCE = 1 << 11
F_MQ = 1 << 12
_BLOCK_FEATURES = (1 << 1 | 1 << 2 | 1 << 4 | 1 << 5 | 1 << 6 | 1 << 9 | 1 << 10 | F_CONFIG_WCE
                   | F_MQ | 1 << 13 | 1 << 14)
# virtio 1.2, 6: INDIRECT_DESC, EVENT_IDX, VERSION_1. Not RING_PACKED: stopping and starting
# rings again relies on split ones; not ACCESS_PLATFORM: there is no IOMMU.
_RING_FEATURES = 1 << 28 | 1 << 29 | 1 << 32

# virtio 1.2, 5.2.4: up to write_zeroes_may_unmap and its padding. No known back end has more,
# and some refuse to be asked for more.
CONFIG_SIZE = 60
_WRITEBACK = 32   # u8, the one writable field
_NUM_QUEUES = 34  # le16


class VirtioBlk(SlotDevice):
    """One disk. `num_queues` and `queue_size` are what the guest sees.

    :param socket_fd: -1 makes the disk of an empty slot.
    :param foreign: the back end is not a worker of ours.

    A driver reads features only when it probes.  So the disk of a slot that was empty then, or
    is now, offers what every slot offers, whoever serves it; only the config space changes.
    """

    device_id = DEVICE_ID_BLOCK
    keeps_shown = True
    _version: object = shown()  # another one when the back end may say something else
    _slot_features: int | None = shown()  # None: ask the back end
    _empty: bool = shown()

    def __init__(self, id: str, socket_fd: int, memory: GuestMemory, loop: EventLoop,
                 num_queues: int = 1, queue_size: int = 256, foreign: bool = True) -> None:
        mask = _BLOCK_FEATURES | _RING_FEATURES
        if num_queues == 1:
            mask &= ~F_MQ
        super().__init__(id, socket_fd, memory, loop, [queue_size] * num_queues, mask,
                         foreign)
        self._version = object()
        self._slot_features = None
        self._empty = False
        self._writeback: bytes | None = None  # as the driver set it since the last reset
        self._answer: tuple[object, bytes] | None = None  # the back end's, to which version
        if socket_fd < 0:
            self.show_empty()

    # ---- disks come and go -----------------------------------------------------------------

    def show_empty(self) -> None:
        """There is no disk: no capacity, everything else as it will be with one."""
        self._set_slot_features(readonly=False)
        self._empty = True
        self._version = object()

    def show_disk(self, readonly: bool) -> None:
        """A worker serves a disk in this slot now; the guest is to be told."""
        self._set_slot_features(readonly)
        self._version = object()
        self._empty = False

    def _set_slot_features(self, readonly: bool) -> None:
        features = blk.SLOT_FEATURES | (blk.F_RO if readonly else 0)
        self._slot_features = features | (F_MQ if len(self.queue_sizes) > 1 else 0)

    def prefetch_config(self) -> None:
        """See `SlotDevice.prefetch_config`."""
        self.read_config(0, CONFIG_SIZE)

    def null_order(self) -> tuple[dict[str, object], list[int]]:
        """See `VirtioDevice.null_order`."""
        return {"device": "blk", "queues": len(self.queue_sizes),
                "queue-size": max(self.queue_sizes)}, []

    def features(self) -> int:
        """See `VirtioDevice.features`."""
        return super().features() if self._slot_features is None else self._slot_features

    def read_config(self, offset: int, size: int) -> bytes:
        """See `VirtioDevice.read_config`; the back end is asked once a change."""
        if self._empty:
            config = blk.slot_config(len(self.queue_sizes), max(self.queue_sizes)).encode()
        else:
            config = self._disk_config()
        return config[offset:offset + size].ljust(size, b"\0")

    def _disk_config(self) -> bytes:
        version, answer = self._version, self._answer
        if answer is None or answer[0] is not version:
            # Should there be another version when the answer comes, then it is of no use.
            answer = version, self._with_queues(self._fetch_config(0, CONFIG_SIZE))
            self._answer = answer
        return answer[1]

    def write_config(self, offset: int, data: bytes) -> None:
        """The write-back switch, if the driver took CONFIG_WCE; the rest is read-only."""
        if self._empty:
            return
        if offset == _WRITEBACK and len(data) == 1 and self._features & F_CONFIG_WCE:
            if self.is_in_use():
                self._writeback = data
            try:
                self._forward_config(offset, data)
            finally:
                self._version = object()

    def _written_config(self) -> tuple[int, bytes] | None:
        # SET_FEATURES may turn write-back on again, and the next worker begins with it: a driver
        # that has turned it off flushes nothing.
        if self._writeback is None or self._empty:
            return None
        return _WRITEBACK, self._writeback

    def reset(self) -> None:
        """See `VirtioDevice.reset`."""
        super().reset()
        self._writeback = None  # virtio 1.2, 5.2.5.2

    def _with_queues(self, config: bytes) -> bytes:
        # The back end may have more queues than the guest is given.
        count = len(self.queue_sizes).to_bytes(2, "little")
        return config[:_NUM_QUEUES] + count + config[_NUM_QUEUES + 2:]

    def _config_went_stale(self) -> None:
        if self._empty:
            return
        self._version = object()
        super()._config_went_stale()
