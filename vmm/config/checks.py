"""What must hold between options, whatever their order."""

from __future__ import annotations

import _stat as stat
import posix as os

from shared import paths
from vmm.config.backends import resolve_monitors
from vmm.errors import ConfigError

TYPE_CHECKING = False  # importing typing would cost 10 ms of the start
if TYPE_CHECKING:
    from vmm.config.model import VmConfig

_MAX_LINKS = 40  # that follow each other, as the kernel has it


def check(config: VmConfig) -> None:
    """:raises ConfigError: names the options that don't go together."""
    resolve_monitors(config)
    if not config.monitors:
        raise ConfigError("Please use '-qmp' or '-mon' to give a qmp path for Unix socket",
                          "add -qmp unix:PATH,server,nowait")
    _check_machine(config)
    _resolve_memory(config)
    _check_listeners(config)
    _check_devices(config)
    _check_ports(config)
    _check_macs(config)
    _check_singles(config)
    _check_taps(config)
    _check_descriptors(config)
    _check_chardevs(config)
    _check_files(config)
    if config.daemonize and config.log == "":
        raise ConfigError("-D without a file and -daemonize can't be set together: there is no "
                          "standard output", "name a log file")


def _check_machine(config: VmConfig) -> None:
    if config.machine.kind == "none":
        # For managers that ask what this program can do: any accelerator will do.
        if config.devices:
            raise ConfigError(f"-device {config.devices[0].driver}: -machine none has no place "
                              "for it", "use -machine microvm")
        return
    if config.machine.accel != "kvm":
        raise ConfigError(f"accelerator '{config.machine.accel}' can't run a "
                          f"{config.machine.kind}", "use -accel kvm")
    if config.boot.kernel is None:
        raise ConfigError("kernel file is required for microvm machine type, which is not "
                          "provided", "add -kernel FILE")


def _resolve_memory(config: VmConfig) -> None:
    if not config.machine.memory_backend:
        return
    from vmm.config.machine import check_memory_size
    from vmm.config.memory_backend import resolve_memory_backend  # few command lines need it

    resolve_memory_backend(config)
    complaint = check_memory_size(config.memory.size)
    if complaint:
        raise ConfigError(f"-machine memory-backend={config.machine.memory_backend}: {complaint}",
                          "correct the size")


def _check_listeners(config: VmConfig) -> None:
    paths = [m.path for m in config.monitors if m.path]
    paths += [c.path for c in config.chardevs.values() if c.kind == "socket" and c.server]
    for path in paths:
        if path and paths.count(path) > 1:
            raise ConfigError(f"Two sockets are to listen at {path}", "give each its own path")


def _check_devices(config: VmConfig) -> None:
    ids: set[str] = set()
    drives: set[str] = set()
    netdevs: set[str] = set()
    balloons = [device for device in config.devices if device.driver.startswith("virtio-balloon")]
    if len(balloons) > 1:
        raise ConfigError(f"-device {balloons[1].driver}: Only one balloon device is supported "
                          "for each vm.", "remove the other")
    for device in config.devices:
        if device.id and device.id in ids:
            raise ConfigError(f"-device {device.driver}: Device id {device.id} existed",
                              "give each device an id of its own")
        ids.add(device.id)
        thread = device.options.get("iothread")
        if thread and config.objects.get(thread, {}).get("qom-type") != "iothread":
            raise ConfigError(f"-device {device.driver}: there is no iothread '{thread}'",
                              f"add -object iothread,id={thread}")
        if "rng" in device.options:
            from vmm.config.rng import check_rng

            check_rng(config, device)
        netdev = device.options.get("netdev")
        if netdev is not None:
            _check_netdev(config, device.driver, netdev, netdevs)
        drive = device.options.get("drive")
        if drive is None:
            continue
        if drive not in config.drives:
            raise ConfigError(f"-device {device.driver}: there is no drive '{drive}'",
                              f"add -drive id={drive},file=…")
        if drive in drives:
            raise ConfigError(f"-device {device.driver}: the drive '{drive}' serves another "
                              "device already", "give each device its own drive")
        drives.add(drive)


def _check_ports(config: VmConfig) -> None:
    if any("max_ports" in device.options or "nr" in device.options for device in config.devices):
        from vmm.config.ports import check_ports

        check_ports(config)


def _check_netdev(config: VmConfig, driver: str, netdev: str, taken: set[str]) -> None:
    if netdev not in config.netdevs:
        raise ConfigError(f'-device {driver}: Netdev: "{netdev}" not found for net device',
                          f"add -netdev tap,id={netdev},ifname=…")
    if netdev in taken:
        raise ConfigError(f"-device {driver}: the netdev '{netdev}' serves another device already",
                          "give each device its own netdev")
    taken.add(netdev)


def _check_macs(config: VmConfig) -> None:
    macs: set[str] = set()
    for device in config.devices:
        mac = device.options.get("mac", "").lower()
        if mac and mac in macs:
            raise ConfigError(f"-device {device.driver}: another NIC has the address {mac}",
                              "give each NIC an address of its own")
        macs.add(mac)


def _check_singles(config: VmConfig) -> None:
    """A guest has one vsock address, and finds a folder by its tag."""
    tags: set[str] = set()
    sockets = [device for device in config.devices if device.driver == "vhost-vsock-device"]
    if len(sockets) > 1:
        raise ConfigError(f"-device {sockets[0].driver}: Only one vsock device is supported for "
                          "each vm.", "remove one")
    for device in config.devices:
        tag = device.options.get("tag")
        if tag is not None and tag in tags:
            raise ConfigError(f"-device {device.driver}: another folder has the tag '{tag}'",
                              "give each folder a tag of its own")
        tags.add(tag or "")


def _check_taps(config: VmConfig) -> None:
    """Of an interface with several queues each could have some, and neither all frames."""
    taken: dict[object, str] = {}
    for netdev in config.netdevs.values():
        names: list[object] = [*netdev.fds, *([netdev.ifname] if netdev.ifname else [])]
        for name in names:
            if name in taken:
                what = f"descriptor {name}" if isinstance(name, int) else f"tap '{name}'"
                raise ConfigError(f"{netdev.option}: netdev '{taken[name]}' has the {what} already",
                                  "give each netdev its own")
            taken[name] = netdev.id


def _descriptors(config: VmConfig) -> list[tuple[str, str, int]]:
    """Those that were handed over, as the options say: option, what it calls it, number."""
    found = [(netdev.option, fd) for netdev in config.netdevs.values() for fd in netdev.fds]
    found += [(c.option, c.fd) for c in config.chardevs.values() if c.fd >= 0]
    found += [(monitor.option, monitor.fd) for monitor in config.monitors if monitor.fd >= 0]
    named = [(option, f"descriptor {fd}", fd) for option, fd in found]
    for device in config.devices:
        fd = int(device.options.get("vhostfd", "-1"))
        if fd >= 0:
            option = f"-device {device.driver},guest-cid={device.options['guest-cid']}"
            named.append((option, f"vhostfd={fd}", fd))
    return named


def _check_descriptors(config: VmConfig) -> None:
    taken: dict[int, str] = {}
    for option, name, fd in _descriptors(config):
        if fd in taken:
            raise ConfigError(f"{option}: {name}: {taken[fd]} has it already",
                              "hand one over for each")
        taken[fd] = option


def check_handed_over(config: VmConfig, ours: tuple[int, ...]) -> None:
    """Before anything is opened, which might get the number of one that isn't there.

    :param ours: descriptors that nobody handed over.
    :raises ConfigError: names the option of a descriptor that wasn't.
    """
    for option, name, fd in _descriptors(config):
        try:
            if fd not in ours:
                os.fstat(fd)
                continue
        except (OSError, OverflowError):
            pass
        raise ConfigError(f"{option}: {name}: Bad file descriptor",
                          "hand it over when the VM is started")


def _check_chardevs(config: VmConfig) -> None:
    users = [("-serial", config.serial)] if config.serial is not None else []
    users += [(f"-device {device.driver}", device.options["chardev"])
              for device in config.devices if "chardev" in device.options]
    users += [(netdev.option, netdev.chardev) for netdev in config.netdevs.values()
              if netdev.chardev]
    taken: set[str] = set()
    for user, chardev in users:
        if chardev not in config.chardevs or chardev in taken:
            raise ConfigError(f'{user}: Chardev "{chardev}" not found or is in use',
                              "add a -chardev of its own")
        taken.add(chardev)
    stdio = [c.id for c in config.chardevs.values() if c.kind == "stdio"]
    if len(stdio) > 1:
        raise ConfigError(f"Can't set multiple devices redirected to stdio: {', '.join(stdio)}",
                          "keep one")
    if stdio and config.daemonize:
        raise ConfigError("Device redirected to stdio and daemonize can't be set together",
                          "use -serial pty, socket or file")
    if stdio and config.log == "":
        config.warnings.append("the log and a console both go to standard output")


def _check_files(config: VmConfig) -> None:
    """What the VM writes must not be what it reads: a console's file is emptied at start."""
    written = [(f"{c.option},path={c.path}", c.path)
               for c in config.chardevs.values() if c.kind == "file"]
    if config.log:
        written.append((f"-D {config.log}", config.log))
    if config.pidfile:
        written.append((f"-pidfile {config.pidfile}", config.pidfile))
    if not written:
        return
    taken = {_identity(drive.file): f"drive '{drive.id}'" for drive in config.drives.values()}
    for option, path in (("-kernel", config.boot.kernel), ("-initrd", config.boot.initrd),
                         ("-mem-path", config.memory.path)):
        if path:
            taken[_identity(path)] = option
    for option, path in written:
        identity = _identity(path)
        if identity in taken and not _is_device(path):
            raise ConfigError(f"{option}: {taken[identity]} uses this file too",
                              "give each a file of its own")
        taken[identity] = option


def _identity(path: str) -> object:
    """Equal for two names of one file, be it there or not yet."""
    for _ in range(_MAX_LINKS):
        try:
            status = os.stat(path)
            return status.st_dev, status.st_ino
        except (OSError, ValueError):
            pass
        try:
            target = os.readlink(path)
        except (OSError, ValueError):
            break
        path = target if target.startswith("/") else f"{paths.folder(path) or '.'}/{target}"
    try:
        status = os.stat(paths.folder(path) or ".")
    except (OSError, ValueError):
        return path
    return status.st_dev, status.st_ino, paths.name(path)


def _is_device(path: str) -> bool:
    """A terminal or /dev/null may have several writers."""
    try:
        return stat.S_ISCHR(os.stat(path).st_mode)
    except (OSError, ValueError):
        return False
