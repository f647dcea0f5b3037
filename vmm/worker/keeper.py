"""The core's side of the keeper (native/keeper/keeper.c), which starts nurseries for it.

Once it is confined the core can't execute programs, and what it executed would inherit its
filter: a nursery could make no namespaces.  So a small program is executed before, holds nothing
and knows one command line.  (To leave execve to the main thread alone would mean to leave it
mount, setns and the rest as well, for the nursery's sake.)
"""

from __future__ import annotations

import _socket
import errno
import posix as os

import native
from vmm.errors import WorkerSpawnError

PROGRAM = f"{next(iter(native.__path__))}/_keeper"
ANSWER_LIMIT = 5.0  # seconds; a clone takes a fraction of a millisecond
_SOCKET_FD = 3


def spawn(program: str, argv: list[str], environment: dict[str, str], channel: int) -> int:
    """Execute a program with `channel` as descriptor 3 and /dev/null as 0 to 2, in a session of
    its own (a terminal's signals are for the core alone); its pid.

    :raises OSError: it can't be executed.
    """
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    # Done in this order, in the child; each copy loses close-on-exec, and the originals keep
    # it. The channel moves out of the way of 0 to 3 first.
    high = 64 + max(channel, null)
    actions = [(os.POSIX_SPAWN_DUP2, channel, high),
               *((os.POSIX_SPAWN_DUP2, null, fd) for fd in (0, 1, 2)),
               (os.POSIX_SPAWN_DUP2, high, _SOCKET_FD), (os.POSIX_SPAWN_CLOSE, high)]
    try:
        return os.posix_spawn(program, argv, environment, file_actions=actions, setsid=True)
    finally:
        os.close(null)


class Keeper:
    """The running keeper.

    :param argv: what it executes when asked, with `environment`.
    :raises WorkerSpawnError: it can't be executed.
    """

    def __init__(self, argv: list[str], environment: dict[str, str]) -> None:
        ours, theirs = _socket.socketpair(_socket.AF_UNIX,
                                          _socket.SOCK_SEQPACKET | _socket.SOCK_CLOEXEC)
        try:
            self.pid = spawn(PROGRAM, ["sv-keeper", *argv], environment, theirs.fileno())
        except OSError as error:
            ours.close()
            raise WorkerSpawnError(f"Can't start the keeper {PROGRAM}: {error.strerror}",
                                   "install it again, or say -sandbox on,seccomp=off") from error
        finally:
            theirs.close()
        ours.settimeout(ANSWER_LIMIT)
        self._socket = ours

    def spawn(self, channel: int) -> int:
        """Start the program, as `spawn` does; its pid.

        :raises OSError: the keeper is gone or can't.
        """
        null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
        try:
            packed = b"".join(fd.to_bytes(4, "little") for fd in (channel, null))
            self._socket.sendmsg([b"!"], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, packed)],
                                 _socket.MSG_NOSIGNAL)
            data, control, _, _ = self._socket.recvmsg(4, _socket.CMSG_SPACE(4),
                                                       _socket.MSG_CMSG_CLOEXEC)
        finally:
            os.close(null)
        for _, _, fds in control:
            os.close(int.from_bytes(fds[:4], "little"))
        pid = int.from_bytes(data, "little", signed=True)
        if len(data) != 4 or pid <= 0:
            error = -pid or errno.EPIPE
            raise OSError(error, os.strerror(error))
        return pid

    def close(self) -> None:
        """It ends by itself."""
        self._socket.close()
        try:
            os.waitpid(self.pid, 0)
        except ChildProcessError:
            pass
