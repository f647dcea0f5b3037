"""Character devices: where the guest's consoles go, and where their input comes from.

A chardev is a pair of non-blocking descriptors on the event loop.  Output that the other side
doesn't take yet is held back: `write` says how much it took, and `on_writable` is called when
there is room again, so that the guest is slowed down instead of a buffer growing.  Where nobody
is connected output is dropped, as a serial line does it.
"""

from __future__ import annotations

import posix as os

from vmm.event_loop import READ, WRITE

TYPE_CHECKING = False  # importing typing would cost 10 ms of the start
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.event_loop import EventLoop

CHUNK = 4096


class Chardev:
    """Base: nobody is connected, output is dropped.

    :param id: the user's; `kind` as in `-chardev`.
    """

    def __init__(self, id: str, kind: str, loop: EventLoop) -> None:
        self.id = id
        self.kind = kind
        self.loop = loop
        # The frontend's: take input (returns how much was taken), hear of room for output.
        self.on_input: Callable[[bytes], int] | None = None
        self.on_writable: Callable[[], None] | None = None
        # ... and of who comes and leaves (`connected` may have changed).
        self.on_connection: Callable[[], None] | None = None
        self._in_fd = -1
        self._out_fd = -1
        self._events: dict[int, int] = {}  # what the loop waits for, by descriptor
        self._held = b""       # input that the frontend didn't take yet
        self._blocked = False  # output is held back until the descriptor takes more

    # ---- the frontend's side ---------------------------------------------------------------

    def write(self, data: bytes) -> int:
        """Send bytes; how many were taken (or dropped, where nobody is connected)."""
        if self._out_fd < 0:
            return len(data)
        try:
            count = os.write(self._out_fd, data)
        except BlockingIOError:
            count = 0
        except OSError:
            self._hung_up()
            return len(data)
        if count < len(data):
            self._blocked = True
            self._watch()
        return count

    def resume_input(self) -> None:
        """The frontend has room again for input that it refused."""
        if self._held and self.on_input is not None:
            self._held = self._held[self.on_input(self._held):]
        self._watch()

    def filename(self) -> str:
        """What `query-chardev` says, as QEMU has it: `pty:/dev/pts/3`, `unix:/path,server`…"""
        return self.kind

    @property
    def connected(self) -> bool:
        """Whether somebody is at the other side."""
        return self._out_fd >= 0 or self._in_fd >= 0

    def close(self) -> None:
        """Let go of everything; what was created by name is removed."""
        self._detach()

    # ---- for subclasses --------------------------------------------------------------------

    def _attach(self, in_fd: int, out_fd: int) -> None:
        """Serve these non-blocking descriptors (-1: none)."""
        self._in_fd = in_fd
        self._out_fd = out_fd
        self._watch()
        if self.on_connection is not None:
            self.on_connection()

    def _detach(self) -> None:
        """Serve nobody; the descriptors are the subclass's to close."""
        for fd in self._events:
            self.loop.remove(fd)
        self._events.clear()
        self._in_fd = self._out_fd = -1
        self._held = b""
        if self._blocked:
            self._blocked = False
            if self.on_writable is not None:
                self.on_writable()
        if self.on_connection is not None:
            self.on_connection()

    def _hung_up(self) -> None:
        """The other side is gone."""
        self._detach()

    def _watch(self) -> None:
        """Tell the loop what we wait for: input unless some is held, output if it is blocked."""
        wanted: dict[int, int] = {}
        if self._in_fd >= 0 and not self._held:
            wanted[self._in_fd] = READ
        if self._out_fd >= 0 and self._blocked:
            wanted[self._out_fd] = wanted.get(self._out_fd, 0) | WRITE
        for fd in [fd for fd in self._events if fd not in wanted]:
            self.loop.remove(fd)
            del self._events[fd]
        for fd, events in wanted.items():
            if fd not in self._events:
                self.loop.add(fd, events, self._handler(fd))
            elif self._events[fd] != events:
                self.loop.modify(fd, events)
            self._events[fd] = events

    def _handler(self, fd: int) -> Callable[[int], None]:
        return lambda events: self._ready(fd, events)

    def _ready(self, fd: int, events: int) -> None:
        # A full pipe without a reader says error and never "writable": write, to learn of it.
        if fd == self._out_fd and self._blocked and events != READ:
            self._blocked = False
            self._watch()
            if self.on_writable is not None:
                self.on_writable()
        if fd == self._in_fd and events & ~WRITE:
            self._read()

    def _read(self) -> None:
        try:
            data = os.read(self._in_fd, CHUNK)
        except BlockingIOError:
            return
        except OSError:
            self._hung_up()
            return
        if not data:
            self._hung_up()
            return
        if self.on_input is not None:
            self._held = data[self.on_input(data):]
            if self._held:
                self._watch()
