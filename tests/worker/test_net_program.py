"""The net worker as a program: its command line, its taps, its sandbox."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from shared.tap import TapError, adopt_taps, check_name, open_tap
from tests.support.blk_worker import ROOT
from tests.support.capabilities import require
from tests.support.net_namespace import NetNamespace
from workers.errors import UsageError
from workers.net.program import NetProgram

pytestmark = pytest.mark.worker


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "workers.net", *arguments], cwd=ROOT, text=True,
                          capture_output=True, timeout=30, check=False)


def test_capabilities_and_help() -> None:
    assert json.loads(run("--print-capabilities").stdout) == {"type": "net"}
    text = run("--help").stdout
    for option in ("socket-path", "fd", "tap", "tap-fds", "queue-pairs", "queue-size",
                   "rx-packets", "tx-bytes", "sandbox"):
        assert f"--{option}" in text


@pytest.mark.parametrize("arguments", [
    [], ["--fd=3"], ["--tap=t"], ["--fd=3", "--socket-path=/x", "--tap=t"],
    ["--fd=3", "--tap=t", "--tap-fds=4"], ["--fd=3", "--tap-fds=4:4"], ["--fd=x", "--tap=t"],
    ["--fd=3", "--tap=t", "--queue-pairs=17"], ["--fd=3", "--tap=t", "--queue-size=100"],
    ["--fd=3", "--tap=t", "--rx-bytes=-1"], ["--fd=3", "--tap=t", "--speed=9"], ["tap"],
    ["--fd"], ["--fd=3", "--tap-fds=" + ":".join(map(str, range(4, 30)))]])
def test_bad_command_lines(arguments: list[str]) -> None:
    with pytest.raises(UsageError):
        NetProgram().parse(arguments)


def test_one_line_for_an_error() -> None:
    result = run("--fd=3", "--tap=a/b")
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1 and "'a/b'" in result.stderr


@pytest.mark.parametrize("name", ["", "x" * 16, "a b", "a/b", "..", "a:b", "a%d"])
def test_names_that_no_interface_has(name: str) -> None:
    with pytest.raises(TapError):
        check_name(name)


def test_a_busy_tap_is_refused_by_name() -> None:
    require("net_admin")
    namespace = NetNamespace()
    fds = namespace.tap("busy0")
    try:
        with pytest.raises(TapError, match="already in use: 'busy0'"):
            namespace.run(lambda: open_tap("busy0"))
        with pytest.raises(TapError, match="busy0"):
            namespace.run(lambda: open_tap("busy0", 2))  # no multi_queue tap
        with pytest.raises(TapError):
            namespace.run(lambda: open_tap("lo"))  # no tap at all
    finally:
        os.close(fds[0])
        namespace.close()


def test_descriptors_are_checked() -> None:
    require("net_admin")
    namespace = NetNamespace()
    one, several = namespace.tap("one0"), namespace.tap("two0", 2)
    null = os.open("/dev/null", os.O_RDWR)
    try:
        adopt_taps(one)
        adopt_taps(several)
        for wrong in ([null], [one[0], several[0]], [several[0], one[0]], [9999]):
            with pytest.raises(TapError):
                adopt_taps(wrong)
    finally:
        for fd in (*one, *several, null):
            os.close(fd)
        namespace.close()
