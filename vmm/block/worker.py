"""What a blk worker is given: its own description of the image, and its options."""

from __future__ import annotations

import posix as os
import time

from shared import log
from shared.fds import close_all
from vmm.block.image import hold_incarnation, lock_incarnation
from vmm.errors import DeviceError

TYPE_CHECKING = False  # importing typing would cost 10 ms of the start
if TYPE_CHECKING:
    from collections.abc import Mapping

    from vmm.block.family import BlockNode
    from vmm.worker.nursery import Nursery
    from vmm.worker.process import WorkerProcess

# How often to look whether the old I/O has ended: after an eighth of the time that it took so far,
# so that looking makes no wait much longer. The kernel lets go of a dead ring's files some
# milliseconds after its process, also where the disk has nothing to do any more.
_POLL_FIRST, _POLL_MOST, _POLL_SHARE = 0.0005, 0.02, 0.125
# A start waits so long for the I/O of somebody who has ended; a recovery waits for ever.
START_LIMIT = 10.0
_COMPLAIN_AFTER = 5.0


class BlockWorkers:
    """The workers that serve one disk, one after another (`Kind` of vmm/worker/supervisor.py)."""

    __slots__ = ("_device", "_node", "_nursery", "_options", "_slot")

    def __init__(self, nursery: Nursery, node: BlockNode, device: str,
                 options: Mapping[str, str], slot: bool = False) -> None:
        self._slot = slot
        self._nursery = nursery
        self._node = node
        self._device = device
        self._options = options

    def open(self, drained: bool, limit: float | None = None) -> int:
        """The image for the next incarnation; waits for the I/O of the one before, at most
        `limit` seconds."""
        deadline = None if limit is None else time.monotonic() + limit
        return open_incarnation(self._node, deadline, drained)

    def reopen(self) -> int:
        """The same at once: `settle` has to come before the incarnation's first request."""
        return self._node.image.reopen()

    def settle(self, opened: int) -> None:
        """Wait for the I/O of the incarnation before. The lock belongs to the description, so
        the worker that was given it holds it too."""
        await_incarnation(self._node, opened, None)

    def discard(self, opened: int) -> None:
        """It won't be needed any more."""
        close_all((opened,))

    def spawn(self, opened: int, keep: bool = False) -> WorkerProcess:
        """See `spawn_block_worker`; `keep`: the descriptor stays open, and the caller's."""
        return spawn_block_worker(self._nursery, self._node, self._device, self._options, opened,
                                  self._slot, keep)

    def first(self) -> WorkerProcess:
        """The first one, at the start of the VM."""
        return self.spawn(open_incarnation(self._node, time.monotonic() + START_LIMIT))


def open_incarnation(node: BlockNode, deadline: float | None, drained: bool = False) -> int:
    """A descriptor of the image for the next incarnation of its worker.

    May wait: the I/O of the one before may still be under way though its process is gone.

    :param deadline: monotonic seconds; None: for as long as it takes.
    :param drained: the one before lives and will have finished when the next one starts.
    :raises VmmError: the image can't be opened any more, or it is still in use by `deadline`.
    """
    fd = node.image.reopen()
    try:
        if drained:
            hold_incarnation(fd, node.image.incarnation)
        else:
            await_incarnation(node, fd, deadline)
    except BaseException:
        os.close(fd)
        raise
    return fd


def await_incarnation(node: BlockNode, fd: int, deadline: float | None) -> None:
    """Wait until the I/O of the incarnation before has ended and this one holds the lock.

    :param deadline: monotonic seconds; None: for as long as it takes.
    :raises VmmError: the image is still in use by `deadline`.
    """
    began, complained = time.monotonic(), False
    while not lock_incarnation(fd, node.image.incarnation):
        now = time.monotonic()
        if deadline is not None and now > deadline:
            raise DeviceError(f"I/O on {node.image.path} by a process that has ended is still "
                              "under way", "wait until its disk has answered")
        if not complained and now - began > _COMPLAIN_AFTER:
            complained = True
            log.warning(f"{node.image.path}: still waiting for the I/O of the last worker")
        time.sleep(max(_POLL_FIRST, min(_POLL_SHARE * (now - began), _POLL_MOST)))


def spawn_block_worker(nursery: Nursery, node: BlockNode, device: str,
                       options: Mapping[str, str], fd: int, slot: bool = False,
                       keep: bool = False) -> WorkerProcess:
    """Ask the nursery for the worker of a disk; returns at once.

    :param device: the device's name; options: those of `-device`, as text.
    :param slot: it comes to a slot whose driver may be up: it offers what every slot offers.
    :param fd: of `open_incarnation`; closed when this returns, also in error, unless `keep`.
    :raises WorkerSpawnError: no nursery, or no descriptors.
    """
    drive = node.config
    try:
        return nursery.spawn("blk", device, {"image": fd}, {
            "readonly": drive.readonly, "direct": drive.direct, "aio": drive.aio,
            "discard": drive.discard, "detect-zeroes": drive.detect_zeroes,
            "throttling": drive.throttling, "serial": options.get("serial", ""),
            "num-queues": int(options.get("num-queues", "1"), 0),
            "queue-size": int(options.get("queue-size", "256"), 0), "slot": slot})
    finally:
        # A description that the core kept would keep the incarnation's lock.
        if not keep:
            close_all((fd,))
