"""The control channel's encoding: real CBOR, and nothing that is not checked."""

from __future__ import annotations

import os
import socket

import cbor2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.control.channel import MAX_MESSAGE, Channel, ChannelClosed, pair
from shared.control.codec import CodecError, decode, encode

values = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 64), (1 << 64) - 1) | st.binary()
    | st.text(st.characters(exclude_categories=("Cs",))),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(
        st.text(st.characters(exclude_categories=("Cs",)), max_size=5), inner, max_size=4),
    max_leaves=8)


@given(values)
def test_bytes_are_cbor(value: object) -> None:
    try:
        data = encode(value)
    except CodecError as error:
        assert "deeper" in str(error)
        return
    assert data == cbor2.dumps(value)
    assert decode(data) == value


@given(st.binary(max_size=64))
def test_garbage_is_refused_or_decoded_never_worse(data: bytes) -> None:
    try:
        decode(data)
    except CodecError:
        pass


@given(values)
def test_cut_anywhere_is_refused(value: object) -> None:
    try:
        data = encode(value)
    except CodecError:
        return
    for end in range(len(data)):
        with pytest.raises(CodecError):
            decode(data[:end])


@pytest.mark.parametrize("data", [
    b"", b"\x00\x00", b"\xfa\x00\x00\x00\x00", b"\x1c", b"\x5f\xff", b"\xc0\x00",
    b"\x9b" + b"\xff" * 8, b"\xa1\x00\x00", b"\x81" * 20 + b"\x00", b"\xf7",
])
def test_outside_the_subset(data: bytes) -> None:
    with pytest.raises(CodecError):
        decode(data)


@pytest.mark.parametrize("value", [1.5, object(), {1: 2}, 1 << 64, -(1 << 64) - 1, {1, 2}])
def test_what_can_t_be_encoded(value: object) -> None:
    with pytest.raises(CodecError):
        encode(value)


def test_channel_carries_descriptors() -> None:
    a, b = (Channel(fd) for fd in pair())
    with open("/dev/null", "rb") as null:
        a.send({"x": [1, "y"]}, [null.fileno(), null.fileno()])
    message, fds = b.recv()
    assert message == {"x": [1, "y"]}
    assert [os.get_inheritable(fd) for fd in fds] == [False, False]
    for fd in fds:
        os.close(fd)
    a.close()
    with pytest.raises(ChannelClosed):
        b.recv()
    with pytest.raises(ChannelClosed):
        b.send({})
    b.close()


def test_channel_refuses_what_is_too_long_or_no_map() -> None:
    ours, theirs = pair()
    channel = Channel(ours)
    peer = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, fileno=theirs)
    with pytest.raises(CodecError):
        channel.send({"x": bytes(MAX_MESSAGE)})
    for data in (encode([1]), b"\xff", encode({"x": bytes(MAX_MESSAGE)})):
        socket.send_fds(peer, [data], [0])
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(CodecError):
            channel.recv()
        assert len(os.listdir("/proc/self/fd")) == before
    channel.close()
    peer.close()


def test_channel_that_does_not_wait() -> None:
    a, b = pair()
    channel = Channel(a, blocking=False)
    with pytest.raises(BlockingIOError):
        channel.recv()
    with pytest.raises(ChannelClosed):
        for _ in range(100000):
            channel.send({"x": bytes(1000)})
    os.close(b)
    channel.close()
