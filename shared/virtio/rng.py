"""virtio-rng: numbers (virtio 1.2, 5.4). No behaviour."""

from __future__ import annotations

from shared.virtio.features import F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1

DEVICE_ID = 4
FEATURES = F_INDIRECT_DESC | F_EVENT_IDX | F_VERSION_1
