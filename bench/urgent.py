"""A control group whose processes go before all others: figures on a machine that isn't quiet."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from bench.report import BenchError

if TYPE_CHECKING:
    from collections.abc import Iterator

# Where groups are made, the file with their weight, its highest value: first and second version.
KINDS = ((Path("/sys/fs/cgroup/cpu"), "cpu.shares", "262144"),
         (Path("/sys/fs/cgroup"), "cpu.weight", "10000"))


@contextlib.contextmanager
def group() -> Iterator[str]:
    """The folder of the group; whoever is written into its cgroup.procs is in it.

    :raises BenchError: there are none, or this isn't root.
    """
    parent, name, value = next((kind for kind in KINDS if (kind[0] / "cgroup.procs").exists()),
                               KINDS[0])
    folder = parent / f"bench-{os.getpid()}"
    try:
        folder.mkdir()
        (folder / name).write_text(value)
    except OSError as error:
        with contextlib.suppress(OSError):
            folder.rmdir()
        raise BenchError(f"--urgent: {folder}: {error.strerror}") from error
    try:
        yield str(folder)
    finally:
        deadline = time.monotonic() + 5
        while True:  # it can be removed when its last process is gone
            try:
                folder.rmdir()
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)
