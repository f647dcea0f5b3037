"""`stratoctl [--run-dir DIR | --qmp PATH] [--json] COMMAND …`: commands and exit statuses.

Exit status: 0 done; 1 it could not be done, one line on standard error says why; 2 the command
line is wrong; 130 interrupted.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import TYPE_CHECKING

from shared.errors import SharedError
from vmm.ctl import command_line, completion, vms
from vmm.ctl.output import printable

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence
    from typing import Any, NoReturn

    from vmm.ctl.qmp import QmpClient

    Action = Callable[[QmpClient, argparse.Namespace], dict[str, Any]]

# Ctrl-C is how these are meant to end.
_ENDLESS = ("top", "events", "console")


def _vm(args: argparse.Namespace) -> vms.Vm:
    if args.qmp is not None:
        return vms.Vm(os.path.basename(args.qmp), args.qmp)
    return vms.find_vm(_folder(args), args.vm)


def _folder(args: argparse.Namespace) -> str:
    return args.run_dir if args.run_dir is not None else vms.default_folder()


def _change(args: argparse.Namespace) -> int:
    from vmm.ctl import balloon, change, devices, output

    actions: dict[str, Action] = {
        "quit": change.quit_vm, "attach-disk": devices.attach_disk,
        "attach-nic": devices.attach_nic, "detach": devices.detach, "link": change.set_link,
        "balloon": balloon.balloon,
    }
    vm = _vm(args)
    with vm.connect() as client:
        result = actions.get(args.command, change.run_state)(client, args)
    if args.json:
        output.print_json(result)
    elif args.command == "balloon":
        print(balloon.describe(client.name, result))
        if args.stats:
            balloon.draw_statistics(result)
    elif "slot" in result:
        tap = f", on the tap {result['ifname']}" if "ifname" in result else ""
        print(printable(f"{vm.name}: '{result['id']}' is in slot {result['slot']}{tap}"))
    return 0


def _console(args: argparse.Namespace) -> int:
    from vmm.ctl import console, processes, show

    vm = _vm(args)
    with vm.connect() as client:
        address = console.find_console(client, args.chardev)
        pid = show.process_of(client)
    fd = console.open_console(address, pid, {client.uid, processes.owner(pid)})
    try:
        if os.isatty(0):
            print(f"Connected to {client.name}; Ctrl-] leaves", file=sys.stderr, flush=True)
        left = console.attach(fd)
    finally:
        os.close(fd)
    if not left:
        print(f"\n{client.name} has closed its console", file=sys.stderr)
    return 0


def _top(args: argparse.Namespace) -> int:
    from vmm.ctl import targets, top

    named = None
    if args.qmp is not None:
        named = [_vm(args)]
    elif args.vms:
        named = [vms.find_vm(_folder(args), name) for name in args.vms]
    # A run directory that was named is what is meant, else every VM of the host.
    everything = named is None and args.run_dir is None
    return top.top(targets.Targets(named, _folder(args), everything), args)


def run(args: argparse.Namespace) -> int:
    """Do it; the exit status. :raises SharedError: it can't be done."""
    from vmm.ctl import show

    if args.command == "completion":
        print(completion.SCRIPTS[args.shell], end="")
        return 0
    if args.command == "ps":
        if args.qmp is not None:
            return show.ps([_vm(args)], args.qmp, args.json)
        return show.ps(vms.list_vms(_folder(args)), _folder(args), args.json)
    if args.command == "status":
        return show.status(_vm(args), args.json)
    if args.command == "events":
        return show.events(_vm(args), args.json, args.count)
    if args.command == "top":
        return _top(args)
    if args.command == "console":
        return _console(args)
    return _change(args)


def _complete(words: list[str]) -> int:
    for candidate in completion.candidates(command_line.build_parser(), words):
        print(candidate)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its exit status."""
    _prepare()
    line = list(sys.argv[1:] if arguments is None else arguments)
    command = ""
    try:
        if line[:1] == [completion.HIDDEN]:
            status = _complete(line[1:])
        else:
            args = command_line.parse(line)
            command = args.command
            status = run(args)
        sys.stdout.flush()
        return status
    except SharedError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        return 0 if command in _ENDLESS else 130
    except BrokenPipeError:
        # Who read our output has left; nothing more can be told, not even at exit.
        _silence()
        return 0
    except OSError as error:
        _silence()
        return _fail(f"The output can't be written: {error.strerror or error}")


def _fail(text: str) -> int:
    print(printable(f"stratoctl: {text}", 4000), file=sys.stderr)
    return 1


def _prepare() -> None:
    """What our caller may have left undone: descriptors 0 to 2, characters that can't be
    written. Signals that end us leave the terminal as it was."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets this number: all below are open
    for stream in ("stdout", "stderr"):
        if getattr(sys, stream) is None:
            setattr(sys, stream, open(os.devnull, "w"))  # noqa: SIM115
        getattr(sys, stream).reconfigure(errors="replace")
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, _end)


def _end(number: int, frame: object) -> NoReturn:
    raise SystemExit(128 + number)


def _silence() -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)


if __name__ == "__main__":
    sys.exit(main())
