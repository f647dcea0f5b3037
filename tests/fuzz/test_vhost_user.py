"""Random bytes and random messages at both ends of vhost-user: only their own errors come out."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shared.vhost_user import messages as m
from shared.vhost_user.backend import Backend
from shared.vhost_user.errors import VhostUserError
from shared.vhost_user.frontend import BackendChannel, Frontend
from tests.support.fake_backend import FakeBackendDevice

pytestmark = pytest.mark.fuzz
LIMITS = settings(max_examples=300, deadline=None,
                  suppress_health_check=[HealthCheck.too_slow])

# Small numbers meet the checks' edges more often than random ones.
U32 = st.one_of(st.integers(0, 3), st.sampled_from([64, 255, 256, 0xFFFF, 0x10000, 0xFFFFFFFF]))
U64 = st.one_of(U32, st.sampled_from([1 << 12, 1 << 20, 1 << 63, (1 << 64) - 1,
                                      0x7F00_0000_0000, 1 << 30, 1 << 32]))
NUMBERS = st.lists(st.one_of(U32.map(lambda v: struct.pack("=I", v)),
                             U64.map(lambda v: struct.pack("=Q", v))), max_size=12).map(b"".join)
PAYLOADS = st.one_of(NUMBERS, st.binary(max_size=300))
MESSAGE = st.tuples(st.integers(0, 45), st.sampled_from([1, 9]), PAYLOADS,
                    st.integers(0, 3), st.sampled_from(["eventfd", "memfd", "socket"]))


def make_fd(kind: str) -> int:
    if kind == "eventfd":
        return os.eventfd(0)
    if kind == "memfd":
        fd = os.memfd_create("fuzz")
        os.ftruncate(fd, 1 << 20)
        return fd
    return socket.socket(socket.AF_UNIX).detach()


@LIMITS
@given(st.lists(MESSAGE, max_size=15), st.booleans())
def test_back_end_with_random_messages(messages: list[tuple[int, int, bytes, int, str]],
                                       acked: bool) -> None:
    before = len(os.listdir("/proc/self/fd"))
    ours, theirs = socket.socketpair()
    device = FakeBackendDevice()
    backend = Backend(device, theirs.detach())
    if acked:
        backend.acked_protocol = backend._offered_protocol
    ours.setblocking(False)
    with ours, contextlib.suppress(VhostUserError):
        for request, flags, payload, count, kind in messages:
            fds = [make_fd(kind) for _ in range(count)]
            data = m.HEADER.pack(request, flags, len(payload)) + payload
            socket.send_fds(ours, [data], fds)
            for fd in fds:
                os.close(fd)
            backend.handle_one(time.monotonic() + 5)
            with contextlib.suppress(BlockingIOError):
                _, got, _, _ = socket.recv_fds(ours, 65536, 8)
                for fd in got:
                    os.close(fd)
    backend.close()
    if device.inflight_fd >= 0:
        os.close(device.inflight_fd)
    assert len(os.listdir("/proc/self/fd")) == before


@LIMITS
@given(st.binary(max_size=600))
def test_back_end_with_random_bytes(data: bytes) -> None:
    ours, theirs = socket.socketpair()
    backend = Backend(FakeBackendDevice(), theirs.detach())
    ours.sendall(data)
    ours.shutdown(socket.SHUT_WR)
    with pytest.raises(VhostUserError):
        while True:
            backend.handle_one(time.monotonic() + 5)
    backend.close()
    ours.close()


REPLY = st.tuples(st.sampled_from([m.GET_FEATURES, m.GET_PROTOCOL_FEATURES, m.GET_QUEUE_NUM,
                                   m.GET_CONFIG, m.GET_VRING_BASE, m.SET_VRING_NUM,
                                   m.GET_INFLIGHT_FD, m.SET_OWNER]),
                  st.sampled_from([5, 13, 1, 4]), PAYLOADS)


@LIMITS
@given(st.lists(REPLY, max_size=8), st.binary(max_size=20))
def test_front_end_with_random_replies(replies: list[tuple[int, int, bytes]],
                                       tail: bytes) -> None:
    before = len(os.listdir("/proc/self/fd"))
    ours, theirs = socket.socketpair()
    frontend = Frontend(ours.detach(), "back end", limit=0.001)
    for request, flags, payload in replies:
        theirs.sendall(m.HEADER.pack(request, flags, len(payload)) + payload)
    theirs.sendall(tail)
    with contextlib.suppress(VhostUserError):
        frontend.handshake()
    for call in (lambda: frontend.get_config(0, 60), lambda: frontend.get_vring_base(0),
                 lambda: frontend.get_inflight(1, 64), frontend.finish):
        with contextlib.suppress(VhostUserError):
            call()
    frontend.close()
    theirs.close()
    assert len(os.listdir("/proc/self/fd")) == before


@LIMITS
@given(st.binary(max_size=100))
def test_back_end_channel_with_random_bytes(data: bytes) -> None:
    ours, theirs = socket.socketpair()
    channel = BackendChannel(ours.detach(), "back end", lambda: None)
    theirs.sendall(data)
    theirs.shutdown(socket.SHUT_WR)
    with pytest.raises(VhostUserError):
        while True:
            channel.handle_one(0.0)
    channel.close()
    theirs.close()
