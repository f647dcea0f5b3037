"""Names of files: what `os.path` does, for modules that load before the guest runs.

`os` itself takes 0.8 ms to import, most of it for the abstract classes behind `os.environ`; the
system calls are in `posix`, under the same names.
"""

from __future__ import annotations

from posix import getcwd


def name(path: str) -> str:
    """What comes after the last slash."""
    return path.rpartition("/")[2]


def folder(path: str) -> str:
    """What comes before the last slash; empty: the path has none."""
    head, slash, _ = path.rpartition("/")
    return head.rstrip("/") or slash


def absolute(path: str) -> str:
    """From the root, without `.`, `..` and double slashes; no link is followed."""
    parts: list[str] = []
    for part in (path if path.startswith("/") else f"{getcwd()}/{path}").split("/"):
        if part == "..":
            del parts[-1:]
        elif part not in ("", "."):
            parts.append(part)
    return "/" + "/".join(parts)
