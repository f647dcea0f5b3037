"""Debian packages without installing them: downloaded by apt, unpacked into a folder."""

from __future__ import annotations

import re
import subprocess
import tempfile
import time
from pathlib import Path

from tests.lab import cache

ENVIRONMENT = {"LC_ALL": "C", "PATH": "/usr/bin:/bin"}


class PackageError(RuntimeError):
    """A package can't be had; the text says which and what apt answered."""


def download(name: str) -> Path:
    """The .deb of the newest version of `name` that apt knows, from the cache if it is there."""
    folder = cache.cache_dir() / "packages"
    folder.mkdir(exist_ok=True)
    with cache.locked("packages"):
        version = candidate(name)
        found = sorted(folder.glob(f"{name}_{version.replace(':', '%3a')}_*.deb"))
        if found:
            return found[0]
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            Path(scratch).chmod(0o755)
            result = _apt(["apt-get", "download", name], scratch)
            if result.returncode:
                subprocess.run(["apt-get", "update", "-q"], capture_output=True, check=False)
                result = _apt(["apt-get", "download", name], scratch)
            files = sorted(Path(scratch).glob("*.deb"))
            if result.returncode or not files:
                raise PackageError(f"the package {name} can't be downloaded: "
                                   f"{result.stderr.strip() or 'no file came'}; "
                                   f"try `apt-get update`")
            return files[0].rename(folder / files[0].name)


def candidate(name: str) -> str:
    """The version of `name` that apt would install; asked once a day."""
    memory = cache.cache_dir() / f"candidate-{name}"
    if memory.exists() and time.time() - memory.stat().st_mtime < 86400:
        return memory.read_text()
    for attempt in range(2):
        result = subprocess.run(["apt-cache", "policy", name], capture_output=True, text=True,
                                check=False, env=ENVIRONMENT)
        match = re.search(r"Candidate: (\S+)", result.stdout)
        if match and match[1] != "(none)":
            memory.write_text(match[1])
            return match[1]
        if not attempt:
            subprocess.run(["apt-get", "update", "-q"], capture_output=True, check=False)
    raise PackageError(f"apt knows no package {name}; this needs Debian 12's package lists")


def dependency(name: str, pattern: str) -> str:
    """The first package that `name` depends on and whose name matches `pattern`."""
    candidate(name)
    result = subprocess.run(["apt-cache", "depends", name], capture_output=True, text=True,
                            check=False, env=ENVIRONMENT)
    for line in result.stdout.splitlines():
        match = re.fullmatch(rf"\s*Depends: ({pattern})", line)
        if match:
            return match[1]
    raise PackageError(f"{name} depends on nothing like {pattern}")


def unpack(package: Path, folder: Path) -> Path:
    """Unpacks a .deb into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["dpkg-deb", "-x", package, folder], check=True)
    return folder


def _apt(command: list[str], folder: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
