"""The two virtual machine monitors that are compared, with the same machine: one disk, 256 MiB."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from bench.report import ROOT, BenchError

MEMORY_MIB = 256
# Where QEMU's microvm puts its first disk; with ACPI it doesn't say so on the command line.
QEMU_SLOT = "virtio_mmio.device=512@0xfeb02e00:5"


def product() -> list[str]:
    """The command that starts ours: $STRATOVIRT (set by ./dev), else the one that ./dev built."""
    given = os.environ.get("STRATOVIRT") or str(ROOT / "build/bin/stratovirt")
    if not Path(given).exists():
        raise BenchError(f"{given}: not built; run ./dev which")
    return [given]


def ours(folder: Path, kernel: Path, disk: Path, *more: str) -> list[str]:
    """Our command line: serial port on standard output, QMP socket in `folder`."""
    return [*product(), "-machine", "microvm", "-m", str(MEMORY_MIB), "-kernel", str(kernel),
            "-drive", f"file={disk},id=disk,format=raw", "-device",
            "virtio-blk-device,drive=disk,id=disk0", "-qmp",
            f"unix:{folder}/qmp.sock,server,nowait", "-serial", "stdio", *more]


def qemu(folder: Path, kernel: Path, disk: Path, *more: str) -> list[str]:
    """QEMU's command line for the same."""
    path = shutil.which("qemu-system-x86_64")
    if path is None:
        raise BenchError("qemu-system-x86_64 is not installed")
    line = list(more)
    if "-append" in line:
        line[line.index("-append") + 1] += f" {QEMU_SLOT}"
    else:
        line += ["-append", QEMU_SLOT]
    # KVM without hardware virtualization refuses the MSR of arch-capabilities.
    cpu = "host" if has_hardware() else "host,arch-capabilities=off"
    return [path, "-M", "microvm", "-global", "virtio-mmio.force-legacy=false", "-accel", "kvm",
            "-cpu", cpu, "-m", str(MEMORY_MIB), "-nodefaults", "-no-user-config", "-display",
            "none", "-no-reboot", "-kernel", str(kernel), "-drive",
            f"file={disk},id=disk,format=raw,if=none", "-device", "virtio-blk-device,drive=disk",
            "-qmp", f"unix:{folder}/qmp.sock,server=on,wait=off", "-serial", "stdio", *line]


RIVALS = {"ours": ours, "qemu": qemu}


def has_hardware() -> bool:
    """Whether the processor has VMX or SVM."""
    flags = Path("/proc/cpuinfo").read_text().split()
    return "vmx" in flags or "svm" in flags


def order(number: int) -> list[str]:
    """The rivals in turn."""
    return ["ours", "qemu"] if number % 2 == 0 else ["qemu", "ours"]


if __name__ == "__main__":
    print(" ".join(RIVALS[sys.argv[1]](*map(Path, sys.argv[2:5]))))
