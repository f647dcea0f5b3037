"""The blk worker as a program of its own."""

from __future__ import annotations

import os

from shared import throttling
from workers.errors import UsageError
from workers.program import Program, choice, number

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from workers.program import Maker

USAGE = """\
usage: python -m workers.blk (--socket-path=PATH | --fd=FD) --blk-file=PATH [options]
       python -m workers.blk --print-capabilities

Serves one disk image to one vhost-user front end, then ends.

  --socket-path=PATH   listen on this unix socket, serve the first connection
  --fd=FD              serve this connected socket (or the first that a listening one accepts)
  --blk-file=PATH      the image: a regular file or a block device
  --read-only          refuse writes
  --num-queues=N       1 to 32 queues (1)
  --queue-size=N       largest queue size, a power of two, 2 to 1024 (256)
  --serial=TEXT        what GET_ID answers, at most 20 bytes
  --direct=on|off      by-pass the page cache (off)
  --aio=KIND           auto, io_uring or threads (auto)
  --discard=KIND       ignore or unmap (ignore)
  --detect-zeroes=KIND off, on (zeroes are not written but made) or unmap (off)
  --throttling.NAME=N  limits a second: iops-total, iops-read, iops-write, bps-total, bps-read,
                       bps-write; NAME-max is how much may come at once after a pause
  --sandbox=on|off     off: no sandbox; on,STAGE=off: without one of its stages (on)
  --print-capabilities print what is supported as JSON
  --help               print this
"""


class BlkProgram(Program):
    """See USAGE."""

    kind = "blk"
    usage = USAGE
    capabilities = {"type": "block", "features": ["read-only", "blk-file"]}
    flags = ("read-only",)

    def __init__(self) -> None:
        super().__init__()
        self.blk_file = ""
        self.read_only = False
        self.num_queues = 1
        self.serial = ""
        self.direct = False
        self.aio = "auto"
        self.discard = "ignore"
        self.detect_zeroes = "off"
        self.throttling: dict[str, int] = {}

    def take(self, name: str, value: str) -> None:
        """Its image and how it is served."""
        match name:
            case "blk-file":
                self.blk_file = value
            case "read-only":
                self.read_only = choice(name, value or "on", ("on", "off")) == "on"
            case "num-queues":
                self.num_queues = number(name, value, 1, 32)
            case "serial":
                if len(value.encode("utf-8", "surrogateescape")) > 20:
                    raise UsageError(f"--serial={value}: longer than 20 bytes")
                self.serial = value
            case "direct":
                self.direct = choice(name, value, ("on", "off")) == "on"
            case "aio":
                self.aio = choice(name, value, ("auto", "io_uring", "threads"))
            case "discard":
                self.discard = choice(name, value, ("ignore", "unmap"))
            case "detect-zeroes":
                self.detect_zeroes = choice(name, value, ("off", "on", "unmap"))
            case _ if name.removeprefix("throttling.") in throttling.OPTIONS:
                limit = name.removeprefix("throttling.")
                self.throttling[limit] = number(name, value, 0, throttling.largest(limit))
            case _:
                super().take(name, value)

    def check(self) -> None:
        """There is an image."""
        if not self.blk_file:
            raise UsageError("--blk-file is missing")

    def open(self) -> tuple[Sequence[int], Maker]:
        """The image."""
        from workers.blk.service import Service

        image = self._open_image()
        return (image,), lambda log: Service(image, {
            "readonly": self.read_only, "num-queues": self.num_queues,
            "queue-size": self.queue_size, "serial": self.serial, "aio": self.aio,
            "discard": self.discard, "detect-zeroes": self.detect_zeroes,
            "throttling": self.throttling}, None, log)

    def _open_image(self) -> int:
        flags = os.O_CLOEXEC | (os.O_RDONLY if self.read_only else os.O_RDWR)
        if self.direct:
            flags |= os.O_DIRECT
        try:
            return os.open(self.blk_file, flags)
        except OSError as error:
            raise UsageError(f"--blk-file={self.blk_file}: {error.strerror}") from error


def main(arguments: Sequence[str]) -> int:
    """See Program.main."""
    return BlkProgram().main(arguments)
