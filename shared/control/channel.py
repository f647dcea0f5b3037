"""Control channels: SOCK_SEQPACKET pairs that carry one message (a dict) and descriptors.

Between core and nursery, and between core and each worker.  Never needed for the correctness
of a device; the guest can't reach it.
"""

from __future__ import annotations

import _socket
import posix as os

from shared.control.codec import CodecError, decode, encode
from shared.errors import SharedError
from shared.fds import close_all

MAX_MESSAGE = 32768
MAX_FDS = 64  # a console worker gets one for each of its ports
_SCM_BYTES = _socket.CMSG_SPACE(MAX_FDS * 4)

Message = dict[str, object]


class ChannelClosed(SharedError):
    """The other side closed the channel or broke it."""


def pair() -> tuple[int, int]:
    """Two connected descriptors, close-on-exec, blocking."""
    a, b = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_SEQPACKET | _socket.SOCK_CLOEXEC)
    return a.detach(), b.detach()


class Channel:
    """One end; owns its descriptor. `blocking` False: send and receive never wait."""

    def __init__(self, fd: int, blocking: bool = True) -> None:
        self._socket = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET, 0, fd)
        self._socket.setblocking(blocking)

    def fileno(self) -> int:
        """Readable when `recv` has something."""
        return self._socket.fileno()

    def send(self, message: Message, fds: tuple[int, ...] | list[int] = ()) -> None:
        """Send one message; the descriptors stay the caller's.

        :raises ChannelClosed: the other side is gone, or does not read (non-blocking only).
        :raises CodecError: the message can't be encoded or is too long.
        """
        data = encode(message)
        if len(data) > MAX_MESSAGE:
            raise CodecError(f"A control message of {len(data)} bytes is too long",
                             f"at most {MAX_MESSAGE}")
        ancillary = []
        if fds:
            packed = b"".join(fd.to_bytes(4, "little") for fd in fds)
            ancillary = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, packed)]
        try:
            self._socket.sendmsg([data], ancillary, _socket.MSG_NOSIGNAL)
        except OSError as error:
            raise ChannelClosed(f"Can't send a control message: {error.strerror}") from error

    def recv(self) -> tuple[Message, list[int]]:
        """One message and its descriptors, which are the caller's from now on.

        :raises ChannelClosed: end of file, or an error of the socket.
        :raises BlockingIOError: nothing there (non-blocking only).
        :raises CodecError: the message is not what `send` makes; its descriptors are closed.
        """
        try:
            data, ancillary, flags = self._receive()
        except BlockingIOError:
            raise
        except OSError as error:
            raise ChannelClosed(f"Can't read a control message: {error.strerror}") from error
        fds: list[int] = []
        for level, kind, packed in ancillary:
            if level == _socket.SOL_SOCKET and kind == _socket.SCM_RIGHTS:
                fds += [int.from_bytes(packed[i:i + 4], "little")
                        for i in range(0, len(packed) - 3, 4)]
        if not data and not fds:
            raise ChannelClosed("The other side closed the control channel")
        try:
            if flags & (_socket.MSG_TRUNC | _socket.MSG_CTRUNC):
                raise CodecError("A control message is too long or has too many descriptors")
            message = decode(data)
            if not isinstance(message, dict):
                raise CodecError("A control message is not a map")
        except CodecError:
            close_all(fds)
            raise
        return dict(message), fds

    def _receive(self) -> tuple[bytes, list[tuple[int, int, bytes]], int]:
        space = (MAX_MESSAGE, _SCM_BYTES, _socket.MSG_CMSG_CLOEXEC)
        try:
            data, ancillary, flags, _ = self._socket.recvmsg(*space)
        except ConnectionResetError:
            # The other side ended with messages of ours unread. That is told once, before
            # what it sent last, which may say why.
            data, ancillary, flags, _ = self._socket.recvmsg(*space)
        return data, ancillary, flags

    def detach(self) -> int:
        """Give the descriptor to the caller."""
        return self._socket.detach()

    def close(self) -> None:
        """Close; harmless when closed."""
        self._socket.close()


def close_quietly(fd: int) -> None:
    """Close a descriptor whose errors nobody can act on."""
    try:
        os.close(fd)
    except OSError:
        pass
