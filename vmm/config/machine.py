"""`-machine`, `-accel`, `-cpu`, `-smp`, `-m` and the other options that shape the machine."""

from __future__ import annotations

from vmm.config.options import SubOptions, parse_size
from vmm.errors import ConfigError

TYPE_CHECKING = False  # importing typing would cost 10 ms of the start
if TYPE_CHECKING:
    from vmm.config.model import CpuConfig, VmConfig

MAX_CPUS = 254
MIN_MEMORY = 128 << 20
MAX_MEMORY = 512 << 30
# As shared/sandbox/stages.py names them, which is imported only when a worker is.
SANDBOX_STAGES = ("user", "mount", "net", "ipc", "uts", "pid", "uid", "capabilities", "limits",
                  "landlock", "io-uring", "seccomp")
_GLOBALS = ("pcie-root-port.fast-unplug",)
_QEMU_SANDBOX = ("obsolete", "elevateprivileges", "spawn", "resourcecontrol")


def parse_machine(config: VmConfig, text: str) -> None:
    """`-machine [type=]microvm,…`."""
    options = SubOptions("-machine", text, ("type",))
    kind = options.take("type", "microvm").lower()
    if kind in ("q35", "virt") or kind.startswith("pc-"):
        raise options.error(f"machine type '{kind}' is not supported yet", "use microvm")
    if kind not in ("microvm", "none"):
        raise options.error("Invalid machine type.", "use microvm or none")
    machine = config.machine
    machine.kind = kind
    machine.dump_guest_core = options.take_bool("dump-guest-core", True)
    machine.mem_share = options.take_bool("mem-share", True)
    if "accel" in options.values:
        machine.accel = _accelerator(options)
    options.take_choice("usb", ("off",), "off")
    machine.memory_backend = options.take("memory-backend", "")
    options.ignore("smm", "vmport", "hpet", "acpi")
    options.finish()


def parse_accel(config: VmConfig, text: str) -> None:
    """`-accel kvm`."""
    options = SubOptions("-accel", text, ("accel",))
    config.machine.accel = _accelerator(options)
    options.finish()


def _accelerator(options: SubOptions) -> str:
    """The first of `accel=kvm:tcg`. What a machine can do with it, checks.py says."""
    names = options.take("accel").split(":")
    for name in names:
        if name not in ("kvm", "tcg"):
            raise options.error(f"accelerator '{name}' is not supported", "use kvm")
    return names[0]


def parse_cpu(config: VmConfig, text: str) -> None:
    """`-cpu host[,pmu=on|off]`."""
    options = SubOptions("-cpu", text, ("model",))
    options.take_choice("model", ("host",))
    config.cpu.pmu = options.take_bool("pmu", False)
    options.ignore("sve", "kvm-steal-time", "migratable")
    options.finish()


def parse_smp(config: VmConfig, text: str) -> None:
    """`-smp [cpus=]N,maxcpus=,sockets=,dies=,clusters=,cores=,threads=`."""
    options = SubOptions("-smp", text, ("cpus",))
    cpu = config.cpu
    cpu.count = options.take_int("cpus", 1, MAX_CPUS)
    names: tuple[str, ...] = ("sockets", "dies", "clusters", "cores", "threads")
    given = {name: options.take_int(name, 1, MAX_CPUS) for name in names if name in options.values}
    limit = options.take_int("maxcpus", 1, 1 << 20, 0)
    options.finish()
    if limit and not cpu.count <= limit <= MAX_CPUS:
        raise options.error(f"MAX CPU number must be >= {cpu.count} and <= {MAX_CPUS}",
                            "correct maxcpus")
    _fill_topology(options, cpu, given, limit)


def _fill_topology(options: SubOptions, cpu: CpuConfig, given: dict[str, int],
                   limit: int) -> None:
    """Absent dimensions are 1, but one of sockets, cores, threads takes what is left over."""
    product = 1
    for value in given.values():
        product *= value
    total = limit or (max(cpu.count, product) if given else cpu.count)
    for name in ("dies", "clusters", "sockets", "cores", "threads"):
        setattr(cpu, name, given.get(name, 1))
    # Nothing given: one socket a CPU (the manual's query-cpus). Else cores come first.
    filler = next((n for n in (("sockets",) if not given else ("cores", "sockets", "threads"))
                   if n not in given), None)
    if filler is not None and total % product == 0:
        setattr(cpu, filler, total // product)
        product = total
    if product != total or total > MAX_CPUS or total < cpu.count:
        raise options.error("sockets * dies * clusters * cores * threads must be equal to "
                            f"max_cpus: {product} and {total}", "correct the topology")
    cpu.max_cpus = total


def parse_memory(config: VmConfig, text: str) -> None:
    """`-m [size=]N[KMG][,maxmem=N]`, MiB without a unit."""
    options = SubOptions("-m", text, ("size",))
    size = _take_size(options, "size")
    maximum = _take_size(options, "maxmem") if "maxmem" in options.values else 0
    options.ignore("slots")
    options.finish()
    if maximum and maximum <= size:
        raise options.error(f"maxmem ({maximum} bytes) must bigger than current memory size "
                            f"({size} bytes)", "correct maxmem or leave it out")
    complaint = check_memory_size(size) or check_memory_size(maximum or size)
    if complaint:
        raise options.error(complaint, "correct it")
    config.memory.size = size
    config.memory.given = True
    config.memory.max_size = maximum


def check_memory_size(size: int) -> str:
    """What is wrong with a size of guest RAM, "" if nothing is."""
    if not MIN_MEMORY <= size <= MAX_MEMORY:
        return (f"Memory size must >= 128MiB and <= 512GiB, default unit: MiB, current memory "
                f"size: {size} bytes")
    return f"{size} bytes are not a multiple of 4 KiB" if size % 4096 else ""


def _take_size(options: SubOptions, key: str) -> int:
    text = options.take(key)
    size = parse_size(text)
    if size is None:
        raise options.error(f"'{key}={text}' is not a size", "write a number with K, M or G")
    return size


def parse_sandbox(config: VmConfig, text: str) -> None:
    """`-sandbox on|off`, `-sandbox on,STAGE=off`, with QEMU's sub-options accepted."""
    options = SubOptions("-sandbox", text, ("enable",))
    config.sandbox.enabled = options.take_bool("enable", True)
    for key in _QEMU_SANDBOX:
        options.ignore(key)
    off = [name for name in SANDBOX_STAGES if not options.take_bool(name, True)]
    config.sandbox.off_stages = tuple(off) if config.sandbox.enabled else SANDBOX_STAGES
    options.finish()


def parse_global(config: VmConfig, text: str) -> None:
    """`-global DRIVER.PROPERTY=VALUE`."""
    key, equals, value = text.partition("=")
    if not equals or "." not in key:
        raise ConfigError(f"-global {text}: not DRIVER.PROPERTY=VALUE", "correct it")
    if key in config.globals:
        raise ConfigError(f"-global {text}: Global config {key} has been added", "give it once")
    if key not in _GLOBALS:
        config.warnings.append(f"-global {text}: no device here has this property")
    config.globals[key] = value


def parse_uuid(config: VmConfig, text: str) -> None:
    """`-uuid`: 8-4-4-4-12 hexadecimal digits."""
    parts = text.split("-")
    digits = "".join(parts)
    if ([len(p) for p in parts] != [8, 4, 4, 4, 12]
            or any(c not in "0123456789abcdefABCDEF" for c in digits)):
        raise ConfigError(f"-uuid {text}: not a UUID", "write 8-4-4-4-12 hexadecimal digits")
    config.uuid = text.lower()


def parse_name(config: VmConfig, text: str) -> None:
    """`-name NAME`, or libvirt's `guest=NAME,debug-threads=on`."""
    if text.startswith("guest="):
        text = text.removeprefix("guest=").split(",")[0]
    if not 0 < len(text) <= 255 or not text.isprintable():
        raise ConfigError(f"-name {text[:40]}: a name has 1 to 255 printable characters",
                          "choose another name")
    config.name = text
