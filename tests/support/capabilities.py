"""What this machine can do: `require("kvm")` skips a test, or fails it where it must run.

`STRATO_REQUIRE` is a comma list of names ("all" for every one): there a missing capability is a
failure, so that CI can't skip silently what it is there to check.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

_SYS_IO_URING_SETUP = 425
_SYS_LANDLOCK_CREATE_RULESET = 444


def _kvm() -> str:
    return "" if os.access("/dev/kvm", os.R_OK | os.W_OK) else "no access to /dev/kvm"


def _root() -> str:
    return "" if os.geteuid() == 0 else "not root"


def _io_uring() -> str:
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.syscall(_SYS_IO_URING_SETUP, 1, ctypes.create_string_buffer(120))
    if fd < 0:
        return f"io_uring_setup: {os.strerror(ctypes.get_errno())}"
    os.close(fd)
    return ""


def _landlock() -> str:
    libc = ctypes.CDLL(None, use_errno=True)
    version = libc.syscall(_SYS_LANDLOCK_CREATE_RULESET, None, 0, 1)
    return "" if version > 0 else "the kernel has no Landlock"


def _userns() -> str:
    done = subprocess.run(["unshare", "--user", "true"], capture_output=True, check=False)
    return "" if done.returncode == 0 else "no user namespaces"


def _net_admin() -> str:
    done = subprocess.run(["unshare", "--net", "true"], capture_output=True, check=False)
    return "" if done.returncode == 0 else "no network namespaces"


def _program(name: str) -> Callable[[], str]:
    return lambda: "" if shutil.which(name) else f"{name} is not installed"


# Debian 12's, of qemu-system-common; a package of its own from Debian 13 on.
VIRTIOFSD = next((path for path in ("/usr/lib/qemu/virtiofsd", "/usr/libexec/virtiofsd")
                  if os.access(path, os.X_OK)), "virtiofsd")


def _lab() -> str:
    return _program("qemu-system-x86_64")() or _program("busybox")()


def _hugepages() -> str:
    free = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")
    return "" if os.access(free, os.W_OK) else "huge pages can't be reserved"


def _huge_memfd() -> str:
    folder = Path("/sys/kernel/mm/transparent_hugepage")
    version = tuple(int(part) for part in os.uname().release.split(".")[:2])
    if version < (6, 1) or not folder.exists():
        return "no MADV_COLLAPSE for shared memory"
    if "[deny]" in (folder / "shmem_enabled").read_text():
        return "the host denies huge pages to shared memory"
    return ""


def _slow_disk() -> str:
    from tests.support import slow_disk

    return slow_disk.missing()


def _asan() -> str:
    done = subprocess.run(["gcc", "-print-file-name=libasan.so"], capture_output=True, text=True,
                          check=False)
    return "" if "/" in done.stdout else "no ASAN runtime"


PROBES: dict[str, Callable[[], str]] = {
    "kvm": _kvm,
    "root": _root,
    "io_uring": _io_uring,
    "landlock": _landlock,
    "userns": _userns,
    "net_admin": _net_admin,
    "qemu": _program("qemu-system-x86_64"),
    "strace": _program("strace"),
    "qemu-storage-daemon": _program("qemu-storage-daemon"),
    "lab": _lab,
    "virtiofsd": _program(VIRTIOFSD),
    "dpdk": _program("dpdk-testpmd"),
    "hugepages": _hugepages,
    "huge_memfd": _huge_memfd,
    "slow_disk": _slow_disk,
    "gcc": _program("gcc"),
    "clang": _program("clang"),
    "asan": _asan,
    "iasl": _program("iasl"),
}


@functools.cache
def missing(name: str) -> str:
    """Why the machine lacks a capability; "" if it has it."""
    return PROBES[name]()


def required(name: str) -> bool:
    """Whether this run must have it."""
    wanted = os.environ.get("STRATO_REQUIRE", "").split(",")
    return "all" in wanted or name in wanted


def require(name: str) -> None:
    """Skip the calling test, or fail it if this run must have the capability."""
    reason = missing(name)
    if not reason:
        return
    if required(name):
        pytest.fail(f"this run must have {name}: {reason}")
    pytest.skip(reason)
