"""`ps`, `status` and `events`: what VMs say about themselves."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from vmm.ctl import output, processes
from vmm.ctl.errors import CtlError, QmpRefused
from vmm.ctl.vms import QUICK

if TYPE_CHECKING:
    from vmm.ctl.qmp import QmpClient
    from vmm.ctl.vms import Vm

_AT_ONCE = 16


def dicts(answer: Any) -> list[dict[str, Any]]:
    """The objects of a list; whatever else a VM says is left out."""
    return [entry for entry in answer if isinstance(entry, dict)] if isinstance(
        answer, list) else []


def optional(client: QmpClient, command: str) -> Any:
    """A query's result; None where this VM doesn't know it or has no such device."""
    try:
        return client.command(command)
    except QmpRefused:
        return None


def process_of(client: QmpClient) -> int:
    """The pid of the VM; 0: it can't be told.

    Whoever made the listening socket; the VM's own word where that was somebody else, as
    with a socket that was handed in.
    """
    for cpu in dicts(optional(client, "query-cpus-fast")):
        thread = cpu.get("thread-id")
        if isinstance(thread, int) and 0 < thread < 1 << 22:
            return processes.thread_group(thread) or client.pid
    return client.pid


def ps(vms: list[Vm], as_json: bool) -> int:
    """List VMs; one that doesn't answer is listed as unreachable."""
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        found = list(pool.map(_summary, vms))
    if as_json:
        output.print_json(found)
    else:
        output.print_table("", ("NAME", "STATE", ">PID", ">CPUS", ">DEVICES", ">GUEST RAM",
                                ">OWN", "QMP"),
                           [_ps_row(entry) for entry in found])
    return 0


def _ps_row(entry: dict[str, Any]) -> tuple[object, ...]:
    if entry["state"] == "unreachable":
        return entry["name"], entry["state"], "", "", "", "", "", entry["qmp"]
    return (entry["name"], entry["state"], entry["pid"], entry["cpus"], entry["devices"],
            output.human_bytes(entry["guest-bytes"]), output.human_bytes(entry["own-bytes"]),
            entry["qmp"])


def _summary(vm: Vm) -> dict[str, Any]:
    try:
        with vm.connect(QUICK) as client:
            status = client.command("query-status")
            pid = process_of(client)
            used = processes.usage(pid)
            return {"name": vm.name, "state": _state(status), "pid": pid,
                    "cpus": len(dicts(optional(client, "query-cpus-fast"))),
                    "devices": len(dicts(optional(client, "query-workers"))),
                    "guest-bytes": used.guest, "own-bytes": used.own, "qmp": vm.path}
    except CtlError as error:
        return {"name": vm.name, "state": "unreachable", "qmp": vm.path, "reason": str(error)}


def _state(status: Any) -> str:
    return str(status.get("status", "?")) if isinstance(status, dict) else "?"


def status(vm: Vm, as_json: bool) -> int:
    """One VM: state, workers, disks, consoles."""
    with vm.connect() as client:
        answer = client.command("query-status")
        name = optional(client, "query-name")
        pid = process_of(client)
        balloon = optional(client, "query-balloon")
        used = processes.usage(pid)
        told: dict[str, Any] = {
            "name": vm.name, "state": _state(answer), "pid": pid, "qmp": vm.path,
            "title": name.get("name", "") if isinstance(name, dict) else "",
            "cpus": dicts(optional(client, "query-cpus-fast")),
            "guest-bytes": used.guest, "own-bytes": used.own, "processes": used.processes,
            "cpu-seconds": round(used.cpu, 2),
            "balloon": balloon.get("actual") if isinstance(balloon, dict) else None,
            "workers": dicts(optional(client, "query-workers")),
            "block": dicts(optional(client, "query-block")),
            "chardevs": dicts(optional(client, "query-chardev")),
        }
    if as_json:
        output.print_json(told)
    else:
        _draw_status(told)
    return 0


def _draw_status(told: dict[str, Any]) -> None:
    facts = [("state", told["state"]), ("pid", told["pid"]), ("name", told["title"] or "-"),
             ("cpus", len(told["cpus"])),
             ("guest RAM in use", output.human_bytes(told["guest-bytes"])),
             ("own memory", f"{output.human_bytes(told['own-bytes'])} in {told['processes']} "
                            "processes"),
             ("cpu time", f"{told['cpu-seconds']:.2f} s")]
    if isinstance(told["balloon"], int):
        facts.append(("balloon leaves", output.human_bytes(told["balloon"])))
    output.print_table(told["name"], ("", ""), facts)
    if told["workers"]:
        output.print_table("workers", ("DEVICE", "KIND", "STATE", ">PID", ">RESTARTS", "ENGINE"),
                           [[worker.get(key, "") for key in ("device", "kind", "state", "pid",
                                                             "restarts", "engine")]
                            for worker in told["workers"]])
    if told["block"]:
        output.print_table("disks", ("DRIVE", "DEVICE", ">SIZE", "ACCESS", "IMAGE"),
                           [_disk_row(entry) for entry in told["block"]])
    if told["chardevs"]:
        output.print_table("consoles and other chardevs", ("LABEL", "WHERE"),
                           [(entry.get("label", ""), entry.get("filename", ""))
                            for entry in told["chardevs"]])


def _disk_row(entry: dict[str, Any]) -> tuple[object, ...]:
    inserted = entry.get("inserted")
    node = inserted if isinstance(inserted, dict) else {}
    image = node.get("image")
    size = image.get("virtual-size") if isinstance(image, dict) else None
    return (node.get("node-name", ""), entry.get("qdev", ""),
            output.human_bytes(size) if isinstance(size, int) else "",
            "read only" if node.get("ro") else "read/write", node.get("file", ""))


def events(vm: Vm, as_json: bool, count: int | None) -> int:
    """Print events as they come, until the VM ends, `count` have come, or Ctrl-C."""
    import json

    shown = 0
    with vm.connect() as client:
        for event in client.each_event():
            if count is not None and shown >= count:
                break
            if as_json:
                output.print_json(event)
            else:
                data = event.get("data") or {}
                print(_when(event.get("timestamp")), output.printable(event.get("event", "?")),
                      json.dumps(data) if data else "", flush=True)
            shown += 1
            if count is not None and shown >= count:
                break
    return 0


def _when(timestamp: Any) -> str:
    try:
        seconds, micros = int(timestamp["seconds"]), int(timestamp["microseconds"])
        return f"{time.strftime('%F %T', time.localtime(seconds))}.{micros % 1_000_000:06d}"
    except (TypeError, KeyError, ValueError, OverflowError, OSError):
        return "-"
