"""From exec to Linux's user space, beside QEMU's microvm with the same kernel and command line.

Debian's cloud kernel (vmlinux) and a small initramfs, a disk, one vCPU, 256 MiB; QEMU with
`rtc=on`, without which its guest waits 2 s for a clock.  On hardware KVM, else in the nested lab,
where Python costs 18 times what it costs on a processor.  Goal: ratio ≤ 1.0.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import vmms
from bench.lab import in_lab, inside
from bench.report import BenchError, Goal, Report, parse, parser, ratios, show

if TYPE_CHECKING:
    from collections.abc import Sequence

LIMIT = 120.0  # seconds for one boot
READY = re.compile(rb"L2 ready ([\d.]+)")  # tests/lab/l2-init: seconds since the guest's start


def settings() -> dict[str, Any]:
    """Kernel, initramfs, disk and command lines; made first if need be."""
    from tests.lab import images, kernels

    return {"kernel": str(kernels.debian_kernel().vmlinux),
            "initrd": str(images.debian_initramfs()), "disk": str(images.root_disk()),
            "cases": {"with what spares an emulator": images.COMMAND_LINE,
                      "as typed: console=ttyS0 quiet": "console=ttyS0 quiet panic=1"}}


def command(rival: str, folder: Path, setting: dict[str, Any], append: str) -> list[str]:
    """A rival's command line."""
    more = ["-initrd", setting["initrd"], "-append", append]
    if rival == "ours":
        line = vmms.ours(folder, Path(setting["kernel"]), folder / "disk", *more)
        line[line.index("-drive") + 1] += ",direct=off"  # as QEMU; the lab's is a tmpfs
        return line
    line = vmms.qemu(folder, Path(setting["kernel"]), folder / "disk", *more)
    line[line.index("microvm")] = "microvm,rtc=on"
    # Both find their disks by ACPI; QEMU needs no more than that.
    line[line.index("-append") + 1] = append
    return line


def boot(line: list[str]) -> tuple[float, float]:
    """Seconds from fork to user space, and how many of them the guest counted.

    :raises BenchError: it didn't get there.
    """
    began = time.monotonic()
    with subprocess.Popen(line, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT) as process:
        assert process.stdout is not None
        os.set_blocking(process.stdout.fileno(), False)
        output = b""
        try:
            while not (found := READY.search(output)):
                if time.monotonic() - began > LIMIT or process.poll() is not None:
                    raise BenchError(f"{line[0]}: no user space within {LIMIT:.0f} s; "
                                     f"{output[-500:].decode(errors='replace')}")
                output += process.stdout.read() or b""
                time.sleep(0.005)
            return time.monotonic() - began, float(found[1])
        finally:
            process.kill()


def rounds(setting: dict[str, Any], append: str, count: int) -> dict[str, list[list[float]]]:
    """[seconds, guest's seconds] by rival, round by round, after one that doesn't count."""
    found: dict[str, list[list[float]]] = {name: [] for name in vmms.RIVALS}
    for number in range(-1, count):
        for rival in vmms.order(number):
            with tempfile.TemporaryDirectory(prefix="bench-") as name:
                shutil.copy(setting["disk"], Path(name) / "disk")
                line = command(rival, Path(name), setting, append)
                took = list(boot(line))
            if number >= 0:
                found[rival].append(took)
    return found


def rounds_in_lab(setting: dict[str, Any], append: str, count: int
                  ) -> dict[str, list[list[float]]]:
    """`rounds` in a fresh lab."""
    found: dict[str, list[list[float]]] = in_lab(
        "boot", [setting, append, count], (count + 1) * 2 * LIMIT)
    return found


def main(arguments: Sequence[str]) -> int:
    """Exit code 1: it can't be measured here."""
    line = parse(parser(__doc__ or "", 7, 3), arguments)
    hardware = vmms.has_hardware() and os.access("/dev/kvm", os.R_OK | os.W_OK)
    report = Report("boot", "Linux boot: seconds from exec to user space", [
        "", "ours", "QEMU microvm", "ratio", "goal", ""])
    try:
        setting = settings()
        for text, append in setting["cases"].items():
            found = (rounds if hardware else rounds_in_lab)(setting, append, line.rounds)
            for column, what, goal in ((0, "", Goal(1.0)), (1, ": the guest's part", None)):
                ours, qemu = ([took[column] for took in found[name]] for name in vmms.RIVALS)
                report.add([f"{text}{what}", show(ours, 2), show(qemu, 2)],
                           {"case": text, "guest": bool(column), "ours": ours, "qemu": qemu},
                           ratios(ours, qemu), goal)
    except (BenchError, OSError, RuntimeError) as error:
        print(f"bench boot: {error}", file=sys.stderr)
        return 1
    report.note("on /dev/kvm" if hardware else "in the nested lab (QEMU emulates the processor)")
    return report.finish(line.json)


if __name__ == "__main__":  # inside the lab
    inside(rounds)
