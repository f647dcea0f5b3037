"""`top`: what VMs do right now, from their statistics pages, with the course of the last minute."""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from typing import TYPE_CHECKING, Any

from vmm.ctl import output
from vmm.ctl.errors import CtlError
from vmm.ctl.qmp import peer_of
from vmm.ctl.sample import Rates, Sample, read_pages
from vmm.ctl.vms import QUICK

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import RenderableType

    from vmm.ctl.vms import Vm

_HISTORY = 30
_BARS = " ▁▂▃▄▅▆▇█"

_COLUMNS = ("VM", "DEVICE", "KIND", ">IN/S", ">IN B/S", ">OUT/S", ">OUT B/S", ">P50", ">P99",
            ">ERRORS", ">RESTARTS", "BYTES/S")


class Figures:
    """What one interval showed of one VM."""

    __slots__ = ("cpu", "devices", "guest", "name", "own", "pid", "processes")

    def __init__(self, name: str, pid: int, before: Sample, now: Sample) -> None:
        used, was = now.usage[pid], before.usage.get(pid)
        seconds = max(now.when - before.when, 0.001)
        self.name = name
        self.pid = pid
        self.guest = used.guest
        self.own = used.own
        self.processes = used.processes
        self.cpu = max(used.cpu - was.cpu, 0.0) / seconds if was is not None else 0.0
        self.devices = [Rates(page, before.pages.get(key), seconds)
                        for key, page in sorted(now.pages.items()) if key[0] == pid]

    def as_json(self) -> dict[str, Any]:
        """For scripts."""
        return {"name": self.name, "pid": self.pid, "cpu": round(self.cpu, 3),
                "guest-bytes": self.guest, "own-bytes": self.own, "processes": self.processes,
                "devices": [device.as_json() for device in self.devices]}


def find_pids(vms: list[Vm], strict: bool) -> dict[int, str]:
    """Name by pid of those that run; QMP is not spoken for it.

    Whoever made the listening socket is the VM, unless only a page has the VM's name: then
    the socket was handed in.

    :param strict: a VM that can't be reached is an error.
    """
    pages = read_pages()
    cores = {page.core for page in pages}
    found = {}
    for vm in vms:
        try:
            pid = peer_of(vm.path, QUICK)
            if pid not in cores:
                pid = next((page.core for page in pages if page.vm == vm.name), pid)
            if pid:
                found[pid] = vm.name
        except CtlError:
            if strict:
                raise
    return found


def watch(names: dict[int, str], everything: bool, interval: float) -> Iterator[list[Figures]]:
    """The figures of each interval, for ever.

    :param names: of VMs by pid. :param everything: VMs that have pages without being named, too.
    """
    wanted = None if everything else set(names)
    before = _sample(wanted, names)
    while True:
        time.sleep(interval)
        now = _sample(wanted, names)
        yield [Figures(_name(pid, names, now), pid, before, now) for pid in sorted(now.usage)]
        before = now


def _sample(wanted: set[int] | None, names: dict[int, str]) -> Sample:
    sample = Sample(wanted)
    if wanted is None and names:  # those without a device have no page
        rest = Sample(set(names) - set(sample.usage))
        sample.usage.update(rest.usage)
    return sample


def _name(pid: int, names: dict[int, str], sample: Sample) -> str:
    told = next((page.vm for (core, _), page in sample.pages.items() if core == pid), "")
    return names.get(pid) or told or f"pid {pid}"


def top(names: dict[int, str], everything: bool, interval: float, count: int | None,
        as_json: bool) -> int:
    """Print until Ctrl-C, `count` intervals, or the end of the last VM that was named."""
    history: dict[tuple[int, str], deque[float]] = {}
    figures = watch(names, everything, interval)
    if as_json or not sys.stdout.isatty():
        for number, vms in enumerate(figures, 1):
            if as_json:
                output.print_json([vm.as_json() for vm in vms])
            else:
                output.console().print(draw(vms, history))
            if number == count or not (vms or everything):
                break
        return 0
    from rich.live import Live

    console = output.console()
    with Live(console=console, screen=count is None, auto_refresh=False) as live:
        live.update("reading …", refresh=True)
        for number, vms in enumerate(figures, 1):
            live.update(draw(vms, history), refresh=True)
            if number == count or not (vms or everything):
                break
    return 0


def draw(vms: list[Figures], history: dict[tuple[int, str], deque[float]]) -> RenderableType:
    """Two tables: VMs, and their devices with a chart each.

    :param history: of bytes a second, by VM and device; this interval's are added.
    """
    from rich.console import Group

    cpus = os.cpu_count() or 1
    machines = output.table("", ("VM", ">PID", ">CPU", "CPU", ">GUEST RAM", ">OWN", ">PROCESSES"),
                            [(vm.name, vm.pid, f"{100 * vm.cpu:.0f}%",
                              chart(_remember(history, (vm.pid, ""), vm.cpu), cpus),
                              output.human_bytes(vm.guest), output.human_bytes(vm.own),
                              vm.processes) for vm in vms])
    rows = [_row(vm, rates, history) for vm in vms for rates in vm.devices]
    if not rows:
        return machines
    return Group(machines, output.table("", _COLUMNS, rows))


def _row(vm: Figures, rates: Rates,
         history: dict[tuple[int, str], deque[float]]) -> tuple[object, ...]:
    past = _remember(history, (vm.pid, rates.device), rates.in_bytes + rates.out_bytes)
    return (vm.name, rates.device, rates.kind, output.human_count(rates.in_count),
            output.human_bytes(rates.in_bytes), output.human_count(rates.out_count),
            output.human_bytes(rates.out_bytes), _time(rates.latency50), _time(rates.latency99),
            rates.errors or "", rates.restarts or "", chart(past))


def _remember(history: dict[tuple[int, str], deque[float]], key: tuple[int, str],
              value: float) -> deque[float]:
    past = history.setdefault(key, deque(maxlen=_HISTORY))
    past.append(value)
    return past


def _time(value: float | None) -> str:
    return "" if value is None else output.human_time(value)


def chart(values: deque[float], full: float = 0.0) -> str:
    """A bar for each value, the newest last; the full height is `full`, or the largest one."""
    top_value = max(max(values, default=0.0), full)
    if top_value <= 0:
        return ""
    last = len(_BARS) - 1
    return "".join(_BARS[min(last, max(round(value / top_value * last), 1 if value > 0 else 0))]
                   for value in values)
