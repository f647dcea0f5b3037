"""The command as a whole: statuses, streams that are closed, full or narrow, interruptions."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.support.ctl import COMMAND, Terminal, ctl, environment
from tests.support.scripted_vm import Raw, Refusal, ScriptedVm
from tests.support.test_vm import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Script = Callable[..., ScriptedVm]

GOOD = {"query-status": {"status": "running"}}


@pytest.fixture
def where(tmp_path: Path) -> tuple[str, str]:
    return "--run-dir", f"{tmp_path}/run"


def test_statuses(script: Script, where: tuple[str, str]) -> None:
    script({**GOOD, "stop": Refusal("no")})
    assert ctl("cont", "web", *where) == ""
    assert ctl("stop", "web", *where, status=1) == "stratoctl: web: no\n"
    assert "There is no VM 'db'" in ctl("cont", "db", *where, status=1)
    assert "required: COMMAND" in ctl(status=2)
    assert "There are no VMs in /missing" in subprocess.run(
        [*COMMAND, "ps", "--run-dir", "/missing"], env=environment(), capture_output=True,
        text=True, timeout=60, check=True).stderr


def test_complaints_are_one_harmless_line(script: Script, where: tuple[str, str]) -> None:
    script({"stop": Refusal("a\nb\x1b]0;title\x07")})
    assert ctl("stop", "web", *where, status=1) == "stratoctl: web: a?b?]0;title?\n"
    assert ctl("stop", "x\n\x1b", *where, status=1).count("\n") == 1
    script(name="odd\x1b")
    assert "odd?" in ctl("status", "odd\x1b", *where)


def test_names_beyond_utf8(script: Script, where: tuple[str, str]) -> None:
    script(GOOD, name="a\udcff")
    assert json.loads(ctl("ps", "--json", *where))[0]["name"] == "a\udcff"
    assert "a?" in ctl("ps", *where)
    assert ctl("__complete", *where, "status", "") == ""  # it can't be typed
    assert ctl("stop", "a\udcff", *where) == ""


def run(*line: str, stdout: int, **more: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([*COMMAND, *line], env=environment(**more), timeout=60, check=False,
                          stdout=stdout, stderr=subprocess.PIPE)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_of_few_characters(script: Script, where: tuple[str, str],
                                      encoding: str) -> None:
    script(GOOD, name="\u0414µ")  # Cyrillic, and a letter of Latin-1
    for line in (("ps",), ("status", "\u0414µ"), ("top", "-n", "1", "-i", "0.05")):
        done = run(*line, *where, stdout=subprocess.PIPE, PYTHONIOENCODING=encoding)
        assert (done.returncode, done.stderr) == (0, b"")
        assert "?µ".encode(encoding, "replace") in done.stdout


def test_an_output_that_is_full(script: Script, where: tuple[str, str]) -> None:
    script(GOOD)
    with open("/dev/full", "w") as full:
        for line in (("ps",), ("ps", "--json"), ("status", "web"), ("completion", "bash"),
                     ("top", "-n", "1", "-i", "0.05")):
            done = run(*line, *where, stdout=full.fileno())
            assert done.returncode == 1, done
            assert done.stderr == (
                b"stratoctl: The output can't be written: No space left on device\n")


def test_a_reader_that_has_left(script: Script, where: tuple[str, str]) -> None:
    script(GOOD)
    for line in (("ps",), ("top", "--json", "-i", "0.05"), ("completion", "bash")):
        reader, writer = os.pipe()
        os.close(reader)
        done = run(*line, *where, stdout=writer)
        os.close(writer)
        assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize("line", ["ps", "status web", "top -n 1 -i 0.05", "console web"])
def test_closed_streams(script: Script, where: tuple[str, str], closed: str, line: str) -> None:
    """What we open must not come to stand where input or output are meant."""
    script(GOOD)
    command = " ".join(f"'{word}'" for word in COMMAND)
    done = subprocess.run(["sh", "-c", f"{command} {line} {where[0]} {where[1]} {closed}"],
                          env=environment(), capture_output=True, timeout=60, check=False)
    assert done.returncode == (1 if "console" in line else 0)
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize(("line", "status"), [
    (("status", "web"), 130), (("stop", "web"), 130), (("events", "web"), 0)])
def test_interrupted_while_it_waits(script: Script, where: tuple[str, str],
                                    line: tuple[str, ...], status: int) -> None:
    vm = script({"query-status": Raw(b""), "stop": Raw(b"")})
    with Terminal(*line, *where) as terminal:
        asked = {"status": "query-status", "stop": "stop", "events": "qmp_capabilities"}[line[0]]
        wait_until(lambda: vm.asked(asked), "the question")
        os.kill(terminal.process.pid, signal.SIGINT)
        assert terminal.wait() == status
        assert b"Traceback" not in terminal.output


def test_interrupted_while_it_lists(script: Script, where: tuple[str, str]) -> None:
    """Those that hang aren't waited for."""
    vms = [script({"query-status": Raw(b"")}, name=f"vm{number}") for number in range(20)]
    with Terminal("ps", *where) as terminal:
        wait_until(lambda: any(vm.asked("query-status") for vm in vms), "the question")
        os.kill(terminal.process.pid, signal.SIGINT)
        assert terminal.wait(10) == 130
        assert b"Traceback" not in terminal.output


def test_the_socket_vanishes(script: Script, where: tuple[str, str], tmp_path: Path) -> None:
    vm = script(GOOD)
    os.unlink(vm.path)
    assert "There is no VM 'web'" in ctl("status", "web", *where, status=1)
    assert "No such file" in ctl("--qmp", vm.path, "status", status=1)
    (tmp_path / "run/web/qmp.sock").touch()
    assert "nobody listens" in ctl("--qmp", vm.path, "status", status=1)
