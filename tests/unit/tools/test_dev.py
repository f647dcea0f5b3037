"""./dev: its commands, and what it says where it can't go on."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

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


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """An empty source tree; the commands that were run in it, which make an interpreter."""
    ran: list[list[str]] = []

    def run(command: list[str], **options: Any) -> None:
        ran.append(command)
        if "venv" in command:
            (install.VENV / "bin").mkdir(parents=True, exist_ok=True)
            (install.VENV / "bin/python").touch()

    monkeypatch.setattr(install, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(install, "BUILD", tmp_path / "build")
    monkeypatch.setattr(install, "run", run)
    return ran


def test_the_environment_is_made_once(tree: list[list[str]]) -> None:
    assert install.python() == install.VENV / "bin/python"
    assert ["--clear" in command for command in tree] == [True, False]
    install.python()
    assert len(tree) == 2


def test_no_environment_is_made_through_a_link(tree: list[list[str]], tmp_path: Path) -> None:
    """`venv --clear` follows it, and would remove what is there."""
    (tmp_path / "theirs/bin").mkdir(parents=True)
    (tmp_path / "theirs/bin/python").touch()
    install.VENV.symlink_to("theirs")
    with pytest.raises(install.DevError, match=r"\.venv is a link to theirs.*remove the link"):
        install.python()
    assert not tree and (tmp_path / "theirs/bin/python").exists()


def test_an_environment_behind_a_link_is_used_if_it_fits(tree: list[list[str]], tmp_path: Path
                                                         ) -> None:
    install.python()
    install.VENV.rename(tmp_path / "theirs")
    install.VENV.symlink_to("theirs")
    install.python()
    assert len(tree) == 2


def test_two_at_once_make_one_environment(tree: list[list[str]], monkeypatch: pytest.MonkeyPatch
                                          ) -> None:
    told = threading.Event()
    monkeypatch.setattr(install, "say", lambda text: told.set())
    others = [threading.Thread(target=install.python) for _ in range(2)]
    with install.lock("venv"):
        others[0].start()
        assert told.wait(30), "it did not wait"
        assert not tree
        others[1].start()
    for other in others:
        other.join(30)
    assert len(tree) == 2
