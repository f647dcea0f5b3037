"""Events: what happened to the VM, told to every client.

This loads before the first guest instruction; text is made only when a client is connected.
"""

from __future__ import annotations

import time

TYPE_CHECKING = False  # importing typing for it would cost 10 ms of the start
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    Listener = Callable[[str, Mapping[str, object], int], None]


class Events:
    """Where every part of the VM reports events. Main thread only.

    An event waits for the reply that it belongs to: emit it in the same call of the event loop
    in which the command is answered, and both leave in one write, in the order in which they
    were made.  Without a client it is forgotten, as QMP has it.
    """

    __slots__ = ("_listener",)

    def __init__(self) -> None:
        self._listener: Listener | None = None

    def emit(self, name: str, data: Mapping[str, object]) -> None:
        """Tell every client. `data` holds JSON values; the time is now."""
        if self._listener is not None:
            self._listener(name, data, time.time_ns())

    def subscribe(self, listener: Listener | None) -> None:
        """Hand every event, with its time in nanoseconds since 1970, to `listener`."""
        self._listener = listener
