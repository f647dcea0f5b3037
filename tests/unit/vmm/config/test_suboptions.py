"""The reader of sub-options, and the values that each option takes and refuses."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from vmm import cli
from vmm.config.options import SubOptions, parse_int, parse_size
from vmm.errors import ConfigError

if TYPE_CHECKING:
    from vmm.config.model import VmConfig

BASE = "-kernel /k -qmp unix:/run/q.sock,server,nowait"


def parse(text: str) -> VmConfig:
    return cli.parse(shlex.split(f"{BASE} {text}"))


@pytest.mark.parametrize(("text", "value"), [
    ("0", 0), ("12", 12), ("0x1f", 31), ("0X1F", 31), ("", None), ("-1", None), ("+1", None),
    ("1_0", None), ("0x", None), ("1.0", None), ("²", None), ("9" * 21, None), ("12a", None),
])
def test_integers(text: str, value: int | None) -> None:
    assert parse_int(text) == value


@pytest.mark.parametrize(("text", "value"), [
    ("1", 1 << 20), ("1k", 1 << 10), ("2K", 2 << 10), ("3m", 3 << 20), ("4G", 4 << 30),
    ("", None), ("K", None), ("1.5G", None), ("1T", None), ("-1", None), ("1KK", None),
    ("0x10", None), ("1\u212a", None), ("9" * 16, None),
])
def test_sizes(text: str, value: int | None) -> None:
    assert parse_size(text) == value


def test_bare_words_and_pairs() -> None:
    options = SubOptions("-x", "socket,id=a=b,server,nowait=off", ("kind",))
    assert options.take("kind") == "socket"
    assert options.take_id() == "a=b"
    assert options.take_bool("server", False) and not options.take_bool("nowait", True)
    options.finish()


def test_two_commas_are_one() -> None:
    assert SubOptions("-x", "file=/a,,b,id=c").take_path("file") == "/a,b"


def test_json() -> None:
    options = SubOptions("-x", '{"id":"a","n":3,"on":true,"off":false}')
    assert options.take_id() == "a" and options.take_int("n", 0, 9) == 3
    assert options.take_bool("on", False) and not options.take_bool("off", True)


@pytest.mark.parametrize("text", [
    "{", '{"a":1.5}', '{"a":null}', '{"a":[]}', '{"a":{}}', '{"a":"\\ud800"}', "{" * 100_000,
    '{"\\ud800":1}', '{"a":' + "9" * 5000 + "}",
])
def test_bad_json(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^-x "):
        SubOptions("-x", text)


@pytest.mark.parametrize("text", ["=a", "a=1,a=2", ",", "a=1,", "a=1,,"])
def test_bad_pairs(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^-x "):
        SubOptions("-x", text).finish()


def test_an_error_repeats_only_the_beginning_of_a_long_value() -> None:
    with pytest.raises(ConfigError) as caught:
        SubOptions("-x", "a=" + "y" * 100_000).finish()
    assert len(str(caught.value)) < 500


def test_topology() -> None:
    cpu = parse("-smp 4").cpu
    assert (cpu.count, cpu.max_cpus, cpu.sockets, cpu.cores) == (4, 4, 4, 1)
    cpu = parse("-smp 2,sockets=2,threads=2").cpu
    assert (cpu.max_cpus, cpu.sockets, cpu.cores, cpu.threads) == (4, 2, 1, 2)
    cpu = parse("-smp cpus=2,maxcpus=8,threads=2").cpu
    assert (cpu.max_cpus, cpu.sockets, cpu.cores, cpu.threads) == (8, 1, 4, 2)
    assert parse("-smp 254").cpu.sockets == 254


def test_memory() -> None:
    assert parse("-m 1024").memory.size == 1 << 30
    memory = parse("-m size=256M,slots=2,maxmem=1G").memory
    assert (memory.size, memory.max_size) == (256 << 20, 1 << 30)
    assert parse("-m 512G").memory.size == 512 << 30


def test_monitors() -> None:
    monitor = parse("-qmp tcp::4444,server=on,wait=off".replace("-qmp", "-mon chardev=m -chardev "
                    "socket,id=m,host=1.2.3.4,port=5,server,nowait -name ")).monitors
    assert [(m.kind, m.host, m.port) for m in monitor] == [("unix", "", 0), ("tcp", "1.2.3.4", 5)]
    config = cli.parse(shlex.split("-kernel k -qmp tcp::4444,server=on,wait=off"))
    assert (config.monitors[0].host, config.monitors[0].port) == ("0.0.0.0", 4444)


def test_a_server_that_would_wait_gets_a_warning() -> None:
    config = parse("-chardev socket,id=c,path=/c,server -serial chardev:c")
    assert "doesn't wait" in config.warnings[0]


@pytest.mark.parametrize("aio", ["native", "io_uring", "iouring", "threads", "off"])
@pytest.mark.parametrize("direct", ["on", "off", "true", "false"])
def test_aio_goes_with_and_without_direct(aio: str, direct: str) -> None:
    drive = parse(f"-drive id=d,file=/f,aio={aio},direct={direct}").drives["d"]
    assert drive.direct == (direct in ("on", "true"))


def test_console_and_disk_may_share_a_device_of_characters() -> None:
    config = parse("-serial file,path=/dev/null -D /dev/null")
    assert config.log == "/dev/null"


BAD = [
    ("-machine pc", "Invalid machine type"), ("-machine q35", "not supported yet"),
    ("-machine microvm,x=1", "no sub-option 'x'"), ("-machine microvm,accel=hvf", "hvf"),
    ("-machine microvm,accel=tcg", "can't run a microvm"), ("-accel tcg", "can't run a microvm"),
    ("-accel ''", "accelerator ''"), ("-machine microvm,dump-guest-core=1", "dump-guest-core=1"),
    ("-machine microvm,usb=on", "usb=on"),
    ("-machine none -drive id=d,file=/f -device virtio-blk-device,drive=d", "-machine none"),
    ("-cpu max", "model=max"), ("-cpu host,pmu=1", "pmu=1"), ("-cpu host,avx=off", "'avx'"),
    ("-smp 0", "cpus=0"), ("-smp 255", "cpus=255"), ("-smp x", "cpus=x"),
    ("-smp 2,maxcpus=1", "MAX CPU number must be >= 2 and <= 254"),
    ("-smp 2,maxcpus=300", "<= 254"), ("-smp 4,sockets=3,cores=1,threads=1", "must be equal"),
    ("-smp 2,cores=0", "cores=0"), ("-smp 254,threads=3", "must be equal"),
    ("-smp sockets=2", "'cpus' is missing"), ("-smp 1,nodes=1", "'nodes'"),
    ("-m 127", ">= 128MiB"), ("-m 513G", "<= 512GiB"), ("-m 1T", "size=1T"), ("-m x", "size=x"),
    ("-m 128M,maxmem=64M", "must bigger"), ("-m 131073K", "multiple of 4 KiB"),
    ("-m 128M,maxmem=1T", "maxmem=1T"), ("-m 128M,x=1", "'x'"), ("-m ''", "is not a size"),
    ("-drive file=/f", "'id' is missing"), ("-drive id=a", "'file' is missing"),
    ("-drive id=a,file=", "'file' is not a path"), ("-drive id=,file=/f", "the id ''"),
    ("-drive 'id=#a,file=/f'", "begins with '#'"), (f"-drive id={'x' * 256},file=/f", "255"),
    ("-drive 'id=a\nb,file=/f'", "printable"), (f"-drive id=a,file={'x' * 4096}", "4095"),
    ("-drive id=a,file=/f,aio=posix", "aio=posix"), ("-drive id=a,file=/f,readonly=2",
     "readonly=2"), ("-drive id=a,file=/f,format=qcow2", "qcow2"),
    ("-drive id=a,file=/f,if=pflash", "flash"), ("-drive id=a,file=/f,if=ide", "if=ide"),
    ("-drive id=a,file=/f,discard=x", "discard=x"), ("-drive id=a,file=/f,media=tape", "tape"),
    ("-drive id=a,file=/f,detect-zeroes=x", "detect-zeroes=x"),
    ("-drive id=a,file=/f,throttling.iops-total=1000001", "throttling.iops-total"),
    ("-drive id=a,file=/f,cache=none", "'cache'"),
    ("-drive id=a,file=/f -drive id=a,file=/g", "Drive a has been added"),
    ("-device virtio-blk-device", "'drive' is missing"),
    ("-device virtio-blk-device,drive=x", "no drive 'x'"),
    ("-device ''", "Unsupported device"), ("-device virtio-blk-ccw", "Unsupported device"),
    ("-device virtio-blk-pci,drive=d", "not supported yet"),
    ("-device virtio-blk-device,drive=d,bus=pcie.0", "Should not set bus"),
    ("-device virtio-blk-device,drive=d,num-queues=0", "num-queues=0"),
    ("-device virtio-blk-device,drive=d,num-queues=33", "num-queues=33"),
    ("-device virtio-blk-device,drive=d,queue-size=100", "power of two"),
    ("-device virtio-blk-device,drive=d,queue-size=2048", "queue-size=2048"),
    ("-device virtio-blk-device,drive=d,bootindex=256", "bootindex=256"),
    (f"-device virtio-blk-device,drive=d,serial={'s' * 21}", "at most 20"),
    ("-drive id=d,file=/f -device virtio-blk-device,drive=d,iothread=t", "no iothread 't'"),
    ("-chardev socket,id=c,path=/c -device vhost-user-blk-device,chardev=c,iothread=t",
     "no iothread 't'"),
    ("-drive id=d,file=/f -device virtio-blk-device,drive=d -device virtio-blk-device,drive=d",
     "serves another device"),
    ("-drive id=d,file=/f -drive id=e,file=/g -device virtio-blk-device,drive=d,id=x "
     "-device virtio-blk-device,drive=e,id=x", "Device id x existed"),
    ("-device vhost-user-blk-device,chardev=c", 'Chardev "c" not found'),
    ("-chardev tty,id=c", "kind=tty"), ("-chardev pty", "'id' is missing"),
    ("-chardev file,id=c", "'path' is missing"), ("-chardev socket,id=c", "'path' is missing"),
    ("-chardev socket,id=c,port=0", "port=0"), ("-chardev socket,id=c,host=,port=1", "host="),
    (f"-chardev socket,id=c,path=/{'p' * 107}", "at most 107 bytes"),
    ("-chardev pty,id=c -chardev pty,id=c", 'Chardev "c" has been added'),
    ("-chardev stdio,id=a -chardev stdio,id=b", "multiple devices redirected to stdio"),
    ("-serial stdio -daemonize", "stdio and daemonize can't be set together"),
    ("-serial chardev:x", 'Chardev "x" not found'), ("-serial chardev:", 'Chardev ""'),
    ("-serial com1", "kind=com1"), ("-serial file", "'path' is missing"),
    ("-chardev pty,id=c -serial chardev:c -device vhost-user-blk-device,chardev=c", "is in use"),
    ("-mon mode=control", "'chardev' is missing"), ("-mon chardev=x", "No chardev found: x"),
    ("-mon chardev=x,mode=readline", "mode=readline"),
    ("-chardev pty,id=c -mon chardev=c", "Only chardev of unix-socket type"),
    ("-chardev socket,id=c,path=/c -mon chardev=c", "'server' and 'nowait'"),
    ("-chardev socket,id=c,path=/c,server -mon chardev=c", "'server' and 'nowait'"),
    ("-chardev socket,id=c,path=/run/q.sock,server,nowait", "Two sockets"),
    ("-object x,id=a", "Unknown object type"), ("-object iothread", "'id' is missing"),
    ("-object iothread,id=a,x=1", "'x'"),
    ("-object iothread,id=a -object iothread,id=a", "Object: a has been added"),
    (" ".join(f"-object iothread,id=t{n}" for n in range(9)), "more than 8"),
    ("-netdev user,id=n", "type=user"), ("-global x=1", "DRIVER.PROPERTY"),
    ("-global a.b=1 -global a.b=2", "Global config a.b has been added"),
    ("-uuid x", "not a UUID"), ("-uuid 12345678-1234-1234-1234-12345678901", "not a UUID"),
    ("-name ''", "-name"), (f"-name {'n' * 256}", "1 to 255"), ("-name 'a\tb'", "printable"),
    ("-sandbox maybe", "enable=maybe"), ("-sandbox on,landlock=maybe", "landlock=maybe"),
    ("-sandbox on,x=off", "'x'"), ("-D -daemonize", "can't be set together"),
    ("-serial file,path=/etc/passwd -drive id=d,file=/etc/passwd", "uses this file too"),
    ("-serial file,path=/etc/../k", "-kernel uses this file"), ("-D /k", "-kernel uses this file"),
    ("-pidfile /p -D /p", "uses this file too"),
]


@pytest.mark.parametrize(("line", "says"), BAD, ids=[line[:60] for line, _ in BAD])
def test_bad_values(line: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(line)
    assert says in caught.value.what
    assert caught.value.hint
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(("line", "says"), [
    ("", "Please use '-qmp' or '-mon'"), ("-qmp unix:/s", "'server' is missing"),
    ("-qmp unix:/s,server", "'nowait' is missing"), ("-qmp /s,server,nowait", "not an address"),
    ("-qmp unix:,server,nowait", "not an address"), ("-qmp tcp:1,server,nowait", "1"),
    ("-qmp tcp:h:0,server,nowait", "HOST:PORT"), ("-qmp tcp:h:65536,server,nowait", "HOST:PORT"),
    ("-qmp tcp:h:x,server,nowait", "HOST:PORT"), ("-qmp unix:/s,server,nowait,x=1", "'x'"),
    (f"-qmp unix:/{'s' * 107},server,nowait", "at most 107 bytes"),
    ("-qmp unix:/s,server,nowait", "kernel file is required"),
])
def test_bad_monitors(line: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        cli.parse(shlex.split(line))
    assert says in caught.value.what and caught.value.hint


def test_two_names_of_a_file_that_is_not_there_yet(tmp_path: Path) -> None:
    """By links that lead to it, through a folder that goes by two names."""
    (tmp_path / "real").mkdir()
    (tmp_path / "folder").symlink_to("real")
    (tmp_path / "link").symlink_to("folder/../real/new")
    (tmp_path / "far").symlink_to(tmp_path / "link")
    (tmp_path / "loop").symlink_to("loop")
    for name in ("real/new", "folder/new", "link", "far"):
        with pytest.raises(ConfigError, match="uses this file too"):
            parse(f"-D {tmp_path}/real/new -pidfile {tmp_path}/{name}")
    for name in ("real/other", "loop", "missing/new"):
        parse(f"-D {tmp_path}/real/new -pidfile {tmp_path}/{name}")
