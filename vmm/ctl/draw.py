"""What `top` shows: tables that fit the terminal, with charts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vmm.ctl.output import human_bytes, human_count, human_time, printable

if TYPE_CHECKING:
    from collections import deque
    from collections.abc import Callable, Iterable, Sequence

    from rich.table import Table

    from vmm.ctl.figures import Figures, History
    from vmm.ctl.rates import Flow, Rates

_BARS = " ▁▂▃▄▅▆▇█"
_GAP = 2        # columns between two cells
_NAME_LEAST, _NAME_MOST = 12, 40
_CHART_LEAST, _CHART_MOST = 8, 30
_CHART = "chart"
BAD = "red"


class Column:
    """A column of a table.

    :param title: with `>` in front: aligned to the right.
    :param worth: where the terminal is too narrow, the column with the least goes first; 0: it
        stays, and is cut.
    :param least: characters that it has at least, so that it doesn't jump with what is in it.
    """

    __slots__ = ("least", "right", "title", "worth")

    def __init__(self, title: str, worth: int = 0, least: int = 0) -> None:
        self.title = title.lstrip(">")
        self.right = title.startswith(">")
        self.worth = worth
        self.least = max(least, len(self.title))


Cell = tuple[str, str]  # text and style; the style _CHART: may be cut at its left
Row = list[Cell]


def plain(*cells: object) -> Row:
    """Cells without a style."""
    return [(printable(cell, 200), "") for cell in cells]


def fit(columns: Sequence[Column], rows: Sequence[Row], width: int) -> dict[int, int]:
    """Which columns are shown, and how wide: all that fit into `width` together. Names get what
    is left, then charts."""
    wanted = {number: _widths(column, [row[number] for row in rows])
              for number, column in enumerate(columns)}
    shown = {number: least for number, (least, _) in wanted.items()}
    while (room := width + _GAP - sum(least + _GAP for least in shown.values())) < 0:
        candidates = [number for number in shown if columns[number].worth]
        if not candidates:
            break
        del shown[min(candidates, key=lambda number: columns[number].worth)]
    for number in sorted(shown, key=lambda number: columns[number].worth):
        more = min(wanted[number][1] - shown[number], max(room, 0))
        shown[number] += more
        room -= more
    return shown


def _widths(column: Column, cells: Sequence[Cell]) -> tuple[int, int]:
    """What a column needs, and what it can use."""
    from rich.cells import cell_len

    if any(style == _CHART for _, style in cells):
        return max(_CHART_LEAST, column.least), _CHART_MOST
    longest = max([column.least, *(cell_len(text) for text, _ in cells)])
    if column.worth:
        return longest, longest
    return max(min(longest, _NAME_LEAST), column.least), max(min(longest, _NAME_MOST),
                                                             column.least)


def build(columns: Sequence[Column], rows: Sequence[Row], width: int) -> Table:
    """A table that is no wider than `width`."""
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0))
    shown = fit(columns, rows, width)
    for number, wide in shown.items():
        column = columns[number]
        drawn.add_column(column.title, justify="right" if column.right else "left",
                         no_wrap=True, overflow="ellipsis", width=wide)
    for row in rows:
        cells = [(*row[number], wide) for number, wide in shown.items()]
        drawn.add_row(*(Text(text[-wide:]) if style == _CHART else Text(text, style=style)
                        for text, style, wide in cells))
    return drawn


def chart(values: Iterable[float], full: float = 0.0) -> str:
    """A bar for each value, the newest last; the full height is `full`, or the largest one."""
    points = list(values)
    highest = max([*points, full], default=0.0)
    if highest <= 0:
        return ""
    last = len(_BARS) - 1
    return "".join(_BARS[min(last, max(round(value / highest * last), 1 if value > 0 else 0))]
                   for value in points)


# ---- VMs -----------------------------------------------------------------------------------

_MACHINES = (Column("VM"), Column(">PID", 8, 7), Column(">CPU", 20, 5), Column(">LOAD", 2),
             Column(">GUEST RAM", 19), Column(">OWN", 18, 8), Column(">PROCESSES", 5),
             Column(">RESTARTS", 9))


def machines(vms: Sequence[Figures], history: History, cpus: int, width: int) -> Table:
    """A row for each VM. :param cpus: of the host, whose chart they fill."""
    rows = []
    for vm in vms:
        restarts = sum(device.restarts for device in vm.devices)
        rows.append([*plain(vm.name, vm.pid, f"{100 * vm.cpu:.0f}%"),
                     (chart(history.of(vm.pid, ""), cpus), _CHART),
                     *plain(human_bytes(vm.guest), human_bytes(vm.own), len(vm.processes),
                            restarts or "")])
    return build(_MACHINES, rows, width)


# ---- devices -------------------------------------------------------------------------------

_TAIL = (Column(">ERRORS", 15), Column(">RESTARTS", 5), Column(">BYTES/S", 1))
_DISKS = (Column(">READ/S", 20), Column(">READ B/S", 18), Column(">WRITE/S", 19),
          Column(">WRITE B/S", 17), Column(">OTHER/S", 4), Column(">P50", 10, 6),
          Column(">P99", 11, 6), *_TAIL)
_NICS = (Column(">RX/S", 19, 6), Column(">RX B/S", 20, 8), Column(">RX DROPS", 13),
         Column(">TX/S", 17, 6), Column(">TX B/S", 18, 8), Column(">TX DROPS", 12), *_TAIL)
_OTHERS = (Column("KIND", 10), Column("ACTIVITY", 12), Column(">ERRORS", 11),
           Column(">RESTARTS", 5))
_PROCESSES = (Column(">PID", 10, 7), Column(">CPU", 12, 5), Column(">MEMORY", 11, 8))


def devices(vms: Sequence[Figures], history: History, width: int) -> list[Table]:
    """A table for disks, one for NICs, one for all others; none for what there is none of."""
    rows: dict[str, list[Row]] = {"blk": [], "net": [], "": []}
    for vm in vms:
        for rates in vm.devices:
            make = {"blk": _disk_row, "net": _nic_row}.get(rates.kind, _other_row)
            past = history.of(vm.pid, rates.device)
            kind = rates.kind if rates.kind in rows else ""
            rows[kind].append([*plain(vm.name, rates.device), *make(rates, past)])
    several = len(vms) > 1
    return [_of_vms(several, title, columns, rows[kind], width)
            for kind, title, columns in (("blk", "DISK", _DISKS), ("net", "NIC", _NICS),
                                         ("", "DEVICE", _OTHERS)) if rows[kind]]


def _of_vms(several: bool, title: str, columns: Sequence[Column], rows: list[Row],
            width: int) -> Table:
    """With one VM it need not be named."""
    first = 0 if several else 1
    return build([Column("VM"), Column(title), *columns][first:],
                 [row[first:] for row in rows], width)


def _disk_row(rates: Rates, past: deque[float]) -> Row:
    read, write = rates.incoming, rates.outgoing
    assert read is not None and write is not None
    return [*_flow(read), *_flow(write), (_some(rates.others), ""),
            (_time(rates.latency50), ""), (_time(rates.latency99), ""), *_tail(rates, past)]


def _nic_row(rates: Rates, past: deque[float]) -> Row:
    receive, send = rates.incoming, rates.outgoing
    assert receive is not None and send is not None
    return [*_flow(receive), _drops(receive), *_flow(send), _drops(send), *_tail(rates, past)]


def _other_row(rates: Rates, past: deque[float]) -> Row:
    return [(rates.kind, ""), (printable(rates.activity(), 300), ""), *_tail(rates, past)[:2]]


def _flow(flow: Flow) -> Row:
    return plain(human_count(flow.count), human_bytes(flow.bytes))


def _drops(flow: Flow) -> Cell:
    return human_count(flow.dropped) if flow.dropped else "", BAD if flow.dropping > 0 else ""


def _tail(rates: Rates, past: deque[float]) -> Row:
    return [(human_count(rates.errors) if rates.errors else "", BAD if rates.failing else ""),
            (human_count(rates.restarts) if rates.restarts else "", ""), (chart(past), _CHART)]


def _some(value: float) -> str:
    return human_count(value) if value > 0 else ""


def _time(value: float | None) -> str:
    return "" if value is None else human_time(value)


# ---- processes -----------------------------------------------------------------------------

def processes(vms: Sequence[Figures], width: int) -> Table:
    """A row for each process of each VM."""
    rows = [plain(vm.name, "core" if member.pid == vm.pid else member.name, member.pid,
                  f"{100 * cpu:.0f}%", human_bytes(member.private))
            for vm in vms for member, cpu in vm.processes]
    return _of_vms(len(vms) > 1, "PROCESS", _PROCESSES, rows, width)


SORTS: dict[str, Callable[[Figures], Any]] = {
    "name": lambda vm: (vm.name, vm.pid),
    "cpu": lambda vm: -vm.cpu,
    "io": lambda vm: -sum(device.moved for device in vm.devices),
    "memory": lambda vm: -(vm.guest + vm.own),
}
