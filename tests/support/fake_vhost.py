"""The kernel's /dev/vhost-vsock, played behind `native._core.lib.sv_ioctl`: no module, no root.

    fake = FakeVhost(monkeypatch)
    kernel = KernelVsock(fake.open())

It keeps the kernel's rules (drivers/vhost/vhost.c, vsock.c): requests need an owner, rings of a
running device can't be changed, a CID is one guest's, addresses lie in the memory table.
"""

from __future__ import annotations

import errno
import os
import struct
from typing import TYPE_CHECKING, Any

from native._core import ffi, lib
from vmm.devices import vhost_kernel

if TYPE_CHECKING:
    import pytest

KERNEL_FEATURES = (1 << 1 | 1 << 24 | 1 << 26 | 1 << 27 | 1 << 28 | 1 << 29 | 1 << 32 | 1 << 33
                   | 1 << 35)
RESERVED_CIDS = (0, 1, 2, 0xFFFF_FFFF)

NAMES = {getattr(lib, name): name for name in dir(lib) if name.startswith("VHOST_")}
# Those that a vCPU's thread may make: native/core/confine.c.
VCPU_REQUESTS = {"VHOST_SET_FEATURES", "VHOST_SET_VRING_NUM", "VHOST_SET_VRING_BASE",
                 "VHOST_SET_VRING_ADDR", "VHOST_SET_VRING_KICK", "VHOST_SET_VRING_CALL",
                 "VHOST_VSOCK_SET_RUNNING"}


class FakeVring:
    """What the kernel knows of one ring."""

    def __init__(self) -> None:
        self.size = 0
        self.base = 0
        self.addresses: dict[str, int] = {}
        self.kick = self.call = self.err = -1


class FakeDevice:
    """One open descriptor."""

    def __init__(self) -> None:
        self.owned = False
        self.foreign = False  # another process owns it
        self.running = False
        self.cid = 0
        self.features = 0
        self.regions: list[tuple[int, int, int]] = []
        self.rings = [FakeVring(), FakeVring()]


class FakeVhost:
    """All vhost-vsock devices of a host, by descriptor. `calls` holds the requests' names."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.devices: dict[int, FakeDevice] = {}
        self.calls: list[str] = []
        self.fail: dict[str, int] = {}  # request -> errno of its next one
        self.taken: set[int] = set()    # CIDs of other guests
        fake = self

        class Lib:
            def __getattr__(self, name: str) -> Any:
                return getattr(lib, name)

            def sv_ioctl(self, fd: int, request: int, argument: Any) -> int:
                return fake.ioctl(fd, request, argument)

        monkeypatch.setattr(vhost_kernel, "lib", Lib())

    def open(self) -> int:
        """A descriptor of a fresh device."""
        fd = os.eventfd(0, os.EFD_CLOEXEC)
        self.devices[fd] = FakeDevice()
        return fd

    def ioctl(self, fd: int, request: int, argument: Any) -> int:
        """As `sv_ioctl`: 0 or a negative errno."""
        name = NAMES[request]
        self.calls.append(name)
        os.fstat(fd)  # it is open
        if name in self.fail:
            return -self.fail.pop(name)
        device = self.devices[fd]
        size = request >> 16 & 0x3FFF  # asm-generic/ioctl.h
        data = ffi.buffer(argument, size) if size else b""
        if name in ("VHOST_SET_OWNER", "VHOST_GET_FEATURES", "VHOST_SET_FEATURES",
                    "VHOST_VSOCK_SET_GUEST_CID"):
            return self._unowned(device, name, data)
        if not device.owned or device.foreign:
            return -errno.EPERM
        if name == "VHOST_SET_MEM_TABLE":
            return self._set_memory(device, argument)
        if name == "VHOST_VSOCK_SET_RUNNING":
            return self._set_running(device, struct.unpack("=i", data)[0])
        return self._vring(device, name, data)

    def _unowned(self, device: FakeDevice, name: str, data: Any) -> int:
        if name == "VHOST_SET_OWNER":
            if device.owned:
                return -errno.EBUSY
            device.owned = True
            return 0
        if name == "VHOST_GET_FEATURES":
            data[:] = struct.pack("=Q", KERNEL_FEATURES)
            return 0
        value, = struct.unpack("=Q", data)
        if name == "VHOST_SET_FEATURES":
            if value & ~KERNEL_FEATURES:
                return -errno.EOPNOTSUPP
            device.features = value
            return 0
        if value in RESERVED_CIDS or value >> 32:
            return -errno.EINVAL
        others = {other.cid for other in self.devices.values() if other is not device}
        if value in others | self.taken:
            return -errno.EADDRINUSE
        device.cid = value
        return 0

    def _set_memory(self, device: FakeDevice, table: Any) -> int:
        whole = bytes(ffi.buffer(table, 8 + 32 * table.nregions))
        count, padding = struct.unpack_from("=II", whole)
        rows = [struct.unpack_from("=QQQQ", whole, 8 + 32 * index) for index in range(count)]
        if padding or any(row[3] for row in rows):
            return -errno.EOPNOTSUPP
        device.regions = [row[:3] for row in rows]
        return 0

    def _set_running(self, device: FakeDevice, running: int) -> int:
        if running:
            for ring in device.rings:
                sizes = {"desc": 16 * ring.size, "avail": 6 + 2 * ring.size,
                         "used": 6 + 8 * ring.size}
                for part, size in sizes.items():
                    address = ring.addresses.get(part, 0)
                    if not any(start <= address and address + size <= start + length
                               for _, length, start in device.regions):
                        return -errno.EFAULT
        device.running = bool(running)
        return 0

    def _vring(self, device: FakeDevice, name: str, data: Any) -> int:
        index, value = struct.unpack_from("=Ii", data)
        if index >= len(device.rings):
            return -errno.ENOBUFS
        ring = device.rings[index]
        if name in ("VHOST_SET_VRING_NUM", "VHOST_SET_VRING_BASE"):
            if device.running:
                return -errno.EBUSY
            if value > 0xFFFF or (name.endswith("NUM") and (not value or value & (value - 1))):
                return -errno.EINVAL
            setattr(ring, "size" if name.endswith("NUM") else "base", value)
        elif name == "VHOST_GET_VRING_BASE":
            data[:] = struct.pack("=II", index, ring.base)
        elif name == "VHOST_SET_VRING_ADDR":
            _, flags, desc, used, avail, _ = struct.unpack("=IIQQQQ", data)
            if flags or desc % 16 or avail % 2 or used % 4:
                return -errno.EINVAL
            ring.addresses = {"desc": desc, "avail": avail, "used": used}
        else:
            os.fstat(value)
            setattr(ring, name.rpartition("_")[2].lower(), value)
        return 0
