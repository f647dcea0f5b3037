"""Where a console is, and that it is the VM's: a VM could name any socket or device."""

from __future__ import annotations

import os
import pty
import socket
import threading
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.scripted_vm import ScriptedVm
from tests.support.test_vm import wait_until
from vmm.ctl import console
from vmm.ctl.console import find_console, open_console
from vmm.ctl.errors import CtlError
from vmm.ctl.vms import Vm

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Script = Callable[..., ScriptedVm]

ME = {os.getuid()}


def find(vm: ScriptedVm, label: str | None = None) -> str:
    with Vm("web", vm.path).connect() as client:
        return find_console(client, label)


def chardevs(**where: str) -> dict[str, Any]:
    return {"query-chardev": [{"label": label, "filename": filename}
                              for label, filename in where.items()]}


@pytest.mark.parametrize(("where", "label", "address"), [
    ({"serial_chardev": "pty:/dev/pts/7"}, None, "pty:/dev/pts/7"),
    ({"serial_chardev": "disconnected:unix:/a,server=on"}, None, "unix:/a"),
    ({"x": "disconnected:unix:/a,server=x,b,server=on"}, None, "unix:/a,server=x,b"),
    ({"x": "disconnected:unix:/a"}, None, "unix:/a"),
    ({"serial_chardev": "pty:/a", "x": "pty:/b"}, None, "pty:/a"),
    ({"x": "stdio", "y": "pty:/b"}, None, "pty:/b"),
    ({"x": "pty:/a", "y": "pty:/b"}, "y", "pty:/b")])
def test_where_it_is(script: Script, where: dict[str, str], label: str | None,
                     address: str) -> None:
    assert find(script(chardevs(**where)), label) == address


@pytest.mark.parametrize(("where", "label", "text"), [
    ({}, None, "web has no console to connect to; start it with -serial socket"),
    ({"x": "stdio"}, None, "web has no console to connect to"),
    ({"x": "pty:/a", "y\x1b": "pty:/b"}, None, r"web has several consoles: x, y\?; choose one"),
    ({"x\x1b": "pty:/a"}, "y\x1b", r"web has no chardev 'y\?'; it has: x\?"),
    ({}, "y", "it has: none"),
    ({"x": "file:/a\x1b"}, "x", r"web: nobody can connect to file:/a\?; use a chardev of")])
def test_where_none_is(script: Script, where: dict[str, str], label: str | None,
                       text: str) -> None:
    with pytest.raises(CtlError, match=text):
        find(script(chardevs(**where)), label)


@pytest.mark.parametrize("answer", [None, {}, 5, [5, {"label": 5, "filename": ["pty:"]}, {}]])
def test_an_answer_that_says_nothing(script: Script, answer: object) -> None:
    with pytest.raises(CtlError, match="web has no console"):
        find(script({"query-chardev": answer}))


def test_somebody_leaves_in_time(script: Script) -> None:
    seen: list[str] = ["unix:/a,server=on", "disconnected:unix:/a,server=on"]

    def answer(_: object) -> object:
        return [{"label": "serial0", "filename": seen.pop(0) if len(seen) > 1 else seen[0]}]

    assert find(script({"query-chardev": answer})) == "unix:/a"


def test_somebody_stays(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "_BUSY_LIMIT", 0.1)
    with pytest.raises(CtlError, match="web: somebody else is connected to the console"):
        find(script(chardevs(serial0="unix:/a,server=on")))


# ---- opening it ----------------------------------------------------------------------------


def test_a_socket_of_the_vms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "console.sock"))
        listener.listen()
        os.close(open_console(f"unix:{tmp_path}/console.sock", os.getpid(), ME))
        monkeypatch.chdir(tmp_path)
        os.close(open_console("unix:console.sock", os.getpid(), ME))  # relative to the VM's folder
        with pytest.raises(CtlError, match="is relative to the folder of a VM"):
            open_console("unix:console.sock", 0, ME)
        before = set(os.listdir("/proc/self/fd"))
        with pytest.raises(CtlError, match="is not the VM's user; the VM is not to be trusted"):
            open_console(f"unix:{tmp_path}/console.sock", os.getpid(), {os.getuid() + 1})
        assert set(os.listdir("/proc/self/fd")) <= before  # earlier tests may still close some


def test_a_pty_of_the_vms() -> None:
    master, follower = pty.openpty()
    try:
        os.close(open_console(f"pty:{os.ttyname(follower)}", 0, ME))
        before = set(os.listdir("/proc/self/fd"))
        with pytest.raises(CtlError, match="is not a terminal of the VM's user"):
            open_console(f"pty:{os.ttyname(follower)}", 0, {os.getuid() + 1})
        assert set(os.listdir("/proc/self/fd")) <= before  # earlier tests may still close some
    finally:
        os.close(master)
        os.close(follower)


@pytest.mark.parametrize(("address", "text"), [
    ("pty:/dev/null", "/dev/null is not a pseudo terminal; the VM is not to be trusted"),
    ("pty:/dev/watchdog", "is not a pseudo terminal"),
    ("pty:/dev/pts/../null", "is not a pseudo terminal"),
    ("pty:/dev/pts/ptmx", "is not a pseudo terminal"),
    ("pty:/dev/pts/", "is not a pseudo terminal"),
    ("pty:/dev/pts/-1", "is not a pseudo terminal"),
    ("pty:/dev/pts/\u0661", "is not a pseudo terminal"),
    ("pty:7", "is not a pseudo terminal"),
    ("pty:", " is not a pseudo terminal"),
    ("pty:/dev/pts/999999", "Can't open /dev/pts/999999: No such file or directory"),
    ("unix:fd=7", "The console's socket was handed in"),
    ("unix:/missing/\x1b", r"Can't connect to /missing/\?: No such file"),
    ("unix:", "Can't connect to /proc/"),
    ("unix:/a\0b", "Can't connect to ")])
def test_what_a_vm_may_not_name(address: str, text: str) -> None:
    with pytest.raises(CtlError, match=text) as caught:
        open_console(address, os.getpid(), ME)
    assert str(caught.value).isprintable()


# ---- joining it with a terminal ------------------------------------------------------------


class Ends:
    """Standard input and output, and a console, whose other ends the test has."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
        self.keys, typed = socket.socketpair()
        self.guest, self.console = socket.socketpair()
        self.shown, written = socket.socketpair()
        self._kept = (typed, written)
        real_read, real_poll = os.read, console.select.poll

        def read(fd: int, size: int) -> bytes:
            return real_read(typed.fileno() if fd == 0 else fd, size)

        class Poll:
            """Descriptor 0 is `typed`."""

            def __init__(self) -> None:
                self._poll = real_poll()

            def register(self, fd: int, events: int) -> None:
                self._poll.register(typed.fileno() if fd == 0 else fd, events)

            def poll(self) -> list[tuple[int, int]]:
                return [(0 if fd == typed.fileno() else fd, events)
                        for fd, events in self._poll.poll(10_000)]

        monkeypatch.setattr(console.os, "read", read)
        monkeypatch.setattr(console.select, "poll", Poll)
        monkeypatch.setattr(console.sys, "stdout", written.makefile("w"))
        self.left: list[bool] = []
        self.thread = threading.Thread(target=lambda: self.left.append(
            console._exchange(self.console.fileno(), terminal)))
        self.thread.start()

    def end(self) -> bool:
        self.thread.join(10)
        return self.left[0]


def test_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = Ends(monkeypatch, terminal=False)
    ends.keys.sendall(b"echo\x1d\n")  # no terminal: every byte is the guest's
    assert ends.guest.recv(100) == b"echo\x1d\n"
    ends.guest.sendall(b"ok\n")
    assert ends.shown.recv(100) == b"ok\n"
    ends.keys.close()  # which ends the typing alone
    ends.guest.sendall(b"more\n")
    assert ends.shown.recv(100) == b"more\n"
    ends.guest.close()
    assert ends.end() is False


@pytest.mark.parametrize("typed", [b"\x1d", b"abc\x1ddef"])
def test_leaving(monkeypatch: pytest.MonkeyPatch, typed: bytes) -> None:
    ends = Ends(monkeypatch, terminal=True)
    ends.keys.sendall(typed)
    assert ends.end() is True
    ends.console.close()
    assert ends.guest.recv(100) == typed.partition(b"\x1d")[0]


def test_a_guest_that_takes_nothing_can_be_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "_HELD_LIMIT", 1000)
    ends = Ends(monkeypatch, terminal=True)
    for _ in range(20):
        ends.keys.sendall(b"x" * 60_000)
    ends.keys.sendall(b"\x1d")
    assert ends.end() is True


def test_a_console_whose_other_side_reads_slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of a pipe all of it arrives, however much."""
    monkeypatch.setattr(console, "_HELD_LIMIT", 1000)
    ends = Ends(monkeypatch, terminal=False)
    data = os.urandom(1 << 20)
    sender = threading.Thread(target=lambda: (ends.keys.sendall(data), ends.keys.close()))
    sender.start()
    got = b""
    while len(got) < len(data):
        got += ends.guest.recv(65536)
    assert got == data
    sender.join()
    ends.guest.close()
    assert ends.end() is False


def test_an_output_that_somebody_made_non_blocking(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = Ends(monkeypatch, terminal=False)
    os.set_blocking(ends._kept[1].fileno(), False)
    sender = threading.Thread(target=lambda: (ends.guest.sendall(b"x" * (1 << 20)),
                                              ends.guest.close()))
    sender.start()
    got = 0
    while got < 1 << 20:
        got += len(ends.shown.recv(65536))
    sender.join()
    assert ends.end() is False
    wait_until(lambda: not ends.thread.is_alive(), "the end")
