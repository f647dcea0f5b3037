"""Names of files, as `os.path` has them."""

from __future__ import annotations

import os.path

import pytest

from shared import paths


@pytest.mark.parametrize("path", ["a", "/a", "a/b", "/a/b", "/a//b", "/", "", "a/", "/a/b/", "//a",
                                  "./a", "../a", "/a/../b", "/../a", "/a/./b", "a/..", ".", ".."])
def test_the_same_as_the_standard_library(path: str) -> None:
    # POSIX lets two leading slashes mean something else; Linux doesn't.
    assert paths.name(path) == os.path.basename(path)
    assert paths.folder(path) == os.path.dirname(path).replace("//", "/")
    assert paths.absolute(path) == os.path.abspath(path).replace("//", "/")
