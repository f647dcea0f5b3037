"""Feature bits that every virtio device may have (virtio 1.2, 6)."""

from __future__ import annotations

F_INDIRECT_DESC = 1 << 28
F_EVENT_IDX = 1 << 29
F_VERSION_1 = 1 << 32
