"""Which VMs `top` looks at: those that were named, or all that there are, as they come and go."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from vmm.ctl import processes, vms
from vmm.ctl.errors import CtlError
from vmm.ctl.output import printable
from vmm.ctl.qmp import connect_unix, peer_of
from vmm.ctl.show import process_of
from vmm.ctl.vms import QUICK

if TYPE_CHECKING:
    from vmm.ctl.vms import Vm


class Targets:
    """`find()` says which VMs there are now.

    :param named: those that are looked at; None: all below the run directory.
    :param folder: the run directory. :param everything: VMs without a name there, too, if they
        have statistics pages.
    """

    def __init__(self, named: list[Vm] | None, folder: str, everything: bool) -> None:
        self._named = named
        self.by_name = named is not None
        self._folder = folder
        self.everything = everything
        self._strict = self.by_name
        # By path, inode and last change of the socket (inodes are used again): the pid, and when
        # it was started.
        self._known: dict[tuple[str, int, int], tuple[int, int]] = {}

    def find(self) -> dict[int, str]:
        """Names by pid. A VM is asked for nothing, unless its socket was handed in.

        :raises CtlError: one that was named can't be reached, the first time.
        """
        if self._named is not None:
            listed = self._named
        else:
            try:
                listed = vms.list_vms(self._folder)
            except CtlError:
                if not self.everything:
                    raise
                listed = []
        snapshot: list[processes.Snapshot] = []
        found = {pid: vm.name for vm in listed if (pid := self._core_of(vm, snapshot))}
        self._strict = False
        return found

    def _core_of(self, vm: Vm, snapshot: list[processes.Snapshot]) -> int:
        for key in self._keys(vm):
            known = self._known.get(key)
            if known is not None:
                return known[0] if _started(known[0]) == known[1] else 0
        try:
            about = os.stat(vm.path)
            pid = _ask_core(vm, snapshot)
        except (OSError, CtlError) as error:
            if not self._strict:
                return 0  # perhaps the next time
            if isinstance(error, CtlError):
                raise
            raise CtlError(f"Can't connect to {printable(vm.path)}: {error.strerror}",
                           "is the VM running?") from None
        if self._strict and not processes.alive(pid):
            raise CtlError(f"The processes of {printable(vm.name)} can't be seen from here",
                           "is it in another container? stratoctl status asks it")
        self._known[(vm.path, about.st_ino, about.st_ctime_ns)] = (pid, _started(pid))
        return pid

    def _keys(self, vm: Vm) -> list[tuple[str, int, int]]:
        """Of the socket that is there; if none is, of those that were: a VM that ends, or hangs,
        is looked at until its process is gone."""
        try:
            about = os.stat(vm.path)
        except OSError:
            return [key for key in self._known if key[0] == vm.path]
        return [(vm.path, about.st_ino, about.st_ctime_ns)]


def _started(pid: int) -> int:
    process = processes.read_process(pid)
    return process.started if process is not None else -1


def _ask_core(vm: Vm, snapshot: list[processes.Snapshot]) -> int:
    """Whoever made the listening socket is the VM, unless it made it for the VM.

    :param snapshot: the one of this round, if there is one yet.
    """
    sock = connect_unix(vm.path, QUICK)
    try:
        pid, _ = peer_of(sock)
    finally:
        sock.close()
    if not snapshot:
        snapshot.append(processes.Snapshot())
    if not pid or snapshot[0].is_core(pid):
        return pid
    with vm.connect(QUICK) as client:
        return process_of(client)
