"""What native/sandbox leaves of the process that prepares itself for the sandbox."""

from __future__ import annotations

import os

import pytest

from native import _sandbox

pytestmark = pytest.mark.native
ROUNDS = 3000  # a thread that is still ending showed in one of a thousand


def test_preparing_the_c_library_leaves_no_thread() -> None:
    """unshare(CLONE_NEWUSER) refuses a process with a second thread, one that ends included."""
    before = len(os.listdir("/proc/self/task"))
    for _ in range(ROUNDS):
        assert _sandbox.lib.sv_begin_late_parts() == 0
        assert _sandbox.lib.sv_end_late_parts() == 0
        assert len(os.listdir("/proc/self/task")) == before
