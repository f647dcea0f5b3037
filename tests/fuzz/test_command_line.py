"""Any words as a command line give a configuration, a text or a ConfigError of one line's size."""

from __future__ import annotations

from json import dumps

from hypothesis import given, settings
from hypothesis import strategies as st

from vmm import cli
from vmm.errors import ConfigError

KEYS = ("id", "file", "path", "driver", "drive", "chardev", "server", "nowait", "wait", "fd",
        "host", "port", "type", "kind", "cpus", "maxcpus", "sockets", "dies", "clusters", "cores",
        "threads", "size", "maxmem", "serial", "num-queues", "queue-size", "bootindex", "iothread",
        "readonly", "direct", "aio", "discard", "throttling.iops-total", "throttling.bps-read-max",
        "format", "if", "media", "mode", "qom-type", "accel", "model", "pmu", "enable", "landlock",
        "address")
WORDS = ("", "on", "off", "a", "b", "0", "1", "2", "254", "255", "0x10", "-1", "64K", "512M", "4G",
         "microvm", "none", "kvm", "host", "stdio", "pty", "file", "socket", "null", "/a", "/b",
         "unix:/q", "tcp:127.0.0.1:1", "tcp::9", "chardev:a", "virtio-blk-device",
         "vhost-user-blk-device", "iothread", "control", "io_uring", "raw", "#a", "\n", "²")

anything = st.text(st.characters(codec=None), max_size=12)  # lone surrogates too, as argv has them
value = st.one_of(st.sampled_from(WORDS), anything)
pair = st.builds("{}={}".format, st.one_of(st.sampled_from(KEYS), anything), value)
plain = st.lists(st.one_of(pair, pair, value), min_size=1, max_size=6).map(",".join)
json = st.recursive(st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), anything),
                    lambda inner: st.lists(inner, max_size=2), max_leaves=3)
as_json = st.dictionaries(st.one_of(st.sampled_from(KEYS), anything), json, max_size=4).map(
    dumps)
option = st.sampled_from(sorted(f"-{name}" for name in cli.OPTIONS))
good = st.sampled_from([
    ("-qmp", "unix:/q,server,nowait"), ("-kernel", "/k"), ("-drive", "id=a,file=/a"),
    ("-device", "virtio-blk-device,drive=a"), ("-chardev", "socket,id=a,path=/c,server,nowait"),
    ("-serial", "chardev:a"), ("-mon", "chardev=a"), ("-smp", "2"), ("-machine", "microvm")])
group = st.one_of(good, good, st.tuples(option, st.one_of(plain, plain, as_json, value)),
                  st.tuples(option), st.tuples(anything))


@settings(max_examples=600, deadline=None)
@given(st.lists(group, max_size=8))
def test_no_command_line_is_a_traceback(groups: list[tuple[str, ...]]) -> None:
    words = [word for group in groups for word in group]
    if ("-sandbox", "help") in groups:
        return  # asks the host, in processes of its own
    try:
        config = cli.parse(words)
    except cli.Answer as answer:
        assert answer.text
        return
    except ConfigError as error:
        assert error.what and len(error.what) < 5000
        return
    assert config.monitors
    assert 1 <= config.cpu.count <= config.cpu.max_cpus <= 254
    assert 128 << 20 <= config.memory.size <= 512 << 30
    cpu = config.cpu
    assert cpu.sockets * cpu.dies * cpu.clusters * cpu.cores * cpu.threads == cpu.max_cpus
