"""The net worker as a program of its own: vhost-user's "Backend program conventions".

Source: QEMU, docs/interop/vhost-user.rst.  It opens what its command line names, then goes the
same way as a worker that the core starts.
"""

from __future__ import annotations

import sys

from shared.sandbox.stages import parse_option
from workers.errors import UsageError
from workers.program import connect, number, split

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

CAPABILITIES: dict[str, object] = {"type": "net"}

USAGE = """\
usage: python -m workers.net (--socket-path=PATH | --fd=FD) (--tap=NAME | --tap-fds=FD[:FD…])
                             [options]
       python -m workers.net --print-capabilities

Serves one NIC to one vhost-user front end, then ends.

  --socket-path=PATH   listen on this unix socket, serve the first connection
  --fd=FD              serve this connected socket (or the first that a listening one accepts)
  --tap=NAME           the tap interface
  --tap-fds=FD[:FD…]   open taps, one for each queue pair
  --queue-pairs=N      with --tap: 1 to 16 (1); more than one need a multi_queue tap
  --queue-size=N       largest queue size, a power of two, 2 to 1024 (256)
  --rx-packets=N --rx-bytes=N --tx-packets=N --tx-bytes=N
                       limits a second, received and transmitted by the guest; 0: none (0)
  --sandbox=on|off     off: no sandbox; on,STAGE=off: without one of its stages (on)
  --print-capabilities print what is supported as JSON
  --help               print this
"""

_LIMITS = ("rx-packets", "rx-bytes", "tx-packets", "tx-bytes")


class Options:
    """The command line."""

    def __init__(self) -> None:
        self.socket_path = ""
        self.fd = -1
        self.tap = ""
        self.tap_fds: list[int] = []
        self.queue_pairs = 1
        self.queue_size = 256
        self.limits = dict.fromkeys(_LIMITS, 0)
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
        case "tap":
            options.tap = value
        case "tap-fds":
            options.tap_fds = [number(name, fd, 0, 1 << 20) for fd in value.split(":")]
        case "queue-pairs":
            options.queue_pairs = number(name, value, 1, 16)
        case "queue-size":
            options.queue_size = number(name, value, 2, 1024)
            if options.queue_size & (options.queue_size - 1):
                raise UsageError(f"--queue-size={value}: not a power of two")
        case "sandbox":
            options.sandbox_off = parse_option(value)
        case _ if name in _LIMITS:
            options.limits[name] = number(name, value, 0, 1 << 50)
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
    if bool(options.tap) == bool(options.tap_fds):
        raise UsageError("Give exactly one of --tap and --tap-fds")
    if len(set(options.tap_fds)) != len(options.tap_fds) or len(options.tap_fds) > 16:
        raise UsageError("--tap-fds: the same descriptor twice, or more than 16")
    return options


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
        print(f"workers.net: {error}", file=sys.stderr)
        status = 1
    return end_alone(status)


def _serve(options: Options) -> int:
    from shared.tap import adopt_taps, open_tap
    from workers.net.service import Service
    from workers.startup import confine, enter_alone, keep_only

    if options.tap:
        taps = open_tap(options.tap, options.queue_pairs)
    else:
        taps = options.tap_fds
        adopt_taps(taps)
    fd = connect(options.socket_path, options.fd)
    keep_only((*taps, fd))
    enter_alone("net", options.sandbox_off)

    def log(text: str) -> None:
        print(f"workers.net: {text}", file=sys.stderr, flush=True)

    service = Service(taps, {"queue-size": options.queue_size, **options.limits}, None, None, log)
    confine("sv-net")
    try:
        service.serve(fd)
    finally:
        service.close()
    return 0
