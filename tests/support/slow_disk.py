"""A slow disk: a loop device whose requests the kernel holds back, for the processes of one VM.

The kernel's own throttling (cgroup `blkio`, or `io` of version 2) keeps a request in a queue until
its turn comes, also when the process that made it has died: what a slow disk does.
"""

from __future__ import annotations

import os
import subprocess
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

_V1 = Path("/sys/fs/cgroup/blkio")
_V2 = Path("/sys/fs/cgroup")


def missing() -> str:
    """Why there are no slow disks here; "" if there are."""
    if os.geteuid() != 0:
        return "not root"
    if not os.path.exists("/dev/loop-control"):
        return "no loop devices"
    if _is_v2() or os.access(_V1 / "blkio.throttle.write_iops_device", os.F_OK):
        return ""
    # At the root there are no limits: try below it.
    try:
        probe = _V1 / f"sv-probe-{uuid.uuid4().hex[:8]}"
        probe.mkdir()
    except OSError:
        return "no cgroup that throttles block devices"
    found = (probe / "blkio.throttle.write_iops_device").exists()
    probe.rmdir()
    return "" if found else "the kernel can't throttle block devices"


def _is_v2() -> bool:
    try:
        return "io" in (_V2 / "cgroup.subtree_control").read_text().split()
    except OSError:
        return False


class SlowDisk:
    """`with`: `path` is a block device over `image`; `hold_back` makes it slow for processes.

    :param requests: reads and writes, each, a second.
    """

    def __init__(self, image: Path, requests: int) -> None:
        self._image = image
        self._requests = requests
        self.path = ""
        self._group = (_V2 if _is_v2() else _V1) / f"sv-slow-{uuid.uuid4().hex[:8]}"

    def __enter__(self) -> SlowDisk:
        self.path = subprocess.run(
            ["losetup", "--show", "--direct-io=on", "-f", str(self._image)],
            check=True, capture_output=True, text=True).stdout.strip()
        try:
            self._group.mkdir()
            number = os.stat(self.path).st_rdev
            device = f"{os.major(number)}:{os.minor(number)}"
            if _is_v2():
                self._write("io.max", f"{device} riops={self._requests} wiops={self._requests}")
            else:
                for way in ("read", "write"):
                    self._write(f"blkio.throttle.{way}_iops_device", f"{device} {self._requests}")
        except BaseException:
            self._end()
            raise
        return self

    def _write(self, name: str, text: str) -> None:
        (self._group / name).write_text(text)

    def hold_back(self, pids: Iterable[int]) -> None:
        """These processes, and those that they will start, find the disk slow."""
        for pid in pids:
            self._write("cgroup.procs", str(pid))

    def __exit__(self, *exc: object) -> None:
        self._end()

    def _end(self) -> None:
        # Who is killed stays a member until the last request has ended.
        deadline = time.monotonic() + 10
        while self._group.exists():
            try:
                self._group.rmdir()
            except OSError:
                if time.monotonic() > deadline:
                    break
                time.sleep(0.02)
        subprocess.run(["losetup", "-d", self.path], check=True)
