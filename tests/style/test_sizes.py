"""Files and functions stay small enough to be read in one go."""

from __future__ import annotations

import ast
import re
from typing import TYPE_CHECKING

from tests.support import tree

if TYPE_CHECKING:
    from collections.abc import Iterator

FILE_LINES = 520  # "about 500": nobody shaves off a comment to get below
FUNCTION_LINES = 60

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
BODIES = (*FUNCTIONS, ast.ClassDef)

# The last word before the first bracket of a line that isn't indented.
_NAME = re.compile(r"^(?!#|/).*?(\w+)\(")


def python_functions(name: str) -> Iterator[tuple[str, int]]:
    """Names and lengths, each without the functions and classes inside it."""
    for node in ast.walk(tree.parsed(name)):
        if isinstance(node, FUNCTIONS):
            inner = sum(length(child) for child in node.body if isinstance(child, BODIES))
            yield node.name, length(node) - inner


def length(node: ast.stmt) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def c_functions(text: str) -> Iterator[tuple[str, int]]:
    """In our C a function's brackets are the ones that stand alone in the first column."""
    name, first, opened = "", 0, False
    for number, line in enumerate(text.splitlines(), 1):
        if not opened and (match := _NAME.match(line)) and not line[0].isspace():
            name, first = match[1], number
        if line == "{":
            opened = True
        elif line == "}" and opened:
            yield name, number - first + 1
            opened = False


def test_files_are_short() -> None:
    lengths = {name: len(tree.text(name).splitlines())
               for name in tree.named(".py", ".pyi", ".c", ".h", ".S", ".inc")}
    assert not {name: lines for name, lines in lengths.items() if lines > FILE_LINES}


def test_functions_are_short() -> None:
    lengths = {f"{name}: {function}": lines
               for name in tree.named(".py") for function, lines in python_functions(name)}
    lengths |= {f"{name}: {function}": lines
                for name in tree.named(".c", ".h")
                for function, lines in c_functions(tree.text(name))}
    assert not {name: lines for name, lines in lengths.items() if lines > FUNCTION_LINES}


def test_c_functions_are_all_seen() -> None:
    """What `c_functions` relies on: a bracket ends no function's head, but for one-liners."""
    head = re.compile(r"^[A-Za-z_].*\)[ \t]*\{[^}\n]*$", re.MULTILINE)
    assert not {name: found for name in tree.named(".c", ".h")
                if (found := head.findall(tree.text(name)))}


def test_c_functions_of_a_sample() -> None:
    sample = ("struct x {\n\tint y;\n};\n\nstatic int one(int a,\n\t\tint b)\n{\n\tif (a) {\n"
              "\t\treturn f(b);\n\t}\n\treturn 0;\n}\n\nvoid two(void)\n{\n}\n")
    assert list(c_functions(sample)) == [("one", 8), ("two", 3)]
