"""QEMU and an unmodified Linux driver use our rng worker: /dev/hwrng of the guest."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.blk_worker import ROOT
from tests.support.capabilities import require
from tests.support.test_vm import wait_until

pytestmark = pytest.mark.lab

# QEMU 7.2 without KVM crashes in msix_set_vector_notifiers() when a vhost device uses MSI-X.
NO_MSIX = "vectors=0"
COMMANDS = ("cat /sys/class/misc/hw_random/rng_current", "dd if=/dev/hwrng bs=1k count=64 of=/r",
            "wc -c /r", "gzip -c /r | wc -c", "poweroff -f")


def test_linux_in_qemu(tmp_path: Path) -> None:
    require("qemu")
    require("lab")
    from tests.lab import images
    from tests.lab.small_kernel import small_kernel

    path = tmp_path / "rng.sock"
    worker = subprocess.Popen([sys.executable, "-m", "workers.rng", f"--socket-path={path}"],
                              cwd=ROOT)
    try:
        wait_until(path.exists, "the worker's socket")
        result = subprocess.run([
            str(shutil.which("qemu-system-x86_64")), "-nodefaults", "-no-user-config",
            "-M", "q35", "-accel", "tcg", "-cpu", "max", "-m", "256",
            "-object", "memory-backend-memfd,id=ram,size=256M,share=on",
            "-machine", "memory-backend=ram", "-display", "none", "-no-reboot",
            "-chardev", f"socket,id=rng,path={path}",
            "-device", f"vhost-user-rng-pci,chardev=rng,{NO_MSIX}",
            "-kernel", str(small_kernel()["bzImage"]), "-initrd", str(images.plain_initramfs()),
            "-append", images.command_line(*COMMANDS), "-serial", "stdio",
        ], timeout=90, check=False, capture_output=True, text=True)
        console = result.stdout + result.stderr
        assert "virtio_rng.0" in console, console
        assert "65536 /r" in console, console
        sizes = [int(word) for word in console.split() if word.isdigit()]
        assert any(65000 < size < 70000 and size != 65536 for size in sizes), console
        assert worker.wait(10) == 0
    finally:
        worker.kill()
        worker.wait()
