"""Any words as a command line give a configuration, a text or a ConfigError of one line's size."""

from __future__ import annotations

from json import dumps

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.command_lines import NUMBERS, PARTS, WHOLE, check
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


@st.composite
def nearly(draw: st.DrawFn) -> list[tuple[str, str]]:
    """Some of it, a part or two of it changed."""
    left = draw(st.sets(st.integers(0, len(WHOLE) - 1), max_size=2))
    groups = [list(group) for number, group in enumerate(WHOLE) if number not in left]
    for _ in range(draw(st.integers(0, 2))):
        group = draw(st.sampled_from(groups))
        parts = group[1].split(",")
        at = draw(st.integers(0, len(parts) - 1))
        key = parts[at].partition("=")[0]
        parts[at:at + draw(st.integers(0, 1))] = [draw(st.one_of(
            st.sampled_from(PARTS), pair, value.map(lambda value, key=key: f"{key}={value}"),
            st.sampled_from(NUMBERS).map(lambda value, key=key: f"{key}={value}")))]
        group[1] = ",".join(parts)
    return [(option, text) for option, text in groups]


@settings(max_examples=1000, deadline=None)
@given(st.lists(group, max_size=8) | nearly())
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
    check(config)
