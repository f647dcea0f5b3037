"""`-daemonize` and `-pidfile`.

The process that the user started stays until the VM is set up and QMP listens; it then exits 0,
or 1 with the error.  The VM is its child in a session of its own.
"""

from __future__ import annotations

import os
import sys

from vmm.errors import ConfigError

TYPE_CHECKING = False  # importing typing would cost 10 ms of the start
if TYPE_CHECKING:
    from collections.abc import Callable

_TEXT_LIMIT = 4096


class Ready:
    """The child's end of the pipe to the waiting parent."""

    __slots__ = ("_fd",)

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def report(self, error: str | None) -> None:
        """Tell the parent how it went, once; standard error then goes to /dev/null."""
        if self._fd < 0:
            return
        text = b"ok" if error is None else error.encode("utf-8", "replace")[:_TEXT_LIMIT]
        os.write(self._fd, text)
        os.close(self._fd)
        self._fd = -1
        null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        os.close(null)


def daemonize() -> Ready:
    """Fork; return in the child only. The parent waits for `Ready.report` and exits."""
    reader, writer = os.pipe2(os.O_CLOEXEC)
    if os.fork():
        os.close(writer)
        text = b""
        while part := os.read(reader, _TEXT_LIMIT):
            text += part
        if text == b"ok":
            os._exit(0)
        # Nothing: it died before it could say why.
        message = text.decode("utf-8", "replace") or "the VM ended before it was set up"
        sys.stderr.write(f"stratovirt: {message}\n")
        sys.stderr.flush()
        os._exit(1)
    os.close(reader)
    os.setsid()
    return Ready(writer)


def write_pidfile(path: str) -> Callable[[], None]:
    """Write our pid; returns what removes the file.

    A file whose process is gone is replaced; one whose process lives is refused.

    :raises ConfigError: it exists and its process lives, or it can't be written.
    """
    try:
        _remove_stale(path)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise ConfigError(f"-pidfile {path}: Pidfile path is existed yet",
                          "choose another path or end that VM") from None
    except OSError as error:
        raise ConfigError(f"-pidfile {path}: {error.strerror}",
                          "name a file that can be written") from None
    os.write(fd, str(os.getpid()).encode())
    os.close(fd)
    return lambda: os.unlink(path)


def _remove_stale(path: str) -> None:
    try:
        with open(path, "rb") as file:
            text = file.read(32).strip()
    except FileNotFoundError:
        return
    if not text.isdigit():
        raise FileExistsError
    try:
        os.kill(int(text), 0)
    except ProcessLookupError:
        os.unlink(path)
        return
    except (PermissionError, OverflowError):
        pass
    raise FileExistsError
