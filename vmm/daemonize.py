"""`-daemonize` and `-pidfile`.

The process that the user started stays until the VM is set up and QMP listens; it then exits 0,
or 1 with the error.  The VM is its child in a session of its own.
"""

from __future__ import annotations

import os

from shared import log
from vmm.errors import ConfigError

TYPE_CHECKING = False  # importing typing would cost 10 ms of the start
if TYPE_CHECKING:
    from collections.abc import Callable

_TEXT_LIMIT = 4096
_READY = b"\0"  # no text of an error


class Ready:
    """The child's end of the pipe to the waiting parent."""

    __slots__ = ("_fd",)

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def report(self, error: str | None) -> None:
        """Tell the parent how it went, once; the standard descriptors are /dev/null then."""
        if self._fd < 0:
            return
        # First of all this: whoever reads our standard output must not wait for the VM's end.
        null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        os.close(null)
        text = _READY if error is None else error.encode("utf-8", "replace")[:_TEXT_LIMIT]
        try:
            os.write(self._fd, text or b" ")
        except BrokenPipeError:
            pass  # nobody waits any more; the VM goes on
        os.close(self._fd)
        self._fd = -1


def daemonize() -> Ready:
    """Fork; return in the child only. The parent waits for `Ready.report` and exits."""
    reader, writer = os.pipe2(os.O_CLOEXEC)
    if os.fork():
        os.close(writer)
        text = b""
        while part := os.read(reader, _TEXT_LIMIT):
            text += part
        if text == _READY:
            os._exit(0)
        # Nothing: it died before it could say why.
        message = text.decode("utf-8", "replace") or "the VM ended before it was set up"
        log.print_error(message)
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
    status = os.fstat(fd)
    try:
        os.write(fd, str(os.getpid()).encode())
    except OSError as error:
        os.unlink(path)
        raise ConfigError(f"-pidfile {path}: {error.strerror}",
                          "name a file that can be written") from None
    finally:
        os.close(fd)
    full = os.path.abspath(path)
    return lambda: _remove(full, status)


def _remove(path: str, ours: os.stat_result) -> None:
    """Remove the file, if it is still the one that we made."""
    try:
        status = os.lstat(path)
        if (status.st_dev, status.st_ino) == (ours.st_dev, ours.st_ino):
            os.unlink(path)
    except OSError:
        pass  # somebody removed it


def _remove_stale(path: str) -> None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            text = os.read(fd, 32).strip()
        finally:
            os.close(fd)
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
