"""virtio-blk: feature bits and config space (virtio 1.2, 5.2.3 and 5.2.4). No behaviour."""

from __future__ import annotations

from _struct import Struct

from shared.virtio.features import F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1

DEVICE_ID = 2

F_SIZE_MAX = 1 << 1
F_SEG_MAX = 1 << 2
F_GEOMETRY = 1 << 4
F_RO = 1 << 5
F_BLK_SIZE = 1 << 6
F_FLUSH = 1 << 9
F_TOPOLOGY = 1 << 10
F_CONFIG_WCE = 1 << 11
F_MQ = 1 << 12
F_DISCARD = 1 << 13
F_WRITE_ZEROES = 1 << 14

SECTOR = 512
ID_BYTES = 20
CONFIG_SIZE = 60
WRITEBACK_OFFSET = 32  # the one byte that a driver may write, with CONFIG_WCE

# What native/blk/blk.h serves (SV_BLK_MAX_*; a test compares).
MAX_DATA_SEGMENTS = 126
MAX_SECTORS = 4194304  # of one discard or write-zeroes segment: 2 GiB
MAX_SEGMENTS = 16      # of one discard or write-zeroes request

# A slot of a microVM that disks come to and leave: the driver reads features once, so what is
# on offer is the same for every image and for none (ARCHITECTURE.md, "Empty slots are served").
SLOT_FEATURES = (F_SEG_MAX | F_BLK_SIZE | F_FLUSH | F_TOPOLOGY | F_CONFIG_WCE | F_DISCARD
                 | F_WRITE_ZEROES | F_INDIRECT_DESC | F_EVENT_IDX | F_VERSION_1)
# Who serves a slot takes as well what a driver may have acknowledged to those before: a
# read-only disk's, several queues' of the command line's disk.
SLOT_BACKEND_FEATURES = SLOT_FEATURES | F_RO | F_MQ
SLOT_QUEUES = 1
SLOT_QUEUE_SIZE = 256

# capacity, size_max, seg_max, cylinders, heads, sectors, blk_size, physical_block_exp,
# alignment_offset, min_io_size, opt_io_size, writeback, unused, num_queues,
# max_discard_sectors, max_discard_seg, discard_sector_alignment, max_write_zeroes_sectors,
# max_write_zeroes_seg, write_zeroes_may_unmap, unused
_CONFIG = Struct("<QIIHBBIBBHIBxHIIIIIB3x")
assert _CONFIG.size == CONFIG_SIZE


class BlkConfig:
    """The config space. Sizes are in the units of the specification, see 5.2.4."""

    __slots__ = ("alignment_offset", "blk_size", "capacity", "discard_sector_alignment",
                 "max_discard_sectors", "max_discard_segments", "max_write_zeroes_sectors",
                 "max_write_zeroes_segments", "min_io_size", "num_queues", "opt_io_size",
                 "physical_block_exp", "seg_max", "write_zeroes_may_unmap", "writeback")

    def __init__(self) -> None:
        self.capacity = 0
        self.seg_max = 0
        self.blk_size = SECTOR
        self.physical_block_exp = 0
        self.alignment_offset = 0
        self.min_io_size = 0
        self.opt_io_size = 0
        self.writeback = 1
        self.num_queues = 1
        self.max_discard_sectors = 0
        self.max_discard_segments = 0
        self.discard_sector_alignment = 0
        self.max_write_zeroes_sectors = 0
        self.max_write_zeroes_segments = 0
        self.write_zeroes_may_unmap = 0

    def encode(self) -> bytes:
        """The 60 bytes that a driver reads."""
        return _CONFIG.pack(
            self.capacity, 0, self.seg_max, 0, 0, 0, self.blk_size, self.physical_block_exp,
            self.alignment_offset, self.min_io_size, self.opt_io_size, self.writeback,
            self.num_queues, self.max_discard_sectors, self.max_discard_segments,
            self.discard_sector_alignment, self.max_write_zeroes_sectors,
            self.max_write_zeroes_segments, self.write_zeroes_may_unmap)


def slot_config(queues: int = SLOT_QUEUES, queue_size: int = SLOT_QUEUE_SIZE) -> BlkConfig:
    """The config space of an empty slot: no capacity, and every limit that a driver reads only
    when it probes as it will be with a disk."""
    config = BlkConfig()
    config.seg_max = max(1, min(MAX_DATA_SEGMENTS, queue_size - 2))
    config.physical_block_exp = 3
    config.num_queues = queues
    config.max_discard_sectors = config.max_write_zeroes_sectors = MAX_SECTORS
    config.max_discard_segments = config.max_write_zeroes_segments = MAX_SEGMENTS
    config.discard_sector_alignment = 8
    config.write_zeroes_may_unmap = 1
    return config
