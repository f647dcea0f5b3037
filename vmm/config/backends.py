"""`-drive`, `-chardev`, `-serial`, `-netdev`, `-object`, `-qmp`, `-mon`: what devices stand on."""

from __future__ import annotations

from shared import throttling
from shared.unix_socket import PATH_LIMIT as SOCKET_PATH_LIMIT
from vmm.config.model import SERIAL_CHARDEV, ChardevConfig, DriveConfig, MonitorConfig
from vmm.config.options import SubOptions
from vmm.errors import ConfigError

TYPE_CHECKING = False  # importing typing would cost 10 ms of the start
if TYPE_CHECKING:
    from vmm.config.model import VmConfig

MAX_IOTHREADS = 8

_AIO = {"native": "native", "io_uring": "io_uring", "iouring": "io_uring", "threads": "threads",
        "off": "off"}
# The types of -object and what each may say (QEMU's and StratoVirt's). Nothing here needs them
# yet but iothreads' ids: managers pass them.
_RAM = ("size", "host-nodes", "policy", "dump-guest-core", "dump", "share", "mem-prealloc",
        "prealloc", "prealloc-threads", "merge", "reserve", "x-use-canonical-path-for-ramblock-id")
_OBJECTS: dict[str, tuple[str, ...]] = {
    "iothread": ("poll-max-ns", "poll-grow", "poll-shrink", "aio-max-batch", "thread-pool-min",
                 "thread-pool-max"),
    "rng-random": ("filename",),
    "memory-backend-ram": _RAM,
    "memory-backend-file": (*_RAM, "mem-path", "discard-data", "align", "pmem", "readonly"),
    "memory-backend-memfd": (*_RAM, "hugetlb", "hugetlbsize", "seal"),
    "secret": ("data", "file", "format", "keyid", "iv"),
}


def parse_drive(config: VmConfig, text: str) -> None:
    """`-drive id=,file=,…`: a block back end."""
    options = SubOptions("-drive", text)
    interface = options.take_choice("if", ("none", "pflash"), "none")
    if interface == "pflash":
        raise options.error("flash images need a machine with firmware", "remove it: a microvm "
                            "boots its -kernel directly")
    drive = DriveConfig(options.take_id(), options.take_path("file"))
    drive.readonly = options.take_bool("readonly", False)
    drive.direct = options.take_bool("direct", True)
    aio = options.take_choice("aio", tuple(_AIO), "auto") if "aio" in options.values else "auto"
    drive.aio = _AIO.get(aio, "auto")
    options.take_choice("media", ("disk", "cdrom"), "disk")
    discard = options.take_choice("discard", ("ignore", "off", "unmap", "on"), "ignore")
    drive.discard = "unmap" if discard in ("unmap", "on") else "ignore"
    drive.detect_zeroes = options.take_choice("detect-zeroes", ("off", "on", "unmap"), "off")
    drive.format = options.take_choice("format", ("raw", "qcow2"), "raw")
    if drive.format == "qcow2":
        raise options.error("qcow2 images are not supported", "convert it: qemu-img convert -O raw")
    drive.throttling = _read_throttling(options)
    options.ignore("l2-cache-size", "refcount-cache-size", "unit")
    options.finish()
    if drive.id in config.drives:
        raise options.error(f"Drive {drive.id} has been added", "give each drive an id of its own")
    config.drives[drive.id] = drive


def _read_throttling(options: SubOptions) -> dict[str, int]:
    limits: dict[str, int] = {}
    for name in throttling.OPTIONS:
        value = options.take_int(f"throttling.{name}", 0, throttling.largest(name), 0)
        if value:
            limits[name] = value
    complaint = throttling.complaint(limits)
    if complaint:
        raise options.error(complaint, "correct it, or leave it away")
    return limits


def parse_chardev(config: VmConfig, text: str) -> None:
    """`-chardev KIND,id=,…`."""
    options = SubOptions("-chardev", text, ("kind",))
    _add_chardev(config, options, _read_chardev(config, options, options.take_id()))


def parse_serial(config: VmConfig, text: str) -> None:
    """`-serial chardev:ID`, or a chardev in place."""
    if config.serial is not None:
        raise ConfigError(f"-serial {text}: there is only one serial port", "remove one -serial")
    if text.startswith("chardev:"):
        config.serial = text.removeprefix("chardev:")
        return
    options = SubOptions("-serial", text, ("kind",))
    options.ignore("id")
    _add_chardev(config, options, _read_chardev(config, options, SERIAL_CHARDEV))
    config.serial = SERIAL_CHARDEV


def _add_chardev(config: VmConfig, options: SubOptions, chardev: ChardevConfig) -> None:
    options.finish()
    if chardev.id in config.chardevs:
        raise options.error(f'Chardev "{chardev.id}" has been added',
                            "give each chardev an id of its own")
    config.chardevs[chardev.id] = chardev


def _read_chardev(config: VmConfig, options: SubOptions, id: str) -> ChardevConfig:
    kind = options.take_choice("kind", ("stdio", "pty", "socket", "file", "null",
                                        "redirect-to-log"))
    chardev = ChardevConfig(id, kind)
    options.ignore("mux", "logfile", "logappend", "signal")
    if kind == "file":
        chardev.path = options.take_path("path")
        options.ignore("append")
    elif kind == "socket":
        _read_socket(config, options, chardev)
    return chardev


def _read_socket(config: VmConfig, options: SubOptions, chardev: ChardevConfig) -> None:
    if "fd" in options.values:
        chardev.fd = options.take_int("fd", 0, 1 << 20)
    elif "host" in options.values or "port" in options.values:
        chardev.host = _host(options, options.take("host", "127.0.0.1"))
        chardev.port = options.take_int("port", 1, 65535)
    else:
        chardev.path = socket_path(options, options.take_path("path"))
    chardev.server = options.take_bool("server", False)
    nowait = options.take_bool("nowait", False)
    wait = options.take_bool("wait", not nowait)
    chardev.wait = chardev.server and wait and not nowait
    if chardev.wait:
        config.warnings.append(f"{chardev.option}: the VM doesn't wait for a client, as if "
                               "nowait were given")
    options.ignore("reconnect", "delay")


def _host(options: SubOptions, host: str) -> str:
    if not host.isascii() or not host.isprintable() or not 0 < len(host) <= 253:
        raise options.error(f"'host={host[:40]}' is not a host", "write an IPv4 address")
    return host


def socket_path(options: SubOptions, path: str) -> str:
    """:raises ConfigError: longer than a unix socket's path can be."""
    if len(path.encode("utf-8", "surrogateescape")) > SOCKET_PATH_LIMIT:
        raise options.error(f"a socket's path has at most {SOCKET_PATH_LIMIT} bytes",
                            "choose a shorter one")
    return path


def parse_netdev(config: VmConfig, text: str) -> None:
    """`-netdev tap|vhost-user,id=,…`: for the device that names it."""
    from vmm.config.net import read_netdev

    options = SubOptions("-netdev", text, ("type",))
    netdev = read_netdev(config, options)
    if netdev.id in config.netdevs:
        raise options.error(f'Netdev "{netdev.id}" has been added',
                            "give each netdev an id of its own")
    config.netdevs[netdev.id] = netdev


def parse_object(config: VmConfig, text: str) -> None:
    """`-object iothread|rng-random|memory-backend-*,id=,…`."""
    options = SubOptions("-object", text, ("qom-type",))
    kind = options.take("qom-type")
    if kind not in _OBJECTS:
        raise options.error(f"Unknown object type: {kind}", f"use {', '.join(_OBJECTS)}")
    id = options.take_id()
    for key in options.values:
        if key not in _OBJECTS[kind]:
            raise options.error(f"there is no sub-option '{key}'", "remove it")
    if id in config.objects:
        raise options.error(f"Object: {id} has been added", "give each object an id of its own")
    config.objects[id] = {"qom-type": kind, **options.values}
    threads = sum(o["qom-type"] == "iothread" for o in config.objects.values())
    if threads > MAX_IOTHREADS:
        raise options.error(f"more than {MAX_IOTHREADS} iothreads", "remove some")


def parse_qmp(config: VmConfig, text: str) -> None:
    """`-qmp unix:PATH,server,nowait` or `tcp:HOST:PORT,server,nowait`."""
    address, _, rest = text.partition(",")
    options = SubOptions("-qmp", text, ("address",))
    options.ignore("address")
    if not rest or not options.take_bool("server", False):
        raise options.error("'server' is missing", "add ,server,nowait")
    nowait = options.take_bool("nowait", False)
    if options.take_bool("wait", not nowait):
        raise options.error("'nowait' is missing", "add ,server,nowait: the VM doesn't wait for "
                            "a client")
    options.ignore("iothread")
    options.finish()
    kind, _, where = address.partition(":")
    monitor = MonitorConfig(kind)
    if kind == "unix" and where:
        monitor.path = socket_path(options, where)
    elif kind == "tcp":
        host, _, port = where.rpartition(":")
        if (":" not in where or not port.isascii() or not port.isdigit()
                or not 0 < int(port[:9]) < 65536):
            raise options.error(f"'{where}' is not HOST:PORT", "write tcp:127.0.0.1:4444")
        monitor.host, monitor.port = _host(options, host or "0.0.0.0"), int(port)
    else:
        raise options.error(f"'{address}' is not an address", "write unix:PATH or tcp:HOST:PORT")
    config.monitors.append(monitor)


def parse_mon(config: VmConfig, text: str) -> None:
    """`-mon chardev=ID,mode=control`; the chardev may follow on the command line."""
    options = SubOptions("-mon", text, ("chardev",))
    monitor = MonitorConfig("chardev")
    monitor.chardev = options.take("chardev")
    options.take_choice("mode", ("control",), "control")
    options.ignore("id", "pretty")
    options.finish()
    config.monitors.append(monitor)


def resolve_monitors(config: VmConfig) -> None:
    """Turn `-mon` chardevs into listeners: they are QMP's alone.

    :raises ConfigError: there is no such chardev, or it can't be a monitor.
    """
    for monitor in config.monitors:
        if monitor.kind != "chardev":
            continue
        chardev = config.chardevs.get(monitor.chardev)
        if chardev is None:
            raise ConfigError(f"-mon chardev={monitor.chardev}: No chardev found: "
                              f"{monitor.chardev}", "add it with -chardev socket")
        if chardev.kind != "socket":
            raise ConfigError(f"-mon chardev={monitor.chardev}: Only chardev of unix-socket type "
                              "can be used for monitor", "use -chardev socket,…,server,nowait")
        if not chardev.server or chardev.wait:
            raise ConfigError(f"-mon chardev={monitor.chardev}: Argument 'server' and 'nowait' "
                              f"are both required for chardev '{chardev.id}'",
                              "add server,nowait to the chardev")
        del config.chardevs[chardev.id]
        monitor.path, monitor.host, monitor.port = chardev.path, chardev.host, chardev.port
        monitor.fd = chardev.fd
        monitor.kind = "fd" if chardev.fd >= 0 else "unix" if chardev.path else "tcp"
