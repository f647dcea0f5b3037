"""What is loaded when the guest's first instruction may run, and when it has its devices."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from native import bundle
from tests.support.capabilities import require
from tests.support.guest import guest
from tests.support.test_vm import ROOT

pytestmark = pytest.mark.vm

# Each costs more than all of ours, or pulls in what does.
SLOW = {"_collections_abc", "argparse", "asyncio", "cbor2", "collections", "contextlib", "copy",
        "ctypes", "dataclasses", "enum", "functools", "inspect", "json", "logging", "os",
        "pathlib", "posix_ipc", "posixpath", "pyroute2", "random", "re", "selectors", "shutil",
        "signal", "socket", "stat", "struct", "subprocess", "tempfile", "threading", "traceback",
        "typing", "weakref"}

CODE = """
import sys
sys.path[:0] = sys.argv.pop(1).split(":")
import vmm.vm
from vmm.machine.machine import Machine

def run_early(self):
    print(*sorted(sys.modules), file=sys.stderr)

def start(self, machine):
    print(*sorted(sys.modules), file=sys.stderr)
    machine.open()
    self.loop.call_soon(self.quit)  # once the loop runs

Machine.run_early = run_early
vmm.vm.Vm.start = start
from vmm.__main__ import run
run()
"""


@pytest.mark.parametrize("serial", ["stdio", "pty", "file,path=con", "socket,path=c,server,nowait"])
def test_nothing_slow_is_loaded_before_the_guest_runs(tmp_path: Path, serial: str) -> None:
    require("kvm")
    (tmp_path / "disk").write_bytes(bytes(1 << 20))
    site = next(path for path in sys.path if path.endswith("site-packages"))
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", CODE, f"{ROOT}:{site}", "-machine", "microvm",
         "-m", "128", "-smp", "2", "-kernel", guest("guest.elf"), "-append", "script=poweroff",
         "-drive", f"id=d,file={tmp_path}/disk,direct=off",
         "-device", "virtio-blk-device,drive=d,id=b", "-serial", serial,
         "-qmp", f"unix:{tmp_path}/q,server,nowait", "-D", str(tmp_path / "log")],
        capture_output=True, text=True, timeout=30, check=False, stdin=subprocess.DEVNULL,
        cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    first, loaded = (set(line.split()) for line in done.stderr.splitlines())
    assert "vmm.machine.microvm" in first and "native._core" in first
    assert not loaded & SLOW
    assert not {name for name in loaded if name.startswith("vmm.qmp.commands")}
    if serial == "stdio":
        # Here no launcher has started the nursery before.
        assert bundled(site, 2) <= ours(first) <= bundled(site, 3)
        assert ours(loaded) == bundled(site, 4)


def ours(names: set[str]) -> set[str]:
    return {name for name in names if name.split(".")[0] in ("vmm", "shared")}


def bundled(site: str, groups: int) -> set[str]:
    """What native/bundle.py puts into the core's bundle: no more and no less than is needed."""
    modules = [module for group in bundle.BUNDLES["vmm"][:groups] for module in group]
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", f"import sys; sys.path[:0] = [{str(ROOT)!r}, {site!r}]\n"
         f"import {', '.join(modules)}\nprint(*sys.modules)"],
        capture_output=True, text=True, timeout=30, check=True)
    return ours(set(done.stdout.split()))
