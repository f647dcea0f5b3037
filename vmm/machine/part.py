"""A `-device` on its way into the machine: in two steps, as workers take time to come up."""

from __future__ import annotations

TYPE_CHECKING = False  # importing typing would cost 10 ms of the start
if TYPE_CHECKING:
    from typing import Protocol

    from vmm.cleanup import Cleanup
    from vmm.config.model import DeviceConfig, VmConfig
    from vmm.devices.virtio_device import VirtioDevice
    from vmm.event_loop import EventLoop
    from vmm.machine.machine import Machine
    from vmm.worker.nursery import Nursery
    from vmm.worker.process import WorkerProcess
    from vmm.worker.supervisor import Kind

    class Builder(Protocol):
        """What a part may use. `nursery` is there wherever a part needs it."""

        config: VmConfig
        machine: Machine
        nursery: Nursery | None
        loop: EventLoop
        cleanup: Cleanup


class Part:
    """One device. A subclass knows its back end and its virtio device.

    worker, kind: set by `start` where a worker of ours serves it.
    """

    def __init__(self, config: DeviceConfig, name: str) -> None:
        self.config = config
        self.name = name
        self.worker: WorkerProcess | None = None
        self.kind: Kind | None = None

    def start(self, builder: Builder) -> None:
        """Ask for the worker. Guest memory exists, nothing else of the machine does.

        :raises VmmError: what was asked for can't be had.
        """

    def make(self, builder: Builder) -> VirtioDevice:
        """The virtio device, with its back end's connection.

        :raises VmmError: the same.
        """
        raise NotImplementedError

    def start_worker(self, builder: Builder, kind: Kind) -> None:
        """For `start`: the first worker of its kind."""
        self.kind = kind
        self.worker = kind.first()
        builder.cleanup.push(self.worker.kill)


def device_name(config: DeviceConfig, number: int) -> str:
    """The user's id, or one that no user can have given twice: `#DRIVER.N`."""
    return config.id or f"#{config.driver}.{number}"
