"""`-device virtio-serial-device`, with the `virtconsole`s and `virtserialport`s on it."""

from __future__ import annotations

from shared.virtio.console import STATE_BYTES
from vmm.console.port import Port
from vmm.console.worker import ConsoleWorkers
from vmm.devices.virtio_console import VirtioConsole
from vmm.devices.worker_state import WorkerState
from vmm.errors import ConfigError
from vmm.machine.part import Part

TYPE_CHECKING = False  # importing typing would cost 10 ms of the start
if TYPE_CHECKING:
    from vmm.config.model import DeviceConfig
    from vmm.machine.part import Builder


class SerialPart(Part):
    """A console device; vmm/config/ports.py has numbered its ports."""

    def __init__(self, config: DeviceConfig, name: str) -> None:
        super().__init__(config, name)
        self._ports: list[Port] = []
        self._max_ports = int(config.options["max_ports"])
        self._state = WorkerState("console-state", STATE_BYTES)

    def start(self, builder: Builder) -> None:
        """See `Part.start`."""
        builder.cleanup.push(self._state.close)
        for device in builder.config.devices:
            if "nr" in device.options:
                options = device.options
                try:
                    port = Port(int(options["nr"]), device.driver == "virtconsole",
                                options["name"], options["chardev"])
                except OSError as error:
                    raise ConfigError(f"-device {device.driver}: {error.strerror}",
                                      "check the limit on descriptors") from None
                builder.cleanup.push(port.close)
                self._ports.append(port)
        assert builder.nursery is not None  # every microvm has one
        self.start_worker(builder, ConsoleWorkers(builder.nursery, self.name, self._ports,
                                                  self._max_ports, self._state))

    def make(self, builder: Builder) -> VirtioConsole:
        """See `Part.make`; chardevs exist by now."""
        assert self.worker is not None
        for port in self._ports:
            port.attach(builder.machine.chardevs[port.chardev_id], builder.loop)
            builder.cleanup.push(port.close)  # before the chardev's, for the guest's last words
        return VirtioConsole(self.name, self.worker.take_socket(), builder.machine.memory,
                             builder.loop, self._max_ports, self._state)
