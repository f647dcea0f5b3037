"""One message over a socketpair: cut at every byte, wrong header fields, descriptors."""

from __future__ import annotations

import os
import socket
import struct
import threading
import time
from collections.abc import Iterator

import pytest

from shared.vhost_user.connection import Connection
from shared.vhost_user.errors import (
    AbortedError,
    ConnectionLostError,
    ProtocolError,
    TimedOutError,
    VhostUserError,
)

Pair = tuple[Connection, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    ours, theirs = socket.socketpair()
    connection = Connection(ours.detach(), "peer")
    yield connection, theirs
    connection.close()
    theirs.close()


def soon(seconds: float = 0.02) -> float:
    return time.monotonic() + seconds


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def raw(request: int = 7, flags: int = 1, payload: bytes = b"", size: int | None = None) -> bytes:
    return struct.pack("=III", request, flags, len(payload) if size is None else size) + payload


def test_send_writes_header_payload_and_descriptors(pair: Pair) -> None:
    connection, peer = pair
    fd = os.eventfd(5)
    connection.send(12, b"payload!", [fd], need_reply=True)
    data, fds, _, _ = socket.recv_fds(peer, 100, 8)
    assert data == struct.pack("=III", 12, 0b1001, 8) + b"payload!"
    assert os.eventfd_read(fds[0]) == 5
    connection.send(12, reply=True)
    assert peer.recv(100) == struct.pack("=III", 12, 0b101, 0)
    os.close(fd)
    os.close(fds[0])


def test_recv_takes_one_message_at_a_time(pair: Pair) -> None:
    connection, peer = pair
    peer.sendall(raw(1, 9, b"abc") + raw(2))
    first = connection.recv(replies=False)
    assert (first.request, first.payload, first.need_reply) == (1, b"abc", True)
    second = connection.recv(replies=False)
    assert (second.request, second.payload, second.need_reply) == (2, b"", False)


def test_recv_gets_descriptors_with_cloexec(pair: Pair) -> None:
    connection, peer = pair
    fd = os.eventfd(1)
    before = open_fds()
    socket.send_fds(peer, [raw()], [fd] * 8)
    message = connection.recv(replies=False)
    assert len(message.fds) == 8
    assert not any(os.get_inheritable(got) for got in message.fds)
    message.close()
    message.close()
    assert open_fds() == before
    os.close(fd)


def test_each_message_has_its_own_descriptors(pair: Pair) -> None:
    connection, peer = pair
    fd = os.eventfd(1)
    peer.sendall(raw(1))
    socket.send_fds(peer, [raw(2)], [fd])
    assert connection.recv(replies=False).fds == []
    second = connection.recv(replies=False)
    assert len(second.fds) == 1
    second.close()
    os.close(fd)


def test_nine_descriptors_are_too_many(pair: Pair) -> None:
    connection, peer = pair
    fd = os.eventfd(1)
    before = open_fds()
    socket.send_fds(peer, [raw()], [fd] * 9)
    with pytest.raises(ProtocolError, match="more than 8 descriptors"):
        connection.recv(replies=False)
    assert open_fds() == before
    os.close(fd)


def test_nine_descriptors_in_two_parts_of_a_header(pair: Pair) -> None:
    connection, peer = pair
    fd = os.eventfd(1)
    before = open_fds()
    socket.send_fds(peer, [raw()[:5]], [fd] * 5)
    socket.send_fds(peer, [raw()[5:]], [fd] * 4)
    with pytest.raises(ProtocolError, match="more than 8 descriptors"):
        connection.recv(replies=False)
    assert open_fds() == before
    os.close(fd)


def test_descriptors_on_payload_bytes_are_dropped(pair: Pair) -> None:
    connection, peer = pair
    fd = os.eventfd(1)
    before = open_fds()
    peer.sendall(raw(size=3))
    socket.send_fds(peer, [b"abc"], [fd])
    message = connection.recv(replies=False)
    assert (message.payload, message.fds) == (b"abc", [])
    assert open_fds() == before
    os.close(fd)


WHOLE = raw(3, 1, b"12345678")


@pytest.mark.parametrize("cut", range(len(WHOLE)))
def test_end_of_stream_at_every_byte(pair: Pair, cut: int) -> None:
    connection, peer = pair
    fd = os.eventfd(1)
    before = open_fds()
    if cut:
        socket.send_fds(peer, [WHOLE[:cut]], [fd])
    peer.shutdown(socket.SHUT_WR)
    expected = ("closed the connection" if cut == 0
                else f"after {cut} of 12 bytes of a header" if cut < 12
                else f"after {cut - 12} of 8 bytes of a payload")
    with pytest.raises(ConnectionLostError, match=expected) as caught:
        connection.recv(replies=False, deadline=soon(5))
    assert caught.value.restart
    assert connection.broken is caught.value
    assert open_fds() == before
    with pytest.raises(ConnectionLostError):
        connection.send(1)
    os.close(fd)


@pytest.mark.parametrize("cut", range(len(WHOLE)))
def test_silence_at_every_byte(pair: Pair, cut: int) -> None:
    connection, peer = pair
    peer.sendall(WHOLE[:cut])
    with pytest.raises(TimedOutError, match="in time"):
        connection.recv(replies=False, deadline=soon())
    peer.sendall(WHOLE[cut:])
    if cut == 0:  # nothing was lost: the message may still be taken
        assert connection.recv(replies=False, deadline=soon(5)).payload == b"12345678"
    else:
        with pytest.raises(TimedOutError):
            connection.recv(replies=False, deadline=soon(5))


def test_byte_by_byte(pair: Pair) -> None:
    connection, peer = pair

    def drip() -> None:
        for i in range(len(WHOLE)):
            peer.send(WHOLE[i:i + 1])

    thread = threading.Thread(target=drip)
    thread.start()
    assert connection.recv(replies=False, deadline=soon(5)).payload == b"12345678"
    thread.join()


@pytest.mark.parametrize("version", [0, 2, 3])
def test_wrong_version(pair: Pair, version: int) -> None:
    connection, peer = pair
    peer.sendall(raw(flags=version))
    with pytest.raises(ProtocolError, match=f"protocol version {version}"):
        connection.recv(replies=False)


def test_reply_instead_of_request_and_back(pair: Pair) -> None:
    connection, peer = pair
    peer.sendall(raw(flags=5))
    with pytest.raises(ProtocolError, match="sent a reply; a request was due"):
        connection.recv(replies=False)


def test_request_instead_of_reply(pair: Pair) -> None:
    connection, peer = pair
    peer.sendall(raw(flags=1))
    with pytest.raises(ProtocolError, match="sent a request; a reply was due"):
        connection.recv(replies=True)


@pytest.mark.parametrize("size", [4097, 0xFFFFFFFF])
def test_payload_too_large_is_refused_before_it_comes(pair: Pair, size: int) -> None:
    connection, peer = pair
    fd = os.eventfd(1)
    before = open_fds()
    socket.send_fds(peer, [raw(size=size)], [fd])
    with pytest.raises(ProtocolError, match=f"payload of {size} bytes"):
        connection.recv(replies=False, deadline=soon(5))
    assert open_fds() == before
    os.close(fd)


def test_largest_payload(pair: Pair) -> None:
    connection, peer = pair
    peer.sendall(raw(payload=bytes(4096)))
    assert len(connection.recv(replies=False).payload) == 4096


def test_send_to_a_closed_peer(pair: Pair) -> None:
    connection, peer = pair
    peer.close()
    with pytest.raises(ConnectionLostError, match="is gone: Broken pipe"):
        connection.send(1)


def test_send_to_a_peer_that_does_not_read(pair: Pair) -> None:
    connection, _ = pair
    with pytest.raises(TimedOutError, match="did not take a message in time"):
        for _ in range(10000):
            connection.send(1, bytes(4096), deadline=soon())


def test_abort_ends_a_wait() -> None:
    ours, theirs = socket.socketpair()
    abort = os.eventfd(0)
    connection = Connection(ours.detach(), "peer", abort)
    timer = threading.Timer(0.05, lambda: os.eventfd_write(abort, 1))
    timer.start()
    with pytest.raises(AbortedError):
        connection.recv(replies=True, deadline=soon(30))
    timer.join()
    assert isinstance(connection.broken, AbortedError)
    connection.close()
    theirs.close()
    os.close(abort)


def test_shutdown_ends_a_wait_of_another_thread(pair: Pair) -> None:
    connection, _ = pair
    timer = threading.Timer(0.05, connection.shutdown)
    timer.start()
    with pytest.raises(ConnectionLostError):
        connection.recv(replies=True, deadline=soon(30))
    timer.join()


def test_use_after_close(pair: Pair) -> None:
    connection, _ = pair
    connection.close()
    connection.close()
    connection.shutdown()
    assert connection.fileno() == -1
    with pytest.raises(VhostUserError, match="is closed"):
        connection.send(1)
