"""Listening sockets: stale ones are replaced, living ones are left alone, nothing leaks."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import tempfile
import threading
import time
from typing import TYPE_CHECKING

import pytest

from shared import unix_socket
from shared.unix_socket import AddressError, listen_tcp, listen_unix
from tests.support.capabilities import require

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(autouse=True)
def no_leaks() -> Iterator[None]:
    before = len(os.listdir("/proc/self/fd"))
    yield
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "q.sock")


def connects(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        try:
            client.connect(path)
        except OSError:
            return False
    return True


def test_listens_for_its_owner_alone(path: str) -> None:
    listener = listen_unix(path)
    try:
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
        assert not os.get_inheritable(listener.socket.fileno())
        assert connects(path)
    finally:
        listener.close()
    assert not os.path.exists(path)
    listener.close()


def test_the_umask_stays_as_it_is(path: str) -> None:
    before = os.umask(0o027)
    try:
        listen_unix(path).close()
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)


def test_a_stale_socket_is_replaced(path: str) -> None:
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(path)
    stale.close()
    listener = listen_unix(path)
    assert connects(path)
    listener.close()


def test_a_living_socket_is_refused_and_unhurt(path: str) -> None:
    first = listen_unix(path)
    with pytest.raises(AddressError, match="another process listens there"):
        listen_unix(path)
    assert connects(path)
    first.close()


def test_a_living_socket_with_a_full_backlog_is_refused(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as busy:
        busy.bind(path)
        busy.listen(0)
        clients = [socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
                   for _ in range(3)]
        for client in clients:
            client.connect_ex(path)
        with pytest.raises(AddressError, match="another process listens there"):
            listen_unix(path)
        for client in clients:
            client.close()
    assert os.path.exists(path)


def test_a_socket_of_another_type_is_refused(path: str) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.bind(path)
        with pytest.raises(AddressError, match="another process listens there"):
            listen_unix(path)


@pytest.mark.parametrize("make", [lambda p: p.write_text("mine"), lambda p: p.mkdir()])
def test_what_is_no_socket_is_left_alone(tmp_path: Path, make: object) -> None:
    path = tmp_path / "x"
    make(path)  # type: ignore[operator]
    with pytest.raises(AddressError, match="it exists and is not a socket"):
        listen_unix(str(path))
    assert path.exists()


@pytest.mark.parametrize("name", ["", "x" * 108, "a\0b", "no/such/folder/q.sock"])
def test_bad_paths(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AddressError) as caught:
        listen_unix(name)
    assert caught.value.hint


def test_a_path_of_full_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    listener = listen_unix("x" * 107)
    listener.close()
    assert not os.listdir(tmp_path)


def test_a_folder_that_cant_be_written(tmp_path: Path) -> None:
    with pytest.raises(AddressError, match=r"Can't listen on /proc/q\.sock"):
        listen_unix("/proc/q.sock")


def test_a_folder_that_cant_be_read() -> None:
    require("root")
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # where nobody may go
        os.chmod(folder, 0o333)
        os.seteuid(65534)
        try:
            listener = listen_unix(f"{folder}/q")
            assert os.path.exists(f"{folder}/q")
            listener.close()
        finally:
            os.seteuid(0)
        assert not os.listdir(folder)


def test_the_path_of_somebody_else_is_not_removed(path: str) -> None:
    first = listen_unix(path)
    os.unlink(path)  # as Kata does with the whole folder
    second = listen_unix(path)
    first.close()
    assert connects(path)
    second.close()


def test_a_relative_path_is_removed_from_anywhere(tmp_path: Path,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    listener = listen_unix("q")
    monkeypatch.chdir("/")
    listener.close()
    assert not os.listdir(tmp_path)


def test_a_lock_held_for_ever_doesnt_hold_us(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unix_socket, "LOCK_LIMIT", 0.02)
    fd = os.open(os.path.dirname(path), os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    listen_unix(path).close()
    os.close(fd)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EINTR])
def test_a_file_system_without_locks(path: str, monkeypatch: pytest.MonkeyPatch,
                                     number: int) -> None:
    def refuse(fd: int, operation: int) -> None:
        raise OSError(number, "no locks")

    monkeypatch.setattr(fcntl, "flock", refuse)
    listen_unix(path).close()


def test_two_starts_at_the_same_moment(path: str) -> None:
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(path)
    stale.close()
    results: list[object] = []
    barrier = threading.Barrier(4)

    def start() -> None:
        barrier.wait()
        try:
            results.append(listen_unix(path))
        except AddressError as error:
            results.append(error)

    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    listeners = [r for r in results if isinstance(r, unix_socket.UnixListener)]
    assert len(listeners) == 1 and len(results) == 4
    assert connects(path)
    listeners[0].close()


def test_tcp() -> None:
    sock = listen_tcp("127.0.0.1", 0)
    host, port = sock.getsockname()
    with socket.create_connection((host, port), 5):
        pass
    with pytest.raises(AddressError, match=f"{port}: Address already in use"):
        listen_tcp("127.0.0.1", port)
    sock.close()


@pytest.mark.parametrize(("host", "port"), [("256.1.1.1", 1), ("127.0.0.1", 65536), ("a\0b", 1),
                                            ("x" * 70 + ".example", 1), ("192.0.2.1", 1),
                                            ("127.0.0.1", -1)])
def test_bad_tcp_addresses(host: str, port: int) -> None:
    began = time.monotonic()
    with pytest.raises(AddressError) as caught:
        listen_tcp(host, port)
    assert caught.value.hint
    assert time.monotonic() - began < 5
