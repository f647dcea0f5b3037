"""The VMs of this host: a folder `NAME` with a `qmp.sock`, or a socket `NAME.sock`, for each.

They are below one run directory: --run-dir, else $STRATOVIRT_RUN_DIR, else
$XDG_RUNTIME_DIR/stratovirt for an ordinary user, else /run/stratovirt.
"""

from __future__ import annotations

import os
import stat

from vmm.ctl.errors import CtlError
from vmm.ctl.output import printable
from vmm.ctl.qmp import LIMIT, QmpClient

SYSTEM_FOLDER = "/run/stratovirt"
SOCKET = "qmp.sock"
SUFFIX = ".sock"
QUICK = 2.0  # seconds for a VM that is looked at along with others


class Vm:
    """A VM by name, with the path of its QMP socket; it may have ended meanwhile."""

    __slots__ = ("name", "path")

    def __init__(self, name: str, path: str) -> None:
        self.name = name
        self.path = path

    def connect(self, total: float | None = None) -> QmpClient:
        """A connection to it.

        :param total: seconds for all that is done over it; without it each answer has its limit.
        :raises CtlError: nobody is there.
        """
        return QmpClient(self.path, self.name, LIMIT if total is None else total, total)


def default_folder() -> str:
    """The run directory where none is given."""
    given = os.environ.get("STRATOVIRT_RUN_DIR")
    if given:
        return given
    own = os.environ.get("XDG_RUNTIME_DIR")
    if own and os.geteuid() != 0:
        return os.path.join(own, "stratovirt")
    return SYSTEM_FOLDER


def list_vms(folder: str) -> list[Vm]:
    """Those below the run directory, by name; a folder that isn't there has none.

    :raises CtlError: the folder can't be read.
    """
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise _unreadable(folder, error) from None
    found: dict[str, Vm] = {}
    for entry in names:
        path = os.path.join(folder, entry)
        inside = os.path.join(path, SOCKET)
        if _is_socket(inside):
            found[entry] = Vm(entry, inside)  # a folder goes before a socket, as in find_vm
        elif entry.endswith(SUFFIX) and entry != SUFFIX and _is_socket(path):
            name = entry.removesuffix(SUFFIX)
            found.setdefault(name, Vm(name, path))
    return [found[name] for name in sorted(found)]


def find_vm(folder: str, name: str) -> Vm:
    """The VM of this name. :raises CtlError: there is none, or no such name is possible."""
    if not name or "/" in name or "\0" in name or name in (".", ".."):
        raise CtlError(f"'{printable(name)}' can't be the name of a VM",
                       "--qmp takes a socket's path")
    for path in (os.path.join(folder, name, SOCKET), os.path.join(folder, name + SUFFIX)):
        try:
            if stat.S_ISSOCK(os.stat(path).st_mode):
                return Vm(name, path)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, ValueError) as error:
            raise _unreadable(os.path.dirname(path), error) from None
    raise CtlError(f"There is no VM '{printable(name)}' in {printable(folder)}",
                   "stratoctl ps lists those that there are; --qmp takes a socket's path")


def _unreadable(folder: str, error: OSError | ValueError) -> CtlError:
    reason = getattr(error, "strerror", None) or str(error)
    hint = ("be the VMs' user, or root" if isinstance(error, PermissionError)
            else "use --run-dir or --qmp")
    return CtlError(f"Can't read the run directory {printable(folder)}: {printable(reason)}",
                    hint)


def _is_socket(path: str) -> bool:
    try:
        return stat.S_ISSOCK(os.stat(path).st_mode)
    except (OSError, ValueError):
        return False
