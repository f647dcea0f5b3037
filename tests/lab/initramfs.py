"""Initramfs archives (cpio, "newc") and ext4 images, made of a dict of paths."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from tests.lab.packages import download, unpack

if TYPE_CHECKING:
    from collections.abc import Mapping

# What a path holds: the content of a file, a file to copy, a link's target ("-> x"), a folder.
Entry = bytes | Path | str | None
HERE = Path(__file__).parent
FOLDERS = ("dev", "proc", "sys", "tmp", "run", "mnt", "bin", "sbin", "etc", "root", "modules")


def busybox() -> Path:
    """A static busybox: the installed one, else from Debian's package."""
    installed = Path("/usr/bin/busybox")
    if installed.exists():
        output = subprocess.run(["file", "-L", installed], capture_output=True, text=True,
                                check=False).stdout if shutil.which("file") else "static"
        if "static" in output:
            return installed
    folder = Path(tempfile.gettempdir()) / "stratovmm-busybox"
    return unpack(download("busybox-static"), folder) / "bin/busybox"


def tree(init: Path, modules: list[Path], extra: Mapping[str, Entry] | None = None
         ) -> dict[str, Entry]:
    """The files of a small Linux user space around `init`, which loads `modules` in order."""
    files: dict[str, Entry] = dict.fromkeys(FOLDERS)
    files["bin/busybox"] = busybox()
    applets = subprocess.run([str(files["bin/busybox"]), "--list"], capture_output=True, text=True,
                             check=True).stdout.split()
    for applet in applets:
        if applet != "busybox":
            files[f"bin/{applet}"] = "-> busybox"
    files["init"] = init
    files["sbin/init"] = "-> ../init"
    files["etc/passwd"] = b"root::0:0:root:/root:/bin/sh\n"
    for number, module in enumerate(modules):
        files[f"modules/{number:03}-{module.name}"] = module
    files.update(extra or {})
    return files


def cpio(files: Mapping[str, Entry]) -> bytes:
    """The archive with `files`, the console's device node included."""
    out = bytearray()
    inode = 0

    def add(name: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
        nonlocal inode
        inode += 1
        encoded = name.encode() + b"\0"
        numbers = (inode, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(encoded), 0)
        out.extend(b"070701" + b"".join(b"%08X" % number for number in numbers) + encoded)
        out.extend(bytes(-len(out) % 4) + data)
        out.extend(bytes(-len(out) % 4))

    for name, entry in files.items():
        if entry is None:
            add(name, 0o040755)
        elif isinstance(entry, str):
            add(name, 0o120777, entry.removeprefix("-> ").encode())
        else:
            add(name, 0o100755, entry if isinstance(entry, bytes) else entry.read_bytes())
    add("dev/console", 0o020600, device=(5, 1))
    add("TRAILER!!!", 0)
    return bytes(out)


def ext4_image(files: Mapping[str, Entry], path: Path, size: int) -> None:
    """Write an ext4 file system of `size` bytes with `files` to `path`."""
    with tempfile.TemporaryDirectory() as scratch:
        for name, entry in files.items():
            target = Path(scratch) / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if entry is None:
                target.mkdir(exist_ok=True)
            elif isinstance(entry, str):
                target.symlink_to(entry.removeprefix("-> "))
            else:
                target.write_bytes(entry if isinstance(entry, bytes) else entry.read_bytes())
                target.chmod(0o755)
        with path.open("wb") as image:
            image.truncate(size)
        subprocess.run(["/sbin/mkfs.ext4", "-q", "-F", "-E", "root_owner=0:0", "-d", scratch, path],
                       check=True)
