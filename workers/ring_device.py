"""The vhost-user devices on the engine for small devices (native/ring)."""

from __future__ import annotations

from native import _devices
from shared.errors import check
from workers.queue_device import DataPlane, QueueDevice

ffi, lib = _devices.ffi, _devices.lib


class RingDevice(QueueDevice):
    """One device; a kind adds its features and calls `serve_with` with its native device."""

    plane = DataPlane(_devices, "sv_ring", "sv_ring", "sv_ring_place")

    def serve_with(self, native: object, error: int) -> None:
        """Adopt this `struct sv_ring_device *`.

        :raises SystemCallError: it is NULL, because of `error` (a negative errno).
        """
        self.adopt(native, error, f"the queues of a {self._kind} worker", "raise RLIMIT_NOFILE")

    def set_features(self, features: int) -> None:
        """What the driver acknowledged."""
        check(lib.sv_ring_set_features(self.native, features), "Can't set features")

    def reset(self) -> None:
        """As after power-on."""
        check(lib.sv_ring_reset(self.native), f"Can't reset a {self._kind} device")

    @property
    def notify_fd(self) -> int:
        """Readable when the native device has something to tell; the reader empties it."""
        return int(lib.sv_ring_notify_fd(self.native))
