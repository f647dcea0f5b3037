"""Commands that change a VM's run state, or a card's link."""

from __future__ import annotations

import os
import select
import time
from typing import TYPE_CHECKING, Any

from vmm.ctl import processes
from vmm.ctl.errors import CtlError, GoneError, QmpRefused
from vmm.ctl.output import printable

if TYPE_CHECKING:
    import argparse

    from vmm.ctl.qmp import QmpClient

QUIT_LIMIT = 20.0    # seconds: a VM drains and flushes for five
_NAMES = {"reset": "system_reset", "powerdown": "system_powerdown"}


def run_state(client: QmpClient, args: argparse.Namespace) -> dict[str, Any]:
    """`stop`, `cont`, `reset`, `powerdown`."""
    client.command(_NAMES.get(args.command, args.command))
    return {}


def quit_vm(client: QmpClient, args: argparse.Namespace) -> dict[str, Any]:
    """End the VM, and wait until it has ended: its images are free, its name is, too."""
    # By the kernel's word alone: what the VM says could name any process.
    core = client.pid if client.pid and processes.Snapshot().is_core(client.pid) else 0
    process = _open_process(core)
    try:
        deadline = time.monotonic() + QUIT_LIMIT
        try:
            client.command("quit")
            ended = client.wait_end(QUIT_LIMIT)
        except GoneError:
            ended = True  # it was about to end anyway
        if ended and process >= 0:
            poll = select.poll()
            poll.register(process, select.POLLIN)
            ended = bool(poll.poll(max(deadline - time.monotonic(), 0) * 1000))
    finally:
        if process >= 0:
            os.close(process)
    if not ended:
        raise CtlError(f"{client.name} has not ended within {QUIT_LIMIT:.0f} s",
                       "look at its log" + (f"; kill -9 {core} ends it at once" if core else ""))
    return {}


def _open_process(pid: int) -> int:
    """A descriptor that is readable when the process has ended; -1: there is none to be had."""
    try:
        return os.pidfd_open(pid) if pid else -1
    except OSError:
        return -1


def set_link(client: QmpClient, args: argparse.Namespace) -> dict[str, Any]:
    """The link of a network card, as its driver is told it."""
    try:
        client.command("set_link", {"name": args.nic, "up": args.state == "up"})
    except QmpRefused as refused:
        if refused.error_class != "DeviceNotFound":
            raise
        raise CtlError(f"{client.name} has no network card '{printable(args.nic, 100)}'",
                       f"stratoctl status {client.name} lists them") from None
    return {}
