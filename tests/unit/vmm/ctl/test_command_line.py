"""The command line: what is taken, what is refused, and how."""

from __future__ import annotations

import argparse
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.patience import PATIENT
from vmm.ctl.command_line import Size, build_parser, parse


@pytest.mark.parametrize(("line", "wanted"), [
    (("ps",), {"json": False, "run_dir": None}),
    (("--json", "ps"), {"json": True}), (("ps", "--json"), {"json": True}),
    (("--run-dir", "/a", "ps", "--run-dir", "/b"), {"run_dir": "/b"}),
    (("--run-dir", "/a", "ps"), {"run_dir": "/a"}),
    (("--qmp", "/s", "status"), {"qmp": "/s"}), (("status", "--qmp=/s"), {"qmp": "/s"}),
    (("status", "--", "--qmp"), {"vm": "--qmp"}), (("status", "--", "-x"), {"vm": "-x"}),
    (("top", "a", "b", "-i", "0.5", "-n", "3", "-p", "-s", "io"),
     {"vms": ["a", "b"], "interval": 0.5, "count": 3, "processes": True, "sort": "io"}),
    (("attach-disk", "v", "i", "--addr", "0x2"), {"addr": 2, "direct": True, "limit": []}),
    (("attach-disk", "v", "i", "--limit", "iops-total=100", "--limit", "bps-read=1.5G"),
     {"limit": [("iops-total", 100), ("bps-read", 3 << 29)]}),
    (("attach-nic", "v"), {"ifname": None, "make": False, "queues": None}),
    (("attach-nic", "v", "t", "--limit", "rx-packets=5"), {"limit": [("rx-packets", 5)]}),
    (("balloon", "v", "--stats"), {"size": None, "stats": True}),
    (("detach", "v", "d"), {"id": "d", "timeout": 60.0})])
def test_lines(line: tuple[str, ...], wanted: dict[str, Any]) -> None:
    args = vars(parse(line))
    assert {name: args[name] for name in wanted} == wanted


@pytest.mark.parametrize(("line", "text"), [
    ((), "the following arguments are required: COMMAND"),
    (("nothing",), "invalid choice: 'nothing'"),
    (("status",), "required: VM"),
    (("--qmp", "/s", "status", "web"), "unrecognized arguments: web"),
    (("--qmp", "/s", "--run-dir", "/a", "ps"), "not allowed with argument"),
    (("top", "-i", "0"), "argument -i/--interval: '0': use 0.05 to 3600 seconds"),
    (("top", "-i", "nan"), "'nan': use 0.05 to 3600 seconds"),
    (("top", "-i", "x"), "'x': use 0.05 to 3600 seconds"),
    (("top", "-n", "0"), "'0': use 1 to 2147483648"),
    (("top", "-n", "x"), "'x': use 1 to"),
    (("top", "-s", "age"), "invalid choice: 'age'"),
    (("attach-disk", "v", "i", "--addr", "256"), "'256': use 0 to 255"),
    (("attach-disk", "v", "i", "--addr", "-1"), "use 0 to 255"),
    (("attach-disk", "v", "i", "--limit", "speed=5"), "use NAME=RATE with one of iops-total"),
    (("attach-disk", "v", "i", "--limit", "iops-total=1k"), "write iops-total=1000, a second"),
    (("attach-disk", "v", "i", "--limit", "bps-total=fast"), "write bps-total=100M, a second"),
    (("attach-nic", "v", "t", "--queues", "17"), "'17': use 1 to 16"),
    (("attach-nic", "v", "t", "--limit", "rx-bytes"), "write rx-bytes=100M, a second"),
    (("attach-nic", "v", "--make"), "--make needs the name of the tap"),
    (("attach-nic", "v", "t", "--bridge", "br0"), "ip link set t master br0"),
    (("balloon", "v", "512"), "'512' is 512 B: write 512M, 1.5G or 50%"),
    (("balloon", "v", "0"), "'0' is 0 B"),
    (("balloon", "v", "lots"), "'lots' is not a size: write 512M, 1.5G or 50%"),
    (("balloon", "v", "0%"), "'0%' is no share"), (("balloon", "v", "101%"), "is no share"),
    (("balloon", "v", "%"), "is no share"), (("balloon", "v", "1e1%"), "is no share"),
    (("balloon", "v", "--wait"), "--wait needs a SIZE"),
    (("link", "v", "n", "sideways"), "invalid choice: 'sideways'"),
    (("stat", "v"), "invalid choice"), (("status", "v", "--js"), "unrecognized arguments: --js")])
def test_what_is_refused(line: tuple[str, ...], text: str,
                         capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(line)
    assert ended.value.code == 2
    assert text in capsys.readouterr().err


def test_help_of_every_command(capsys: pytest.CaptureFixture[str],
                               monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STRATOVIRT_RUN_DIR", "/run/100%/%s")  # argparse formats its help
    parser = build_parser()
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name in action.choices:
                with pytest.raises(SystemExit) as ended:
                    parse((name, "--help"))
                assert ended.value.code == 0
                shown = capsys.readouterr().out
                assert name in shown and "/run/100%/%s" in shown


@PATIENT
@given(st.text())
def test_any_size(text: str) -> None:
    try:
        size = Size(text)
    except argparse.ArgumentTypeError as error:
        assert str(error).isprintable()
    else:
        assert 0 <= size.of(1 << 40) < 1 << 63
