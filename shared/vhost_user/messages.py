"""Every vhost-user message: number, payload, descriptors, reply.

Source: QEMU, docs/interop/vhost-user.rst ("Front-end message types", "Back-end message
types").  Names and numbers are the specification's, with its prefix `VHOST_USER_` left out.
All numbers travel in the machine's byte order (x86_64, aarch64: little-endian).

Payload sizes are those of the C structures that all known peers use; where the text of the
specification and the structures differ the structure wins, and a comment says so.
"""

from __future__ import annotations

from _struct import Struct

from shared.memory_regions import MemoryRegion
from shared.vhost_user.errors import ProtocolError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

# ---- header --------------------------------------------------------------------------------

HEADER = Struct("=III")  # request, flags, size of the payload
VERSION = 1
VERSION_MASK = 0x3
FLAG_REPLY = 1 << 2
FLAG_NEED_REPLY = 1 << 3
MAX_PAYLOAD = 4096  # the largest known payload (a crypto session) is far below
MAX_FDS = 8

# ---- feature bits --------------------------------------------------------------------------

F_LOG_ALL = 1 << 26             # vhost: the back end can log dirty pages
F_PROTOCOL_FEATURES = 1 << 30   # a bit of GET_FEATURES, no virtio feature: never for a driver

PF_MQ = 1 << 0
PF_LOG_SHMFD = 1 << 1
PF_RARP = 1 << 2
PF_REPLY_ACK = 1 << 3
PF_MTU = 1 << 4
PF_BACKEND_REQ = 1 << 5
PF_CROSS_ENDIAN = 1 << 6
PF_CRYPTO_SESSION = 1 << 7
PF_PAGEFAULT = 1 << 8
PF_CONFIG = 1 << 9
PF_BACKEND_SEND_FD = 1 << 10
PF_HOST_NOTIFIER = 1 << 11
PF_INFLIGHT_SHMFD = 1 << 12
PF_RESET_DEVICE = 1 << 13
PF_INBAND_NOTIFICATIONS = 1 << 14
PF_CONFIGURE_MEM_SLOTS = 1 << 15
PF_STATUS = 1 << 16
PF_XEN_MMAP = 1 << 17
PF_SHARED_OBJECT = 1 << 18
PF_DEVICE_STATE = 1 << 19

# ---- payloads ------------------------------------------------------------------------------

NOTHING = 0
U64 = 1
VRING_STATE = 2
VRING_ADDR = 3
MEMORY_TABLE = 4
MEMORY_REGION = 5
LOG = 6
IOTLB = 7
CONFIG = 8
VRING_AREA = 9
INFLIGHT = 10
CRYPTO = 11
SHARED_OBJECT = 12
TRANSFER = 13
FD = 14  # a reply that is a descriptor with an empty payload

_U64 = Struct("=Q")
_VRING_STATE = Struct("=II")        # index, num
_VRING_ADDR = Struct("=IIQQQQ")     # index, flags, descriptor, used, available, log
_TABLE_HEAD = Struct("=II")         # num regions, padding
_REGION = Struct("=QQQQ")           # guest address, size, user address, mmap offset
_LOG = Struct("=QQ")                # size, offset
_CONFIG = Struct("=III")            # offset, size, flags
_INFLIGHT = Struct("=QQHH")         # mmap size, mmap offset, num queues, queue size

MAX_TABLE_REGIONS = 8
MAX_CONFIG = 256                    # VHOST_USER_MAX_CONFIG_SIZE of every known peer
CONFIG_HEAD = _CONFIG.size
# C pads the structure to 24 bytes and QEMU insists on it; some peers pack it to 20.
INFLIGHT_SIZE = 24
VRING_INDEX_MASK = 0xFF
VRING_NO_FD = 1 << 8
VRING_ADDR_LOG = 1 << 0             # VHOST_VRING_F_LOG

CONFIG_WRITABLE = 0                 # flags of SET_CONFIG
CONFIG_MIGRATION = 1

# Sizes allowed for each kind; None: variable, checked by its own decoder.
_SIZES: dict[int, tuple[int, ...] | None] = {
    NOTHING: (0,),
    U64: (8,),
    VRING_STATE: (8,),
    VRING_ADDR: (40,),
    MEMORY_TABLE: None,
    MEMORY_REGION: (40,),
    LOG: (8, 16),                   # a u64 where LOG_SHMFD was not negotiated
    IOTLB: (32,),
    CONFIG: None,
    VRING_AREA: (24,),
    INFLIGHT: (20, 24),
    CRYPTO: None,
    SHARED_OBJECT: (16,),
    TRANSFER: (8,),
    FD: (0,),
}

# ---- requests ------------------------------------------------------------------------------

GET_FEATURES = 1
SET_FEATURES = 2
SET_OWNER = 3
RESET_OWNER = 4
SET_MEM_TABLE = 5
SET_LOG_BASE = 6
SET_LOG_FD = 7
SET_VRING_NUM = 8
SET_VRING_ADDR = 9
SET_VRING_BASE = 10
GET_VRING_BASE = 11
SET_VRING_KICK = 12
SET_VRING_CALL = 13
SET_VRING_ERR = 14
GET_PROTOCOL_FEATURES = 15
SET_PROTOCOL_FEATURES = 16
GET_QUEUE_NUM = 17
SET_VRING_ENABLE = 18
SEND_RARP = 19
NET_SET_MTU = 20
SET_BACKEND_REQ_FD = 21
IOTLB_MSG = 22
SET_VRING_ENDIAN = 23
GET_CONFIG = 24
SET_CONFIG = 25
CREATE_CRYPTO_SESSION = 26
CLOSE_CRYPTO_SESSION = 27
POSTCOPY_ADVISE = 28
POSTCOPY_LISTEN = 29
POSTCOPY_END = 30
GET_INFLIGHT_FD = 31
SET_INFLIGHT_FD = 32
GPU_SET_SOCKET = 33
RESET_DEVICE = 34
VRING_KICK = 35
GET_MAX_MEM_SLOTS = 36
ADD_MEM_REG = 37
REM_MEM_REG = 38
SET_STATUS = 39
GET_STATUS = 40
GET_SHARED_OBJECT = 41
SET_DEVICE_STATE_FD = 42
CHECK_DEVICE_STATE = 43

BACKEND_IOTLB_MSG = 1
BACKEND_CONFIG_CHANGE_MSG = 2
BACKEND_VRING_HOST_NOTIFIER_MSG = 3
BACKEND_VRING_CALL = 4
BACKEND_VRING_ERR = 5
BACKEND_SHARED_OBJECT_ADD = 6
BACKEND_SHARED_OBJECT_REMOVE = 7
BACKEND_SHARED_OBJECT_LOOKUP = 8


class Request:
    """One row of the table.

    payload, reply: payload kinds (reply NOTHING: only an acknowledgement, if asked for);
    min_fds, max_fds: descriptors that travel with the request;
    feature: protocol feature bits without which the request is illegal, 0: always legal.
    """

    __slots__ = ("feature", "max_fds", "min_fds", "name", "number", "payload", "reply")

    def __init__(self, name: str, number: int, payload: int = NOTHING, reply: int = NOTHING,
                 feature: int = 0, fds: tuple[int, int] = (0, 0)) -> None:
        self.name = name
        self.number = number
        self.payload = payload
        self.reply = reply
        self.feature = feature
        self.min_fds, self.max_fds = fds

    def check(self, payload: bytes, fds: Sequence[int]) -> None:
        """Check size and number of descriptors of a received request.

        :raises ProtocolError: names the message and what is wrong with it.
        """
        check_size(self.name, self.payload, payload)
        if not self.min_fds <= len(fds) <= self.max_fds:
            wanted = (str(self.min_fds) if self.min_fds == self.max_fds
                      else f"{self.min_fds} to {self.max_fds}")
            raise ProtocolError(f"{self.name} came with {len(fds)} descriptors",
                                f"it takes {wanted}")


def check_size(name: str, kind: int, payload: bytes) -> None:
    """:raises ProtocolError: `payload` has not the size of its kind."""
    sizes = _SIZES[kind]
    if sizes is not None and len(payload) not in sizes:
        raise ProtocolError(f"{name} has a payload of {len(payload)} bytes",
                            f"it must have {' or '.join(str(s) for s in sizes)}")


_ONE = (1, 1)
_MAYBE = (0, 1)

_FRONTEND_TABLE = (
    Request("GET_FEATURES", GET_FEATURES, reply=U64),
    Request("SET_FEATURES", SET_FEATURES, U64),
    Request("SET_OWNER", SET_OWNER),
    Request("RESET_OWNER", RESET_OWNER),
    Request("SET_MEM_TABLE", SET_MEM_TABLE, MEMORY_TABLE, fds=(0, MAX_FDS)),
    Request("SET_LOG_BASE", SET_LOG_BASE, LOG, reply=U64, feature=PF_LOG_SHMFD, fds=_ONE),
    Request("SET_LOG_FD", SET_LOG_FD, fds=_ONE),
    Request("SET_VRING_NUM", SET_VRING_NUM, VRING_STATE),
    Request("SET_VRING_ADDR", SET_VRING_ADDR, VRING_ADDR),
    Request("SET_VRING_BASE", SET_VRING_BASE, VRING_STATE),
    Request("GET_VRING_BASE", GET_VRING_BASE, VRING_STATE, reply=VRING_STATE),
    Request("SET_VRING_KICK", SET_VRING_KICK, U64, fds=_MAYBE),
    Request("SET_VRING_CALL", SET_VRING_CALL, U64, fds=_MAYBE),
    Request("SET_VRING_ERR", SET_VRING_ERR, U64, fds=_MAYBE),
    Request("GET_PROTOCOL_FEATURES", GET_PROTOCOL_FEATURES, reply=U64),
    Request("SET_PROTOCOL_FEATURES", SET_PROTOCOL_FEATURES, U64),
    Request("GET_QUEUE_NUM", GET_QUEUE_NUM, reply=U64, feature=PF_MQ),
    Request("SET_VRING_ENABLE", SET_VRING_ENABLE, VRING_STATE),
    Request("SEND_RARP", SEND_RARP, U64, feature=PF_RARP),
    Request("NET_SET_MTU", NET_SET_MTU, U64, feature=PF_MTU),
    Request("SET_BACKEND_REQ_FD", SET_BACKEND_REQ_FD, feature=PF_BACKEND_REQ, fds=_ONE),
    Request("IOTLB_MSG", IOTLB_MSG, IOTLB, reply=U64),
    Request("SET_VRING_ENDIAN", SET_VRING_ENDIAN, VRING_STATE, feature=PF_CROSS_ENDIAN),
    Request("GET_CONFIG", GET_CONFIG, CONFIG, reply=CONFIG, feature=PF_CONFIG),
    Request("SET_CONFIG", SET_CONFIG, CONFIG, feature=PF_CONFIG),
    Request("CREATE_CRYPTO_SESSION", CREATE_CRYPTO_SESSION, CRYPTO, reply=CRYPTO,
            feature=PF_CRYPTO_SESSION),
    Request("CLOSE_CRYPTO_SESSION", CLOSE_CRYPTO_SESSION, U64, feature=PF_CRYPTO_SESSION),
    Request("POSTCOPY_ADVISE", POSTCOPY_ADVISE, reply=FD, feature=PF_PAGEFAULT),
    Request("POSTCOPY_LISTEN", POSTCOPY_LISTEN, feature=PF_PAGEFAULT),
    Request("POSTCOPY_END", POSTCOPY_END, reply=U64, feature=PF_PAGEFAULT),
    Request("GET_INFLIGHT_FD", GET_INFLIGHT_FD, INFLIGHT, reply=INFLIGHT,
            feature=PF_INFLIGHT_SHMFD),
    Request("SET_INFLIGHT_FD", SET_INFLIGHT_FD, INFLIGHT, feature=PF_INFLIGHT_SHMFD, fds=_ONE),
    Request("GPU_SET_SOCKET", GPU_SET_SOCKET, fds=_ONE),
    Request("RESET_DEVICE", RESET_DEVICE, feature=PF_RESET_DEVICE),
    Request("VRING_KICK", VRING_KICK, VRING_STATE, feature=PF_INBAND_NOTIFICATIONS),
    Request("GET_MAX_MEM_SLOTS", GET_MAX_MEM_SLOTS, reply=U64, feature=PF_CONFIGURE_MEM_SLOTS),
    Request("ADD_MEM_REG", ADD_MEM_REG, MEMORY_REGION, feature=PF_CONFIGURE_MEM_SLOTS, fds=_ONE),
    # "the back-end MAY accept messages with one file descriptor ... MUST close it"
    Request("REM_MEM_REG", REM_MEM_REG, MEMORY_REGION, feature=PF_CONFIGURE_MEM_SLOTS,
            fds=_MAYBE),
    Request("SET_STATUS", SET_STATUS, U64, feature=PF_STATUS),
    Request("GET_STATUS", GET_STATUS, reply=U64, feature=PF_STATUS),
    Request("GET_SHARED_OBJECT", GET_SHARED_OBJECT, SHARED_OBJECT, reply=FD,
            feature=PF_SHARED_OBJECT),
    Request("SET_DEVICE_STATE_FD", SET_DEVICE_STATE_FD, TRANSFER, reply=U64,
            feature=PF_DEVICE_STATE, fds=_ONE),
    Request("CHECK_DEVICE_STATE", CHECK_DEVICE_STATE, reply=U64, feature=PF_DEVICE_STATE),
)

_BACKEND_TABLE = (
    Request("BACKEND_IOTLB_MSG", BACKEND_IOTLB_MSG, IOTLB),
    Request("BACKEND_CONFIG_CHANGE_MSG", BACKEND_CONFIG_CHANGE_MSG, feature=PF_CONFIG),
    Request("BACKEND_VRING_HOST_NOTIFIER_MSG", BACKEND_VRING_HOST_NOTIFIER_MSG, VRING_AREA,
            feature=PF_HOST_NOTIFIER, fds=_MAYBE),
    Request("BACKEND_VRING_CALL", BACKEND_VRING_CALL, VRING_STATE,
            feature=PF_INBAND_NOTIFICATIONS),
    Request("BACKEND_VRING_ERR", BACKEND_VRING_ERR, VRING_STATE,
            feature=PF_INBAND_NOTIFICATIONS),
    Request("BACKEND_SHARED_OBJECT_ADD", BACKEND_SHARED_OBJECT_ADD, SHARED_OBJECT,
            feature=PF_SHARED_OBJECT),
    Request("BACKEND_SHARED_OBJECT_REMOVE", BACKEND_SHARED_OBJECT_REMOVE, SHARED_OBJECT,
            feature=PF_SHARED_OBJECT),
    Request("BACKEND_SHARED_OBJECT_LOOKUP", BACKEND_SHARED_OBJECT_LOOKUP, SHARED_OBJECT,
            reply=U64, feature=PF_SHARED_OBJECT),
)

FRONTEND_REQUESTS = {request.number: request for request in _FRONTEND_TABLE}
BACKEND_REQUESTS = {request.number: request for request in _BACKEND_TABLE}

# ---- encoding and decoding -----------------------------------------------------------------
# Decoders take a payload whose size `Request.check` has already accepted.


def encode_u64(value: int) -> bytes:
    """A 64-bit integer."""
    return _U64.pack(value)


def decode_u64(payload: bytes) -> int:
    """A 64-bit integer."""
    value: int = _U64.unpack(payload)[0]
    return value


def encode_vring_state(index: int, num: int) -> bytes:
    """Index of a vring and a number."""
    return _VRING_STATE.pack(index, num)


def decode_vring_state(payload: bytes) -> tuple[int, int]:
    """(index, num)."""
    index, num = _VRING_STATE.unpack(payload)
    return index, num


def encode_vring_addr(index: int, flags: int, desc: int, used: int, avail: int,
                      log: int = 0) -> bytes:
    """Where a vring lies, in the front end's user addresses; note the order desc, used, avail.

    The specification's table shows a `size` field; no implementation has it.
    """
    return _VRING_ADDR.pack(index, flags, desc, used, avail, log)


def decode_vring_addr(payload: bytes) -> tuple[int, int, int, int, int, int]:
    """(index, flags, desc, used, avail, log)."""
    index, flags, desc, used, avail, log = _VRING_ADDR.unpack(payload)
    return index, flags, desc, used, avail, log


def encode_memory_table(regions: Sequence[MemoryRegion]) -> bytes:
    """SET_MEM_TABLE: at most 8 regions, their descriptors travel in the same order."""
    return _TABLE_HEAD.pack(len(regions), 0) + b"".join(_pack_region(r) for r in regions)


def decode_memory_table(payload: bytes) -> list[MemoryRegion]:
    """:raises ProtocolError: more than 8 regions, or a size that doesn't match the count."""
    if len(payload) < _TABLE_HEAD.size:
        raise ProtocolError(f"SET_MEM_TABLE has a payload of {len(payload)} bytes",
                            "it must have 8 and 32 a region")
    count = _TABLE_HEAD.unpack_from(payload)[0]
    if count > MAX_TABLE_REGIONS:
        raise ProtocolError(f"SET_MEM_TABLE with {count} regions",
                            f"at most {MAX_TABLE_REGIONS} are allowed")
    if len(payload) != _TABLE_HEAD.size + count * _REGION.size:
        raise ProtocolError(f"SET_MEM_TABLE has {len(payload)} bytes for {count} regions",
                            "it must have 8 and 32 a region")
    return [_unpack_region(payload, _TABLE_HEAD.size + i * _REGION.size) for i in range(count)]


def encode_memory_region(region: MemoryRegion) -> bytes:
    """ADD_MEM_REG, REM_MEM_REG: 8 bytes of padding, then the region."""
    return bytes(8) + _pack_region(region)


def decode_memory_region(payload: bytes) -> MemoryRegion:
    """One region after 8 bytes of padding."""
    return _unpack_region(payload, 8)


def _pack_region(region: MemoryRegion) -> bytes:
    return _REGION.pack(region.guest_addr, region.size, region.user_addr, region.file_offset)


def _unpack_region(payload: bytes, offset: int) -> MemoryRegion:
    guest_addr, size, user_addr, file_offset = _REGION.unpack_from(payload, offset)
    return MemoryRegion(guest_addr, size, user_addr, file_offset)


def encode_config(offset: int, data: bytes, flags: int = CONFIG_WRITABLE) -> bytes:
    """GET_CONFIG (data: zeroes of the wanted size) and SET_CONFIG."""
    return _CONFIG.pack(offset, len(data), flags) + data


def decode_config(name: str, payload: bytes) -> tuple[int, bytes, int]:
    """(offset, data, flags).

    :raises ProtocolError: size and offset don't fit the payload or the 256 bytes there are.
    """
    if len(payload) < CONFIG_HEAD:
        raise ProtocolError(f"{name} has a payload of {len(payload)} bytes",
                            f"it must have at least {CONFIG_HEAD}")
    offset, size, flags = _CONFIG.unpack_from(payload)
    if size != len(payload) - CONFIG_HEAD:
        raise ProtocolError(f"{name} says {size} bytes and carries {len(payload) - CONFIG_HEAD}",
                            "both must agree")
    if size == 0 or offset + size > MAX_CONFIG:
        raise ProtocolError(f"{name} at offset {offset} with {size} bytes",
                            f"it must be within {MAX_CONFIG} bytes")
    return offset, payload[CONFIG_HEAD:], flags


class Inflight:
    """The shared buffer that tracks requests in flight: sizes and offset in bytes."""

    __slots__ = ("mmap_offset", "mmap_size", "queue_count", "queue_size")

    def __init__(self, mmap_size: int, mmap_offset: int, queue_count: int,
                 queue_size: int) -> None:
        self.mmap_size = mmap_size
        self.mmap_offset = mmap_offset
        self.queue_count = queue_count
        self.queue_size = queue_size


def encode_inflight(inflight: Inflight, size: int = INFLIGHT_SIZE) -> bytes:
    """GET_INFLIGHT_FD, SET_INFLIGHT_FD and the reply, padded to `size` (20 or 24)."""
    data = _INFLIGHT.pack(inflight.mmap_size, inflight.mmap_offset, inflight.queue_count,
                          inflight.queue_size)
    return data + bytes(size - len(data))


def decode_inflight(payload: bytes) -> Inflight:
    """The first 20 bytes; the rest is padding."""
    return Inflight(*_INFLIGHT.unpack_from(payload))


def encode_log(size: int, offset: int) -> bytes:
    """SET_LOG_BASE."""
    return _LOG.pack(size, offset)

