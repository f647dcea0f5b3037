"""The balloon: how much memory the guest is to do with, has, and says that it uses."""

from __future__ import annotations

import time

from shared.errors import SharedError
from shared.virtio.balloon import STATISTICS
from vmm.qmp.errors import DeviceNotActive, QmpError
from vmm.qmp.registry import DEFERRED, Argument, Command

TYPE_CHECKING = False  # importing typing would cost 10 ms of the start
if TYPE_CHECKING:
    from vmm.devices.virtio_balloon import VirtioBalloon
    from vmm.machine.machine import Device
    from vmm.qmp.connection import Request

DRIVER = "virtio-balloon"  # with -device, later -pci
# Seconds for the guest's driver to tell its statistics, and between two attempts to ask for them
# while the worker that asks is replaced.
STATISTICS_LIMIT = 1.0
RETRY = 0.05


def _find(request: Request) -> Device:
    for device in request.vm.devices.values():
        if device.driver.startswith(DRIVER):
            return device
    raise _inactive()


def _inactive() -> DeviceNotActive:
    # Managers look for this text.
    return DeviceNotActive("No balloon device has been activated")


def _device(request: Request) -> VirtioBalloon:
    balloon: VirtioBalloon = _find(request).device  # type: ignore[assignment]
    return balloon


def _balloon(request: Request) -> object:
    """Answered at once: the guest takes its time, and the event tells how far it has come."""
    balloon = _device(request)
    if not balloon.is_in_use():
        raise _inactive()
    balloon.set_target(request.arguments["value"])
    request.reply({})
    request.vm.events.emit("BALLOON_CHANGED", {"actual": balloon.actual})
    return DEFERRED


def _query_balloon(request: Request) -> object:
    return {"actual": _device(request).actual}


class _Inquiry:
    """One `query-balloon-stats`: the worker asks the driver, nobody waits for either."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._device = _find(request)
        self._balloon = _device(request)
        self._serial = 0
        self._problem = "the guest's driver doesn't answer"
        loop = request.vm.loop
        self._deadline = loop.call_later(STATISTICS_LIMIT, self._answer)
        self._ask()

    def _ask(self) -> None:
        worker = self._device.worker
        if self._request.answered:
            return
        try:
            if worker is None or worker.state == "dead":
                raise QmpError("its worker is being replaced")
            self._serial = worker.orders.send("stats", self._told)
        except (QmpError, SharedError) as error:
            self._told(str(error))

    def _told(self, problem: str) -> None:
        """The worker's answer: the statistics have come before it."""
        self._serial = 0
        if not problem:
            self._answer()
        elif not self._request.answered:
            # The worker ended, or the queue is being started again; else the limit will tell.
            self._problem = problem
            self._request.vm.loop.call_later(RETRY, self._ask)

    def _answer(self) -> None:
        self._deadline.cancel()
        worker = self._device.worker
        if self._serial and worker is not None:
            worker.orders.forget(self._serial)
        if self._request.answered:
            return
        statistics = self._balloon.statistics
        if not statistics.told:
            self._request.fail(QmpError(f"The guest has told no statistics: {self._problem}",
                                        "its virtio-balloon driver must be up"))
            return
        age = int(1000 * (time.monotonic() - statistics.told))
        self._request.reply({"actual": self._balloon.actual, "target": self._balloon.target,
                             "age-ms": age, "stats": dict(statistics.values)})


def _query_statistics(request: Request) -> object:
    """Answered when the guest has told them, or with the last ones when it doesn't in time."""
    if not _device(request).is_in_use():
        raise _inactive()
    _Inquiry(request)
    return DEFERRED


TYPES: dict[str, dict[str, str] | tuple[str, ...]] = {
    "BalloonInfo": {"actual": "int"},
    "BalloonStatistics": {"actual": "int", "target": "int", "age-ms": "int",
                          "stats": "GuestMemoryStatistics"},
    "GuestMemoryStatistics": {f"{name}?": "int" for name in STATISTICS},
}

COMMANDS = (
    Command("balloon", _balloon, Argument("value", "int", low=0)),
    Command("query-balloon", _query_balloon, returns="BalloonInfo"),
    Command("query-balloon-stats", _query_statistics, returns="BalloonStatistics"),
)
