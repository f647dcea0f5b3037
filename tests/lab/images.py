"""What guests (L2) boot from: initramfs archives and disks, cached."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

from tests.lab import cache, initramfs, kernels

HERE = Path(__file__).resolve().parent
INIT = HERE / "l2-init"
# Modules that Debian's cloud kernel needs for a microVM's devices.
MODULES = ["virtio_mmio", "virtio_blk", "virtio_net", "virtio_balloon", "virtio_console",
           "virtio_rng", "vmw_vsock_virtio_transport", "evdev", "button"]
# What a quiet and quick boot in the nested lab wants; each serial character is an exit.
COMMAND_LINE = ("console=ttyS0 quiet panic=1 mitigations=off no_timer_check tsc=reliable "
                "cryptomgr.notests 8250.nr_uarts=1 lpj=4000000")
MESSAGE = "served by a worker process\n"
MIB = 1 << 20


def command_line(*commands: str, extra: str = "") -> str:
    """A kernel command line that has the guest run shell `commands` (no `,` in them)."""
    for command in commands:
        if "," in command or ";" in command:
            raise ValueError(f"a command for the guest can't hold , or ;: {command}")
    run = ";".join(command.replace(" ", ",") for command in commands)
    return f"{COMMAND_LINE} {extra} lab.run={run}".replace("  ", " ")


def debian_initramfs() -> Path:
    """For Debian's cloud kernel: busybox, the modules above, the tests' init."""
    kernel = kernels.debian_kernel()
    key = cache.key_of(INIT, " ".join(MODULES), kernel.release, HERE / "initramfs.py")

    def make(folder: Path) -> None:
        files = initramfs.tree(INIT, kernels.module_files(kernel, MODULES))
        (folder / "initramfs").write_bytes(initramfs.cpio(files))

    return cache.obtain("guest-initramfs", key, make) / "initramfs"


def plain_initramfs() -> Path:
    """For a kernel with everything built in: no modules."""
    key = cache.key_of(INIT, HERE / "initramfs.py")

    def make(folder: Path) -> None:
        (folder / "initramfs").write_bytes(initramfs.cpio(initramfs.tree(INIT, [])))

    return cache.obtain("plain-initramfs", key, make) / "initramfs"


def vsock_initramfs() -> Path:
    """The same, with the program `vsock` of vsock.c."""
    source = HERE / "vsock.c"
    key = cache.key_of(INIT, HERE / "initramfs.py", source)

    def make(folder: Path) -> None:
        program = folder / "vsock"
        subprocess.run(["gcc", "-std=gnu11", "-Os", "-static", "-s", "-o", program, source],
                       check=True)
        files = initramfs.tree(INIT, [], {"bin/vsock": program})
        (folder / "initramfs").write_bytes(initramfs.cpio(files))

    return cache.obtain("vsock-initramfs", key, make) / "initramfs"


def root_disk() -> Path:
    """An ext4 image (16 MiB) that a kernel can have as its root: the same user space.

    `/message` holds MESSAGE. Shared by all who ask: to be used read-only or copied.
    """
    key = cache.key_of(INIT, HERE / "initramfs.py", MESSAGE)

    def make(folder: Path) -> None:
        files = initramfs.tree(INIT, [], {"message": MESSAGE.encode()})
        initramfs.ext4_image(files, folder / "root.ext4", 16 * MIB)

    return cache.obtain("root-disk", key, make) / "root.ext4"


def md5(path: Path) -> str:
    """The MD5 of a file, as `md5sum` prints it."""
    return hashlib.md5(path.read_bytes()).hexdigest()
