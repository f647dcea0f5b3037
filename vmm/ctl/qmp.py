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
from collections import deque
from typing import TYPE_CHECKING, Any

from vmm.ctl.errors import CtlError, GoneError, NoAnswerError, QmpRefused
from vmm.ctl.output import printable

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import NoReturn

LIMIT = 30.0             # seconds for an answer: `stop` and `device_del` may take ten and more
LINE_LIMIT = 4 << 20     # bytes of one answer; the longest, the schema, has a twentieth
DEPTH_LIMIT = 100        # brackets in brackets of one answer
EVENT_LIMIT = 10_000     # events kept that nobody asked for: the newest
_BUSY_POLL = 0.02        # seconds between attempts while a socket's backlog is full
_PATH_LIMIT = 107        # sockaddr_un.sun_path without its NUL


class QmpClient:
    """One connection, past the greeting.

    :param path: of the VM's QMP socket.
    :param name: for messages.
    :param timeout: seconds for each answer.
    :param total: seconds for everything over this connection, if given.
    :raises CtlError: nobody listens there, or it is no QMP server.
    """

    def __init__(self, path: str, name: str = "", timeout: float = LIMIT,
                 total: float | None = None) -> None:
        self.path = path
        self.name = printable(name or path)
        self.timeout = timeout
        # Those that came while something else was awaited.
        self.events: deque[dict[str, Any]] = deque(maxlen=EVENT_LIMIT)
        self._end = None if total is None else time.monotonic() + total
        self._serial = 0
        self._buffer = bytearray()
        self._socket = connect_unix(path, timeout)
        self.pid, self.uid = peer_of(self._socket)
        try:
            deadline = self._deadline(timeout)
            greeting = self._receive(deadline)
            while "event" in greeting:
                greeting = self._receive(deadline)
            if "QMP" not in greeting:
                raise CtlError(f"{printable(path)} is not a QMP socket", "name the socket of -qmp")
            self.command("qmp_capabilities")
        except BaseException:
            self.close()
            raise

    def command(self, name: str, arguments: dict[str, Any] | None = None,
                timeout: float | None = None, fds: Sequence[int] = ()) -> Any:
        """Run a command, return its result.

        :param timeout: seconds for the answer; without it, the connection's.
        :param fds: descriptors that go along.
        :raises QmpRefused: the VM said no. :raises CtlError: it is gone, or doesn't answer.
        """
        self._serial += 1
        message: dict[str, Any] = {"execute": name, "id": self._serial}
        if arguments:
            message["arguments"] = arguments
        deadline = self._deadline(self.timeout if timeout is None else timeout)
        self._send(json.dumps(message).encode() + b"\n", fds, deadline)
        while True:
            answer = self._receive(deadline)
            if "event" in answer:
                self.events.append(answer)
            elif answer.get("id", self._serial) != self._serial:
                continue  # to a command that we gave up waiting for
            elif "error" in answer:
                refusal = answer["error"] if isinstance(answer["error"], dict) else {}
                raise QmpRefused(str(refusal.get("class", "GenericError")),
                                 f"{self.name}: {printable(refusal.get('desc', 'refused'))}")
            elif "return" in answer:
                return answer["return"]

    def wait_event(self, name: str, data: dict[str, Any], timeout: float) -> bool:
        """Whether this event, with at least these data, came already or comes in time."""
        def wanted(event: dict[str, Any]) -> bool:
            got = event.get("data")
            return (event.get("event") == name and isinstance(got, dict)
                    and all(key in got and got[key] == value for key, value in data.items()))

        deadline = self._deadline(timeout)
        for event in self.events:
            if wanted(event):
                self.events.remove(event)
                return True
        while True:
            try:
                answer = self._receive(deadline)
            except NoAnswerError:
                return False
            if "event" in answer:
                if wanted(answer):
                    return True
                self.events.append(answer)

    def wait_end(self, timeout: float) -> bool:
        """Whether the VM closes the connection in time, as it does when it ends."""
        deadline = self._deadline(timeout)
        while True:
            try:
                self._receive(deadline)
            except NoAnswerError:
                return False
            except GoneError:
                return True

    def each_event(self) -> Iterator[dict[str, Any]]:
        """Events as they come, those kept first, until the VM ends."""
        while True:
            while self.events:
                yield self.events.popleft()
            try:
                answer = self._receive(None)
            except GoneError:
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

    def _deadline(self, seconds: float) -> float:
        deadline = time.monotonic() + seconds
        return deadline if self._end is None else min(deadline, self._end)

    def _send(self, data: bytes, fds: Sequence[int], deadline: float) -> None:
        try:
            self._socket.settimeout(max(deadline - time.monotonic(), 0.001))
            if fds:
                data = data[socket.send_fds(self._socket, [data], fds):]
            self._socket.sendall(data)
        except TimeoutError:
            raise self._no_answer() from None
        except OSError as error:
            raise GoneError(f"{self.name}: the VM is gone ({error.strerror or error})") from None

    def _no_answer(self) -> NoAnswerError:
        return NoAnswerError(f"{self.name}: no answer in time", "the VM is busy or hangs")

    def _receive(self, deadline: float | None) -> dict[str, Any]:
        """The next message. :raises NoAnswerError: none came. :raises CtlError: the end."""
        begin = 0
        while (end := self._buffer.find(b"\n", begin)) < 0:
            begin = len(self._buffer)
            if begin > LINE_LIMIT:
                raise CtlError(f"{self.name}: an answer of more than {LINE_LIMIT >> 20} MiB",
                               "the VM is not to be trusted")
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                raise self._no_answer()
            try:
                self._socket.settimeout(left)
                data = self._socket.recv(65536)
            except TimeoutError:
                continue
            except OSError:
                data = b""
            if not data:
                raise GoneError(f"{self.name}: the VM closed the connection", "has it ended?")
            self._buffer += data
        line = bytes(self._buffer[:end])
        del self._buffer[:end + 1]
        try:
            message = json.loads(line, parse_constant=_refuse)
        except (ValueError, RecursionError):
            message = None
        if not isinstance(message, dict) or not _is_shallow(message):
            raise CtlError(f"{self.name}: {printable(self.path)} answers with what is not QMP",
                           "name the socket of -qmp")
        return message


def _refuse(constant: str) -> NoReturn:
    """Python's parser takes NaN and Infinity, which JSON doesn't have."""
    raise ValueError(constant)


def _is_shallow(message: Any) -> bool:
    """Whether what handles it needs no deep stack."""
    level = [message]
    for _ in range(DEPTH_LIMIT):
        level = [inner for outer in level
                 for inner in (outer.values() if isinstance(outer, dict) else outer)
                 if isinstance(inner, dict | list)]
        if not level:
            return True
    return False


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
            _connect(client, f"/proc/self/fd/{folder}/{os.path.basename(path)}", timeout)
        else:
            _connect(client, path, timeout)
    except (OSError, ValueError) as error:
        client.close()
        raise _unreachable(path, error) from None
    finally:
        if folder >= 0:
            os.close(folder)
    return client


def _connect(client: socket.socket, path: str, timeout: float) -> None:
    """A unix socket whose backlog is full doesn't make us wait, it says EAGAIN."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            client.connect(path)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
            time.sleep(_BUSY_POLL)


def _unreachable(path: str, error: OSError | ValueError) -> CtlError:
    hint = "is the VM running?"
    if isinstance(error, ConnectionRefusedError):
        hint = "nobody listens: the VM has ended"
    elif isinstance(error, PermissionError):
        hint = "be the VM's user, or root"
    elif isinstance(error, BlockingIOError | TimeoutError):
        hint = "the VM hangs: it takes no connection"
    reason = getattr(error, "strerror", None) or str(error)
    return CtlError(f"Can't connect to {printable(path)}: {printable(reason)}", hint)


def peer_of(sock: socket.socket) -> tuple[int, int]:
    """Pid and uid of who listens, as the kernel has it; (0, -1) if we can't see it."""
    try:
        data = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    except OSError:
        return 0, -1
    pid, uid, _ = struct.unpack("3i", data)
    return pid, uid
