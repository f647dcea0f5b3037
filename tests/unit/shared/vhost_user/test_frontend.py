"""The front end: against our own back end, and against a peer that lies, one field at a time."""

from __future__ import annotations

import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from shared.memory_regions import MemoryRegion
from shared.vhost_user import messages as m
from shared.vhost_user.backend import Backend
from shared.vhost_user.errors import (
    AbortedError,
    ConnectionLostError,
    PeerRefusedError,
    ProtocolError,
    TimedOutError,
    VhostUserError,
)
from shared.vhost_user.frontend import BackendChannel, Frontend
from tests.support.fake_backend import FEATURES, FakeBackendDevice

REGION = MemoryRegion(0, 1 << 20, 0x7F00_0000_0000, 0)


def reply(request: int, payload: bytes = b"", flags: int = 5) -> bytes:
    return struct.pack("=III", request, flags, len(payload)) + payload


class Served:
    """A Frontend with our own back end behind it, in a thread."""

    def __init__(self, offered: int | None = None) -> None:
        ours, theirs = socket.socketpair()
        self.device = FakeBackendDevice()
        if offered is not None:
            self.device.protocol_features = offered
        self.backend = Backend(self.device, theirs.detach())
        self.frontend = Frontend(ours.detach(), "back end of d0")
        self.ended: list[VhostUserError] = []
        self.thread = threading.Thread(target=self._serve)
        self.thread.start()

    def _serve(self) -> None:
        try:
            self.backend.serve()
        except VhostUserError as error:
            self.ended.append(error)
            self.backend.close()

    def close(self) -> None:
        self.frontend.close()
        self.thread.join(5)
        assert not self.thread.is_alive()


@pytest.fixture
def served() -> Iterator[Served]:
    result = Served()
    yield result
    result.close()


@pytest.fixture
def ram() -> Iterator[int]:
    fd = os.memfd_create("ram")
    os.ftruncate(fd, 1 << 20)
    yield fd
    os.close(fd)


def start(frontend: Frontend, ram: int) -> None:
    fd = os.eventfd(0)
    frontend.set_features(1 << 32)
    frontend.set_mem_table([REGION], [ram])
    frontend.set_vring_num(0, 64)
    frontend.set_vring_base(0, 7)
    frontend.set_vring_addr(0, REGION.user_addr, REGION.user_addr + 0x1000,
                            REGION.user_addr + 0x2000)
    frontend.set_vring_call(0, fd)
    frontend.set_vring_err(0, fd)
    frontend.set_vring_kick(0, fd)
    if frontend.features & m.F_PROTOCOL_FEATURES:
        frontend.set_vring_enable(0, True)
    os.close(fd)


# ---- against our own back end --------------------------------------------------------------


def test_handshake(served: Served) -> None:
    served.frontend.handshake()
    assert served.frontend.features == FEATURES | m.F_PROTOCOL_FEATURES
    assert served.frontend.protocol & m.PF_REPLY_ACK
    assert not served.frontend.protocol & m.PF_BACKEND_SEND_FD
    assert served.frontend.queue_count == 2
    assert served.backend.owned


@pytest.mark.parametrize("offered", [0, m.PF_MQ, m.PF_REPLY_ACK, m.PF_MQ | m.PF_REPLY_ACK])
def test_start_and_stop_with_and_without_acknowledgements(offered: int, ram: int) -> None:
    served = Served(offered)
    served.frontend.handshake()
    start(served.frontend, ram)
    served.frontend.finish()
    calls = [call[0] for call in served.device.calls]
    assert calls == ["set_features", "set_memory", "start_ring", "enable_ring"]
    served.device.served = 2
    assert served.frontend.get_vring_base(0) == 9
    served.close()


def test_config_and_its_refusal(served: Served) -> None:
    served.frontend.handshake()
    assert served.frontend.get_config(4, 8) == bytes(range(4, 12))
    served.frontend.set_config(32, b"\x07")
    assert served.frontend.get_config(32, 1) == b"\x07"
    served.device.fail = OSError(5, "no")
    with pytest.raises(PeerRefusedError, match="refused to read 60 bytes"):
        served.frontend.get_config(0, 60)
    assert served.frontend.broken is None


def test_a_refusal_names_the_request_and_leaves_the_connection(served: Served, ram: int) -> None:
    served.frontend.handshake()
    served.frontend.set_vring_num(0, 65)
    served.frontend.set_vring_num(9, 64)
    with pytest.raises(PeerRefusedError, match="refused SET_VRING_NUM: Invalid argument") as caught:
        served.frontend.get_status()
    assert caught.value.code == 22
    assert served.frontend.get_status() == 0
    start(served.frontend, ram)
    served.frontend.finish()


def test_more_posted_messages_than_are_kept_owed(served: Served) -> None:
    served.frontend.handshake()
    for _ in range(500):
        served.frontend.set_vring_num(0, 64)
    served.frontend.finish()


def test_memory_regions_one_by_one(served: Served, ram: int) -> None:
    served.frontend.handshake()
    assert served.frontend.get_max_mem_slots() == 32
    served.frontend.add_mem_region(REGION, ram)
    served.frontend.remove_mem_region(REGION)
    served.frontend.finish()
    assert served.device.calls == [("add_memory", REGION), ("remove_memory", REGION)]


def test_inflight_both_ways(served: Served) -> None:
    served.frontend.handshake()
    got = served.frontend.get_inflight(2, 128)
    assert got is not None
    inflight, fd = got
    assert (inflight.queue_count, inflight.queue_size) == (2, 128)
    served.frontend.set_inflight(inflight, fd)
    served.frontend.finish()
    assert served.device.calls[-1][0] == "set_inflight"
    os.close(fd)
    os.close(served.device.inflight_fd)


def test_reset_and_status(served: Served) -> None:
    served.frontend.handshake()
    served.frontend.set_status(7)
    assert served.frontend.get_status() == 7
    served.frontend.reset_device()
    assert served.frontend.get_status() == 0
    assert served.device.calls == [("reset",)]


def test_config_change_arrives(served: Served) -> None:
    served.frontend.handshake()
    changes: list[int] = []
    channel = BackendChannel(served.frontend.open_backend_channel(), "back end",
                             lambda: changes.append(1))
    served.frontend.finish()
    assert served.backend.config_changed()
    channel.handle_one(5.0)
    assert changes == [1]
    channel.close()


def test_the_end_of_the_back_end(served: Served) -> None:
    served.frontend.handshake()
    served.backend.connection.shutdown()
    with pytest.raises(ConnectionLostError):
        served.frontend.get_status()
    assert served.frontend.broken is not None


def test_calls_of_several_threads_do_not_mix(served: Served) -> None:
    served.frontend.handshake()
    wrong: list[bytes] = []

    def work(offset: int) -> None:
        for _ in range(100):
            data = served.frontend.get_config(offset, 4)
            if data != bytes(range(offset, offset + 4)):
                wrong.append(data)

    threads = [threading.Thread(target=work, args=(offset,)) for offset in (0, 4, 8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# ---- a peer that lies ----------------------------------------------------------------------


class Liar:
    """A Frontend whose peer has said everything in advance."""

    def __init__(self, protocol: int = 0) -> None:
        ours, self.peer = socket.socketpair()
        self.frontend = Frontend(ours.detach(), "back end", limit=0.2)
        self.frontend.protocol = protocol

    def close(self) -> None:
        self.frontend.close()
        self.peer.close()


@pytest.fixture
def liar() -> Iterator[Liar]:
    before = len(os.listdir("/proc/self/fd"))
    result = Liar()
    yield result
    result.close()
    assert len(os.listdir("/proc/self/fd")) == before, "descriptors leaked"


def state(index: int, num: int) -> bytes:
    return struct.pack("=II", index, num)


def config(offset: int, size: int, data: bytes) -> bytes:
    return struct.pack("=III", offset, size, 0) + data


Call = Callable[[Frontend], object]
STATUS: Call = lambda f: f.get_status()  # noqa: E731
BASE: Call = lambda f: f.get_vring_base(1)  # noqa: E731
CONFIG: Call = lambda f: f.get_config(4, 8)  # noqa: E731
INFLIGHT: Call = lambda f: f.get_inflight(1, 64)  # noqa: E731


@pytest.mark.parametrize(("call", "answer", "text"), [
    (STATUS, reply(m.GET_STATUS, bytes(8), 4), "protocol version 0"),
    (STATUS, reply(m.GET_STATUS, bytes(8), 6), "protocol version 2"),
    (STATUS, reply(m.GET_STATUS, bytes(8), 1), "sent a request"),
    (STATUS, reply(m.GET_FEATURES, bytes(8)), r"answered request 1; GET_STATUS \(40\) was asked"),
    (STATUS, reply(m.GET_STATUS, bytes(7)), "reply to GET_STATUS has a payload of 7"),
    (STATUS, reply(m.GET_STATUS), "payload of 0 bytes"),
    (STATUS, reply(m.GET_STATUS, bytes(9)), "payload of 9 bytes"),
    (STATUS, struct.pack("=III", m.GET_STATUS, 5, 1 << 31), "payload of 2147483648 bytes"),
    (BASE, reply(m.GET_VRING_BASE, state(0, 5)), "for ring 1 with ring 0"),
    (BASE, reply(m.GET_VRING_BASE, state(1, 0x10000)), "index 0x10000"),
    (BASE, reply(m.GET_VRING_BASE, bytes(4)), "payload of 4 bytes"),
    (CONFIG, reply(m.GET_CONFIG, bytes(5)), "payload of 5 bytes"),
    (CONFIG, reply(m.GET_CONFIG, config(4, 7, bytes(8))), "says 7 bytes and carries 8"),
    (CONFIG, reply(m.GET_CONFIG, config(4, 0, b"")), "with 0 bytes"),
    (CONFIG, reply(m.GET_CONFIG, config(5, 8, bytes(8))), "at 4 with 8 at 5"),
    (CONFIG, reply(m.GET_CONFIG, config(4, 4, bytes(4))), "at 4 with 4 at 4"),
    (CONFIG, reply(m.GET_CONFIG, config(0xFFFFFFFF, 8, bytes(8))), "within 256"),
    (INFLIGHT, reply(m.GET_INFLIGHT_FD, bytes(19)), "payload of 19 bytes"),
    (INFLIGHT, reply(m.GET_INFLIGHT_FD, struct.pack("=QQHHI", 4096, 0, 1, 64, 0)),
     "4096 bytes at 0 in a file of 0"),
])
def test_lies(liar: Liar, call: Call, answer: bytes, text: str) -> None:
    liar.peer.sendall(answer)
    with pytest.raises(ProtocolError, match=text):
        call(liar.frontend)
    assert isinstance(liar.frontend.broken, ProtocolError)
    with pytest.raises(ProtocolError):
        liar.frontend.get_status()


def test_unwanted_descriptors_are_closed(liar: Liar) -> None:
    fd = os.eventfd(0)
    socket.send_fds(liar.peer, [reply(m.GET_STATUS, bytes(8))], [fd, fd])
    with pytest.raises(ProtocolError, match="2 descriptors with a reply to GET_STATUS"):
        liar.frontend.get_status()
    os.close(fd)


@pytest.mark.parametrize(("size", "offset"), [(4097, 0), (4096, 1), (1 << 63, 1 << 63)])
def test_inflight_buffer_beyond_its_file(liar: Liar, size: int, offset: int) -> None:
    fd = os.memfd_create("inflight")
    os.ftruncate(fd, 4096)
    answer = reply(m.GET_INFLIGHT_FD, struct.pack("=QQHHI", size, offset, 1, 64, 0))
    socket.send_fds(liar.peer, [answer], [fd])
    os.close(fd)
    with pytest.raises(ProtocolError, match="in a file of 4096"):
        liar.frontend.get_inflight(1, 64)


def test_no_inflight_buffer(liar: Liar) -> None:
    fd = os.eventfd(0)
    socket.send_fds(liar.peer, [reply(m.GET_INFLIGHT_FD, bytes(24))], [fd])
    os.close(fd)
    assert liar.frontend.get_inflight(1, 64) is None


@pytest.mark.parametrize("count", [0, 0x10000, 1 << 63])
def test_absurd_number_of_queues(liar: Liar, count: int) -> None:
    for request, value in ((m.GET_FEATURES, m.F_PROTOCOL_FEATURES),
                           (m.GET_PROTOCOL_FEATURES, m.PF_MQ), (m.GET_QUEUE_NUM, count)):
        liar.peer.sendall(reply(request, m.encode_u64(value)))
    with pytest.raises(ProtocolError, match="queues"):
        liar.frontend.handshake()


def test_only_offered_protocol_features_are_taken(liar: Liar) -> None:
    liar.peer.sendall(reply(m.GET_FEATURES, m.encode_u64(m.F_PROTOCOL_FEATURES)))
    liar.peer.sendall(reply(m.GET_PROTOCOL_FEATURES, m.encode_u64((1 << 64) - 1 - m.PF_MQ
                                                                  - m.PF_REPLY_ACK)))
    liar.peer.sendall(reply(m.GET_FEATURES, bytes(8)))
    liar.frontend.handshake()
    assert not liar.frontend.protocol & (m.PF_MQ | m.PF_REPLY_ACK | m.PF_INBAND_NOTIFICATIONS
                                         | m.PF_XEN_MMAP | m.PF_PAGEFAULT)


@pytest.mark.parametrize("answer", [
    reply(m.SET_VRING_BASE, bytes(8)), reply(m.SET_VRING_NUM, bytes(4)),
    reply(m.SET_VRING_NUM), reply(m.SET_VRING_NUM, bytes(8), 1),
])
def test_lies_in_acknowledgements(answer: bytes) -> None:
    liar = Liar(m.PF_REPLY_ACK)
    liar.frontend.set_vring_num(0, 64)
    liar.peer.sendall(answer)
    with pytest.raises(ProtocolError):
        liar.frontend.finish()
    liar.close()


# ---- a peer that is slow, silent or dead ---------------------------------------------------


def test_silence_and_a_late_answer(liar: Liar) -> None:
    begin = time.monotonic()
    with pytest.raises(TimedOutError):
        liar.frontend.get_vring_base(1)
    assert time.monotonic() - begin < 2
    assert liar.frontend.broken is None
    # The answer comes late, then that to the next question: they are not taken for one another.
    liar.peer.sendall(reply(m.GET_VRING_BASE, state(1, 5)) + reply(m.GET_STATUS, m.encode_u64(3)))
    assert liar.frontend.get_status() == 3


def test_half_an_answer_breaks_the_connection(liar: Liar) -> None:
    liar.peer.sendall(reply(m.GET_STATUS, bytes(8))[:15])
    with pytest.raises(TimedOutError):
        liar.frontend.get_status()
    assert isinstance(liar.frontend.broken, TimedOutError)


ANSWER = reply(m.GET_STATUS, bytes(8))


@pytest.mark.parametrize("cut", range(len(ANSWER)))
def test_death_at_every_byte_of_an_answer(liar: Liar, cut: int) -> None:
    liar.peer.sendall(ANSWER[:cut])
    liar.peer.shutdown(socket.SHUT_WR)
    with pytest.raises(ConnectionLostError):
        liar.frontend.get_status()


def test_a_waiting_call_makes_others_give_up_in_time(liar: Liar) -> None:
    def wait() -> None:
        with pytest.raises(TimedOutError):
            liar.frontend.get_status(time.monotonic() + 1.0)

    thread = threading.Thread(target=wait)
    thread.start()
    assert liar.peer.recv(12)  # the thread has sent its question and waits
    with pytest.raises(TimedOutError, match="keeps another request waiting"):
        liar.frontend.get_status(time.monotonic() + 0.05)
    thread.join()


def test_abort_ends_a_call() -> None:
    ours, theirs = socket.socketpair()
    abort = os.eventfd(0)
    frontend = Frontend(ours.detach(), "back end", abort)
    timer = threading.Timer(0.05, lambda: os.eventfd_write(abort, 1))
    timer.start()
    with pytest.raises(AbortedError):
        frontend.get_status(time.monotonic() + 30)
    timer.join()
    frontend.close()
    theirs.close()
    os.close(abort)


def test_close_ends_a_call_of_another_thread(liar: Liar) -> None:
    timer = threading.Timer(0.05, liar.frontend.close)
    timer.start()
    with pytest.raises(ConnectionLostError):
        liar.frontend.get_status(time.monotonic() + 30)
    timer.join()


# ---- requests of the back end --------------------------------------------------------------


class Channel:
    def __init__(self) -> None:
        ours, self.peer = socket.socketpair()
        self.changes = 0
        self.channel = BackendChannel(ours.detach(), "back end", self.changed)

    def changed(self) -> None:
        self.changes += 1

    def close(self) -> None:
        self.channel.close()
        self.peer.close()


@pytest.fixture
def channel() -> Iterator[Channel]:
    result = Channel()
    yield result
    result.close()


def test_config_change_is_acknowledged_if_asked(channel: Channel) -> None:
    channel.peer.sendall(struct.pack("=III", m.BACKEND_CONFIG_CHANGE_MSG, 9, 0))
    channel.channel.handle_one()
    assert channel.peer.recv(100) == reply(m.BACKEND_CONFIG_CHANGE_MSG, bytes(8))
    assert channel.changes == 1


@pytest.mark.parametrize(("request_", "size"), [(m.BACKEND_IOTLB_MSG, 32), (99, 5),
                                               (m.BACKEND_SHARED_OBJECT_ADD, 16)])
def test_other_requests_are_refused(channel: Channel, request_: int, size: int) -> None:
    channel.peer.sendall(struct.pack("=III", request_, 9, size) + bytes(size))
    channel.channel.handle_one()
    assert channel.peer.recv(100) == reply(request_, m.encode_u64(1))
    channel.peer.sendall(struct.pack("=III", request_, 1, size) + bytes(size))
    channel.channel.handle_one()
    assert channel.changes == 0


@pytest.mark.parametrize("data", [
    struct.pack("=III", m.BACKEND_CONFIG_CHANGE_MSG, 1, 1) + b"x",
    struct.pack("=III", m.BACKEND_VRING_CALL, 1, 7) + bytes(7),
    struct.pack("=III", m.BACKEND_CONFIG_CHANGE_MSG, 5, 0),
    struct.pack("=III", m.BACKEND_CONFIG_CHANGE_MSG, 0, 0),
    struct.pack("=III", m.BACKEND_CONFIG_CHANGE_MSG, 1, 5000),
])
def test_lies_on_the_channel(channel: Channel, data: bytes) -> None:
    channel.peer.sendall(data)
    with pytest.raises(ProtocolError):
        channel.channel.handle_one()
    assert channel.changes == 0


def test_descriptors_that_nobody_asked_for(channel: Channel) -> None:
    before = len(os.listdir("/proc/self/fd"))
    fd = os.eventfd(0)
    socket.send_fds(channel.peer, [struct.pack("=III", 2, 1, 0)], [fd])
    os.close(fd)
    with pytest.raises(ProtocolError, match="came with 1 descriptors"):
        channel.channel.handle_one()
    assert len(os.listdir("/proc/self/fd")) == before


def test_half_a_request_does_not_hold_the_loop(channel: Channel) -> None:
    channel.peer.sendall(struct.pack("=II", 2, 1))
    begin = time.monotonic()
    with pytest.raises(TimedOutError):
        channel.channel.handle_one(0.0)
    assert time.monotonic() - begin < 1
