"""Builds the small guest kernel from Debian's package linux-source-6.1: minutes, once.

No Debian kernel runs the manual's own command line (virtio drivers are modules, and
`virtio_mmio.device=` is compiled out), so this one has them built in; it boots with ACPI and with
`acpi=off`.  Three forms of the same kernel: `vmlinux` (ELF with a PVH note), `bzImage` and `raw`
(a flat image, loaded and entered at 16 MiB).

    python -m tests.lab.small_kernel        builds it, prints the folder
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.lab import cache
from tests.lab.packages import download, unpack

SOURCE = "linux-source-6.1"
CONFIG = Path(__file__).with_name("small-kernel.config")
FORMS = ("vmlinux", "bzImage", "raw")


def small_kernel() -> dict[str, Path]:
    """The three forms by name, built if they are not cached."""
    folder = cache.obtain("small-kernel", cache.key_of(CONFIG, SOURCE, "1"), _build)
    return {form: folder / form for form in FORMS}


def is_built() -> bool:
    """Whether `small_kernel()` would return at once."""
    return (cache.cache_dir() / f"small-kernel-{cache.key_of(CONFIG, SOURCE, '1')}").is_dir()


def _source_archive(scratch: Path) -> Path:
    installed = Path(f"/usr/src/{SOURCE}.tar.xz")
    if installed.exists():
        return installed
    unpack(download(SOURCE), scratch / "package")
    return scratch / "package" / installed.relative_to("/")


def _build(folder: Path) -> None:
    print("lab: building the small kernel, about 5 minutes", file=sys.stderr, flush=True)
    work = folder / "work"
    work.mkdir()
    archive = _source_archive(work)
    subprocess.run(["tar", "-xf", archive, "-C", work, "--exclude=*/Documentation/*/*",
                    "--exclude=*/drivers/gpu/drm/amd/include/*"], check=True)
    tree = work / SOURCE
    env = dict(os.environ, KBUILD_BUILD_USER="lab", KBUILD_BUILD_HOST="lab",
               KBUILD_BUILD_TIMESTAMP="2024-01-01")
    log = cache.cache_dir() / "small-kernel.log"
    with log.open("wb") as output:
        for command in (
            ["make", "tinyconfig"],
            ["scripts/kconfig/merge_config.sh", "-m", ".config", str(CONFIG)],
            ["make", "olddefconfig"],
            ["nice", "-n", "19", "make", f"-j{os.cpu_count()}", "vmlinux", "bzImage"],
        ):
            result = subprocess.run(command, cwd=tree, env=env, stdout=output, check=False,
                                    stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
            if result.returncode:
                raise RuntimeError(f"the small kernel can't be built: `{' '.join(command)}` "
                                   f"failed, see {log}")
    subprocess.run(["objcopy", "-S", tree / "vmlinux", folder / "vmlinux"], check=True)
    subprocess.run(["objcopy", "-O", "binary", tree / "vmlinux", folder / "raw"], check=True)
    shutil.copy(tree / "arch/x86/boot/bzImage", folder / "bzImage")
    shutil.copy(tree / ".config", folder / "config")
    shutil.rmtree(work)


if __name__ == "__main__":
    print(small_kernel()["vmlinux"].parent)
