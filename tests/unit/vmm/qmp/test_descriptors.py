"""`getfd` and `closefd`: each descriptor that comes in is owned once and closed once."""

from __future__ import annotations

import json
import os

from tests.support.qmp import QmpClient
from vmm.qmp import connection, fd_store


def getfd(name: str, **more: object) -> str:
    return json.dumps({"execute": "getfd", "arguments": {"fdname": name}, **more})


def test_getfd_and_closefd(harness, client):
    read, write = os.pipe()
    client.send_fds(getfd("tap0"), [write])
    assert client.receive() == {"return": {}}
    os.close(write)
    fd = harness.on_loop(lambda: harness.server.fds._fds["tap0"].fd)
    assert os.get_inheritable(fd) is False
    assert client.command("closefd", fdname="tap0") == {}
    assert os.read(read, 1) == b""  # the last write end is closed
    os.close(read)


def test_getfd_without_descriptor_after_one_that_came_with_another_command(client):
    read, write = os.pipe()
    client.send_fds('{"execute":"query-name"}', [write])
    assert "return" in client.receive()
    os.close(write)
    assert os.read(read, 1) == b""
    os.close(read)
    assert "No file descriptor" in client.raw(getfd("a"))["error"]["desc"]


def test_getfd_again_replaces(client):
    read, write = os.pipe()
    for _ in range(2):
        client.send_fds(getfd("a"), [write])
        assert client.receive() == {"return": {}}
    assert client.command("closefd", fdname="a") == {}
    os.close(write)
    assert os.read(read, 1) == b""
    os.close(read)


def test_first_descriptor_counts_the_others_are_closed(client):
    pipes = [os.pipe() for _ in range(3)]
    client.send_fds(getfd("a"), [write for _, write in pipes])
    assert client.receive() == {"return": {}}
    for _, write in pipes:
        os.close(write)
    for read, _ in pipes[1:]:
        assert os.read(read, 1) == b""
    client.command("closefd", fdname="a")
    for read, _ in pipes:
        assert os.read(read, 1) == b""
        os.close(read)


def test_getfd_that_fails_keeps_nothing(client):
    read, write = os.pipe()
    client.send_fds('{"execute":"getfd","arguments":{"fdname":"0"}}', [write])
    assert "digit" in client.receive()["error"]["desc"]
    os.close(write)
    assert os.read(read, 1) == b""
    os.close(read)


def test_getfd_split_over_two_messages(client):
    read, write = os.pipe()
    text = getfd("a")
    client.send_fds(text[:10], [write])
    client.socket.sendall(text[10:].encode())
    assert client.receive() == {"return": {}}
    os.close(read)
    os.close(write)


def test_flood_of_descriptors_is_bounded(harness, client):
    fd = os.open("/dev/null", os.O_RDONLY)
    text = getfd("a")
    for byte in text[:-1]:
        client.send_fds(byte, [fd] * 100)
    harness.wait_for(lambda: len(harness.server._clients[0]._fds) == connection.MAX_FDS)
    os.close(fd)
    client.socket.sendall(text[-1:].encode())
    assert client.receive() == {"return": {}}


def test_named_descriptors_are_bounded(client, monkeypatch):
    monkeypatch.setattr(fd_store, "MAX_FDS", 3)
    for index in range(4):
        client.send_fds(getfd(f"a{index}"), [client.socket.fileno()])
        reply = client.receive()
        assert ("return" in reply) == (index < 3)
    client.send_fds(getfd("a0"), [client.socket.fileno()])
    assert "return" in client.receive()


def test_named_descriptors_outlive_their_client(harness):
    with QmpClient(harness.path) as first:
        first.send_fds(getfd("a"), [first.socket.fileno()])
        first.receive()
    assert harness.connect().command("closefd", fdname="a") == {}
