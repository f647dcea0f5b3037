"""What the core asks of a worker over its control channel, and the answers that may never come."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from shared.control.channel import Channel, Message

    Done = Callable[[str], None]

# Orders without an answer at a time: a worker that hangs must not make the core grow.
MAX_WAITING = 64
_TEXT_LIMIT = 500


class Orders:
    """The orders of one worker. Main loop only; nothing here waits."""

    __slots__ = ("_channel", "_serial", "_waiting")

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._serial = 0
        self._waiting: dict[int, Done] = {}

    def send(self, kind: str, done: Done, fds: Sequence[int] = (), **fields: object) -> int:
        """Send an order and return at once; its serial, or 0 if it could not be sent.

        :param done: called once, with "" or with what went wrong, unless `forget` comes first.
        :raises SharedError: the worker is gone or doesn't read.
        """
        if len(self._waiting) >= MAX_WAITING:
            done("the worker answers nothing")
            return 0
        self._serial += 1
        self._channel.send({**fields, "type": kind, "serial": self._serial}, list(fds))
        self._waiting[self._serial] = done
        return self._serial

    def forget(self, serial: int) -> bool:
        """Nobody waits for that answer any more; False if it has come."""
        return self._waiting.pop(serial, None) is not None

    def answered(self, message: Message) -> bool:
        """The worker says "done" or "failed"; what nobody asked for is ignored: False."""
        serial = message.get("serial")
        done = self._waiting.pop(serial, None) if isinstance(serial, int) else None
        if done is None:
            return False
        if message.get("type") == "done":
            done("")
        else:
            text = str(message.get("text", ""))[:_TEXT_LIMIT]
            done("".join(c if c.isprintable() else " " for c in text) or "the worker refused")
        return True

    def abandon(self, reason: str) -> None:
        """The worker has ended."""
        waiting, self._waiting = self._waiting, {}
        for done in waiting.values():
            done(reason)
