"""A port of a console device: bytes both ways, back pressure, and who is told of whom."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from shared.errors import SharedError
from vmm.chardev.base import Chardev
from vmm.console.port import CHUNK, Port
from vmm.event_loop import EventLoop


class Client(Chardev):
    """A chardev whose client comes and leaves when the test says so."""

    def __init__(self, loop: EventLoop) -> None:
        super().__init__("c", "socket", loop)
        self.other: socket.socket | None = None
        self._peer: socket.socket | None = None

    def come(self) -> socket.socket:
        self._peer, self.other = socket.socketpair()
        self._peer.setblocking(False)
        self.other.setblocking(False)
        self._attach(self._peer.fileno(), self._peer.fileno())
        return self.other

    def leave(self) -> None:
        self._hung_up()

    def _hung_up(self) -> None:
        self._detach()
        for end in (self._peer, self.other):
            if end is not None:
                end.close()


class Orders:
    """Remembers what a worker was told; `answer` answers the oldest."""

    def __init__(self) -> None:
        self.sent: list[tuple[int, bool]] = []
        self.waiting: list[Callable[[str], None]] = []
        self.gone = False

    def send(self, kind: str, done: Callable[[str], None], **fields: Any) -> int:
        if self.gone:
            raise SharedError("gone")
        assert kind == "open"
        self.sent.append((fields["nr"], fields["open"]))
        self.waiting.append(done)
        return 1

    def answer(self, problem: str = "") -> None:
        self.waiting.pop(0)(problem)


class Stage:
    """A port with a chardev; `guest` is the worker's end of the socket."""

    def __init__(self) -> None:
        self.loop = EventLoop()
        self.port = Port(3, False, "name", "c")
        self.client = Client(self.loop)
        self.orders = Orders()
        self.guest = socket.socket(fileno=os.dup(self.port.worker_end))
        self.guest.setblocking(False)

    def begin(self) -> None:
        self.port.describe()
        self.port.serve_with(self.orders)  # type: ignore[arg-type]
        self.port.attach(self.client, self.loop)

    def turn(self, rounds: int = 8) -> None:
        for _ in range(rounds):
            self.loop.run_once(0)

    def close(self) -> None:
        self.port.close()
        self.client.leave()
        self.guest.close()
        self.loop.close()


@pytest.fixture
def stage() -> Iterator[Stage]:
    stage = Stage()
    yield stage
    stage.close()


# ---- who is told of whom ---------------------------------------------------------------------

def test_what_a_worker_is_made_with(stage: Stage) -> None:
    assert stage.port.describe() == {"nr": 3, "console": False, "name": "name", "open": False}
    stage.begin()
    stage.client.come()
    stage.turn()
    assert stage.port.describe()["open"] is True


def test_somebody_who_was_there_first(stage: Stage) -> None:
    stage.client.come()
    stage.begin()
    stage.turn()
    assert stage.orders.sent == [(3, True)]


def test_one_order_at_a_time_and_the_last_one_counts(stage: Stage) -> None:
    stage.begin()
    stage.turn()
    assert stage.orders.sent == []
    stage.client.come()
    stage.turn()
    for _ in range(20):
        stage.client.leave()
        stage.turn()
        stage.client.come()
        stage.turn()
    stage.client.leave()
    stage.turn()
    assert stage.orders.sent == [(3, True)]  # not answered yet
    stage.orders.answer()
    assert stage.orders.sent == [(3, True), (3, False)]
    stage.orders.answer()
    assert len(stage.orders.sent) == 2


def test_another_client_within_a_moment_is_no_news(stage: Stage) -> None:
    stage.client.come()
    stage.begin()
    stage.turn()
    stage.orders.answer()
    stage.client.leave()
    stage.client.come()
    stage.turn()
    assert stage.orders.sent == [(3, True)]


def test_the_next_worker_knows(stage: Stage) -> None:
    stage.begin()
    stage.orders.gone = True
    stage.client.come()
    stage.turn()
    following = Orders()
    assert stage.port.describe()["open"] is True
    stage.port.serve_with(following)  # type: ignore[arg-type]
    stage.client.leave()
    stage.turn()
    assert following.sent == [(3, False)]
    assert stage.orders.sent == []


def test_an_answer_of_the_last_worker_changes_nothing(stage: Stage) -> None:
    stage.begin()
    stage.client.come()
    stage.turn()
    late = stage.orders.waiting.pop()
    following = Orders()
    stage.port.describe()
    stage.port.serve_with(following)  # type: ignore[arg-type]
    stage.client.leave()
    stage.turn()
    late("the worker ended")
    assert following.sent == [(3, False)]


# ---- bytes -----------------------------------------------------------------------------------

def test_both_ways(stage: Stage) -> None:
    stage.begin()
    client = stage.client.come()
    stage.guest.send(b"from the guest")
    client.send(b"to the guest")
    stage.turn()
    assert client.recv(100) == b"from the guest"
    assert stage.guest.recv(100) == b"to the guest"


def test_output_waits_for_a_client_that_does_not_read(stage: Stage) -> None:
    stage.begin()
    client = stage.client.come()
    data = os.urandom(4 << 20)
    left, received = memoryview(data), bytearray()
    stuck = 0
    while stuck < 20:  # until nothing moves any more
        try:
            left = left[stage.guest.send(left):]
            stuck = 0
        except BlockingIOError:
            stuck += 1
        stage.turn()
    held = len(data) - len(left)
    assert held < 2 << 20  # two sockets, and one piece between them
    while len(received) < len(data):
        try:
            received += client.recv(1 << 16)
        except BlockingIOError:
            pass
        stage.turn(1)
        if left:
            try:
                left = left[stage.guest.send(left):]
            except BlockingIOError:
                pass
    assert bytes(received) == data


def test_input_waits_for_a_guest_that_does_not_read(stage: Stage) -> None:
    stage.begin()
    client = stage.client.come()
    data = os.urandom(2 << 20)
    left, received = memoryview(data), bytearray()
    stuck = 0
    while stuck < 200:
        try:
            left = left[client.send(left):]
            stuck = 0
        except BlockingIOError:
            stuck += 1
        stage.turn(1)
    assert len(left) > 1 << 20
    while len(received) < len(data):
        try:
            received += stage.guest.recv(1 << 16)
        except BlockingIOError:
            pass
        stage.turn(1)
        if left:
            try:
                left = left[client.send(left):]
            except BlockingIOError:
                pass
    assert bytes(received) == data


def test_output_is_dropped_while_nobody_is_there(stage: Stage) -> None:
    """What a guest said before is no business of the next client."""
    stage.begin()
    for _ in range(40):
        stage.guest.send(bytes(CHUNK // 2))
        stage.turn(4)
    client = stage.client.come()
    stage.guest.send(b"now")
    stage.turn()
    assert client.recv(CHUNK) == b"now"


def test_a_client_that_leaves_with_output_held_back(stage: Stage) -> None:
    stage.begin()
    stage.client.come()
    sent = 0
    for _ in range(200):
        try:
            sent += stage.guest.send(bytes(CHUNK))
        except BlockingIOError:
            pass
        stage.turn(1)
    stage.client.leave()
    stage.turn(64)
    stage.guest.send(bytes(CHUNK))  # there is room again
    stage.turn()
    client = stage.client.come()
    stage.turn()
    with pytest.raises(BlockingIOError):
        client.recv(1)


def test_the_last_words(stage: Stage) -> None:
    stage.begin()
    client = stage.client.come()
    for number in range(3):
        stage.guest.send(b"word %d\n" % number)
    stage.port.close()
    stage.port.close()
    assert client.recv(100) == b"word 0\nword 1\nword 2\n"


def test_a_close_without_a_chardev() -> None:
    """A start that failed in between."""
    port = Port(0, True, "", "c")
    port.close()
