"""The wheel: what it holds, and that it works in an environment of its own."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest

from tests.support import tree
from tests.support.capabilities import require
from tests.support.guest import SECTOR, crc32, guest
from tests.support.test_vm import TestVm

pytestmark = [
    pytest.mark.native,
    pytest.mark.skipif("SV_NATIVE" in os.environ, reason="nothing of it is sanitized"),
]

CACHE = tree.ROOT / "build/package"
PACKAGED = ("vmm/", "workers/", "shared/", "native/", "setup.py", "pyproject.toml", "MANIFEST.in",
            "README.md")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this tree, built once for the same sources."""
    names = [name for name in tree.files() if name.startswith(PACKAGED)]
    digest = hashlib.sha256()
    source = tmp_path_factory.mktemp("source")
    for name in names:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(tree.ROOT / name, source / name)
        digest.update(f"{name}\0".encode() + (source / name).read_bytes())
    folder = CACHE / digest.hexdigest()[:16]
    if not list(folder.glob("*.whl")):
        shutil.rmtree(CACHE, ignore_errors=True)
        pip("wheel", str(source), "--no-build-isolation", "--no-deps", "--wheel-dir", str(folder))
    return next(folder.glob("*.whl"))


def pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "-q", "--disable-pip-version-check",
                    "--no-cache-dir", *arguments], check=True, timeout=240, cwd="/",
                   env={**os.environ, "PIP_NO_INDEX": "1"})


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with the wheel in it; what it depends on is copied from ours."""
    prefix = tmp_path_factory.mktemp("environment") / "venv"
    interpreter = os.path.realpath(sys.executable)
    subprocess.run([interpreter, "-m", "venv", "--without-pip", str(prefix)], check=True)
    python = prefix / "bin/python3"
    pip("--python", str(python), "install", "--no-deps", str(wheel))
    site = prefix / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages"
    project = tomllib.loads(tree.text("pyproject.toml"))["project"]
    for requirement in project["dependencies"]:
        name = requirement.split(">")[0]
        for file in importlib.metadata.files(name) or ():
            target = site / file
            if file.parts[0] != ".." and file.suffix != ".pyc":
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file.locate(), target)
    return prefix


def test_what_the_wheel_holds(wheel: Path) -> None:
    held = set(zipfile.ZipFile(wheel).namelist())
    modules = [name for name in tree.named(".py") if name.split("/")[0] in
               ("vmm", "workers", "shared", "native")]
    compiled = [f"{os.path.dirname(name)}/__pycache__/{Path(name).stem}."
                f"{sys.implementation.cache_tag}.pyc" for name in modules]
    native = [f"native/_{name}.abi3.so" for name in ("core", "dataplane", "net", "devices",
                                                         "sandbox")]
    data = tree.named(".policy", ".json", under="workers/")
    launcher = f"{wheel.name.rsplit('-', 3)[0]}.data/data/bin/stratovirt"
    assert not {*modules, *compiled, *native, *data, launcher} - held
    assert not [name for name in held if name.endswith((".c", ".h", ".md"))]
    assert not [name for name in held if name.split("/")[0] in ("tests", "bench", "tools")]


def test_the_command_answers(installed: Path) -> None:
    command = installed / "bin/stratovirt"
    done = subprocess.run([command, "-version"], capture_output=True, text=True, timeout=30,
                          check=True, cwd="/", env={})
    assert done.stdout.startswith("StratoVirt ")


def test_it_is_found_through_a_link(installed: Path, tmp_path: Path) -> None:
    """As pipx puts it on the path."""
    (tmp_path / "stratovirt").symlink_to(installed / "bin/stratovirt")
    subprocess.run([tmp_path / "stratovirt", "-help"], capture_output=True, timeout=30,
                   check=True, env={})


def test_a_guest_with_a_disk(installed: Path, tmp_path: Path) -> None:
    """Core, nursery and worker come from the environment, not from the source tree."""
    require("kvm")
    disk = tmp_path / "disk.img"
    disk.write_bytes(os.urandom(1 << 20))
    with TestVm(tmp_path, "-machine", "microvm", "-m", "128", "-kernel", guest("guest.elf"),
                "-drive", f"id=d0,file={disk},direct=off",
                "-device", "virtio-blk-device,drive=d0,id=blk0",
                command=[str(installed / "bin/stratovirt")],
                environment={"PATH": "/usr/bin:/bin"}) as vm:
        sectors = (1 << 20) // SECTOR
        assert vm.guest(f"blk.read 0 0 {sectors}").value("crc") == crc32(disk, 0, sectors)
        worker, = vm.qmp.command("query-workers")
        assert worker["state"] == "running"
        for pid in vm.processes():
            mapped = Path(f"/proc/{pid}/maps").read_text()
            assert str(installed) in mapped
            assert str(tree.ROOT) not in mapped
        vm.qmp.command("quit")
        assert vm.wait() == 0


def test_nothing_is_compiled_when_it_starts(installed: Path) -> None:
    """Every module that the command loads has its compiled file."""
    before = {path: path.stat().st_mtime_ns for path in installed.rglob("*.pyc")}
    subprocess.run([installed / "bin/stratovirt", "-help"], capture_output=True, timeout=30,
                   check=True, env={})
    assert {path: path.stat().st_mtime_ns for path in installed.rglob("*.pyc")} == before
