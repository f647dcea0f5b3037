"""A balloon worker that the nursery cloned: what it is given, and its life."""

from __future__ import annotations

from shared.virtio import balloon
from workers.balloon.device import BalloonDevice
from workers.errors import UsageError
from workers.ring_service import RingService
from workers.service import LATER, descriptors, integer, map_page

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from workers.nursery import Reporter

MAX_WAITING = 64  # orders for statistics at a time


class Service(RingService):
    """Everything that exists before the first byte of the front end is read.

    :param page: descriptor of the device's statistics page (shared/statistics.py), or None.
    :raises WorkerError, SharedError: an option does not hold, or there are no descriptors.
    """

    device: BalloonDevice

    def __init__(self, options: Mapping[str, object], page: int | None,
                 log: Callable[[str], None]) -> None:
        integer("balloon", options, "num-queues", 0, balloon.QUEUES, balloon.QUEUES)
        size = integer("balloon", options, "queue-size", balloon.QUEUE_SIZE, 2, 1024)
        memory = map_page("balloon", balloon.QUEUES, page)
        super().__init__("balloon", BalloonDevice(size, memory, log), log)
        self._waiting: list[object] = []  # serials of orders for statistics

    def obey(self, order: Mapping[str, object]) -> object:
        """"stats": ask the guest's driver; answered when it has told."""
        if order.get("type") != "stats":
            return super().obey(order)
        if len(self._waiting) >= MAX_WAITING:
            raise UsageError("The guest's driver doesn't answer")
        self.device.ask()
        self._waiting.append(order.get("serial"))
        return LATER

    def told(self, control: Reporter | None) -> None:
        """Statistics have come, or the host refuses pages."""
        news = self.device.news()
        if news.error:
            self._log(f"The host does not take the guest's pages: {news.error}")
        if news.statistics is None or control is None:
            return
        values = [number for pair in news.statistics.items() for number in pair]
        control.tell("stats", values=values)
        for serial in self._waiting:
            control.tell("done", serial=serial)
        self._waiting = []


def run(device: str, fds: dict[str, int], options: dict[str, object], reporter: Reporter) -> None:
    """Serve one device until the core closes the vhost-user connection.

    :param fds: vhost (the connected socket), and statistics if the core wants them.
    :raises StratovirtError: what the core is told as the reason of the end.
    """
    [vhost] = descriptors("balloon", fds, "vhost")
    service = Service(options, fds.get("statistics"), reporter.log)
    service.run(f"sv-balloon-{device}", vhost, reporter)
