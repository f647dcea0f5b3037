"""The kernel's vhost (linux/vhost.h): rings that a thread of the kernel serves.

A `KernelVhost` is one open /dev/vhost-*: its requests and how they are encoded, no more.  The
kernel is trusted; what the driver has set up is not, and was checked by the transport before it
comes here.  Only the process that called `set_owner` may go on; ends and crashes of ours close
the descriptor, and with it all that the kernel did for it.
"""

from __future__ import annotations

import _stat as stat
import posix as os
from errno import EACCES, ENODEV, ENOENT, ENXIO, EPERM

from native._core import ffi, lib
from shared.errors import check
from vmm.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from shared.memory_regions import MemoryRegion

VSOCK_DEVICE = "/dev/vhost-vsock"
# Linux, Documentation/admin-guide/devices.txt: misc devices, VHOST_VSOCK_MINOR.
_VSOCK_NUMBER = os.makedev(10, 241)


class KernelVhost:
    """One descriptor of the kernel's vhost; owned from now on. Every method but `close` raises
    SystemCallError.

    `set_features`, `set_vring`, `set_vring_kick` and `set_vring_call` are for any thread, the
    others not for a vCPU's (native/core/confine.c).
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def set_owner(self) -> None:
        """VHOST_SET_OWNER, first of all: its rings are in this process's memory."""
        check(lib.sv_ioctl(self.fd, lib.VHOST_SET_OWNER, ffi.NULL), "VHOST_SET_OWNER")

    def features(self) -> int:
        """VHOST_GET_FEATURES: virtio features, and vhost's own (VHOST_F_LOG_ALL)."""
        features = ffi.new("uint64_t *")
        check(lib.sv_ioctl(self.fd, lib.VHOST_GET_FEATURES, features), "VHOST_GET_FEATURES")
        return int(features[0])

    def set_features(self, features: int) -> None:
        """VHOST_SET_FEATURES."""
        check(lib.sv_ioctl(self.fd, lib.VHOST_SET_FEATURES, ffi.new("uint64_t *", features)),
              "VHOST_SET_FEATURES")

    def set_memory(self, regions: Sequence[MemoryRegion]) -> None:
        """VHOST_SET_MEM_TABLE: guest RAM, all of it."""
        table = ffi.new("struct vhost_memory *", [0, len(regions)])
        table.nregions = len(regions)
        for row, region in zip(table.regions, regions, strict=True):
            row.guest_phys_addr = region.guest_addr
            row.memory_size = region.size
            row.userspace_addr = region.user_addr
        check(lib.sv_ioctl(self.fd, lib.VHOST_SET_MEM_TABLE, table), "VHOST_SET_MEM_TABLE")

    def set_vring(self, index: int, size: int, base: int, desc: int, avail: int,
                  used: int) -> None:
        """VHOST_SET_VRING_NUM, BASE (next available index) and ADDR (addresses in this
        process) of a ring that doesn't run."""
        for request, name, value in ((lib.VHOST_SET_VRING_NUM, "VHOST_SET_VRING_NUM", size),
                                     (lib.VHOST_SET_VRING_BASE, "VHOST_SET_VRING_BASE", base)):
            check(lib.sv_ioctl(self.fd, request, ffi.new("struct vhost_vring_state *",
                                                         [index, value])), name)
        address = ffi.new("struct vhost_vring_addr *")
        address.index = index
        address.desc_user_addr = desc
        address.avail_user_addr = avail
        address.used_user_addr = used
        check(lib.sv_ioctl(self.fd, lib.VHOST_SET_VRING_ADDR, address), "VHOST_SET_VRING_ADDR")

    def vring_base(self, index: int) -> int:
        """VHOST_GET_VRING_BASE: where a ring has stopped, as `set_vring` takes it."""
        state = ffi.new("struct vhost_vring_state *", [index, 0])
        check(lib.sv_ioctl(self.fd, lib.VHOST_GET_VRING_BASE, state), "VHOST_GET_VRING_BASE")
        return int(state.num)

    def set_vring_kick(self, index: int, fd: int) -> None:
        """VHOST_SET_VRING_KICK: the eventfd by which the driver says that it added something."""
        self._set_file(lib.VHOST_SET_VRING_KICK, "VHOST_SET_VRING_KICK", index, fd)

    def set_vring_call(self, index: int, fd: int) -> None:
        """VHOST_SET_VRING_CALL: the eventfd that is the ring's interrupt."""
        self._set_file(lib.VHOST_SET_VRING_CALL, "VHOST_SET_VRING_CALL", index, fd)

    def set_vring_err(self, index: int, fd: int) -> None:
        """VHOST_SET_VRING_ERR: the eventfd that tells of a ring with nonsense in it."""
        self._set_file(lib.VHOST_SET_VRING_ERR, "VHOST_SET_VRING_ERR", index, fd)

    def _set_file(self, request: int, name: str, index: int, fd: int) -> None:
        file = ffi.new("struct vhost_vring_file *", [index, fd])
        check(lib.sv_ioctl(self.fd, request, file), name)

    def close(self) -> None:
        """Let go of it: when this returns the kernel touches nothing any more. Harmless when
        closed."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class KernelVsock(KernelVhost):
    """/dev/vhost-vsock: rings 0 (to the guest) and 1 (from it)."""

    def set_guest_cid(self, cid: int) -> None:
        """VHOST_VSOCK_SET_GUEST_CID: EADDRINUSE if another guest of this host has it."""
        check(lib.sv_ioctl(self.fd, lib.VHOST_VSOCK_SET_GUEST_CID, ffi.new("uint64_t *", cid)),
              "VHOST_VSOCK_SET_GUEST_CID")

    def set_running(self, running: bool) -> None:
        """VHOST_VSOCK_SET_RUNNING; any thread. When it has stopped nothing touches the rings."""
        check(lib.sv_ioctl(self.fd, lib.VHOST_VSOCK_SET_RUNNING, ffi.new("int *", running)),
              "VHOST_VSOCK_SET_RUNNING")


def open_vsock(option: str, fd: int = -1) -> KernelVsock:
    """The kernel's vsock for one guest.

    :param option: what the user wrote, for errors.
    :param fd: opened by whoever started this process; -1: open it.
    :raises ConfigError: it can't be had, or the descriptor is something else.
    """
    if fd >= 0:
        return _inherited(option, fd)
    try:
        return KernelVsock(os.open(VSOCK_DEVICE, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        hint = "see the kernel's log"
        if error.errno in (ENOENT, ENODEV, ENXIO):
            hint = "load the kernel's module: modprobe vhost_vsock"
        elif error.errno in (EACCES, EPERM):
            hint = "run as a user that may, or hand in an open one: vhostfd="
        raise ConfigError(f"{option}: can't open {VSOCK_DEVICE}: {error.strerror}",
                          hint) from None


def _inherited(option: str, fd: int) -> KernelVsock:
    try:
        status = os.fstat(fd)
    except OSError as error:
        raise ConfigError(f"{option}: vhostfd={fd}: {error.strerror}",
                          f"hand in an open {VSOCK_DEVICE}") from None
    if not stat.S_ISCHR(status.st_mode) or status.st_rdev != _VSOCK_NUMBER:
        raise ConfigError(f"{option}: vhostfd={fd}: the descriptor is not {VSOCK_DEVICE}",
                          "hand in an open one, or leave vhostfd away")
    os.set_inheritable(fd, False)
    return KernelVsock(fd)
