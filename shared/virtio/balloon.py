"""virtio-balloon: feature bits, queues and statistics (virtio 1.2, 5.5.2, 5.5.3, 5.5.6.4). No
behaviour."""

from __future__ import annotations

from shared.virtio.features import F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1

DEVICE_ID = 5

F_MUST_TELL_HOST = 1 << 0
F_STATS_VQ = 1 << 1
F_DEFLATE_ON_OOM = 1 << 2
F_PAGE_REPORTING = 1 << 5

# What the data plane serves.
FEATURES = (F_MUST_TELL_HOST | F_STATS_VQ | F_DEFLATE_ON_OOM | F_PAGE_REPORTING
            | F_INDIRECT_DESC | F_EVENT_IDX | F_VERSION_1)

PAGE_BITS = 12  # of the balloon's pages, whatever the guest's are

# Inflate, deflate, statistics; where the driver took reporting that follows without a gap, or is
# the fifth (native/balloon/balloon.h).
QUEUES = 5
QUEUES_WITHOUT_REPORTING = 3
QUEUE_SIZE = 128  # Linux has one chain in each at a time, of 32 buffers at most

# By tag: the specification's ten, then those of Linux 6.12.
STATISTICS = ("swap-in", "swap-out", "major-faults", "minor-faults", "free-memory",
              "total-memory", "available-memory", "disk-caches", "hugetlb-allocations",
              "hugetlb-failures", "oom-kills", "allocation-stalls", "async-scans",
              "direct-scans", "async-reclaims", "direct-reclaims")
