"""virtio-rng (virtio 1.2, 5.4) behind vhost-user."""

from __future__ import annotations

from shared.virtio import rng
from vmm.devices.vhost_user import VhostUserDevice

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm.event_loop import EventLoop
    from vmm.memory import GuestMemory

QUEUE_SIZE = 256


class VirtioRng(VhostUserDevice):
    """One source of random bytes, served by a worker of ours."""

    device_id = rng.DEVICE_ID
    keeps_shown = True

    def __init__(self, id: str, socket_fd: int, memory: GuestMemory, loop: EventLoop) -> None:
        super().__init__(id, socket_fd, memory, loop, [QUEUE_SIZE], rng.FEATURES, foreign=False)

    def features(self) -> int:
        """See `VirtioDevice.features`: every worker of ours has these, nobody is waited for."""
        return rng.FEATURES

    def read_config(self, offset: int, size: int) -> bytes:
        """There is no config space (5.4.4)."""
        return bytes(size)
