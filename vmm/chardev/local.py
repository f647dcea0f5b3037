"""Character devices on this host's own files: stdio, pty, file, and the log."""

from __future__ import annotations

import _stat as stat
import posix as os

from shared import log
from vmm.chardev.base import Chardev
from vmm.errors import ConfigError

TYPE_CHECKING = False  # importing typing would cost 10 ms of the start
if TYPE_CHECKING:
    from vmm.config.model import ChardevConfig
    from vmm.event_loop import EventLoop

_PTY_POLL = 0.2  # seconds between looks for somebody who opened the pty


class Stdio(Chardev):
    """Standard input and output; a terminal is raw while the VM runs.

    The descriptors' flags are shared with whoever else has them (a shell): they stay blocking,
    and input and output go through descriptions of our own where that is possible.
    """

    def __init__(self, config: ChardevConfig, loop: EventLoop) -> None:
        super().__init__(config.id, config.kind, loop)
        self._attributes: list[object] | None = None
        self._opened: list[int] = []
        self._made_nonblocking: list[int] = []
        if os.isatty(0):
            self._make_raw()
        in_fd, out_fd = self._own(0, os.O_RDONLY), self._own(1, os.O_WRONLY)
        # The loop can't wait for a regular file or /dev/null: those are never blocked.
        self._attach(in_fd if _pollable(in_fd) else -1, out_fd)

    def _own(self, fd: int, mode: int) -> int:
        if stat.S_ISREG(os.fstat(fd).st_mode):
            # It never blocks, and its position is shared with whoever else writes to it.
            own = os.dup(fd)
            self._opened.append(own)
            return own
        try:
            own = os.open(f"/proc/self/fd/{fd}",
                          mode | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
        except OSError:  # a socket, or a file that we may not open
            own = os.dup(fd)
            if os.get_blocking(own):
                self._made_nonblocking.append(own)
                os.set_blocking(own, False)
        self._opened.append(own)
        return own

    def _make_raw(self) -> None:
        import termios  # only on a terminal
        import tty

        self._attributes = termios.tcgetattr(0)
        tty.setraw(0, termios.TCSANOW)
        attributes = termios.tcgetattr(0)
        attributes[1] |= termios.OPOST  # our own messages still need carriage returns
        termios.tcsetattr(0, termios.TCSANOW, attributes)

    def _hung_up(self) -> None:
        # Input has ended; output may go on.
        out_fd = self._out_fd
        self._detach()
        self._attach(-1, out_fd)

    def write(self, data: bytes) -> int:
        """See `Chardev.write`."""
        try:
            return super().write(data)
        finally:
            if self._out_fd >= 0 and self._blocked and not _pollable(self._out_fd):
                self._blocked = False

    def close(self) -> None:
        """Restore the terminal, and what we share with others."""
        if self._attributes is not None:
            import termios

            termios.tcsetattr(0, termios.TCSAFLUSH, self._attributes)  # type: ignore[arg-type]
            self._attributes = None
        self._detach()
        while self._made_nonblocking:
            os.set_blocking(self._made_nonblocking.pop(), True)
        while self._opened:
            os.close(self._opened.pop())


def _pollable(fd: int) -> bool:
    mode = os.fstat(fd).st_mode
    if stat.S_ISCHR(mode):
        return os.isatty(fd)
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)


class Pty(Chardev):
    """A pseudo terminal; its name is in the log and in `query-chardev`."""

    def __init__(self, config: ChardevConfig, loop: EventLoop) -> None:
        super().__init__(config.id, config.kind, loop)
        self._master, follower = os.openpty()
        self.path = os.ttyname(follower)
        self._set_raw(follower)
        os.close(follower)
        os.set_blocking(self._master, False)
        self._closed = False
        log.info(f"char device redirected to {self.path} (label {config.id})")
        self._look()

    @staticmethod
    def _set_raw(fd: int) -> None:
        import termios
        import tty

        tty.setraw(fd, termios.TCSANOW)

    def _look(self) -> None:
        """A master whose other side nobody has open says hang-up for ever: look now and then."""
        import select

        if self._closed:
            return
        poll = select.poll()
        poll.register(self._master, 0)
        if poll.poll(0):
            self.loop.call_later(_PTY_POLL, self._look)
        elif self._in_fd < 0:
            self._attach(self._master, self._master)

    def _hung_up(self) -> None:
        self._detach()
        self.loop.call_later(_PTY_POLL, self._look)

    def filename(self) -> str:
        """See `Chardev.filename`."""
        return f"pty:{self.path}"

    def close(self) -> None:
        """The pseudo terminal disappears."""
        if not self._closed:
            self._closed = True
            self._detach()
            os.close(self._master)


class File(Chardev):
    """Output into a file, which is emptied first; no input."""

    def __init__(self, config: ChardevConfig, loop: EventLoop) -> None:
        super().__init__(config.id, config.kind, loop)
        self.path = config.path
        try:
            self._fd = os.open(config.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
                               | os.O_NONBLOCK, 0o600)
        except OSError as error:
            raise ConfigError(f"{config.option},path={config.path}: {error.strerror}",
                              "name a file that can be written") from None
        self._attach(-1, self._fd)

    def write(self, data: bytes) -> int:
        """See `Chardev.write`; a full disk loses output, it doesn't stop the guest."""
        try:
            os.write(self._fd, data)
        except OSError:
            pass
        return len(data)

    def filename(self) -> str:
        """See `Chardev.filename`."""
        return f"file:{self.path}"

    def close(self) -> None:
        """Close the file; it stays."""
        if self._fd >= 0:
            self._detach()
            os.close(self._fd)
            self._fd = -1


class ToLog(Chardev):
    """Each line of output becomes a line of the log."""

    def __init__(self, config: ChardevConfig, loop: EventLoop) -> None:
        super().__init__(config.id, config.kind, loop)
        self._line = b""

    @property
    def connected(self) -> bool:
        """The log is always there."""
        return True

    def write(self, data: bytes) -> int:
        """See `Chardev.write`."""
        *lines, self._line = (self._line + data).split(b"\n")
        for line in lines:
            log.info(f"console {self.id}: {line.decode('utf-8', 'replace').rstrip()}")
        self._line = self._line[-4096:]
        return len(data)
