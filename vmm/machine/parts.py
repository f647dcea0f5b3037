"""The first step of each `-device`: its worker is asked for."""

from __future__ import annotations

from vmm.machine.drivers import DRIVERS
from vmm.machine.part import device_name

TYPE_CHECKING = False  # importing typing would cost 10 ms of the start
if TYPE_CHECKING:
    from vmm.machine.part import Builder, Part


def start_parts(builder: Builder) -> list[Part]:
    """The devices of the command line; their workers are asked for, and come up while the rest is
    made: their first message is sent before they exist.

    :raises VmmError: one can't be had.
    """
    parts = []
    for number, device in enumerate(builder.config.devices):
        driver = DRIVERS.get(device.driver)
        if driver is not None:
            part = driver.part()(device, device_name(device, number))
            part.start(builder)
            parts.append(part)
    return parts
