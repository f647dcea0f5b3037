"""A QMP connection as a client has it: blocking, with a limit for each wait.

What a VM says is not believed to be small, valid or timely: lines are bounded, waits are
limited, and what is no JSON object ends the connection with an error that names the VM.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import time
from typing import TYPE_CHECKING, Any

from vmm.ctl.errors import CtlError, QmpRefused

if TYPE_CHECKING:
    from collections.abc import Iterator

LIMIT = 30.0             # seconds for an answer: `stop` and `device_del` may take ten and more
LINE_LIMIT = 16 << 20    # bytes of one answer
EVENT_LIMIT = 10_000     # events kept that nobody asked for
_PATH_LIMIT = 107        # sockaddr_un.sun_path without its NUL


class QmpClient:
    """One connection, past the greeting.

    :param path: of the VM's QMP socket.
    :param name: for messages.
    :param timeout: seconds for each answer.
    :raises CtlError: nobody listens there, or it is no QMP server.
    """

    def __init__(self, path: str, name: str = "", timeout: float = LIMIT) -> None:
        self.path = path
        self.name = name or path
        self.timeout = timeout
        self.events: list[dict[str, Any]] = []  # those that came while something else was awaited
        self._buffer = bytearray()
        self._socket = connect_unix(path, timeout)
        self.pid = _peer(self._socket)
        try:
            greeting = self._receive(time.monotonic() + timeout)
            while "event" in greeting:
                greeting = self._receive(time.monotonic() + timeout)
            if "QMP" not in greeting:
                raise CtlError(f"{path} is not a QMP socket", "name the socket of -qmp")
            self.command("qmp_capabilities")
        except BaseException:
            self.close()
            raise

    def command(self, name: str, arguments: dict[str, Any] | None = None) -> Any:
        """Run a command, return its result.

        :raises QmpRefused: the VM said no. :raises CtlError: it is gone, or doesn't answer.
        """
        message: dict[str, Any] = {"execute": name}
        if arguments:
            message["arguments"] = arguments
        deadline = time.monotonic() + self.timeout
        try:
            self._socket.settimeout(self.timeout)
            self._socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError as error:
            raise CtlError(f"{self.name}: the VM is gone ({error.strerror or error})") from None
        while True:
            answer = self._receive(deadline)
            if "event" in answer:
                self._keep(answer)
            elif "error" in answer:
                refusal = answer["error"] if isinstance(answer["error"], dict) else {}
                raise QmpRefused(str(refusal.get("class", "GenericError")),
                                 f"{self.name}: {_printable(refusal.get('desc', 'refused'))}")
            elif "return" in answer:
                return answer["return"]

    def wait_event(self, name: str, data: dict[str, Any], timeout: float) -> bool:
        """Whether this event, with at least these data, came already or comes in time."""
        deadline = time.monotonic() + timeout
        while True:
            for event in self.events:
                got = event.get("data")
                if event.get("event") == name and isinstance(got, dict) and (
                        data.items() <= got.items()):
                    self.events.remove(event)
                    return True
            try:
                answer = self._receive(deadline)
            except TimeoutError:
                return False
            if "event" in answer:
                self._keep(answer)

    def wait_end(self, timeout: float) -> bool:
        """Whether the VM closes the connection in time, as it does when it ends."""
        deadline = time.monotonic() + timeout
        while True:
            try:
                self._receive(deadline)
            except TimeoutError:
                return False
            except CtlError:
                return True

    def each_event(self) -> Iterator[dict[str, Any]]:
        """Events as they come, those kept first, until the VM ends."""
        while True:
            while self.events:
                yield self.events.pop(0)
            try:
                answer = self._receive(None)
            except CtlError:
                return
            if "event" in answer:
                yield answer

    def close(self) -> None:
        """Close the connection. Harmless when closed."""
        self._socket.close()

    def __enter__(self) -> QmpClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _keep(self, event: dict[str, Any]) -> None:
        if len(self.events) < EVENT_LIMIT:
            self.events.append(event)

    def _receive(self, deadline: float | None) -> dict[str, Any]:
        """The next message. :raises TimeoutError: none came. :raises CtlError: the end."""
        begin = 0
        while (end := self._buffer.find(b"\n", begin)) < 0:
            begin = len(self._buffer)
            if begin > LINE_LIMIT:
                raise CtlError(f"{self.name}: an answer of more than {LINE_LIMIT >> 20} MiB")
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                raise NoAnswer(f"{self.name}: no answer within {self.timeout:.0f} s",
                               "the VM is busy or hangs")
            try:
                self._socket.settimeout(left)
                data = self._socket.recv(65536)
            except TimeoutError:
                continue
            except OSError:
                data = b""
            if not data:
                raise CtlError(f"{self.name}: the VM closed the connection")
            self._buffer += data
        line = bytes(self._buffer[:end])
        del self._buffer[:end + 1]
        try:
            message = json.loads(line)
        except (ValueError, RecursionError):
            message = None
        if not isinstance(message, dict):
            raise CtlError(f"{self.name}: {self.path} answers with what is not QMP")
        return message


class NoAnswer(CtlError, TimeoutError):
    """The VM didn't answer in time."""


def connect_unix(path: str, timeout: float) -> socket.socket:
    """A stream connected to a unix socket, however long its path is.

    :raises CtlError: it isn't there, nobody listens, or we may not.
    """
    client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    folder = -1
    try:
        client.settimeout(timeout)
        if len(os.fsencode(path)) > _PATH_LIMIT:
            folder = os.open(os.path.dirname(path) or ".", os.O_PATH | os.O_CLOEXEC)
            client.connect(f"/proc/self/fd/{folder}/{os.path.basename(path)}")
        else:
            client.connect(path)
    except (OSError, ValueError) as error:
        client.close()
        reason = getattr(error, "strerror", None) or str(error)
        raise CtlError(f"Can't connect to {_printable(path)}: {reason}",
                       "is the VM running?") from None
    finally:
        if folder >= 0:
            os.close(folder)
    return client


def peer_of(path: str, timeout: float) -> int:
    """The pid of who listens on a unix socket, without a word to it; 0: it can't be told.

    :raises CtlError: nobody does.
    """
    sock = connect_unix(path, timeout)
    try:
        return _peer(sock)
    finally:
        sock.close()


def _peer(sock: socket.socket) -> int:
    """The pid of who listens, as we see it; 0 if we can't."""
    try:
        data = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    except OSError:
        return 0
    return int(struct.unpack("3i", data)[0])


def _printable(text: object) -> str:
    """Text of somebody else's, harmless for a terminal."""
    return "".join(c if c.isprintable() else "?" for c in str(text)[:2000])
