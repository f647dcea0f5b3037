"""The rng worker as a program of its own: vhost-user's "Backend program conventions".

Source: QEMU, docs/interop/vhost-user.rst.  It opens what its command line names, then goes the
same way as a worker that the core starts.
"""

from __future__ import annotations

import os
import stat
import sys

from shared.sandbox.stages import parse_option
from workers.errors import UsageError
from workers.program import connect, number, split

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

CAPABILITIES: dict[str, object] = {"type": "rng"}

USAGE = """\
usage: python -m workers.rng (--socket-path=PATH | --fd=FD) [options]
       python -m workers.rng --print-capabilities

Gives random bytes to one vhost-user front end, then ends.

  --socket-path=PATH   listen on this unix socket, serve the first connection
  --fd=FD              serve this connected socket (or the first that a listening one accepts)
  --filename=PATH      the character device they come from (/dev/urandom)
  --max-bytes=N --period=MS
                       a limit: so many bytes in so many milliseconds, both or neither
  --queue-size=N       largest queue size, a power of two, 2 to 1024 (256)
  --sandbox=on|off     off: no sandbox; on,STAGE=off: without one of its stages (on)
  --print-capabilities print what is supported as JSON
  --help               print this
"""


class Options:
    """The command line."""

    def __init__(self) -> None:
        self.socket_path = ""
        self.fd = -1
        self.filename = "/dev/urandom"
        self.numbers: dict[str, object] = {}
        self.sandbox_off: frozenset[str] = frozenset()
        self.action = "serve"


def _set(options: Options, name: str, value: str) -> None:
    match name:
        case "help" | "print-capabilities":
            options.action = name
        case "socket-path":
            options.socket_path = value
        case "fd":
            options.fd = number(name, value, 0, 1 << 20)
        case "filename":
            options.filename = value
        case "max-bytes" | "period":
            options.numbers[name] = number(name, value, 1, 0xFFFFFFFF)
        case "queue-size":
            size = number(name, value, 2, 1024)
            if size & (size - 1):
                raise UsageError(f"--queue-size={value}: not a power of two")
            options.numbers[name] = size
        case "sandbox":
            options.sandbox_off = parse_option(value)
        case _:
            raise UsageError(f"--{name}: unknown option", "--help lists all")


def parse(arguments: Sequence[str]) -> Options:
    """The options of a command line.

    :raises UsageError: an unknown option or a bad value.
    """
    options = Options()
    for name, value in split(arguments, ("help", "print-capabilities")):
        _set(options, name, value)
        if options.action != "serve":
            return options
    if bool(options.socket_path) == (options.fd >= 0):
        raise UsageError("Give exactly one of --socket-path and --fd")
    if ("max-bytes" in options.numbers) != ("period" in options.numbers):
        raise UsageError("Give both --max-bytes and --period, or neither")
    return options


def open_source(path: str) -> int:
    """A descriptor of random bytes.

    :raises UsageError: it can't be opened, or is no character device.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise UsageError(f"--filename={path}: {error.strerror}") from error
    if not stat.S_ISCHR(os.fstat(fd).st_mode):
        os.close(fd)
        raise UsageError(f"--filename={path}: not a character device",
                         "use /dev/urandom or /dev/hwrng")
    return fd


def main(arguments: Sequence[str]) -> int:
    """Exit code: 0 after the front end left, 1 with one line on stderr for every error."""
    from shared.errors import StratovirtError
    from workers.startup import end_alone

    try:
        options = parse(arguments)
        if options.action == "help":
            print(USAGE, end="")
            return 0
        if options.action == "print-capabilities":
            import json

            print(json.dumps(CAPABILITIES))
            return 0
        status = _serve(options)
    except StratovirtError as error:
        print(f"workers.rng: {error}", file=sys.stderr)
        status = 1
    return end_alone(status)


def _serve(options: Options) -> int:
    from workers.rng.service import Service
    from workers.startup import confine, enter_alone, keep_only

    source = open_source(options.filename)
    fd = connect(options.socket_path, options.fd)
    keep_only((source, fd))
    enter_alone("rng", options.sandbox_off)

    def log(text: str) -> None:
        print(f"workers.rng: {text}", file=sys.stderr, flush=True)

    service = Service(source, options.numbers, None, log)
    confine("sv-rng")
    try:
        service.serve(fd)
    finally:
        service.close()
    return 0
