"""The events that this VM can send, with the members of their data."""

from __future__ import annotations

EVENTS: dict[str, dict[str, str]] = {
    "SHUTDOWN": {"guest": "bool", "reason": "ShutdownCause"},
    "RESET": {"guest": "bool"},
    "STOP": {},
    "RESUME": {},
    "POWERDOWN": {},
}

TYPES: dict[str, dict[str, str] | tuple[str, ...]] = {
    "ShutdownCause": ("host-qmp-quit", "host-signal", "guest-shutdown"),
}
