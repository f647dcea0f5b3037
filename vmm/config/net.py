"""`-netdev` and `-device virtio-net-device`."""

from __future__ import annotations

from shared.errors import StratovirtError
from shared.tap import MAX_QUEUES, check_name
from shared.virtio.net import MAX_MTU, MIN_MTU
from vmm.config.model import NET_LIMITS, NetdevConfig
from vmm.net.mac import parse_mac

TYPE_CHECKING = False  # importing typing would cost 10 ms of the start
if TYPE_CHECKING:
    from vmm.config.model import VmConfig
    from vmm.config.options import SubOptions

MAX_RATE = 1 << 50  # packets or bytes a second
MIN_QUEUE_SIZE, MAX_QUEUE_SIZE, QUEUE_SIZE = 256, 1024, 256


def read_netdev(config: VmConfig, options: SubOptions) -> NetdevConfig:
    """`tap|vhost-user,id=,…`."""
    kind = options.take_choice("type", ("tap", "vhost-user"))
    netdev = NetdevConfig(options.take_id(), kind)
    if kind == "tap":
        _read_tap(config, options, netdev)
    else:
        netdev.chardev = options.take("chardev")
        if options.take_int("queues", 1, MAX_QUEUES, 1) != 1:
            raise options.error("a foreign back end has one queue pair: its control queue isn't "
                                "offered", "remove queues")
        if "vhost" in options.values:
            raise options.error("vhost-user netdev does not support 'vhost' option", "remove it")
        options.ignore("vhostforce", "path")
    options.finish()
    return netdev


def _read_tap(config: VmConfig, options: SubOptions, netdev: NetdevConfig) -> None:
    _read_descriptors(options, netdev)
    netdev.ifname = options.take("ifname", "")
    if netdev.fds and netdev.ifname:
        raise options.error("fd is conflict with ifname", "give one of them")
    if not netdev.fds and not netdev.ifname:
        raise options.error("Tap device is missing, use 'ifname' or 'fd' to configure a tap "
                            "device", "add ifname=TAP")
    if netdev.ifname:
        try:
            check_name(netdev.ifname)
        except StratovirtError as error:
            raise options.error(error.what, error.hint) from None
    queues = len(netdev.fds) or 1
    netdev.queues = options.take_int("queues", 1, MAX_QUEUES, queues)
    if netdev.fds and netdev.queues != queues:
        raise options.error(f"{queues} descriptors, but queues={netdev.queues}",
                            "hand over a descriptor for each queue")
    if options.take_bool("vhost", False):
        config.warnings.append(f"-netdev tap,id={netdev.id}: vhost=on: the net worker serves the "
                               "tap, not the kernel's vhost")
    for name in NET_LIMITS:
        value = options.take_int(name, 0, MAX_RATE, 0)
        if value:
            netdev.limits[name] = value
    options.ignore("vhostfd", "vhostfds", "vhostforce", "script", "downscript", "dnssearch",
                   "sndbuf", "poll-us", "br", "helper")


def _read_descriptors(options: SubOptions, netdev: NetdevConfig) -> None:
    single, several = options.take("fd", ""), options.take("fds", "")
    if single and several:
        raise options.error("fd is conflict with fds", "give one of them")
    texts = [single] if single else several.split(":") if several else []
    if len(texts) > MAX_QUEUES:
        raise options.error(f"The num of fd {len(texts)} is bigger than max queue num "
                            f"{MAX_QUEUES}", "hand fewer over")
    for text in texts:
        if not text.isascii() or not text.isdigit() or len(text) > 7:
            raise options.error(f"Failed to parse fd: {text[:40]}", "write a number")
        if int(text) in netdev.fds:
            raise options.error(f"the descriptor {text} is given twice", "give each once")
        netdev.fds.append(int(text))


def read_nic(options: SubOptions) -> dict[str, str]:
    """What `-device virtio-net-device` says beside driver and id."""
    kept = {"netdev": options.take("netdev"), "mac": options.take("mac", "")}
    if kept["mac"] and parse_mac(kept["mac"]) is None:
        raise options.error("Mac address is illegal.", "write six bytes of a unicast address, as "
                            "52:54:00:12:34:56")
    size = options.take_int("queue-size", MIN_QUEUE_SIZE, MAX_QUEUE_SIZE, QUEUE_SIZE)
    if size & (size - 1):
        raise options.error("Virtqueue size should be power of 2!", "use 256, 512 or 1024")
    kept["queue-size"] = str(size)
    mtu = options.take_int("host_mtu", 0, MAX_MTU, 0)
    if mtu and mtu < MIN_MTU:
        raise options.error(f"'host_mtu={mtu}' is too small", f"{MIN_MTU} to {MAX_MTU}")
    kept["host_mtu"] = str(mtu)
    options.take_bool("mq", False)  # as many queue pairs as the netdev has
    options.ignore("vectors", "rx-iothread", "tx-iothread", "romfile")
    return kept
