"""The tables of `top`: what fits, what is cut, charts."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from tests.support.patience import PATIENT
from tests.support.stat_pages import add_kind, page
from vmm.ctl import draw
from vmm.ctl.draw import Column, build, chart, fit, plain
from vmm.ctl.figures import Figures, History
from vmm.ctl.processes import Member, Process, Usage
from vmm.ctl.top import View

if TYPE_CHECKING:
    from shared.statistics import Page


class FakeSample:
    """A Sample without a host."""

    def __init__(self, when: float, pages: list[Page], cpu: float = 0.0, pid: int = 7) -> None:
        self.when = when
        self.pages = {(pid, page.device): page for page in pages}
        used = Usage()
        used.guest, used.own = 300 << 20, 20 << 20
        for number, name in enumerate(("python3.11", "sv-nursery", "sv-blk-\x1b[2J")):
            member = Member(Process(pid + number, name, "S", 1, 0, 5), 4 << 20)
            member.cpu = cpu
            used.members.append(member)
        self.usage = {pid: used}


def figures(*pages: Page, name: str = "web", pid: int = 7, cpu: float = 0.5,
            before: list[Page] | None = None) -> Figures:
    old: Any = FakeSample(1.0, before or [], 0.0, pid)
    new: Any = FakeSample(2.0, list(pages), cpu, pid)
    return Figures(name, pid, old, new)


def lines(*vms: Figures, width: int = 140, with_processes: bool = False,
          sort: str = "name") -> list[str]:
    view = View(sort, with_processes)
    view.add(list(vms))
    written = io.StringIO()
    console = Console(file=written, width=width, highlight=False)
    for table in view.tables(width):
        console.print(table)
    return [line.rstrip() for line in written.getvalue().splitlines()]


# ---- what fits -----------------------------------------------------------------------------

COLUMNS = (Column("NAME"), Column(">A", 3, 5), Column(">CHART", 1), Column(">BBB", 2))


def rows(name: str) -> list[draw.Row]:
    return [[(name, ""), ("1", ""), ("x" * 30, draw._CHART), ("2", "")]]


@pytest.mark.parametrize(("name", "width", "widths"), [
    ("web", 100, {0: 4, 1: 5, 2: 30, 3: 3}),
    ("web", 40, {0: 4, 1: 5, 2: 22, 3: 3}),     # the chart has what is left
    ("web", 26, {0: 4, 1: 5, 2: 8, 3: 3}),
    ("web", 25, {0: 4, 1: 5, 3: 3}),            # least worth
    ("web", 15, {0: 4, 1: 5}),
    ("web", 3, {0: 4}),                          # a name always
    ("n" * 60, 100, {0: 40, 1: 5, 2: 30, 3: 3}),
    ("n" * 60, 50, {0: 28, 1: 5, 2: 8, 3: 3}),
    ("n" * 60, 34, {0: 12, 1: 5, 2: 8, 3: 3})])
def test_fitting(name: str, width: int, widths: dict[int, int]) -> None:
    assert fit(COLUMNS, rows(name), width) == widths


@PATIENT
@given(st.text(max_size=50), st.integers(1, 200), st.integers(0, 5))
def test_no_table_is_too_wide(name: str, width: int, count: int) -> None:
    written = io.StringIO()
    made = [[*plain(name), ("1", ""), (chart(range(30)), draw._CHART), ("2", "")]] * count
    Console(file=written, width=500).print(build(COLUMNS, made, width))
    for line in written.getvalue().splitlines():
        assert cell_len(line.rstrip()) <= max(width, 12)


def test_cells_that_a_terminal_would_obey() -> None:
    (text, style), = plain("a\x1b[2J\n[red]")
    assert (text, style) == ("a?[2J?[red]", "")


# ---- charts --------------------------------------------------------------------------------


@pytest.mark.parametrize(("values", "full", "drawn"), [
    ([], 0, ""), ([0, 0], 0, ""), ([1], 0, "█"), ([0, 1, 2], 0, " ▄█"),
    ([0.001, 100], 0, "▁█"),  # a little is seen
    ([1, 2], 8, "▁▂"), ([9], 2, "█")])
def test_charts(values: list[float], full: float, drawn: str) -> None:
    assert chart(values, full) == drawn


@PATIENT
@given(st.lists(st.floats(0, 1e300), max_size=40), st.floats(0, 1e300))
def test_any_chart(values: list[float], full: float) -> None:
    drawn = chart(values, full)
    assert len(drawn) in (0, len(values)) and set(drawn) <= set(draw._BARS)


# ---- tables --------------------------------------------------------------------------------


def test_a_vm_with_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    add_kind(monkeypatch, "toaster", "slices", "errors")
    shown = lines(figures(
        page("blk", {"reads": 1500, "read_bytes": 6 << 20, "errors": 3, "flushes": 4}, starts=3),
        page("net", {"packets": 10, "bytes": 640, "dropped": 7}, {"packets": 20}, {},
             device="nic0"),
        page("toaster", {"slices": 2000, "errors": 1}, device="t"),
        before=[page("blk", {}), page("net", {}, {}, {}, device="nic0"),
                page("toaster", {}, device="t")]))
    assert [line.split() for line in shown if line] == [
        ["VM", "PID", "CPU", "LOAD", "GUEST", "RAM", "OWN", "PROCESSES", "RESTARTS"],
        ["web", "7", "150%", shown[1].split()[3], "300", "MiB", "20.0", "MiB", "3", "2"],
        ["DISK", "READ/S", "READ", "B/S", "WRITE/S", "WRITE", "B/S", "OTHER/S", "P50", "P99",
         "ERRORS", "RESTARTS", "BYTES/S"],
        ["d0", "1.5k", "6.0", "MiB", "0", "0", "B", "4", "3", "2", "█"],
        ["NIC", "RX/S", "RX", "B/S", "RX", "DROPS", "TX/S", "TX", "B/S", "TX", "DROPS", "ERRORS",
         "RESTARTS", "BYTES/S"],
        ["nic0", "10", "640", "B", "7", "20", "0", "B", "█"],
        ["DEVICE", "KIND", "ACTIVITY", "ERRORS", "RESTARTS"],
        ["t", "toaster", "slices", "2.0k/s", "1"]]


def test_errors_that_happen_now_are_red() -> None:
    disk = page("blk", {"errors": 3})
    for before, style in ((page("blk", {"errors": 3}), ""), (page("blk", {}), draw.BAD)):
        vm = figures(disk, before=[before])
        cells = draw._disk_row(vm.devices[0], History().of(7, "d0"))
        assert ("3", style) in cells


def test_several_vms_are_named() -> None:
    shown = lines(figures(page("blk", {}), name="web"), figures(page("blk", {}), name="db", pid=9))
    assert [line.split()[:2] for line in shown if "d0" in line] == [["db", "d0"], ["web", "d0"]]


def test_processes() -> None:
    shown = lines(figures(page("blk", {})), with_processes=True)
    assert [line.split() for line in shown[-4:-1]] == [
        ["core", "7", "50%", "4.0", "MiB"], ["sv-nursery", "8", "50%", "4.0", "MiB"],
        ["sv-blk-?[2J", "9", "50%", "4.0", "MiB"]]


@pytest.mark.parametrize(("sort", "order"), [
    ("name", "abc"), ("cpu", "bca"), ("io", "cab"), ("memory", "abc")])
def test_orders(sort: str, order: str) -> None:
    vms = [figures(page("blk", {"read_bytes": moved}), name=name, pid=pid, cpu=cpu,
                   before=[page("blk", {})])
           for name, pid, cpu, moved in (("b", 10, 3.0, 1), ("a", 20, 1.0, 5), ("c", 30, 2.0, 9))]
    if sort == "memory":
        for number, vm in enumerate(sorted(vms, key=lambda vm: vm.name)):
            vm.guest = 100 - number
    shown = lines(*vms, sort=sort)
    assert "".join(line.split()[0] for line in shown[1:4]) == order


@pytest.mark.parametrize("width", [20, 40, 80, 140, 300])
def test_any_terminal(width: int) -> None:
    vms = [figures(page("blk", {"reads": 1}), page("net", {}, {}, device="nic0"), name=name,
                   pid=pid) for pid, name in ((7, "x" * 60), (8, "y"))]
    for line in lines(*vms, width=width, with_processes=True):
        assert cell_len(line) <= width


def test_no_vms() -> None:
    assert lines()[0].split()[0] == "VM"
