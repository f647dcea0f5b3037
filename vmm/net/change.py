"""What changes on a NIC that is there: its link, its tap."""

from __future__ import annotations

from shared import log
from vmm.devices.virtio_net import VirtioNet
from vmm.errors import ConfigError, DeviceError, StateError
from vmm.net.worker import NetWorkers

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.config.model import NetdevConfig
    from vmm.machine.machine import Device
    from vmm.net.node import NetNode
    from vmm.vm import Vm

    Done = Callable[[Exception | None], None]

LINK_LIMIT = 2.0  # seconds for a worker to obey


# ---- the link ----------------------------------------------------------------------------------


class _Answers:
    """`done` once all have answered, or when the time is up."""

    def __init__(self, vm: Vm, device: Device, done: Done) -> None:
        self._device = device
        self._done: Done | None = done
        self._missing = 0
        self._timer = vm.loop.call_later(LINK_LIMIT, self._too_late)

    def expect(self, count: int) -> None:
        """So many answers in all, also of those that have come."""
        self._missing += count
        if not self._missing:
            self._finish(None)

    def told(self, problem: str) -> None:
        """One answer. Who died hands the task on to its successor, who is told at its start."""
        if problem:
            log.warning(f"A worker of {self._device.id} was not told of its link: {problem}")
        self._missing -= 1
        if not self._missing:
            self._finish(None)

    def _too_late(self) -> None:
        self._finish(StateError(f"The driver of {self._device.id} was told, but its worker does "
                                "not answer", "worker-restart brings another one"))

    def _finish(self, error: Exception | None) -> None:
        self._timer.cancel()
        done, self._done = self._done, None
        if done is not None:
            done(error)


def set_link(vm: Vm, device: Device, up: bool, done: Done) -> None:
    """Tell the driver of a NIC that the link is up or down; while it is down frames are dropped,
    both ways. `done(error)` when no frame passes any more, or some do again. Main loop."""
    nic = device.device
    assert isinstance(nic, VirtioNet)
    nic.set_link(up)
    if not isinstance(device.kind, NetWorkers):
        done(None)  # a foreign back end can't be told
        return
    answers = _Answers(vm, device, done)
    answers.expect(device.kind.tell_link(answers.told))


# ---- the tap -----------------------------------------------------------------------------------


def replace_tap(vm: Vm, device: Device, config: NetdevConfig, done: Done) -> None:
    """Have a NIC go on with another tap. `done(error)` comes on the main loop; after an error it
    has the tap that it had, and descriptors handed over are the caller's again.

    :raises StratovirtError: the VM can't be changed now.
    """
    vm.hotplug.take_turn(lambda finish: _Replacement(vm, device, config, finish).begin(), done)


class _Replacement:
    """One `netdev_replace`, in its turn."""

    def __init__(self, vm: Vm, device: Device, config: NetdevConfig, done: Done) -> None:
        self._vm = vm
        self._device = device
        self._done = done
        self._new = config
        self._opened: list[NetNode] = []

    def begin(self) -> None:
        """Open the new tap.

        :raises DeviceError: it has none.
        """
        device = self._device
        node = next((n for n in self._vm.nets.values() if n.device_id == device.id), None)
        if (node is None or device.worker is None
                or self._vm.devices.get(device.id) is not device):
            raise DeviceError(f"net device {device.id} not support tap replacement",
                              "only a NIC on a tap can have another one")
        self._node = node
        self._before = node.config, node.taps
        self._new.id = node.config.id
        family, others = self._vm.family("net"), dict(self._vm.nets)
        self._vm.off_loop(lambda: self._opened.append(
            family.open(self._new, others)), self._restart)  # type: ignore[arg-type]

    def _restart(self, error: Exception | None) -> None:
        if error is not None:
            self._done(error)
            return
        node, opened = self._node, self._opened[0]
        before = len(node.taps)
        if len(opened.taps) != before:
            self._give_back(ConfigError(
                f"The NIC {self._device.id} has {before} queue pairs, the new tap "
                f"{len(opened.taps)}", f"use queues={before}"))
            return
        # Who is started from now on serves it.
        node.config, node.taps = opened.config, opened.taps
        try:
            self._vm.supervisor.restart(self._device.id, self._finish)
        except (DeviceError, StateError) as caught:
            self._finish(caught)

    def _finish(self, error: Exception | None) -> None:
        if error is not None:
            self._node.config, self._node.taps = self._before
            self._give_back(error)
            return
        self._opened[0].taps = self._before[1]  # what is closed now
        self._vm.hotplug.when_free(self._node, self._close)

    def _close(self) -> None:
        self._opened[0].close()
        self._done(None)

    def _give_back(self, error: Exception) -> None:
        if not self._new.fds:  # else they are the caller's again
            self._opened[0].close()
        self._done(error)


def find_nic(vm: Vm, name: str) -> Device | None:
    """The NIC `name`: its id, or that of its netdev."""
    device = vm.devices.get(name)
    if device is None:
        node = vm.nets.get(name)
        device = vm.devices.get(node.device_id or "") if node is not None else None
    return device if device is not None and isinstance(device.device, VirtioNet) else None
