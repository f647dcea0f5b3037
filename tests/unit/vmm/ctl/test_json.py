"""What --json prints has the members that docs/stratoctl.md lists, and each of them."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import pytest

from shared.statistics import KINDS
from tests.support import tree
from tests.support.ctl import ctl_json
from tests.support.stat_pages import page
from tests.unit.vmm.ctl.test_figures import FakeSample
from tests.unit.vmm.ctl.test_show import GOOD
from vmm.ctl.figures import Figures
from vmm.ctl.rates import Rates

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.support.scripted_vm import ScriptedVm

    Script = Callable[..., ScriptedVm]

PAGE = tree.text("docs/stratoctl.md")


def documented(command: str) -> set[str]:
    """The words in backquotes of a command's row, without names of QMP's commands."""
    row = next(line for line in PAGE.partition("## For scripts")[2].splitlines()
               if line.startswith(f"| `{command}`"))
    return {word for word in re.findall(r"`([\w-]+)`", row.split("|")[2])
            if not word.startswith(("query-", "-"))}


def keys(value: Any, deep: tuple[str, ...] = ("processes",)) -> set[str]:
    """The members of an object, and of those of its arrays that are ours."""
    found = set(value)
    for name in deep:
        for entry in value.get(name, []):
            found |= set(entry)
    return found


@pytest.fixture
def where(script: Script, tmp_path: Path) -> tuple[str, str]:
    script(GOOD)
    return "--run-dir", f"{tmp_path}/run"


def test_status(where: tuple[str, str]) -> None:
    assert keys(ctl_json("status", "web", *where)) == documented("status")


def test_ps(where: tuple[str, str], script: Script) -> None:
    script(greeting={"hello": 1}, name="other")
    other, web = ctl_json("ps", *where)
    assert set(web) | set(other) == documented("ps") - {"unreachable"}
    assert set(other) == {"name", "state", "qmp", "reason"}


def test_commands(where: tuple[str, str]) -> None:
    told = ctl_json("attach-nic", "web", "lo", *where)
    assert set(told) == documented("attach-disk")
    told = ctl_json("balloon", "web", "512M", "--stats", *where)
    assert set(told) == documented("balloon")
    assert set(ctl_json("balloon", "web", *where)) == {"actual", "total"}
    assert ctl_json("stop", "web", *where) == {}


def test_top() -> None:
    vm = Figures("web", 7, FakeSample(1), FakeSample(2, (7, 1, 1.0)))  # type: ignore[arg-type]
    assert keys(vm.as_json()) == documented("top")


def test_devices_of_top() -> None:
    text = PAGE.partition("A device of `top` has")[2].partition("\n\n")[0]
    words = set(re.findall(r"`([\w-]+)`", text))
    words |= {word.replace("in-", "out-", 1) for word in words if word.startswith("in-")}
    found: set[str] = set()
    for kind in KINDS:
        told = Rates(page(kind, {}, {}), None, 1.0).as_json()
        json.dumps(told, allow_nan=False)
        found |= set(told)
        assert set(told) >= {"device", "kind", "restarts", "errors", "counters", "per-second"}
    assert found == words - {"top", "in", "out"}
