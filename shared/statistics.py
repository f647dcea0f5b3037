"""Statistics pages: what a worker counts, in shared memory with a name.

The core makes a page for each device (vmm/worker/pages.py), 0600; that device's worker alone
writes it, one after the other when it is replaced; `query-blockstats`, `query-workers` and
`stratoctl top` read it, and trust nothing in it.  They read it with `read`, never through a
mapping: a worker that makes the file shorter must not kill them with SIGBUS.

Layout, version 2, native byte order, all numbers unsigned:

    0    magic      8 bytes, "SVSTATS" and NUL
    8    version    u32
    12   header     u32, bytes before the first record
    16   kind       u32, KINDS
    20   queues     u32, records
    24   record     u32, bytes of one record
    28   buckets    u32, of one histogram
    32   core       u64, pid of the core, as it sees itself
    40   vm         108 bytes, name of the VM, UTF-8, NULs behind
    148  device     108 bytes, id of the device, the same
    256  starts     u64, workers that were asked for so far; the core's word, too
    320  records    one a queue: the kind's counters, u64 each, then its histograms

A histogram counts requests by the time from the moment at which the worker saw them to the
moment at which the driver could see that they were done: bucket 0 below 2 µs (2^11 ns), bucket
n from 2^(10+n) up to 2^(11+n) ns, the last one everything beyond.
"""

from __future__ import annotations

from _struct import Struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

MAGIC = b"SVSTATS\0"
VERSION = 2
HEADER_BYTES = 320
NAME_BYTES = 108
BUCKETS = 28
FIRST_BUCKET_BITS = 11  # bucket 0 ends at 2^11 ns
MAX_QUEUES = 64
FOLDER = "/dev/shm"     # where POSIX shared memory has its names (shm_overview(7))
PREFIX = "stratovirt."

_HEADER = Struct(f"=8s6IQ{NAME_BYTES}s{NAME_BYTES}sQ56x")
STARTS = Struct("=Q")
STARTS_AT = 256
assert _HEADER.size == HEADER_BYTES


class Record:
    """What a kind of worker counts for each of its queues: names, in the order of the page.

    A test compares with the C structure (native/blk/blk.h).
    """

    __slots__ = ("_format", "bytes", "counters", "histograms")

    def __init__(self, counters: Sequence[str], histograms: Sequence[str]) -> None:
        self.counters = tuple(counters)
        self.histograms = tuple(histograms)
        words = len(self.counters) + BUCKETS * len(self.histograms)
        self._format = Struct(f"={words}Q")
        self.bytes = (8 * words + 63) & ~63

    def decode(self, data: bytes, at: int) -> tuple[dict[str, int], dict[str, list[int]]]:
        """The counters and the histograms of the record at `at`, by name."""
        values = self._format.unpack_from(data, at)
        counters = dict(zip(self.counters, values, strict=False))
        first = len(self.counters)
        histograms = {name: list(values[first + BUCKETS * i:first + BUCKETS * (i + 1)])
                      for i, name in enumerate(self.histograms)}
        return counters, histograms


_BLK_TIMED = ("read", "write", "flush", "unmap")  # unmap: discard and write zeroes
# struct sv_ring_counters, with which the records of small devices begin (native/ring).
_RING = ("chains", "calls", "kicks", "broken")
KINDS = {"blk": 1, "net": 2, "rng": 3, "console": 4, "balloon": 5}
RECORDS = {
    # struct sv_blk_counters: requests by kind, bytes that were moved, requests that ended in an
    # error, ..., `failed_*` by the host, `invalid_*` by the driver's own mistake, `*_ns` the sum
    # of what the histograms sort.
    "blk": Record(("reads", "writes", "flushes", "discards", "write_zeroes", "others",
                   "read_bytes", "written_bytes", "unmapped_bytes", "errors", "inline_ops",
                   "bounced", "wakeups", "calls", "broken", "throttled",
                   *(f"failed_{name}" for name in _BLK_TIMED),
                   *(f"invalid_{name}" for name in _BLK_TIMED),
                   *(f"{name}_ns" for name in _BLK_TIMED)), _BLK_TIMED),
    # struct sv_net_counters: of a receive, transmit or control queue.
    "net": Record(("packets", "bytes", "dropped", "errors", "wakeups", "calls", "broken",
                   "commands"), ()),
    # struct sv_rng_counters.
    "rng": Record((*_RING, "bytes", "throttled", "starved", "errors"), ()),
    # struct sv_console_counters.
    "console": Record((*_RING, "bytes", "unheard", "waits", "errors"), ()),
    # struct sv_balloon_counters; pages are of 4 KiB.
    "balloon": Record((*_RING, "inflated_pages", "deflated_pages", "reported_pages",
                       "removed_bytes", "removals", "failed_bytes", "refused_pages", "reports"),
                      ()),
}


class Page:
    """One page as it was when it was read.

    starts: how many workers were asked for, so the restarts are one less.
    """

    __slots__ = ("core", "counters", "device", "histograms", "kind", "starts", "vm")

    def __init__(self, kind: str, core: int, vm: str, device: str, starts: int = 0) -> None:
        self.kind = kind
        self.core = core
        self.vm = vm
        self.device = device
        self.starts = starts
        self.counters: list[dict[str, int]] = []           # a queue
        self.histograms: list[dict[str, list[int]]] = []   # a queue


def page_bytes(kind: str, queues: int) -> int:
    """How long a page is."""
    return HEADER_BYTES + queues * RECORDS[kind].bytes


def encode_header(kind: str, queues: int, core: int, vm: str, device: str) -> bytes:
    """What the core writes before anybody else has the page."""
    return _HEADER.pack(MAGIC, VERSION, HEADER_BYTES, KINDS[kind], queues, RECORDS[kind].bytes,
                        BUCKETS, core, _text(vm), _text(device), 0)


def decode_page(data: bytes) -> Page | None:
    """What a page says; None if it is no page, of another version, or cut off."""
    if len(data) < HEADER_BYTES:
        return None
    magic, version, header, number, queues, record, buckets, core, vm, device, starts = (
        _HEADER.unpack_from(data))
    kind = next((name for name, value in KINDS.items() if value == number), "")
    if not kind or (magic, version, header, buckets) != (MAGIC, VERSION, HEADER_BYTES, BUCKETS):
        return None
    if record != RECORDS[kind].bytes or queues > MAX_QUEUES or len(data) < page_bytes(kind, queues):
        return None
    page = Page(kind, core, _name(vm), _name(device), starts)
    for queue in range(queues):
        counters, histograms = RECORDS[kind].decode(data, HEADER_BYTES + queue * record)
        page.counters.append(counters)
        page.histograms.append(histograms)
    return page


def bucket_range(bucket: int) -> tuple[int, int]:
    """Nanoseconds from and to (exclusive) that a bucket counts; the last has no end: 2^63."""
    low = 1 << (FIRST_BUCKET_BITS - 1 + bucket) if bucket else 0
    return low, 1 << 63 if bucket == BUCKETS - 1 else 1 << (FIRST_BUCKET_BITS + bucket)


def page_name(core: int, vm: str, device: str) -> str:
    """The name of a page below FOLDER: PREFIX, the core's pid, VM and device, in characters that
    need no quoting."""
    parts = ("".join(c if c.isascii() and (c.isalnum() or c in "-_") else "_" for c in text)[:80]
             for text in (vm, device))
    return f"{PREFIX}{core}.{'.'.join(parts)}"


def is_page_name(name: str) -> bool:
    """Whether a file below FOLDER can be one of ours."""
    return name.startswith(PREFIX) and "/" not in name and len(name) < 255


def _text(text: str) -> bytes:
    return text.encode("utf-8", "replace")[:NAME_BYTES - 1]


def _name(data: bytes) -> str:
    text = data.split(b"\0", 1)[0].decode("utf-8", "replace")
    return "".join(c if c.isprintable() else "?" for c in text)
