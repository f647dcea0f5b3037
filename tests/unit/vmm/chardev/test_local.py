"""Chardevs on this host's own files: stdio, pty, file, log, null."""

from __future__ import annotations

import os
import pty
import termios
from typing import TYPE_CHECKING

import pytest

from shared import log
from vmm.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.unit.vmm.chardev.conftest import Rig

    Swap = Callable[[int, int], None]


@pytest.fixture
def swap() -> Iterator[Swap]:
    """`swap(fd, by)`: standard descriptor `fd` is another one until the test's end."""
    saved: list[tuple[int, int]] = []

    def exchange(fd: int, by: int) -> None:
        saved.append((fd, os.dup(fd)))
        os.dup2(by, fd)
        os.close(by)

    yield exchange
    for fd, old in reversed(saved):
        os.dup2(old, fd)
        os.close(old)


def test_stdio_on_pipes(rig: Rig, swap: Swap) -> None:
    their_in, our_in = os.pipe()
    our_out, their_out = os.pipe()
    swap(0, their_in)
    swap(1, their_out)
    chardev = rig.make("stdio")
    assert os.get_blocking(0) and os.get_blocking(1)  # they are shared with others
    os.write(our_in, b"typed")
    rig.run_until(lambda: rig.received == b"typed")
    assert chardev.write(b"shown") == 5
    assert os.read(our_out, 99) == b"shown"
    os.close(our_in)
    rig.run_until(lambda: chardev._in_fd < 0)  # input has ended, output goes on
    assert chardev.write(b"more") == 4
    assert os.read(our_out, 99) == b"more"
    os.close(our_out)
    assert chardev.write(b"nobody") == 6
    chardev.close()


@pytest.mark.parametrize("source", ["/dev/null", "pipe"])
def test_a_full_pipe_whose_reader_goes_away_is_no_busy_loop(rig: Rig, swap: Swap,
                                                            source: str) -> None:
    reader, writer = os.pipe()
    quiet, noisy = os.pipe()
    swap(0, os.open("/dev/null", os.O_RDONLY) if source != "pipe" else os.dup(quiet))
    swap(1, writer)
    chardev = rig.make("stdio")
    told: list[int] = []
    chardev.on_writable = lambda: told.append(chardev.write(b"x" * 10))
    while chardev.write(bytes(65536)):
        pass
    rig.step()
    assert not told and rig.is_idle()
    os.close(reader)
    rig.run_until(lambda: told)
    rig.step()
    assert told == [10] and rig.is_idle()
    chardev.close()
    os.close(quiet)
    os.close(noisy)


def test_stdio_on_files_and_null(rig: Rig, swap: Swap, tmp_path: Path) -> None:
    path = tmp_path / "out"
    swap(0, os.open("/dev/null", os.O_RDONLY))
    swap(1, os.open(path, os.O_WRONLY | os.O_CREAT))
    os.write(1, b"before ")
    chardev = rig.make("stdio")
    assert chardev.write(b"after") == 5
    rig.step()
    assert rig.is_idle()
    chardev.close()
    assert path.read_bytes() == b"before after"


def test_stdio_on_a_socket_leaves_it_as_it_was(rig: Rig, swap: Swap) -> None:
    import socket

    ours, theirs = socket.socketpair()
    swap(0, os.dup(theirs.fileno()))
    swap(1, theirs.detach())
    chardev = rig.make("stdio")
    ours.send(b"hello")
    rig.run_until(lambda: rig.received == b"hello")
    chardev.write(b"back")
    assert ours.recv(9) == b"back"
    chardev.close()
    assert os.get_blocking(0) and os.get_blocking(1)
    ours.close()


def test_a_terminal_is_raw_meanwhile(rig: Rig, swap: Swap) -> None:
    master, terminal = pty.openpty()
    before = termios.tcgetattr(terminal)
    swap(0, os.dup(terminal))
    swap(1, os.dup(terminal))
    chardev = rig.make("stdio")
    during = termios.tcgetattr(terminal)
    assert not during[3] & (termios.ICANON | termios.ECHO | termios.ISIG)
    assert during[1] & termios.OPOST
    os.write(master, b"\x03x")
    rig.run_until(lambda: rig.received == b"\x03x")
    chardev.close()
    assert termios.tcgetattr(terminal) == before
    os.close(master)
    os.close(terminal)


def test_pty(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmm.chardev.local._PTY_POLL", 0.005)
    chardev = rig.make("pty")
    path = chardev.filename().removeprefix("pty:")
    assert os.path.exists(path)
    assert chardev.write(b"nobody reads") == 12
    for turn in range(2):  # it may be opened again
        fd = os.open(path, os.O_RDWR | os.O_NOCTTY)
        rig.run_until(lambda: chardev.connected)
        chardev.write(b"out\n")
        assert os.read(fd, 99) == b"out\n"
        os.write(fd, b"in%d\n" % turn)
        rig.run_until(lambda turn=turn: rig.received.endswith(b"in%d\n" % turn))
        os.close(fd)
        rig.run_until(lambda: not chardev.connected)
        assert rig.is_idle()
    chardev.close()
    assert not os.path.exists(path)


def test_file(rig: Rig, tmp_path: Path) -> None:
    path = tmp_path / "console"
    path.write_text("of another life")
    chardev = rig.make("file", path=str(path))
    assert chardev.write(b"one\n") == 4
    assert chardev.filename() == f"file:{path}"
    assert path.read_bytes() == b"one\n"
    chardev.close()
    assert path.exists()


def test_a_full_disk_doesnt_stop_the_guest(rig: Rig) -> None:
    assert rig.make("file", path="/dev/full").write(b"lost") == 4


@pytest.mark.parametrize("path", ["/no/such/file", "/proc", "pipe"])
def test_a_file_that_cant_be_had(rig: Rig, tmp_path: Path, path: str) -> None:
    os.mkfifo(tmp_path / "pipe")  # without a reader: opening it would wait
    path = path if path[0] == "/" else str(tmp_path / path)
    with pytest.raises(ConfigError, match=f"id=c0,path={path}") as caught:
        rig.make("file", path=path)
    assert caught.value.hint


def test_null(rig: Rig) -> None:
    chardev = rig.make("null")
    assert chardev.write(b"gone") == 4 and not chardev.connected


def test_an_unknown_kind(rig: Rig) -> None:
    with pytest.raises(ConfigError, match="unknown kind"):
        rig.make("tty")


def test_lines_for_the_log(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[str] = []
    monkeypatch.setattr(log, "info", logged.append)
    chardev = rig.make("redirect-to-log")
    assert chardev.connected
    chardev.write(b"first\r\nsec")
    chardev.write(b"ond\n\xff\n")
    assert logged == ["console c0: first", "console c0: second", "console c0: \ufffd"]
    chardev.write(b"x" * 100_000)
    chardev.write(b"\n")
    assert len(logged[-1]) < 5000
