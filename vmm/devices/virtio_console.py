"""virtio-console (virtio 1.2, 5.3) behind vhost-user: the config space is the core's."""

from __future__ import annotations

from shared.virtio import console
from vmm.devices.vhost_user import VhostUserDevice
from vmm.devices.worker_state import WorkerState

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm.event_loop import EventLoop
    from vmm.memory import GuestMemory


class VirtioConsole(VhostUserDevice):
    """The terminals and serial ports of a guest, served by a worker of ours.

    :param max_ports: numbers that ports may have: 0 to max_ports - 1.
    :param state: what its first worker was given; owned from now on.
    """

    device_id = console.DEVICE_ID
    keeps_shown = True
    # Linux waits for output to be taken with a processor that does nothing else meanwhile.
    has_null = True

    def __init__(self, id: str, socket_fd: int, memory: GuestMemory, loop: EventLoop,
                 max_ports: int, state: WorkerState) -> None:
        sizes = [console.CONTROL_QUEUE_SIZE if index in console.CONTROL_QUEUES
                 else console.PORT_QUEUE_SIZE for index in range(console.queue_count(max_ports))]
        self._max_ports = max_ports
        self._state = state
        super().__init__(id, socket_fd, memory, loop, sizes, console.FEATURES, foreign=False)

    def features(self) -> int:
        """See `VirtioDevice.features`: every worker of ours has these, nobody is waited for."""
        return console.FEATURES

    def read_config(self, offset: int, size: int) -> bytes:
        """See `VirtioDevice.read_config`; the size of the terminal isn't known."""
        config = console.encode_config(0, 0, self._max_ports)
        return config[offset:offset + size].ljust(size, b"\0")

    def reset(self) -> None:
        """See `VirtioDevice.reset`: which ports are open is forgotten too."""
        super().reset()
        self._state.forget()

    def null_order(self) -> tuple[dict[str, object], list[int]]:
        """See `VirtioDevice.null_order`."""
        return {"device": "console", "queues": self._max_ports,
                "queue-size": console.PORT_QUEUE_SIZE}, [self._state.fileno()]

    def close(self) -> None:
        """See `VirtioDevice.close`."""
        super().close()
        self._state.close()
