"""A net worker's work: taps and options in, a served front end out.

The nursery (for the core) and `program.py` (alone) both end up here.
"""

from __future__ import annotations

from shared.virtio.net import MAX_PAIRS, STATE_BYTES
from workers.errors import UsageError
from workers.net.device import NetDevice
from workers.service import DeviceService, flag, integer, map_page, map_state

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

MAX_RATE = 1 << 50
DEFAULT_MAC = b"\x52\x54\x00\x12\x34\x56"  # of a device whose front end keeps the address


class Service(DeviceService):
    """Everything that exists before the first byte of the front end is read.

    :param taps: a descriptor for each queue pair; they stay the caller's.
    :param options: see README.md.
    :param page: descriptor of the device's statistics page (shared/statistics.py), or None.
    :param state: descriptor of a file of STATE_BYTES for what a successor must know, or None.
    :raises WorkerError, SharedError: an option or a tap does not hold.
    """

    engine = "tap"
    device: NetDevice

    def __init__(self, taps: Sequence[int], options: Mapping[str, object], page: int | None,
                 state: int | None, log: Callable[[str], None]) -> None:
        if not 1 <= len(taps) <= MAX_PAIRS:
            raise UsageError(f"A net worker with {len(taps)} taps", f"1 to {MAX_PAIRS}")
        control = options.get("control", False) is True
        mac = options.get("mac", DEFAULT_MAC)
        if not isinstance(mac, bytes) or len(mac) != 6:
            raise UsageError(f"Option mac of a net worker is {mac!r}", "6 bytes")
        limits = [(integer("net", options, f"{way}-packets", 0, 0, MAX_RATE),
                   integer("net", options, f"{way}-bytes", 0, 0, MAX_RATE))
                  for way in ("rx", "tx")]
        link = flag("net", options, "link", True)
        super().__init__("net", NetDevice(
            taps, control, integer("net", options, "queue-size", 256, 2, 1024), mac, limits,
            map_page("net", 2 * len(taps) + control, page),
            None if state is None else map_state("net", STATE_BYTES, state), log), log)
        self.device.set_link(link)

    def obey(self, order: Mapping[str, object]) -> object:
        """`link` {up}: its cable is in, or not."""
        up = order.get("up")
        if order.get("type") != "link" or not isinstance(up, bool):
            return super().obey(order)
        self.device.set_link(up)
        return None
