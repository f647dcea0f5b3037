"""virtio-balloon over vhost-user: features and queues. The data plane is native
(native/balloon); the front end owns the config space, and so how large the balloon is to be."""

from __future__ import annotations

import posix as os

from shared.errors import check
from shared.virtio import balloon
from workers.ring_device import RingDevice, ffi, lib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


class News:
    """What came since it was asked for last.

    statistics: values by tag; None: none came.  error: why the host takes no pages; "": told
    already, or it does.
    """

    __slots__ = ("error", "statistics")

    def __init__(self, statistics: dict[int, int] | None, error: str) -> None:
        self.statistics = statistics
        self.error = error


class BalloonDevice(RingDevice):
    """One balloon.

    :param page: a statistics page in writable memory, or None.
    :param keep: nothing goes back to the host: the driver gets its answers, and that is all.
    """

    def __init__(self, queue_size: int, page: object | None, log: Callable[[str], None],
                 keep: bool = False) -> None:
        super().__init__("balloon", balloon.QUEUES, queue_size, page, log)
        error = ffi.new("int *")
        self.serve_with(lib.sv_balloon_create(keep, queue_size, self._counters, error), error[0])

    def features(self) -> int:
        """Everything that the data plane serves; the front end chooses."""
        return balloon.FEATURES

    def ask(self) -> None:
        """Ask the driver for statistics; they come as news.

        :raises SystemCallError: it has no queue for them, or hasn't started it.
        """
        check(lib.sv_balloon_ask(self.native), "The driver can't be asked for statistics")

    def news(self) -> News:
        """Take what came; `notify_fd` tells when there is any."""
        came = ffi.new("struct sv_balloon_news *")
        lib.sv_balloon_take(self.native, came)
        told = {tag: int(came.values[tag]) for tag in range(lib.SV_BALLOON_TAGS)
                if came.present & 1 << tag}
        return News(told if came.told else None, os.strerror(came.error) if came.error else "")
