"""`balloon`: how much memory a guest has, is to do with, and says that it uses."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from vmm.ctl import output
from vmm.ctl.answers import inner, number, optional
from vmm.ctl.errors import CtlError, QmpRefused

if TYPE_CHECKING:
    import argparse

    from vmm.ctl.command_line import Size
    from vmm.ctl.qmp import QmpClient

_POLL = 1.0        # seconds; BALLOON_CHANGED comes at most once a second
_PAGE_BITS = 12    # of the balloon's pages (virtio 1.2, 5.5)
_LEAST = 1 << 20
_IN_BYTES = ("-memory", "-caches", "swap-in", "swap-out")


def balloon(client: QmpClient, args: argparse.Namespace) -> dict[str, Any]:
    """Tell what the guest has; with a size ask it to come to that before."""
    total = total_memory(client)
    told: dict[str, Any] = {"total": total}
    if args.size is not None:
        told["target"] = _set(client, args.size, total)
        if args.wait:
            _wait(client, told["target"], args.timeout)
    told["actual"] = _actual(client)
    if args.stats:
        told.update(_statistics(client))
    return told


def total_memory(client: QmpClient) -> int | None:
    """The guest's RAM in bytes; None if this VM doesn't tell."""
    return number(optional(client, "query-memory-size-summary"), "base-memory") or None


def _ask(client: QmpClient, command: str, arguments: dict[str, Any] | None = None) -> Any:
    try:
        return client.command(command, arguments)
    except QmpRefused as refused:
        if refused.error_class == "DeviceNotActive":
            raise CtlError(f"{client.name} has no balloon, or its guest's driver is not up",
                           "start the VM with -device virtio-balloon-device,id=balloon0") from None
        raise


def _set(client: QmpClient, size: Size, total: int | None) -> int:
    if size.share is not None and total is None:
        raise CtlError(f"{client.name} does not tell how much memory it has",
                       "give a size, as 512M")
    wanted = size.of(total or 0)
    if wanted < _LEAST:
        raise CtlError(f"{client.name}: no guest lives on {output.human_bytes(wanted)}",
                       "give it more")
    if total is not None and wanted > total:
        raise CtlError(f"{client.name} has {output.human_bytes(total)}, not "
                       f"{output.human_bytes(wanted)}", "100% gives the guest all of it")
    _ask(client, "balloon", {"value": wanted})
    return wanted


def _actual(client: QmpClient) -> int:
    actual = number(_ask(client, "query-balloon"), "actual")
    if actual is None:
        raise CtlError(f"{client.name}: query-balloon says nothing usable",
                       "is it a VM of this product?")
    return actual


def _wait(client: QmpClient, target: int, timeout: float) -> None:
    """Until the guest has what it was asked to do with.

    :raises CtlError: it makes no progress for that long.
    """
    best, deadline = _actual(client), time.monotonic() + timeout
    while best >> _PAGE_BITS != target >> _PAGE_BITS:
        client.wait_event("BALLOON_CHANGED", {}, min(_POLL, timeout))
        now = _actual(client)
        if abs(now - target) < abs(best - target):
            best, deadline = now, time.monotonic() + timeout
        elif time.monotonic() > deadline:
            raise CtlError(f"{client.name}: the guest stays at {output.human_bytes(now)}, "
                           f"{output.human_bytes(target)} are asked for",
                           "it needs the memory, or it is paused: stratoctl balloon --stats")


def _statistics(client: QmpClient) -> dict[str, Any]:
    answer = _ask(client, "query-balloon-stats")
    stats = inner(answer, "stats")
    return {"age-ms": number(answer, "age-ms"), "target": number(answer, "target"),
            "stats": {output.printable(name, 40): value for name in list(stats)[:100]
                      if (value := number(stats, name)) is not None}}


def describe(name: str, told: dict[str, Any]) -> str:
    """One line for people."""
    has = f"{name}: the guest has {output.human_bytes(told['actual'])}"
    if told["total"] is not None:
        has += f" of {output.human_bytes(told['total'])}"
    target = told.get("target")
    if target is not None and target >> _PAGE_BITS != told["actual"] >> _PAGE_BITS:
        has += f", and is asked to come to {output.human_bytes(target)}"
    return has


def draw_statistics(told: dict[str, Any]) -> None:
    """A table of what the guest tells."""
    age = told["age-ms"]
    title = "" if age is None or age < 1000 else f"as the guest told {age // 1000} s ago"
    output.print_table(title, ("THE GUEST TELLS", ">"),
                       [(stat, output.human_bytes(value) if stat.endswith(_IN_BYTES) else
                         output.human_count(value)) for stat, value in told["stats"].items()])
