"""`-drive throttling.*`."""

from __future__ import annotations

import pytest

from shared.throttling import LIMITS, OPTIONS
from vmm.config.backends import parse_drive
from vmm.config.model import VmConfig
from vmm.errors import ConfigError


def limits(text: str) -> dict[str, int]:
    config = VmConfig()
    parse_drive(config, f"id=d,file=/disk{text}")
    return config.drives["d"].throttling


def test_no_limit_is_an_empty_map() -> None:
    assert limits("") == {}
    assert limits(",throttling.iops-total=0") == {}


@pytest.mark.parametrize("name", LIMITS)
def test_each_limit_and_its_burst(name: str) -> None:
    assert limits(f",throttling.{name}=5000") == {name: 5000}
    assert limits(f",throttling.{name}=5000,throttling.{name}-max=9000") == {
        name: 5000, f"{name}-max": 9000}


@pytest.mark.parametrize("text", [
    "throttling.iops-total=-1", "throttling.iops-total=1000001", "throttling.iops-total=many",
    "throttling.bps-total=1099511627777", "throttling.iops=5", "throttling.iops-total=",
    "throttling.iops-total-max=5", "throttling.bps-read=10,throttling.bps-read-max=9",
    "throttling.iops-total=5,throttling.iops-total=6"])
def test_wrong_limits_name_the_option(text: str) -> None:
    with pytest.raises(ConfigError, match=r"-drive.*throttling\.\w+"):
        limits("," + text)


def test_names_of_options() -> None:
    assert len(OPTIONS) == 12
    assert OPTIONS[1] == "iops-total-max"
