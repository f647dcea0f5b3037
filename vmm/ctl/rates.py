"""What one device did between two samples of its statistics page.

Numbers that go backwards, and such as no device can have counted, are taken as no news: who
writes a page may have been taken over, and a device that was unplugged and plugged begins anew.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from shared import statistics
from vmm.ctl.output import human_bytes, human_count

if TYPE_CHECKING:
    from collections.abc import Callable

_LARGEST = 1 << 63
_PAGE = 4096  # of a balloon


class Flow:
    """One direction. `count` and `bytes` are a second; `dropped` since the device exists,
    `dropping` a second."""

    __slots__ = ("bytes", "count", "dropped", "dropping")

    def __init__(self) -> None:
        self.count = self.bytes = self.dropping = 0.0
        self.dropped = 0


class Rates:
    """What one device did.

    totals: each counter over all queues, since the device exists; rates: the same a second.
    incoming, outgoing: what the guest reads or receives, writes or sends; None for a kind that
    has no such thing. latency50, latency99: nanoseconds; None where nothing was timed.
    """

    __slots__ = ("device", "incoming", "kind", "latency50", "latency99", "outgoing", "rates",
                 "restarts", "totals")

    def __init__(self, page: statistics.Page, before: statistics.Page | None,
                 seconds: float) -> None:
        seconds = max(seconds, 0.001)
        if before is not None and before.kind != page.kind:
            before = None
        self.device = page.device
        self.kind = page.kind
        self.restarts = max(min(page.starts, _LARGEST) - 1, 0)
        self.totals: dict[str, int] = {}
        self.rates: dict[str, float] = {}
        for number, queue in enumerate(page.counters):
            old = _queue(before, number)
            for name, value in queue.items():
                self.totals[name] = min(self.totals.get(name, 0) + value, _LARGEST - 1)
                self.rates[name] = self.rates.get(name, 0.0) + (
                    _grown(value, old.get(name, value)) / seconds)
        self.incoming, self.outgoing = self._flows(page, before, seconds)
        grown = _latencies(page, before)
        self.latency50, self.latency99 = quantile(grown, 0.5), quantile(grown, 0.99)

    def _flows(self, page: statistics.Page, before: statistics.Page | None,
               seconds: float) -> tuple[Flow | None, Flow | None]:
        first, second = Flow(), Flow()
        if self.kind == "blk":
            for flow, count, moved in ((first, "reads", "read_bytes"),
                                       (second, "writes", "written_bytes")):
                flow.count = self.rates.get(count, 0.0)
                flow.bytes = self.rates.get(moved, 0.0)
            return first, second
        if self.kind not in _COUNTED:
            return None, None
        # Even queues receive, odd ones transmit, others are for commands.
        for number in range(len(page.counters) & ~1):
            if number in _CONTROL.get(self.kind, ()):
                continue
            flow = second if number % 2 else first
            queue, old = page.counters[number], _queue(before, number)
            grown = {name: _grown(value, old.get(name, value)) / seconds
                     for name, value in queue.items()}
            flow.count += grown.get(_COUNTED[self.kind], 0.0)
            flow.bytes += grown.get("bytes", 0.0)
            flow.dropping += grown.get("dropped", 0.0)
            flow.dropped = min(flow.dropped + queue.get("dropped", 0), _LARGEST - 1)
        return first, second

    @property
    def errors(self) -> int:
        """Requests that ended in an error, since the device exists."""
        return self.totals.get("errors", 0)

    @property
    def failing(self) -> bool:
        """Whether there were errors in this interval."""
        return self.rates.get("errors", 0.0) > 0

    @property
    def others(self) -> float:
        """Requests a second of a disk that move no data."""
        return sum(self.rates.get(name, 0.0) for name in ("flushes", "discards", "write_zeroes",
                                                          "others"))

    @property
    def moved(self) -> float:
        """Bytes a second, as far as this kind counts any."""
        if self.incoming is not None and self.outgoing is not None:
            return self.incoming.bytes + self.outgoing.bytes
        return sum(rate for name, rate in self.rates.items()
                   if name == "bytes" or name.endswith("_bytes"))

    def activity(self) -> str:
        """What a device did that has no columns of its own, for people."""
        if self.kind == "console" and self.incoming is not None and self.outgoing is not None:
            return (f"typed {human_bytes(self.incoming.bytes)}/s  "
                    f"shown {human_bytes(self.outgoing.bytes)}/s  "
                    f"unheard {human_bytes(self.rates.get('unheard', 0.0))}/s")
        known = _ACTIVITIES.get(self.kind)
        if known is not None:  # the first one always, what seldom happens once it has
            return "  ".join(f"{label} {show(self.rates[name])}/s" for label, name, show in known
                             if self.totals.get(name) or (name in self.rates and (
                                 name == known[0][1])))
        return "  ".join(f"{name.replace('_', '-')} {_measure(name)(rate)}/s"
                         for name, rate in self.rates.items()
                         if self.totals[name] and name != "errors")

    def as_json(self) -> dict[str, object]:
        """For scripts; a latency is null where nothing was timed."""
        told: dict[str, object] = {"device": self.device, "kind": self.kind,
                                   "restarts": self.restarts, "errors": self.errors}
        for way, flow in (("in", self.incoming), ("out", self.outgoing)):
            if flow is None:
                continue
            told[f"{way}-per-second"] = _rounded(flow.count)
            told[f"{way}-bytes-per-second"] = _rounded(flow.bytes)
            if self.kind == "net":
                told[f"{way}-dropped"] = flow.dropped
                told[f"{way}-dropped-per-second"] = _rounded(flow.dropping)
        if self.kind == "blk":
            told.update({"others-per-second": _rounded(self.others),
                         "latency-50-ns": _rounded(self.latency50),
                         "latency-99-ns": _rounded(self.latency99)})
        told["counters"] = {_dashed(name): value for name, value in self.totals.items()}
        told["per-second"] = {_dashed(name): _rounded(rate) for name, rate in self.rates.items()}
        return told


def _pages(rate: float) -> str:
    return human_bytes(rate * _PAGE)


# Kinds whose queues are pairs: what their counters call one packet; and queues for commands
# beside those behind the last pair (virtio 1.2, 5.1.2 and 5.3.2).
_COUNTED = {"net": "packets", "console": "chains"}
_CONTROL = {"console": (2, 3)}

# Kinds that have no columns of their own: what it is called, the counter, how it is written.
_ACTIVITIES: dict[str, tuple[tuple[str, str, Callable[[float], str]], ...]] = {
    "balloon": (("taken", "inflated_pages", _pages), ("given back", "deflated_pages", _pages),
                ("reported free", "reported_pages", _pages),
                ("freed on the host", "removed_bytes", human_bytes),
                ("not freed", "failed_bytes", human_bytes), ("refused", "refused_pages", _pages)),
    "rng": (("random", "bytes", human_bytes), ("requests", "chains", human_count),
            ("throttled", "throttled", human_count), ("starved", "starved", human_count)),
}


def _measure(counter: str) -> Callable[[float], str]:
    is_bytes = counter == "bytes" or counter.endswith("_bytes")
    return human_bytes if is_bytes else human_count


def _dashed(name: str) -> str:
    return name.replace("_", "-")


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 1)


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
