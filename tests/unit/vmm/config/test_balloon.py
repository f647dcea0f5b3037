"""`-device virtio-balloon-device`: what it takes and refuses."""

from __future__ import annotations

import pytest

from tests.unit.vmm.config.test_suboptions import parse
from vmm.errors import ConfigError

DEVICE = "-device virtio-balloon-device"


@pytest.mark.parametrize(("options", "oom", "reporting"), [
    ("", "off", "off"), (",deflate-on-oom=true", "on", "off"),
    (",id=b,deflate-on-oom=false,free-page-reporting=true", "off", "on"),
    (",deflate-on-oom=on,free-page-reporting=off", "on", "off"),
    (",auto-balloon=false,membuf-percent=80,monitor-interval=300", "off", "off")])
def test_options(options: str, oom: str, reporting: str) -> None:
    config = parse(DEVICE + options)
    kept = config.devices[0].options
    assert (kept["deflate-on-oom"], kept["free-page-reporting"]) == (oom, reporting)


@pytest.mark.parametrize(("options", "text"), [
    (",deflate-on-oom=1", "'deflate-on-oom=1'"), (",free-page-reporting=", "free-page-reporting"),
    (",auto-balloon=true", "'auto-balloon' needs a driver in the guest"),
    (",membuf-percent=19", "'membuf-percent=19' is not a number from 20 to 80"),
    (",monitor-interval=4", "'monitor-interval=4' is not a number from 5 to 300"),
    (",bus=pcie.0", "Should not set bus"), (",num-queues=2", "'num-queues'"),
    (",guest-stats-polling-interval=1", "guest-stats-polling-interval")])
def test_refusals(options: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text.replace("(", "\\(")):
        parse(DEVICE + options)


def test_one_for_each_vm() -> None:
    with pytest.raises(ConfigError) as caught:
        parse(f"{DEVICE},id=a {DEVICE},id=b")
    assert "Only one balloon device is supported for each vm." in str(caught.value)
