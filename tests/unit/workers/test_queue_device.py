"""What all vhost-user devices of workers have in common, with rings that are set up by hand."""

from __future__ import annotations

import os

from shared.vhost_user.backend_device import Ring
from workers.rng.device import RngDevice


def test_a_ring_that_is_not_enabled_keeps_no_copy_of_its_call_descriptor() -> None:
    """One process serves many null devices, which come and go."""
    source = os.open("/dev/urandom", os.O_RDONLY | os.O_NONBLOCK)
    call = os.eventfd(0)
    before = len(os.listdir("/proc/self/fd"))
    device = RngDevice(source, 0, 0, 64, None, print)
    ring = Ring(0)
    ring.started = True
    device.start_ring(ring)
    device.change_call(ring, call)
    assert device.stop_ring(ring) == 0
    device.close()
    assert len(os.listdir("/proc/self/fd")) == before
    os.close(source)
    os.close(call)
