"""Which `-device` is made by what; the first step of each: its worker is asked for."""

from __future__ import annotations

from vmm.machine.part import Part, device_name

TYPE_CHECKING = False  # importing typing would cost 10 ms of the start
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.machine.part import Builder


def start_parts(builder: Builder) -> list[Part]:
    """The devices of the command line; their workers are asked for, and come up while the rest is
    made: their first message is sent before they exist.

    :raises VmmError: one can't be had.
    """
    parts = []
    for number, device in enumerate(builder.config.devices):
        find = PARTS.get(device.driver)
        if find is not None:  # else it belongs to another device
            part = find()(device, device_name(device, number))
            part.start(builder)
            parts.append(part)
    return parts


def _disk() -> type[Part]:
    from vmm.block.part import DiskPart

    return DiskPart


def _foreign_disk() -> type[Part]:
    from vmm.block.part import ForeignDiskPart

    return ForeignDiskPart


def _nic() -> type[Part]:
    from vmm.net.part import NicPart

    return NicPart


def _vsock() -> type[Part]:
    from vmm.machine.vhost_parts import VsockPart

    return VsockPart


def _folder() -> type[Part]:
    from vmm.machine.vhost_parts import FolderPart

    return FolderPart


def _rng() -> type[Part]:
    from vmm.rng.part import RngPart

    return RngPart


def _serial() -> type[Part]:
    from vmm.console.part import SerialPart

    return SerialPart


def _balloon() -> type[Part]:
    from vmm.balloon.part import BalloonPart

    return BalloonPart


# How each -device is made; imported when the command line names it. Where they go:
# vmm/machine/microvm.py, FAMILIES.
PARTS: dict[str, Callable[[], type[Part]]] = {
    "virtio-blk-device": _disk,
    "vhost-user-blk-device": _foreign_disk,
    "virtio-net-device": _nic,
    "vhost-vsock-device": _vsock,
    "vhost-user-fs-device": _folder,
    "virtio-rng-device": _rng,
    "virtio-serial-device": _serial,
    "virtio-balloon-device": _balloon,
}
