"""One vhost-user message in, one out, with its descriptors, over a unix stream socket.

The header is checked before the payload is waited for, so a hostile peer can make us allocate
neither much nor for long.  A stream has no way back from half a message: after any error the
connection is broken, and every later call says so.  The one exception is a timeout before the
first byte: the message may still come, or go.
"""

from __future__ import annotations

import _socket
import posix as os
import select
import time

from shared.fds import close_all
from shared.vhost_user.errors import (
    AbortedError,
    ConnectionLostError,
    ProtocolError,
    TimedOutError,
    VhostUserError,
)
from shared.vhost_user.messages import (
    FLAG_NEED_REPLY,
    FLAG_REPLY,
    HEADER,
    MAX_FDS,
    MAX_PAYLOAD,
    VERSION,
    VERSION_MASK,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

_INT = 4
_CONTROL_SPACE = _socket.CMSG_SPACE(MAX_FDS * _INT)
_RECV_FLAGS = _socket.MSG_DONTWAIT | _socket.MSG_CMSG_CLOEXEC
_SEND_FLAGS = _socket.MSG_DONTWAIT | _socket.MSG_NOSIGNAL


class Message:
    """A received message. Its descriptors belong to whoever holds it: `take_fds` or `close`."""

    __slots__ = ("fds", "need_reply", "payload", "request")

    def __init__(self, request: int, need_reply: bool, payload: bytes, fds: list[int]) -> None:
        self.request = request
        self.need_reply = need_reply
        self.payload = payload
        self.fds = fds

    def take_fds(self) -> list[int]:
        """Hand the descriptors to the caller, who closes them."""
        fds, self.fds = self.fds, []
        return fds

    def close(self) -> None:
        """Close the descriptors that nobody took."""
        close_all(self.take_fds())


class Connection:
    """A vhost-user socket.

    :param fd: a connected unix stream socket; owned from now on.
    :param peer: how errors name the other end, e.g. "back end of disk0".
    :param abort_fd: when readable (it is never read), every wait ends with AbortedError;
        -1: none. Not owned.
    """

    __slots__ = ("_abort_fd", "_broken", "_midway", "_peer", "_socket")

    def __init__(self, fd: int, peer: str, abort_fd: int = -1) -> None:
        self._socket: _socket.socket | None = _socket.socket(
            _socket.AF_UNIX, _socket.SOCK_STREAM, 0, fd)
        self._peer = peer
        self._abort_fd = abort_fd
        self._broken: VhostUserError | None = None
        self._midway = False  # part of a message has been sent or received

    @property
    def broken(self) -> VhostUserError | None:
        """The error that ended this connection, None while it is good."""
        return self._broken

    def fileno(self) -> int:
        """The socket's descriptor, -1 after `close`."""
        return self._socket.fileno() if self._socket is not None else -1

    def send(self, request: int, payload: bytes = b"", fds: Sequence[int] = (), *,
             need_reply: bool = False, reply: bool = False,
             deadline: float | None = None) -> None:
        """Send one message; the descriptors stay the caller's.

        :param deadline: monotonic seconds; None waits for ever.
        :raises ConnectionLostError, TimedOutError, AbortedError: see the module's text.
        """
        flags = VERSION | (FLAG_NEED_REPLY if need_reply else 0) | (FLAG_REPLY if reply else 0)
        data = HEADER.pack(request, flags, len(payload)) + payload
        control = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, _pack_fds(fds))] if fds else []
        try:
            sent = 0
            self._midway = False
            while sent < len(data):
                try:
                    # The descriptors travel with the first byte, never again with a later one.
                    sent += self._alive().sendmsg([data[sent:]], control, _SEND_FLAGS)
                    control = []
                    self._midway = True
                except BlockingIOError:
                    self._wait(select.POLLOUT, deadline, "take a message")
                except InterruptedError:
                    continue
                except OSError as error:
                    raise self._lost(error) from None
        except VhostUserError as error:
            self._break(error)
            raise

    def recv(self, *, replies: bool, deadline: float | None = None) -> Message:
        """Receive one message.

        :param replies: whether the reply flag must be set (True) or clear (False).
        :param deadline: monotonic seconds; None waits for ever.
        :raises ConnectionLostError, ProtocolError, TimedOutError, AbortedError: see the
            module's text; descriptors that came are closed.
        """
        fds: list[int] = []
        self._midway = False
        try:
            header = self._recv_header(fds, deadline)
            request, flags, size = HEADER.unpack(header)
            self._check_header(flags, size, replies)
            payload = self._recv_payload(size, deadline)
        except VhostUserError as error:
            close_all(fds)
            self._break(error)
            raise
        return Message(request, bool(flags & FLAG_NEED_REPLY), payload, fds)

    def protocol_error(self, what: str, hint: str = "") -> ProtocolError:
        """Break the connection because of what the peer sent; returns the error to raise."""
        error = ProtocolError(f"The {self._peer} {what}", hint)
        self._break(error)
        return error

    def shutdown(self) -> None:
        """Make both ends see the end of the stream at once; any thread, harmless if closed."""
        if self._socket is not None:
            try:
                self._socket.shutdown(_socket.SHUT_RDWR)
            except OSError:
                return

    def close(self) -> None:
        """Close the socket. Harmless when closed."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    # ---- inside ----------------------------------------------------------------------------

    def _alive(self) -> _socket.socket:
        if self._broken is not None:
            raise self._broken
        if self._socket is None:
            raise ConnectionLostError(f"The connection to the {self._peer} is closed")
        return self._socket

    def _break(self, error: VhostUserError) -> None:
        if isinstance(error, TimedOutError) and not self._midway:
            return
        if self._broken is None:
            self._broken = error

    def _lost(self, error: OSError) -> VhostUserError:
        return ConnectionLostError(
            f"The {self._peer} is gone: {os.strerror(error.errno or 0)}", "look at its log")

    def _recv_header(self, fds: list[int], deadline: float | None) -> bytes:
        header = b""
        while len(header) < HEADER.size:
            try:
                data, control, flags, _ = self._alive().recvmsg(
                    HEADER.size - len(header), _CONTROL_SPACE, _RECV_FLAGS)
            except BlockingIOError:
                self._wait(select.POLLIN, deadline, "send a message")
                continue
            except InterruptedError:
                continue
            except OSError as error:
                raise self._lost(error) from None
            for level, kind, body in control:
                if level == _socket.SOL_SOCKET and kind == _socket.SCM_RIGHTS:
                    fds.extend(_unpack_fds(body))
            if flags & _socket.MSG_CTRUNC or len(fds) > MAX_FDS:
                raise ProtocolError(f"The {self._peer} sent more than {MAX_FDS} descriptors",
                                    "a message carries at most that many")
            self._check_more(data, len(header), HEADER.size, "header")
            header += data
            self._midway = True
        return header

    def _recv_payload(self, size: int, deadline: float | None) -> bytes:
        payload = b""
        while len(payload) < size:
            try:
                # Descriptors that a peer attaches to payload bytes: the kernel closes them,
                # because there is no room for control data here.
                data = self._alive().recv(size - len(payload), _RECV_FLAGS)
            except BlockingIOError:
                self._wait(select.POLLIN, deadline, "finish a message")
                continue
            except InterruptedError:
                continue
            except OSError as error:
                raise self._lost(error) from None
            self._check_more(data, len(payload), size, "payload")
            payload += data
        return payload

    def _check_more(self, data: bytes, have: int, size: int, part: str) -> None:
        if data:
            return
        if part == "header" and have == 0:
            raise ConnectionLostError(f"The {self._peer} closed the connection",
                                      "look at its log")
        raise ConnectionLostError(f"The {self._peer} closed the connection after {have} of "
                                  f"{size} bytes of a {part}", "look at its log")

    def _check_header(self, flags: int, size: int, replies: bool) -> None:
        if flags & VERSION_MASK != VERSION:
            raise ProtocolError(f"The {self._peer} speaks protocol version "
                                f"{flags & VERSION_MASK}", f"it must be {VERSION}")
        if bool(flags & FLAG_REPLY) != replies:
            raise ProtocolError(f"The {self._peer} sent a "
                                f"{'request' if replies else 'reply'}",
                                f"a {'reply' if replies else 'request'} was due")
        if size > MAX_PAYLOAD:
            raise ProtocolError(f"The {self._peer} announced a payload of {size} bytes",
                                f"at most {MAX_PAYLOAD} are allowed")

    def _wait(self, events: int, deadline: float | None, what: str) -> None:
        """Wait until the socket is ready, or raise."""
        poll = select.poll()
        fd = self._alive().fileno()
        poll.register(fd, events)
        if self._abort_fd >= 0:
            poll.register(self._abort_fd, select.POLLIN)
        timeout = None
        if deadline is not None:
            timeout = max(0.0, deadline - time.monotonic()) * 1000
        ready = dict(poll.poll(timeout))
        if self._abort_fd in ready:
            raise AbortedError(f"Gave up waiting for the {self._peer}", "the VM is ending")
        if fd not in ready:
            raise TimedOutError(f"The {self._peer} did not {what} in time",
                                "it hangs or is overloaded")


def _pack_fds(fds: Sequence[int]) -> bytes:
    return b"".join(fd.to_bytes(_INT, "little", signed=True) for fd in fds)


def _unpack_fds(body: bytes) -> list[int]:
    return [int.from_bytes(body[i:i + _INT], "little", signed=True)
            for i in range(0, len(body) - len(body) % _INT, _INT)]
