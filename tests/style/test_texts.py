"""What no file may hold, and what every file must say."""

from __future__ import annotations

import ast
import re
import unicodedata

from tests.support import tree

DATA = "tests/data/"  # the manual's own text
QUOTES = "tests/support/manual.py"  # reads it, and quotes two words of it
SELF = "tests/style/test_texts.py"

MACHINE_PATHS = re.compile(r"(?<![\w.])/(work|home/\w+|Users/\w+|root/\w+)\b")
REGISTRIES = re.compile(r"pypi\.org|pythonhosted\.org|deb\.debian\.org|docker\.io|ghcr\.io|"
                        r"proxy\.golang\.org|crates\.io|npmjs\.", re.IGNORECASE)
UNFINISHED = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b")


def lines_with(pattern: re.Pattern[str]) -> list[str]:
    return [f"{name}:{number}: {line.strip()}"
            for name in tree.files() if name != SELF and not name.startswith(DATA)
            for number, line in enumerate(tree.text(name).splitlines(), 1)
            if pattern.search(line)]


def test_no_path_of_a_machine() -> None:
    assert not lines_with(MACHINE_PATHS)


def test_no_registry_is_named() -> None:
    """Packages come through the ordinary clients as the machine has them configured."""
    assert not lines_with(REGISTRIES)


def test_nothing_is_left_for_later() -> None:
    assert not lines_with(UNFINISHED)


def test_english_only() -> None:
    def foreign(character: str) -> bool:
        if ord(character) < 128 or not unicodedata.category(character).startswith("L"):
            return False
        return not unicodedata.name(character, "").startswith(("LATIN", "GREEK", "MICRO"))

    assert not [f"{name}: {character}" for name in tree.files()
                if not name.startswith(DATA) and name != QUOTES
                for character in set(tree.text(name)) if foreign(character)]


def test_every_module_says_what_it_is() -> None:
    """`./dev lint` asks it of the product; here of the tests, and of the C headers."""
    python = [name for name in tree.named(".py")
              if tree.parsed(name).body and not ast.get_docstring(tree.parsed(name))]
    headers = [name for name in tree.named(".h", under="native/")
               if not name.startswith("native/decl/")
               and not tree.text(name).startswith(("//", "/*"))]
    assert not python + headers


def test_sleeps_poll_or_say_why() -> None:
    """A wait is for a condition, with a deadline. Where time itself is tested, the line says so."""
    wrong = []
    for name in tree.named(".py", under="tests/"):
        if name.startswith("tests/support/"):
            continue
        lines = tree.text(name).splitlines()
        loops = [node for node in ast.walk(tree.parsed(name)) if isinstance(node, ast.While)]
        for node in ast.walk(tree.parsed(name)):
            if (isinstance(node, ast.Call) and ast.unparse(node.func) in ("time.sleep", "sleep")
                    and "#" not in lines[node.lineno - 1]
                    and not any(loop.lineno <= node.lineno <= (loop.end_lineno or 0)
                                for loop in loops)):
                wrong.append(f"{name}:{node.lineno}")
    assert not wrong
