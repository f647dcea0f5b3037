"""What changes on a NIC that is there: its link, its tap."""

from __future__ import annotations

from shared import log
from shared.errors import SharedError
from vmm.devices.virtio_net import VirtioNet
from vmm.errors import ConfigError, DeviceError
from vmm.net.node import open_netdev

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.config.model import NetdevConfig
    from vmm.machine.machine import Device
    from vmm.net.node import NetNode
    from vmm.vm import Vm

    Done = Callable[[Exception | None], None]


def set_link(device: Device, up: bool) -> None:
    """Tell the driver of a NIC that the link is up or down; while it is down frames are dropped,
    both ways. Main loop."""
    nic = device.device
    assert isinstance(nic, VirtioNet)
    nic.set_link(up)
    if device.worker is None or device.worker.state == "dead":
        return  # the next one learns it when it starts; a foreign one can't be told

    def told(problem: str) -> None:
        if problem:
            log.warning(f"The worker of {device.id} was not told of its link: {problem}")

    try:
        device.worker.orders.send("link", told, up=up)
    except SharedError as error:
        told(str(error))


def replace_tap(vm: Vm, device: Device, config: NetdevConfig, done: Done) -> None:
    """Have a NIC go on with another tap. `done(error)` comes on the main loop; after an error it
    has the tap that it had, and descriptors handed over are the caller's again.

    :raises DeviceError: it has no tap.
    """
    node = next((n for n in vm.nets.values() if n.device_id == device.id), None)
    if node is None or device.worker is None:
        raise DeviceError(f"net device {device.id} not support tap replacement",
                          "only a NIC on a tap can have another one")
    vm.hotplug.take_turn(lambda finish: _replace(vm, device, node, config, finish), done)


def _replace(vm: Vm, device: Device, node: NetNode, config: NetdevConfig, done: Done) -> None:
    opened: list[NetNode] = []
    before = node.taps

    def finish(error: Exception | None) -> None:
        if error is None:
            config.id = node.config.id
            node.config = config
            before_node = opened[0]
            before_node.taps = before
            before_node.close()
        else:
            node.taps = before
            if opened and not config.fds:
                opened[0].close()
        done(error)

    def restart(error: Exception | None) -> None:
        if error is not None:
            done(error)
            return
        if len(opened[0].taps) != len(before):
            finish(ConfigError(f"The NIC {device.id} has {len(before)} queue pairs, the new tap "
                               f"{len(opened[0].taps)}", "give it as many queues"))
            return
        node.taps = opened[0].taps
        try:
            vm.supervisor.restart(device.id, finish)
        except DeviceError as caught:
            finish(caught)

    vm.off_loop(lambda: opened.append(open_netdev(config)), restart)


def find_nic(vm: Vm, name: str) -> Device | None:
    """The NIC `name`: its id, or that of its netdev."""
    device = vm.devices.get(name)
    if device is None:
        node = vm.nets.get(name)
        device = vm.devices.get(node.device_id or "") if node is not None else None
    return device if device is not None and isinstance(device.device, VirtioNet) else None
