"""The work of a worker on the engine for small devices, which has news now and then."""

from __future__ import annotations

import posix as os
import select

from workers.service import DeviceService

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Container

    from workers.nursery import Reporter
    from workers.ring_device import RingDevice


class RingService(DeviceService):
    """Serves one device; a kind adds the orders that it obeys and what it has to tell."""

    engine = "thread"
    device: RingDevice

    def __init__(self, kind: str, device: RingDevice, log: Callable[[str], None]) -> None:
        super().__init__(kind, device, log)
        self._notify = device.notify_fd

    def told(self, control: Reporter | None) -> None:
        """The native device has something to tell (sv_ring_notify)."""

    def watch(self, poll: select.poll) -> None:
        """Its notifications."""
        poll.register(self._notify, select.POLLIN)

    def attend(self, ready: Container[int], control: Reporter | None) -> None:
        """The notification is taken before the news: none is missed."""
        if self._notify in ready:
            os.eventfd_read(self._notify)
            self.told(control)
