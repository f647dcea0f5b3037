"""Numbers and texts for people."""

from __future__ import annotations

import io
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.patience import PATIENT
from vmm.ctl.output import (
    human_bytes,
    human_count,
    human_time,
    parse_bytes,
    print_json,
    print_table,
    printable,
)


@pytest.mark.parametrize(("value", "text"), [
    (0, "0 B"), (1, "1 B"), (999, "999 B"), (999.6, "1.0 KiB"), (1000, "1.0 KiB"),
    (1536, "1.5 KiB"), (99.94 * 1024, "99.9 KiB"), (99.96 * 1024, "100 KiB"),
    (1 << 20, "1.0 MiB"), (5 << 30, "5.0 GiB"), (1 << 63, "8.0 EiB"), (1 << 75, "32768 EiB")])
def test_bytes(value: float, text: str) -> None:
    assert human_bytes(value) == text


@pytest.mark.parametrize(("value", "text"), [
    (0, "0"), (0.4, "0"), (12.4, "12"), (999.4, "999"), (999.6, "1.0k"), (1500, "1.5k"),
    (99_960, "100k"), (1e6, "1.0M"), (1.5e15, "2P")])
def test_counts(value: float, text: str) -> None:
    assert human_count(value) == text


@pytest.mark.parametrize(("value", "text"), [
    (1, "1.0 ns"), (9.96, "10 ns"), (999.6, "1.0 µs"), (12_345, "12 µs"), (5e6, "5.0 ms"),
    (2.5e9, "2.5 s"), (1e12, "1000.0 s")])
def test_times(value: float, text: str) -> None:
    assert human_time(value) == text


@PATIENT
@given(st.floats(0, 2.0**70))
def test_no_number_is_wider_than_its_column(value: float) -> None:
    """The tables of `top` are made for it (vmm/ctl/draw.py)."""
    if value < 2.0**70 / 1024:
        assert len(human_bytes(value)) <= 8
    if value < 1e15:
        assert len(human_count(value)) <= 5
    if value < 9e11:
        assert len(human_time(value)) <= 7


@pytest.mark.parametrize(("text", "value"), [
    ("0", 0), ("1024", 1024), ("512M", 512 << 20), ("512m", 512 << 20), ("512MB", 512 << 20),
    ("512MiB", 512 << 20), ("2g", 2 << 30), ("1T", 1 << 40), (" 7k ", 7168), ("5b", 5),
    ("1.5G", 3 << 29), ("0.5k", 512), ("1.0", 1), ("0.3K", 307),
    (f"{(1 << 63) - 1}", (1 << 63) - 1)])
def test_sizes(text: str, value: int) -> None:
    assert parse_bytes(text) == value


@pytest.mark.parametrize("text", [
    "", "M", "-1", "+1", "1.", ".5G", "1.5", "1..5G", "1,5G", "0x10", "1e3", "1 2", "1P", "1bib",
    "1ib", "nan", "inf", "9" * 20, "8388608T", f"{1 << 63}", "١", "1.٥G", "1.5G5", "1_0"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match=r"size|large|whole"):
        parse_bytes(text)


@PATIENT
@given(st.text())
def test_any_text_is_a_size_or_refused(text: str) -> None:
    try:
        assert 0 <= parse_bytes(text) < 1 << 63
    except ValueError as error:
        assert str(error).isprintable()


def test_what_a_terminal_would_obey() -> None:
    assert printable("a\x1b[2Jb\nc\td\x00e\udcff\u202e") == "a?[2Jb?c?d?e??"
    assert printable(None) == "None"
    assert printable("x" * 2000) == "x" * 999 + "…"
    assert printable("🚀🚀", 2) == "🚀🚀"


def test_json_is_ascii_and_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"a": "é\n\udcff"})
    assert capsys.readouterr().out == '{"a": "\\u00e9\\n\\udcff"}\n'


def test_a_table_without_a_terminal_is_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.StringIO()
    monkeypatch.setattr("sys.stdout", written)
    long = "/" + "x" * 600
    print_table("the\x1btitle", ("NAME", ">SIZE"), [("a[bold]b:smile:", 1), (long, "running")])
    lines = written.getvalue().splitlines()
    assert lines[0] == "the?title"
    assert lines[1].split() == ["NAME", "SIZE"]
    assert lines[2].split() == ["a[bold]b:smile:", "1"]  # no mark-up of rich's
    assert long in lines[3]
    assert len(lines) == 4


def test_nothing_is_no_number() -> None:
    assert human_bytes(math.inf) == "inf EiB"  # and ends
