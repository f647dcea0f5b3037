"""Devices that aren't there. A disk: every read and write is an I/O error, at once. A NIC: what is
sent is dropped, nothing is received, and what the driver sets is kept for whoever comes. A console:
what is written is dropped.

They are the blk worker's data plane on an image of no bytes, the net worker's on no tap and the
console worker's without a port, so that rings, requests in flight and hostile drivers are dealt
with by the same code.
"""

from __future__ import annotations

import posix as os

from shared.virtio import blk, console, net
from workers.balloon.device import BalloonDevice
from workers.blk.device import MAX_QUEUES, BlkDevice
from workers.blk.disk import Disk
from workers.console.device import ConsoleDevice
from workers.errors import UsageError
from workers.net.device import NetDevice

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

MAX_QUEUE_SIZE = 1024


class NullDisk(BlkDevice):
    """The disk of an empty slot.

    :param queues, queue_size: those of the device that was there, or will be.
    :param image: descriptor of an empty file; stays the caller's.
    """

    def __init__(self, queues: int, queue_size: int, image: int,
                 log: Callable[[str], None]) -> None:
        if not 1 <= queues <= MAX_QUEUES or not 2 <= queue_size <= MAX_QUEUE_SIZE:
            raise UsageError(f"A null back end with {queues} queues of {queue_size}",
                             f"1 to {MAX_QUEUES} of 2 to {MAX_QUEUE_SIZE}")
        super().__init__(Disk(image, False, False, "", small_blocks=True), queues, queue_size,
                         "threads", None, log, slot=True)

    def features(self) -> int:
        """Whatever a driver may have acknowledged to who was here before."""
        return blk.SLOT_BACKEND_FEATURES


class NullNic(NetDevice):
    """The NIC of an empty slot.

    :param pairs, queue_size: those of the device that was there, or will be.
    :param mac: what its driver was told.
    :param state: the slot's memory of its driver, writable.
    """

    def __init__(self, pairs: int, queue_size: int, mac: bytes, state: object,
                 log: Callable[[str], None]) -> None:
        if not 1 <= pairs <= net.MAX_PAIRS or not 2 <= queue_size <= MAX_QUEUE_SIZE:
            raise UsageError(f"A null back end with {pairs} queue pairs of {queue_size}",
                             f"1 to {net.MAX_PAIRS} of 2 to {MAX_QUEUE_SIZE}")
        super().__init__([-1] * pairs, True, queue_size, mac, ((0, 0), (0, 0)), None, state, log)

    def features(self) -> int:
        """Whatever a driver may have acknowledged to who was here before."""
        return net.SLOT_BACKEND_FEATURES


class NullConsole(ConsoleDevice):
    """The console device of a worker that was given up.

    :param max_ports, queue_size: those of the device that was there.
    :param state: its memory of the driver, writable.
    """

    def __init__(self, max_ports: int, queue_size: int, state: object,
                 log: Callable[[str], None]) -> None:
        if not 1 <= max_ports <= console.MAX_PORTS or not 2 <= queue_size <= MAX_QUEUE_SIZE:
            raise UsageError(f"A null back end with {max_ports} ports and queues of {queue_size}",
                             f"1 to {console.MAX_PORTS} of 2 to {MAX_QUEUE_SIZE}")
        super().__init__((), max_ports, queue_size, None, state, log)


class NullBalloon(BalloonDevice):
    """The balloon of a worker that was given up: nothing goes back to the host any more.

    :param queue_size: that of the device that was there.
    """

    def __init__(self, queue_size: int, log: Callable[[str], None]) -> None:
        if not 2 <= queue_size <= MAX_QUEUE_SIZE:
            raise UsageError(f"A null back end with queues of {queue_size}",
                             f"2 to {MAX_QUEUE_SIZE}")
        super().__init__(queue_size, None, log, keep=True)


def empty_image() -> int:
    """A file without a byte."""
    return os.memfd_create("no-disk", os.MFD_CLOEXEC)
