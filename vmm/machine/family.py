"""What disks and NICs have in common when they come to a slot and leave it.

A family has a fixed number of slots in every microVM.  Its back ends (nodes: an image, a tap)
are added first, by `-drive`, `-netdev`, `blockdev-add` or `netdev_add`; a device then takes one
into a slot, served by a worker.
"""

from __future__ import annotations

TYPE_CHECKING = False  # importing typing would cost 10 ms of the start
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from vmm.devices.slot_device import SlotDevice
    from vmm.errors import VmmError
    from vmm.event_loop import EventLoop
    from vmm.machine.machine import Machine
    from vmm.memory import GuestMemory
    from vmm.worker.nursery import Nursery
    from vmm.worker.supervisor import Kind


class Node:
    """A back end: its configuration, and the device that uses it."""

    __slots__ = ("config", "device_id")

    def __init__(self, config: Any) -> None:
        self.config = config
        self.device_id: str | None = None

    def is_busy(self) -> bool:
        """A process that is ending still has what is open: nobody else can open it yet."""
        return False

    def close(self) -> None:
        """Let go of what is open. Harmless when closed."""
        raise NotImplementedError


class Family:
    """One family. `name` is StratoVirt's word for it, `backend` what its nodes are called,
    `count` the number of its slots, `first` the number of its first slot; `add` and `remove` are
    the commands that make and remove a node."""

    name = ""
    backend = ""
    count = 0
    first = 0
    add = remove = ""

    def nodes(self, machine: Machine) -> dict[str, Any]:
        """The back ends of this family, by id."""
        raise NotImplementedError

    def make_empty(self, id: str, memory: GuestMemory, loop: EventLoop, config: Any) -> SlotDevice:
        """The device of a slot that is empty at boot; `config`: that of the VM."""
        raise NotImplementedError

    def open(self, config: Any, others: Mapping[str, Any]) -> Node:
        """Open what a back end stands for. May wait; any thread.

        :param others: the nodes that there are.
        :raises StratovirtError: it can't be had.
        """
        raise NotImplementedError

    def not_found(self, name: str) -> VmmError:
        """There is no such back end."""
        raise NotImplementedError

    def workers(self, nursery: Nursery, node: Any, id: str, device: Any,
                options: Mapping[str, str]) -> Kind:
        """The workers that serve `node` to a slot's `device`.

        :raises ConfigError: the slot can't take this back end.
        """
        raise NotImplementedError

    def show(self, device: Any, node: Any, options: Mapping[str, str]) -> None:
        """The config space shows what is there from now on. Off the main loop."""
        raise NotImplementedError

    def warn(self, id: str, device: Any, node: Any, options: Mapping[str, str]) -> None:
        """Tell of what a driver that is up doesn't learn. Before `show`; main loop."""

    def is_drained(self, node: Any) -> bool:
        """The last worker of this back end had finished all: nobody need wait for its I/O."""
        return True

    def left(self, node: Any, drained: bool) -> None:
        """A device has left its back end, which is closed; for `is_drained`."""
