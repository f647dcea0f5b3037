"""The log, in StratoVirt's line form, one line a call:

    YYYY-MM-DDTHH:MM:SS.nnnnnnnnn: [pid][tid][file:line]:LEVEL: text

Without `-D`, warnings and errors go to standard error.  With `-D` (no value) everything from the
level on goes to standard output: Kata reads it there.  With `-D FILE` it is appended to the
file, which is rotated at 100 MiB; seven files are kept in all.  `STRATOVIRT_LOG_LEVEL` (error,
warn, info, debug, trace) sets the level, info by default.

No `logging`: this loads before the first guest instruction.
"""

from __future__ import annotations

import _thread
import os
import sys
import time

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
        self.size = 0
        self.lock = _thread.allocate_lock()

    def open_file(self) -> None:
        self.fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o640)
        self.size = os.fstat(self.fd).st_size

    def rotate(self) -> None:
        os.close(self.fd)
        for number in range(KEEP_FILES - 1, 0, -1):
            older = f"{self.path}{number - 1}" if number > 1 else self.path
            try:
                os.replace(older, f"{self.path}{number}")
            except OSError:
                pass  # it doesn't exist yet
        self.open_file()


_log = _Log()


def open_log(path: str | None) -> None:
    """Direct the log.

    :param path: None: warnings to standard error; "": standard output; else a file.
    :raises OSError: the file can't be opened.
    """
    if path is None:
        return
    name = os.environ.get("STRATOVIRT_LOG_LEVEL", "info").lower()
    _log.level = LEVELS.index(name) if name in LEVELS else _INFO
    if path == "":
        _log.fd = 1
    else:
        _log.path = path
        _log.open_file()


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
    import traceback  # only when something is broken

    _write("ERROR", f"{text}: " + " | ".join(traceback.format_exception(caught)))


def _write(level: str, text: str) -> None:
    frame = sys._getframe(2)
    now = time.time_ns()
    day = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now // 10**9))
    where = f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"
    head = f"{day}.{now % 10**9:09}: [{os.getpid()}][{_thread.get_native_id()}][{where}]"
    line = f"{head}:{level}: {_one_line(text)}\n".encode("utf-8", "backslashreplace")
    with _log.lock:
        try:
            os.write(_log.fd, line)
            if _log.path:
                _log.size += len(line)
                if _log.size > ROTATE_SIZE:
                    _log.rotate()
        except OSError:
            pass  # a full disk or a closed terminal must not end the VM


def _one_line(text: str) -> str:
    """Guests and peers choose parts of the text: no line break or control byte gets through."""
    if len(text) > MAX_TEXT:
        text = text[:MAX_TEXT] + "..."
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else " " if c in "\n\t" else f"\\x{ord(c):02x}"
                   for c in text)
