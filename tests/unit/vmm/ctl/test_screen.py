"""Keys of `top`, and the terminal that is as it was afterwards."""

from __future__ import annotations

import os
import re
import signal
import termios
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.ctl import Terminal
from tests.support.patience import PATIENT
from tests.support.test_vm import wait_until
from vmm.ctl.screen import next_action

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(("typed", "actions"), [
    (b"", []), (b"q", ["quit"]), (b"sp", ["sort", "processes"]), (b"xyzs", ["sort"]),
    (b"\x1b[A\x1b[B\x1bOA", ["up", "down", "up"]), (b"\x1b[5~\x1b[6~", ["page-up", "page-down"]),
    (b"\x1b[1;5Cq", ["quit"]),             # Ctrl-Right, of which no part is a key of ours
    (b"\x1b[200~pasted", ["processes", "sort"]), (b"\x1bs", ["sort"]), (b"\x1b", []),
    (b"\xc3\xa9s", ["sort"]), (b"\x1b[\xffp", ["processes"])])
def test_keys(typed: bytes, actions: list[str]) -> None:
    found = []
    while typed:
        action, typed = next_action(typed)
        found += [action] if action else []
    assert found == actions


@PATIENT
@given(st.binary())
def test_any_keys(typed: bytes) -> None:
    while typed:
        _, rest = next_action(typed)
        assert len(rest) < len(typed)
        typed = rest


def settings(terminal: Terminal) -> list[object]:
    return list(termios.tcgetattr(terminal.follower))


def seen(terminal: Terminal) -> str:
    """The last frame, without what steers the terminal."""
    terminal.shows(b"x")
    last = terminal.output.rpartition(b"\x1b[H")[2].decode(errors="replace")
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", last)


def test_keys_on_a_terminal(tmp_path: Path) -> None:
    with Terminal("top", "--run-dir", tmp_path, "-i", "600") as terminal:
        before = settings(terminal)
        terminal.wait_for(b"s sort: name")
        wait_until(lambda: settings(terminal) != before, "keys")
        terminal.type(b"s")
        terminal.wait_for(b"s sort: cpu")
        terminal.type(b"sss")
        terminal.wait_for(b"s sort: name")
        terminal.type(b"q")
        assert terminal.wait() == 0
        assert settings(terminal) == before
        assert terminal.output.count(b"\x1b[?1049h") == terminal.output.count(b"\x1b[?1049l") == 1
        assert b"\x1b[?25h" in terminal.output  # the cursor is seen again


@pytest.mark.parametrize(("number", "status"), [
    (signal.SIGINT, 0), (signal.SIGTERM, 128 + signal.SIGTERM),
    (signal.SIGHUP, 128 + signal.SIGHUP)])
def test_however_it_ends_the_terminal_is_as_it_was(tmp_path: Path, number: int,
                                                   status: int) -> None:
    with Terminal("top", "--run-dir", tmp_path, "-i", "600") as terminal:
        before = settings(terminal)
        terminal.wait_for(b"q quit")
        wait_until(lambda: settings(terminal) != before, "keys")
        os.kill(terminal.process.pid, number)
        assert terminal.wait() == status
        assert settings(terminal) == before
        assert b"\x1b[?1049l" in terminal.output and b"Traceback" not in terminal.output


def test_a_terminal_that_changes_its_size(tmp_path: Path) -> None:
    with Terminal("top", "--run-dir", tmp_path, "-i", "600") as terminal:
        terminal.wait_for(b"every 600 s")
        termios.tcsetwinsize(terminal.follower, (10, 30))
        os.kill(terminal.process.pid, signal.SIGWINCH)
        wait_until(lambda: len(seen(terminal).splitlines()) == 10, "the new size")
        assert max(map(len, seen(terminal).splitlines())) <= 30
        terminal.type(b"\x1b[B\x1b[6~gq")
        assert terminal.wait() == 0


def test_a_dumb_terminal_gets_lines(tmp_path: Path) -> None:
    with Terminal("top", "--run-dir", tmp_path, "-i", "0.1", TERM="dumb") as terminal:
        terminal.wait_for(b"GUEST RAM")
        terminal.wait_for(b"GUEST RAM")
        os.kill(terminal.process.pid, signal.SIGINT)
        assert terminal.wait() == 0
        assert b"\x1b[?1049h" not in terminal.output
