"""NICs in slots: what `vmm/machine/hotplug.py` must know of them."""

from __future__ import annotations

from shared import log
from vmm.errors import ConfigError, DeviceError
from vmm.machine.family import Family
from vmm.net.mac import MacSource, format_mac, parse_mac

TYPE_CHECKING = False  # importing typing would cost 10 ms of the start
if TYPE_CHECKING:
    from collections.abc import Mapping

    from vmm.config.model import NetdevConfig, VmConfig
    from vmm.devices.virtio_net import VirtioNet
    from vmm.event_loop import EventLoop
    from vmm.machine.machine import Machine
    from vmm.memory import GuestMemory
    from vmm.net.node import NetNode
    from vmm.net.worker import NetWorkers
    from vmm.worker.nursery import Nursery

NET_SLOTS = 2  # eth0, eth1


class NetFamily(Family):
    """The two NIC slots.

    macs: where the addresses of NICs come from that were given none.
    """

    name = "net"
    backend = "netdev"
    count = NET_SLOTS
    add, remove = "netdev_add", "netdev_del"

    def __init__(self, config: VmConfig) -> None:
        self.macs = MacSource(config.uuid)
        self._nics: list[VirtioNet] = []
        for device in config.devices:
            given = parse_mac(device.options.get("mac", ""))
            if given is not None:
                self.macs.reserve(given)

    def nodes(self, machine: Machine) -> dict[str, NetNode]:
        """See `Family.nodes`."""
        return machine.nets

    def make_empty(self, id: str, memory: GuestMemory, loop: EventLoop,
                   config: VmConfig) -> VirtioNet:
        """See `Family.make_empty`."""
        from vmm.devices.virtio_net import VirtioNet  # the guest runs already

        device = VirtioNet(id, -1, memory, loop, foreign=False, mac=self.macs.take())
        self.know(device)
        return device

    def know(self, device: VirtioNet) -> None:
        """A slot's NIC, empty or not: no two may have one address."""
        self._nics.append(device)

    def open(self, config: NetdevConfig, others: Mapping[str, NetNode]) -> NetNode:
        """See `Family.open`."""
        from vmm.net.node import check_others, open_netdev  # not needed before the guest runs

        check_others(config, others.values())
        return open_netdev(config)

    def not_found(self, name: str) -> DeviceError:
        """See `Family.not_found`."""
        return DeviceError(f"Failed to find device configuration: there is no netdev '{name}'",
                           "add it first: netdev_add")

    def workers(self, nursery: Nursery, node: NetNode, id: str, device: VirtioNet,
                options: Mapping[str, str]) -> NetWorkers:
        """See `Family.workers`."""
        from vmm.net.worker import NetWorkers

        if node.config.kind != "tap":
            raise ConfigError(f"netdev '{node.config.id}' is a {node.config.kind} back end: it "
                              "can't come to a slot", "give it to a -device at the start")
        if len(node.taps) != device.pairs:
            raise ConfigError(f"netdev '{node.config.id}' has {len(node.taps)} queues, the NIC of "
                              f"this slot has {device.pairs}", f"use queues={device.pairs}")
        device.next_mac = self._choose(device, options.get("mac", ""))
        return NetWorkers(nursery, node, id, device.next_mac, max(device.queue_sizes),
                          device.nic_state)

    def _choose(self, device: VirtioNet, text: str) -> bytes:
        """The address of the NIC that comes to this slot: the user's, else the one that a driver
        which is up has had from this slot already, unless another NIC has got it meanwhile."""
        others = {nic.mac for nic in self._nics if nic is not device and nic.is_present}
        given = parse_mac(text)
        if given is None:
            return device.mac if device.mac not in others else self.macs.take()
        if given in others:
            raise ConfigError(f"Another NIC has the address {format_mac(given)}",
                              "give each NIC an address of its own")
        self.macs.reserve(given)
        return given

    def show(self, device: VirtioNet, node: NetNode, options: Mapping[str, str]) -> None:
        """See `Family.show`."""
        device.show_nic()

    def warn(self, id: str, device: VirtioNet, node: NetNode,
             options: Mapping[str, str]) -> None:
        """See `Family.warn`."""
        if device.next_mac != device.mac:
            log.warning(f"Device {id} has the address {format_mac(device.next_mac)}: a driver that "
                        f"is up learns it when it probes the next time, and keeps "
                        f"{format_mac(device.mac)} until then")
