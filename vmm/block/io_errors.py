"""BLOCK_IO_ERROR: the host failed a guest's request; the guest was told, the VM goes on."""

from __future__ import annotations

import errno
import os
import time

from shared import log

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from vmm.block.family import BlockNode
    from vmm.qmp.events import Events
    from vmm.worker.process import WorkerProcess

# A worker reports once a second for each operation; nobody relies on that.
WINDOW = 0.9
_OPERATIONS = {"read": "read", "write": "write", "flush": "write", "discard": "write",
               "write-zeroes": "write"}


class IoErrors:
    """Turns a worker's reports into events, at most one a WINDOW for each device and operation.

    :param blocks: the VM's block back ends, by node name.
    """

    def __init__(self, events: Events, blocks: Mapping[str, BlockNode]) -> None:
        self._events = events
        self._blocks = blocks
        self._last: dict[tuple[str, str], float] = {}

    def report(self, worker: WorkerProcess, message: Mapping[str, object]) -> None:
        """`io-error` of a worker: every field is checked, what makes no sense is dropped."""
        operation, number = message.get("operation"), message.get("errno")
        if not isinstance(operation, str) or operation not in _OPERATIONS:
            return
        if not isinstance(number, int) or not 0 < number < 4096:
            number = errno.EIO
        key, now = (worker.device, operation), time.monotonic()
        if now - self._last.get(key, -WINDOW) < WINDOW:
            return
        self._last[key] = now
        reason = ("the image has become shorter" if number == errno.ENODATA
                  else os.strerror(number))
        count = message.get("count")
        times = f" ({count} times)" if isinstance(count, int) and count > 1 else ""
        log.error(f"Device '{worker.device}': {operation} failed{times}: {reason}")
        data: dict[str, object] = {"device": worker.device}
        for name, node in self._blocks.items():
            if node.device_id == worker.device:
                data["node-name"] = name
        data |= {"operation": _OPERATIONS[operation], "action": "report",
                 "nospace": number == errno.ENOSPC, "reason": reason}
        self._events.emit("BLOCK_IO_ERROR", data)
