"""virtio-net over vhost-user: features and queues. The data plane is native.

The front end owns the config space (MAC address, link status, MTU); what the driver sets over
the control queue is kept in memory that outlives this process.
"""

from __future__ import annotations

from fcntl import ioctl

from native import _net
from shared.errors import check
from shared.virtio import net
from workers.queue_device import DataPlane, QueueDevice

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

ffi, lib = _net.ffi, _net.lib

assert lib.sv_net_state_size() <= net.STATE_BYTES

# linux/if_tun.h: what a tap may hand over whole.
_TUNSETOFFLOAD = 0x400454D0
_TUN_F_CSUM, _TUN_F_UFO = 0x01, 0x10


class NetDevice(QueueDevice):
    """One virtio-net device.

    :param taps: a descriptor for each queue pair (shared/tap.py); they stay the caller's. -1: no
        tap, nothing is received, what is sent is dropped.
    :param control: there is a control queue, the last ring.
    :param limits: packets and bytes a second, for receiving, then for transmitting; 0: none.
    :param page: a statistics page (shared/statistics.py) in writable memory, or None.
    :param state: writable memory of net.STATE_BYTES that a successor goes on with, or None.
    """

    plane = DataPlane(_net, "sv_net", "sv_net", "sv_net_ring")

    def __init__(self, taps: Sequence[int], control: bool, queue_size: int, mac: bytes,
                 limits: Sequence[tuple[int, int]], page: object | None,
                 state: object | None, log: Callable[[str], None]) -> None:
        super().__init__("net", 2 * len(taps) + control, queue_size, page, log)
        # Front ends count queue pairs of a NIC (QEMU, net/vhost-user.c); ours asks for no number.
        self.announced_queues = len(taps)
        self._pairs = len(taps)
        self._control = control
        # Who offers a control queue offers no UFO; the question would change a tap that serves.
        self._ufo = not control and _takes_ufo(taps[0])
        # Held as long as the data plane writes to it.
        self._state_bytes = None if state is None else ffi.from_buffer("char[]", state)
        self._state = ffi.cast("struct sv_net_state *", self._state_bytes or ffi.NULL)
        error = ffi.new("int *")
        self.adopt(lib.sv_net_create(
            ffi.new("int[]", list(taps)), self._pairs, control, queue_size, mac,
            ffi.new("struct sv_rate[2]", [tuple(limit) for limit in limits]),
            self._counters, self._state, error), error[0], f"{self.queue_count} queues",
            "raise RLIMIT_NOFILE; is the tap still there?")

    # ---- what the guest reads --------------------------------------------------------------

    def features(self) -> int:
        """virtio 1.2, 5.1.3: everything that the data plane serves."""
        bits = net.BASE | (net.UFO if self._ufo else 0)
        if self._control:
            bits |= net.CONTROL
            if self._pairs > 1:
                bits |= net.F_MQ
        return bits

    def set_features(self, features: int) -> None:
        """The tap's offloads follow what the driver can take."""
        check(lib.sv_net_set_features(self.native, features), "The tap refuses these offloads")

    def reset(self) -> None:
        """Features, filters, MAC address and active queue pairs as at the start."""
        check(lib.sv_net_reset(self.native), "Can't reset the tap")

    # ---- own -------------------------------------------------------------------------------

    @property
    def mac(self) -> bytes:
        """The MAC address in force."""
        mac = ffi.new("uint8_t[6]")
        lib.sv_net_mac(self.native, mac)
        return bytes(mac)

    def set_link(self, up: bool) -> None:
        """While the link is down frames are dropped, both ways."""
        lib.sv_net_set_link(self.native, up)


def _takes_ufo(tap: int) -> bool:
    if tap < 0:
        return True  # whatever a driver may have acknowledged to who was here before
    try:
        ioctl(tap, _TUNSETOFFLOAD, _TUN_F_CSUM | _TUN_F_UFO)
        ioctl(tap, _TUNSETOFFLOAD, 0)
    except OSError:
        return False
    return True
