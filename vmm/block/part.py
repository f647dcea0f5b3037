"""`-device virtio-blk-device` and `vhost-user-blk-device`."""

from __future__ import annotations

from vmm.block.worker import BlockWorkers
from vmm.errors import ConfigError
from vmm.machine.part import Part

TYPE_CHECKING = False  # importing typing would cost 10 ms of the start
if TYPE_CHECKING:
    from vmm.block.family import BlockNode
    from vmm.devices.virtio_blk import VirtioBlk
    from vmm.machine.machine import Machine
    from vmm.machine.part import Builder


class DiskPart(Part):
    """A disk that a worker of ours serves."""

    def start(self, builder: Builder) -> None:
        """See `Part.start`."""
        node = self._take_node(builder.machine)
        assert builder.nursery is not None  # every microvm has one
        self.start_worker(builder, BlockWorkers(builder.nursery, node, self.name,
                                                self.config.options))

    def _take_node(self, machine: Machine) -> BlockNode:
        drive_id = self.config.options.get("drive", "")
        node = machine.blocks.get(drive_id)
        if node is None:
            raise ConfigError(f"-device {self.config.driver}: there is no drive '{drive_id}'",
                              f"add -drive id={drive_id},file=…")
        if node.device_id is not None:
            raise ConfigError(f"-device {self.config.driver}: the drive '{drive_id}' already "
                              f"serves the device '{node.device_id}'",
                              "give each device its own drive")
        node.device_id = self.name
        return node

    def make(self, builder: Builder) -> VirtioBlk:
        """See `Part.make`."""
        assert self.worker is not None
        return self._make(builder, self.worker.take_socket())

    def _make(self, builder: Builder, socket_fd: int) -> VirtioBlk:
        from vmm.devices.virtio_blk import VirtioBlk  # the guest runs already

        options = self.config.options
        return VirtioBlk(self.name, socket_fd, builder.machine.memory, builder.loop,
                         num_queues=int(options.get("num-queues", "1"), 0),
                         queue_size=int(options.get("queue-size", "256"), 0),
                         foreign=self.worker is None)


class ForeignDiskPart(DiskPart):
    """A disk that somebody else's vhost-user back end serves."""

    def start(self, builder: Builder) -> None:
        """It runs already."""

    def make(self, builder: Builder) -> VirtioBlk:
        """See `Part.make`."""
        from vmm.devices.vhost_user import connect_backend

        chardev = builder.config.chardevs[self.config.options["chardev"]]
        return self._make(builder, connect_backend(chardev))
