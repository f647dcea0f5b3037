"""The whole configuration of one VM, as plain values: what the parser makes and the machine reads.

Plain classes with `__slots__` and no `dataclasses`: this module loads before the first guest
instruction (ARCHITECTURE.md, "Start-up").  Sizes are bytes, ids are the user's strings.
Nothing here opens, checks or does anything; `vmm/config/parse.py` fills it in and
`vmm/config/checks.py` checks what crosses options.
"""

from __future__ import annotations

MIB = 1 << 20


class MachineConfig:
    """`-machine`: kind is "microvm", "q35" or "none"."""

    __slots__ = ("accel", "dump_guest_core", "kind", "mem_share", "memory_backend")

    def __init__(self) -> None:
        self.kind = "microvm"
        self.accel = "kvm"
        self.dump_guest_core = True
        self.mem_share = True
        self.memory_backend = ""


class CpuConfig:
    """`-smp` and `-cpu`. Without a topology: `count` sockets of one core each.

    sockets * dies * clusters * cores * threads == max_cpus always holds after parsing.
    """

    __slots__ = ("clusters", "cores", "count", "dies", "max_cpus", "model", "pmu", "sockets",
                 "threads")

    def __init__(self) -> None:
        self.model = "host"
        self.pmu = False
        self.count = 1
        self.max_cpus = 1
        self.sockets = 1
        self.dies = 1
        self.clusters = 1
        self.cores = 1
        self.threads = 1


class MemoryConfig:
    """`-m`, `-mem-path`, `-mem-prealloc`, or a memory backend. `path` is None for a sealed
    memfd, of pages of `huge_page_size` bytes if that isn't 0. given: there was a `-m`."""

    __slots__ = ("given", "huge_page_size", "max_size", "path", "prealloc", "size")

    def __init__(self) -> None:
        self.size = 256 * MIB
        self.given = False
        self.huge_page_size = 0
        self.max_size = 0
        self.path: str | None = None
        self.prealloc = False


class BootConfig:
    """`-kernel`, `-initrd`, `-append` (several joined with blanks)."""

    __slots__ = ("append", "initrd", "kernel")

    def __init__(self) -> None:
        self.kernel: str | None = None
        self.initrd: str | None = None
        self.append = ""


class DriveConfig:
    """`-drive` or `blockdev-add`: a block back end.

    aio is "auto" (io_uring where the host allows it, else threads), "io_uring", "threads",
    "native" (served as io_uring/threads) or "off".  discard is "ignore" or "unmap";
    detect_zeroes "off", "on" or "unmap"; throttling holds limits by name (shared/throttling.py).
    """

    __slots__ = ("aio", "detect_zeroes", "direct", "discard", "file", "format", "id",
                 "readonly", "throttling")

    def __init__(self, id: str, file: str) -> None:
        self.id = id
        self.file = file
        self.readonly = False
        self.direct = True
        self.aio = "auto"
        self.discard = "ignore"
        self.detect_zeroes = "off"
        self.format = "raw"
        self.throttling: dict[str, int] = {}


# Limits a second of a netdev: what the guest receives and what it sends.
NET_LIMITS = ("rx-packets", "rx-bytes", "tx-packets", "tx-bytes")


class NetdevConfig:
    """`-netdev` or `netdev_add`: a network back end.

    kind is "tap", by `ifname` or by open descriptors `fds`, `queues` queue pairs in all; or
    "vhost-user" by `chardev`.  limits: NET_LIMITS that are set.
    """

    __slots__ = ("chardev", "fds", "id", "ifname", "kind", "limits", "queues")

    def __init__(self, id: str, kind: str) -> None:
        self.id = id
        self.kind = kind
        self.ifname = ""
        self.fds: list[int] = []
        self.queues = 1
        self.chardev = ""
        self.limits: dict[str, int] = {}

    @property
    def option(self) -> str:
        """What the user wrote to have it, for errors."""
        return f"-netdev {self.kind},id={self.id}"


SERIAL_CHARDEV = "serial_chardev"  # the id of a chardev that -serial made in place


class ChardevConfig:
    """`-chardev`. kind: "stdio", "pty", "socket", "file", "null", "redirect-to-log".

    For a socket either `path` (unix), `host` and `port` (tcp) or `fd` (an inherited,
    listening or connected descriptor) is given; `server` listens, else it connects.
    """

    __slots__ = ("fd", "host", "id", "kind", "path", "port", "server", "wait")

    def __init__(self, id: str, kind: str) -> None:
        self.id = id
        self.kind = kind
        self.path = ""
        self.host = ""
        self.port = 0
        self.fd = -1
        self.server = False
        self.wait = False

    @property
    def option(self) -> str:
        """What the user wrote to have it, for errors: `-chardev pty,id=console`."""
        if self.id == SERIAL_CHARDEV:
            return f"-serial {self.kind}"
        return f"-chardev {self.kind},id={self.id}"


class MonitorConfig:
    """One QMP listener: `-qmp unix:…|tcp:…`, or `-mon chardev=…`.

    kind is "unix" (path), "tcp" (host, port) or "fd" (an inherited listening descriptor).
    `chardev` is the id of the chardev that `-mon` named, else empty.
    """

    __slots__ = ("chardev", "fd", "host", "kind", "path", "port")

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.path = ""
        self.host = ""
        self.port = 0
        self.fd = -1
        self.chardev = ""

    @property
    def option(self) -> str:
        """What the user wrote to have it, for errors."""
        if self.chardev:
            return f"-mon chardev={self.chardev}"
        return f"-qmp {self.kind}:{self.path or f'{self.host}:{self.port}'}"


class DeviceConfig:
    """`-device` or `device_add`: `driver` as given, `id` may be empty, the rest as strings.

    `options` holds the sub-options that the driver's table allows, checked for syntax and
    range by the parser (numbers stay decimal strings), e.g. {"drive": "rootfs",
    "num-queues": "2", "serial": "abc"}.
    """

    __slots__ = ("driver", "id", "options")

    def __init__(self, driver: str, id: str, options: dict[str, str]) -> None:
        self.driver = driver
        self.id = id
        self.options = options


class SandboxConfig:
    """`-sandbox`: on by default; `off_stages` are the stages given up by name."""

    __slots__ = ("enabled", "off_stages")

    def __init__(self) -> None:
        self.enabled = True
        self.off_stages: tuple[str, ...] = ()


class VmConfig:
    """Everything the command line said. `warnings` are one-line texts to log at start."""

    __slots__ = ("boot", "chardevs", "cpu", "daemonize", "devices", "drives", "frozen",
                 "globals", "incoming", "log", "machine", "memory", "monitors", "name", "netdevs",
                 "objects", "pidfile", "sandbox", "serial", "uuid", "warnings")

    def __init__(self) -> None:
        self.name = ""
        self.uuid = ""
        self.machine = MachineConfig()
        self.cpu = CpuConfig()
        self.memory = MemoryConfig()
        self.boot = BootConfig()
        self.drives: dict[str, DriveConfig] = {}
        self.netdevs: dict[str, NetdevConfig] = {}
        self.objects: dict[str, dict[str, str]] = {}
        self.devices: list[DeviceConfig] = []
        self.chardevs: dict[str, ChardevConfig] = {}
        self.monitors: list[MonitorConfig] = []
        self.serial: str | None = None  # id of the chardev behind the 16550
        self.incoming: str | None = None
        self.globals: dict[str, str] = {}
        self.frozen = False  # -S
        self.log: str | None = None  # None: no -D; "": standard output; else a path
        self.daemonize = False
        self.pidfile: str | None = None
        self.sandbox = SandboxConfig()
        self.warnings: list[str] = []
