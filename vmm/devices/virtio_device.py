"""The seam between a virtio transport (MMIO now, PCI later) and a virtio device.

The transport owns the guest-visible registers, feature negotiation, status and the
descriptors that notify: one kick eventfd (ioeventfd) and one call eventfd (irqfd) a queue.
The device owns features on offer, the config space and what serves the queues.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any


class QueueConfig:
    """What the driver set up for one virtqueue (virtio 1.2, 2.6): addresses are guest-physical.

    `kick_fd` is signalled by the guest's notify, `call_fd` raises the queue's interrupt.
    """

    __slots__ = ("avail", "call_fd", "desc", "index", "kick_fd", "ready", "size", "used")

    def __init__(self, index: int, size: int, kick_fd: int, call_fd: int) -> None:
        self.index = index
        self.size = size
        self.ready = False
        self.desc = 0
        self.avail = 0
        self.used = 0
        self.kick_fd = kick_fd
        self.call_fd = call_fd


def shown() -> Any:
    """A class attribute for what a driver sees of a device: who assigns it on an instance calls
    the instance's `on_stale` as well, which can't be forgotten so."""
    return _Shown()


class _Shown:
    __slots__ = ("_name",)

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = "_shown_" + name

    def __get__(self, holder: Any, owner: type) -> Any:
        return self if holder is None else getattr(holder, self._name)

    def __set__(self, holder: Any, value: object) -> None:
        setattr(holder, self._name, value)
        # Afterwards: who has read the old value before is told now that it is no more.
        holder.on_stale()


def nothing() -> None:
    """A callback that nobody has set."""


class VirtioDevice:
    """A virtio device behind any transport. All calls come under the transport's lock, from a
    vCPU thread or the main thread; none may block without a time limit."""

    device_id: int  # virtio 1.2, 5: 1 net, 2 block, 5 balloon, ...
    id: str  # the user's id, or one that we made up; names the device in errors
    queue_sizes: Sequence[int]  # QueueSizeMax a queue
    # What `features` and `read_config` say follows from `shown` attributes and from nothing else
    # that changes, so the transport may keep it (tests/unit/vmm/devices/test_shown.py).
    keeps_shown = False
    has_null = False  # the null back end can answer for it: a VhostUserDevice with `null_order`

    # Set by the transport: forget what was shown. Any thread, under any lock of the device's.
    on_stale: Callable[[], None] = staticmethod(nothing)
    on_config_change: Callable[[], None]  # set by the transport: raise a config interrupt
    on_failure: Callable[[str], None]  # set by the transport: set DEVICE_NEEDS_RESET
    on_event: Callable[[str, Mapping[str, object]], None]  # set by the VM: a QMP event; main loop

    def features(self) -> int:
        """The 64 feature bits on offer; the transport checks that the driver's are a subset."""
        raise NotImplementedError

    def read_config(self, offset: int, size: int) -> bytes:
        """`size` bytes of the device config space at `offset`; zeroes beyond its end."""
        raise NotImplementedError

    def write_config(self, offset: int, data: bytes) -> None:
        """The driver wrote to the config space; ignored where the field is read-only."""
        raise NotImplementedError

    def activate(self, features: int, queues: Sequence[QueueConfig]) -> None:
        """DRIVER_OK: start the ready queues with the negotiated `features`.

        :raises DeviceError: the transport then sets DEVICE_NEEDS_RESET and logs the text.
        """
        raise NotImplementedError

    def reset(self) -> None:
        """Device reset: returns when nothing can touch guest memory for this device any more."""
        raise NotImplementedError

    def pause(self, deadline: float) -> None:
        """`stop`: drain, flush and stop the rings, keep their state. Monotonic seconds.

        :raises BackendError: not drained by `deadline`.
        """
        raise NotImplementedError

    def resume(self) -> None:
        """`cont`: start the rings again where `pause` left them; kick and call each once."""
        raise NotImplementedError

    def is_in_use(self) -> bool:
        """A driver has started the device, and to stop it may take a while."""
        return False

    def null_order(self) -> tuple[dict[str, object], list[int]]:
        """What the null worker must know to answer for this device, and descriptors, which stay
        the device's. Only where `has_null`."""
        raise NotImplementedError

    def abort(self) -> None:
        """End every wait for a back end, now and in future. Any thread; never waits."""

    def close(self) -> None:
        """Let go of the back end for good (the transport has called `reset`)."""
        raise NotImplementedError
