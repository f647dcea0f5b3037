"""What a QMP client is answered when its command fails: a class and a readable description.

    VmmError
    └── QmpError                 GenericError, unless a subclass says otherwise
        ├── CommandNotFound
        ├── DeviceNotFound
        ├── DeviceNotActive
        ├── KvmMissingCap        on the wire: KVMMissingCap
        └── OperationThrottled

Every other StratovirtError that a command raises is answered as GenericError with its text.
"""

from __future__ import annotations

from shared.errors import StratovirtError
from vmm.errors import VmmError

DESC_LIMIT = 1024  # characters: a hostile name is not sent back whole


class QmpError(VmmError):
    """An error reply. `error_class` is the QMP class name."""

    error_class = "GenericError"


class CommandNotFound(QmpError):
    """No command has this name."""

    error_class = "CommandNotFound"


class DeviceNotFound(QmpError):
    """No device, back end or descriptor has this name."""

    error_class = "DeviceNotFound"


class DeviceNotActive(QmpError):
    """The device exists but its driver or back end isn't up."""

    error_class = "DeviceNotActive"


class KvmMissingCap(QmpError):
    """The host's KVM lacks what the command needs."""

    error_class = "KVMMissingCap"


class OperationThrottled(QmpError):
    """The client sent more than the server is willing to queue."""

    error_class = "OperationThrottled"


def describe(error: BaseException) -> dict[str, object]:
    """Return the "error" member for `error`: strings only, the description never empty."""
    name = error.error_class if isinstance(error, QmpError) else QmpError.error_class
    text = str(error) if isinstance(error, StratovirtError) else f"Internal error: {error!r}"
    text = " ".join(text.split())
    if len(text) > DESC_LIMIT:
        text = text[:DESC_LIMIT] + "..."
    return {"class": name, "desc": text or f"The command failed ({type(error).__name__})"}
