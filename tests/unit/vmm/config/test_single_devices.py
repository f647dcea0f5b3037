"""`-device` of what has a slot for good: random bytes, consoles and ports."""

from __future__ import annotations

import shlex

import pytest

from vmm import cli
from vmm.config.model import VmConfig
from vmm.errors import ConfigError

BASE = "-kernel k -qmp unix:/q,server,nowait"
RNG = "-object rng-random,id=r,filename=/dev/urandom"
BUS = "-device virtio-serial-device"
KATA = """-object rng-random,id=objrng0,filename=/dev/urandom
 -device virtio-rng-device,rng=objrng0,id=virtio-rng0
 -device virtio-serial-device,id=virtio-serial0
 -chardev socket,id=charconsole0,path=/d/console.socket,server,nowait
 -device virtconsole,chardev=charconsole0,id=virtio-console0,nr=0"""


def parse(text: str) -> VmConfig:
    return cli.parse(shlex.split(f"{BASE} {text}"))


def refused(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(text)
    assert caught.value.hint
    return caught.value.what


def ports(text: str, chardevs: int = 4) -> list[tuple[str, str]]:
    """Each port's driver and number."""
    named = " ".join(f"-chardev null,id=c{i}" for i in range(chardevs))
    config = parse(f"{text} {named}")
    return [(device.driver, device.options["nr"]) for device in config.devices
            if "nr" in device.options]


def test_katas() -> None:
    config = parse(KATA)
    rng, bus, console = config.devices
    assert rng.options["rng"] == "objrng0"
    assert bus.options["max_ports"] == "1"
    assert console.options["nr"] == "0"
    assert console.options["chardev"] == "charconsole0"


# ---- random bytes ----------------------------------------------------------------------------

def test_the_object_may_follow() -> None:
    config = parse(f"-device virtio-rng-device,rng=r,id=x {RNG}")
    assert config.devices[0].options["max-bytes"] == ""


@pytest.mark.parametrize(("max_bytes", "period"), [
    (64, 1000), (1, 15), (1_000_000, 1), (4294967295, 4295), (100, 1562)])
def test_limits(max_bytes: int, period: int) -> None:
    config = parse(f"{RNG} -device virtio-rng-device,rng=r,max-bytes={max_bytes},period={period}")
    assert config.devices[0].options["period"] == str(period)


@pytest.mark.parametrize(("text", "says"), [
    ("-device virtio-rng-device", "'rng' is missing"),
    ("-device virtio-rng-device,rng=r", "no rng-random object 'r'"),
    ("-object iothread,id=r -device virtio-rng-device,rng=r", "no rng-random object 'r'"),
    ("-object rng-random,id=r -device virtio-rng-device,rng=r", "'filename' is missing"),
    (f"{RNG} -device virtio-rng-device,rng=r,max-bytes=64", "Simultaneously"),
    (f"{RNG} -device virtio-rng-device,rng=r,period=64", "Simultaneously"),
    (f"{RNG} -device virtio-rng-device,rng=r,max-bytes=63,period=1000", "must >= 64"),
    (f"{RNG} -device virtio-rng-device,rng=r,max-bytes=1000001,period=1", "<= 1000000000"),
    (f"{RNG} -device virtio-rng-device,rng=r,max-bytes=0,period=1", "'max-bytes=0'"),
    (f"{RNG} -device virtio-rng-device,rng=r,max-bytes=64,period=0", "'period=0'"),
    (f"{RNG} -device virtio-rng-device,rng=r,max-bytes=4294967296,period=9999", "'max-bytes="),
    (f"{RNG} -device virtio-rng-device,rng=r,colour=1", "no sub-option 'colour'"),
    (f"{RNG} -device virtio-rng-device,rng=r,bus=pci.0", "Should not set bus"),
    (f"{RNG} -device virtio-rng-device,rng=r,id=x -device virtio-rng-device,rng=r,id=x",
     "Device id x existed")])
def test_wrong_sources_of_random_bytes(text: str, says: str) -> None:
    assert says in refused(text)


def test_two_of_them() -> None:
    assert len(parse(f"{RNG} -device virtio-rng-device,rng=r,id=a "
                     "-device virtio-rng-device,rng=r,id=b").devices) == 2


# ---- consoles and ports ----------------------------------------------------------------------

@pytest.mark.parametrize(("text", "numbers"), [
    ("-device virtconsole,chardev=c0", ["0"]),
    ("-device virtserialport,chardev=c0", ["1"]),
    ("-device virtconsole,chardev=c0 -device virtconsole,chardev=c1", ["0", "1"]),
    ("-device virtserialport,chardev=c0 -device virtconsole,chardev=c1", ["1", "0"]),
    ("-device virtserialport,chardev=c0,nr=5 -device virtserialport,chardev=c1", ["5", "6"]),
    ("-device virtserialport,chardev=c0 -device virtserialport,chardev=c1,nr=5", ["6", "5"]),
    ("-device virtconsole,chardev=c0 -device virtconsole,chardev=c1,nr=0", ["1", "0"])])
def test_numbers_that_are_not_given(text: str, numbers: list[str]) -> None:
    assert [number for _, number in ports(f"{text} {BUS}")] == numbers


@pytest.mark.parametrize(("text", "limit"), [
    ("", 1), (f"{BUS},max_ports=7", 7),
    ("-device virtconsole,chardev=c,nr=3", 4), ("-device virtserialport,chardev=c", 2)])
def test_how_many_ports_there_can_be(text: str, limit: int) -> None:
    bus = "" if "max_ports" in text else BUS
    config = parse(f"{bus} {text} -chardev null,id=c" if "chardev" in text else f"{bus} {text}")
    found, = [d for d in config.devices if d.driver == "virtio-serial-device"]
    assert found.options["max_ports"] == str(limit)


def test_names() -> None:
    config = parse(f"{BUS} -chardev null,id=c -device "
                   "virtserialport,chardev=c,name=org.qemu.guest_agent.0,bus=virtio-serial0.0")
    assert config.devices[1].options["name"] == "org.qemu.guest_agent.0"


C = "-chardev null,id=c -chardev null,id=d"


@pytest.mark.parametrize(("text", "says"), [
    (f"{BUS} {BUS}", "Only one virtio serial device is supported"),
    (f"{C} -device virtconsole,chardev=c", "No virtio serial device specified"),
    (f"{C} {BUS} -device virtserialport,chardev=c,nr=0",
     "Port number 0 on virtio-serial devices reserved for virtconsole device."),
    (f"{C} {BUS} -device virtconsole,chardev=c,nr=2 -device virtserialport,chardev=d,nr=2",
     "Repetitive virtio serial port."),
    (f"{C} {BUS},max_ports=2 -device virtconsole,chardev=c,nr=2", "max_nr_ports 2"),
    (f"{C} {BUS},max_ports=1 -device virtserialport,chardev=c", "max_nr_ports 1"),
    (f"{C} {BUS} -device virtconsole,chardev=c,nr=31", "'nr=31'"),
    (f"{C} {BUS} -device virtconsole,chardev=c,nr=30 -device virtconsole,chardev=d,nr=0 "
     "-chardev null,id=e -device virtserialport,chardev=e", "max_nr_ports 31"),
    (f"{BUS},max_ports=0", "'max_ports=0'"), (f"{BUS},max_ports=32", "'max_ports=32'"),
    (f"{BUS} -device virtconsole", "'chardev' is missing"),
    (f"{BUS} -device virtconsole,chardev=c", 'Chardev "c" not found or is in use'),
    (f"{C} {BUS} -device virtconsole,chardev=c -device virtserialport,chardev=c",
     'Chardev "c" not found or is in use'),
    (f"{C} {BUS} -serial chardev:c -device virtconsole,chardev=c",
     'Chardev "c" not found or is in use'),
    (f"{C} {BUS} -device virtconsole,chardev=c,name={'n' * 256}", "'name'"),
    (f"{C} {BUS} -device virtconsole,chardev=c,colour=1", "no sub-option 'colour'"),
    (f"{C} {BUS},id=x -device virtconsole,chardev=c,id=x", "Device id x existed")])
def test_wrong_ports(text: str, says: str) -> None:
    assert says in refused(text)
