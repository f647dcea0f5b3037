"""Fixtures for tests with the product's own command on /dev/kvm."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.support.capabilities import require
from tests.support.guest import guest
from tests.support.net_namespace import NetNamespace
from tests.support.test_vm import TestVm

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@pytest.fixture
def start_vm(tmp_path: Path) -> Iterator[Callable[..., TestVm]]:
    """`start_vm(*arguments, append="", kernel="guest.elf", memory=128, disks=[path…])`.

    Each disk becomes a -drive (id d0, d1, …; options after a comma are kept) and a
    virtio-blk-device. VMs still alive at the end of the test are killed.
    """
    require("kvm")
    started: list[TestVm] = []

    def start(*arguments: str | Path, kernel: str = "guest.elf", memory: int = 128,
              disks: tuple[str | Path, ...] = (), **options: object) -> TestVm:
        line: list[str | Path] = ["-machine", "microvm", "-m", str(memory), "-kernel",
                                  guest(kernel)]
        for number, disk in enumerate(disks):
            line += ["-drive", f"id=d{number},file={disk}",
                     "-device", f"virtio-blk-device,drive=d{number},id=blk{number}"]
        vm = TestVm(tmp_path, *line, *arguments, **options)  # type: ignore[arg-type]
        started.append(vm)
        return vm

    yield start
    for vm in started:
        vm.close()


@pytest.fixture
def namespace() -> Iterator[NetNamespace]:
    """A network namespace with a persistent tap, `tap0`, that is up."""
    require("net_admin")
    namespace = NetNamespace()
    namespace.persistent_tap()
    yield namespace
    namespace.close()


@pytest.fixture
def start_nic_vm(start_vm: Callable[..., TestVm], namespace: NetNamespace
                 ) -> Callable[..., TestVm]:
    """`start_vm` in the namespace. With `netdev` and `nic`, options of -netdev tap and -device,
    the VM has a NIC (ids net0 and nic0) on it; `netdev=""`: none."""

    def start(*arguments: str | Path, netdev: str = "ifname=tap0", nic: str = "",
              **options: object) -> TestVm:
        line = list(arguments)
        if netdev:
            line += ["-netdev", f"tap,id=net0,{netdev}",
                     "-device", f"virtio-net-device,netdev=net0,id=nic0{nic}"]
        return namespace.run(lambda: start_vm(*line, **options))

    return start
