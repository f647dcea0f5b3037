"""The log: line form, levels, one line whatever the text, rotation, and no blocking."""

from __future__ import annotations

import os
import posix
import re
import sys
import threading
from typing import TYPE_CHECKING

import pytest

from shared import log

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

LINE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}: \[\d+\]\[\d+\]\[[\w.]+:\d+\]:"
                  r"(ERROR|WARN|INFO|DEBUG): .*")


@pytest.fixture(autouse=True)
def own_log(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A log of this test's own."""
    monkeypatch.delitem(posix.environ, b"STRATOVIRT_LOG_LEVEL", raising=False)
    mine = log._Log()
    monkeypatch.setattr(log, "_log", mine)
    yield
    if mine.fd > 2:
        os.close(mine.fd)


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


def test_the_form_of_a_line(tmp_path: Path) -> None:
    path = tmp_path / "log"
    log.open_log(str(path))
    log.error("one")
    log.warning("two")
    log.info("three")
    log.debug("four")
    found = lines(path)
    assert [line.split(":")[-1].strip() for line in found] == ["one", "two", "three"]
    for line in found:
        assert LINE.fullmatch(line)
        assert f"[{os.getpid()}][{threading.get_native_id()}][test_log.py:" in line
    assert path.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize(("level", "count"), [("error", 1), ("warn", 2), ("info", 3), ("INFO", 3),
                                              ("debug", 4), ("trace", 4), ("nonsense", 3)])
def test_levels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, level: str, count: int) -> None:
    monkeypatch.setitem(posix.environ, b"STRATOVIRT_LOG_LEVEL", level.encode())
    log.open_log(str(tmp_path / "log"))
    for write in (log.error, log.warning, log.info, log.debug):
        write("x")
    assert len(lines(tmp_path / "log")) == count


def test_without_a_log_warnings_go_to_standard_error(capfd: pytest.CaptureFixture[str]) -> None:
    log.open_log(None)
    assert log.on_standard_error()
    log.info("quiet")
    log.warning("loud")
    text = capfd.readouterr()
    assert text.out == "" and "loud" in text.err and "quiet" not in text.err


def test_to_standard_output(capfd: pytest.CaptureFixture[str]) -> None:
    log.open_log("")
    assert not log.on_standard_error()
    log.info("for Kata")
    assert ":INFO: for Kata\n" in capfd.readouterr().out


def test_one_call_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "log"
    log.open_log(str(path))
    log.info("a\nb\tc\x1b[31m\x00\x7f\r\u2028 d\udcff\ud800")
    log.info("y" * 20000)
    found = lines(path)
    assert len(found) == 2
    assert found[0].endswith("a b c\\x1b[31m\\x00\\x7f\\x0d\\x2028 d\\xdcff\\xd800")
    assert len(found[1]) < 9000


def test_a_defects_trace_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "log"
    log.open_log(str(path))
    try:
        raise ZeroDivisionError("a\nb")
    except ZeroDivisionError as error:
        log.exception("while dividing", error)
    (line,) = lines(path)
    assert "while dividing" in line and "test_log.py" in line and "ZeroDivisionError" in line


def test_a_trace_when_nothing_can_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch
                                            ) -> None:
    """What has gone wrong may be that there are no descriptors left, not even for a module."""
    path = tmp_path / "log"
    log.open_log(str(path))
    monkeypatch.setitem(sys.modules, "traceback", None)
    try:
        raise OSError(24, "Too many open files")
    except OSError as error:
        log.exception("while opening", error)
    (line,) = lines(path)
    assert "while opening" in line and "test_log.py:" in line and "Too many open files" in line


def test_files_are_appended_to(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("before\n")
    log.open_log(str(path))
    log.info("after")
    assert lines(path)[0] == "before" and len(lines(path)) == 2


def test_rotation_keeps_seven(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "ROTATE_SIZE", 50)
    path = tmp_path / "log"
    log.open_log(str(path))
    for number in range(12):
        log.info(f"line {number}")
    names = sorted(os.listdir(tmp_path))
    assert names == ["log", *(f"log{n}" for n in range(1, 7))]
    assert path.read_text() == ""
    for number in range(1, 7):
        assert f"line {12 - number}" in (tmp_path / f"log{number}").read_text()


def test_a_rotation_that_fails_loses_no_line_and_no_descriptor(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "ROTATE_SIZE", 50)
    folder = tmp_path / "f"
    folder.mkdir()
    log.open_log(str(folder / "log"))
    fd = log._log.fd
    folder.rename(tmp_path / "g")
    log.info("one")
    log.info("two")
    assert log._log.fd == fd  # never the number of somebody else's file
    assert len(lines(tmp_path / "g" / "log")) == 2


def test_what_is_no_file_is_not_rotated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "ROTATE_SIZE", 10)
    path = tmp_path / "log"
    path.symlink_to("/dev/null")
    log.open_log(str(path))
    for _ in range(5):
        log.info("x" * 100)
    assert path.is_symlink() and os.listdir(tmp_path) == ["log"]


def test_a_pipe_that_nobody_reads_stops_nobody(tmp_path: Path) -> None:
    path = str(tmp_path / "pipe")
    os.mkfifo(path)
    with pytest.raises(log.LogError):
        log.open_log(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    log.open_log(path)
    for _ in range(100):
        log.info("x" * 4000)
    os.close(reader)
    log.info("nobody is there any more")


def test_a_full_standard_output_stops_nobody() -> None:
    reader, writer = os.pipe()
    saved = os.dup(1)
    os.dup2(writer, 1)
    try:
        log.open_log("")
        for _ in range(100):
            log.info("x" * 4000)
        assert os.get_blocking(1)  # it is shared with others
    finally:
        os.dup2(saved, 1)
        for fd in (saved, reader, writer):
            os.close(fd)


@pytest.mark.parametrize("path", ["/no/such/folder/log", "/proc", "a\0b"])
def test_a_log_that_cant_be_had(path: str) -> None:
    with pytest.raises(log.LogError) as caught:
        log.open_log(path)
    assert f"-D {path}" in caught.value.what and caught.value.hint
    log.warning("goes on where it was")


def test_an_error_for_the_user_is_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    log.print_error("a\nb")
    assert capfd.readouterr().err == "stratovirt: a b\n"
