"""`ps`, `status` and `events`: what VMs say about themselves."""

from __future__ import annotations

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from vmm.ctl import output
from vmm.ctl.answers import dicts, inner, number, optional, text
from vmm.ctl.balloon import total_memory
from vmm.ctl.errors import CtlError
from vmm.ctl.processes import Snapshot
from vmm.ctl.vms import QUICK

if TYPE_CHECKING:
    from vmm.ctl.qmp import QmpClient
    from vmm.ctl.vms import Vm

_AT_ONCE = 16


def first_thread(cpus: list[dict[str, Any]]) -> int:
    """A thread of the VM, as it says; 0: it says nothing. For `Snapshot.core`."""
    return next((thread for cpu in cpus if (thread := number(cpu, "thread-id"))), 0)


def process_of(client: QmpClient) -> int:
    """The pid of the VM; 0: it can't be told."""
    cpus = dicts(optional(client, "query-cpus-fast"))
    return Snapshot().core(client.pid, first_thread(cpus))


# ---- ps ------------------------------------------------------------------------------------


def ps(vms: list[Vm], where: str, as_json: bool) -> int:
    """List VMs; one that doesn't answer is listed as unreachable.

    :param where: they were looked for, for people.
    """
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        try:
            found = list(pool.map(_summary, vms))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    processes = Snapshot()
    for entry in found:
        if "pid" in entry:
            entry["pid"] = processes.core(entry["pid"], entry.pop("thread"))
            used = processes.usage(entry["pid"])
            entry["guest-bytes"], entry["own-bytes"] = used.guest, used.own
    if as_json:
        output.print_json(found)
    elif found:
        output.print_table("", ("NAME", "STATE", ">PID", ">CPUS", ">DEVICES", ">RAM",
                                ">IN USE", ">OWN", "QMP"), [_ps_row(entry) for entry in found])
    else:
        print(f"There are no VMs in {output.printable(where)}", file=sys.stderr)
    return 0


def _summary(vm: Vm) -> dict[str, Any]:
    try:
        with vm.connect(QUICK) as client:
            status = client.command("query-status")
            cpus = dicts(optional(client, "query-cpus-fast"))
            return {"name": vm.name, "state": text(status, "status") or "?", "pid": client.pid,
                    "thread": first_thread(cpus), "cpus": len(cpus),
                    "memory-bytes": total_memory(client),
                    "devices": len(dicts(optional(client, "query-workers"))), "qmp": vm.path}
    except CtlError as error:
        return {"name": vm.name, "state": "unreachable", "qmp": vm.path, "reason": str(error)}


def _ps_row(entry: dict[str, Any]) -> tuple[object, ...]:
    if entry["state"] == "unreachable" and "pid" not in entry:
        return entry["name"], entry["state"], "", "", "", "", "", "", entry["qmp"]
    return (entry["name"], entry["state"], entry["pid"] or "?", entry["cpus"], entry["devices"],
            _bytes(entry["memory-bytes"]), output.human_bytes(entry["guest-bytes"]),
            output.human_bytes(entry["own-bytes"]), entry["qmp"])


# ---- status --------------------------------------------------------------------------------


def status(vm: Vm, as_json: bool) -> int:
    """One VM: state, memory, workers, disks, NICs, consoles."""
    with vm.connect() as client:
        answer = client.command("query-status")
        cpus = dicts(optional(client, "query-cpus-fast"))
        told: dict[str, Any] = {
            "name": vm.name, "state": text(answer, "status") or "?", "pid": 0, "qmp": vm.path,
            "title": text(optional(client, "query-name"), "name"), "cpus": cpus,
            "memory-bytes": total_memory(client),
            "balloon": number(optional(client, "query-balloon"), "actual"),
            "workers": dicts(optional(client, "query-workers")),
            "block": dicts(optional(client, "query-block")),
            "nics": dicts(optional(client, "query-nics")),
            "chardevs": dicts(optional(client, "query-chardev")),
        }
    processes = Snapshot()
    told["pid"] = processes.core(client.pid, first_thread(cpus))
    used = processes.usage(told["pid"])
    told.update({"guest-bytes": used.guest, "own-bytes": used.own,
                 "cpu-seconds": round(used.cpu, 2),
                 "processes": [{"pid": member.pid, "name": member.name,
                                "own-bytes": member.private} for member in used.members]})
    if as_json:
        output.print_json(told)
    else:
        _draw_status(told)
    return 0


def _draw_status(told: dict[str, Any]) -> None:
    given = output.human_bytes(told["guest-bytes"])
    if told["memory-bytes"] is not None:
        given = f"{given} in use of {output.human_bytes(told['memory-bytes'])}"
    facts = [("state", told["state"]), ("pid", told["pid"] or "?"), ("name", told["title"] or "-"),
             ("cpus", len(told["cpus"])), ("guest RAM", given)]
    if told["balloon"] is not None:
        facts.append(("balloon leaves", output.human_bytes(told["balloon"])))
    facts += [("own memory", f"{output.human_bytes(told['own-bytes'])} in "
                             f"{len(told['processes'])} processes"),
              ("cpu time", f"{told['cpu-seconds']:.2f} s")]
    output.print_table(told["name"], ("", ""), facts)
    for title, columns, rows in (
            ("workers", ("DEVICE", "KIND", "STATE", ">PID", ">RESTARTS", "ENGINE", "REASON"),
             [_row(worker, "device", "kind", "state", "pid", "restarts", "engine", "reason")
              for worker in told["workers"]]),
            ("disks", ("DRIVE", "DEVICE", ">SIZE", "ACCESS", "IMAGE"),
             [_disk_row(entry) for entry in told["block"]]),
            ("network cards", (">SLOT", "DEVICE", "LINK", "MAC", ">QUEUES", "BACK END", "TAP",
                               "LIMITS"),
             [_nic_row(nic) for nic in told["nics"] if "device" in nic]),
            ("consoles and other chardevs", ("LABEL", "WHERE"),
             [_row(entry, "label", "filename") for entry in told["chardevs"]])):
        if rows:
            print()
            output.print_table(title, columns, rows)


def _row(entry: dict[str, Any], *names: str) -> tuple[object, ...]:
    return tuple(entry.get(name, "") for name in names)


def _disk_row(entry: dict[str, Any]) -> tuple[object, ...]:
    node = inner(entry, "inserted")
    return (text(node, "node-name"), text(entry, "qdev"),
            _bytes(number(inner(node, "image"), "virtual-size")),
            "read only" if node.get("ro") is True else "read/write", text(node, "file"))


def _nic_row(nic: dict[str, Any]) -> tuple[object, ...]:
    limits = inner(nic, "limits")
    link = nic.get("link-up")
    missing = {"vhost-user": "vhost-user", "tap": "gone"}.get(text(nic, "type"), "?")
    return (*_row(nic, "slot", "device"),
            "up" if link is True else "down" if link is False else "?",
            *_row(nic, "mac", "queues"), text(nic, "netdev") or "?",
            text(nic, "ifname") or missing,
            ", ".join(f"{name} {_limit(name, value)}/s" for name in sorted(limits)
                      if (value := number(limits, name))))


def _limit(name: str, value: int) -> str:
    return output.human_bytes(value) if name.endswith("bytes") else output.human_count(value)


def _bytes(value: int | None) -> str:
    return "" if value is None else output.human_bytes(value)


# ---- events --------------------------------------------------------------------------------


def events(vm: Vm, as_json: bool, count: int | None) -> int:
    """Print events as they come, until the VM ends, `count` have come, or Ctrl-C."""
    import json

    with vm.connect() as client:
        for shown, event in enumerate(client.each_event(), 1):
            if as_json:
                output.print_json(event)
            else:
                data = event.get("data") or {}
                print(_when(event.get("timestamp")), output.printable(event.get("event", "?")),
                      json.dumps(data) if data else "", flush=True)
            if shown == count:
                break
    return 0


def _when(timestamp: Any) -> str:
    seconds, micros = number(timestamp, "seconds"), number(timestamp, "microseconds")
    try:
        return (f"{time.strftime('%F %T', time.localtime(seconds))}.{micros % 1_000_000:06d}"
                if seconds is not None and micros is not None else "-")
    except (ValueError, OverflowError, OSError):
        return "-"
