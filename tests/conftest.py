"""Markers by folder, and what holds for every test."""

from __future__ import annotations

from pathlib import Path

import pytest

_FOLDERS = ("native", "worker", "vm", "lab", "fuzz", "perf")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    root = Path(__file__).parent
    for item in items:
        kind = item.path.relative_to(root).parts[0] if item.path.is_relative_to(root) else ""
        if kind in _FOLDERS:
            item.add_marker(getattr(pytest.mark, kind))
