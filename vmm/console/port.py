"""One port: between a chardev and the socket of whichever worker serves the device.

The socket pair outlives workers, and with it what the guest has not read yet.  All of this runs
on the main loop, a piece of up to CHUNK bytes at a time; what a side doesn't take is held back
for it, at most one piece, and the other side's socket or queue fills up.
"""

from __future__ import annotations

import _socket

from shared.errors import SharedError
from vmm.event_loop import READ, WRITE

TYPE_CHECKING = False  # importing typing would cost 10 ms of the start
if TYPE_CHECKING:
    from vmm.chardev.base import Chardev
    from vmm.event_loop import EventLoop
    from vmm.worker.orders import Orders

CHUNK = 65536


class Port:
    """A port that the command line asks for.

    :param nr: its number; is_console: the guest makes a terminal of it; name: for the guest.
    :raises OSError: no descriptors.
    """

    def __init__(self, nr: int, is_console: bool, name: str, chardev: str) -> None:
        self.nr = nr
        self.is_console = is_console
        self.name = name
        self.chardev_id = chardev
        ours, theirs = _socket.socketpair(_socket.AF_UNIX,
                                          _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC)
        ours.setblocking(False)
        self._socket = ours
        self._theirs = theirs
        self._chardev: Chardev | None = None
        self._loop: EventLoop | None = None
        self._events = 0          # what the loop waits for on our end
        self._output = b""        # of the guest, not taken by the chardev yet
        self._orders: Orders | None = None
        self._told = False        # what the worker at hand knows of `is_open`
        self._asked = False       # an order is under way

    @property
    def worker_end(self) -> int:
        """The worker's end; stays ours."""
        return self._theirs.fileno()

    @property
    def is_open(self) -> bool:
        """Somebody is at the host's side."""
        return self._chardev is not None and self._chardev.connected

    def describe(self) -> dict[str, object]:
        """For the options of a worker that is about to be made."""
        self._told = self.is_open
        return {"nr": self.nr, "console": self.is_console, "name": self.name,
                "open": self._told}

    # ---- who is there ----------------------------------------------------------------------

    def serve_with(self, orders: Orders) -> None:
        """Another worker, to which `describe` was told just now."""
        self._orders = orders
        self._asked = False

    def _connection_changed(self) -> None:
        assert self._loop is not None
        # Not at once: who lets go of one descriptor may be about to take another.
        self._loop.call_soon(self._tell)

    def _tell(self) -> None:
        """Tell the worker, one thing at a time: what it hears last is how it is."""
        orders, is_open = self._orders, self.is_open
        if orders is None or self._asked or is_open == self._told:
            return

        def done(problem: str) -> None:
            if self._orders is orders:  # else its successor was told when it was made
                self._asked = False
                self._tell()

        self._told = is_open
        self._asked = True
        try:
            orders.send("open", done, nr=self.nr, open=is_open)
        except SharedError:
            pass  # it is gone; the next one is told when it is made

    # ---- bytes -----------------------------------------------------------------------------

    def attach(self, chardev: Chardev, loop: EventLoop) -> None:
        """Begin to pass bytes on."""
        self._chardev = chardev
        self._loop = loop
        chardev.on_input = self._take_input
        chardev.on_writable = self._flush
        chardev.on_connection = self._connection_changed
        self._events = READ
        loop.add(self._socket.fileno(), READ, self._ready)
        self._connection_changed()

    def _take_input(self, data: bytes) -> int:
        """From the chardev: how much of it the guest's side takes now."""
        try:
            count = self._socket.send(data)
        except BlockingIOError:
            count = 0
        if count < len(data):
            self._watch(self._events | WRITE)
        return count

    def _ready(self, events: int) -> None:
        if events & WRITE:
            self._watch(self._events & ~WRITE)
            assert self._chardev is not None
            self._chardev.resume_input()
        if events & READ:
            self._pass_on()

    def _pass_on(self) -> bool:
        """One piece of output; False: there is none, or the chardev is full."""
        assert self._chardev is not None
        if not self._output:
            try:
                self._output = self._socket.recv(CHUNK)
            except BlockingIOError:
                return False
        self._output = self._output[self._chardev.write(self._output):]
        if self._output:
            self._watch(self._events & ~READ)
        return not self._output

    def _flush(self) -> None:
        """The chardev has room again, or nobody is there any more."""
        if self._pass_on() or not self._output:
            self._watch(self._events | READ)

    def _watch(self, events: int) -> None:
        if events == self._events or self._loop is None:
            return
        if not self._events:
            self._loop.add(self._socket.fileno(), events, self._ready)
        elif not events:
            self._loop.remove(self._socket.fileno())
        else:
            self._loop.modify(self._socket.fileno(), events)
        self._events = events

    def close(self) -> None:
        """Send what the guest wrote last, as far as it can be sent at once; let go."""
        if self._chardev is not None:
            while self._pass_on():
                pass
            self._chardev.on_input = self._chardev.on_writable = None
            self._chardev.on_connection = None
        self._watch(0)
        self._chardev = self._orders = None
        self._socket.close()
        self._theirs.close()
