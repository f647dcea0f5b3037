"""Whole command lines: the manual's, the managers', every option in any order."""

from __future__ import annotations

import random
import shlex
from pathlib import Path

import pytest

from vmm import cli
from vmm.errors import ConfigError

QMP = "-qmp unix:/run/q.sock,server,nowait"

MANUAL = f"""-machine microvm -kernel /path/to/kernel -smp 1 -m 1024
 -append "console=ttyS0 pci=off reboot=k quiet panic=1 root=/dev/vda"
 -drive file=/path/to/rootfs,id=rootfs,readonly=off,direct=off
 -device virtio-blk-device,drive=rootfs {QMP} -serial stdio"""

# Kata's order and options (managers.md), with the devices of a microVM that has a disk.
KATA = """-name sandbox-4f1 -uuid 12345678-90ab-CDEF-1234-567890abcdef -smp 2 -m 512
 -kernel /opt/vmlinux -append "root=/dev/vda1 reboot=k panic=1 pci=off iommu=off acpi=off"
 -qmp unix:/run/vc/vm/x/qmp.socket,server,nowait -D -disable-seccomp
 -machine type=microvm,dump-guest-core=off,mem-share=on
 -object rng-random,id=objrng0,filename=/dev/urandom
 -device virtio-blk-device,drive=rootfs,id=virtio-blk0
 -drive id=rootfs,file=/opt/kata.img,readonly=on,direct=off
 -chardev socket,id=charconsole0,path=/run/vc/vm/x/console.socket,server,nowait"""

LIBVIRT = """-S -no-user-config -nodefaults -nographic -machine none,accel={accel}
 -qmp unix:/var/lib/libvirt/qemu/qmp-XXXXXX/qmp.monitor,server=on,wait=off
 -pidfile /var/lib/libvirt/qemu/qmp-XXXXXX/qmp.pid -daemonize"""

EVERYTHING = [
    ["-machine", "microvm"], ["-kernel", "/k"], ["-initrd", "/i"], ["-append", "quiet"],
    ["-smp", "cpus=2,maxcpus=4,sockets=1,dies=1,clusters=1,cores=2,threads=2"],
    ["-cpu", "host"], ["-m", "1G"], ["-mem-path", "/dev/hugepages"], ["-mem-prealloc"],
    ["-drive", "id=d,file=/disk,aio=io_uring"], ["-device", "virtio-blk-device,drive=d,id=b"],
    ["-chardev", "socket,id=mon,path=/run/mon.sock,server,nowait"],
    ["-mon", "chardev=mon,mode=control"], ["-qmp", "tcp:127.0.0.1:4444,server,nowait"],
    ["-chardev", "pty,id=console"], ["-serial", "chardev:console"], ["-name", "vm"],
    ["-uuid", "12345678-90ab-cdef-1234-567890abcdef"], ["-accel", "kvm"], ["-S"],
    ["-D", "/var/log/vm"], ["-pidfile", "/run/vm.pid"], ["-daemonize"],
    ["-sandbox", "on,landlock=off"], ["-disable-seccomp"],
    ["-global", "pcie-root-port.fast-unplug=1"], ["-object", "iothread,id=io1"],
    ["-overcommit", "mem-lock=off"], ["-no-user-config"], ["-nodefaults"],
    ["-msg", "timestamp=on"], ["-rtc", "base=utc"], ["-boot", "strict=on"], ["-nographic"],
    ["-display", "none"], ["-usb"], ["-no-shutdown"], ["-no-reboot"],
]


def parse(text: str) -> cli.VmConfig:
    return cli.parse(shlex.split(text))


def test_the_manuals() -> None:
    config = parse(MANUAL)
    assert config.boot.kernel == "/path/to/kernel"
    assert config.boot.append == "console=ttyS0 pci=off reboot=k quiet panic=1 root=/dev/vda"
    assert config.memory.size == 1 << 30
    assert config.cpu.count == 1
    drive = config.drives["rootfs"]
    assert (drive.file, drive.readonly, drive.direct) == ("/path/to/rootfs", False, False)
    assert config.devices[0].options["drive"] == "rootfs"
    assert config.monitors[0].path == "/run/q.sock"
    assert config.serial is not None and config.chardevs[config.serial].kind == "stdio"


def test_katas() -> None:
    config = parse(KATA)
    assert config.log == "" and config.name == "sandbox-4f1"
    assert config.uuid == "12345678-90ab-cdef-1234-567890abcdef"
    assert not config.machine.dump_guest_core and config.machine.mem_share
    assert config.drives["rootfs"].readonly
    assert config.chardevs["charconsole0"].server
    assert not config.warnings


@pytest.mark.parametrize("accel", ["kvm:tcg", "tcg"])
def test_libvirts_probe(accel: str) -> None:
    config = parse(LIBVIRT.format(accel=accel))
    assert config.machine.kind == "none" and config.daemonize and config.frozen
    assert config.pidfile == "/var/lib/libvirt/qemu/qmp-XXXXXX/qmp.pid"


def test_libvirts_options_of_a_domain() -> None:
    config = parse(f"""-name guest=d1,debug-threads=on -kernel K {QMP}
     -object {{"qom-type":"secret","id":"masterKey0","format":"raw","file":"/aes"}}
     -machine microvm,usb=off,dump-guest-core=off,memory-backend=pc.ram -accel kvm
     -cpu host,migratable=on -m 512
     -object {{"qom-type":"memory-backend-ram","id":"pc.ram","size":536870912}}
     -smp 1,maxcpus=2,sockets=2,cores=1,threads=1
     -sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny
     -chardev socket,id=charmonitor,fd=32,server=on,wait=off
     -mon chardev=charmonitor,id=monitor,mode=control
     -serial pty -drive if=none,id=d,file=/i,format=raw
     -device {{"driver":"virtio-blk-device","drive":"d","id":"v0","bootindex":1}}
     """.replace('{"', "'{\"").replace('"}', "\"}'").replace("1}", "1}'").replace("2}", "2}'"))
    assert config.name == "d1"
    assert (config.cpu.count, config.cpu.max_cpus, config.cpu.sockets) == (1, 2, 2)
    assert sorted(m.kind for m in config.monitors) == ["fd", "unix"]
    assert config.sandbox.enabled and not config.sandbox.off_stages
    assert config.devices[0].id == "v0"


def test_every_option_in_any_order() -> None:
    shuffler = random.Random(7)
    groups = list(EVERYTHING)
    for _ in range(50):
        shuffler.shuffle(groups)
        config = cli.parse([word for group in groups for word in group])
        assert config.cpu.max_cpus == 4 and config.memory.size == 1 << 30
        assert config.frozen and config.daemonize and config.log == "/var/log/vm"
        assert {m.kind for m in config.monitors} == {"unix", "tcp"}
        assert list(config.chardevs) == ["console"]
        assert config.sandbox.off_stages == ("landlock",)


def test_several_appends_are_joined() -> None:
    assert parse(f"-append a=1 -kernel k {QMP} -append 'b c'").boot.append == "a=1 b c"


def test_defaults() -> None:
    config = parse(f"-kernel k {QMP}")
    assert (config.machine.kind, config.memory.size, config.cpu.count) == ("microvm", 256 << 20, 1)
    assert config.log is None and config.serial is None and not config.frozen
    assert config.sandbox.enabled


@pytest.mark.parametrize("word", ["-help", "-h", "-version", "-V"])
def test_texts(word: str) -> None:
    with pytest.raises(cli.Answer) as caught:
        parse(f"-name x {word}")
    assert ("-kernel" if word[1] == "h" else cli.VERSION) in caught.value.text


def test_the_sandboxs_stages_are_told() -> None:
    # Each is tried in a child of this process, whose handlers of signals it inherits.
    with pytest.raises(cli.Answer) as caught:
        parse("-sandbox help")
    assert "landlock" in caught.value.text


def test_every_option_of_help_is_in_the_manual_page() -> None:
    page = (Path(__file__).parents[4] / "docs" / "command-line.md").read_text()
    for name in cli.OPTIONS:
        assert f"`-{name}`" in page or f"`-{name} " in page, name


@pytest.mark.parametrize(("line", "says"), [
    ("-foo", "Found argument '-foo'"),
    ("--kernel k", "Found argument '--kernel'"),
    ("-kernel=k", "Found argument '-kernel=k'"),
    ("kernel", "Found argument 'kernel'"),
    ("-smp 1 2", "Found argument '2'"),
    ("-S on", "Found argument 'on'"),
    ("-kernel", "'-kernel' requires a value"),
    ("-kernel -initrd", "'-kernel' requires a value"),
    ("-kernel a -kernel b", "'-kernel' was provided more than once"),
    ("-S -S", "'-S' was provided more than once"),
    ("-serial stdio -serial pty", "'-serial' was provided more than once"),
    ("-kernel ''", "-kernel"),
    ("-pidfile ''", "-pidfile"),
    ("-incoming file:/x", "-incoming file:/x"),
    ("-numa node", "-numa node"),
    ("-netdev tap,id=n", "Tap device is missing"),
])
def test_bad_words(line: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(line)
    assert says in caught.value.what
    assert caught.value.hint
