"""Chardevs on sockets: server, client, inherited, one client at a time."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING

import pytest

from shared.errors import StratovirtError
from vmm.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

    from tests.unit.vmm.chardev.conftest import Rig


def connect(path: str) -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(5)
    client.connect(path)
    return client


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "c.sock")


def test_a_server_serves_one_after_the_other(rig: Rig, path: str) -> None:
    chardev = rig.make("socket", path=path, server=True)
    assert chardev.filename() == f"disconnected:unix:{path},server=on"
    assert chardev.write(b"nobody is there") == 15
    first, second = connect(path), connect(path)
    rig.run_until(lambda: chardev.connected)
    assert chardev.filename() == f"unix:{path},server=on"
    assert chardev.write(b"hello") == 5
    assert first.recv(99) == b"hello"
    first.send(b"input")
    rig.run_until(lambda: rig.received == b"input")
    first.close()
    rig.run_until(lambda: not chardev.connected)
    rig.run_until(lambda: chardev.connected)
    chardev.write(b"next")
    assert second.recv(99) == b"next"
    second.close()
    rig.run_until(lambda: not chardev.connected)
    chardev.close()
    assert not os.path.exists(path)


def test_who_comes_and_leaves_is_told(rig: Rig, path: str) -> None:
    chardev = rig.make("socket", path=path, server=True)
    seen: list[bool] = []
    chardev.on_connection = lambda: seen.append(chardev.connected)
    for _ in range(2):
        client = connect(path)
        rig.run_until(lambda: chardev.connected)
        client.close()
        rig.run_until(lambda: not chardev.connected)
    assert seen == [True, False, True, False]


def test_input_that_is_not_taken_waits(rig: Rig, path: str) -> None:
    rig.room = 3
    chardev = rig.make("socket", path=path, server=True)
    with connect(path) as client:
        rig.run_until(lambda: chardev.connected)
        client.send(b"abcdef")
        rig.run_until(lambda: rig.received == b"abc")
        client.send(b"ghi")
        assert rig.is_idle()  # it isn't even read
        rig.room = 100
        chardev.resume_input()
        rig.run_until(lambda: rig.received == b"abcdefghi")


def test_a_client_that_doesnt_read_holds_output_back(rig: Rig, path: str) -> None:
    chardev = rig.make("socket", path=path, server=True)
    told = []
    chardev.on_writable = lambda: told.append(1)
    with connect(path) as client:
        rig.run_until(lambda: chardev.connected)
        block = bytes(65536)
        sent = 0
        while (count := chardev.write(block)) == len(block):
            sent += count
        sent += count
        rig.step()
        assert not told and rig.is_idle()
        got = 0
        while got < sent:
            got += len(client.recv(1 << 20))
        rig.run_until(lambda: told)


@pytest.mark.parametrize("blocked", [False, True])
def test_a_client_that_vanishes_frees_the_frontend(rig: Rig, path: str, blocked: bool) -> None:
    chardev = rig.make("socket", path=path, server=True)
    told = []
    chardev.on_writable = lambda: told.append(chardev.write(b"x"))
    client = connect(path)
    rig.run_until(lambda: chardev.connected)
    while blocked and chardev.write(bytes(65536)) == 65536:
        pass
    client.close()
    rig.run_until(lambda: not chardev.connected)
    assert told or not blocked
    assert chardev.write(b"dropped") == 7
    rig.step()
    assert rig.is_idle()


def test_a_client_of_ours(rig: Rig, path: str) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        chardev = rig.make("socket", path=path)
        peer, _ = listener.accept()
        with peer:
            chardev.write(b"hi")
            assert peer.recv(9) == b"hi"
        rig.run_until(lambda: not chardev.connected)
    assert chardev.filename() == f"disconnected:unix:{path}"
    assert os.path.exists(path)  # not ours


def test_tcp(rig: Rig) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        chardev = rig.make("socket", host="127.0.0.1", port=port)
        peer, _ = listener.accept()
        peer.close()
    assert chardev.filename() == f"tcp:127.0.0.1:{port}"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = rig.make("socket", host="127.0.0.1", port=port, server=True)
    with socket.create_connection(("127.0.0.1", port), 5):
        rig.run_until(lambda: server.connected)


def test_inherited_sockets(rig: Rig, path: str) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    server = rig.make("socket", fd=listener.detach(), server=True)
    with connect(path):
        rig.run_until(lambda: server.connected)
    ours, theirs = socket.socketpair()
    fd = ours.detach()
    os.set_inheritable(fd, True)
    client = rig.make("socket", fd=fd)
    assert not os.get_inheritable(fd)
    client.write(b"x")
    assert theirs.recv(9) == b"x"
    theirs.close()


@pytest.mark.parametrize("server", [False, True])
def test_descriptors_that_are_no_such_socket(rig: Rig, server: bool) -> None:
    reader, writer = os.pipe()
    a, b = socket.socketpair()
    listener = socket.create_server(("127.0.0.1", 0))
    wrong = a if server else listener
    for fd in (999_999, reader, wrong.fileno()):
        with pytest.raises(ConfigError, match=f"descriptor {fd} ") as caught:
            rig.make("socket", fd=fd, server=server)
        assert "id=c0" in caught.value.what
    for fd in (reader, writer):
        os.close(fd)
    for sock in (a, b, listener):
        sock.close()


@pytest.mark.parametrize("where", [
    {"path": "/no/such"}, {"path": "/no/such", "server": True}, {"path": "/dev/null"},
    {"host": "127.0.0.1", "port": 1}, {"host": "256.0.0.1", "port": 1, "server": True},
    {"host": "x" * 70, "port": 1}, {"path": "/dev/null", "server": True}])
def test_addresses_that_cant_be_had(rig: Rig, where: dict[str, object]) -> None:
    with pytest.raises(StratovirtError) as caught:
        rig.make("socket", **where)
    assert caught.value.hint


def test_no_descriptors_left_is_no_busy_loop(rig: Rig, path: str,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmm.chardev.socket.ACCEPT_PAUSE", 0.01)
    chardev = rig.make("socket", path=path, server=True)
    real = chardev._listener  # type: ignore[attr-defined]

    class Exhausted:
        def fileno(self) -> int:
            return int(real.fileno())

        def _accept(self) -> object:
            raise OSError(24, "Too many open files")

    chardev._listener = Exhausted()  # type: ignore[attr-defined]
    with connect(path):
        rig.step()
        assert rig.is_idle() and not chardev.connected
        chardev._listener = real  # type: ignore[attr-defined]
        rig.run_until(lambda: chardev.connected)
