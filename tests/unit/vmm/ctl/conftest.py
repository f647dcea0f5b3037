"""Scripted VMs, which end with the test."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.support.scripted_vm import ScriptedVm

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@pytest.fixture
def script(tmp_path: Path) -> Iterator[Callable[..., ScriptedVm]]:
    """`script(answers, greeting, name="web")`: a VM below the folder `run` of the test."""
    started: list[ScriptedVm] = []

    def start(answers: dict[str, Any] | None = None, greeting: object = None,
              name: str = "web") -> ScriptedVm:
        folder = tmp_path / "run" / name
        folder.mkdir(parents=True, exist_ok=True)
        vm = ScriptedVm(folder / "qmp.sock", answers, greeting)
        started.append(vm)
        return vm

    yield start
    for vm in started:
        vm.close()
