"""The command line: a table of options, and `parse`, which makes a `VmConfig` of it.

StratoVirt's grammar: one dash, options in any order, sub-options parted by commas.  No
`argparse`: a typical command line takes well under a millisecond.
"""

from __future__ import annotations

from vmm.config import backends, devices, machine
from vmm.config.model import VmConfig
from vmm.errors import ConfigError

TYPE_CHECKING = False  # importing typing would cost 10 ms of the start
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Handler = Callable[[VmConfig, str], None]

VERSION = "0.1.0"
VERSION_TEXT = f"StratoVirt 2.5.0 compatible: stratovmm {VERSION}"


class Answer(Exception):
    """Not an error: the command line asked for a text (`-help`, `-version`)."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text


VALUE, FLAG, OPTIONAL = range(3)


class Option:
    """One option: how its value comes, whether it may repeat, who reads it, what -help says."""

    __slots__ = ("arity", "handler", "help", "repeat")

    def __init__(self, arity: int, handler: Handler, help: str, repeat: bool = False) -> None:
        self.arity = arity
        self.handler = handler
        self.help = help
        self.repeat = repeat


def _ignore(config: VmConfig, text: str) -> None:
    """What managers pass and what means nothing here (stratovirt-behaviour, 2.3)."""


def _sandbox(config: VmConfig, text: str) -> None:
    if text == "help":
        from shared.sandbox.probe import help_text as sandbox_help

        raise Answer(sandbox_help())
    machine.parse_sandbox(config, text)


def _kernel(config: VmConfig, text: str) -> None:
    config.boot.kernel = _path("-kernel", text)


def _initrd(config: VmConfig, text: str) -> None:
    config.boot.initrd = _path("-initrd", text)


def _append(config: VmConfig, text: str) -> None:
    config.boot.append = f"{config.boot.append} {text}".strip()


def _mem_path(config: VmConfig, text: str) -> None:
    config.memory.path = _path("-mem-path", text)


def _mem_prealloc(config: VmConfig, text: str) -> None:
    config.memory.prealloc = True


def _frozen(config: VmConfig, text: str) -> None:
    config.frozen = True


def _log(config: VmConfig, text: str) -> None:
    config.log = text


def _daemonize(config: VmConfig, text: str) -> None:
    config.daemonize = True


def _pidfile(config: VmConfig, text: str) -> None:
    config.pidfile = _path("-pidfile", text)


def _incoming(config: VmConfig, text: str) -> None:
    raise ConfigError(f"-incoming {text}: snapshots and migration are not supported yet",
                      "start the VM without -incoming")


def _numa(config: VmConfig, text: str) -> None:
    raise ConfigError(f"-numa {text}: NUMA nodes are not supported yet", "remove it")


def _help(config: VmConfig, text: str) -> None:
    raise Answer(help_text())


def _version(config: VmConfig, text: str) -> None:
    raise Answer(f"{VERSION_TEXT}\n")


def _path(option: str, text: str) -> str:
    if not text or "\0" in text or len(text) > 4095:
        raise ConfigError(f"{option} {text[:40]}: not a path", "name a file")
    return text


OPTIONS: dict[str, Option] = {
    "machine": Option(VALUE, machine.parse_machine, "microvm|none[,dump-guest-core=on|off]"
                      "[,mem-share=on|off]"),
    "kernel": Option(VALUE, _kernel, "FILE: bzImage, ELF vmlinux or raw image"),
    "initrd": Option(VALUE, _initrd, "FILE: initial RAM disk"),
    "append": Option(VALUE, _append, "TEXT: kernel command line", repeat=True),
    "smp": Option(VALUE, machine.parse_smp, "[cpus=]N[,maxcpus=][,sockets=][,dies=][,clusters=]"
                  "[,cores=][,threads=]"),
    "cpu": Option(VALUE, machine.parse_cpu, "host[,pmu=on|off]"),
    "m": Option(VALUE, machine.parse_memory, "[size=]N[K|M|G]: guest memory, MiB by default"),
    "mem-path": Option(VALUE, _mem_path, "PATH: file or folder behind guest memory"),
    "mem-prealloc": Option(FLAG, _mem_prealloc, "allocate guest memory at start"),
    "drive": Option(VALUE, backends.parse_drive, "id=,file=[,readonly=][,direct=][,aio=native|"
                    "io_uring|threads|off][,discard=ignore|unmap]: a block back end", repeat=True),
    "device": Option(VALUE, devices.parse_device, "DRIVER[,id=],…: virtio-blk-device,drive= | "
                     "virtio-net-device,netdev= | vhost-user-blk-device,chardev= | "
                     "virtio-rng-device,rng= | virtio-serial-device | virtconsole,chardev= | "
                     "virtserialport,chardev=", repeat=True),
    "netdev": Option(VALUE, backends.parse_netdev, "tap,id=,ifname=|fd=|fds=[,queues=]"
                     "[,rx-packets=][,rx-bytes=][,tx-packets=][,tx-bytes=] | vhost-user,id=,"
                     "chardev=: a network back end", repeat=True),
    "chardev": Option(VALUE, backends.parse_chardev, "stdio|pty|file|socket|null,id=,…",
                      repeat=True),
    "serial": Option(VALUE, backends.parse_serial, "stdio|pty|file,path=|socket,path=|"
                     "chardev:ID: where the serial port goes"),
    "object": Option(VALUE, backends.parse_object, "TYPE,id=,…", repeat=True),
    "qmp": Option(VALUE, backends.parse_qmp, "unix:PATH,server,nowait | tcp:HOST:PORT,server,"
                  "nowait"),
    "mon": Option(VALUE, backends.parse_mon, "chardev=ID,mode=control", repeat=True),
    "name": Option(VALUE, machine.parse_name, "NAME"),
    "uuid": Option(VALUE, machine.parse_uuid, "UUID"),
    "accel": Option(VALUE, machine.parse_accel, "kvm"),
    "S": Option(FLAG, _frozen, "start paused; cont starts the guest"),
    "freeze": Option(FLAG, _frozen, "the same"),
    "D": Option(OPTIONAL, _log, "[FILE]: log to a file, or to standard output"),
    "pidfile": Option(VALUE, _pidfile, "FILE: gets the process id"),
    "daemonize": Option(FLAG, _daemonize, "go to the background once the VM is set up"),
    "sandbox": Option(VALUE, _sandbox, "on|off | on,STAGE=off | help: which stages there are"),
    "disable-seccomp": Option(FLAG, _ignore, "accepted, changes nothing"),
    "global": Option(VALUE, machine.parse_global, "DRIVER.PROPERTY=VALUE", repeat=True),
    "incoming": Option(VALUE, _incoming, "not supported yet"),
    "numa": Option(VALUE, _numa, "not supported yet", repeat=True),
    "version": Option(FLAG, _version, "this version"),
    "V": Option(FLAG, _version, "the same"),
    "help": Option(FLAG, _help, "this text"),
    "h": Option(FLAG, _help, "the same"),
}
# Accepted with or without a value, and without effect.
OPTIONS |= {name: Option(OPTIONAL, _ignore, "", repeat=True) for name in (
    "overcommit", "no-user-config", "nodefaults", "msg", "rtc", "boot", "nographic", "realtime",
    "display", "usb", "no-shutdown", "smbios", "trace", "hardware-signature", "no-reboot")}


def help_text() -> str:
    """What `-help` prints."""
    lines = ["usage: stratovirt [-OPTION [VALUE]]...", ""]
    lines += [f"  -{name:<16} {option.help}" for name, option in OPTIONS.items() if option.help]
    return "\n".join(lines) + "\n"


def parse(arguments: Sequence[str]) -> VmConfig:
    """The configuration that a command line asks for.

    :raises ConfigError: one line that names option, value and remedy.
    :raises Answer: it asked for a text.
    """
    config = VmConfig()
    seen: set[str] = set()
    at = 0
    while at < len(arguments):
        word = arguments[at]
        option = OPTIONS.get(word[1:]) if word.startswith("-") else None
        if option is None:
            raise ConfigError(f"Found argument '{word[:100]}' which wasn't expected, or isn't "
                              "valid in the context", "-help lists the options")
        if word in seen and not option.repeat:
            raise ConfigError(f"The argument '{word}' was provided more than once", "remove one")
        seen.add(word)
        at += 1
        value = ""
        if option.arity != FLAG and at < len(arguments) and not arguments[at].startswith("-"):
            value = arguments[at]
            at += 1
        elif option.arity == VALUE:
            raise ConfigError(f"The argument '{word}' requires a value, but none was supplied",
                              f"write {word} {option.help}")
        option.handler(config, value)
    from vmm.config.checks import check

    check(config)
    return config
