"""The log: StratoVirt's line form, one line a call, rotation, and what must never stop a VM."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared import log

LINE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}: \[\d+\]\[\d+\]\[test_log\.py:\d+\]:"
                  r"(ERROR|WARN|INFO|DEBUG): (.*)\n")


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    state = log._Log()
    monkeypatch.setattr(log, "_log", state)
    monkeypatch.delenv("STRATOVIRT_LOG_LEVEL", raising=False)
    yield
    if state.fd > 2:
        os.close(state.fd)


def lines(path: Path) -> list[tuple[str, str]]:
    text = path.read_text()
    found = [match.groups() for match in LINE.finditer(text)]
    assert len(found) == text.count("\n")
    return found  # type: ignore[return-value]


def everything() -> None:
    log.error("e")
    log.warning("w")
    log.info("i")
    log.debug("d")


@pytest.mark.parametrize(("level", "wanted"), [
    ("error", "E"), ("warn", "EW"), ("info", "EWI"), ("debug", "EWID"), ("trace", "EWID"),
    ("DEBUG", "EWID"), ("nonsense", "EWI"), (None, "EWI"),
])
def test_levels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, level: str | None,
                wanted: str) -> None:
    if level is not None:
        monkeypatch.setenv("STRATOVIRT_LOG_LEVEL", level)
    log.open_log(str(tmp_path / "log"))
    everything()
    assert "".join(name[0] for name, _ in lines(tmp_path / "log")) == wanted


def test_without_a_log_warnings_go_to_standard_error(capfd: pytest.CaptureFixture[str]) -> None:
    log.open_log(None)
    everything()
    out, err = capfd.readouterr()
    assert out == "" and [m[1] for m in LINE.finditer(err)] == ["ERROR", "WARN"]


def test_to_standard_output(capfd: pytest.CaptureFixture[str]) -> None:
    log.open_log("")
    everything()
    out, err = capfd.readouterr()
    assert err == "" and [m[2] for m in LINE.finditer(out)] == ["e", "w", "i"]


def test_a_file_is_appended_to(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("older\n")
    log.open_log(str(path))
    log.info("newer")
    assert path.read_text().startswith("older\n") and path.read_text().endswith("newer\n")


def test_a_file_that_cannot_be_had(tmp_path: Path) -> None:
    with pytest.raises(log.LogError, match=re.escape(str(tmp_path / "no"))):
        log.open_log(str(tmp_path / "no" / "log"))


@pytest.mark.parametrize("text", [
    "two\nlines", "a\rcarriage", "\x1b[2Jescape", "nul\0", "bell\a", "\x85next line",
    "\u2028separator", "\x9bcsi", "\udc80surrogate",
])
def test_nobody_forges_a_line(tmp_path: Path, text: str) -> None:
    """Guests and peers choose parts of texts."""
    log.open_log(str(tmp_path / "log"))
    log.error(text)
    (_, written), = lines(tmp_path / "log")
    assert written.isprintable()


def test_long_texts_are_cut(tmp_path: Path) -> None:
    log.open_log(str(tmp_path / "log"))
    log.error("x" * 100_000)
    assert (tmp_path / "log").stat().st_size < log.MAX_TEXT + 200


def test_rotation_keeps_seven_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "ROTATE_SIZE", 1000)
    log.open_log(str(tmp_path / "log"))
    for number in range(200):
        log.info(f"line {number}")
    assert sorted(os.listdir(tmp_path)) == ["log", *(f"log{n}" for n in range(1, 7))]
    newest = lines(tmp_path / "log") or lines(tmp_path / "log1")
    assert newest[-1][1] == "line 199"
    assert all((tmp_path / name).stat().st_size < 1200 for name in os.listdir(tmp_path))


def test_a_pipe_that_nobody_reads_stops_nobody(tmp_path: Path) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        log.open_log(str(path))
        for _ in range(100):
            log.error("x" * 4000)
    finally:
        os.close(reader)
    log.error("nobody is there any more")


def test_an_exception_is_one_line(tmp_path: Path) -> None:
    log.open_log(str(tmp_path / "log"))
    try:
        raise ValueError("two\nlines")
    except ValueError as error:
        log.exception("while testing", error)
    (level, text), = lines(tmp_path / "log")
    assert level == "ERROR" and "while testing" in text and "ValueError: two lines" in text
