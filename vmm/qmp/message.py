"""Framing and coding of QMP messages: a stream of JSON values in, lines out.

A value ends where its last bracket closes: newlines are neither needed nor looked at, values
may follow each other directly or come in pieces.  What can't become a JSON object is answered
with one error and skipped, so that the connection stays usable:

- garbage between values: up to the next bracket that opens, or the line's end;
- a value that is too long or too deep: up to its own end, or a line that begins with "{";
- a line end inside a string, a bracket that doesn't match, an object or array where none can
  stand (the value before it lacks its end): from there on afresh;
- the byte 0xFF, never part of UTF-8: forgets what is incomplete, as in QEMU.
"""

from __future__ import annotations

import json
import re

from vmm.qmp.errors import QmpError, describe

TYPE_CHECKING = False  # importing typing would cost 10 ms of the start
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from typing import Any

MAX_VALUE = 64 * 1024  # bytes of one JSON value
MAX_DEPTH = 64         # brackets inside each other; the deepest command needs 5

_OUTSIDE = re.compile(rb'["{}\[\]\xff]')
_STRING = re.compile(rb'["\\\n\xff]')
_GARBAGE_END = re.compile(rb"[\n{\[\xff]")
_START = re.compile(rb"[^ \t\r\n]")
_BLANKS = b" \t\r\n"
_BEFORE_VALUE = b":,["
_CLOSER = {0x7B: 0x7D, 0x5B: 0x5D}
_BRACE, _QUOTE, _BACKSLASH, _NEWLINE, _RESET = 0x7B, 0x22, 0x5C, 0x0A, 0xFF


class Framer:
    """Cuts a byte stream into JSON values. Holds at most one value and one read."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._position = 0             # up to here the buffer has been looked at
        self._closers: list[int] = []  # what closes the open brackets, innermost last
        self._depth = 0                # open brackets of a value that is being skipped
        self._in_string = False
        self._escaped = False          # the byte before was a backslash in a string
        self._garbage = False          # skipping to the end of what can't be a value
        self._last = _NEWLINE          # the last byte that left the buffer

    @property
    def idle(self) -> bool:
        """Is the stream between two values?"""
        return not self._closers and not self._depth

    def feed(self, data: bytes) -> Iterator[bytes | QmpError]:
        """Take what was read; yield each value that is complete, or the error it is owed."""
        self._buffer += data
        while self._position < len(self._buffer):
            if self._garbage:
                self._skip_garbage()
                continue
            frame = self._begin() if self.idle else self._scan()
            if frame is not None:
                yield frame
        if not self._closers:
            self._drop(self._position)
        elif len(self._buffer) > MAX_VALUE:
            yield self._skip_value(_too_long())

    # ---- between values --------------------------------------------------------------------

    def _begin(self) -> QmpError | None:
        match = _START.search(self._buffer, self._position)
        self._drop(len(self._buffer) if match is None else match.start())
        if match is None:
            return None
        first = self._buffer[0]
        self._position = 1
        if first in _CLOSER:
            self._closers.append(_CLOSER[first])
            return None
        if first == _RESET:
            self._drop(1)
            return _invalid("the byte 0xFF")
        self._garbage = True
        return _invalid("a command is an object, it begins with '{'")

    def _skip_garbage(self) -> None:
        match = _GARBAGE_END.search(self._buffer, self._position)
        self._garbage = match is None
        self._drop(len(self._buffer) if match is None else match.start())

    # ---- inside a value --------------------------------------------------------------------

    def _scan(self) -> bytes | QmpError | None:
        """Go on to the next byte that matters; return the value or error that it completes."""
        if self._escaped:
            self._escaped = False
            if self._buffer[self._position] not in (_NEWLINE, _RESET):
                self._position += 1
                return None
        pattern = _STRING if self._in_string else _OUTSIDE
        match = pattern.search(self._buffer, self._position)
        if match is None:
            self._position = len(self._buffer)
            return None
        at = match.start()
        byte = self._buffer[at]
        self._position = at + 1
        if byte == _RESET:
            return self._restart(at + 1, _invalid("the byte 0xFF"))
        if byte == _NEWLINE:
            return self._restart(at + 1, _invalid("a line end inside a string"))
        if byte == _BACKSLASH:
            self._escaped = True
        elif byte == _QUOTE:
            self._in_string = not self._in_string
        elif self._depth:
            self._skipped_bracket(byte, at)
        else:
            return self._bracket(byte, at)
        return None

    def _bracket(self, byte: int, at: int) -> bytes | QmpError | None:
        if byte in _CLOSER:
            if not self._may_begin_value(at):
                return self._restart(at, _invalid("a value ends before its last bracket"))
            self._closers.append(_CLOSER[byte])
            if len(self._closers) > MAX_DEPTH:
                return self._skip_value(_invalid(f"more than {MAX_DEPTH} brackets are open"))
            return None
        if byte != self._closers.pop():
            return self._restart(at + 1, _invalid("a bracket closes that isn't open"))
        if self._closers:
            return None
        value = bytes(self._buffer[:at + 1])
        self._drop(at + 1)
        return value if len(value) <= MAX_VALUE else _too_long()

    def _skipped_bracket(self, byte: int, at: int) -> None:
        before = self._buffer[at - 1] if at else self._last
        if byte == _BRACE and before == _NEWLINE:
            self._restart(at, None)
        elif byte in _CLOSER:
            self._depth += 1
        else:
            self._depth -= 1

    def _may_begin_value(self, at: int) -> bool:
        """Can an object or array stand here, after what comes before it?"""
        before = at - 1
        while self._buffer[before] in _BLANKS:
            before -= 1
        return self._buffer[before] in _BEFORE_VALUE

    def _skip_value(self, error: QmpError) -> QmpError:
        """Skip the rest of this value; what was looked at so far is forgotten."""
        self._depth = len(self._closers)
        self._closers.clear()
        self._drop(self._position)
        return error

    def _restart(self, position: int, error: QmpError | None) -> QmpError | None:
        """Forget the value in progress and begin afresh at `position`.

        A value that was already being skipped has had its error.
        """
        skipping = self._depth > 0
        self._closers.clear()
        self._depth = 0
        self._in_string = self._escaped = False
        self._drop(position)
        return None if skipping else error

    def _drop(self, count: int) -> None:
        if count:
            self._last = self._buffer[count - 1]
            del self._buffer[:count]
        self._position = 0


def _invalid(reason: str) -> QmpError:
    return QmpError(f"Invalid JSON: {reason}", 'send {"execute":"COMMAND"}')


def _too_long() -> QmpError:
    return QmpError(f"The command is longer than {MAX_VALUE} bytes", "it was skipped")


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise QmpError(f"Invalid JSON: the member '{twice[:100]}' appears twice", "send it once")
    return members


def _number(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise QmpError(f"Invalid JSON: the number {text[:40]} is out of range", "send less")
    return value


def _constant(text: str) -> float:
    raise QmpError(f"Invalid JSON: {text} is not a JSON value")


_decoder = json.JSONDecoder(object_pairs_hook=_pairs, parse_float=_number,
                            parse_constant=_constant)
_encoder = json.JSONEncoder(separators=(",", ":"), allow_nan=False)


def parse(frame: bytes) -> dict[str, Any]:
    """Return the object that `frame` spells.

    :raises QmpError: not UTF-8, not JSON, not an object, a member twice, a number out of range.
    """
    try:
        value = _decoder.decode(frame.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _invalid(f"byte {error.start} is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise _invalid(f"{error.msg} at character {error.pos + 1}") from None
    except ValueError:  # an integer of more digits than Python converts
        raise _invalid("a number has too many digits") from None
    if not isinstance(value, dict):
        raise _invalid("a command is an object, it begins with '{'")
    return value


def encode(message: Mapping[str, object]) -> bytes:
    """Return `message` as it goes over the wire, CR LF included."""
    return _encoder.encode(message).encode("ascii") + b"\r\n"


def greeting(version: Mapping[str, object]) -> bytes:
    """Return what a new client is sent first."""
    return encode({"QMP": {"version": version, "capabilities": []}})


def reply(value: object, identity: Mapping[str, object]) -> bytes:
    """Return a success reply; `identity` is {"id": …} as the client sent it, or empty."""
    return encode({"return": value, **identity})


def error_reply(error: BaseException, identity: Mapping[str, object]) -> bytes:
    """Return an error reply; `identity` as for `reply`."""
    return encode({"error": describe(error), **identity})


def event(name: str, data: Mapping[str, object], time_ns: int) -> bytes:
    """Return an event that happened `time_ns` nanoseconds after 1970."""
    seconds, rest = divmod(time_ns, 1_000_000_000)
    return encode({"event": name, "data": data,
                   "timestamp": {"seconds": seconds, "microseconds": rest // 1000}})
