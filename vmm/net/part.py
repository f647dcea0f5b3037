"""`-device virtio-net-device`."""

from __future__ import annotations

from vmm.devices.vhost_user import connect_backend
from vmm.devices.virtio_net import NicState, VirtioNet
from vmm.errors import ConfigError
from vmm.machine.part import Part
from vmm.net.mac import parse_mac
from vmm.net.worker import NetWorkers

TYPE_CHECKING = False  # importing typing would cost 10 ms of the start
if TYPE_CHECKING:
    from vmm.config.model import DeviceConfig
    from vmm.machine.part import Builder
    from vmm.net.family import NetFamily
    from vmm.net.node import NetNode


class NicPart(Part):
    """A NIC: on taps, served by a worker of ours, or on somebody's vhost-user back end."""

    def __init__(self, config: DeviceConfig, name: str) -> None:
        super().__init__(config, name)
        self._queue_size = int(config.options["queue-size"])
        self._mac = b""
        self._state = NicState()
        self._pairs = 1

    def start(self, builder: Builder) -> None:
        """See `Part.start`."""
        node = self._take_node(builder)
        family: NetFamily = builder.machine.family("net")  # type: ignore[assignment]
        self._mac = parse_mac(self.config.options.get("mac", "")) or family.macs.take()
        if node.config.kind == "tap":
            assert builder.nursery is not None  # every microvm has one
            self._pairs = len(node.taps)
            builder.cleanup.push(self._state.close)
            self.start_worker(builder, NetWorkers(builder.nursery, node, self.name, self._mac,
                                                  self._queue_size, self._state))

    def _take_node(self, builder: Builder) -> NetNode:
        name = self.config.options["netdev"]
        node = builder.machine.nets[name]  # vmm/config/checks.py
        if node.device_id is not None:
            raise ConfigError(f"-device {self.config.driver}: the netdev '{name}' already serves "
                              f"the device '{node.device_id}'", "give each device its own netdev")
        node.device_id = self.name
        return node

    def make(self, builder: Builder) -> VirtioNet:
        """See `Part.make`."""
        if self.worker is not None:
            socket_fd = self.worker.take_socket()
        else:
            netdev = builder.config.netdevs[self.config.options["netdev"]]
            socket_fd = connect_backend(builder.config.chardevs[netdev.chardev])
        device = VirtioNet(self.name, socket_fd, builder.machine.memory, builder.loop,
                           foreign=self.worker is None, pairs=self._pairs,
                           queue_size=self._queue_size, mac=self._mac,
                           mtu=int(self.config.options["host_mtu"]), state=self._state)
        family: NetFamily = builder.machine.family("net")  # type: ignore[assignment]
        family.know(device)
        return device
