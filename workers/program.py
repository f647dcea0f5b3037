"""What workers that run as programs of their own have in common: options, socket, the life.

Source: QEMU, docs/interop/vhost-user.rst, "Backend program conventions".
"""

from __future__ import annotations

import _socket
import os
import sys

from shared.errors import StratovirtError
from shared.sandbox.stages import parse_option
from workers.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from workers.service import DeviceService

    Log = Callable[[str], None]
    # What makes the service, of descriptors that are open, with modules that are imported.
    Maker = Callable[[Log], DeviceService]


class Program:
    """One worker as a program: what it reads from its command line, and its life.

    It opens what its command line names, then goes the same way as a worker that the core starts.
    A kind adds its options and what it opens.
    """

    kind = ""
    usage = ""
    capabilities: dict[str, object] = {}
    flags: Sequence[str] = ()  # its options that need no value

    def __init__(self) -> None:
        self.socket_path = ""
        self.fd = -1
        self.queue_size = 256
        self.sandbox_off: frozenset[str] = frozenset()
        self.action = "serve"

    # ---- for kinds -------------------------------------------------------------------------

    def take(self, name: str, value: str) -> None:
        """An option; a kind takes its own and leaves others to this.

        :raises StratovirtError: it is unknown or has a bad value.
        """
        match name:
            case "help" | "print-capabilities":
                self.action = name
            case "socket-path":
                self.socket_path = value
            case "fd":
                self.fd = number(name, value, 0, 1 << 20)
            case "queue-size":
                self.queue_size = number(name, value, 2, 1024)
                if self.queue_size & (self.queue_size - 1):
                    raise UsageError(f"--queue-size={value}: not a power of two")
            case "sandbox":
                self.sandbox_off = parse_option(value)
            case _:
                raise UsageError(f"--{name}: unknown option", "--help lists all")

    def check(self) -> None:
        """Whether the kind's options go together.

        :raises UsageError: they don't.
        """

    def open(self) -> tuple[Sequence[int], Maker]:
        """Open what the options name, and import what the service needs: the sandbox has no files.

        :return: the descriptors, and what makes the service of them.
        :raises StratovirtError: something can't be opened.
        """
        raise NotImplementedError

    # ---- life ------------------------------------------------------------------------------

    def parse(self, arguments: Sequence[str]) -> None:
        """Read a command line; what follows --help doesn't count.

        :raises StratovirtError: an unknown option, a bad value, or they don't go together.
        """
        for name, value in split(arguments, ("help", "print-capabilities", *self.flags)):
            self.take(name, value)
            if self.action != "serve":
                return
        if bool(self.socket_path) == (self.fd >= 0):
            raise UsageError("Give exactly one of --socket-path and --fd")
        self.check()

    def main(self, arguments: Sequence[str]) -> int:
        """Exit code: 0 after the front end left, 1 with one line on stderr for every error."""
        from workers.startup import end_alone

        status = 0
        try:
            self.parse(arguments)
            if self.action == "help":
                print(self.usage, end="")
                return 0
            if self.action == "print-capabilities":
                import json

                print(json.dumps(self.capabilities))
                return 0
            self._serve()
        except StratovirtError as error:
            self._log(str(error))
            status = 1
        return end_alone(status)

    def _serve(self) -> None:
        from workers.startup import confine, enter_alone, keep_only

        opened, make = self.open()
        fd = connect(self.socket_path, self.fd)
        keep_only((*opened, fd))
        enter_alone(self.kind, self.sandbox_off)
        service = make(self._log)
        confine(f"sv-{self.kind}")
        try:
            service.serve(fd)
        finally:
            service.close()

    def _log(self, text: str) -> None:
        print(f"workers.{self.kind}: {text}", file=sys.stderr, flush=True)


def split(arguments: Sequence[str], flags: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(name, value) of each option; `--name value` and `--name=value` are the same.

    :param flags: options that need no value; theirs is "" then.
    :raises UsageError: not an option, or its value is missing.
    """
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
        yield name, value


def number(name: str, value: str, low: int, high: int) -> int:
    """The option's value as a decimal number.

    :raises UsageError: it is none, or out of range.
    """
    if not (value.isascii() and value.isdigit() and len(value) <= 18 and low <= int(value) <= high):
        raise UsageError(f"--{name}={value}: not a number from {low} to {high}")
    return int(value)


def choice(name: str, value: str, choices: Sequence[str]) -> str:
    """The option's value, if it is one of these.

    :raises UsageError: it is not.
    """
    if value not in choices:
        raise UsageError(f"--{name}={value}: unknown", f"use one of: {', '.join(choices)}")
    return value


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
