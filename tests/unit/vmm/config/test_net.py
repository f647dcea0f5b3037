"""`-netdev` and `-device virtio-net-device`: every option, and what each refuses."""

from __future__ import annotations

import shlex

import pytest

from vmm import cli
from vmm.config.model import DeviceConfig, NetdevConfig, VmConfig
from vmm.errors import ConfigError

BASE = "-kernel /k -qmp unix:/run/q.sock,server,nowait"
NIC = "-device virtio-net-device,netdev=n"


def parse(text: str) -> VmConfig:
    return cli.parse(shlex.split(f"{BASE} {text}"))


def netdev(options: str) -> NetdevConfig:
    return parse(f"-netdev {options},id=n {NIC}").netdevs["n"]


def nic(options: str) -> DeviceConfig:
    return parse(f"-netdev tap,id=n,ifname=t {NIC}{options}").devices[0]


# ---- -netdev -------------------------------------------------------------------------------------


def test_a_tap_by_name() -> None:
    found = netdev("tap,ifname=tap0")
    assert (found.id, found.kind, found.ifname, found.fds) == ("n", "tap", "tap0", [])
    assert (found.queues, found.limits, found.chardev) == (1, {}, "")
    assert netdev("tap,ifname=tap0,queues=16").queues == 16
    assert netdev("type=tap,ifname=tap0").kind == "tap"


def test_taps_by_descriptor() -> None:
    assert netdev("tap,fd=7").fds == [7]
    found = netdev("tap,fds=4:5:12,queues=3")
    assert (found.fds, found.queues, found.ifname) == ([4, 5, 12], 3, "")
    assert netdev("tap,fds=9").queues == 1


def test_limits() -> None:
    found = netdev("tap,ifname=t,rx-packets=1,rx-bytes=0,tx-packets=0x10,tx-bytes=1125899906842624")
    assert found.limits == {"rx-packets": 1, "tx-packets": 16, "tx-bytes": 1 << 50}


def test_what_is_accepted_and_means_nothing() -> None:
    assert netdev("tap,ifname=t,script=no,downscript=/x,vhostfd=4,vhostfds=4:5,vhostforce=on,"
                  "sndbuf=0,poll-us=10,br=b,helper=h,dnssearch=d").ifname == "t"
    config = parse(f"-netdev tap,id=n,ifname=t,vhost=on {NIC}")
    assert "the net worker serves the tap" in config.warnings[0]
    assert not parse(f"-netdev tap,id=n,ifname=t,vhost=off {NIC}").warnings


def test_json() -> None:
    """As libvirt writes it."""
    config = parse("""-netdev '{"type":"tap","fd":"33","id":"hostnet0"}' """
                   """-device '{"driver":"virtio-net-device","netdev":"hostnet0","id":"net0",""" """
                   "mac":"52:54:00:01:02:03"}'""".replace("\n", "").replace(" " * 19, ""))
    assert config.netdevs["hostnet0"].fds == [33]
    assert config.devices[0].options["mac"] == "52:54:00:01:02:03"


def test_a_foreign_back_end() -> None:
    config = parse(f"-chardev socket,id=c,path=/s -netdev vhost-user,id=n,chardev=c,queues=1,"
                   f"vhostforce=on {NIC}")
    found = config.netdevs["n"]
    assert (found.kind, found.chardev, found.queues) == ("vhost-user", "c", 1)


@pytest.mark.parametrize(("options", "text"), [
    ("user", "use tap, vhost-user"), ("bridge,br=b", "use tap, vhost-user"),
    ("tap", "Tap device is missing"), ("tap,ifname=", "Tap device is missing"),
    ("tap,ifname=a/b", "can't be the name"), ("tap,ifname=" + "x" * 16, "can't be the name"),
    ("tap,ifname=t,fd=4", "fd is conflict with ifname"), ("tap,fd=4,fds=5", "conflict with fds"),
    ("tap,fd=x", "Failed to parse fd"), ("tap,fd=-1", "Failed to parse fd"),
    ("tap,fds=4:", "Failed to parse fd"), ("tap,fds=4::5", "Failed to parse fd"),
    ("tap,fd=\u0664", "Failed to parse fd"), ("tap,fd=99999999", "Failed to parse fd"),
    ("tap,fds=4:4", "given twice"), ("tap,fds=" + ":".join(map(str, range(3, 20))), "max queue"),
    ("tap,fds=4:5,queues=3", "2 descriptors, but queues=3"),
    ("tap,fd=4,queues=2", "1 descriptors, but queues=2"),
    ("tap,ifname=t,queues=0", "from 1 to 16"), ("tap,ifname=t,queues=17", "from 1 to 16"),
    ("tap,ifname=t,vhost=perhaps", "neither on nor off"),
    ("tap,ifname=t,rx-packets=-1", "rx-packets"), ("tap,ifname=t,tx-bytes=fast", "tx-bytes"),
    ("tap,ifname=t,rx-bytes=1125899906842625", "rx-bytes"),
    ("tap,ifname=t,colour=red", "no sub-option 'colour'"),
    ("tap,ifname=t,chardev=c", "no sub-option 'chardev'"),
    ("vhost-user", "'chardev' is missing"), ("vhost-user,chardev=c,queues=2", "one queue pair"),
    ("vhost-user,chardev=c,vhost=on", "does not support 'vhost'"),
    ("vhost-user,chardev=c,ifname=t", "no sub-option 'ifname'"),
    ("vhost-user,chardev=c", "c"),
])
def test_netdevs_that_are_refused(options: str, text: str) -> None:
    with pytest.raises(ConfigError, match=r"-netdev|-device") as caught:
        netdev(options)
    assert text in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(("line", "text"), [
    ("-netdev tap,ifname=t", "'id' is missing"), ("-netdev tap,id=,ifname=t", "printable"),
    ("-netdev tap,id=#x,ifname=t", "begins with '#'"),
    ("-netdev tap,id=n,ifname=t -netdev tap,id=n,ifname=u", 'Netdev "n" has been added'),
    ("-netdev tap,id=a,ifname=t -netdev tap,id=b,ifname=t", "netdev 'a' has the tap 't' already"),
    ("-netdev tap,id=a,fds=4:5 -netdev tap,id=b,fd=5", "netdev 'a' has the descriptor 5 already"),
    (f"-netdev tap,id=m,ifname=t {NIC}", 'Netdev: "n" not found'),
    (f"-netdev tap,id=n,ifname=t {NIC} {NIC}", "serves another device already"),
    (f"-chardev socket,id=c,path=/s -netdev vhost-user,id=n,chardev=c {NIC} "
     "-netdev vhost-user,id=m,chardev=c -device virtio-net-device,netdev=m", "c"),
    (f"-chardev socket,id=c,path=/s -netdev vhost-user,id=n,chardev=c {NIC} "
     "-serial chardev:c", "c"),
])
def test_what_does_not_go_together(line: str, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(line)
    assert text in str(caught.value)


def test_a_netdev_that_no_device_uses_waits_for_one() -> None:
    assert list(parse("-netdev tap,id=n,ifname=t").netdevs) == ["n"]


# ---- -device virtio-net-device -------------------------------------------------------------------


def test_a_nic() -> None:
    found = nic("")
    assert found.driver == "virtio-net-device" and found.id == ""
    assert found.options["netdev"] == "n" and found.options["mac"] == ""
    assert found.options["queue-size"] == "256" and found.options["host_mtu"] == "0"
    found = nic(",id=eth0,mac=52:54:00:AB:cd:01,queue-size=1024,host_mtu=68,mq=on,bootindex=1,"
                "vectors=4,rx-iothread=a,tx-iothread=b,romfile=")
    assert (found.id, found.options["mac"]) == ("eth0", "52:54:00:AB:cd:01")
    assert (found.options["queue-size"], found.options["host_mtu"]) == ("1024", "68")


@pytest.mark.parametrize(("options", "text"), [
    (",mac=52:54:00:12:34", "Mac address is illegal"), (",mac=1", "Mac address is illegal"),
    (",mac=01:00:5e:00:00:01", "unicast"), (",mac=00:00:00:00:00:00", "Mac address is illegal"),
    (",mac=52-54-00-12-34-56", "Mac address is illegal"),
    (",queue-size=128", "256"), (",queue-size=2048", "1024"), (",queue-size=300", "power of 2"),
    (",host_mtu=67", "too small"), (",host_mtu=65536", "65535"), (",mq=2", "mq"),
    (",bus=pcie.0", "Should not set bus"), (",addr=0x1", "Should not set addr"),
    (",multifunction=on", "Should not set multifunction"), (",speed=9", "no sub-option 'speed'"),
    (",iothread=i", "no iothread 'i'"),
])
def test_nics_that_are_refused(options: str, text: str) -> None:
    with pytest.raises(ConfigError, match="-device") as caught:
        nic(options)
    assert text in str(caught.value)


def test_a_nic_without_netdev() -> None:
    with pytest.raises(ConfigError, match="'netdev' is missing"):
        parse("-device virtio-net-device")


def test_two_nics_with_one_address() -> None:
    line = "-netdev tap,id={0},ifname={0} -device virtio-net-device,netdev={0},mac={1} "
    with pytest.raises(ConfigError, match="another NIC has the address 52:54:00:00:00:0a"):
        parse(line.format("a", "52:54:00:00:00:0a") + line.format("b", "52:54:00:00:00:0A"))
    both = parse(line.format("a", "52:54:00:00:00:0a") + line.format("b", "52:54:00:00:00:0b"))
    assert len(both.devices) == 2
