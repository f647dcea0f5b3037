"""The rng worker as a program of its own."""

from __future__ import annotations

import os
import stat

from workers.errors import UsageError
from workers.program import Program, number

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from workers.program import Maker

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


class RngProgram(Program):
    """See USAGE."""

    kind = "rng"
    usage = USAGE
    capabilities = {"type": "rng"}

    def __init__(self) -> None:
        super().__init__()
        self.filename = "/dev/urandom"
        self.limit: dict[str, object] = {}

    def take(self, name: str, value: str) -> None:
        """Its source and its limit."""
        match name:
            case "filename":
                self.filename = value
            case "max-bytes" | "period":
                self.limit[name] = number(name, value, 1, 0xFFFFFFFF)
            case _:
                super().take(name, value)

    def check(self) -> None:
        """A limit has two halves."""
        if len(self.limit) == 1:
            raise UsageError("Give both --max-bytes and --period, or neither")

    def open(self) -> tuple[Sequence[int], Maker]:
        """The source."""
        from workers.rng.service import Service

        source = open_source(self.filename)
        return (source,), lambda log: Service(source, {
            "queue-size": self.queue_size, **self.limit}, None, log)


def main(arguments: Sequence[str]) -> int:
    """See Program.main."""
    return RngProgram().main(arguments)
