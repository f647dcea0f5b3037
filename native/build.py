"""Builds the native modules (cffi API mode) and the launcher.

    python native/build.py [--out DIR] [--sanitize] [MODULE ...]

Each module has its cffi declarations in `native/decl/NAME.h`, one public C header
`native/NAME/NAME.h`, and its sources in the folders that the table below names.  Modules are
split by who may link them: a worker can't even link KVM code.

    _core       vmm/ only: KVM run loop, UART, virtio registers, guest memory
    _dataplane  workers: virtqueues, io_uring, block requests
    _net        the net worker: frames between virtqueues and a tap
    _devices    workers of small devices: one thread for all virtqueues of a device
    _sandbox    everyone: clone, pidfd, prctl, close_range, later the sandbox's stages

`--sanitize` builds with ASAN and UBSAN (run with LD_PRELOAD of libasan, see ./dev test).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from cffi import FFI

ROOT = Path(__file__).resolve().parent
WARNINGS = ["-std=gnu11", "-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter",
            "-Wno-missing-field-initializers", "-fvisibility=hidden"]
RELEASE = ["-O2", "-g", "-fstack-protector-strong", "-U_FORTIFY_SOURCE", "-D_FORTIFY_SOURCE=2"]
SANITIZE = ["-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined",
            "-fno-sanitize-recover=undefined"]


class Module(NamedTuple):
    """One native module: folders with its sources and the libraries it links."""

    folders: tuple[str, ...]
    libraries: tuple[str, ...]


MODULES = {
    "core": Module(("core",), ()),
    "dataplane": Module(("dataplane", "virtq", "uring", "blk"), ("uring",)),
    "net": Module(("net", "virtq", "limit"), ()),
    "devices": Module(("ring", "rng", "balloon", "console", "virtq", "limit"), ()),
    "sandbox": Module(("sandbox",), ("seccomp",)),
}


def sources(name: str) -> list[str]:
    """The C files of a module, relative to the project's root, sorted."""
    found = [p for d in MODULES[name].folders for p in sorted((ROOT / d).glob("*.c"))]
    return [str(p.relative_to(ROOT.parent)) for p in found]


def builder(name: str, sanitize: bool = False, root: str = "") -> FFI:
    """The cffi builder of one module; `root` is what paths are made relative to."""
    ffi = FFI()
    ffi.cdef((ROOT / "decl" / f"{name}.h").read_text())
    flags = SANITIZE if sanitize else RELEASE
    ffi.set_source(
        f"native._{name}",
        f'#include "{name}/{name}.h"',
        sources=[root + source for source in sources(name)],
        include_dirs=[root + "native"],
        libraries=list(MODULES[name].libraries),
        extra_compile_args=[*WARNINGS, *flags],
        extra_link_args=["-fsanitize=address,undefined"] if sanitize else [],
        define_macros=[("_GNU_SOURCE", "1")],
    )
    return ffi


def ffi_core() -> FFI:
    """For setuptools: the core's module."""
    return builder("core")


def ffi_dataplane() -> FFI:
    """For setuptools: the workers' data plane."""
    return builder("dataplane")


def ffi_net() -> FFI:
    """For setuptools: the net worker's data plane."""
    return builder("net")


def ffi_devices() -> FFI:
    """For setuptools: the data planes of small devices."""
    return builder("devices")


def ffi_sandbox() -> FFI:
    """For setuptools: system calls for sandboxes and processes."""
    return builder("sandbox")


def build_keeper(target: Path) -> None:
    """Compile the program that starts nurseries for a confined core (native/keeper/)."""
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_name(f"{target.name}.{os.getpid()}")
    subprocess.run(["cc", *WARNINGS, *RELEASE, "-D_GNU_SOURCE", "-Wl,-z,relro,-z,now", "-pie",
                    "-fPIE", "-o", str(fresh), str(ROOT / "keeper/keeper.c")], check=True)
    fresh.rename(target)


def main(arguments: list[str]) -> int:
    """Build the named modules (all by default) into --out (default: beside the sources).

    "keeper" is a name as well: of a program.
    """
    sanitize = "--sanitize" in arguments
    out = ROOT.parent
    if "--out" in arguments:
        at = arguments.index("--out")
        out = Path(arguments[at + 1]).resolve()
        del arguments[at:at + 2]
    names = [a for a in arguments if not a.startswith("--")] or [*MODULES, "keeper"]
    for name in names:
        if name == "keeper":
            build_keeper(out / "native" / "_keeper")
            print(f"built {out / 'native' / '_keeper'}")
            continue
        ffi = builder(name, sanitize, f"{ROOT.parent}/")
        # The C file and the objects go to the build folder, the module beside the package.
        work = ROOT.parent / "build" / ("asan" if sanitize else "release") / name
        work.mkdir(parents=True, exist_ok=True)
        built = Path(ffi.compile(tmpdir=str(work), target=f"_{name}.*", verbose=False))
        target = out / "native" / built.name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        target.write_bytes(built.read_bytes())
        print(f"built {target}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
