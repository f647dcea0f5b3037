"""`-device virtio-serial-device`, and the `virtconsole`s and `virtserialport`s on it."""

from __future__ import annotations

from shared.virtio.console import MAX_NAME, MAX_PORTS
from vmm.errors import ConfigError

TYPE_CHECKING = False  # importing typing would cost 10 ms of the start
if TYPE_CHECKING:
    from vmm.config.model import DeviceConfig, VmConfig
    from vmm.config.options import SubOptions

BUS = "virtio-serial-device"
CONSOLE = "virtconsole"
PORT = "virtserialport"


def read_bus(options: SubOptions) -> dict[str, str]:
    """`max_ports`: "" if it doesn't say."""
    if "max_ports" not in options.values:
        return {"max_ports": ""}
    return {"max_ports": str(options.take_int("max_ports", 1, MAX_PORTS))}


def read_port(options: SubOptions) -> dict[str, str]:
    """`chardev`, `nr` ("" if it doesn't say), `name`."""
    kept = {"chardev": options.take("chardev"), "nr": "", "name": options.take("name", "")}
    if "nr" in options.values:
        kept["nr"] = str(options.take_int("nr", 0, MAX_PORTS - 1))
    name = kept["name"]
    if not name.isprintable() or len(name.encode()) > MAX_NAME:
        raise options.error(f"'name' is not a printable text of at most {MAX_NAME} bytes",
                            "shorten or correct it")
    options.ignore("bus", "addr", "multifunction")  # there is one bus
    return kept


def check_ports(config: VmConfig) -> None:
    """Number the ports that have no number; say how many there can be.

    A console takes port 0 if that is free; everything else what follows the highest.  Ports
    can't be added later: without `max_ports` there are as many as the command line needs.

    :raises ConfigError: ports without their device, two devices, a number that can't be.
    """
    buses = [device for device in config.devices if device.driver == BUS]
    ports = [device for device in config.devices if device.driver in (CONSOLE, PORT)]
    if len(buses) > 1:
        raise ConfigError(f"-device {BUS}: Only one virtio serial device is supported",
                          "remove one: it takes all ports")
    if ports and not buses:
        raise ConfigError(f"-device {ports[0].driver}: No virtio serial device specified",
                          f"add -device {BUS}")
    taken: dict[int, str] = {}
    for port in sorted(ports, key=lambda port: not port.options["nr"]):  # those with one first
        number = _number(port, taken)
        if number == 0 and port.driver != CONSOLE:
            raise ConfigError(f"-device {PORT}: Port number 0 on virtio-serial devices reserved "
                              "for virtconsole device.", "use nr=1 or more")
        if number in taken:
            raise ConfigError(f"-device {port.driver},nr={number}: Repetitive virtio serial port.",
                              f"{taken[number]} has this number")
        taken[number] = port.driver
        port.options["nr"] = str(number)
    for bus in buses:
        _limit(bus, ports, max(taken, default=0) + 1)


def _number(port: DeviceConfig, taken: dict[int, str]) -> int:
    if port.options["nr"]:
        return int(port.options["nr"])
    if port.driver == CONSOLE and 0 not in taken:
        return 0
    return max(taken, default=0) + 1


def _limit(bus: DeviceConfig, ports: list[DeviceConfig], needed: int) -> None:
    limit = int(bus.options["max_ports"] or min(needed, MAX_PORTS))
    bus.options["max_ports"] = str(limit)
    for port in ports:
        if int(port.options["nr"]) >= limit:
            raise ConfigError(f"-device {port.driver}: virtio serial port nr "
                              f"{port.options['nr']} should be less than virtio serial's "
                              f"max_nr_ports {limit}", f"use nr=0 to {limit - 1}, or raise "
                              "max_ports")
