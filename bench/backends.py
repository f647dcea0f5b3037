"""Block back ends side by side: the load generator, our worker, qemu-storage-daemon."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.report import ROOT, BenchError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

OUT = ROOT / "build/bench"
LIMIT = 120.0


def program(name: str) -> Path:
    """A program of bench/ in C, built if a source changed."""
    folders = [ROOT / "bench" / folder for folder in (name, "frontend")]
    sources = sorted(source for folder in folders for source in folder.glob("*.[ch]"))
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()
    built, stamp = OUT / name, OUT / f"{name}.key"
    if built.exists() and stamp.exists() and stamp.read_text() == digest:
        return built
    OUT.mkdir(parents=True, exist_ok=True)
    fresh = OUT / f"{name}.{os.getpid()}"
    subprocess.run(["gcc", "-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-D_GNU_SOURCE",
                    "-pthread", f"-I{ROOT / 'bench'}", "-o", fresh,
                    *[s for s in sources if s.suffix == ".c"]], check=True)
    fresh.rename(built)
    stamp.write_text(digest)
    return built


def loadgen() -> Path:
    """The load generator for disks."""
    return program("loadgen")


def prepare(image: Path, size: int, cached: bool) -> None:
    """Fill `image` with blocks that say who they are; wholly in the page cache, or not at all."""
    subprocess.run([loadgen(), "prepare", image, str(size), "1"], check=True)
    if not cached:
        with image.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def worker(socket: Path, image: Path, direct: bool) -> list[str]:
    """Our worker's command line, alone."""
    return [sys.executable, "-m", "workers.blk", f"--socket-path={socket}", f"--blk-file={image}",
            f"--direct={'on' if direct else 'off'}"]


def daemon(socket: Path, image: Path, direct: bool, aio: str = "io_uring") -> list[str]:
    """qemu-storage-daemon's command line at its best: io_uring, a thread of its own."""
    if shutil.which("qemu-storage-daemon") is None:
        raise BenchError("qemu-storage-daemon is not installed")
    return ["qemu-storage-daemon", "--blockdev",
            f"driver=file,filename={image},node-name=f,aio={aio},"
            f"cache.direct={'on' if direct else 'off'},discard=unmap",
            "--object", "iothread,id=io", "--export",
            f"type=vhost-user-blk,id=e,node-name=f,addr.type=unix,addr.path={socket},"
            "writable=on,iothread=io"]


RIVALS: dict[str, Callable[[Path, Path, bool], list[str]]] = {"worker": worker, "daemon": daemon}


def on(cpu: int) -> list[str]:
    """The beginning of a command line that runs on that CPU."""
    return ["taskset", "-c", str(cpu)]


def run(rival: str, image: Path, direct: bool, *options: str, pinned: bool = False
        ) -> dict[str, Any]:
    """Load a fresh back end with `options` of the generator; what the generator measured.

    :param pinned: generator on the first CPU, back end on the last.
    :raises BenchError: the run failed, or data came back wrong.
    """
    cpus = sorted(os.sched_getaffinity(0))
    pinned = pinned and len(cpus) > 1
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        socket = Path(folder) / "vhost"
        line = RIVALS[rival](socket, image, direct)
        backend = subprocess.Popen([*on(cpus[-1]), *line] if pinned else line, cwd=ROOT,
                                   stderr=subprocess.PIPE)
        try:
            if pinned:
                options = (*options, "--pin", str(cpus[0]))
            wait_socket(socket, backend)
            done = subprocess.run(
                [loadgen(), "run", "--socket", socket, "--pid", str(backend.pid), *options],
                capture_output=True, text=True, timeout=LIMIT, check=False)
        finally:
            errors = end(backend)
    if done.returncode:
        raise BenchError(f"{rival}: {done.stderr.strip()} {errors.strip()}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def end(backend: subprocess.Popen[bytes]) -> str:
    """What it said at its end; qemu-storage-daemon doesn't always take SIGTERM for an answer."""
    try:
        _, errors = backend.communicate(timeout=0.5)
    except subprocess.TimeoutExpired:
        backend.kill()
        _, errors = backend.communicate(timeout=20)
    return errors.decode(errors="replace")


def wait_socket(socket: Path, backend: subprocess.Popen[bytes]) -> None:
    """:raises BenchError: the back end ended, or took too long."""
    deadline = time.monotonic() + 20
    while not socket.exists():
        if backend.poll() is not None or time.monotonic() > deadline:
            raise BenchError(f"the back end didn't start: {backend.args}")
        time.sleep(0.002)


SPIN = "import os; os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))\nwhile 1: pass"


@contextlib.contextmanager
def awake() -> Iterator[None]:
    """No CPU halts meanwhile: to wake a halted virtual CPU costs 20-30 µs, more than a request.

    The spinners have the idle priority: they run when nothing else wants to.
    """
    spinners = [subprocess.Popen([*on(cpu), sys.executable, "-I", "-S", "-c", SPIN])
                for cpu in os.sched_getaffinity(0)]
    try:
        yield
    finally:
        for spinner in spinners:
            spinner.kill()
            spinner.wait()
