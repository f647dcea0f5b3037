"""What VMs answer to queries, taken apart without belief: a wrong type is as good as nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vmm.ctl.errors import QmpRefused

if TYPE_CHECKING:
    from vmm.ctl.qmp import QmpClient

MOST = 1024        # entries of one answer; nothing that a VM has comes near
_LARGEST = 1 << 64


def optional(client: QmpClient, command: str) -> Any:
    """A query's result; None where this VM doesn't know it or has no such device."""
    try:
        return client.command(command)
    except QmpRefused:
        return None


def dicts(answer: Any) -> list[dict[str, Any]]:
    """The objects of a list; whatever else a VM says is left out."""
    return [entry for entry in answer[:MOST] if isinstance(entry, dict)] if isinstance(
        answer, list) else []


def inner(answer: Any, name: str) -> dict[str, Any]:
    """The object that an object has as its member; an empty one if it has none."""
    value = answer.get(name) if isinstance(answer, dict) else None
    return value if isinstance(value, dict) else {}


def text(answer: Any, name: str) -> str:
    """A member that is a string; empty if there is none."""
    value = answer.get(name) if isinstance(answer, dict) else None
    return value if isinstance(value, str) else ""


def number(answer: Any, name: str) -> int | None:
    """A member that is a number and not negative; None if there is none."""
    value = answer.get(name) if isinstance(answer, dict) else None
    is_one = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _LARGEST
    return value if is_one else None
