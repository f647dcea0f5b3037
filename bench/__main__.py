"""`python -m bench [NAME...] [OPTION...]`: runs each named benchmark, all without a name.

A benchmark is a module of this folder with `main(arguments) -> int`; a first line of its
docstring says what it measures.  Options go to every one that is named.
"""

from __future__ import annotations

import ast
import importlib
import sys
from pathlib import Path

HERE = Path(__file__).parent


def benchmarks() -> dict[str, str]:
    """Name and first line of the docstring of every module that has a `main`."""
    found = {}
    for path in sorted(HERE.glob("*.py")):
        tree = ast.parse(path.read_text())
        if path.stem != "__main__" and any(
                isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body):
            found[path.stem] = (ast.get_docstring(tree) or "").split("\n")[0]
    return found


def main(arguments: list[str]) -> int:
    """Exit code: the number of benchmarks that failed to run; a missed goal is no failure."""
    known = benchmarks()
    if "--help" in arguments or "-h" in arguments or "list" in arguments:
        print("usage: ./dev bench [NAME...] [--rounds N] [--quick] [--json | --markdown]\n")
        for name, text in known.items():
            print(f"  {name:10} {text}")
        return 0
    names = []
    while arguments and not arguments[0].startswith("-"):
        names.append(arguments.pop(0))
    unknown = [name for name in names if name not in known]
    if unknown:
        print(f"bench: there is no '{unknown[0]}'; there are: {', '.join(known)}",
              file=sys.stderr)
        return 2
    failed = 0
    for name in names or known:
        failed += importlib.import_module(f"bench.{name}").main(list(arguments)) != 0
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
