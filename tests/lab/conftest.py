"""Fixtures for whole guests: in the nested lab, a fresh L1 for each scenario."""

from __future__ import annotations

import compileall
import json
import os
import sys
from typing import TYPE_CHECKING, Any

import pytest

from tests.lab.lab import ROOT, Lab, retrying
from tests.support.capabilities import require

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

PARTS = ("vmm", "workers", "shared", "native", "tests/support", "tests/lab")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(ROOT / "tests/lab"):
            item.add_marker(pytest.mark.timeout(1500))  # three tries of a scenario


@pytest.fixture(scope="session")
def prepared_lab() -> None:
    """The snapshot exists, and Python needn't compile our modules in L1 (18 times slower)."""
    require("lab")
    for part in PARTS:
        compileall.compile_dir(str(ROOT / part), quiet=2)


@pytest.fixture
def lab(prepared_lab: None) -> Iterator[Lab]:
    """A fresh L1."""
    with Lab.acquire() as lab:
        yield lab


@pytest.fixture
def play(prepared_lab: None) -> Callable[..., dict[str, Any]]:
    """`play(plan, files={name: path}, timeout=400, tries=1)`: a scenario in a fresh L1, its report.

    `files` are copied to the share (/mnt/NAME inside); those changed come back in
    `report["files"]`. Tried again if L1 itself hangs. The limits of the steps do the work;
    `timeout` is for a step that doesn't come back. `tries` above 1 is for guests with many
    processors, which QEMU's emulation of SVM deadlocks now and then: with QEMU as their VMM too.
    """

    def run(plan: dict[str, Any], files: dict[str, Path] | None = None,
            timeout: float = 400, tries: int = 1) -> dict[str, Any]:
        for left in range(tries - 1, -1, -1):
            report = retrying(lambda: play_in_lab(plan, files or {}, timeout))
            if report["failure"] is None:
                break
            if not left:
                pytest.fail(report["failure"])
        return report

    return run


def play_in_lab(plan: dict[str, Any], files: dict[str, Path], timeout: float) -> dict[str, Any]:
    """Run tests.lab.scenarios in a fresh L1."""
    with Lab.acquire() as lab:
        for name, path in files.items():
            (lab.share / name).write_bytes(path.read_bytes())
        (lab.share / "plan.json").write_text(json.dumps(plan))
        python = f"PYTHONDONTWRITEBYTECODE=1 {sys.executable}"
        code, output = lab.run(
            f"cd {ROOT} && export HOME=/root PATH={os.environ['PATH']} && "
            f"{python} -m tests.lab.scenarios /mnt/plan.json", timeout)
        report: dict[str, Any] = json.loads(output.splitlines()[-1]) if code == 0 else {
            "failure": f"exit {code} of the scenario:\n{output[-4000:]}"}
        if report["failure"] is not None:
            lab.require_health()
            return report
        lab.require_no_triple_fault()  # else it looks like an end of the guest's own
        report["files"] = {name: (lab.share / name).read_bytes() for name in files}
        report["log"] = output
        return report
