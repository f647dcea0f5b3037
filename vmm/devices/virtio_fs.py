"""virtio-fs (virtio 1.2, 5.11) behind vhost-user: a folder of the host, served by virtiofsd.

The config space is the core's.  Not on offer: the notification queue, and the DAX window with the
requests that a back end makes for it, who gets no channel to make any.
"""

from __future__ import annotations

from shared.vhost_user import messages as m
from vmm.devices.vhost_user import VhostUserDevice

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm.event_loop import EventLoop
    from vmm.memory import GuestMemory

DEVICE_ID_FS = 26
TAG_SIZE = 36  # bytes of the field (5.11.4)
QUEUE_SIZE = 128  # what StratoVirt and QEMU give; Linux makes its largest request of it

# virtio 1.2, 6: INDIRECT_DESC, EVENT_IDX, VERSION_1; 5.11.3: not NOTIFICATION.
_FEATURES = 1 << 28 | 1 << 29 | 1 << 32


class VirtioFs(VhostUserDevice):
    """A shared folder: a queue for urgent requests, then those for all others.

    :param tag: what the guest mounts, 1 to 35 bytes of UTF-8.
    """

    device_id = DEVICE_ID_FS
    keeps_shown = True
    # Not CONFIG: see above. Nor INFLIGHT_SHMFD: nobody comes after a virtiofsd that died, which
    # alone knows what the guest's handles stand for.
    wanted_protocol = (m.PF_MQ | m.PF_REPLY_ACK | m.PF_CONFIGURE_MEM_SLOTS | m.PF_RESET_DEVICE
                       | m.PF_STATUS)
    queues_option = "num-request-queues"

    def __init__(self, id: str, socket_fd: int, memory: GuestMemory, loop: EventLoop, tag: str,
                 num_request_queues: int = 1, queue_size: int = QUEUE_SIZE) -> None:
        super().__init__(id, socket_fd, memory, loop, [queue_size] * (1 + num_request_queues),
                         _FEATURES, foreign=True)
        self._config = (tag.encode().ljust(TAG_SIZE, b"\0")
                        + num_request_queues.to_bytes(4, "little"))

    def read_config(self, offset: int, size: int) -> bytes:
        """See `VirtioDevice.read_config`: tag, le32 num_request_queues (5.11.4)."""
        return self._config[offset:offset + size].ljust(size, b"\0")
