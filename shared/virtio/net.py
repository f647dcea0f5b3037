"""virtio-net: feature bits and config space (virtio 1.2, 5.1.3 and 5.1.4). No behaviour."""

from __future__ import annotations

from _struct import Struct

from shared.virtio.features import F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1

DEVICE_ID = 1

F_CSUM = 1 << 0
F_GUEST_CSUM = 1 << 1
F_CTRL_GUEST_OFFLOADS = 1 << 2
F_MTU = 1 << 3
F_MAC = 1 << 5
F_GUEST_TSO4 = 1 << 7
F_GUEST_TSO6 = 1 << 8
F_GUEST_ECN = 1 << 9
F_GUEST_UFO = 1 << 10
F_HOST_TSO4 = 1 << 11
F_HOST_TSO6 = 1 << 12
F_HOST_ECN = 1 << 13
F_HOST_UFO = 1 << 14
F_MRG_RXBUF = 1 << 15
F_STATUS = 1 << 16
F_CTRL_VQ = 1 << 17
F_CTRL_RX = 1 << 18
F_CTRL_VLAN = 1 << 19
F_CTRL_RX_EXTRA = 1 << 20
F_GUEST_ANNOUNCE = 1 << 21
F_MQ = 1 << 22
F_CTRL_MAC_ADDR = 1 << 23

# What the data plane carries for any front end.
OFFLOADS = (F_CSUM | F_GUEST_CSUM | F_GUEST_TSO4 | F_GUEST_TSO6 | F_GUEST_ECN | F_HOST_TSO4
            | F_HOST_TSO6 | F_HOST_ECN)
UFO = F_GUEST_UFO | F_HOST_UFO  # kernels from 4.14 on may refuse it
BASE = OFFLOADS | F_MRG_RXBUF | F_INDIRECT_DESC | F_EVENT_IDX | F_VERSION_1
# With a control queue.
CONTROL = (F_CTRL_VQ | F_CTRL_RX | F_CTRL_RX_EXTRA | F_CTRL_VLAN | F_CTRL_MAC_ADDR
           | F_CTRL_GUEST_OFFLOADS | F_GUEST_ANNOUNCE)

# A slot of a microVM that NICs come to and leave: the driver reads features once, so what is on
# offer is the same for every tap and for none (ARCHITECTURE.md, "Empty slots are served").
SLOT_BACKEND_FEATURES = BASE | CONTROL | F_MQ
CONTROL_QUEUE_SIZE = 64
# A file for what a driver has set over the control queue (struct sv_net_state; a test compares).
STATE_BYTES = 4096

HEADER_BYTES = 12  # 5.1.6, in front of each frame

STATUS_LINK_UP = 1
STATUS_ANNOUNCE = 2

MAX_PAIRS = 16
MIN_MTU, MAX_MTU = 68, 65535  # 5.1.4.1

# mac, status, max_virtqueue_pairs, mtu
_CONFIG = Struct("<6sHHH")
CONFIG_SIZE = _CONFIG.size


def encode_config(mac: bytes, status: int, pairs: int, mtu: int) -> bytes:
    """The config space that a driver reads."""
    return _CONFIG.pack(mac, status, pairs, mtu)


def slot_features(pairs: int) -> int:
    """What a slot's NIC with that many queue pairs offers, beside what the core itself serves."""
    return BASE | CONTROL | (F_MQ if pairs > 1 else 0)
