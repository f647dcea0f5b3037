"""Completion: what the last word can become; the script of bash in bash."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.ctl import environment
from tests.support.patience import PATIENT
from tests.support.scripted_vm import Raw, ScriptedVm
from vmm.ctl import completion, vms
from vmm.ctl.command_line import NIC_LIMITS, build_parser
from vmm.ctl.completion import SCRIPTS, candidates

if TYPE_CHECKING:
    from collections.abc import Callable

    Script = Callable[..., ScriptedVm]

ANSWERS = {
    "query-block": [{"qdev": "blk0"}, {"qdev": ""}, {"qdev": 5}, 7],
    "query-nics": [{"device": "nic0"}, {"slot": 1}, {"device": "a\x1b"}],
    "query-chardev": [{"label": "serial0"}],
}


@pytest.fixture
def complete(script: Script, tmp_path: Path) -> Callable[..., list[str]]:
    """With a VM `web` and one `db`."""
    script(ANSWERS)
    script(ANSWERS, name="db")

    def run(*words: str) -> list[str]:
        return candidates(build_parser(), ["--run-dir", f"{tmp_path}/run", *words])
    return run


@pytest.mark.parametrize(("words", "found"), [
    (("st",), ["status", "stop"]),
    (("status", ""), ["db", "web"]),
    (("status", "web", ""), []),
    (("top", "web", ""), ["db", "web"]),
    (("detach", "web", ""), ["blk0", "nic0"]),
    (("detach", "--timeout", "5", "web", "b"), ["blk0"]),
    (("detach", "missing", ""), []),
    (("link", "web", ""), ["nic0"]),
    (("link", "web", "nic0", ""), ["down", "up"]),
    (("console", "web", "--chardev", ""), ["serial0"]),
    (("top", "--sort", ""), ["cpu", "io", "memory", "name"]),
    (("completion", "z"), ["zsh"]),
    (("attach-disk", "web", ""), []),  # a file
    (("attach-disk", "web", "--limit", "iops-r"), ["iops-read-max=", "iops-read="]),
    (("attach-nic", "web", "--limit", ""), sorted(f"{name}=" for name in NIC_LIMITS)),
    (("attach-nic", "web", "--limit", "rx-bytes", "=", ""), []),  # as bash cuts it
    (("balloon", "web", "--st"), ["--stats"]),
    (("attach-nic", "--b"), ["--bridge"]),
    (("events", "-n", ""), []),
    (("nothing", ""), [])])
def test_candidates(complete: Callable[..., list[str]], words: tuple[str, ...],
                    found: list[str]) -> None:
    if words[0] == "nothing":
        assert "status" in complete(*words)  # the command is still to come
    else:
        assert complete(*words) == found


def test_every_command_is_found(complete: Callable[..., list[str]]) -> None:
    assert {"attach-nic", "balloon", "detach", "link", "top"} <= set(complete(""))


def test_a_socket_in_place_of_a_name(script: Script) -> None:
    path = script(ANSWERS).path
    for words in (["--qmp", path], [f"--qmp={path}"], ["--qmp", "=", path]):
        assert candidates(build_parser(), [*words, "detach", ""]) == ["blk0", "nic0"]


def test_interfaces(tmp_path: Path, complete: Callable[..., list[str]],
                    monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(completion, "NET", str(tmp_path / "net"))
    assert complete("attach-nic", "web", "") == []
    for name, feature in (("tap0", "tun_flags"), ("br0", "bridge"), ("eth0", "other")):
        (tmp_path / "net" / name / feature).mkdir(parents=True)
    assert complete("attach-nic", "web", "") == ["tap0"]
    assert complete("attach-nic", "web", "--bridge", "") == ["br0"]


def test_a_vm_that_hangs_or_lies(script: Script, tmp_path: Path,
                                 monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vms, "QUICK", 0.2)
    script({"query-block": Raw(b""), "query-nics": Raw(b"")}, name="hung")
    script({"query-block": {"a": 1}, "query-nics": Raw(b"rubbish\n")}, name="liar")
    for name in ("hung", "liar"):
        assert candidates(build_parser(),
                          ["--run-dir", f"{tmp_path}/run", "detach", name, ""]) == []
    assert candidates(build_parser(), ["--run-dir", "/dev/null", "status", ""]) == []


@PATIENT
@given(st.lists(st.text() | st.sampled_from([
    "--qmp", "--run-dir", "=", "--", "status", "attach-nic", "--limit", "-n", "--json", "--addr",
    "/missing"]), max_size=6))
def test_any_line(words: list[str]) -> None:
    for word in candidates(build_parser(), ["--run-dir", "/missing", *words]):
        assert word.isprintable()


# ---- in bash -------------------------------------------------------------------------------


def test_in_bash(script: Script, tmp_path: Path) -> None:
    """Names that bash would take apart stay whole, and it hands ours back the same way."""
    for name in ("my vm", "a*b", "web"):
        script(ANSWERS, name=name)
    (tmp_path / "stratoctl").write_text(
        f"#!/bin/sh\nexec '{sys.executable}' -m vmm.ctl \"$@\"\n")
    (tmp_path / "stratoctl").chmod(0o755)
    (tmp_path / "axb").touch()  # what a*b could become
    lines = ["stratoctl status ''", r"stratoctl detach my\ vm ''", "stratoctl top w",
             "stratoctl attach-nic web --limit rx-b"]
    asks = "".join(f"""
COMP_WORDS=({line}); COMP_WORDS[1]=${{COMP_WORDS[1]}}; COMP_CWORD=$(( ${{#COMP_WORDS[@]}} - 1 ))
_stratoctl; printf '<%s>' "${{COMPREPLY[@]}}"; echo
""" for line in lines)
    asks = asks.replace(r"my\ vm", r"'my\ vm'")  # as it was typed
    done = subprocess.run(
        ["bash", "-c", f"compopt() {{ echo nospace; }}\n{SCRIPTS['bash']}\n{asks}"], text=True,
        capture_output=True, timeout=60, check=True, cwd=tmp_path,
        env={**environment(STRATOVIRT_RUN_DIR=f"{tmp_path}/run"),
             "PATH": f"{tmp_path}:{os.environ['PATH']}"})
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        r"<a\*b><my\ vm><web>", "<blk0><nic0>", "<web>", "nospace", "<rx-bytes=>"]
