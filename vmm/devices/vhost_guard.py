"""What is around every exchange of a device with its back end: the lock, and the judgement."""

from __future__ import annotations

from shared.errors import SharedError
from shared.vhost_user.errors import PeerRefusedError, TimedOutError
from vmm.errors import BackendError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm.devices.vhost_user import VhostUserDevice

NEW = 0  # of vmm/devices/vhost_user.py: no features known


class Held:
    """`with`: the device's lock, waited for with a limit in seconds."""

    __slots__ = ("_device", "_limit")

    def __init__(self, device: VhostUserDevice, limit: float) -> None:
        self._device = device
        self._limit = limit

    def __enter__(self) -> None:
        if not self._device._lock.acquire(True, max(0.0, self._limit)):
            raise BackendError(f"The {self._device._peer} keeps another request waiting",
                               "it hangs or is overloaded")

    def __exit__(self, *exc: object) -> None:
        self._device._lock.release()


class Guarded:
    """`with`: errors of the exchange inside come out as BackendError.

    They break the device, unless the connection is still good: a refusal, or a timeout with no
    message cut.
    """

    __slots__ = ("_device",)

    def __init__(self, device: VhostUserDevice) -> None:
        self._device = device

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        device = self._device
        if isinstance(error, BackendError):
            device._break(error)
        elif isinstance(error, (SharedError, OSError)):
            mild = isinstance(error, (PeerRefusedError, TimedOutError))
            if not mild or device._current().broken or device.state == NEW:
                device._break(error)
            raise BackendError(f"Device {device.id}: {error}") from error
