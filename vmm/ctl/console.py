"""The guest's serial console in this terminal; Ctrl-] leaves it."""

from __future__ import annotations

import os
import select
import sys
import time
from typing import TYPE_CHECKING

from vmm.ctl.answers import dicts, text
from vmm.ctl.errors import CtlError
from vmm.ctl.output import printable
from vmm.ctl.qmp import LIMIT, connect_unix, peer_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from vmm.ctl.qmp import QmpClient

ESCAPE = b"\x1d"          # Ctrl-]
SERIAL = "serial_chardev"  # what the VMM calls the chardev of `-serial KIND`
_BUSY_LIMIT = 2.0          # seconds for the VM to see that the last client has left
_CHUNK = 65536
_HELD_LIMIT = 1 << 20      # bytes typed that the guest hasn't taken


def find_console(client: QmpClient, label: str | None) -> str:
    """Where the console is: `unix:PATH`, `pty:PATH`.

    :param label: of the chardev; None: the serial port's, else the only one there is.
    :raises CtlError: there is no such chardev, it is of a kind that nobody can connect to, or
        somebody else is connected.
    """
    deadline = time.monotonic() + _BUSY_LIMIT
    while True:
        address, free = _console(client, label)
        if free:
            return address
        if time.monotonic() > deadline:
            raise CtlError(f"{client.name}: somebody else is connected to the console",
                           "a console has one client at a time")
        time.sleep(0.05)


def _console(client: QmpClient, label: str | None) -> tuple[str, bool]:
    found = {text(entry, "label"): text(entry, "filename")
             for entry in dicts(client.command("query-chardev"))}
    usable = {name: where for name, where in found.items()
              if where.startswith(("pty:", "unix:", "disconnected:unix:"))}
    if label is None:
        names = [name for name in (SERIAL, "serial0") if name in usable] or list(usable)
        if len(names) > 1 and SERIAL not in names:
            raise CtlError(f"{client.name} has several consoles: {_listed(usable)}",
                           "choose one with --chardev")
        if not names:
            raise CtlError(f"{client.name} has no console to connect to",
                           "start it with -serial socket,path=…,server,nowait or -serial pty")
        label = names[0]
    elif label not in found:
        raise CtlError(f"{client.name} has no chardev '{printable(label, 100)}'",
                       f"it has: {_listed(found) or 'none'}")
    elif label not in usable:
        raise CtlError(f"{client.name}: nobody can connect to {printable(found[label])}",
                       "use a chardev of the kind socket or pty")
    where = usable[label]
    free = where.startswith(("pty:", "disconnected:"))
    where = where.removeprefix("disconnected:")
    return where.rpartition(",server=")[0] or where, free


def _listed(names: Iterable[str]) -> str:
    return printable(", ".join(sorted(names)))


def open_console(address: str, pid: int, users: set[int]) -> int:
    """A descriptor of the console.

    What a VM says is not believed: it could have us type into any socket or device of ours.

    :param address: as `find_console` has it; a relative path is the VM's.
    :param pid: of the VM, 0 if it can't be told. :param users: whose the VM is.
    :raises CtlError: it can't be opened, or isn't the VM's.
    """
    kind, _, path = address.partition(":")
    if kind == "pty":
        return _open_pty(path, users)
    if path.startswith("fd="):
        raise CtlError("The console's socket was handed in to the VM, which doesn't know its path",
                       "connect to it where it was made")
    if not path.startswith("/"):
        if not pid:
            raise CtlError(f"The console {printable(path)} is relative to the folder of a VM that "
                           "can't be seen from here", "connect to it there")
        path = f"/proc/{pid}/cwd/{path}"
    sock = connect_unix(path, LIMIT)
    if peer_of(sock)[1] not in users:
        sock.close()
        raise CtlError(f"Who listens on {printable(path)} is not the VM's user",
                       "the VM is not to be trusted")
    return sock.detach()


def _open_pty(path: str, users: set[int]) -> int:
    # Opening anything else could have effects: a tape, a watchdog.
    number = path.removeprefix("/dev/pts/")
    if number == path or not (number.isascii() and number.isdecimal()):
        raise CtlError(f"{printable(path)} is not a pseudo terminal",
                       "the VM is not to be trusted")
    try:
        fd = os.open(path, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise CtlError(f"Can't open {path}: {error.strerror}", "is the VM running?") from None
    if not os.isatty(fd) or os.fstat(fd).st_uid not in users:
        os.close(fd)
        raise CtlError(f"{path} is not a terminal of the VM's user",
                       "the VM is not to be trusted")
    return fd


def attach(fd: int) -> bool:
    """Join standard input and output with the console, until Ctrl-], a hang-up or SIGINT.

    Where standard input is no terminal its end only ends the typing. A terminal is raw
    meanwhile, and as it was afterwards.

    :returns: False: the VM hung up.
    """
    if not os.isatty(0):
        return _exchange(fd, False)
    import termios
    import tty

    before = termios.tcgetattr(0)
    try:
        tty.setraw(0, termios.TCSANOW)
        return _exchange(fd, True)
    finally:
        termios.tcsetattr(0, termios.TCSANOW, before)


def _exchange(fd: int, terminal: bool) -> bool:
    os.set_blocking(fd, False)
    typing, held = True, b""
    while True:
        poll = select.poll()
        poll.register(fd, select.POLLIN | (select.POLLOUT if held else 0))
        # A guest that takes nothing must not keep Ctrl-] from us.
        if typing and (terminal or len(held) < _HELD_LIMIT):
            poll.register(0, select.POLLIN)
        ready = dict(poll.poll())
        if 0 in ready:
            data = _read(0)
            if data is None:
                continue
            typing = bool(data)
            if terminal and (not data or ESCAPE in data):
                _send(fd, held + data.partition(ESCAPE)[0])
                return True
            held += data
            if terminal:
                held = held[:_HELD_LIMIT]
        if ready.get(fd, 0) & (select.POLLIN | select.POLLHUP | select.POLLERR):
            data = _read(fd)
            if data == b"":
                return False
            _show(data or b"")
        if held:
            held = _send(fd, held)


def _read(fd: int) -> bytes | None:
    """What there is; nothing: its end; None: nothing yet."""
    try:
        return os.read(fd, _CHUNK)
    except BlockingIOError:
        return None
    except OSError:
        return b""  # EIO: a terminal whose other side is gone


def _send(fd: int, data: bytes) -> bytes:
    """Send what is taken; the rest."""
    if not data:
        return data
    try:
        return data[os.write(fd, data):]
    except BlockingIOError:
        return data
    except OSError:
        return b""  # the hang-up is seen by reading


def _show(data: bytes) -> None:
    out = sys.stdout.fileno()
    while data:
        try:
            data = data[os.write(out, data):]
        except BlockingIOError:  # somebody else has made the terminal so
            select.select([], [out], [])
