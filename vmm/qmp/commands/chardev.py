"""Character devices."""

from __future__ import annotations

from vmm.qmp.registry import Command

TYPE_CHECKING = False  # importing typing would cost 10 ms of the start
if TYPE_CHECKING:
    from vmm.qmp.connection import Request


def _query_chardev(request: Request) -> object:
    return [{"filename": chardev.filename(), "frontend-open": True, "label": label}
            for label, chardev in request.vm.chardevs.items()]


TYPES: dict[str, dict[str, str] | tuple[str, ...]] = {
    "ChardevInfo": {"filename": "str", "frontend-open": "bool", "label": "str"},
}

COMMANDS = (
    Command("query-chardev", _query_chardev, returns="[ChardevInfo]"),
)
