"""`-device`: one table of drivers with the sub-options that each has."""

from __future__ import annotations

from vmm.config.model import DeviceConfig
from vmm.config.options import SubOptions

TYPE_CHECKING = False  # importing typing would cost 10 ms of the start
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.config.model import VmConfig

MAX_QUEUES = 32
SERIAL_LIMIT = 20  # virtio 1.2, 5.2.6: VIRTIO_BLK_T_GET_ID

# What StratoVirt has and we don't yet: refused by name.
_LATER = ("virtio-blk-pci", "virtio-net-pci", "virtio-balloon-pci",
          "virtio-rng-pci", "virtio-serial-pci", "vhost-vsock-pci", "vhost-user-fs-pci",
          "vhost-user-blk-pci", "pcie-root-port", "vfio-pci")


def parse_device(config: VmConfig, text: str) -> None:
    """`-device DRIVER,…`; what it names (drive, netdev, chardev) may follow on the command line."""
    options = SubOptions("-device", text, ("driver",))
    driver = options.take("driver")
    read = DRIVERS.get(driver)
    if read is None:
        hint = f"use {', '.join(DRIVERS)}"
        if driver in _LATER:
            raise options.error(f"'{driver}' is not supported yet", hint)
        raise options.error(f'Unsupported device: "{driver}"', hint)
    id = options.take_id() if "id" in options.values else ""
    if driver not in _PORTS:
        for key in ("bus", "addr", "multifunction"):
            if key in options.values:
                raise options.error(f"Should not set {key}",
                                    "a microvm has no PCI bus: remove it")
    kept = read(options)
    options.take_int("bootindex", 0, 255, 0)
    kept["iothread"] = options.take("iothread", "")
    options.finish()
    config.devices.append(DeviceConfig(driver, id, kept))


def _read_disk(options: SubOptions) -> dict[str, str]:
    kept = {"drive": options.take("drive"), "serial": options.take("serial", "")}
    if not kept["serial"].isprintable() or len(kept["serial"].encode()) > SERIAL_LIMIT:
        raise options.error(f"'serial' is not a text of at most {SERIAL_LIMIT} bytes",
                            "shorten or correct it")
    return kept | read_queues(options)


def _read_foreign_disk(options: SubOptions) -> dict[str, str]:
    return {"chardev": options.take("chardev")} | read_queues(options)


def read_queues(options: SubOptions) -> dict[str, str]:
    """`num-queues` and `queue-size`."""
    count = options.take_int("num-queues", 1, MAX_QUEUES, 1)
    size = options.take_int("queue-size", 3, 1024, 256)
    if size & (size - 1):
        raise options.error(f"'queue-size={size}' is not a power of two", "use 4 to 1024")
    return {"num-queues": str(count), "queue-size": str(size)}


def _read_nic(options: SubOptions) -> dict[str, str]:
    from vmm.config.net import read_nic

    return read_nic(options)


def _read_vsock(options: SubOptions) -> dict[str, str]:
    from vmm.config.vhost import read_vsock

    return read_vsock(options)


def _read_folder(options: SubOptions) -> dict[str, str]:
    from vmm.config.vhost import read_folder

    return read_folder(options)


def _read_rng(options: SubOptions) -> dict[str, str]:
    from vmm.config.rng import read_rng

    return read_rng(options)


def _read_bus(options: SubOptions) -> dict[str, str]:
    from vmm.config.ports import read_bus

    return read_bus(options)


def _read_port(options: SubOptions) -> dict[str, str]:
    from vmm.config.ports import read_port

    return read_port(options)


def _read_balloon(options: SubOptions) -> dict[str, str]:
    from vmm.config.balloon import read_balloon

    return read_balloon(options)


# Each driver, and who reads its own sub-options: what it returns is DeviceConfig.options. Those
# that few command lines name live in modules that are imported then.
DRIVERS: dict[str, Callable[[SubOptions], dict[str, str]]] = {
    "virtio-blk-device": _read_disk,
    "vhost-user-blk-device": _read_foreign_disk,
    "virtio-net-device": _read_nic,
    "vhost-vsock-device": _read_vsock,
    "vhost-user-fs-device": _read_folder,
    "virtio-rng-device": _read_rng,
    "virtio-serial-device": _read_bus,
    "virtconsole": _read_port,
    "virtserialport": _read_port,
    "virtio-balloon-device": _read_balloon,
}
_PORTS = ("virtconsole", "virtserialport")  # they sit on another device, and may name its bus
