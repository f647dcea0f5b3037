"""The guest's serial console in this terminal; Ctrl-] leaves it."""

from __future__ import annotations

import os
import select
import sys
import time
from typing import TYPE_CHECKING, Any

from vmm.ctl.errors import CtlError
from vmm.ctl.qmp import LIMIT, connect_unix

if TYPE_CHECKING:
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
    found: dict[str, str] = {}
    answer: Any = client.command("query-chardev")
    for entry in answer if isinstance(answer, list) else ():
        if isinstance(entry, dict):
            found[str(entry.get("label", ""))] = str(entry.get("filename", ""))
    usable = {name: where for name, where in found.items()
              if where.startswith(("pty:", "unix:", "disconnected:unix:"))}
    if label is None:
        names = [name for name in (SERIAL, "serial0") if name in usable] or list(usable)
        if len(names) > 1 and SERIAL not in names:
            raise CtlError(f"{client.name} has several consoles: {', '.join(usable)}",
                           "choose one with --chardev")
        if not names:
            raise CtlError(f"{client.name} has no console to connect to",
                           "start it with -serial socket,path=…,server,nowait or -serial pty")
        label = names[0]
    elif label not in found:
        raise CtlError(f"{client.name} has no chardev '{label}'",
                       f"it has: {', '.join(found) or 'none'}")
    elif label not in usable:
        raise CtlError(f"{client.name}: nobody can connect to {found[label]}",
                       "use a chardev of the kind socket or pty")
    where = usable[label]
    free = where.startswith(("pty:", "disconnected:"))
    return where.removeprefix("disconnected:").partition(",server=")[0], free


def open_console(address: str, pid: int) -> int:
    """A descriptor of the console.

    :param address: as `find_console` has it; a relative path is the VM's.
    :param pid: of the VM.
    :raises CtlError: it can't be opened.
    """
    kind, _, path = address.partition(":")
    if not path.startswith("/"):
        path = f"/proc/{pid}/cwd/{path}"
    if kind == "unix":
        return connect_unix(path, LIMIT).detach()
    try:
        fd = os.open(path, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError as error:
        raise CtlError(f"Can't open {path}: {error.strerror}", "is the VM running?") from None
    if not path.startswith("/dev/") or not os.isatty(fd):
        os.close(fd)
        raise CtlError(f"{path} is not a terminal")
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
        termios.tcsetattr(0, termios.TCSADRAIN, before)


def _exchange(fd: int, terminal: bool) -> bool:
    os.set_blocking(fd, False)
    typing, held = True, b""
    while True:
        poll = select.poll()
        poll.register(fd, select.POLLIN | (select.POLLOUT if held else 0))
        if typing and len(held) < _HELD_LIMIT:
            poll.register(0, select.POLLIN)
        ready = dict(poll.poll())
        if 0 in ready:
            data = os.read(0, _CHUNK)
            typing = bool(data)
            if terminal and (not data or ESCAPE in data):
                _send(fd, held + data.partition(ESCAPE)[0])
                return True
            held += data
        if ready.get(fd, 0) & (select.POLLIN | select.POLLHUP | select.POLLERR):
            try:
                data = os.read(fd, _CHUNK)
            except BlockingIOError:
                continue
            except OSError:
                data = b""  # EIO: a pty whose master is gone
            if not data:
                return False
            _show(data)
        if held:
            held = _send(fd, held)


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
    while data:
        data = data[os.write(sys.stdout.fileno(), data):]
