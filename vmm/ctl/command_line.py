"""The command line of `stratoctl`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from shared.throttling import LIMITS as DISK_LIMITS
from shared.throttling import OPTIONS as DISK_OPTIONS
from vmm.ctl import completion, output, vms
from vmm.ctl.completion import NIC_LIMITS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Add = Callable[..., argparse.ArgumentParser]

SORTS = ("name", "cpu", "io", "memory")
MAX_QUEUES = 16

SIMPLE = {
    "stop": "pause it", "cont": "let it go on", "reset": "as at power-on",
    "powerdown": "press the power button", "quit": "end it, and wait for the end",
}


class Size:
    """How much memory: bytes, or a share of what the guest has at most.

    :raises argparse.ArgumentTypeError: it is neither.
    """

    _LEAST = 1 << 20

    def __init__(self, text: str) -> None:
        self.share: float | None = None
        self.bytes = 0
        if text.endswith("%"):
            digits = text[:-1]
            if not digits.replace(".", "", 1).isdecimal() or not digits.isascii() or not (
                    0 < float(digits) <= 100):
                raise argparse.ArgumentTypeError(
                    f"'{output.printable(text, 40)}' is no share: use more than 0% up to 100%")
            self.share = float(digits) / 100
            return
        try:
            self.bytes = output.parse_bytes(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{error}: write 512M, 1.5G or 50%") from None
        if self.bytes < self._LEAST:
            # No guest lives on it: who writes 512 means 512M.
            raise argparse.ArgumentTypeError(f"'{output.printable(text, 40)}' is "
                                             f"{output.human_bytes(self.bytes)}: write 512M, 1.5G "
                                             "or 50%")

    def of(self, total: int) -> int:
        """Bytes, where the guest has `total` at most."""
        return self.bytes if self.share is None else int(total * self.share)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.05 <= value <= 3600:
        raise argparse.ArgumentTypeError(f"'{text}': use 0.05 to 3600 seconds")
    return value


def _integer(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text, 0)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"'{text}': use {low} to {high}")
        return value
    return parse


def _limit(names: Sequence[str]) -> Callable[[str], tuple[str, int]]:
    """`NAME=RATE`: bytes with a unit, everything else as it is."""
    def parse(text: str) -> tuple[str, int]:
        name, _, value = text.partition("=")
        if name not in names:
            raise argparse.ArgumentTypeError(f"'{text}': use NAME=RATE with one of "
                                             f"{', '.join(names)}")
        try:
            in_bytes = "bytes" in name or name.startswith("bps")
            if in_bytes:
                return name, output.parse_bytes(value)
            if value.isascii() and value.isdecimal() and len(value) <= 15:
                return name, int(value)
        except ValueError:
            pass
        raise argparse.ArgumentTypeError(f"'{text}': write "
                                         f"{name}={'100M' if in_bytes else '1000'}, a second")
    return parse


def _global_options(parser: argparse.ArgumentParser, default: object) -> None:
    """Taken before the command and after it; what stands behind wins."""
    parser.add_argument("--json", action="store_true", default=default or False,
                        help="for scripts: JSON, one value a line")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--run-dir", metavar="DIR", default=default,
                       help="where VMs are found by name: DIR/NAME/qmp.sock or DIR/NAME.sock "
                            f"(default {vms.default_folder()})".replace("%", "%%"))
    where.add_argument("--qmp", metavar="PATH", default=default,
                       help="a QMP socket in place of a name")


def build_parser(named: bool = True) -> argparse.ArgumentParser:
    """The whole command line.

    :param named: whether commands take a VM's name; with --qmp they don't.
    """
    parser = argparse.ArgumentParser(prog="stratoctl", allow_abbrev=False,
                                     description="Look after the VMs of this host.")
    _global_options(parser, None)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def add(name: str, help: str, of_vm: bool = True) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=help, description=help, allow_abbrev=False)
        _global_options(command, argparse.SUPPRESS)
        if of_vm and named:
            command.add_argument("vm", metavar="VM", help="its name")
        return command

    add("ps", "list VMs", False)
    add("status", "one VM: state, workers, disks, network cards, consoles")
    for name, help in SIMPLE.items():
        add(name, help)
    console = add("console", "the guest's serial console; Ctrl-] leaves it")
    console.add_argument("--chardev", metavar="LABEL", help="another one than the serial port's")
    _add_attach_disk(add)
    _add_attach_nic(add)
    detach = add("detach", "unplug a disk or a network card")
    detach.add_argument("id", metavar="ID", help="the device's name")
    detach.add_argument("--timeout", type=_seconds, default=60.0, metavar="SECONDS",
                        help="for the guest and the host to let go (60)")
    link = add("link", "set a network card's link up or down")
    link.add_argument("nic", metavar="ID", help="the card's name")
    link.add_argument("state", choices=("up", "down"))
    _add_balloon(add)
    _add_top(add, named)
    events = add("events", "print events as they come")
    events.add_argument("-n", "--count", type=_integer(1, 1 << 31), help="end after so many")
    script = add("completion", "print the completion script of a shell", False)
    script.add_argument("shell", choices=sorted(completion.SCRIPTS))
    return parser


def _add_place(command: argparse.ArgumentParser, slots: str) -> None:
    command.add_argument("--id", dest="new_id", metavar="ID",
                         help="the device's name; without it one is made")
    command.add_argument("--addr", type=_integer(0, 255), metavar="SLOT",
                         help=f"{slots}; without it the first free one")


def _add_attach_disk(add: Add) -> None:
    disk = add("attach-disk", "plug a disk image or block device")
    disk.add_argument("image", metavar="IMAGE", help="a raw image, or a block device")
    disk.add_argument("--read-only", action="store_true", help="the guest can't write")
    disk.add_argument("--cached", dest="direct", action="store_false",
                      help="through the host's page cache")
    disk.add_argument("--discard", action="store_true", help="the guest's discards free space")
    disk.add_argument("--serial", metavar="TEXT", help="the serial number that the guest sees")
    disk.add_argument("--limit", action="append", default=[], type=_limit(DISK_OPTIONS),
                      metavar="NAME=RATE",
                      help=f"a second; {', '.join(DISK_LIMITS)}; NAME-max for bursts")
    _add_place(disk, "0 is vda")


def _add_attach_nic(add: Add) -> None:
    nic = add("attach-nic", "plug a network card on a tap")
    nic.add_argument("ifname", metavar="TAP", nargs="?",
                     help="the tap; without it one is made, that goes with the card")
    nic.add_argument("--make", action="store_true",
                     help="make the tap TAP, which must not be there")
    nic.add_argument("--bridge", metavar="BRIDGE", help="put the tap that is made on a bridge")
    nic.add_argument("--mac", metavar="ADDRESS", help="the card's; without it one is made")
    nic.add_argument("--queues", type=_integer(1, MAX_QUEUES), metavar="PAIRS",
                     help="queue pairs; without it as many as the slot has")
    nic.add_argument("--limit", action="append", default=[], type=_limit(NIC_LIMITS),
                     metavar="NAME=RATE", help=f"a second; {', '.join(NIC_LIMITS)}")
    _add_place(nic, "0 is eth0")


def _add_balloon(add: Add) -> None:
    balloon = add("balloon", "tell or set how much memory the guest has")
    balloon.add_argument("size", metavar="SIZE", nargs="?", type=Size,
                         help="as 512M, 1.5G or 50%% of what it has at most")
    balloon.add_argument("--stats", action="store_true",
                         help="what the guest tells of its memory")
    balloon.add_argument("--wait", action="store_true", help="until it has come to SIZE")
    balloon.add_argument("--timeout", type=_seconds, default=60.0, metavar="SECONDS",
                         help="for --wait: without progress (60)")


def _add_top(add: Add, named: bool) -> None:
    top = add("top", "what VMs do right now", False)
    if named:
        top.add_argument("vms", metavar="VM", nargs="*", help="names; without any, all")
    top.add_argument("-i", "--interval", type=_seconds, default=2.0, metavar="SECONDS",
                     help="(2)")
    top.add_argument("-n", "--count", type=_integer(1, 1 << 31),
                     help="print so many intervals one below the other, and end")
    top.add_argument("-p", "--processes", action="store_true", help="list VMs' processes, too")
    top.add_argument("-s", "--sort", choices=SORTS, default="name", help="(name)")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """What is to be done. :raises SystemExit: nothing, or the line is wrong."""
    words = list(arguments)
    options = words[:words.index("--")] if "--" in words else words
    by_path = any(word == "--qmp" or word.startswith("--qmp=") for word in options)
    parser = build_parser(not by_path)
    args = parser.parse_args(words)
    if args.command == "attach-nic":
        if args.make and args.ifname is None:
            parser.error("--make needs the name of the tap; without a name one is made anyway")
        if args.bridge and args.ifname is not None and not args.make:
            parser.error("--bridge goes with a tap that is made; for one that is there: "
                         f"ip link set {args.ifname} master {args.bridge}")
    if args.command == "balloon" and args.wait and args.size is None:
        parser.error("--wait needs a SIZE")
    return args
