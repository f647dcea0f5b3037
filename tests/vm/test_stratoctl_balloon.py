"""`stratoctl balloon` with a guest whose driver follows, and one whose driver isn't up."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.ctl import ctl, ctl_json

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.support.test_vm import TestVm

    Start = Callable[..., TestVm]

pytestmark = pytest.mark.vm

MIB = 1 << 20
AT = 64 * MIB            # memory of the guest that nothing is in,
PAGES = 64 * MIB >> 12   # and so much of it


@pytest.fixture
def vm(start_vm: Start) -> TestVm:
    return start_vm("-device", "virtio-balloon-device,id=balloon0", memory=256)


@pytest.fixture
def where(vm: TestVm) -> tuple[str, str]:
    vm.wait_output(r"^ready")
    return "--qmp", str(vm.qmp_path)


@pytest.fixture
def follower(vm: TestVm, where: tuple[str, str]) -> Iterator[Callable[[], None]]:
    """`follower()`: the guest does once what it is asked for."""
    threads: list[threading.Thread] = []
    assert vm.guest("balloon.init").ok

    def follow() -> None:
        threads.append(threading.Thread(
            target=lambda: vm.guest(f"balloon.follow {AT} {PAGES} 20000")))
        threads[-1].start()

    yield follow
    for thread in threads:
        thread.join()


def test_a_guest_that_follows(where: tuple[str, str], follower: Callable[[], None]) -> None:
    follower()
    told = ctl_json("balloon", "75%", "--wait", *where)
    assert told == {"total": 256 * MIB, "target": 192 * MIB, "actual": 192 * MIB}
    assert "the guest has 192 MiB of 256 MiB\n" in ctl("balloon", *where)
    assert ctl_json("status", *where)["balloon"] == 192 * MIB
    assert "balloon leaves  192 MiB" in ctl("status", *where)
    follower()
    assert ctl_json("balloon", "100%", "--wait", *where)["actual"] == 256 * MIB


def test_a_guest_that_does_not_follow(vm: TestVm, where: tuple[str, str]) -> None:
    assert vm.guest("balloon.init").ok
    assert "and is asked to come to 192 MiB" in ctl("balloon", "192M", *where)
    complaint = ctl("balloon", "192M", "--wait", "--timeout", "0.5", *where, status=1)
    assert "the guest stays at 256 MiB, 192 MiB are asked for" in complaint
    assert "has 256 MiB, not 1.0 GiB" in ctl("balloon", "1G", *where, status=1)


def test_statistics(vm: TestVm, where: tuple[str, str]) -> None:
    assert vm.guest("balloon.init").ok
    told = ctl_json("balloon", "--stats", *where)
    assert told["age-ms"] < 30_000 and told["target"] == told["actual"] == 256 * MIB
    assert told["stats"] and all(isinstance(value, int) for value in told["stats"].values())
    shown = ctl("balloon", "--stats", *where)
    assert all(name in shown for name in told["stats"])


def test_a_driver_that_is_not_up(where: tuple[str, str]) -> None:
    assert ctl_json("balloon", *where) == {"total": 256 * MIB, "actual": 256 * MIB}
    for line in (("192M",), ("--stats",)):
        assert "has no balloon, or its guest's driver is not up" in ctl("balloon", *line, *where,
                                                                        status=1)


def test_a_vm_without_a_balloon(start_vm: Start) -> None:
    vm = start_vm()
    vm.wait_output(r"^ready")
    where = ("--qmp", str(vm.qmp_path))
    assert "start the VM with -device virtio-balloon-device" in ctl("balloon", *where, status=1)
    assert ctl_json("status", *where)["balloon"] is None


def devices(where: tuple[str, str]) -> Any:
    vm, = ctl_json("top", "-n", "1", "-i", "0.2", *where)
    return vm["devices"]


def test_top(vm: TestVm, where: tuple[str, str]) -> None:
    assert vm.guest("balloon.init").ok
    assert vm.guest(f"balloon.inflate {AT} 256").ok
    balloon, = devices(where)
    assert (balloon["kind"], balloon["counters"]["inflated-pages"]) == ("balloon", 256)
    assert balloon["per-second"]["inflated-pages"] == 0
    assert "taken 0 B/s" in ctl("top", "-n", "1", "-i", "0.1", *where)
