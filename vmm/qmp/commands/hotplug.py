"""Devices and back ends that come and go: `blockdev-add`, `device_add` and their opposites."""

from __future__ import annotations

from shared import throttling
from vmm.config.model import DriveConfig
from vmm.config.options import parse_int
from vmm.net.mac import parse_mac
from vmm.qmp.errors import QmpError
from vmm.qmp.registry import DEFERRED, Argument, Command

TYPE_CHECKING = False  # importing typing would cost 10 ms of the start
if TYPE_CHECKING:
    from typing import Any

    from vmm.qmp.connection import Request

_AIO = {"native": "native", "io_uring": "io_uring", "iouring": "io_uring", "threads": "threads",
        "off": "off"}
_FILE_DRIVERS = ("file", "host_device")
_SERIAL_LIMIT = 20  # virtio 1.2, 5.2.6: VIRTIO_BLK_T_GET_ID


def _member(inside: str, members: dict[str, Any], name: str, kind: type, default: object) -> Any:
    value = members.get(name, default)
    if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool):
        words = {str: "a string", bool: "true or false", int: "an integer"}[kind]
        raise QmpError(f"The member '{name}' of the argument '{inside}' must be {words}")
    return value


def _known(inside: str, members: dict[str, Any], *names: str) -> None:
    for name in members:
        if name not in names:
            raise QmpError(f"The argument '{inside}' has no member '{name[:100]}'",
                           f"it has: {', '.join(names)}")


def _choice(name: str, value: str, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise QmpError(f"The argument '{name}' can't be '{value[:100]}'",
                       f"use {', '.join(choices)}")
    return value


def _drive(arguments: dict[str, Any]) -> DriveConfig:
    file = arguments["file"]
    _known("file", file, "driver", "filename", "aio", "locking")
    _choice("file.driver", _member("file", file, "driver", str, "file"), _FILE_DRIVERS)
    path = _member("file", file, "filename", str, "")
    if not path or "\0" in path or len(path) > 4095:
        raise QmpError("The member 'filename' of the argument 'file' must name an image")
    drive = DriveConfig(arguments["node-name"], path)
    cache = arguments.get("cache", {})
    _known("cache", cache, "direct", "no-flush")
    _member("cache", cache, "no-flush", bool, False)
    drive.direct = _member("cache", cache, "direct", bool, True)
    aio = _member("file", file, "aio", str, "").lower()
    if aio:
        drive.aio = _AIO[_choice("file.aio", aio, tuple(_AIO))]
    drive.readonly = arguments.get("read-only", False)
    if _choice("driver", arguments.get("driver", "raw"), ("raw", "qcow2")) == "qcow2":
        raise QmpError("The argument 'driver': qcow2 images are not supported",
                       "convert it: qemu-img convert -O raw")
    discard = _choice("discard", arguments.get("discard", "ignore"),
                      ("ignore", "off", "unmap", "on"))
    drive.discard = "unmap" if discard in ("unmap", "on") else "ignore"
    drive.detect_zeroes = _choice("detect-zeroes", arguments.get("detect-zeroes", "off"),
                                  ("off", "on", "unmap"))
    _choice("media", arguments.get("media", "disk"), ("disk", "cdrom"))
    drive.throttling = {name: value for name in throttling.OPTIONS
                        if (value := arguments.get(f"throttling.{name}", 0))}
    complaint = throttling.complaint(drive.throttling)
    if complaint:
        raise QmpError(complaint, "correct it, or leave it away")
    return drive


def _blockdev_add(request: Request) -> object:
    vm = request.vm
    vm.hotplug.add_node(vm.family("block"), _drive(request.arguments), request.done)
    return DEFERRED


def _blockdev_del(request: Request) -> object:
    vm = request.vm
    vm.hotplug.delete_node(vm.family("block"), request.arguments["node-name"], request.done)
    return DEFERRED


def _slot(arguments: dict[str, Any]) -> int:
    """`addr`, decimal or 0x…; else `lun`, whose 0 is the second disk; else the first slot."""
    if "addr" in arguments:
        number = parse_int(arguments["addr"])
        if number is None:
            raise QmpError(f"Invalid addr for device {arguments['id']}: "
                           f"'{arguments['addr'][:100]}'", "write a number, as 0x1")
        return number
    return int(arguments["lun"]) + 1 if "lun" in arguments else 0


def _device_add(request: Request) -> object:
    arguments = request.arguments
    name, driver = arguments["id"], arguments["driver"]
    if not name.isprintable() or name.startswith("#"):
        raise QmpError("The argument 'id' must be printable, and not begin with '#'")
    if "net" in driver:
        family, backend, options = "net", arguments.get("netdev", name), _nic_options(arguments)
    elif "blk" in driver:
        family, backend, options = "block", arguments.get("drive", name), _disk_options(arguments)
    else:
        raise QmpError(f"Unsupported replaceable device type: '{driver[:100]}'",
                       "use virtio-blk-mmio or virtio-net-mmio")
    vm = request.vm
    vm.hotplug.add_device(vm.family(family), name, driver, _slot(arguments), backend, options,
                          request.done)
    return DEFERRED


def _disk_options(arguments: dict[str, Any]) -> dict[str, str]:
    serial = arguments.get("serial", "")
    if len(serial.encode()) > _SERIAL_LIMIT or not serial.isprintable():
        raise QmpError(f"The argument 'serial' must have at most {_SERIAL_LIMIT} bytes")
    return {"serial": serial}


def _nic_options(arguments: dict[str, Any]) -> dict[str, str]:
    mac = arguments.get("mac", "")
    if mac and parse_mac(mac) is None:
        raise QmpError("The argument 'mac': Mac address is illegal.",
                       "write six bytes of a unicast address, as 52:54:00:12:34:56")
    return {"mac": mac}


def _device_del(request: Request) -> object:
    request.vm.hotplug.delete_device(request.arguments["id"], request.done)
    return DEFERRED


def _optional(*names: str, type: str = "str") -> tuple[Argument, ...]:
    return tuple(Argument(name, type, optional=True, low=0 if type == "str" else None)
                 for name in names)


TYPES: dict[str, dict[str, str] | tuple[str, ...]] = {
    "BlockdevFile": {"driver": "str", "filename": "str", "aio?": "str", "locking?": "str"},
    "BlockdevCache": {"direct?": "bool", "no-flush?": "bool"},
}

COMMANDS = (
    Command("blockdev-add", _blockdev_add, Argument("node-name", "str", high=255),
            Argument("file", "BlockdevFile"), Argument("cache", "BlockdevCache", optional=True),
            *_optional("read-only", type="bool"),
            *_optional("driver", "media", "discard", "detect-zeroes"),
            *(Argument(f"throttling.{name}", "int", optional=True, low=0,
                       high=throttling.largest(name)) for name in throttling.OPTIONS)),
    Command("blockdev-del", _blockdev_del, Argument("node-name", "str", high=255)),
    # What a device in a slot has no use for is taken and ignored, as StratoVirt does.
    Command("device_add", _device_add, Argument("id", "str", high=255), Argument("driver", "str"),
            Argument("addr", "str", optional=True),
            Argument("lun", "int", optional=True, low=0, high=255),
            Argument("drive", "str", optional=True, high=255),
            Argument("netdev", "str", optional=True, high=255),
            *_optional("serial", "mac", "mq", "chardev",
                       "bus", "romfile", "iothread", "share-rw", "disable-modern",
                       "vectors"),
            *_optional("num-queues", "queue-size", "boot_index", "bootindex", type="int"),
            *_optional("multifunction", type="bool")),
    Command("device_del", _device_del, Argument("id", "str", high=255)),
)
