"""Who may import whom: native <- shared <- {vmm, workers}; no worker knows another."""

from __future__ import annotations

import ast
import re
import sys
from typing import TYPE_CHECKING

from tests.support import tree

if TYPE_CHECKING:
    from collections.abc import Iterator

# Folder -> what of the project, and of PyPI, its modules may import besides themselves.
PYTHON = {
    "shared": {"native._sandbox", "cbor2"},
    "vmm": {"shared", "native._core", "native._sandbox", "cbor2", "posix_ipc", "pyroute2"},
    # A client: it has nothing of the VMM's.
    "vmm/ctl": {"shared", "rich"},
    "workers": {"shared", "native._devices", "native._sandbox", "cbor2", "posix_ipc"},
    "workers/blk": {"shared", "native._dataplane", "native._sandbox", "cbor2", "posix_ipc"},
    "workers/net": {"shared", "native._net", "native._sandbox", "cbor2", "posix_ipc"},
    "workers/console": {"shared", "native._devices", "native._sandbox", "cbor2", "posix_ipc"},
    "workers/rng": {"shared", "native._devices", "native._sandbox", "cbor2", "posix_ipc"},
    # Data planes of the others, on an image of no bytes, on no tap, without ports.
    "workers/null": {"shared", "native._dataplane", "native._sandbox", "cbor2",
                     "workers.balloon.device", "workers.blk.device", "workers.blk.disk",
                     "workers.console.device", "workers.net.device"},
    "workers/balloon": {"shared", "native._devices", "native._sandbox"},
    "native": {"cffi"},
}
# What every worker may import of workers/.
COMMON = {f"workers.{path.stem}" for path in (tree.ROOT / "workers").glob("*.py")}

# What the nursery imports of each, before it clones.
ENTRY = re.compile(r"workers\.\w+\.worker")
# What each worker's folder has; the second set where it is a program of its own, too.
WORKER_FILES = {"__init__.py", "__main__.py", "worker.py", "device.py", "seccomp.policy",
                "README.md"}
PROGRAM_FILES = WORKER_FILES | {"program.py", "service.py"}

# Folder of native/ -> folders whose headers its sources may include besides its own.
C = {
    "include": set(),
    "core": {"include"},
    "virtq": {"include"},
    "uring": {"include"},
    "blk": {"include", "virtq", "uring", "dataplane"},
    "dataplane": {"include", "virtq", "uring", "blk"},
    "limit": {"include"},
    "net": {"include", "virtq", "limit"},
    "ring": {"include", "virtq"},
    "rng": {"include", "virtq", "ring", "limit"},
    "console": {"include", "virtq", "ring"},
    "balloon": {"include", "virtq", "ring"},
    "devices": {"ring", "rng", "console", "balloon"},
    "sandbox": {"include"},
}


def imported(name: str) -> Iterator[str]:
    """What a Python file imports, as `module` or `package.module`."""
    for node in ast.walk(tree.parsed(name)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: a relative import"
            module = node.module or ""
            whole = module in ("native", "workers", "vmm", "shared")
            yield from (f"{module}.{alias.name}" if whole else module for alias in node.names)


def folder_of(name: str) -> str:
    """The row of PYTHON for a file."""
    parts = name.split("/")
    if (parts[0] == "workers" and len(parts) > 2) or parts[:2] == ["vmm", "ctl"]:
        return "/".join(parts[:2])
    return parts[0]


def allowed(module: str, folder: str) -> bool:
    top = module.split(".")[0]
    own = folder.replace("/", ".")
    if folder == "vmm" and (module + ".").startswith("vmm.ctl."):
        return False
    if (module == "native" or top in sys.stdlib_module_names or module == own
            or module.startswith(own + ".")):
        return folder != "workers" or top != "workers" or module in COMMON
    if folder.startswith("workers/") and module in COMMON:
        return True
    return any(module == entry or module.startswith(entry + ".") for entry in PYTHON[folder])


def test_python_layers() -> None:
    wrong = [f"{name} imports {module}"
             for name in tree.named(".py")
             if name.split("/")[0] in ("shared", "vmm", "workers", "native")
             for module in imported(name) if not allowed(module, folder_of(name))
             and not (name == "workers/nursery.py" and ENTRY.fullmatch(module))]
    assert not wrong


def test_every_worker_has_a_row() -> None:
    folders = {folder_of(name) for name in tree.named(".py", under="workers/")}
    assert folders <= set(PYTHON)


def test_workers_have_the_same_files() -> None:
    """Who knows one worker's folder knows all of them."""
    wrong = []
    for folder in PYTHON:
        if not folder.startswith("workers/"):
            continue
        found = {name.split("/")[-1] for name in tree.files() if name.startswith(folder + "/")}
        wanted = PROGRAM_FILES if "program.py" in found else WORKER_FILES
        if found and wanted - found:
            wrong.append(f"{folder} lacks {', '.join(sorted(wanted - found))}")
    assert not wrong


def test_c_layers() -> None:
    wrong = []
    for name in tree.named(".c", ".h", under="native/"):
        folder = name.split("/")[1]
        if folder in ("decl", "launcher"):
            continue
        for header in re.findall(r'^#include "(\S+)"', tree.text(name), re.MULTILINE):
            other = header.split("/")[0]
            if other != folder and other not in C[folder]:
                wrong.append(f"{name} includes {header}")
    assert not wrong


def test_the_tests_see_a_wrong_import() -> None:
    assert not allowed("workers.errors", "vmm")
    assert not allowed("vmm.errors", "workers/blk")
    assert not allowed("workers.net.device", "workers/blk")
    assert not allowed("workers.blk", "workers")
    assert not allowed("native._core", "workers/blk")
    assert not allowed("native._dataplane", "shared")
    assert not allowed("requests", "vmm")
    assert not allowed("vmm.errors", "vmm/ctl")
    assert not allowed("vmm.ctl.qmp", "vmm")
    assert allowed("shared.errors", "workers/blk") and allowed("workers.startup", "workers/blk")
