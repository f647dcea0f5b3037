"""The Python half of the net worker's device."""

from __future__ import annotations

import gc
import mmap

from shared.statistics import page_bytes
from shared.virtio import net
from workers.net.device import NetDevice


def test_what_was_lent_is_held() -> None:
    """The device writes to page and state as long as it lives, whoever else lets go of them."""
    device = NetDevice([-1], True, 256, b"\x52\x54\0\x12\x34\x56", ((0, 0), (0, 0)),
                       mmap.mmap(-1, page_bytes("net", 3)), mmap.mmap(-1, net.STATE_BYTES),
                       lambda text: None)
    gc.collect()
    device.reset()  # writes the state
    assert device.counters()[2]["commands"] == 0
    device.close()
