"""The socket of a foreign vhost-user back end, as `-chardev socket` names it."""

from __future__ import annotations

import _socket
import _stat as stat
import posix as os
import time

from vmm.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm.config.model import ChardevConfig

CONNECT_LIMIT = 2.0
RETRY = 0.01


def connect_backend(config: ChardevConfig, server_too: bool = False) -> int:
    """Connect to the back end that listens at a chardev's path; returns the socket.

    :param server_too: connect although the chardev says `server`.
    :raises ConfigError: not a unix socket, nobody listens, or it doesn't accept in time.
    """
    what = f"-chardev socket,id={config.id}"
    if config.kind != "socket":
        raise ConfigError(f"-chardev {config.kind},id={config.id}: a vhost-user device needs a "
                          "socket", "use -chardev socket,id=…,path=…")
    if config.server and not server_too:
        raise ConfigError(f"{what}: a vhost-user device connects to its back end",
                          "remove server and let the back end listen at the path")
    if config.fd >= 0:
        return _inherited(what, config.fd)
    if not config.path:
        raise ConfigError(f"{what}: a vhost-user back end is reached by a unix socket",
                          "use path=…")
    sock = _socket.socket(_socket.AF_UNIX,
                          _socket.SOCK_STREAM | _socket.SOCK_NONBLOCK | _socket.SOCK_CLOEXEC)
    try:
        _connect(sock, what, config.path)
    except ConfigError:
        sock.close()
        raise
    return sock.detach()


def _connect(sock: _socket.socket, what: str, path: str) -> None:
    deadline = time.monotonic() + CONNECT_LIMIT
    while True:
        try:
            sock.connect(path)
            return
        except BlockingIOError:
            # A unix socket whose backlog is full: nobody accepts.
            if time.monotonic() > deadline:
                raise ConfigError(f"{what}: the back end at {path} does not accept connections",
                                  "it serves another VM, or hangs") from None
            time.sleep(RETRY)
        except OSError as error:
            raise ConfigError(f"{what}: cannot connect to {path}: {error.strerror or error}",
                              "start the vhost-user back end first") from None


def _inherited(what: str, fd: int) -> int:
    try:
        if not stat.S_ISSOCK(os.fstat(fd).st_mode):
            raise ConfigError(f"{what}: descriptor {fd} is not a socket", "pass a connected one")
    except OSError as error:
        raise ConfigError(f"{what}: descriptor {fd}: {error.strerror}",
                          "pass an open, connected socket") from None
    return fd
