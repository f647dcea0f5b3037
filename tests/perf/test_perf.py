"""Short benchmarks as ratios, with bounds that a regression by a factor of two breaks.

The rivals run in turn in the same seconds; each bound lies at about twice (or half) of what
bench/ finds, because the machine may be busy. Where one round misses, better ones may follow.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bench import backends, blk, exits, memory, net, startup, trace, vmms
from bench.report import ratios
from tests.guest.build import guest
from tests.support.capabilities import require
from tests.support.test_vm import TestVm

pytestmark = pytest.mark.perf

ROUNDS = 4
COMMAND = Path(os.environ.get("STRATOVIRT", backends.ROOT / "build/bin/stratovirt"))


@pytest.fixture(autouse=True)
def product(monkeypatch: pytest.MonkeyPatch) -> None:
    if not COMMAND.exists():
        pytest.skip("the command isn't built: ./dev which")
    monkeypatch.setattr(vmms, "product", lambda: [str(COMMAND)])


def attempts(measure: Callable[[int], float], good: Callable[[float], bool]) -> list[float]:
    """Up to ROUNDS figures, until one is good: a busy machine makes bad ones, never good ones."""
    found: list[float] = []
    for number in range(ROUNDS):
        found.append(measure(number))
        if good(found[-1]):
            break
    return found


@pytest.mark.parametrize("case, bound", [
    (blk.Case("randread", 4096, 32, False, 1.6), 1.3),
    (blk.Case("randwrite", 4096, 32, False, 1.6), 1.0),
    (blk.Case("randread", 4096, 32, True, 1.1), 0.9),
    (blk.Case("seqread", blk.MIB, 4, False, 1.0), 0.6),
    (blk.Case("seqwrite", blk.MIB, 4, True, 1.0), 0.6),
], ids=lambda value: value.text() if isinstance(value, blk.Case) else "")
def test_block_worker(case: blk.Case, bound: float, tmp_path: Path) -> None:
    """Requests per CPU-second, ours to qemu-storage-daemon's; the data is verified too."""
    require("qemu-storage-daemon")
    require("io_uring")
    require("gcc")
    backends.OUT.mkdir(parents=True, exist_ok=True)
    image = backends.OUT / f"perf-{tmp_path.name}.img"  # tmp_path may not know O_DIRECT

    def once(number: int) -> float:
        found = blk.pair(case, image, number, seconds=0.25, segment=65536, size=64 << 20)
        return ratios([found["worker"]["per_cpu_second"]], [found["daemon"]["per_cpu_second"]])[0]

    try:
        found = attempts(once, lambda value: value >= bound)
    finally:
        image.unlink(missing_ok=True)
    assert max(found) >= bound, f"requests per CPU-second, ratios {found}"


@pytest.fixture
def stage() -> Iterator[net.Stage]:
    require("gcc")
    require("net_admin")
    stage = net.Stage()
    yield stage
    stage.close()


@pytest.mark.parametrize("case", [case for case in net.cases() if case.frame != "1514 B"],
                         ids=net.Case.text)
def test_net_worker(case: net.Case, stage: net.Stage) -> None:
    """CPU time a frame, ours to a bare read() or write(); the frames are verified too."""
    def once(number: int) -> float:
        found = {name: stage.run(name, case, 0.1)["per_million"]
                 for name in (("floor", "worker"), ("worker", "floor"))[number % 2]}
        return ratios([found["worker"]], [found["floor"]])[0]

    found = attempts(once, lambda value: value <= 2.2)
    assert min(found) <= 2.2, f"CPU time a frame, ratios {found}"


ADDRESSES = bytes([2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2])


@pytest.mark.parametrize(("frame", "what"), [
    (ADDRESSES + b"\x08\0" + bytes(50), "frame 0: its head is right, the rest isn't"),
    (ADDRESSES[::-1] + b"\x08\0" + bytes(50), "frame 0: its head is wrong"),
    (ADDRESSES + b"\x08\0" + bytes(46), "a frame of 64 bytes came as one of 60")],
    ids=["body", "head", "length"])
def test_the_generator_tells_wrong_frames(frame: bytes, what: str) -> None:
    """A back end that spoils frames must not win."""
    require("gcc")
    require("net_admin")

    class Spoiled(net.Stage):
        """A foreign frame is the first in the tap."""

        def flush(self) -> None:
            super().flush()
            with self.namespace.packet_socket(net.TAP) as peer:
                peer.send(frame)

    case = next(case for case in net.cases() if case.text() == "receive, as it comes: 64 B")
    with contextlib.closing(Spoiled()) as stage, pytest.raises(backends.BenchError, match=what):
        stage.run("worker", case, 0.1)


@pytest.mark.parametrize("disk_read, bound", [(False, 1.0), (True, 1.2)])
def test_start(disk_read: bool, bound: float, tmp_path: Path) -> None:
    """Milliseconds to the first instruction and the first disk read, ours to QEMU microvm's."""
    require("kvm")
    require("qemu")
    kernel = guest("disk.elf" if disk_read else "mini.elf")
    case = startup.Case("", kernel, disk_read, 0)
    way = startup.by_trace if trace.available() else startup.by_serial

    def once(number: int) -> float:
        found = startup.measure(case, 1, way, "")
        return ratios(found["ours"], found["qemu"])[0]

    found = attempts(once, lambda value: value <= bound)
    assert min(found) <= bound, f"exec to {'disk read' if disk_read else 'guest'}, ratios {found}"


def test_memory(tmp_path: Path) -> None:
    """Pages beside guest RAM, ours to QEMU's."""
    require("kvm")
    require("qemu")
    require("root")
    disk = tmp_path / "disk.img"
    disk.write_bytes(bytes(1 << 20))
    ours, qemu = (memory.measure(rival, tmp_path, disk) for rival in ("ours", "qemu"))
    assert ours.alone <= 0.8 * qemu.alone, f"MiB: {ours} beside {qemu}"


def test_exits(tmp_path: Path) -> None:
    """µs that the run loop adds: where C serves the exit next to none, where Python does a few."""
    require("kvm")
    require("gcc")

    with TestVm(tmp_path, "-machine", "microvm", "-m", "128", "-kernel", guest("guest.elf"),
                command=vmms.product()) as vm:
        for case, bound in ((exits.CASES[0], 4.0), (exits.CASES[2], 30.0)):
            base, mine = [], []
            for _ in range(10):  # down to the floors: a busy machine adds to either side
                base.append(exits.bare(case)[0])
                mine.append(exits.ours(vm, case, busy=False)[0])
                added = min(mine) - min(base)
                if len(base) > 2 and added <= bound:
                    break
            assert added <= bound, f"{case.text}: {added:.1f} µs more than a bare loop's {base}"


def test_the_generator_tells_wrong_data(tmp_path: Path) -> None:
    """A back end that mixes up blocks must not win."""
    require("gcc")
    image = tmp_path / "image"
    backends.prepare(image, 1 << 20, cached=True)
    with image.open("r+b") as file:
        file.seek(4096 * 7)
        file.write(image.read_bytes()[4096 * 9:4096 * 10])
    with pytest.raises(backends.BenchError, match="says that it is 72"):
        backends.run("worker", image, False, "--pattern", "seqread", "--requests", "256")
