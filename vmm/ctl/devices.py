"""Disks and network cards come and go. What fails half-way is taken back."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from shared import tap
from vmm.ctl import output, processes
from vmm.ctl.answers import dicts, inner, number, optional, text
from vmm.ctl.errors import CtlError, NoAnswerError, QmpRefused

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterable

    from vmm.ctl.qmp import QmpClient

MAX_SLOTS = 32     # nothing has more; a VM says itself where its slots end
MAX_IDS = 1000     # names that are tried
_UNDO_LIMIT = 5.0  # seconds for taking back
# A VM waits ten seconds for a worker that hangs, twenty for its I/O (docs/hotplug.md).
_PLUG_LIMIT = 60.0

_Undo = tuple[str, dict[str, Any]]


def attach_disk(client: QmpClient, args: argparse.Namespace) -> dict[str, Any]:
    """`blockdev-add`, then `device_add`; without the latter the former is taken back."""
    image = os.path.abspath(args.image)
    if not _is_text(image):
        raise CtlError(f"The name of {output.printable(image)} is not UTF-8, as QMP is",
                       "rename it, or make a link to it")

    def add(name: str) -> _Undo:
        node: dict[str, Any] = {
            "node-name": name, "read-only": args.read_only,
            "file": {"driver": "file", "filename": image}, "cache": {"direct": args.direct},
            **{f"throttling.{limit}": value for limit, value in args.limit},
        }
        if args.discard:
            node["discard"] = "unmap"
        client.command("blockdev-add", node)
        return "blockdev-del", {"node-name": name}

    device = {"driver": "virtio-blk-mmio"}
    if args.serial:
        device["serial"] = args.serial
    slots = range(MAX_SLOTS) if args.addr is None else (args.addr,)
    return _attach(client, args.new_id, "disk", add, device, slots)


def attach_nic(client: QmpClient, args: argparse.Namespace) -> dict[str, Any]:
    """`netdev_add`, then `device_add`; without the latter the former is taken back."""
    slots, queues = _choose_nic_slots(client, args)
    fds: list[int] = []
    ifname = args.ifname
    if args.make or ifname is None:
        ifname, fds = tap.make_tap(ifname or "", queues)
    try:
        if fds:
            tap.bring_up(ifname)
            if args.bridge:
                tap.join_bridge(ifname, args.bridge)
        else:
            _check_tap(client, ifname)

        def add(name: str) -> _Undo:
            backend: dict[str, Any] = {"id": name, **dict(args.limit)}
            if fds:
                _add_by_descriptors(client, backend, fds)
            else:
                client.command("netdev_add", {**backend, "ifname": ifname, "queues": queues})
            return "netdev_del", {"id": name}

        device = {"driver": "virtio-net-mmio"}
        if args.mac:
            device["mac"] = args.mac
        told = _attach(client, args.new_id, "net", add, device, slots)
    finally:
        tap.close_all(fds)  # the VM has its own
    return {**told, "ifname": ifname}


def _choose_nic_slots(client: QmpClient, args: argparse.Namespace) -> tuple[Iterable[int], int]:
    """The slots to try, and the queue pairs that they have."""
    nics = dicts(optional(client, "query-nics"))
    pairs = {slot: number(nic, "queues") or 1 for nic in nics
             if (slot := number(nic, "slot")) is not None and "device" not in nic}
    if args.addr is not None:
        return (args.addr,), args.queues or pairs.get(args.addr, 1)
    if not nics:
        return range(MAX_SLOTS), args.queues or 1
    if not pairs:
        raise CtlError(f"{client.name}: all {len(nics)} slots for network cards are occupied",
                       "detach a card first")
    wanted = args.queues or min(pairs.items())[1]
    fitting = sorted(slot for slot, queues in pairs.items() if queues == wanted)
    if not fitting:
        have = ", ".join(f"slot {slot} has {queues}" for slot, queues in sorted(pairs.items()))
        raise CtlError(f"{client.name}: no free slot has {wanted} queue pairs: {have}",
                       "leave --queues away")
    return fitting, wanted


def _check_tap(client: QmpClient, ifname: str) -> None:
    """A VM that may do so makes what isn't there: a slip of the pen would go unseen."""
    there = tap.exists(ifname)
    if not there and client.pid and processes.same_network(client.pid):
        raise CtlError(f"There is no tap '{output.printable(ifname)}'",
                       f"--make makes it; or: ip tuntap add {ifname} mode tap vnet_hdr")


def _add_by_descriptors(client: QmpClient, backend: dict[str, Any], fds: list[int]) -> None:
    """A VM may have no right to open taps: it gets this one's descriptors."""
    names = [f"stratoctl-{os.getpid()}-{n}" for n in range(len(fds))]
    sent: list[str] = []
    try:
        for name, fd in zip(names, fds, strict=True):
            client.command("getfd", {"fdname": name}, fds=(fd,))
            sent.append(name)
        client.command("netdev_add", {**backend, "fds": ":".join(names)})
    except BaseException:
        for name in sent:
            _quietly(client, "closefd", {"fdname": name})
        raise


def _attach(client: QmpClient, id: str | None, prefix: str, add: Callable[[str], _Undo],
            device: dict[str, str], slots: Iterable[int]) -> dict[str, Any]:
    """Add the back end, then the device.

    :param id: of both; None: the first of PREFIX0, PREFIX1, … that nothing has.
    """
    if id is not None and not _is_text(id):
        raise CtlError("The name of the device is not UTF-8, as QMP is", "choose another --id")
    name, undo = _add_backend(client, id, prefix, add)
    try:
        return {"id": name, "slot": _plug(client, {"id": name, **device}, list(slots))}
    except BaseException:
        # Behind a command that still runs: either that fails and this takes back, or that
        # succeeds and this is refused.
        _quietly(client, *undo)
        raise


def _add_backend(client: QmpClient, id: str | None, prefix: str,
                 add: Callable[[str], _Undo]) -> tuple[str, _Undo]:
    if id is not None:
        return id, add(id)
    taken = _taken_ids(client)
    free = [name for n in range(MAX_IDS) if (name := f"{prefix}{n}") not in taken]
    for name in free:
        try:
            return name, add(name)
        except QmpRefused as refused:
            # Somebody was faster, or it is a back end that no device uses.
            if "already registered" not in refused.what:
                raise
    raise CtlError(f"{client.name}: no name is free", "choose one with --id")


def _taken_ids(client: QmpClient) -> set[str]:
    """The ids of devices and back ends, as far as the VM tells."""
    taken: set[str] = set()
    for entry in dicts(optional(client, "query-block")):
        taken |= {text(entry, "qdev"), text(entry, "device"),
                  text(inner(entry, "inserted"), "node-name")}
    for nic in dicts(optional(client, "query-nics")):
        taken |= {text(nic, "device"), text(nic, "netdev")}
    return taken | {text(worker, "device") for worker in dicts(optional(client, "query-workers"))}


def _plug(client: QmpClient, device: dict[str, str], slots: list[int]) -> int:
    """Into the first of `slots` that is free; its number."""
    for slot in slots:
        try:
            client.command("device_add", {**device, "addr": hex(slot)}, timeout=_PLUG_LIMIT)
            return slot
        except QmpRefused as refused:
            if len(slots) == 1:
                raise
            if "no slot" in refused.what and slot:
                raise CtlError(f"{client.name}: all {slot} slots are occupied",
                               "detach a device first") from None
            if "is occupied" not in refused.what:
                raise
    raise CtlError(f"{client.name}: no slot is free", "detach a device first")


def _quietly(client: QmpClient, command: str, arguments: dict[str, Any]) -> None:
    try:
        client.command(command, arguments, timeout=_UNDO_LIMIT)
    except CtlError:
        pass  # what went wrong before it is what matters


def detach(client: QmpClient, args: argparse.Namespace) -> dict[str, Any]:
    """`device_del`, and wait until the guest has let go; the VM closes the back end, too."""
    shown = output.printable(args.id, 100)
    try:
        client.command("device_del", {"id": args.id}, timeout=args.timeout)
        if client.wait_event("DEVICE_DELETED", {"device": args.id}, args.timeout):
            return {"id": args.id}
    except NoAnswerError:
        pass
    except QmpRefused as refused:
        if "not found" in refused.what:
            raise CtlError(f"{client.name} has no disk or network card '{shown}'",
                           f"stratoctl status {client.name} lists them") from None
        raise
    raise CtlError(f"{client.name}: '{shown}' has not gone within {args.timeout:g} s",
                   "it may still do so: stratoctl events tells")


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
