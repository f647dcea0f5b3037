"""Network back ends and links: `netdev_add`, `netdev_del`, `netdev_replace`, `set_link`,
`query-nics`."""

from __future__ import annotations

from shared import log
from shared.tap import TapError, tap_name
from vmm.config.model import NET_LIMITS, VmConfig
from vmm.config.net import MAX_RATE, read_netdev
from vmm.config.options import SubOptions
from vmm.net import change
from vmm.net.mac import format_mac
from vmm.qmp.errors import DeviceNotFound, QmpError
from vmm.qmp.registry import DEFERRED, Argument, Command

TYPE_CHECKING = False  # importing typing would cost 10 ms of the start
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from vmm.config.model import NetdevConfig
    from vmm.devices.virtio_net import VirtioNet
    from vmm.machine.machine import Device
    from vmm.machine.slots import Slot
    from vmm.net.node import NetNode
    from vmm.qmp.connection import Request

    Done = Callable[[Exception | None], None]


class _Descriptors:
    """The descriptors that a command takes out of `getfd`'s store, and how they get back."""

    def __init__(self, request: Request, names: list[str]) -> None:
        self._store = request.server.fds
        self._taken: dict[str, int] = {}
        try:
            for name in names:
                if name[:1].isdigit():
                    raise QmpError(f"'{name[:40]}' is no name of a descriptor",
                                   "hand it in with getfd, and give its name")
                self._taken[name] = self._store.take(name)
        except QmpError:
            self.give_back()
            raise

    def numbers(self) -> str:
        """As `fds=` has them."""
        return ":".join(map(str, self._taken.values()))

    def give_back(self) -> None:
        """The command failed: they wait for the next one."""
        for name, fd in self._taken.items():
            self._store.put(name, fd)
        self._taken = {}

    def finish(self, done: Done) -> Done:
        """`done`, which gives them back after an error."""
        def finished(error: Exception | None) -> None:
            if error is not None:
                self.give_back()
            done(error)
        return finished


def _read(request: Request, arguments: dict[str, Any],
          command: str) -> tuple[NetdevConfig, _Descriptors]:
    """What the command line's `-netdev` would say."""
    values = {name: value if isinstance(value, str) else
              {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)
              for name, value in arguments.items()}
    if values.get("type", "tap") != "tap":
        raise QmpError(f"The argument 'type' can't be '{values['type'][:100]}'",
                       "tap alone can be added; foreign back ends are there from the start")
    single, several = values.pop("fd", ""), values.pop("fds", "")
    if single and several:
        raise QmpError("fd is conflict with fds", "give one of them")
    names = [single] if single else several.split(":") if several else []
    if len(set(names)) != len(names):
        raise QmpError(f"A descriptor is given twice: {several[:100]}", "give each once")
    descriptors = _Descriptors(request, names)
    options = SubOptions(command, f"id={arguments['id']}")
    options.values = {"type": "tap", **values}
    if names:
        options.values["fds"] = descriptors.numbers()
    config = VmConfig()
    try:
        netdev = read_netdev(config, options)
    except Exception:
        descriptors.give_back()
        raise
    for warning in config.warnings:
        log.warning(warning)
    return netdev, descriptors


def _netdev_add(request: Request) -> object:
    vm = request.vm
    hotplug, family = vm.hotplug, vm.family("net")  # what fails does so before anything is taken
    netdev, descriptors = _read(request, request.arguments, "netdev_add")
    hotplug.add_node(family, netdev, descriptors.finish(request.done))
    return DEFERRED


def _netdev_del(request: Request) -> object:
    vm = request.vm
    vm.hotplug.delete_node(vm.family("net"), request.arguments["id"], request.done)
    return DEFERRED


def _netdev_replace(request: Request) -> object:
    """`id` is the device's; its link never goes down, and no frame that was taken is lost."""
    device = _nic(request, request.arguments["id"])
    netdev, descriptors = _read(request, request.arguments, "netdev_replace")
    change.replace_tap(request.vm, device, netdev, descriptors.finish(request.done))
    return DEFERRED


def _nic(request: Request, name: str) -> Device:
    device = change.find_nic(request.vm, name)
    if device is None:
        raise DeviceNotFound(f"no net dev {name[:100]}", "query-workers lists the devices")
    return device


def _set_link(request: Request) -> object:
    """QEMU's `set_link` calls it `name`, StratoVirt's `netlink_set` `id`."""
    arguments = request.arguments
    name = arguments["name"] if "name" in arguments else arguments["id"]
    change.set_link(request.vm, _nic(request, name), arguments["up"], request.done)
    return DEFERRED


def _query_nics(request: Request) -> object:
    """A command of our own: every NIC slot, the empty ones too."""
    vm = request.vm
    nodes = {node.device_id: node for node in vm.nets.values() if node.device_id is not None}
    return [_describe(slot, nodes) for slot in vm.slots()
            if slot.family is not None and slot.family.name == "net"]


def _describe(slot: Slot, nodes: dict[str, NetNode]) -> dict[str, object]:
    nic: VirtioNet = slot.device  # type: ignore[assignment]
    told: dict[str, object] = {"slot": slot.index, "mac": format_mac(nic.mac),
                               "queues": nic.pairs, "link-up": nic.link_is_up}
    if slot.occupant is None:
        return told
    told["device"] = slot.occupant.id
    node = nodes.get(slot.occupant.id)
    if node is not None:
        told.update({"netdev": node.config.id, "type": node.config.kind,
                     "limits": dict(node.config.limits)})
        if node.taps:
            try:
                # By the descriptor: it may have been handed in, or renamed since.
                told["ifname"] = tap_name(node.taps[0])
            except TapError:
                pass  # somebody has deleted the interface
    return told


def _optional(*names: str, type: str = "str") -> tuple[Argument, ...]:
    return tuple(Argument(name, type, optional=True, low=0 if type == "str" else None)
                 for name in names)


TYPES: dict[str, dict[str, str] | tuple[str, ...]] = {
    "NicInfo": {"slot": "int", "mac": "str", "queues": "int", "link-up": "bool",
                "device?": "str", "netdev?": "str", "type?": "NetBackendType", "ifname?": "str",
                "limits?": "NetLimits"},
    "NetBackendType": ("tap", "vhost-user"),
    "NetLimits": {f"{name}?": "int" for name in NET_LIMITS},
}

_LIMITS = tuple(Argument(name, "int", optional=True, low=0, high=MAX_RATE) for name in NET_LIMITS)

COMMANDS = (
    Command("netdev_add", _netdev_add, Argument("id", "str", high=255),
            *_optional("type", "ifname", "fd", "fds", "script", "downscript", "dnssearch",
                       "vhostfd", "vhostfds", "chardev"),
            *_optional("vhost", type="bool"),
            Argument("queues", "int", optional=True, low=1, high=16), *_LIMITS),
    Command("netdev_del", _netdev_del, Argument("id", "str", high=255)),
    Command("netdev_replace", _netdev_replace, Argument("id", "str", high=255),
            *_optional("ifname", "fd", "fds"),
            Argument("queues", "int", optional=True, low=1, high=16), *_LIMITS),
    Command("set_link", _set_link, Argument("name", "str", high=255), Argument("up", "bool")),
    Command("netlink_set", _set_link, Argument("id", "str", high=255), Argument("up", "bool")),
    Command("query-nics", _query_nics, returns="[NicInfo]"),
)
