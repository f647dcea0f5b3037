"""From exec to the first guest instruction and to the first completed disk read.

Beside `qemu-system-x86_64 -M microvm` with the same machine, in the same run.  The guests: 4 KiB of
machine code that reads a sector, the same with the segments of Debian's vmlinux as dead weight,
and that vmlinux itself (its first instruction only, where KVM can't run Linux).
Goals: ratio ≤ 0.5 for the first instruction, ≤ 0.7 for the read.
"""

from __future__ import annotations

import contextlib
import mmap
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from bench import trace, urgent, vmms
from bench.report import ROOT, BenchError, Goal, Report, parse, parser, ratios, show
from tests.guest.build import guest

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

OUT = ROOT / "build/bench"
LOAD = 1  # a program header's type
HEADER, ENTRY = 64, 56  # bytes of an ELF header and of a program header
WARM = 192 << 20  # bytes: of a start, its kernel four times


class Case(NamedTuple):
    """A guest, what is waited for, the goal."""

    text: str
    kernel: Path
    disk_read: bool
    goal: float


def vmlinux() -> Path | None:
    """Debian's cloud kernel as ELF; None where it can't be had."""
    from tests.lab.kernels import debian_kernel

    try:
        return debian_kernel().vmlinux
    except (OSError, RuntimeError, subprocess.SubprocessError):
        return None


def heavy(kernel: Path, guest: Path) -> Path:
    """`guest`, which is small, with one more segment at 32 MiB: all that `kernel` would load."""
    data = guest.read_bytes()
    weight = b"".join(_segments(kernel.read_bytes()))
    count = struct.unpack_from("<H", data, 56)[0]
    table = data[HEADER:HEADER + count * ENTRY]
    where = (len(data) + ENTRY + 4095) & ~4095
    out = bytearray(where)
    out[:len(data)] = data
    # The table moves behind the small guest's data, one entry longer.
    start = len(data) + -len(data) % 8
    out[start:start + len(table)] = table
    struct.pack_into("<IIQQQQQQ", out, start + len(table), LOAD, 4, where, 32 << 20, 32 << 20,
                     len(weight), len(weight), 4096)
    struct.pack_into("<Q", out, 32, start)
    struct.pack_into("<H", out, 56, count + 1)
    struct.pack_into("<QHHH", out, 40, 0, 0, 64, 56)  # no section headers
    struct.pack_into("<HHH", out, 58, 0, 0, 0)
    target = OUT / "heavy.elf"
    OUT.mkdir(parents=True, exist_ok=True)
    target.write_bytes(bytes(out) + weight)
    return target


def _segments(data: bytes) -> list[bytes]:
    start, = struct.unpack_from("<Q", data, 32)
    size, count = struct.unpack_from("<HH", data, 54)
    found = []
    for at in range(start, start + size * count, size):
        kind, _, offset, _, _, length = struct.unpack_from("<IIQQQQ", data, at)
        if kind == LOAD:
            found.append(data[offset:offset + length])
    return found


def by_trace(command: list[str], folder: Path, disk_read: bool, group: str) -> float:
    """Milliseconds, by kvm's tracepoints."""
    if disk_read:
        return trace.until(command, folder, trace.PORT, "val 0x2", group)
    return trace.until(command, folder, trace.FIRST, "", group)


def by_serial(command: list[str], folder: Path, disk_read: bool, group: str) -> float:
    """Milliseconds until the guest's mark comes out of the serial port."""
    if group:
        command = ["sh", "-c", 'echo 0 > "$0/cgroup.procs"; exec "$@"', group, *command]
    began = time.perf_counter()
    with subprocess.Popen(command, cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        while byte := process.stdout.read(1):
            if byte == (b"2" if disk_read else b"1"):
                took = time.perf_counter() - began
                process.kill()
                return took * 1000
        raise BenchError(f"{command[0]}: no mark; {process.stderr.read().decode()[-500:]}")


def warm_memory() -> None:
    """Have so much memory at hand as a start needs, and more.

    A virtual machine that reports its free pages has given them back to its host, which takes up to
    a millisecond for two megabytes of them: the host's time, not the rivals'.
    """
    with mmap.mmap(-1, WARM, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_HUGEPAGE)
        for at in range(0, WARM, mmap.PAGESIZE):
            memory[at] = 1


def measure(case: Case, rounds: int, way: Callable[[list[str], Path, bool, str], float],
            group: str) -> dict[str, list[float]]:
    """Milliseconds by rival, round by round, after one that doesn't count."""
    found: dict[str, list[float]] = {name: [] for name in vmms.RIVALS}
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        disk = folder / "disk.img"
        disk.write_bytes(bytes(1 << 20))
        for number in range(-1, rounds):
            for rival in vmms.order(number):
                command = vmms.RIVALS[rival](folder, case.kernel, disk)
                warm_memory()
                took = way(command, folder, case.disk_read, group)
                if number >= 0:
                    found[rival].append(took)
                for left in folder.glob("*.sock"):
                    left.unlink(missing_ok=True)  # the nursery removes them, too
    return found


def cases(traced: bool, kernel: Path | None) -> list[Case]:
    """What can be measured here."""
    mini, disk = guest("mini.elf"), guest("disk.elf")
    found = [Case("4 KiB guest: first instruction", mini, False, 0.5),
             Case("4 KiB guest: first disk read", disk, True, 0.7)]
    if kernel is not None:
        weight = heavy(kernel, disk)
        if traced:
            found.append(Case("Debian's vmlinux: first instruction", kernel, False, 0.5))
        else:
            found.append(Case("guest of vmlinux's size: first instruction", weight, False, 0.5))
        found.append(Case("guest of vmlinux's size: first disk read", weight, True, 0.7))
    return found


def main(arguments: Sequence[str]) -> int:
    """Exit code 1: it can't be measured here."""
    command = parser(__doc__ or "", 15, 5)
    command.add_argument("--serial", action="store_true", help="by the serial port's marks")
    command.add_argument("--urgent", action="store_true",
                         help="in a control group whose processes go before all else (root)")
    line = parse(command, arguments)
    traced = not line.serial and trace.available()
    report = Report("startup", "Start-up: milliseconds from exec", [
        "", "ours", "QEMU microvm", "ratio", "goal", ""])
    try:
        with urgent.group() if line.urgent else contextlib.nullcontext("") as group:
            for case in cases(traced, vmlinux()):
                found = measure(case, line.rounds, by_trace if traced else by_serial, group)
                report.add([case.text, show(found["ours"]), show(found["qemu"])],
                           {"case": case.text, **found}, ratios(found["ours"], found["qemu"]),
                           Goal(case.goal))
    except BenchError as error:
        print(f"bench startup: {error}", file=sys.stderr)
        return 1
    if traced:
        report.note("by kvm's tracepoints: the first instruction of any guest code (QEMU's is that "
                    "of its firmware), the guest's write to port 0x80 after its read")
    else:
        report.note("no tracepoints: from before fork to the guest's mark on the serial port; "
                    "QEMU's firmware runs before it")
    return report.finish(line.json)
