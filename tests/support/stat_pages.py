"""Statistics pages as a test wants them."""

from __future__ import annotations

import os
import struct
from typing import TYPE_CHECKING

from shared import statistics
from shared.statistics import BUCKETS, HEADER_BYTES, RECORDS, Page, Record

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


def page(kind: str, *queues: dict[str, int], device: str = "d0", starts: int = 1,
         core: int = 0, vm: str = "web") -> Page:
    """A page whose counters are 0 but for those that are given, a queue each."""
    made = Page(kind, core or os.getpid(), vm, device, starts)
    for given in queues:
        assert set(given) <= set(RECORDS[kind].counters)
        made.counters.append({**dict.fromkeys(RECORDS[kind].counters, 0), **given})
        made.histograms.append({name: [0] * BUCKETS for name in RECORDS[kind].histograms})
    return made


def encoded(made: Page) -> bytes:
    """The file's content."""
    data = bytearray(statistics.encode_header(made.kind, len(made.counters), made.core, made.vm,
                                              made.device))
    statistics.STARTS.pack_into(data, statistics.STARTS_AT, made.starts)
    assert len(data) == HEADER_BYTES
    for counters, histograms in zip(made.counters, made.histograms, strict=True):
        values = [*counters.values(), *(v for buckets in histograms.values() for v in buckets)]
        data += struct.pack(f"={len(values)}Q", *values).ljust(RECORDS[made.kind].bytes, b"\0")
    return bytes(data)


def write(folder: Path, made: Page, name: str = "") -> Path:
    """Into a folder like /dev/shm."""
    path = folder / (name or statistics.page_name(made.core, made.vm, made.device))
    path.write_bytes(encoded(made))
    return path


def add_kind(monkeypatch: pytest.MonkeyPatch, kind: str, *counters: str) -> None:
    """As if there were workers of this kind, too."""
    monkeypatch.setitem(statistics.KINDS, kind, 1000)
    monkeypatch.setitem(statistics.RECORDS, kind, Record(counters, ()))
