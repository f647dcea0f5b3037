"""How /dev/vhost-vsock is opened and asked, and what is refused as such."""

from __future__ import annotations

import errno
import os
import posix
import socket
from typing import TYPE_CHECKING

import pytest

from shared.errors import SystemCallError
from shared.memory_regions import MemoryRegion
from tests.support.fake_vhost import FakeVhost
from vmm.devices import vhost_kernel
from vmm.devices.vhost_kernel import KernelVsock, open_vsock
from vmm.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

OPTION = "-device vhost-vsock-device"


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeVhost:
    return FakeVhost(monkeypatch)


@pytest.fixture
def kernel(fake: FakeVhost) -> Iterator[KernelVsock]:
    kernel = KernelVsock(fake.open())
    yield kernel
    kernel.close()
    kernel.close()
    assert kernel.fd == -1


# ---- opening -------------------------------------------------------------------------------


@pytest.mark.parametrize(("error", "says"), [
    (errno.ENOENT, "can't open /dev/vhost-vsock: No such file or directory; load the kernel's "
                   "module: modprobe vhost_vsock"),
    (errno.ENODEV, "No such device; load the kernel's module: modprobe vhost_vsock"),
    (errno.EACCES, "can't open /dev/vhost-vsock: Permission denied; run as a user that may, or "
                   "hand in an open one: vhostfd="),
    (errno.EMFILE, "Too many open files; see the kernel's log"),
])
def test_no_device(monkeypatch: pytest.MonkeyPatch, error: int, says: str) -> None:
    def refuse(path: str, flags: int) -> int:
        assert path == "/dev/vhost-vsock"
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(posix, "open", refuse)
    with pytest.raises(ConfigError) as caught:
        open_vsock(OPTION)
    assert str(caught.value).startswith(OPTION) and says in str(caught.value)


def test_what_was_handed_in_must_be_one(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    ours, theirs = socket.socketpair()
    with (tmp_path / "file").open() as file, open("/dev/null") as null, ours, theirs:
        for fd in (file.fileno(), null.fileno(), ours.fileno()):
            with pytest.raises(ConfigError, match=f"vhostfd={fd}: the descriptor is not /dev/vho"):
                open_vsock(OPTION, fd)
            os.fstat(fd)  # it stays the caller's
    with pytest.raises(ConfigError, match="vhostfd=999: Bad file descriptor; hand in an open"):
        open_vsock(OPTION, 999)


def test_what_was_handed_in_is_ours_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    fd = os.open("/dev/null", os.O_RDWR)
    os.set_inheritable(fd, True)
    monkeypatch.setattr(vhost_kernel, "_VSOCK_NUMBER", os.fstat(fd).st_rdev)
    kernel = open_vsock(OPTION, fd)
    assert kernel.fd == fd and not os.get_inheritable(fd)
    kernel.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


# ---- requests ------------------------------------------------------------------------------


def test_every_request_arrives_as_it_was_meant(fake: FakeVhost, kernel: KernelVsock) -> None:
    device = fake.devices[kernel.fd]
    kernel.set_owner()
    assert device.owned
    kernel.set_guest_cid(0xFFFF_FFFE)
    assert device.cid == 0xFFFF_FFFE
    assert kernel.features() & 1 << 32
    kernel.set_features(1 << 32 | 1 << 29)
    assert device.features == 1 << 32 | 1 << 29
    regions = [MemoryRegion(0, 0x1000_0000, 0x7F00_0000_0000, 0),
               MemoryRegion(1 << 32, 0x2000_0000, 0x7F00_1000_0000, 0x1000_0000)]
    kernel.set_memory(regions)
    assert device.regions == [(region.guest_addr, region.size, region.user_addr)
                              for region in regions]
    files = [os.eventfd(0) for _ in range(3)]
    for index in (0, 1):
        base = 0x7F00_0000_0000 + 0x10000 * index
        kernel.set_vring(index, 256, 0xFFFE + index, base, base + 0x1000, base + 0x2000)
        kernel.set_vring_kick(index, files[0])
        kernel.set_vring_call(index, files[1])
        kernel.set_vring_err(index, files[2])
        ring = device.rings[index]
        assert (ring.size, ring.base) == (256, 0xFFFE + index)
        assert ring.addresses == {"desc": base, "avail": base + 0x1000, "used": base + 0x2000}
        assert [ring.kick, ring.call, ring.err] == files
        assert kernel.vring_base(index) == 0xFFFE + index
    kernel.set_running(True)
    assert device.running
    kernel.set_running(False)
    assert not device.running
    for fd in files:
        os.close(fd)


def test_a_refusal_names_the_request(fake: FakeVhost, kernel: KernelVsock) -> None:
    with pytest.raises(SystemCallError, match="VHOST_SET_MEM_TABLE: Operation not permitted"):
        kernel.set_memory([])
    kernel.set_owner()
    with pytest.raises(SystemCallError, match="VHOST_SET_OWNER: Device or resource busy") as busy:
        kernel.set_owner()
    assert busy.value.errno == errno.EBUSY
    for name, request in (("VHOST_GET_FEATURES", kernel.features),
                          ("VHOST_SET_FEATURES", lambda: kernel.set_features(1 << 40)),
                          ("VHOST_SET_VRING_NUM", lambda: kernel.set_vring(0, 3, 0, 0, 0, 0)),
                          ("VHOST_SET_VRING_BASE",
                           lambda: kernel.set_vring(0, 4, 0x10000, 0, 0, 0)),
                          ("VHOST_SET_VRING_ADDR", lambda: kernel.set_vring(0, 4, 0, 8, 0, 0)),
                          ("VHOST_SET_VRING_KICK", lambda: kernel.set_vring_kick(2, 0)),
                          ("VHOST_SET_VRING_CALL", lambda: kernel.set_vring_call(2, 0)),
                          ("VHOST_SET_VRING_ERR", lambda: kernel.set_vring_err(2, 0)),
                          ("VHOST_GET_VRING_BASE", lambda: kernel.vring_base(2)),
                          ("VHOST_VSOCK_SET_GUEST_CID", lambda: kernel.set_guest_cid(2)),
                          ("VHOST_VSOCK_SET_RUNNING", lambda: kernel.set_running(True))):
        if name == "VHOST_GET_FEATURES":
            fake.fail[name] = errno.EFAULT
        with pytest.raises(SystemCallError, match=name):
            request()
