"""Nurseries whose workers are probes, and whole sandboxes for tests."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from tests.support.tree import ROOT
from vmm.worker import nursery as core_side
from vmm.worker.nursery import Nursery

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmm.event_loop import EventLoop
    from vmm.worker.process import WorkerProcess

PROBES = str(ROOT / "tests/support/begin_probes.py")
BLK_OPTIONS: dict[str, object] = {"num-queues": 1, "queue-size": 64}


def probe_nursery(loop: EventLoop, off: Sequence[str] = ()) -> Nursery:
    """Its blk workers make one attempt to get out (tests/support/sandbox_probe.py)."""
    script = core_side._SCRIPT
    core_side._SCRIPT = PROBES
    try:
        nursery = Nursery(loop, off)
        nursery.start()
    finally:
        core_side._SCRIPT = script
    return nursery


def started_blk(nursery: Nursery, image: int, name: str = "disk") -> WorkerProcess:
    """A real blk worker, running."""
    worker = nursery.spawn("blk", name, {"image": image}, BLK_OPTIONS)
    assert worker.wait_started(time.monotonic() + 10), worker.reason
    return worker
