"""What workers that run alone have in common: options, numbers, their socket."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path

import pytest

from workers.errors import UsageError
from workers.program import connect, number, split


def test_both_forms_of_an_option() -> None:
    assert split(["--fd=3", "--name", "x", "--help"], ["help"]) == [
        ("fd", "3"), ("name", "x"), ("help", "")]
    assert split(["--text=a=b", "--empty="], []) == [("text", "a=b"), ("empty", "")]


@pytest.mark.parametrize("arguments", [["fd=3"], ["-f", "3"], ["--fd"], [""]])
def test_what_is_no_option(arguments: list[str]) -> None:
    with pytest.raises(UsageError):
        split(arguments, ["help"])


def test_numbers() -> None:
    assert number("n", "0", 0, 10) == 0
    assert number("n", "10", 0, 10) == 10
    assert number("n", "007", 1, 10) == 7


@pytest.mark.parametrize("text", ["", "-1", "+1", " 1", "1 ", "1_0", "0x1", "11", "1e1", "\u0661",
                                  "9" * 5000, "0" * 20 + "99", "1.0"])
def test_numbers_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="--n="):
        number("n", text, 0, 10)


def test_the_first_connection_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "s"
    got: list[int] = []
    server = threading.Thread(target=lambda: got.append(connect(str(path), -1)))
    server.start()
    peer = socket.socket(socket.AF_UNIX)
    while server.is_alive():
        try:
            peer.connect(str(path))
            break
        except OSError:
            os.sched_yield()
    server.join(10)
    assert not path.exists()
    peer.send(b"x")
    assert os.read(got[0], 1) == b"x"
    os.close(got[0])
    peer.close()


def test_a_connected_descriptor_is_kept() -> None:
    ours, theirs = socket.socketpair()
    fd = theirs.detach()
    assert connect("", fd) == fd
    os.close(fd)
    ours.close()


def test_a_listening_descriptor_accepts(tmp_path: Path) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "s"))
    listener.listen(1)
    peer = socket.socket(socket.AF_UNIX)
    peer.connect(str(tmp_path / "s"))
    fd = connect("", listener.detach())
    peer.send(b"x")
    assert os.read(fd, 1) == b"x"
    os.close(fd)
    peer.close()


def test_sockets_that_cannot_be_had(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--socket-path="):
        connect(str(tmp_path / "no" / "s"), -1)
    with pytest.raises(UsageError, match="--fd"):
        connect("", 12345)
    with open(os.devnull) as file, pytest.raises(UsageError, match="--fd"):
        connect("", os.dup(file.fileno()))
