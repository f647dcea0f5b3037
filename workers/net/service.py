"""A net worker's work: taps and options in, a served front end out.

The nursery (for the core) and `program.py` (alone) both end up here.
"""

from __future__ import annotations

import mmap

from shared.vhost_user.backend import Backend
from shared.vhost_user.errors import ConnectionLostError
from shared.virtio.net import MAX_PAIRS
from workers.errors import UsageError
from workers.net.device import COUNTER_BYTES, STATE_BYTES, NetDevice

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

MAX_RATE = 1 << 50
DEFAULT_MAC = b"\x52\x54\x00\x12\x34\x56"  # of a device whose front end keeps the address


def _integer(options: Mapping[str, object], name: str, default: int, low: int, high: int) -> int:
    value = options.get(name, default)
    if not isinstance(value, int) or not low <= value <= high:
        raise UsageError(f"Option {name} of a net worker is {value!r}", f"{low} to {high}")
    return value


class Service:
    """Everything that exists before the first byte of the front end is read.

    :param taps: a descriptor for each queue pair; they stay the caller's.
    :param options: queue-size, control (bool), mac (6 bytes), rx-packets, rx-bytes, tx-packets,
        tx-bytes (limits a second).
    :param counters: descriptor of a file for the counters (COUNTER_BYTES a queue), or None.
    :param state: descriptor of a file of STATE_BYTES for what a successor must know, or None.
    :raises WorkerError, SharedError: an option or a tap does not hold.
    """

    engine = "tap"

    def __init__(self, taps: Sequence[int], options: Mapping[str, object], counters: int | None,
                 state: int | None, log: Callable[[str], None]) -> None:
        self._log = log
        if not 1 <= len(taps) <= MAX_PAIRS:
            raise UsageError(f"A net worker with {len(taps)} taps", f"1 to {MAX_PAIRS}")
        control = options.get("control", False) is True
        mac = options.get("mac", DEFAULT_MAC)
        if not isinstance(mac, bytes) or len(mac) != 6:
            raise UsageError(f"Option mac of a net worker is {mac!r}", "6 bytes")
        limits = [(_integer(options, f"{way}-packets", 0, 0, MAX_RATE),
                   _integer(options, f"{way}-bytes", 0, 0, MAX_RATE)) for way in ("rx", "tx")]
        queues = 2 * len(taps) + control
        self.device = NetDevice(
            taps, control, _integer(options, "queue-size", 256, 2, 1024), mac, limits,
            None if counters is None else mmap.mmap(counters, queues * COUNTER_BYTES),
            None if state is None else mmap.mmap(state, STATE_BYTES), log)

    def serve(self, fd: int) -> None:
        """Serve the front end on `fd` until it closes the connection.

        :raises VhostUserError: it broke the protocol.
        """
        backend = Backend(self.device, fd, self._log)
        try:
            backend.serve()
        except ConnectionLostError:
            pass
        finally:
            backend.close()

    def close(self) -> None:
        """Stop every queue."""
        self.device.close()
