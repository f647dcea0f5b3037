"""The events that this VM can send, with the members of their data."""

from __future__ import annotations

EVENTS: dict[str, dict[str, str]] = {
    "SHUTDOWN": {"guest": "bool", "reason": "ShutdownCause"},
    "RESET": {"guest": "bool"},
    "STOP": {},
    "RESUME": {},
    "POWERDOWN": {},
    "DEVICE_DELETED": {"device": "str", "path": "str"},
    "BALLOON_CHANGED": {"actual": "int"},
    "BLOCK_IO_ERROR": {"device": "str", "node-name?": "str", "operation": "IoOperationType",
                       "action": "BlockErrorAction", "nospace": "bool", "reason": "str"},
    "WORKER_CRASHED": {"device": "str", "pid": "int", "reason": "str"},
    "WORKER_RESTARTED": {"device": "str", "pid": "int", "gap-us": "int"},
    "WORKER_GIVEN_UP": {"device": "str", "reason": "str"},
}

TYPES: dict[str, dict[str, str] | tuple[str, ...]] = {
    "IoOperationType": ("read", "write"),
    "BlockErrorAction": ("ignore", "report", "stop"),
    "ShutdownCause": ("host-qmp-quit", "host-signal", "guest-shutdown"),
}
