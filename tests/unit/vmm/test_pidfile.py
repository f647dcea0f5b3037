"""The pidfile: a dead one is replaced, a living one refused, another's never removed."""

from __future__ import annotations

import os
import subprocess
from typing import TYPE_CHECKING

import pytest

from vmm.cleanup import Cleanup
from vmm.daemonize import write_pidfile
from vmm.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path


def dead_pid() -> int:
    with subprocess.Popen(["true"]) as process:
        process.wait()
    return process.pid


def test_it_holds_the_pid_and_goes(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    remove = write_pidfile(str(path))
    assert path.read_text() == str(os.getpid())
    assert path.stat().st_mode & 0o777 == 0o600
    remove()
    assert not path.exists()
    remove()


def test_a_relative_path_is_removed_from_anywhere(tmp_path: Path,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    remove = write_pidfile("pid")
    monkeypatch.chdir("/")
    remove()
    assert not os.listdir(tmp_path)


def test_one_of_a_dead_process_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    path.write_text(f"{dead_pid()}\n")
    write_pidfile(str(path))()
    assert not path.exists()


@pytest.mark.parametrize("text", [str(os.getpid()), "1", "", "nonsense", "9" * 30])
def test_another_ones_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "pid"
    path.write_text(text)
    with pytest.raises(ConfigError, match="Pidfile path is existed yet"):
        write_pidfile(str(path))
    assert path.read_text() == text


@pytest.mark.parametrize("path", ["/no/such/pid", "/proc"])
def test_a_path_that_cant_be_written(path: str) -> None:
    with pytest.raises(ConfigError, match=f"-pidfile {path}: "):
        write_pidfile(path)


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(ConfigError, match="No space left"):
        write_pidfile(str(tmp_path / "pid"))
    assert not os.listdir(tmp_path)


def test_the_file_of_somebody_else_stays(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    remove = write_pidfile(str(path))
    (tmp_path / "new").write_text("4711")
    os.replace(tmp_path / "new", path)
    remove()
    assert path.read_text() == "4711"


def test_cleaning_up_is_last_in_first_out_and_goes_on(capfd: pytest.CaptureFixture[str]) -> None:
    done: list[int] = []
    cleanup = Cleanup()
    cleanup.push(lambda: done.append(1))
    cleanup.push(lambda: 1 // 0)
    cleanup.push(lambda: done.append(2))
    cleanup.run()
    cleanup.run()
    assert done == [2, 1]
    assert "while cleaning up" in capfd.readouterr().err
