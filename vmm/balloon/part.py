"""`-device virtio-balloon-device`."""

from __future__ import annotations

from shared.virtio import balloon
from vmm.devices.virtio_balloon import GuestStatistics, VirtioBalloon
from vmm.machine.part import Part
from vmm.worker.plain import PlainWorkers

TYPE_CHECKING = False  # importing typing would cost 10 ms of the start
if TYPE_CHECKING:
    from vmm.config.model import DeviceConfig
    from vmm.machine.part import Builder
    from vmm.worker.nursery import Nursery
    from vmm.worker.process import WorkerProcess


class BalloonWorkers(PlainWorkers):
    """The workers that serve the balloon, one after another.

    :param statistics: where what the guest tells of its memory goes to.
    """

    __slots__ = ("_statistics",)

    def __init__(self, nursery: Nursery, id: str, statistics: GuestStatistics) -> None:
        super().__init__(nursery, "balloon", id, {}, _options)
        self._statistics = statistics

    def spawn(self, opened: None, keep: bool = False) -> WorkerProcess:
        """See `PlainWorkers.spawn`."""
        worker = super().spawn(opened, keep)
        worker.on_report = self._statistics.receive
        return worker


def _options() -> dict[str, object]:
    return {"num-queues": balloon.QUEUES, "queue-size": balloon.QUEUE_SIZE}


class BalloonPart(Part):
    """The balloon."""

    def __init__(self, config: DeviceConfig, name: str) -> None:
        super().__init__(config, name)
        self._statistics = GuestStatistics()

    def start(self, builder: Builder) -> None:
        """See `Part.start`."""
        assert builder.nursery is not None  # every microvm has one
        self.start_worker(builder, BalloonWorkers(builder.nursery, self.name, self._statistics))

    def make(self, builder: Builder) -> VirtioBalloon:
        """See `Part.make`."""
        assert self.worker is not None
        options = self.config.options
        return VirtioBalloon(self.name, self.worker.take_socket(), builder.machine.memory,
                             builder.loop, self._statistics, options["deflate-on-oom"] == "on",
                             options["free-page-reporting"] == "on")
