"""`top` on a terminal: the whole screen, keys, scrolling; everything as it was afterwards."""

from __future__ import annotations

import os
import re
import select
import signal
import sys
import termios
import time
from typing import TYPE_CHECKING, Any

from vmm.ctl.output import printable

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
    from rich.live import Live
    from rich.segment import Segment

    from vmm.ctl.top import View

_KEYS = {b"q": "quit", b"Q": "quit", b"p": "processes", b"s": "sort",
         b"\x1b[A": "up", b"\x1bOA": "up", b"k": "up", b"\x1b[B": "down", b"\x1bOB": "down",
         b"j": "down", b"\x1b[5~": "page-up", b"\x1b[6~": "page-down", b" ": "page-down",
         b"\x1b[H": "home", b"g": "home"}
_SEQUENCE = re.compile(rb"\x1b(\[[0-?]*[ -/]*[@-~]|O.)")  # ECMA-48, 5.4; cursor keys
_HELP = "q quit   p processes   s sort: {sort}   arrows scroll"


def next_action(typed: bytes) -> tuple[str, bytes]:
    """The first known key of what was typed, and what is behind it; "" if there is none."""
    while typed:
        sequence = _SEQUENCE.match(typed)
        key = sequence[0] if sequence is not None else typed[:1]
        typed = typed[len(key):]
        if key in _KEYS:
            return _KEYS[key], typed
    return "", typed


class Screen:
    """A context: inside it the screen is ours.

    last_words: printed on standard error when the screen is the user's again.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._offset = 0
        self._typed = b""
        self._typing = sys.stdin is not None and os.isatty(0)
        self._before: list[Any] | None = None
        self._live: Live | None = None
        self._wake, self._woken = -1, -1
        self._handler: Any = None
        self.last_words = ""

    def __enter__(self) -> Screen:
        from rich.live import Live

        # A terminal that changes its size ends a wait.
        self._woken, self._wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._handler = signal.signal(signal.SIGWINCH, lambda *_: self._on_resize())
        if self._typing:
            self._take_keys()
        self._live = Live(console=self._console, screen=True, auto_refresh=False)
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()
        if self._before is not None:
            termios.tcsetattr(0, termios.TCSANOW, self._before)
        signal.signal(signal.SIGWINCH, self._handler)
        os.close(self._woken)
        os.close(self._wake)
        if self.last_words:
            print(printable(self.last_words), file=sys.stderr)

    def _take_keys(self) -> None:
        """Keys come at once and aren't shown; Ctrl-C works, Ctrl-Z would leave our screen."""
        before = termios.tcgetattr(0)
        ours = termios.tcgetattr(0)
        ours[3] &= ~(termios.ICANON | termios.ECHO)
        ours[6][termios.VMIN], ours[6][termios.VTIME] = 1, 0
        ours[6][termios.VSUSP] = b"\0"  # _POSIX_VDISABLE
        self._before = before
        termios.tcsetattr(0, termios.TCSANOW, ours)

    def _on_resize(self) -> None:
        try:
            os.write(self._wake, b"x")
        except OSError:
            pass  # it is full: somebody will look

    def wait(self, seconds: float) -> str:
        """What a key asks for, "resize", or "" when the time is over."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            action, self._typed = next_action(self._typed)
            if action:
                self._move(action)
                return action
            sources = [self._woken, 0] if self._typing else [self._woken]
            ready = select.select(sources, [], [], left)[0]
            if self._woken in ready:
                os.read(self._woken, 4096)
                return "resize"
            if 0 in ready:
                self._read_keys()
        return ""

    def _read_keys(self) -> None:
        try:
            typed = os.read(0, 64)
        except OSError:
            typed = b""
        self._typed += typed
        self._typing = bool(typed)  # else the terminal has gone; a hang-up ends us

    def _move(self, action: str) -> None:
        page = max(self._console.height - 2, 1)
        moves = {"up": -1, "down": 1, "page-up": -page, "page-down": page, "home": -1 << 20}
        self._offset = max(self._offset + moves.get(action, 0), 0)

    def draw(self, view: View, interval: float) -> None:
        """Show it, from the line to which the user has scrolled."""
        assert self._live is not None
        width, height = self._console.width, self._console.height
        lines = self._lines(view.tables(width) if view.vms else ["no VMs"], width)
        self._offset = max(min(self._offset, len(lines) - height + 1), 0)
        shown = lines[self._offset:self._offset + height - 1]
        rest = len(lines) - self._offset - len(shown)
        foot = _HELP.format(sort=view.sort) if self._typing else "Ctrl-C ends"
        if rest or self._offset:
            foot += f" ▲{self._offset} ▼{rest}"
        foot += f"   every {interval:g} s"
        self._live.update(_Frame(shown, foot, height), refresh=True)

    def _lines(self, parts: Iterable[RenderableType], width: int) -> list[list[Segment]]:
        options = self._console.options.update(width=width)
        return [line for part in parts for line in self._console.render_lines(part, options,
                                                                              pad=False)]


class _Frame:
    """Lines, and one at the bottom of the screen."""

    def __init__(self, lines: list[list[Segment]], foot: str, height: int) -> None:
        self._all = lines
        self._foot = foot
        self._height = height

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.segment import Segment
        from rich.text import Text

        for line in self._all:
            yield from line
            yield Segment.line()
        for _ in range(self._height - 1 - len(self._all)):
            yield Segment.line()
        foot = Text(self._foot, style="reverse", no_wrap=True, overflow="ellipsis", end="")
        foot.truncate(options.max_width, pad=True)
        yield foot
