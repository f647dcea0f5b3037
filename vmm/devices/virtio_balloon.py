"""virtio-balloon (virtio 1.2, 5.5) behind vhost-user: the config space is the core's.

The core says how many pages it wants (`num_pages`), the driver how many it gave (`actual`); the
worker serves the queues and knows neither.  Sizes are bytes of guest memory, pages of 4 KiB.
"""

from __future__ import annotations

import time

from shared.virtio import balloon
from shared.virtio.features import F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1
from vmm.devices.vhost_user import VhostUserDevice
from vmm.devices.virtio_device import shown

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from vmm.event_loop import EventLoop
    from vmm.memory import GuestMemory

_RING_FEATURES = F_INDIRECT_DESC | F_EVENT_IDX | F_VERSION_1
_MOST_PAGES = (1 << 32) - 1
# 5.5.4: le32 num_pages, le32 actual.
_ACTUAL, _END = 4, 8
# Seconds between two events: a driver writes `actual` after every 1 MiB.
CHANGE_INTERVAL = 1.0
_LARGEST = (1 << 64) - 1


class GuestStatistics:
    """What the guest's driver told last of its memory; the worker passes it on.

    values: by name (shared/virtio/balloon.py); told: monotonic seconds, 0 if it never was.
    """

    __slots__ = ("told", "values")

    def __init__(self) -> None:
        self.values: dict[str, int] = {}
        self.told = 0.0

    def receive(self, message: Mapping[str, object]) -> None:
        """The worker's report "stats": tags and values in turn. What is none of that is left
        out, as nobody trusts a worker."""
        numbers = message.get("values")
        if message.get("type") != "stats" or not isinstance(numbers, list):
            return
        values: dict[str, int] = {}
        for tag, value in zip(numbers[::2], numbers[1::2], strict=False):
            if (isinstance(tag, int) and 0 <= tag < len(balloon.STATISTICS)
                    and isinstance(value, int) and 0 <= value <= _LARGEST):
                values[balloon.STATISTICS[tag]] = value
        self.values = values
        self.told = time.monotonic()

    def forget(self) -> None:
        """Another driver comes."""
        self.values = {}
        self.told = 0.0


class VirtioBalloon(VhostUserDevice):
    """The balloon of a VM.

    :param statistics: where the worker's reports come to.
    :param deflate_on_oom: the driver may take pages back when the guest is out of memory.
    :param free_page_reporting: the driver tells which pages are free, whatever the target is.

    BALLOON_CHANGED tells when the driver has changed `actual`: at most once in CHANGE_INTERVAL
    seconds, and after its last change.
    """

    device_id = balloon.DEVICE_ID
    keeps_shown = True
    _num_pages: int = shown()
    _actual: int = shown()
    # Linux waits for each answer without a limit: the page that it gives, or what it needs most
    # when it is out of memory, would never come.
    has_null = True

    def __init__(self, id: str, socket_fd: int, memory: GuestMemory, loop: EventLoop,
                 statistics: GuestStatistics, deflate_on_oom: bool = False,
                 free_page_reporting: bool = False) -> None:
        mask = _RING_FEATURES | balloon.F_STATS_VQ
        if deflate_on_oom:
            mask |= balloon.F_DEFLATE_ON_OOM
        if free_page_reporting:
            mask |= balloon.F_PAGE_REPORTING
        if memory.page_size > 1 << balloon.PAGE_BITS:
            # Else no huge page could ever be given back (workers/balloon/README.md).
            mask |= balloon.F_MUST_TELL_HOST
        queues = balloon.QUEUES if free_page_reporting else balloon.QUEUES_WITHOUT_REPORTING
        super().__init__(id, socket_fd, memory, loop, [balloon.QUEUE_SIZE] * queues, mask,
                         foreign=False)
        self.statistics = statistics
        self._num_pages = 0
        self._actual = 0
        self._change_pending = False

    # ---- what the host wants and has -------------------------------------------------------

    def set_target(self, size: int) -> None:
        """Ask the guest to do with `size` bytes of its memory; as much as it has, at most.

        Main loop; never waits.  What the driver does about it is its affair.
        """
        memory = self._memory.size
        wanted = (memory >> balloon.PAGE_BITS) - (min(size, memory) >> balloon.PAGE_BITS)
        self._num_pages = min(wanted, _MOST_PAGES)
        self._hold_huge_pages()
        self.on_config_change()

    @property
    def target(self) -> int:
        """What the guest was asked to do with."""
        return self._memory.size - (self._num_pages << balloon.PAGE_BITS)

    @property
    def actual(self) -> int:
        """What the guest has, as its driver says."""
        return max(0, self._memory.size - (self._actual << balloon.PAGE_BITS))

    # ---- config space ----------------------------------------------------------------------

    def read_config(self, offset: int, size: int) -> bytes:
        """See `VirtioDevice.read_config`."""
        config = self._num_pages.to_bytes(4, "little") + self._actual.to_bytes(4, "little")
        return config[offset:offset + size].ljust(size, b"\0")

    def write_config(self, offset: int, data: bytes) -> None:
        """`actual`, as a whole or in pieces, from a driver that is up; the rest is read-only."""
        begin, end = max(offset, _ACTUAL), min(offset + len(data), _END)
        if begin >= end or not self.is_in_use():
            return
        actual = bytearray(self._actual.to_bytes(4, "little"))
        actual[begin - _ACTUAL:end - _ACTUAL] = data[begin - offset:end - offset]
        self._set_actual(int.from_bytes(actual, "little"))

    def reset(self) -> None:
        """See `VhostUserDevice.reset`: the driver's balloon is gone with it, and nothing need be
        done for its pages: who touches one has it again.  The target stays, for the next driver.
        """
        super().reset()
        self.statistics.forget()
        self._set_actual(0)

    def null_order(self) -> tuple[dict[str, object], list[int]]:
        """See `VirtioDevice.null_order`."""
        return {"device": "balloon", "queues": len(self.queue_sizes),
                "queue-size": balloon.QUEUE_SIZE}, []

    def _set_actual(self, pages: int) -> None:
        # On any thread: the one that finds no call pending asks for one, which finds this value.
        if pages == self._actual:
            return
        self._actual = pages
        self._hold_huge_pages()
        if not self._change_pending:
            self._change_pending = True
            self._loop.call_soon(self._begin_interval)

    def _hold_huge_pages(self) -> None:
        self._memory.hold_huge_pages(self._num_pages > 0 or self._actual > 0)

    def _begin_interval(self) -> None:
        self._loop.call_later(CHANGE_INTERVAL, self._changed)

    def _changed(self) -> None:
        self._change_pending = False
        self.on_event("BALLOON_CHANGED", {"actual": self.actual})
