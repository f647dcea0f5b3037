"""What every device in a slot of a microVM can do, a disk as well as a NIC."""

from __future__ import annotations

from vmm.devices.vhost_user import VhostUserDevice


class SlotDevice(VhostUserDevice):
    """A device of a slot, for the whole life of the VM."""

    has_null = True

    def kick_fds(self) -> list[int]:
        """What the driver kicks, of each queue that it started."""
        return [queue.kick_fd for queue in self._queues]

    def show_empty(self) -> None:
        """Nobody is here: the config space says so from now on."""
        raise NotImplementedError

    def show_failed(self) -> None:
        """No worker serves the device any more, it is given up. Main loop."""

    def prefetch_config(self) -> None:
        """Have the config space ready before the driver asks: it waits for nobody then.

        :raises BackendError: the back end doesn't answer.
        """
