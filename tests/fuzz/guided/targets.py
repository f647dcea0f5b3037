"""Fuzz targets in Python: bytes in, only the errors that are meant for it come out.

Each is a function of one input.  `TARGETS` names them, with the packages whose code guides the
search.  An input is read from its front; what it lacks is zero.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable
from typing import NamedTuple

from shared.vhost_user import messages as m
from shared.vhost_user.backend import Backend
from shared.vhost_user.errors import VhostUserError
from shared.vhost_user.frontend import Frontend
from tests.fuzz.guided.control import command_line, orders, reports
from tests.fuzz.guided.input import Input
from tests.support.fake_backend import FakeBackendDevice
from tests.support.fake_vm import FakeVm
from tests.support.guest_ring import GuestMemory
from tests.support.mmio_driver import FakeGuestMemory
from vmm.devices.virtio_device import QueueConfig, VirtioDevice
from vmm.errors import BackendError
from vmm.hypervisor.fake import FakeVm as FakeMachine
from vmm.qmp.server import QmpServer
from vmm.transport.virtio_mmio import VirtioMmio

MAX_LENGTH = 4096


# ---- vhost-user: what a front end may send us -------------------------------------------------

def _descriptors(kinds: int) -> list[int]:
    fds = []
    for _ in range(kinds >> 4 & 3):
        if kinds & 1:
            fd = os.memfd_create("fuzz")
            os.ftruncate(fd, 1 << 16)
        else:
            fd = os.eventfd(0)
        fds.append(fd)
    return fds


def vhost_backend(data: bytes) -> None:
    """Messages with descriptors at our back end."""
    source = Input(data)
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    device = FakeBackendDevice()
    backend = Backend(device, theirs.detach())
    if source.number(1) & 1:
        backend.acked_protocol = backend._offered_protocol
    with ours, contextlib.suppress(VhostUserError):
        while source:
            request, flags, kinds, length = (source.number(1) for _ in range(4))
            payload = source.bytes(length)
            fds = _descriptors(kinds)
            # Bit 3 of the length's fate: a header that tells something else.
            told = source.number(4) if kinds & 8 else length
            socket.send_fds(ours, [m.HEADER.pack(request, flags, told) + payload], fds)
            for fd in fds:
                os.close(fd)
            backend.handle_one(time.monotonic() + 0.02)
            with contextlib.suppress(BlockingIOError):
                _, got, _, _ = socket.recv_fds(ours, 65536, 8)
                for fd in got:
                    os.close(fd)
    backend.close()
    if device.inflight_fd >= 0:
        os.close(device.inflight_fd)


# ---- vhost-user: what a back end may answer ---------------------------------------------------

def vhost_frontend(data: bytes) -> None:
    """Replies of a back end to our front end."""
    source = Input(data)
    ours, theirs = socket.socketpair()
    frontend = Frontend(ours.detach(), "back end", limit=0.002)
    calls: list[Callable[[], object]] = [
        frontend.handshake, lambda: frontend.get_config(0, 60), frontend.finish,
        lambda: frontend.get_vring_base(0), lambda: frontend.get_inflight(1, 64),
        frontend.get_max_mem_slots, lambda: frontend.set_features(1 << 32),
        frontend.get_status, lambda: frontend.set_vring_num(0, 64)]
    with theirs:
        theirs.setblocking(False)
        while source and frontend.broken is None:
            call = calls[source.number(1) % len(calls)]
            for _ in range(source.number(1) % 5):
                request, flags, length = source.number(1), source.number(1), source.number(1)
                fds = _descriptors(flags & 0xF0 | 1)
                with contextlib.suppress(OSError):
                    socket.send_fds(theirs, [m.HEADER.pack(request, flags & 0x1F, length)
                                             + source.bytes(length)], fds)
                for fd in fds:
                    os.close(fd)
            with contextlib.suppress(VhostUserError):
                result = call()
                if isinstance(result, tuple):
                    os.close(result[1])
    frontend.close()


# ---- virtio-mmio: what a guest may read and write ---------------------------------------------

class _Device(VirtioDevice):
    """Takes what it is given; refuses now and then."""

    device_id = 2
    id = "disk"
    queue_sizes = (64, 16)

    def __init__(self, refusals: int) -> None:
        self._refusals = refusals
        self.active = False

    def _maybe(self, bit: int) -> None:
        if self._refusals >> bit & 1:
            raise BackendError("refused", "try again")

    def features(self) -> int:
        self._maybe(0)
        return 0x1_3000_0244

    def read_config(self, offset: int, size: int) -> bytes:
        self._maybe(1)
        return bytes(range(64))[offset:offset + size].ljust(size, b"\0")

    def write_config(self, offset: int, data: bytes) -> None:
        self._maybe(2)

    def activate(self, features: int, queues: list[QueueConfig]) -> None:  # type: ignore[override]
        assert not self.active and not features & ~0x1_3000_0244
        self._maybe(3)
        self.active = True

    def reset(self) -> None:
        self._maybe(4)
        self.active = False

    def pause(self, deadline: float) -> None:
        self._maybe(5)

    def resume(self) -> None:
        self._maybe(6)


class _Mmio:
    """RAM is made once: an input changes only the transport."""

    def __init__(self) -> None:
        self.memory = FakeGuestMemory(GuestMemory(1 << 20, 0))


_mmio: list[_Mmio] = []


def config_space(data: bytes) -> None:
    """Accesses of a driver to a virtio-mmio slot: registers and config space."""
    if not _mmio:
        _mmio.append(_Mmio())
    source = Input(data)
    device = _Device(source.number(1))
    machine = FakeMachine()
    transport = VirtioMmio(machine, _mmio[0].memory, 0xF0100000, 5, device,  # type: ignore[arg-type]
                           bool(source.number(1) & 1))
    while source:
        kind = source.number(1)
        offset = source.number(1) << (1 if kind & 0x80 else 0)
        size = 1 << (kind >> 4 & 3)
        if kind & 3 == 0:
            value = transport.read(offset, size)
            assert 0 <= value < 1 << 8 * size
        elif kind & 3 == 1:
            transport.write(offset, size, source.number(size))
        elif kind & 3 == 2:
            device.on_config_change()
        else:
            with contextlib.suppress(BackendError):
                if kind & 8:
                    transport.pause(time.monotonic() + 1)
                else:
                    transport.resume()
    transport.close()


# ---- QMP: what a client may send --------------------------------------------------------------

_COMMANDS = (b'{"execute":"query-status"}', b'{"execute":"stop"}', b'{"execute":"cont"}',
             b'{"execute":"blockdev-add","arguments":{"node-name":"d","file":{"driver":"file",'
             b'"filename":"/x"},"cache":{"direct":true}}}',
             b'{"execute":"device_add","arguments":{"id":"d","driver":"virtio-blk-mmio",'
             b'"addr":"0x1"}}',
             b'{"execute":"device_del","arguments":{"id":"drive"},"id":[1,{"a":null}]}',
             b'{"execute":"query-qmp-schema"}', b'{"execute":"getfd","arguments":{"fdname":"f"}}')


def qmp(data: bytes) -> None:
    """What a client sends, in pieces, to the server with a VM that isn't one."""
    source = Input(data)
    vm = FakeVm()
    failures: list[BaseException] = []
    vm.loop.on_exception = failures.append
    server = QmpServer(vm)  # type: ignore[arg-type]
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    server.adopt(theirs.detach())
    with ours:
        while source:
            kind = source.number(1)
            part = _COMMANDS[kind & 7] if kind & 8 else source.bytes(kind >> 4)
            with contextlib.suppress(OSError):
                ours.sendall(part)
            vm.loop.run_once(0)
            with contextlib.suppress(OSError):
                ours.recv(1 << 16)
    for _ in range(3):
        vm.loop.run_once(0)
    server.close()
    vm.loop.close()
    if failures:
        raise failures[0]


class Target(NamedTuple):
    """One target: what it runs, and where coverage counts."""

    run: Callable[[bytes], None]
    packages: tuple[str, ...]


TARGETS = {
    "vhost-backend": Target(vhost_backend, ("shared.vhost_user",)),
    "vhost-frontend": Target(vhost_frontend, ("shared.vhost_user",)),
    "config-space": Target(config_space, ("vmm.transport", "vmm.devices")),
    "qmp": Target(qmp, ("vmm.qmp",)),
    "reports": Target(reports, ("shared.control", "vmm.worker", "vmm.devices.virtio_balloon")),
    "orders": Target(orders, ("shared.control", "workers")),
    "command-line": Target(command_line, ("vmm.config", "vmm.cli", "vmm.net")),
}
