"""QEMU boots from our blk worker: a foreign front end, SeaBIOS's own virtio driver."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.blk_worker import ROOT
from tests.support.capabilities import require

pytestmark = pytest.mark.worker

TEXT = b"read through vhost-user by SeaBIOS\n"
SUCCESS = 3  # isa-debug-exit: (1 << 1) | 1


def boot_sector(folder: Path) -> bytes:
    source = ROOT / "tests/support/boot_sector.S"
    subprocess.run(["as", "--32", "-o", folder / "boot.o", source], check=True)
    subprocess.run(["ld", "-m", "elf_i386", "-Ttext=0x7c00", "--oformat=binary",
                    "-o", folder / "boot.bin", folder / "boot.o"], check=True)
    return (folder / "boot.bin").read_bytes()


@pytest.mark.parametrize("aio", ["io_uring", "threads"])
def test_qemu_boots_from_it(tmp_path: Path, aio: str) -> None:
    require("qemu")
    if aio == "io_uring":
        require("io_uring")
    qemu = shutil.which("qemu-system-x86_64")
    image = tmp_path / "disk.img"
    image.write_bytes((boot_sector(tmp_path) + TEXT).ljust(1 << 20, b"\0"))
    path, console = tmp_path / "blk.sock", tmp_path / "console"
    worker = subprocess.Popen([sys.executable, "-m", "workers.blk", f"--socket-path={path}",
                               f"--blk-file={image}", f"--aio={aio}", "--num-queues=2"], cwd=ROOT)
    try:
        result = subprocess.run([
            str(qemu), "-nodefaults", "-no-user-config", "-M", "q35", "-accel", "tcg", "-m", "64",
            "-object", "memory-backend-memfd,id=ram,size=64M,share=on",
            "-machine", "memory-backend=ram", "-display", "none", "-no-reboot",
            "-chardev", f"socket,id=disk,path={path},reconnect=1",
            "-device", "vhost-user-blk-pci,chardev=disk,bootindex=1,num-queues=2",
            "-debugcon", f"file:{console}", "-device", "isa-debug-exit,iobase=0xf4,iosize=4",
        ], timeout=60, check=False, capture_output=True, text=True)
        assert result.returncode == SUCCESS, result.stderr
        assert console.read_bytes().endswith(TEXT)
        assert image.read_bytes()[1024:1536] == TEXT.ljust(512, b"\0")
        assert worker.wait(10) == 0
    finally:
        worker.kill()
        worker.wait()
