"""Brings a machine to the state in which the project builds: packages, environment, modules.

Every step looks first and does nothing where nothing is to be done. What two of them at once
would spoil is done under a lock.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VENV = ROOT / ".venv"
BUILD = ROOT / "build"

# What each job needs from Debian; `build` is in all of them.
PACKAGES = {
    "build": ["gcc", "libc6-dev", "linux-libc-dev", "python3-dev", "python3-venv",
              "liburing-dev", "libseccomp-dev"],
    "lab": ["qemu-system-x86", "qemu-system-common", "busybox-static", "e2fsprogs", "cpio",
            "xz-utils", "zstd", "lz4"],
    "small-kernel": ["linux-source-6.1", "make", "flex", "bison", "bc", "libelf-dev",
                     "libssl-dev", "xz-utils", "cpio"],
    "fuzz": ["clang", "libclang-rt-14-dev"],
    "test": ["qemu-system-x86", "qemu-utils", "qemu-system-common", "procps", "util-linux",
             "acpica-tools", "git", "strace", "iproute2", "dpdk-dev"],  # dpdk-testpmd
}


class DevError(Exception):
    """Something that the user has to do; the text says what."""


def say(text: str) -> None:
    """One line of progress; standard output is for answers (`which`)."""
    print(f"dev: {text}", file=sys.stderr, flush=True)


def run(command: list[str], **options: object) -> None:
    """Run a command; :raises DevError: it failed."""
    done = subprocess.run(command, check=False, cwd=ROOT, **options)  # type: ignore[call-overload]
    if done.returncode:
        raise DevError(f"failed ({done.returncode}): {' '.join(command)}")


@contextlib.contextmanager
def lock(name: str) -> Iterator[None]:
    """Hold build/NAME.lock: one `./dev` at a time makes what has this name; others wait."""
    BUILD.mkdir(exist_ok=True)
    with (BUILD / f"{name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another ./dev, which makes the same ({name})")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def packages(*jobs: str) -> None:
    """Install the Debian packages of these jobs, if any is missing.

    :raises DevError: not root; the text is the line to run.
    """
    wanted = sorted({name for job in ("build", *jobs) for name in PACKAGES[job]})
    missing = [name for name in wanted if not _installed(name)]
    if not missing:
        return
    line = f"apt-get install -y --no-install-recommends {' '.join(missing)}"
    if os.geteuid() != 0:
        raise DevError(f"packages are missing; run: sudo {line}")
    if shutil.which("apt-get") is None:
        raise DevError(f"this is no Debian; install what these packages hold: {' '.join(missing)}")
    say(f"installing {len(missing)} packages: {' '.join(missing)}")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    run(["apt-get", "update", "-qq"], env=environment)
    run(["apt-get", "install", "-y", "-qq", "--no-install-recommends", *missing],
        env=environment, stdout=subprocess.DEVNULL)


def _installed(package: str) -> bool:
    done = subprocess.run(["dpkg-query", "-W", "-f", "${Status}", package],
                          capture_output=True, text=True, check=False)
    return done.stdout.startswith("install ok installed")


def python() -> Path:
    """The environment's interpreter, made and filled if need be.

    :raises DevError: it would have to be made in the place of a link.
    """
    path = VENV / "bin/python"
    stamp = VENV / "requirements.stamp"
    interpreter = os.path.realpath(sys.executable)
    key = "\n".join([interpreter, *requirements()])

    def fits() -> bool:
        return path.exists() and stamp.exists() and stamp.read_text() == key

    if fits():
        return path
    with lock("venv"):
        if fits():  # another ./dev has made it
            return path
        if VENV.is_symlink():
            raise DevError(f"{VENV} is a link to {os.readlink(VENV)}, which doesn't fit; to make "
                           "it anew would destroy what others may use: remove the link")
        say("making the virtual environment")
        run([interpreter, "-m", "venv", "--clear", str(VENV)])
        run([str(path), "-m", "pip", "install", "-q", "--disable-pip-version-check",
             *requirements()])
        stamp.write_text(key)
    return path


def fuzzer() -> None:
    """The guided fuzzer for Python: only looking for new inputs needs it, no test."""
    path = str(python())
    if subprocess.run([path, "-c", "import atheris"], check=False, capture_output=True).returncode:
        say("installing atheris")
        run([path, "-m", "pip", "install", "-q", "--disable-pip-version-check", "atheris"])


def requirements() -> list[str]:
    """What the project needs from PyPI, out of pyproject.toml."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    return [*project["build-system"]["requires"], *project["project"]["dependencies"],
            *project["project"]["optional-dependencies"]["dev"]]


def _digest(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(str(file.relative_to(ROOT)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def native(sanitize: bool = False) -> None:
    """Build the native modules that are older than their sources."""
    name = "native-asan" if sanitize else "native"
    stamp = BUILD / f"{name}.stamp"
    sources = [p for p in sorted((ROOT / "native").rglob("*"))
               if p.suffix in (".c", ".h") or p.name == "build.py"]
    key = _digest([p for p in sources if not p.name.startswith("_")])
    folder = BUILD / "asan" if sanitize else ROOT

    def fits() -> bool:
        built = all((folder / f"native/_{m}.so").exists()
                    for m in ("core", "dataplane", "net", "devices", "sandbox"))
        return built and stamp.exists() and stamp.read_text() == key

    if fits():
        return
    with lock(name):
        if fits():
            return
        say(f"building the native modules{' with ASAN and UBSAN' if sanitize else ''}")
        began = time.monotonic()
        extra = ["--sanitize", "--out", str(folder)] if sanitize else []
        run([str(python()), "native/build.py", *extra], stdout=subprocess.DEVNULL)
        stamp.write_text(key)
        say(f"built in {time.monotonic() - began:.0f} s")


def command() -> Path:
    """The `stratovirt` of this source tree, built if need be."""
    packages()
    python()
    native()
    target = BUILD / "bin/stratovirt"
    source = ROOT / "native/launcher/stratovirt.c"
    interpreter = os.path.realpath(VENV / "bin/python")
    site = next((VENV / "lib").glob("python3*/site-packages"))
    with lock("command"):
        if not target.exists() or target.stat().st_mtime < source.stat().st_mtime:
            target.parent.mkdir(parents=True, exist_ok=True)
            run(["gcc", "-O2", "-static-pie", "-Wall", "-Wextra", "-Werror",
                 f'-DSV_PYTHON="{interpreter}"', f'-DSV_PATHS="{ROOT}:{site}"',
                 "-o", str(target), str(source)])
        compile_modules()
    return target


def compile_modules() -> None:
    """Byte-compile, so that no start of the product compiles anything or looks for modules."""
    run([str(python()), "-m", "compileall", "-q", "vmm", "workers", "shared", "native"])
    run([str(python()), "native/bundle.py"], stdout=subprocess.DEVNULL)
