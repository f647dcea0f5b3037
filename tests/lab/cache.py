"""The lab's cache: what is slow to make (kernels, images, a booted machine), made once.

It lives in ${XDG_CACHE_HOME:-~/.cache}/stratovmm.  An entry's name ends in a key over everything
it was made from, so a change of an input makes a new entry and never meets a stale one.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

KEEP_SECONDS = 14 * 86400


def cache_dir() -> Path:
    """The cache's folder, created if needed."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    path = Path(base) / "stratovmm"
    path.mkdir(parents=True, exist_ok=True)
    return path


def key_of(*parts: bytes | str | Path) -> str:
    """Twelve hex digits over `parts`; a Path stands for the content of its file."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.read_bytes() if isinstance(part, Path) else part
        raw = data.encode() if isinstance(data, str) else data
        digest.update(len(raw).to_bytes(8, "little") + raw)
    return digest.hexdigest()[:12]


@contextmanager
def locked(name: str) -> Iterator[None]:
    """Holds the cache's lock `name` against other processes."""
    with (cache_dir() / f".{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def obtain(name: str, key: str, make: Callable[[Path], None]) -> Path:
    """The folder `name-key`; `make(folder)` fills it the first time, atomically.

    Entries of the same name that nobody used for two weeks are removed.
    """
    target = cache_dir() / f"{name}-{key}"
    if target.is_dir():
        os.utime(target)
        return target
    with locked(name):
        if target.is_dir():
            return target
        scratch = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=cache_dir()))
        try:
            make(scratch)
            scratch.chmod(0o755)
            scratch.rename(target)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        _remove_old(name, target)
    return target


def _remove_old(name: str, keep: Path) -> None:
    for path in cache_dir().glob(f"{name}-*"):
        suffix = path.name[len(name) + 1 :]
        if path == keep or len(suffix) != 12 or not path.is_dir():
            continue
        if time.time() - path.stat().st_mtime > KEEP_SECONDS:
            shutil.rmtree(path, ignore_errors=True)
