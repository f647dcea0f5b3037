"""The log, in StratoVirt's line form, one line a call:

    YYYY-MM-DDTHH:MM:SS.nnnnnnnnn: [pid][tid][file:line]:LEVEL: text

Without `-D`, warnings and errors go to standard error.  With `-D` (no value) everything from the
level on goes to standard output: Kata reads it there.  With `-D FILE` it is appended to the
file, which is rotated at 100 MiB; seven files are kept in all.  `STRATOVIRT_LOG_LEVEL` (error,
warn, info, debug, trace) sets the level, info by default.

No `logging`: this loads before the first guest instruction.
"""

from __future__ import annotations

import _stat as stat
import _thread
import posix as os
import sys
import time

from shared import paths
from shared.errors import SharedError, places

LEVELS = ("error", "warn", "info", "debug", "trace")
_ERROR, _WARN, _INFO, _DEBUG = range(4)

ROTATE_SIZE = 100 << 20
KEEP_FILES = 7  # PATH, PATH1 ... PATH6
MAX_TEXT = 8192


class _Log:
    """Where lines go. One a process."""

    __slots__ = ("fd", "level", "lock", "path", "size")

    def __init__(self) -> None:
        self.fd = 2
        self.level = _WARN
        self.path = ""
        self.size = -1  # of a regular file with a path, which is rotated
        self.lock = _thread.allocate_lock()

    def open_file(self) -> None:
        # Not to block on a pipe: a log that nobody reads must not stop the VM.
        self.fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
                          | os.O_NONBLOCK, 0o640)
        status = os.fstat(self.fd)
        self.size = status.st_size if stat.S_ISREG(status.st_mode) else -1

    def rotate(self) -> None:
        for number in range(KEEP_FILES - 1, 0, -1):
            older = f"{self.path}{number - 1}" if number > 1 else self.path
            try:
                os.replace(older, f"{self.path}{number}")
            except OSError:
                pass  # it doesn't exist yet
        # Should this fail the old file goes on: `fd` is never one that somebody else has got.
        old = self.fd
        self.open_file()
        os.close(old)


_log = _Log()


class LogError(SharedError):
    """The log can't be opened."""


def open_log(path: str | None) -> None:
    """Direct the log.

    :param path: None: warnings to standard error; "": standard output; else a file.
    :raises LogError: the file can't be opened.
    """
    if path is None:
        return
    name = os.environ.get(b"STRATOVIRT_LOG_LEVEL", b"info").decode(errors="replace").lower()
    _log.level = LEVELS.index(name) if name in LEVELS else _INFO
    if path == "":
        _log.fd = _standard_output()
    else:
        _log.path = path
        try:
            _log.open_file()
        except (OSError, ValueError) as error:
            _log.path = ""
            reason = getattr(error, "strerror", None) or str(error)
            raise LogError(f"-D {path}: Failed to init logger: {reason}",
                           "name a file that can be written") from None


def _standard_output() -> int:
    """Standard output; where it is a pipe, by a description of our own that never blocks."""
    try:
        if stat.S_ISFIFO(os.fstat(1).st_mode):
            return os.open("/proc/self/fd/1", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        pass  # somebody else's: share it as it is
    return 1


def on_standard_error() -> bool:
    """Whether log lines go where the user sees them anyway."""
    return _log.fd == 2


def print_error(text: str) -> None:
    """`stratovirt: text` on standard error, for who started us: one line, whatever it holds."""
    try:
        os.write(2, f"stratovirt: {one_line(text)}\n".encode("utf-8", "backslashreplace"))
    except OSError:
        pass  # nobody listens


def error(text: str) -> None:
    """The VM, a device or a request failed."""
    if _log.level >= _ERROR:
        _write("ERROR", text)


def warning(text: str) -> None:
    """Something is not as the user probably wants it; the VM goes on."""
    if _log.level >= _WARN:
        _write("WARN", text)


def info(text: str) -> None:
    """What the VM does."""
    if _log.level >= _INFO:
        _write("INFO", text)


def debug(text: str) -> None:
    """For those who look for a fault."""
    if _log.level >= _DEBUG:
        _write("DEBUG", text)


def exception(text: str, caught: BaseException) -> None:
    """A defect of ours: the whole trace, in one line."""
    _write("ERROR", f"{text}: " + " | ".join(trace(caught)))


def trace(caught: BaseException) -> list[str]:
    """What led to it, whatever else is broken: nothing need be opened."""
    try:
        import traceback  # only when something is broken

        return traceback.format_exception(caught)
    except Exception:  # no descriptor to be had, most likely for the same reason
        return [*(f"{place}\n" for place in places(caught)), f"{caught!r}\n"]


def _write(level: str, text: str) -> None:
    frame = sys._getframe(2)
    now = time.time_ns()
    day = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now // 10**9))
    where = f"{paths.name(frame.f_code.co_filename)}:{frame.f_lineno}"
    head = f"{day}.{now % 10**9:09}: [{os.getpid()}][{_thread.get_native_id()}][{where}]"
    line = f"{head}:{level}: {one_line(text)}\n".encode("utf-8", "backslashreplace")
    with _log.lock:
        try:
            os.write(_log.fd, line)
            if _log.size >= 0:
                _log.size += len(line)
                if _log.size > ROTATE_SIZE:
                    _log.rotate()
        except OSError:
            pass  # a full disk or a closed terminal must not end the VM


def one_line(text: str) -> str:
    """The text without line breaks and control bytes, at most MAX_TEXT characters.

    Guests and peers choose parts of texts: none can forge a line of the log, or steer a
    terminal.
    """
    if len(text) > MAX_TEXT:
        text = text[:MAX_TEXT] + "..."
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else " " if c in "\n\t" else f"\\x{ord(c):02x}"
                   for c in text)
