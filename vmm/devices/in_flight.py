"""The record of requests in flight, read by the core: how many a dead worker left undone.

For reports only: whoever takes the rings over reads the record himself (native/virtq/inflight.c).
"""

from __future__ import annotations

import posix as os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from vmm.devices.vhost_session import Inflight

# vhost-user, "Inflight I/O tracking", split virtqueue: a header with `used_idx` at its end, then
# an entry for each descriptor that begins with `inflight`; each queue begins on a cache line.
_HEADER, _USED_INDEX, _ENTRY, _ALIGN = 16, 14, 16, 64


def undone_requests(record: Inflight | None, used: Mapping[int, int]) -> int:
    """How many requests the last worker took and did not give back.

    :param used: the used index of each started queue, as the guest sees it.
    :return: 0 without a record, or if it can't be read; what it says is not to be trusted.
    """
    if record is None:
        return 0
    layout, fd = record
    entries = _ENTRY * layout.queue_size
    size = (_HEADER + entries + _ALIGN - 1) & ~(_ALIGN - 1)
    total = 0
    for index, published in used.items():
        try:
            data = os.pread(fd, _HEADER + entries, layout.mmap_offset + index * size)
        except (OSError, OverflowError):  # the record may lie at the end of what files can hold
            return total
        taken = data[_HEADER::_ENTRY].count(1)
        recorded = int.from_bytes(data[_USED_INDEX:_HEADER], "little")
        # The last batch may be in the used ring already, and not yet be marked as done.
        total += max(0, taken - (published - recorded & 0xFFFF))
    return total
