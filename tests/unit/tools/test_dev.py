"""./dev: its commands, and what it says where it can't go on."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.support.tree import ROOT

sys.path.insert(0, str(ROOT / "tools/dev"))
import install

COMMANDS = ("demo", "test", "lint", "bench", "fuzz", "lab", "which", "help")


def dev(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([ROOT / "dev", *arguments], capture_output=True, text=True, check=False,
                          timeout=60, cwd="/")


def test_help_lists_every_command() -> None:
    done = dev("help")
    assert done.returncode == 0
    assert all(f"\n  {command} " in done.stdout for command in COMMANDS)


def test_an_unknown_command() -> None:
    done = dev("tset")
    assert done.returncode == 2
    assert "'tset'" in done.stderr and "./dev help" in done.stderr


def test_without_root_it_prints_the_line_to_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install, "_installed", lambda package: package == "gcc")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(install.DevError, match=r"run: sudo apt-get install -y .*python3-venv"):
        install.packages("lab")


def test_another_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install, "_installed", lambda package: False)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(install.shutil, "which", lambda name: None)
    with pytest.raises(install.DevError, match=r"no Debian.*liburing-dev"):
        install.packages()


def test_nothing_is_installed_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install, "_installed", lambda package: True)
    monkeypatch.setattr(install, "run", lambda *a, **k: pytest.fail("ran something"))
    install.packages("lab", "test", "small-kernel")


def test_progress_is_not_an_answer(capsys: pytest.CaptureFixture[str]) -> None:
    install.say("working")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "dev: working\n")


def test_a_failed_command_is_named() -> None:
    with pytest.raises(install.DevError, match=r"failed \(1\): false"):
        install.run(["false"])
