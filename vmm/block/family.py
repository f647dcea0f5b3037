"""Disks in slots: what `vmm/machine/hotplug.py` must know of them."""

from __future__ import annotations

from shared import log
from vmm.block.image import open_image
from vmm.errors import ConfigError, DeviceError
from vmm.machine.family import Family, Node

TYPE_CHECKING = False  # importing typing would cost 10 ms of the start
if TYPE_CHECKING:
    from collections.abc import Mapping

    from vmm.block.image import Image
    from vmm.block.worker import BlockWorkers
    from vmm.config.model import DriveConfig, VmConfig
    from vmm.devices.virtio_blk import VirtioBlk
    from vmm.event_loop import EventLoop
    from vmm.machine.machine import Machine
    from vmm.memory import GuestMemory
    from vmm.worker.nursery import Nursery

BLOCK_SLOTS = 6  # vda..vdf
_MAX_DRAINED = 64


class BlockNode(Node):
    """A drive, with its opened image."""

    __slots__ = ("image",)

    def __init__(self, config: DriveConfig, image: Image) -> None:
        super().__init__(config)
        self.image = image

    def close(self) -> None:
        """Close the image, and with it its locks."""
        self.image.close()


class BlockFamily(Family):
    """The six disk slots."""

    name = "block"
    backend = "drive"
    count = BLOCK_SLOTS
    first = 0
    add, remove = "blockdev-add", "blockdev-del"

    def __init__(self) -> None:
        # Images whose last worker had finished all when it was ended: their next one need not
        # wait until the kernel has taken the last one's ring apart (tens of milliseconds).
        self._drained: list[Image] = []

    def nodes(self, machine: Machine) -> dict[str, BlockNode]:
        """See `Family.nodes`."""
        return machine.blocks

    def make_empty(self, id: str, memory: GuestMemory, loop: EventLoop,
                   config: VmConfig) -> VirtioBlk:
        """See `Family.make_empty`."""
        from vmm.devices.virtio_blk import VirtioBlk  # the guest runs already

        return VirtioBlk(id, -1, memory, loop, foreign=False)

    def open(self, config: DriveConfig, others: Mapping[str, BlockNode]) -> BlockNode:
        """See `Family.open`."""
        return BlockNode(config, open_image(config, others=[n.image for n in others.values()]))

    def not_found(self, name: str) -> DeviceError:
        """See `Family.not_found`."""
        return DeviceError(f"Failed to find device configuration: there is no drive '{name}'",
                           "add it first: blockdev-add")

    def workers(self, nursery: Nursery, node: BlockNode, id: str, device: VirtioBlk,
                options: Mapping[str, str]) -> BlockWorkers:
        """See `Family.workers`."""
        from vmm.block.worker import BlockWorkers

        shape = {**options, "num-queues": str(len(device.queue_sizes)),
                 "queue-size": str(max(device.queue_sizes))}
        return BlockWorkers(nursery, node, id, shape, slot=True)

    def show(self, device: VirtioBlk, node: BlockNode, options: Mapping[str, str]) -> None:
        """See `Family.show`."""
        device.show_disk(node.config.readonly)

    def warn(self, id: str, device: VirtioBlk, node: BlockNode,
             options: Mapping[str, str]) -> None:
        """See `Family.warn`."""
        if node.config.readonly:
            log.warning(f"Device {id} is read-only: a driver that is up learns it when it probes "
                        "the next time, and gets errors for writes until then")

    def is_drained(self, node: BlockNode) -> bool:
        """See `Family.is_drained`; asked once, before the next worker opens the image."""
        others = [image for image in self._drained if not image.is_same_file(node.image)]
        drained = len(others) < len(self._drained)
        self._drained = others
        return drained

    def left(self, node: BlockNode, drained: bool) -> None:
        """See `Family.left`."""
        if drained:
            self._drained = [*self._drained[-_MAX_DRAINED:], node.image]


def open_drive(config: DriveConfig, others: Mapping[str, BlockNode]) -> BlockNode:
    """The node of a `-drive`.

    :raises ConfigError: names the option.
    """
    try:
        return BlockNode(config, open_image(config, others=[n.image for n in others.values()]))
    except ConfigError as error:
        option = f"-drive id={config.id},file={config.file}"
        raise ConfigError(f"{option}: {error.what}", error.hint) from error
