"""The net worker as a program of its own."""

from __future__ import annotations

from workers.errors import UsageError
from workers.program import Program, number

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from workers.program import Maker

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


class NetProgram(Program):
    """See USAGE."""

    kind = "net"
    usage = USAGE
    capabilities = {"type": "net"}

    def __init__(self) -> None:
        super().__init__()
        self.tap = ""
        self.tap_fds: list[int] = []
        self.queue_pairs = 1
        self.limits = dict.fromkeys(_LIMITS, 0)

    def take(self, name: str, value: str) -> None:
        """Its tap and its limits."""
        match name:
            case "tap":
                self.tap = value
            case "tap-fds":
                self.tap_fds = [number(name, fd, 0, 1 << 20) for fd in value.split(":")]
            case "queue-pairs":
                self.queue_pairs = number(name, value, 1, 16)
            case _ if name in _LIMITS:
                self.limits[name] = number(name, value, 0, 1 << 50)
            case _:
                super().take(name, value)

    def check(self) -> None:
        """One way to name the tap."""
        if bool(self.tap) == bool(self.tap_fds):
            raise UsageError("Give exactly one of --tap and --tap-fds")
        if len(set(self.tap_fds)) != len(self.tap_fds) or len(self.tap_fds) > 16:
            raise UsageError("--tap-fds: the same descriptor twice, or more than 16")

    def open(self) -> tuple[Sequence[int], Maker]:
        """The tap's queues."""
        from shared.tap import adopt_taps, open_tap
        from workers.net.service import Service

        if self.tap:
            taps = open_tap(self.tap, self.queue_pairs)
        else:
            taps = self.tap_fds
            adopt_taps(taps)
        return taps, lambda log: Service(taps, {
            "queue-size": self.queue_size, **self.limits}, None, None, log)


def main(arguments: Sequence[str]) -> int:
    """See Program.main."""
    return NetProgram().main(arguments)
