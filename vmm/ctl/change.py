"""Commands that change a VM: its run state, its disks, its network cards, its memory."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from vmm.ctl import output
from vmm.ctl.errors import CtlError, QmpRefused
from vmm.ctl.show import dicts, optional

if TYPE_CHECKING:
    import argparse

    from vmm.ctl.qmp import QmpClient

DETACH_LIMIT = 30.0  # seconds for the guest to let go
QUIT_LIMIT = 20.0    # seconds: a VM drains and flushes for five
MAX_SLOTS = 32       # nothing has more; a VM says itself where its slots end


def run_state(client: QmpClient, args: argparse.Namespace) -> dict[str, Any]:
    """`stop`, `cont`, `reset`, `powerdown`."""
    names = {"reset": "system_reset", "powerdown": "system_powerdown"}
    client.command(names.get(args.command, args.command))
    return {}


def quit_vm(client: QmpClient, args: argparse.Namespace) -> dict[str, Any]:
    """End the VM, and wait until it has ended."""
    client.command("quit")
    if not client.wait_end(QUIT_LIMIT):
        raise CtlError(f"{client.name} has not ended within {QUIT_LIMIT:.0f} s",
                       "look at its log")
    return {}


def attach_disk(client: QmpClient, args: argparse.Namespace) -> dict[str, Any]:
    """`blockdev-add`, then `device_add`; without the latter the former is taken back."""
    name = args.id or _free_id(client, "disk")
    node: dict[str, Any] = {
        "node-name": name, "read-only": args.read_only,
        "file": {"driver": "file", "filename": os.path.abspath(args.image)},
        "cache": {"direct": args.direct},
    }
    if args.discard:
        node["discard"] = "unmap"
    client.command("blockdev-add", node)
    device = {"id": name, "driver": "virtio-blk-mmio"}
    if args.serial:
        device["serial"] = args.serial
    return _add_device(client, device, args.addr, "blockdev-del", {"node-name": name})


def attach_nic(client: QmpClient, args: argparse.Namespace) -> dict[str, Any]:
    """`netdev_add`, then `device_add`; without the latter the former is taken back."""
    name = args.id or _free_id(client, "net")
    client.command("netdev_add", {"id": name, "ifname": args.ifname})
    device = {"id": name, "driver": "virtio-net-mmio"}
    if args.mac:
        device["mac"] = args.mac
    return _add_device(client, device, args.addr, "netdev_del", {"id": name})


def _add_device(client: QmpClient, device: dict[str, Any], addr: int | None, undo: str,
                undo_arguments: dict[str, Any]) -> dict[str, Any]:
    """In the slot that was asked for, else in the first free one."""
    try:
        for slot in range(MAX_SLOTS) if addr is None else (addr,):
            try:
                client.command("device_add", {**device, "addr": hex(slot)})
                return {"id": device["id"], "slot": slot}
            except QmpRefused as refused:
                if addr is not None or "occupied" not in refused.what:
                    if addr is None and slot and "no slot" in refused.what:
                        raise CtlError(f"{client.name}: all {slot} slots are occupied",
                                       "detach a device first") from None
                    raise
        raise CtlError(f"{client.name}: no slot is free", "detach a device first")
    except CtlError:
        _quietly(client, undo, undo_arguments)
        raise


def _quietly(client: QmpClient, command: str, arguments: dict[str, Any]) -> None:
    try:
        client.command(command, arguments)
    except CtlError:
        pass  # what went wrong before it is what matters


def _free_id(client: QmpClient, prefix: str) -> str:
    """`disk0`, `disk1`, …: the first that nothing has as far as the VM tells."""
    taken: set[object] = set()
    for entry in dicts(optional(client, "query-block")):
        inserted = entry.get("inserted")
        taken |= {entry.get("qdev"), entry.get("device"),
                  inserted.get("node-name") if isinstance(inserted, dict) else None}
    taken |= {worker.get("device") for worker in dicts(optional(client, "query-workers"))}
    return next(name for n in range(1 << 20) if (name := f"{prefix}{n}") not in taken)


def detach(client: QmpClient, args: argparse.Namespace) -> dict[str, Any]:
    """`device_del`, and wait until the guest has let go."""
    client.command("device_del", {"id": args.id})
    if not client.wait_event("DEVICE_DELETED", {"device": args.id}, args.timeout):
        raise CtlError(f"{client.name}: the guest has not let go of '{args.id}' within "
                       f"{args.timeout:g} s", "it may still do so: stratoctl events")
    return {"id": args.id}


def balloon(client: QmpClient, args: argparse.Namespace) -> dict[str, Any]:
    """Without a size tell what the guest has, with one ask it to come down to that."""
    if args.size is not None:
        try:
            client.command("balloon", {"value": output.parse_bytes(args.size)})
        except ValueError as error:
            raise CtlError(str(error), "write it as 512M, 2G or in bytes") from None
    answer = client.command("query-balloon")
    actual = answer.get("actual") if isinstance(answer, dict) else None
    if not isinstance(actual, int):
        raise CtlError(f"{client.name}: query-balloon says nothing usable")
    return {"actual": actual}


def describe(command: str, name: str, result: dict[str, Any]) -> str:
    """One line for people; empty where the silence says that it worked."""
    if command == "balloon":
        return f"{name}: the guest has {output.human_bytes(result['actual'])}"
    if "slot" in result:
        return f"{name}: '{result['id']}' is in slot {result['slot']}"
    return ""
