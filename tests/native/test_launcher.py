"""The command `stratovirt`: it becomes the interpreter, with the right arguments."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.capabilities import require
from tests.support.test_vm import TestVm, wait_until
from tests.support.tree import ROOT

pytestmark = pytest.mark.native

# Says its process id, on a line, and what it was started with.
SCRIPT = '#!/bin/sh\necho $$\nprintf "%s\\0" "$@"\n'


def build(target: Path, *flags: str) -> Path:
    require("gcc")
    target.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(["gcc", "-Wall", "-Wextra", "-Werror", *flags, "-o", str(target),
                    str(ROOT / "native/launcher/stratovirt.c")], check=True,
                   env={k: v for k, v in os.environ.items() if k != "LD_PRELOAD"})
    return target


def interpreter(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(SCRIPT)
    path.chmod(0o755)
    return path


def start(command: Path, *arguments: str) -> tuple[int, int, list[str]]:
    """The pid of what was started, that of what it became, its arguments."""
    process = subprocess.Popen([command, *arguments], stdout=subprocess.PIPE, text=True)
    text, _ = process.communicate(timeout=20)
    pid, _, words = text.partition("\n")
    return process.pid, int(pid), words.split("\0")[:-1]


def test_from_a_source_tree(tmp_path: Path) -> None:
    python = interpreter(tmp_path / "python")
    command = build(tmp_path / "stratovirt", f'-DSV_PYTHON="{python}"', '-DSV_PATHS="/a:/b"')
    started, became, arguments = start(command, "-m", "512", "-S")
    assert became == started  # no process in between
    assert arguments[:3] == ["-I", "-S", "-c"]
    assert arguments[4:] == ["/a:/b", "vmm.__main__", "", "-m", "512", "-S"]


def test_from_an_environment(tmp_path: Path) -> None:
    """Interpreter and modules are those beside the command, through links too."""
    site = tmp_path / "env/lib/python3.11/site-packages"
    site.mkdir(parents=True)
    interpreter(tmp_path / "env/bin/python3")
    build(tmp_path / "env/bin/stratovirt")
    (tmp_path / "link").symlink_to(tmp_path / "env/bin/stratovirt")
    _, _, arguments = start(tmp_path / "link", "-version")
    assert arguments[:3] == ["-I", "-S", "-c"]
    assert arguments[4:] == [str(site), "vmm.__main__", "", "-version"]


def test_an_environment_that_is_not_whole(tmp_path: Path) -> None:
    command = build(tmp_path / "env/bin/stratovirt")
    done = subprocess.run([command], capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 1 and "site-packages" in done.stderr and "reinstall" in done.stderr
    (tmp_path / "env/lib/python3.11/site-packages").mkdir(parents=True)
    done = subprocess.run([command], capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 1 and "env/bin/python3" in done.stderr


def test_the_command_of_the_source_tree(tmp_path: Path) -> None:
    """What `./dev which` prints: the process that is started is the interpreter itself."""
    if "STRATOVIRT" not in os.environ:
        pytest.skip("no command was built: ./dev test builds it")
    with TestVm(tmp_path, "-machine", "none", serial=False) as vm:
        assert vm.qmp.command("query-status")
        process = Path(f"/proc/{vm.process.pid}")
        arguments = process.joinpath("cmdline").read_bytes().split(b"\0")
        assert arguments[1:3] == [b"-I", b"-S"]
        assert process.joinpath("exe").resolve() == Path(sys.executable).resolve()


# As `SCRIPT`, but a nursery stays, says what it holds, and ends with its channel.
WITH_NURSERY = """#!/bin/sh
case "$6" in
vmm.__main__) echo $$; printf "%s\\0" "$@"; exec sleep 0.3;;
*) place="${5%%:*}"; ls -l /proc/$$/fd > "$place/held"; printf "%s\\0" "$@" > "$place/arguments"
   env > "$place/environment"; mv "$place/held" "$place/done"; exec sleep 20;;
esac
"""


def with_nursery(tmp_path: Path) -> Path:
    python = interpreter(tmp_path / "python")
    python.write_text(WITH_NURSERY)
    return build(tmp_path / "stratovirt", f'-DSV_PYTHON="{python}"',
                 f'-DSV_PATHS="{tmp_path}:/b"')


def test_the_nursery_starts_with_the_vm(tmp_path: Path) -> None:
    """It holds its channel and nothing else, whatever we inherited; no variable either."""
    command = with_nursery(tmp_path)
    with (tmp_path / "other").open("w") as other:
        os.set_inheritable(other.fileno(), True)
        process = subprocess.Popen([command, "-m", "128", "-kernel", "x"], close_fds=False,
                                   stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert int(process.stdout.readline()) == process.pid
    words = process.stdout.read().split("\0")
    assert words[7:11] == ["-m", "128", "-kernel", "x"]
    _, pid, gate = map(int, words[6].split(":"))
    assert gate == -1
    wait_until((tmp_path / "done").exists, "the nursery's report")
    os.kill(pid, signal.SIGKILL)
    process.wait(20)
    held = [line.split()[-3:] for line in (tmp_path / "done").read_text().splitlines()[1:]]
    assert {int(number): target for number, _, target in held if "socket" in target}.keys() == {3}
    assert {target for number, _, target in held if int(number) in (0, 2)} == {"/dev/null"}
    assert not any("other" in target for _, _, target in held)
    arguments = (tmp_path / "arguments").read_text().split("\0")[:-1]
    assert arguments == [*words[:4], f"{tmp_path}:/b", "workers.begin", ""]
    variables = (tmp_path / "environment").read_text().splitlines()
    assert {line.partition("=")[0] for line in variables} <= {"LC_ALL", "PWD", "OLDPWD", "SHLVL",
                                                             "_"}


@pytest.mark.parametrize(("size", "processors", "waits"), [
    (16 << 20, 2, True), (16 << 20, 1, True), ((16 << 20) - 1, 2, False), (16 << 20, 3, False)])
def test_the_nursery_waits_while_a_large_kernel_is_copied(
        tmp_path: Path, size: int, processors: int, waits: bool) -> None:
    """It has a descriptor more then, which says when; the VM has its other end."""
    command = with_nursery(tmp_path)
    kernel = tmp_path / "kernel"
    with kernel.open("wb") as file:
        file.truncate(size)
    available = sorted(os.sched_getaffinity(0))[:processors]
    if len(available) < processors:
        pytest.skip(f"there are no {processors} processors")
    process = subprocess.Popen(["taskset", "-c", ",".join(map(str, available)), command,
                                "-kernel", kernel], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    words = process.stdout.read().partition("\n")[2].split("\0")
    _, pid, gate = map(int, words[6].split(":"))
    wait_until((tmp_path / "done").exists, "the nursery's report")
    os.kill(pid, signal.SIGKILL)
    process.wait(20)
    assert (gate >= 0) == waits
    held = [line.split()[-3:] for line in (tmp_path / "done").read_text().splitlines()[1:]]
    assert {int(number) for number, _, target in held if "pipe" in target} == ({4} if waits
                                                                               else set())
    arguments = (tmp_path / "arguments").read_text().split("\0")[:-1]
    assert arguments[5:] == ["workers.begin", "4" if waits else ""]


@pytest.mark.parametrize("arguments", [
    ("-m", "128"), ("-kernel", "x", "-daemonize"), ("-sandbox", "off", "-kernel", "x"),
    ("-kernel", "x", "-help"), ("-version", "-kernel", "x")])
def test_starts_that_make_their_own_nursery_or_none(tmp_path: Path,
                                                    arguments: tuple[str, ...]) -> None:
    _, _, words = start(with_nursery(tmp_path), *arguments)
    assert words[6] == "" and words[7:] == list(arguments)
    assert not (tmp_path / "done").exists()


def test_closed_descriptors_come_first(tmp_path: Path) -> None:
    """Its channel must not become somebody's standard output."""
    command = with_nursery(tmp_path)
    text = subprocess.run(f"exec {command} -kernel x 0<&-", shell=True, capture_output=True,
                          text=True, timeout=20, check=True).stdout
    assert text.partition("\n")[2].split("\0")[6:9] == ["", "-kernel", "x"]
