"""A subset of CBOR (RFC 8949) for control messages: what both ends need, and no more.

Values: None, bool, int (64 bits), str, bytes, list, dict with str keys.  Written here because
the core speaks it before the first guest instruction, where the package `cbor2` would cost
more than everything else (ARCHITECTURE.md, "Start-up"); the bytes are the same.
"""

from __future__ import annotations

from shared.errors import SharedError

MAX_DEPTH = 8
_LIMIT = 1 << 64

Value = None | bool | int | str | bytes | list["Value"] | dict[str, "Value"]


class CodecError(SharedError):
    """A value that can't be encoded, or bytes that are not what this module encodes."""


def encode(value: object) -> bytes:
    """The bytes of a value.

    :raises CodecError: a type, an integer or a depth outside the subset.
    """
    out = bytearray()
    _encode(value, out, MAX_DEPTH)
    return bytes(out)


def decode(data: bytes) -> Value:
    """The value of all of `data`.

    :raises CodecError: cut, followed by more, too deep, or outside the subset.
    """
    value, end = _decode(data, 0, MAX_DEPTH)
    if end != len(data):
        raise CodecError(f"A control message is followed by {len(data) - end} bytes too many")
    return value


def _head(major: int, number: int, out: bytearray) -> None:
    if number < 24:
        out.append(major << 5 | number)
        return
    for code, size in ((24, 1), (25, 2), (26, 4), (27, 8)):
        if number < 1 << 8 * size:
            out.append(major << 5 | code)
            out += number.to_bytes(size, "big")
            return
    raise CodecError(f"{number} does not fit into 64 bits")


def _encode(value: object, out: bytearray, depth: int) -> None:
    if depth == 0:
        raise CodecError(f"A control message nested deeper than {MAX_DEPTH}")
    if value is None or value is False or value is True:
        out.append({False: 0xF4, True: 0xF5, None: 0xF6}[value])
    elif isinstance(value, int):
        _head(0 if value >= 0 else 1, value if value >= 0 else -1 - value, out)
    elif isinstance(value, bytes):
        _head(2, len(value), out)
        out += value
    elif isinstance(value, str):
        text = value.encode("utf-8", "surrogateescape").decode("utf-8", "replace").encode()
        _head(3, len(text), out)
        out += text
    elif isinstance(value, (list, tuple)):
        _head(4, len(value), out)
        for item in value:
            _encode(item, out, depth - 1)
    elif isinstance(value, dict):
        _head(5, len(value), out)
        for key, item in value.items():
            if not isinstance(key, str):
                raise CodecError(f"A key of a control message is {key!r}, not text")
            _encode(key, out, depth - 1)
            _encode(item, out, depth - 1)
    else:
        raise CodecError(f"A control message can't carry {type(value).__name__}")


def _number(data: bytes, at: int) -> tuple[int, int, int]:
    """Major type, number and where what follows starts."""
    if at >= len(data):
        raise CodecError("A control message is cut short")
    major, info = data[at] >> 5, data[at] & 31
    if info < 24 or major == 7:
        return major, info, at + 1
    if info > 27:
        raise CodecError(f"A control message uses CBOR byte {data[at]:#x}, outside the subset")
    size = 1 << (info - 24)
    if at + 1 + size > len(data):
        raise CodecError("A control message is cut short")
    return major, int.from_bytes(data[at + 1:at + 1 + size], "big"), at + 1 + size


def _decode(data: bytes, at: int, depth: int) -> tuple[Value, int]:
    if depth == 0:
        raise CodecError(f"A control message nested deeper than {MAX_DEPTH}")
    major, number, start = _number(data, at)
    if major == 0:
        return number, start
    if major == 1:
        return -1 - number, start
    if major in (2, 3):
        end = start + number
        if end > len(data):
            raise CodecError("A control message is cut short")
        piece = data[start:end]
        return (piece if major == 2 else piece.decode("utf-8", "replace")), end
    if major == 7 and number in (20, 21, 22):
        return (False, True, None)[number - 20], start
    if major not in (4, 5):
        raise CodecError(f"A control message uses CBOR byte {data[at]:#x}, outside the subset")
    # Each item takes a byte at least: a count beyond what is left is a lie.
    if number > len(data) - start:
        raise CodecError("A control message is cut short")
    return _array(data, start, number, depth) if major == 4 else _map(data, start, number, depth)


def _array(data: bytes, at: int, count: int, depth: int) -> tuple[Value, int]:
    items: list[Value] = []
    for _ in range(count):
        item, at = _decode(data, at, depth - 1)
        items.append(item)
    return items, at


def _map(data: bytes, at: int, count: int, depth: int) -> tuple[Value, int]:
    result: dict[str, Value] = {}
    for _ in range(count):
        key, at = _decode(data, at, depth - 1)
        if not isinstance(key, str):
            raise CodecError("A key of a control message is not text")
        result[key], at = _decode(data, at, depth - 1)
    return result, at
