"""Markers by folder, and what holds for every test."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import native

# `./dev test` runs the native tests once more with modules built with ASAN and UBSAN.
if os.environ.get("SV_NATIVE"):
    native.__path__.insert(0, os.environ["SV_NATIVE"])

_FOLDERS = ("native", "worker", "vm", "lab", "fuzz", "perf")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    root = Path(__file__).parent
    for item in items:
        kind = item.path.relative_to(root).parts[0] if item.path.is_relative_to(root) else ""
        if kind in _FOLDERS:
            item.add_marker(getattr(pytest.mark, kind))
