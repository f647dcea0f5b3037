"""What the workers' sandbox costs: spawn time and throughput, with each stage off in turn.

Goals: a worker is there within 8 ms (median, from the request to its report); its throughput
is within 2 % of that without any sandbox.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from functools import partial
from typing import TYPE_CHECKING

from bench import backends
from bench.report import BenchError, Goal, Report, parse, parser, ratios, show
from shared.sandbox.stages import NAMES
from vmm.event_loop import EventLoop
from vmm.worker.nursery import Nursery

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    Off = tuple[str, ...]

IMAGE_SIZE = 64 << 20
SECONDS = 0.4
SPAWNS = 5  # a round
# Two workers that are the same differ by several per cent, from spawn to spawn: what the whole
# sandbox costs takes many pairs.
PAIRS = 10  # a round
LOAD = ("--pattern", "randread", "--depth", "32", "--block", "4096")
VARIANTS: dict[str, Off] = {"all stages": (), **{f"without {name}": (name,) for name in NAMES},
                            "no sandbox": NAMES}


class Spawner:
    """A nursery a variant, and the times that their workers took, in milliseconds."""

    def __init__(self, image: int) -> None:
        self._loop = EventLoop()
        self._image = image
        self._nurseries: dict[Off, Nursery] = {}

    def spawn(self, off: Off) -> float:
        """From the request to the worker's report that it is confined and serves."""
        if off not in self._nurseries:
            nursery = self._nurseries[off] = Nursery(self._loop, off)
            nursery.start()
            self._one(nursery)
        return self._one(self._nurseries[off])

    def _one(self, nursery: Nursery) -> float:
        began = time.perf_counter()
        worker = nursery.spawn("blk", "bench", {"image": self._image}, {"queue-size": 128})
        started = worker.wait_started(time.monotonic() + 20)
        spent = 1000 * (time.perf_counter() - began)
        if not started:
            raise BenchError(f"a worker didn't start: {worker.reason}")
        worker.close(5.0)
        return spent

    def close(self) -> None:
        """End all of them."""
        for nursery in self._nurseries.values():
            nursery.close()
        self._loop.close()


def _command(off: Off, socket: Path, image: Path, direct: bool) -> list[str]:
    return [*backends.worker(socket, image, direct),
            "--sandbox=on" + "".join(f",{name}=off" for name in off)]


def throughput(variant: str, image: Path) -> float:
    """Thousand requests per CPU-second of a worker on the page cache, on a CPU of its own."""
    backends.RIVALS[variant] = partial(_command, VARIANTS[variant])
    with backends.awake():
        result = backends.run(variant, image, False, *LOAD, "--seconds", str(SECONDS), pinned=True)
    return float(result["per_cpu_second"]) / 1000


def main(arguments: Sequence[str]) -> int:
    """Exit code 1: it can't be measured here."""
    line = parse(parser(__doc__ or "", 7, 2), arguments)
    report = Report("sandbox", "The sandbox's cost", [
        "variant", "spawn, ms", "1000 requests/CPU-s", "to no sandbox", "goal", ""])
    backends.OUT.mkdir(parents=True, exist_ok=True)
    image = backends.OUT / "sandbox.img"
    spawns: dict[str, list[float]] = {name: [] for name in VARIANTS}
    speeds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    pairs: dict[str, list[float]] = {"all stages": [], "no sandbox": []}
    spawner = None
    try:
        backends.prepare(image, IMAGE_SIZE, cached=True)
        fd = os.open(image, os.O_RDWR)
        spawner = Spawner(fd)
        # In turn: what disturbs a round disturbs all of it.
        for number in range(line.rounds):
            names = list(VARIANTS)
            for name in names[number % len(names):] + names[:number % len(names)]:
                spawns[name] += [spawner.spawn(VARIANTS[name]) for _ in range(SPAWNS)]
                speeds[name].append(throughput(name, image))
            for pair in range(PAIRS):
                both = ("all stages", "no sandbox")
                for name in both if pair % 2 else both[::-1]:
                    pairs[name].append(throughput(name, image))
    except BenchError as error:
        print(f"bench sandbox: {error}", file=sys.stderr)
        return 1
    finally:
        if spawner is not None:
            spawner.close()
            os.close(fd)
        image.unlink(missing_ok=True)
    for name in VARIANTS:
        relative = ratios(speeds[name], speeds["no sandbox"])
        figure = {"variant": name, "spawn_ms": spawns[name], "per_cpu_second": speeds[name],
                  "relative": relative}
        report.add([name, show(spawns[name], 2), show(speeds[name])], figure, relative)
    relative = ratios(pairs["all stages"], pairs["no sandbox"])
    middle = statistics.median(relative)
    spread = 1.48 * statistics.median(abs(value - middle) for value in relative)
    deviation = 1.25 * spread / len(relative) ** 0.5
    report.add([f"throughput, all stages, {len(relative)} pairs", "", show(pairs["all stages"])],
               {"goal_of": "throughput", "pairs": relative, "error": deviation}, relative,
               Goal(0.98, at_most=False))
    report.add(["spawn, all stages", "", ""], {"goal_of": "spawn"}, spawns["all stages"],
               Goal(8.0))
    report.note("spawn: request to report, over one nursery; throughput: 4 KiB random reads, "
                "depth 32, page cache, back end and generator on a CPU each")
    report.note(f"standard error of the pairs' median: {deviation:.3f}")
    return report.finish(line.json)
