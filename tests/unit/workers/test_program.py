"""What workers that run alone have in common: options, numbers, their socket."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path

import pytest

from shared.errors import StratovirtError
from workers.blk.program import BlkProgram
from workers.errors import UsageError
from workers.net.program import NetProgram
from workers.program import Program, connect, number, split
from workers.rng.program import RngProgram


def test_both_forms_of_an_option() -> None:
    assert list(split(["--fd=3", "--name", "x", "--help"], ["help"])) == [
        ("fd", "3"), ("name", "x"), ("help", "")]
    assert list(split(["--text=a=b", "--empty="], [])) == [("text", "a=b"), ("empty", "")]


@pytest.mark.parametrize("arguments", [["fd=3"], ["-f", "3"], ["--fd"], [""]])
def test_what_is_no_option(arguments: list[str]) -> None:
    with pytest.raises(UsageError):
        list(split(arguments, ["help"]))


def test_numbers() -> None:
    assert number("n", "0", 0, 10) == 0
    assert number("n", "10", 0, 10) == 10
    assert number("n", "007", 1, 10) == 7


@pytest.mark.parametrize("text", ["", "-1", "+1", " 1", "1 ", "1_0", "0x1", "11", "1e1", "\u0661",
                                  "9" * 5000, "0" * 20 + "99", "1.0"])
def test_numbers_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="--n="):
        number("n", text, 0, 10)


NEEDED = {BlkProgram: ["--blk-file=x"], NetProgram: ["--tap=x"], RngProgram: []}


@pytest.mark.parametrize("program", NEEDED)
def test_what_all_command_lines_have(program: type[Program]) -> None:
    parsed = program()
    parsed.parse([*NEEDED[program], "--fd=3", "--queue-size", "64", "--sandbox=on,seccomp=off"])
    assert (parsed.fd, parsed.socket_path, parsed.queue_size, parsed.sandbox_off,
            parsed.action) == (3, "", 64, frozenset({"seccomp"}), "serve")
    for option in ("help", "print-capabilities"):
        asked = program()
        asked.parse([f"--{option}", "nonsense"])
        assert asked.action == option


@pytest.mark.parametrize("program", NEEDED)
@pytest.mark.parametrize("wrong", [
    ["--fd=3", "--socket-path=x"], [], ["--fd=-1"], ["--fd=1048577"], ["--fd=3", "--queue-size=3"],
    ["--fd=3", "--queue-size=1"], ["--fd=3", "--queue-size=2048"], ["--fd=3", "--sandbox=maybe"],
    ["--fd=3", "--other=1"]])
def test_what_no_command_line_has(program: type[Program], wrong: list[str]) -> None:
    with pytest.raises(StratovirtError):
        program().parse([*NEEDED[program], *wrong])


@pytest.mark.parametrize(("arguments", "expected"), [
    (["--read-only"], True), (["--read-only=on"], True), (["--read-only=off"], False), ([], False)])
def test_a_flag_with_a_value_or_none(arguments: list[str], expected: bool) -> None:
    program = BlkProgram()
    program.parse(["--fd=3", "--blk-file=x", *arguments])
    assert program.read_only is expected


@pytest.mark.parametrize("value", ["9" * 19, "1" + "0" * 12 + "x", "-1", ""])
def test_a_limit_beyond_all_numbers(value: str) -> None:
    with pytest.raises(UsageError, match="--throttling"):
        BlkProgram().parse(["--fd=3", "--blk-file=x", f"--throttling.bps-total={value}"])


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
