"""`stratoctl [--run-dir DIR | --qmp PATH] [--json] COMMAND …`: commands and exit statuses.

Exit status: 0 done; 1 it could not be done, one line on standard error says why; 2 the command
line is wrong; 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING

from vmm.ctl import completion, vms
from vmm.ctl.errors import CtlError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from vmm.ctl.qmp import QmpClient

_SIMPLE = {
    "stop": "pause it", "cont": "let it go on", "reset": "as at power-on",
    "powerdown": "press the power button", "quit": "end it, and wait for the end",
}


def _seconds(text: str) -> float:
    value = float(text)
    if not 0.05 <= value <= 3600:
        raise argparse.ArgumentTypeError("use 0.05 to 3600 seconds")
    return value


def _count(text: str) -> int:
    value = int(text)
    if not 0 < value < 1 << 31:
        raise argparse.ArgumentTypeError("use 1 or more")
    return value


def _slot(text: str) -> int:
    value = int(text, 0)
    if not 0 <= value < 256:
        raise argparse.ArgumentTypeError("use 0 to 255")
    return value


def _global_options(parser: argparse.ArgumentParser, default: object) -> None:
    """Taken before the command and after it; what stands behind wins."""
    parser.add_argument("--json", action="store_true", default=default or False,
                        help="for scripts: JSON, one value a line")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--run-dir", metavar="DIR", default=default,
                       help="where VMs are found by name: DIR/NAME/qmp.sock or DIR/NAME.sock "
                            f"(default {vms.default_folder()})")
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
    add("status", "one VM: state, workers, disks, consoles")
    for name, help in _SIMPLE.items():
        add(name, help)
    console = add("console", "the guest's serial console; Ctrl-] leaves it")
    console.add_argument("--chardev", metavar="LABEL", help="another one than the serial port's")
    _add_device_commands(add)
    balloon = add("balloon", "tell or set how much memory the guest has")
    balloon.add_argument("size", nargs="?", help="as 512M or 2G")
    top = add("top", "what VMs do right now", False)
    if named:
        top.add_argument("vms", metavar="VM", nargs="*", help="names; without any, all")
    top.add_argument("-i", "--interval", type=_seconds, default=2.0, help="seconds (2)")
    top.add_argument("-n", "--count", type=_count, help="end after so many intervals")
    events = add("events", "print events as they come")
    events.add_argument("-n", "--count", type=_count, help="end after so many")
    script = add("completion", "print the completion script of a shell", False)
    script.add_argument("shell", choices=sorted(completion.SCRIPTS))
    return parser


def _add_device_commands(add: Callable[..., argparse.ArgumentParser]) -> None:
    disk = add("attach-disk", "plug a disk image or block device")
    disk.add_argument("image", help="a raw image, or a block device")
    disk.add_argument("--read-only", action="store_true")
    disk.add_argument("--cached", dest="direct", action="store_false",
                      help="through the host's page cache")
    disk.add_argument("--discard", action="store_true", help="the guest's discards free space")
    disk.add_argument("--serial", help="the serial number that the guest sees")
    nic = add("attach-nic", "plug a network card on a tap")
    nic.add_argument("ifname", help="the tap")
    nic.add_argument("--mac", help="its address; without it one is made")
    for command in (disk, nic):
        command.add_argument("--id", help="the device's name; without it one is made")
        command.add_argument("--addr", type=_slot, metavar="SLOT",
                             help="0 is vda or eth0; without it the first free one")
    detach = add("detach", "unplug a disk or a network card")
    detach.add_argument("id", help="the device's name")
    detach.add_argument("--timeout", type=_seconds, default=30.0,
                        help="seconds for the guest to let go (30)")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """What is to be done. :raises SystemExit: nothing, or the line is wrong."""
    by_path = any(word == "--qmp" or word.startswith("--qmp=") for word in arguments)
    return build_parser(not by_path).parse_args(arguments)


def _vm(args: argparse.Namespace) -> vms.Vm:
    if args.qmp is not None:
        return vms.Vm(os.path.basename(args.qmp), args.qmp)
    return vms.find_vm(_folder(args), args.vm)


def _folder(args: argparse.Namespace) -> str:
    return args.run_dir if args.run_dir is not None else vms.default_folder()


def _change(args: argparse.Namespace) -> int:
    from vmm.ctl import change, output

    actions: dict[str, Callable[[QmpClient, argparse.Namespace], dict[str, Any]]] = {
        "quit": change.quit_vm, "attach-disk": change.attach_disk,
        "attach-nic": change.attach_nic, "detach": change.detach, "balloon": change.balloon,
    }
    vm = _vm(args)
    with vm.connect() as client:
        result = actions.get(args.command, change.run_state)(client, args)
    if args.json:
        output.print_json(result)
    elif line := change.describe(args.command, vm.name, result):
        print(line)
    return 0


def _console(args: argparse.Namespace) -> int:
    from vmm.ctl import console, show

    vm = _vm(args)
    with vm.connect() as client:
        address = console.find_console(client, args.chardev)
        pid = show.process_of(client)
    fd = console.open_console(address, pid)
    try:
        if os.isatty(0):
            print(f"Connected to {vm.name}; Ctrl-] leaves", file=sys.stderr, flush=True)
        left = console.attach(fd)
    finally:
        os.close(fd)
    if not left:
        print(f"\n{vm.name} has closed its console", file=sys.stderr)
    return 0


def _top(args: argparse.Namespace) -> int:
    from vmm.ctl import top

    if args.qmp is not None:
        named = [vms.Vm(os.path.basename(args.qmp), args.qmp)]
    elif args.vms:
        named = [vms.find_vm(_folder(args), name) for name in args.vms]
    else:
        known = top.find_pids(vms.list_vms(_folder(args)), False)
        # A run directory that was named is what is meant, else every VM of the host.
        return top.top(known, args.run_dir is None, args.interval, args.count, args.json)
    return top.top(top.find_pids(named, True), False, args.interval, args.count, args.json)


def run(args: argparse.Namespace) -> int:
    """Do it; the exit status. :raises CtlError: it can't be done."""
    from vmm.ctl import show

    if args.command == "completion":
        print(completion.SCRIPTS[args.shell], end="")
        return 0
    if args.command == "ps":
        if args.qmp is not None:
            return show.ps([_vm(args)], args.json)
        return show.ps(vms.list_vms(_folder(args)), args.json)
    if args.command == "status":
        return show.status(_vm(args), args.json)
    if args.command == "events":
        return show.events(_vm(args), args.json, args.count)
    if args.command == "top":
        return _top(args)
    if args.command == "console":
        return _console(args)
    return _change(args)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its exit status."""
    line = list(sys.argv[1:] if arguments is None else arguments)
    if line[:1] == [completion.HIDDEN]:
        for candidate in completion.candidates(build_parser(), line[1:]):
            print(candidate)
        return 0
    args = parse(line)
    try:
        return run(args)
    except CtlError as error:
        print(f"stratoctl: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0 if args.command in ("top", "events", "console") else 130
    except BrokenPipeError:
        # Who read our output has left; nothing more can be told, not even at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0


if __name__ == "__main__":
    sys.exit(main())
