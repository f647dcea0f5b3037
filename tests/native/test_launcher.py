"""The command `stratovirt`: it becomes the interpreter, with the right arguments."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.capabilities import require
from tests.support.test_vm import TestVm
from tests.support.tree import ROOT

pytestmark = pytest.mark.native

# Says its process id, on a line, and what it was started with.
SCRIPT = '#!/bin/sh\necho $$\nprintf "%s\\0" "$@"\n'


def build(target: Path, *flags: str) -> Path:
    require("gcc")
    target.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(["gcc", "-Wall", "-Wextra", "-Werror", *flags, "-o", str(target),
                    str(ROOT / "native/launcher/stratovirt.c")], check=True,
                   env={k: v for k, v in os.environ.items() if k != "LD_PRELOAD"})
    return target


def interpreter(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(SCRIPT)
    path.chmod(0o755)
    return path


def start(command: Path, *arguments: str) -> tuple[int, int, list[str]]:
    """The pid of what was started, that of what it became, its arguments."""
    process = subprocess.Popen([command, *arguments], stdout=subprocess.PIPE, text=True)
    text, _ = process.communicate(timeout=20)
    pid, _, words = text.partition("\n")
    return process.pid, int(pid), words.split("\0")[:-1]


def test_from_a_source_tree(tmp_path: Path) -> None:
    python = interpreter(tmp_path / "python")
    command = build(tmp_path / "stratovirt", f'-DSV_PYTHON="{python}"', '-DSV_PATHS="/a:/b"')
    started, became, arguments = start(command, "-m", "512", "-S")
    assert became == started  # no process in between
    assert arguments[:3] == ["-I", "-S", "-c"]
    assert arguments[4:] == ["/a:/b", "-m", "512", "-S"]


def test_from_an_environment(tmp_path: Path) -> None:
    """Interpreter and modules are those beside the command, through links too."""
    site = tmp_path / "env/lib/python3.11/site-packages"
    site.mkdir(parents=True)
    interpreter(tmp_path / "env/bin/python3")
    build(tmp_path / "env/bin/stratovirt")
    (tmp_path / "link").symlink_to(tmp_path / "env/bin/stratovirt")
    _, _, arguments = start(tmp_path / "link", "-version")
    assert arguments[:3] == ["-I", "-S", "-c"]
    assert arguments[4:] == [str(site), "-version"]


def test_an_environment_that_is_not_whole(tmp_path: Path) -> None:
    command = build(tmp_path / "env/bin/stratovirt")
    done = subprocess.run([command], capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 1 and "site-packages" in done.stderr and "reinstall" in done.stderr
    (tmp_path / "env/lib/python3.11/site-packages").mkdir(parents=True)
    done = subprocess.run([command], capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 1 and "env/bin/python3" in done.stderr


def test_the_command_of_the_source_tree(tmp_path: Path) -> None:
    """What `./dev which` prints: the process that is started is the interpreter itself."""
    if "STRATOVIRT" not in os.environ:
        pytest.skip("no command was built: ./dev test builds it")
    with TestVm(tmp_path, "-machine", "none", serial=False) as vm:
        assert vm.qmp.command("query-status")
        process = Path(f"/proc/{vm.process.pid}")
        arguments = process.joinpath("cmdline").read_bytes().split(b"\0")
        assert arguments[1:3] == [b"-I", b"-S"]
        assert process.joinpath("exe").resolve() == Path(sys.executable).resolve()
