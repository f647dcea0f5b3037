"""A tap that is unplugged is free at once: for the next card, for the host."""

from __future__ import annotations

import fcntl
import os
from typing import TYPE_CHECKING

import pytest

from shared.tap import exists
from tests.support.capabilities import require
from tests.support.net_namespace import NetNamespace

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.support.test_vm import TestVm

    Start = Callable[..., TestVm]

pytestmark = pytest.mark.vm

ROUNDS = 30  # a worker that is still ending was met in every second one
TUNSETPERSIST = 0x400454CB  # linux/if_tun.h


@pytest.fixture
def namespace() -> Iterator[NetNamespace]:
    require("net_admin")
    namespace = NetNamespace()
    yield namespace
    namespace.close()


def plug(vm: TestVm) -> None:
    vm.qmp.command("netdev_add", id="net0", ifname="lan0")
    vm.qmp.command("device_add", id="net0", driver="virtio-net-mmio", addr="0x0")


def test_a_tap_that_stays_can_be_plugged_again_at_once(namespace: NetNamespace,
                                                       start_vm: Start) -> None:
    fd, = namespace.tap("lan0")
    fcntl.ioctl(fd, TUNSETPERSIST, 1)
    os.close(fd)
    vm = namespace.run(start_vm)
    for _ in range(ROUNDS):
        plug(vm)
        vm.qmp.command("device_del", id="net0")


def test_a_tap_that_was_made_goes_with_its_card(namespace: NetNamespace, start_vm: Start) -> None:
    vm = namespace.run(start_vm)
    for _ in range(ROUNDS):
        plug(vm)
        assert namespace.run(lambda: exists("lan0"))
        vm.qmp.command("device_del", id="net0")
        assert not namespace.run(lambda: exists("lan0"))
