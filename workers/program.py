"""What workers that run as programs of their own have in common: options and their socket.

Source: QEMU, docs/interop/vhost-user.rst, "Backend program conventions".
"""

from __future__ import annotations

import _socket
import os

from workers.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence


def split(arguments: Sequence[str], flags: Sequence[str]) -> list[tuple[str, str]]:
    """(name, value) of each option; `--name value` and `--name=value` are the same.

    :param flags: options that need no value; theirs is "" then.
    :raises UsageError: not an option, or its value is missing.
    """
    options: list[tuple[str, str]] = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--"):
            raise UsageError(f"{argument}: not an option", "--help lists all")
        name, equals, value = argument[2:].partition("=")
        if not equals and name not in flags:
            if not rest:
                raise UsageError(f"--{name}: needs a value")
            value = rest.pop(0)
        options.append((name, value))
    return options


def number(name: str, value: str, low: int, high: int) -> int:
    """The option's value as a decimal number.

    :raises UsageError: it is none, or out of range.
    """
    if not (value.isascii() and value.isdigit() and len(value) <= 18 and low <= int(value) <= high):
        raise UsageError(f"--{name}={value}: not a number from {low} to {high}")
    return int(value)


def connect(socket_path: str, given: int) -> int:
    """A connected socket: the descriptor `given` (if not negative; a listening one accepts), or
    the first connection to `socket_path`.

    :raises UsageError: not a socket, or the path can't be had.
    """
    try:
        if given >= 0:
            peer = _socket.socket(-1, -1, -1, given)
            if not peer.getsockopt(_socket.SOL_SOCKET, _socket.SO_ACCEPTCONN):
                return peer.detach()
        else:
            peer = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC)
            peer.bind(socket_path)
            peer.listen(1)
        fd, _ = peer._accept()  # type: ignore[attr-defined]  # what socket.accept() calls
        peer.close()
        if given < 0:
            os.unlink(socket_path)
        return int(fd)
    except OSError as error:
        where = f"--socket-path={socket_path}" if given < 0 else "--fd"
        raise UsageError(f"{where}: {error.strerror}") from error
