"""`top`: what VMs do right now, from their statistics pages, with the course of the last minute."""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING

from vmm.ctl import draw, output
from vmm.ctl.figures import History, Watch

if TYPE_CHECKING:
    import argparse

    from rich.console import Console, RenderableType

    from vmm.ctl.figures import Figures
    from vmm.ctl.screen import Screen
    from vmm.ctl.targets import Targets

FIRST = 0.3  # seconds, at most, until a terminal shows something


class View:
    """What is shown, and how."""

    def __init__(self, sort: str, with_processes: bool) -> None:
        self.sort = sort
        self.with_processes = with_processes
        self.history = History()
        self.vms: list[Figures] = []

    def add(self, vms: list[Figures]) -> None:
        """One more interval."""
        self.history.add(vms)
        self.vms = vms

    def tables(self, width: int) -> list[RenderableType]:
        """The tables, with an empty line between them."""
        vms = sorted(self.vms, key=draw.SORTS[self.sort])
        cpus = os.cpu_count() or 1
        found = [draw.machines(vms, self.history, cpus, width),
                 *draw.devices(vms, self.history, width)]
        if self.with_processes:
            found.append(draw.processes(vms, width))
        return [part for table in found for part in (table, "")]


def top(targets: Targets, args: argparse.Namespace) -> int:
    """Print until Ctrl-C, `--count` intervals, or the end of the last VM that was named.

    :raises CtlError: a VM that was named can't be reached.
    """
    watch = Watch(targets)
    view = View(args.sort, args.processes)
    console = None if args.json else output.console()
    if console is None or args.count is not None or not sys.stdout.isatty() or (
            console.is_dumb_terminal):
        return _print(watch, view, args, console)
    from vmm.ctl.screen import Screen

    with Screen(console) as screen:
        return _show(watch, view, args.interval, screen)


def _print(watch: Watch, view: View, args: argparse.Namespace, console: Console | None) -> int:
    number = 0
    while True:
        time.sleep(args.interval)
        number += 1
        view.add(watch.take())
        if console is None:
            output.print_json([vm.as_json() for vm in sorted(view.vms, key=lambda vm: vm.pid)])
        else:
            for table in view.tables(console.width):
                console.print(table)
        if number == args.count or watch.ended(view.vms):
            return 0


def _show(watch: Watch, view: View, interval: float, screen: Screen) -> int:
    """On a terminal, with keys."""
    wait = min(interval, FIRST)
    screen.draw(view, interval)
    while True:
        deadline = time.monotonic() + wait
        while (left := deadline - time.monotonic()) > 0:
            key = screen.wait(left)
            if key == "quit":
                return 0
            if key == "sort":
                names = list(draw.SORTS)
                view.sort = names[(names.index(view.sort) + 1) % len(names)]
            elif key == "processes":
                view.with_processes = not view.with_processes
            if key:
                screen.draw(view, interval)
        view.add(watch.take())
        screen.draw(view, interval)
        if watch.ended(view.vms):
            screen.last_words = f"{', '.join(watch.seen)}: no such VM any more"
            return 0
        wait = interval
