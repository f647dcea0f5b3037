"""virtio-console: numbers and config space (virtio 1.2, 5.3). No behaviour."""

from __future__ import annotations

from _struct import Struct

from shared.virtio.features import F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1

DEVICE_ID = 3
F_SIZE = 1 << 0
F_MULTIPORT = 1 << 1
FEATURES = F_SIZE | F_MULTIPORT | F_INDIRECT_DESC | F_EVENT_IDX | F_VERSION_1

MAX_PORTS = 31
MAX_NAME = 255        # bytes of a port's name
STATE_BYTES = 4096    # of what a worker leaves to its successor
PORT_QUEUE_SIZE = 128
CONTROL_QUEUE_SIZE = 32
CONTROL_QUEUES = (2, 3)  # to and from the driver

_CONFIG = Struct("<HHII")  # cols, rows, max_nr_ports, emerg_wr
CONFIG_SIZE = _CONFIG.size


def queue_count(max_ports: int) -> int:
    """A pair for each port, and the control queues."""
    return 2 * max_ports + 2


def encode_config(cols: int, rows: int, max_ports: int) -> bytes:
    """The config space that a driver reads. Nobody listens to emerg_wr."""
    return _CONFIG.pack(cols, rows, max_ports, 0)
