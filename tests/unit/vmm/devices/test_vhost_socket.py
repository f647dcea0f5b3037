"""Connecting to a foreign back end, in time or not at all."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

import pytest

from vmm.config.model import ChardevConfig
from vmm.devices import vhost_socket
from vmm.devices.vhost_user import connect_backend
from vmm.errors import ConfigError


def config(path: str = "", kind: str = "socket") -> ChardevConfig:
    result = ChardevConfig("c0", kind)
    result.path = path
    return result


def test_connects(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()
        fd = connect_backend(config(path))
        peer, _ = server.accept()
        os.write(fd, b"x")
        assert peer.recv(1) == b"x"
        assert not os.get_inheritable(fd)
        peer.close()
        os.close(fd)


@pytest.mark.parametrize("kind", ["stdio", "pty", "null", "file"])
def test_not_a_socket(kind: str) -> None:
    with pytest.raises(ConfigError, match=f"-chardev {kind},id=c0: a vhost-user device needs"):
        connect_backend(config(kind=kind))


def test_nobody_there(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    with pytest.raises(ConfigError, match=r"cannot connect to .*: No such file"):
        connect_backend(config(path))
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
    with pytest.raises(ConfigError, match="Connection refused"):
        connect_backend(config(path))


def test_a_path_too_long(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="too long"):
        connect_backend(config("/" + "x" * 200))


def test_a_server_where_that_is_allowed(tmp_path: Path) -> None:
    server = config(str(tmp_path / "s"))
    server.server = True
    with socket.socket(socket.AF_UNIX) as back_end:
        back_end.bind(server.path)
        back_end.listen()
        os.close(connect_backend(server, server_too=True))
    with pytest.raises(ConfigError, match="Connection refused"):
        connect_backend(server, server_too=True)


def test_server_tcp_and_nothing() -> None:
    server = config("/x")
    server.server = True
    with pytest.raises(ConfigError, match="remove server"):
        connect_backend(server)
    tcp = config()
    tcp.host, tcp.port = "127.0.0.1", 1
    with pytest.raises(ConfigError, match="use path="):
        connect_backend(tcp)


def test_a_listener_that_never_accepts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vhost_socket, "CONNECT_LIMIT", 0.1)
    path = str(tmp_path / "s")
    waiting = []
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen(0)
        begin = time.monotonic()
        with pytest.raises(ConfigError, match="does not accept connections"):
            for _ in range(10):
                waiting.append(connect_backend(config(path)))
        assert time.monotonic() - begin < 5
    for fd in waiting:
        os.close(fd)


def test_inherited_descriptors() -> None:
    ours, theirs = socket.socketpair()
    given = config()
    given.fd = ours.fileno()
    assert connect_backend(given) == ours.fileno()
    given.fd = os.eventfd(0)
    with pytest.raises(ConfigError, match="is not a socket"):
        connect_backend(given)
    os.close(given.fd)
    with pytest.raises(ConfigError, match="Bad file descriptor"):
        connect_backend(given)
    ours.close()
    theirs.close()
