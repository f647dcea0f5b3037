"""The blk worker as a program of its own: vhost-user's "Backend program conventions".

Source: QEMU, docs/interop/vhost-user.rst.  It opens what its command line names, then goes the
same way as a worker that the core starts.
"""

from __future__ import annotations

import _socket
import json
import os
import sys

from shared import throttling
from shared.sandbox.stages import parse_option
from workers.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

CAPABILITIES = {"type": "block", "features": ["read-only", "blk-file"]}

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


class Options:
    """The command line."""

    def __init__(self) -> None:
        self.socket_path = ""
        self.fd = -1
        self.blk_file = ""
        self.read_only = False
        self.num_queues = 1
        self.queue_size = 256
        self.serial = ""
        self.direct = False
        self.aio = "auto"
        self.discard = "ignore"
        self.detect_zeroes = "off"
        self.throttling: dict[str, int] = {}
        self.sandbox_off: frozenset[str] = frozenset()
        self.action = "serve"


def _number(name: str, value: str, low: int, high: int) -> int:
    if not (value.isascii() and value.isdigit()) or not low <= int(value[:12]) <= high:
        raise UsageError(f"--{name}={value}: not a number from {low} to {high}")
    return int(value)


def _choice(name: str, value: str, choices: Sequence[str]) -> str:
    if value not in choices:
        raise UsageError(f"--{name}={value}: unknown", f"use one of: {', '.join(choices)}")
    return value


def _set(options: Options, name: str, value: str) -> None:
    match name:
        case "socket-path":
            options.socket_path = value
        case "fd":
            options.fd = _number(name, value, 0, 1 << 20)
        case "blk-file":
            options.blk_file = value
        case "num-queues":
            options.num_queues = _number(name, value, 1, 32)
        case "queue-size":
            options.queue_size = _number(name, value, 2, 1024)
            if options.queue_size & (options.queue_size - 1):
                raise UsageError(f"--queue-size={value}: not a power of two")
        case "serial":
            if len(value.encode("utf-8", "surrogateescape")) > 20:
                raise UsageError(f"--serial={value}: longer than 20 bytes")
            options.serial = value
        case "direct":
            options.direct = _choice(name, value, ("on", "off")) == "on"
        case "aio":
            options.aio = _choice(name, value, ("auto", "io_uring", "threads"))
        case "discard":
            options.discard = _choice(name, value, ("ignore", "unmap"))
        case "sandbox":
            options.sandbox_off = parse_option(value)
        case "detect-zeroes":
            options.detect_zeroes = _choice(name, value, ("off", "on", "unmap"))
        case _ if name.removeprefix("throttling.") in throttling.OPTIONS:
            limit = name.removeprefix("throttling.")
            options.throttling[limit] = _number(name, value, 0, throttling.largest(limit))
        case _:
            raise UsageError(f"--{name}: unknown option", "--help lists all")


def parse(arguments: Sequence[str]) -> Options:
    """The options of a command line; `--name value` and `--name=value` are the same.

    :raises UsageError: an unknown option or a bad value.
    """
    options = Options()
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--"):
            raise UsageError(f"{argument}: not an option", "--help lists all")
        name, equals, value = argument[2:].partition("=")
        if name in ("help", "print-capabilities") and not equals:
            options.action = name
            return options
        if name == "read-only" and (not equals or value in ("on", "off")):
            options.read_only = value != "off"
            continue
        if not equals:
            if not rest:
                raise UsageError(f"--{name}: needs a value")
            value = rest.pop(0)
        _set(options, name, value)
    if bool(options.socket_path) == (options.fd >= 0):
        raise UsageError("Give exactly one of --socket-path and --fd")
    if not options.blk_file:
        raise UsageError("--blk-file is missing")
    return options


def open_image(options: Options) -> int:
    """The image's descriptor.

    :raises UsageError: it can't be opened.
    """
    flags = os.O_CLOEXEC | (os.O_RDONLY if options.read_only else os.O_RDWR)
    if options.direct:
        flags |= os.O_DIRECT
    try:
        return os.open(options.blk_file, flags)
    except OSError as error:
        raise UsageError(f"--blk-file={options.blk_file}: {error.strerror}") from error


def connect(options: Options) -> int:
    """A connected socket: the given one, or the first that connects.

    :raises UsageError: not a socket, or the path can't be had.
    """
    try:
        if options.fd >= 0:
            peer = _socket.socket(-1, -1, -1, options.fd)
            if not peer.getsockopt(_socket.SOL_SOCKET, _socket.SO_ACCEPTCONN):
                return peer.detach()
        else:
            peer = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC)
            peer.bind(options.socket_path)
            peer.listen(1)
        fd, _ = peer._accept()  # type: ignore[attr-defined]  # what socket.accept() calls
        peer.close()
        if options.socket_path:
            os.unlink(options.socket_path)
        return int(fd)
    except OSError as error:
        where = f"--socket-path={options.socket_path}" if options.socket_path else "--fd"
        raise UsageError(f"{where}: {error.strerror}") from error


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
            print(json.dumps(CAPABILITIES))
            return 0
        status = _serve(options)
    except StratovirtError as error:
        print(f"workers.blk: {error}", file=sys.stderr)
        status = 1
    return end_alone(status)


def _serve(options: Options) -> int:
    from workers.blk.service import Service
    from workers.startup import confine, enter_alone, keep_only

    image = open_image(options)
    fd = connect(options)
    keep_only((image, fd))
    enter_alone("blk", options.sandbox_off)

    def log(text: str) -> None:
        print(f"workers.blk: {text}", file=sys.stderr, flush=True)

    service = Service(image, {
        "readonly": options.read_only, "num-queues": options.num_queues,
        "queue-size": options.queue_size, "serial": options.serial, "aio": options.aio,
        "discard": options.discard, "detect-zeroes": options.detect_zeroes,
        "throttling": options.throttling}, None, log)
    confine("sv-blk")
    try:
        service.serve(fd)
    finally:
        service.close()
    return 0
