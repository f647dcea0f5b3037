"""Many idle microVMs on one host: a disk and a NIC each, beside QEMU's microvm.

How long it takes until the last of them is ready when all are started at once, and what each
costs: as the kernel's MemAvailable falls (everything, guest RAM that was touched and the
kernel's own structures included), and PSS over all their processes without guest RAM.  Goal:
≤ 15 MB each, by MemAvailable.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from bench import vmms
from bench.memory import _mappings, family
from bench.report import ROOT, BenchError, Goal, Report, parse, parser, ratios, show
from tests.guest.build import guest

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

LIMIT = 180.0   # seconds for all to be ready
SETTLE = 2.0    # seconds after the last one is: nurseries confine themselves after one
MB = 1e6
HEADROOM = 2 << 30  # bytes that stay free: the rest of the machine needs some


class Figures(NamedTuple):
    """Of one fleet; MB for each VM."""

    count: int
    seconds: float
    available: float
    pss: float


def _available() -> int:
    found = re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())
    assert found is not None
    return int(found[1]) * 1024


def _command(rival: str, folder: Path, number: int) -> list[str]:
    place = folder / str(number)
    place.mkdir()
    disk = place / "disk.img"
    with disk.open("wb") as file:
        file.truncate(1 << 20)
    line = vmms.RIVALS[rival](place, guest("guest.elf"), disk)
    netdev = f"tap,id=net,ifname=t{number}"
    if rival == "ours":
        return [*line, "-netdev", netdev, "-device", "virtio-net-device,netdev=net,id=nic"]
    return [*line, "-netdev", f"{netdev},script=no,downscript=no", "-device",
            "virtio-net-device,netdev=net"]


@contextlib.contextmanager
def fleet(rival: str, folder: Path, count: int) -> Iterator[tuple[list[int], float]]:
    """`count` VMs with idle guests: their processes' ids, and the seconds that it took."""
    vms: list[subprocess.Popen[bytes]] = []
    lines = [_command(rival, folder, number) for number in range(count)]
    began = time.monotonic()
    try:
        for number, line in enumerate(lines):
            log = (folder / str(number) / "errors").open("wb")
            vms.append(subprocess.Popen(line, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                        stderr=log, cwd=folder / str(number)))
            log.close()
        _wait(vms, folder, began)
        took = time.monotonic() - began
        time.sleep(SETTLE)
        yield [vm.pid for vm in vms], took
    finally:
        for vm in vms:
            vm.kill()
        for vm in vms:
            vm.wait()
            assert vm.stdout is not None
            vm.stdout.close()


def _wait(vms: list[subprocess.Popen[bytes]], folder: Path, began: float) -> None:
    said = {vm.stdout.fileno(): [number, b""] for number, vm in enumerate(vms) if vm.stdout}
    poll = select.poll()
    for fd in said:
        poll.register(fd, select.POLLIN)
    while said:
        if time.monotonic() - began > LIMIT:
            raise BenchError(f"{len(said)} of {len(vms)} guests weren't ready in {LIMIT:.0f} s")
        for fd, _ in poll.poll(1000):
            data = os.read(fd, 4096)
            said[fd][1] += data
            if b"ready" in said[fd][1]:
                poll.unregister(fd)
                del said[fd]
            elif not data:
                number = said[fd][0]
                text = (folder / str(number) / "errors").read_text(errors="replace")
                raise BenchError(f"VM {number} ended: {text[-500:]}")


def _pss(pid: int) -> int:
    """Bytes of one process, guest RAM left out; 0 if it has ended."""
    with contextlib.suppress(OSError):
        return sum(numbers.get("Pss", 0) for _, _, numbers in _mappings(pid)) * 1024
    return 0


def measure(rival: str, count: int) -> Figures:
    """Start them, look, end them."""
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        before = _available()
        with fleet(rival, Path(name), count) as (roots, took):
            used = before - _available()
            pss = sum(_pss(pid) for root in roots for pid in family(root))
        return Figures(count, took, used / count / MB, pss / count / MB)


def _fitting(count: int) -> int:
    """As many of QEMU's as the machine has memory for: 60 MB each are enough."""
    return max(1, min(count, int((_available() - HEADROOM) / (60 * MB))))


def main(arguments: Sequence[str]) -> int:
    """Exit code 1: it can't be measured here."""
    options = parser(__doc__ or "", 1, 1)
    options.add_argument("--count", type=int, default=100, help="VMs at once (100)")
    options.add_argument("--inside", action="store_true", help="in a network namespace already")
    line = parse(options, arguments)
    if os.geteuid():
        print("bench density: taps and others' pages need root", file=sys.stderr)
        return 1
    if not line.inside:
        # Taps of 100 VMs are nobody else's affair.
        return subprocess.run(["unshare", "-n", sys.executable, "-m", "bench", "density",
                               "--inside", *arguments], check=False, cwd=ROOT).returncode
    count = min(line.count, 20) if line.quick else line.count
    found: dict[str, list[Figures]] = {name: [] for name in vmms.RIVALS}
    try:
        for number in range(line.rounds):
            for rival in vmms.order(number):
                found[rival].append(measure(rival, count if rival == "ours" else _fitting(count)))
    except (BenchError, OSError) as error:
        print(f"bench density: {error}", file=sys.stderr)
        return 1
    ours, qemu = found["ours"], found["qemu"]
    report = Report("density", f"{ours[0].count} idle microVMs, a disk and a NIC each", [
        "", "ours", "QEMU microvm", "ratio", "goal", ""])
    for text, field in (("until all are ready, s each", "seconds"),
                        ("PSS without guest RAM, MB each", "pss")):
        mine = [getattr(one, field) / (one.count if field == "seconds" else 1) for one in ours]
        theirs = [getattr(one, field) / (one.count if field == "seconds" else 1) for one in qemu]
        digits = 3 if field == "seconds" else 1
        report.add([text, show(mine, digits), show(theirs, digits)],
                   {"figure": text, "ours": mine, "qemu": theirs}, ratios(mine, theirs))
    mine, theirs = [one.available for one in ours], [one.available for one in qemu]
    report.add(["MemAvailable, MB each", show(mine), show(theirs),
                f"{ratios(mine, theirs)[0]:.2f}"],
               {"figure": "MemAvailable", "ours": mine, "qemu": theirs})
    goal = Goal(15.0)
    verdict = "met" if goal.met(sum(mine) / len(mine)) else "missed"
    report.rows[-1] += [f"{goal} MB", verdict]
    report.figures[-1].update(goal=str(goal), met=verdict == "met")
    report.note(f"all at once: ours {ours[0].seconds:.1f} s for {ours[0].count}, QEMU "
                f"{qemu[0].seconds:.1f} s for {qemu[0].count}")
    return report.finish(line.json)
