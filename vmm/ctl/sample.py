"""Figures of running VMs from their statistics pages and /proc: no question to any VM.

Nothing in a page is believed: its worker may have been taken over. A page counts only if its
file belongs to the user of the process that it names, so that nobody can invent a VM of
somebody else's; numbers that go backwards are taken as no news.
"""

from __future__ import annotations

import os
import stat
import time

from shared import statistics
from vmm.ctl import processes

_PAGE_LIMIT = 1 << 20  # bytes; 64 queues of any kind are far below
_LARGEST = 1 << 63


class Sample:
    """All pages and processes at one moment.

    when: seconds, monotonic. pages: by pid of the core and device. usage: by pid.
    """

    __slots__ = ("pages", "usage", "when")

    def __init__(self, pids: set[int] | None) -> None:
        """:param pids: cores that are of interest; None: all that have pages."""
        self.when = time.monotonic()
        self.pages = {(page.core, page.device): page for page in read_pages()
                      if pids is None or page.core in pids}
        members = pids if pids is not None else {core for core, _ in self.pages}
        self.usage = {pid: processes.usage(pid) for pid in members if processes.alive(pid)}


def read_pages(folder: str = statistics.FOLDER) -> list[statistics.Page]:
    """The pages of living VMs that we may read."""
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return []
    found = [_read_page(os.path.join(folder, name)) for name in names
             if statistics.is_page_name(name)]
    return [page for page in found if page is not None]


def _read_page(path: str) -> statistics.Page | None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        about = os.fstat(fd)
        if not stat.S_ISREG(about.st_mode) or about.st_size > _PAGE_LIMIT:
            return None
        page = statistics.decode_page(os.pread(fd, about.st_size, 0))
        if page is None or not 0 < page.core < 1 << 22:
            return None
        if not processes.alive(page.core) or os.stat(f"/proc/{page.core}").st_uid != about.st_uid:
            return None
        return page
    except OSError:
        return None
    finally:
        os.close(fd)


class Rates:
    """What one device did between two samples.

    Everything is a second, but for the latencies (nanoseconds) and errors, restarts (since the
    device exists). In is what the guest reads or receives, out what it writes or sends.
    """

    __slots__ = ("device", "errors", "in_bytes", "in_count", "kind", "latency50", "latency99",
                 "others", "out_bytes", "out_count", "restarts")

    def __init__(self, page: statistics.Page, before: statistics.Page | None,
                 seconds: float) -> None:
        self.device = page.device
        self.kind = page.kind
        self.restarts = max(min(page.starts, _LARGEST) - 1, 0)
        self.in_count = self.in_bytes = self.out_count = self.out_bytes = self.others = 0.0
        self.errors = sum(min(queue.get(name, 0), _LARGEST) for queue in page.counters
                          for name in ("errors", "dropped"))
        for number, queue in enumerate(page.counters):
            old = _queue(before, number)
            self._add(number, {name: _grown(value, old.get(name, value))
                               for name, value in queue.items()}, max(seconds, 0.001))
        grown = _latencies(page, before)
        self.latency50, self.latency99 = quantile(grown, 0.5), quantile(grown, 0.99)

    def _add(self, number: int, grown: dict[str, int], seconds: float) -> None:
        if "packets" in grown:  # a NIC: even queues receive, odd ones send
            way = "out" if number % 2 else "in"
            counted = {f"{way}_count": grown["packets"], f"{way}_bytes": grown.get("bytes", 0)}
        elif "chains" in grown:  # a small device, whose queues are numbered alike
            way = "out" if number % 2 else "in"
            counted = {f"{way}_count": grown["chains"], f"{way}_bytes": grown.get("bytes", 0)}
        else:
            counted = {"in_count": grown.get("reads", 0), "in_bytes": grown.get("read_bytes", 0),
                       "out_count": grown.get("writes", 0),
                       "out_bytes": grown.get("written_bytes", 0),
                       "others": sum(grown.get(name, 0) for name in (
                           "flushes", "discards", "write_zeroes"))}
        for name, value in counted.items():
            setattr(self, name, getattr(self, name) + value / seconds)

    def as_json(self) -> dict[str, object]:
        """For scripts; a latency is null where nothing was timed."""
        def rounded(value: float | None) -> float | None:
            return None if value is None else round(value, 1)

        return {"device": self.device, "kind": self.kind, "restarts": self.restarts,
                "errors": self.errors, "in-per-second": rounded(self.in_count),
                "in-bytes-per-second": rounded(self.in_bytes),
                "out-per-second": rounded(self.out_count),
                "out-bytes-per-second": rounded(self.out_bytes),
                "others-per-second": rounded(self.others),
                "latency-50-ns": rounded(self.latency50),
                "latency-99-ns": rounded(self.latency99)}


def _queue(page: statistics.Page | None, number: int) -> dict[str, int]:
    return page.counters[number] if page is not None and number < len(page.counters) else {}


def _grown(now: int, before: int) -> int:
    return now - before if before <= now < _LARGEST else 0


def _latencies(page: statistics.Page, before: statistics.Page | None) -> list[int]:
    """How many requests fell into each bucket, of all queues and kinds."""
    sums = [0] * statistics.BUCKETS
    if before is None:
        return sums
    for now, old in zip(page.histograms, before.histograms, strict=False):
        for name, buckets in now.items():
            for i, value in enumerate(buckets):
                sums[i] += _grown(value, old.get(name, buckets)[i])
    return sums


def quantile(buckets: list[int], part: float) -> float | None:
    """The time below which `part` of the requests were done, in nanoseconds; None: no requests.

    Inside a bucket requests are taken as evenly spread; the last one counts as its beginning.
    """
    wanted = part * sum(buckets)
    if wanted <= 0:
        return None
    seen = 0
    for bucket, count in enumerate(buckets):
        if count and seen + count >= wanted:
            low, high = statistics.bucket_range(bucket)
            if bucket == len(buckets) - 1:
                return float(low)
            return low + (high - low) * (wanted - seen) / count
        seen += count
    return None
