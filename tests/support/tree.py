"""The project's own files, for tests of the house rules (tests/style)."""

from __future__ import annotations

import ast
import functools
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[2]
_NOT_OURS = {"build", "dist", "__pycache__", ".git"}


@functools.cache
def files() -> tuple[str, ...]:
    """Every file under version control that is there; without git, every file."""
    done = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True,
                          text=True, check=False)
    names = done.stdout.split("\0") if done.returncode == 0 else _walk()
    return tuple(name for name in sorted(names) if name and (ROOT / name).is_file())


def _walk() -> Iterator[str]:
    for path in ROOT.rglob("*"):
        parts = path.relative_to(ROOT).parts
        if not any(part in _NOT_OURS or part.startswith(".venv") for part in parts):
            yield str(path.relative_to(ROOT))


def named(*endings: str, under: str = "") -> list[str]:
    """The files with one of these endings, in a folder."""
    return [name for name in files() if name.endswith(endings) and name.startswith(under)]


def text(name: str) -> str:
    """A file's text."""
    return (ROOT / name).read_text()


@functools.cache
def parsed(name: str) -> ast.Module:
    """A Python file's syntax tree."""
    return ast.parse(text(name), name)
