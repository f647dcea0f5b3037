"""Descriptors that a client hands in with its message, for later commands to use by name."""

from __future__ import annotations

import os

from vmm.qmp.errors import QmpError
from vmm.qmp.registry import Argument, Command

TYPE_CHECKING = False  # importing typing would cost 10 ms of the start
if TYPE_CHECKING:
    from vmm.qmp.connection import Request


def _getfd(request: Request) -> object:
    name = request.arguments["fdname"]
    if name[0].isdigit():
        # Other commands take a name or a number: "3" must not mean both.
        raise QmpError("The argument 'fdname' must not begin with a digit")
    store = request.server.fds
    store.check_room(name)
    fd = request.take_fd()
    if fd is None:
        raise QmpError("No file descriptor came with this message",
                       "send it as SCM_RIGHTS with the command, on a unix socket")
    store.put(name, fd)
    return {}


def _closefd(request: Request) -> object:
    os.close(request.server.fds.take(request.arguments["fdname"]))
    return {}


TYPES: dict[str, dict[str, str] | tuple[str, ...]] = {}

COMMANDS = (
    Command("getfd", _getfd, Argument("fdname", "str", high=255)),
    Command("closefd", _closefd, Argument("fdname", "str", high=255)),
)
