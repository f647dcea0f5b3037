"""The devices that a microvm can have: where each goes, and what makes it."""

from __future__ import annotations

TYPE_CHECKING = False  # importing typing would cost 10 ms of the start
if TYPE_CHECKING:
    from vmm.machine.part import Part


class Driver:
    """One kind of `-device`.

    :param family: name of the family in whose slots it goes; "": it gets a place of its own, for
        good.
    :param module: where its part is, imported when the command line names it.
    """

    __slots__ = ("_module", "_name", "family")

    def __init__(self, family: str, module: str, name: str) -> None:
        self.family = family
        self._module = module
        self._name = name

    def part(self) -> type[Part]:
        """The class that makes it."""
        found: type[Part] = getattr(__import__(self._module, fromlist=(self._name,)), self._name)
        return found


# By the name that -device has for it; one that is missing belongs to another device.
DRIVERS = {
    "virtio-blk-device": Driver("block", "vmm.block.part", "DiskPart"),
    "vhost-user-blk-device": Driver("block", "vmm.block.part", "ForeignDiskPart"),
    "virtio-net-device": Driver("net", "vmm.net.part", "NicPart"),
    "vhost-vsock-device": Driver("", "vmm.machine.vhost_parts", "VsockPart"),
    "vhost-user-fs-device": Driver("", "vmm.machine.vhost_parts", "FolderPart"),
    "virtio-rng-device": Driver("", "vmm.rng.part", "RngPart"),
    "virtio-serial-device": Driver("", "vmm.console.part", "SerialPart"),
    "virtio-balloon-device": Driver("", "vmm.balloon.part", "BalloonPart"),
}
