"""What must hold between options, whatever their order."""

from __future__ import annotations

from vmm.config.backends import resolve_monitors
from vmm.errors import ConfigError

TYPE_CHECKING = False  # importing typing would cost 10 ms of the start
if TYPE_CHECKING:
    from vmm.config.model import VmConfig


def check(config: VmConfig) -> None:
    """:raises ConfigError: names the options that don't go together."""
    resolve_monitors(config)
    if not config.monitors:
        raise ConfigError("Please use '-qmp' or '-mon' to give a qmp path for Unix socket",
                          "add -qmp unix:PATH,server,nowait")
    _check_listeners(config)
    if config.machine.kind != "none" and config.boot.kernel is None:
        raise ConfigError("kernel file is required for microvm machine type, which is not "
                          "provided", "add -kernel FILE")
    _check_devices(config)
    _check_chardevs(config)
    if config.daemonize and config.log == "":
        raise ConfigError("-D without a file and -daemonize can't be set together: there is no "
                          "standard output", "name a log file")


def _check_listeners(config: VmConfig) -> None:
    paths = [m.path for m in config.monitors if m.path]
    paths += [c.path for c in config.chardevs.values() if c.kind == "socket" and c.server]
    for path in paths:
        if path and paths.count(path) > 1:
            raise ConfigError(f"Two sockets are to listen at {path}", "give each its own path")


def _check_devices(config: VmConfig) -> None:
    ids: set[str] = set()
    drives: set[str] = set()
    for device in config.devices:
        if device.id and device.id in ids:
            raise ConfigError(f"-device {device.driver}: Device id {device.id} existed",
                              "give each device an id of its own")
        ids.add(device.id)
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
        thread = device.options.get("iothread")
        if thread and config.objects.get(thread, {}).get("qom-type") != "iothread":
            raise ConfigError(f"-device {device.driver}: there is no iothread '{thread}'",
                              f"add -object iothread,id={thread}")


def _check_chardevs(config: VmConfig) -> None:
    users = [("-serial", config.serial)] if config.serial is not None else []
    users += [(f"-device {device.driver}", device.options["chardev"])
              for device in config.devices if "chardev" in device.options]
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
