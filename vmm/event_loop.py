"""The core's one event loop: descriptors, timers and calls from other threads.

Only C modules (`select`, `_thread`, `time`, `os`) are used: this loads before the first guest
instruction.  Callbacks run on the main thread, never nested, and must not block: what waits
for a back end runs on a thread of its own and comes back through `call_soon`.
"""

from __future__ import annotations

import posix as os
import select
import time

TYPE_CHECKING = False  # importing typing would cost 10 ms of the start
if TYPE_CHECKING:
    from collections.abc import Callable

READ = select.EPOLLIN
WRITE = select.EPOLLOUT


class Timer:
    """A call at a monotonic time; `cancel` makes it never happen."""

    __slots__ = ("callback", "when")

    def __init__(self, when: float, callback: Callable[[], None]) -> None:
        self.when = when
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        """Never call. Harmless after the call."""
        self.callback = None


class EventLoop:
    """epoll, timers, and `call_soon` from any thread."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._handlers: dict[int, Callable[[int], None]] = {}
        self._fresh: set[int] = set()  # descriptors that came after the last poll
        self._timers: list[Timer] = []
        self._calls: list[Callable[[], None]] = []
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll.register(self._wake_fd, READ)
        self._running = False
        self.on_exception: Callable[[BaseException], None] | None = None

    def add(self, fd: int, events: int, handler: Callable[[int], None]) -> None:
        """Call `handler(events)` whenever `fd` is ready (level triggered)."""
        self._epoll.register(fd, events)
        self._handlers[fd] = handler
        self._fresh.add(fd)

    def modify(self, fd: int, events: int) -> None:
        """Wait for other events on `fd`; 0 waits for hang-up only."""
        self._epoll.modify(fd, events)

    def remove(self, fd: int) -> None:
        """Forget `fd`; call before closing it. Unknown descriptors are ignored."""
        if self._handlers.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def call_at(self, when: float, callback: Callable[[], None]) -> Timer:
        """Call at `time.monotonic()` value `when`. Main thread only."""
        timer = Timer(when, callback)
        self._timers.append(timer)
        return timer

    def call_later(self, delay: float, callback: Callable[[], None]) -> Timer:
        """Call in `delay` seconds. Main thread only."""
        return self.call_at(time.monotonic() + delay, callback)

    def call_soon(self, callback: Callable[[], None]) -> None:
        """Call on the main thread as soon as it is back in the loop. Any thread."""
        self._calls.append(callback)
        os.eventfd_write(self._wake_fd, 1)

    def stop(self) -> None:
        """Make `run` return after the current round. Any thread."""
        self._running = False
        os.eventfd_write(self._wake_fd, 1)

    def run(self) -> None:
        """Serve until `stop`."""
        self._running = True
        while self._running:
            self.run_once(self._next_timeout())

    def run_once(self, timeout: float) -> None:
        """Serve one round; wait at most `timeout` seconds (-1: for ever) for something to do."""
        ready = self._epoll.poll(timeout)
        self._fresh.clear()
        for fd, events in ready:
            if fd == self._wake_fd:
                os.eventfd_read(fd)
                continue
            # A handler may have removed a later descriptor of this same round, and another one
            # may have got its number: what is told of it isn't true of that one.
            handler = self._handlers.get(fd)
            if handler is not None and fd not in self._fresh:
                self._guard(handler, events)
        self._run_timers()
        # Other threads append meanwhile: take only what is there now, one by one.
        for _ in range(len(self._calls)):
            self._guard(self._calls.pop(0))

    def _guard(self, callback: Callable[..., None], *args: int) -> None:
        try:
            callback(*args)
        except Exception as error:
            if self.on_exception is None:
                raise
            self.on_exception(error)

    def _next_timeout(self) -> float:
        if self._calls:
            return 0.0
        times = [timer.when for timer in self._timers if timer.callback is not None]
        return max(0.0, min(times) - time.monotonic()) if times else -1.0

    def _run_timers(self) -> None:
        if not self._timers:
            return
        now = time.monotonic()
        due = [timer for timer in self._timers if timer.when <= now]
        self._timers = [t for t in self._timers if t.when > now and t.callback is not None]
        for timer in sorted(due, key=lambda timer: timer.when):
            callback, timer.callback = timer.callback, None
            if callback is not None:
                self._guard(callback)

    def close(self) -> None:
        """Close the loop's own descriptors."""
        self._epoll.close()
        os.close(self._wake_fd)
