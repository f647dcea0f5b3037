"""A live upgrade runs the code that is on disk by then, not what the VM was started with."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.test_vm import LAUNCH, ROOT, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support.test_vm import TestVm

    Start = Callable[..., TestVm]

pytestmark = pytest.mark.vm

OLD = 'self.engine = choose_engine(text("blk", options, "aio", "auto"))'
NEW = 'self.engine = choose_engine("threads")'


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the product, to be changed."""
    for name in ("vmm", "workers", "shared", "native"):
        shutil.copytree(ROOT / name, tmp_path / "tree" / name,
                        ignore=shutil.ignore_patterns("__pycache__", "*.c", "*.h", "*.bundle"))
    return tmp_path / "tree"


def engine(vm: TestVm) -> str:
    worker = vm.qmp.command("query-workers")[0]
    return f"{worker['state']} {worker['engine']}"


def test_the_next_worker_has_the_new_code(start_vm: Start, tree: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk.img"
    disk.write_bytes(bytes(1 << 20))
    site = next(path for path in sys.path if path.endswith("site-packages"))
    vm = start_vm(disks=(f"{disk},direct=off",), command=[
        os.path.realpath(sys.executable), "-I", "-S", "-c", LAUNCH, f"{tree}:{site}"])
    assert vm.guest("blk.stress 0 0 256 2 8").ok
    wait_until(lambda: engine(vm) == "running io_uring", "the first worker")
    service = tree / "workers/blk/service.py"
    assert OLD in service.read_text()
    service.write_text(service.read_text().replace(OLD, NEW))
    vm.qmp.command("worker-restart", device="blk0")
    assert engine(vm) == "running threads"
    assert vm.guest("blk.stress 0 0 256 2 8").ok
    # Code that can't run: the old worker goes on, and the command says why.
    service.write_text("this is not Python\n")
    reply = vm.qmp.raw('{"execute":"worker-restart","arguments":{"device":"blk0"}}', timeout=30)
    assert reply["error"]["desc"]
    assert engine(vm) == "running threads"
    assert vm.guest("blk.stress 0 0 256 2 8").ok
