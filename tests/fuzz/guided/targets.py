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
from tests.support.mmio_driver import FakeGuestMemory, MmioDriver
from vmm.devices.virtio_device import QueueConfig, VirtioDevice, shown
from vmm.errors import BackendError
from vmm.hypervisor.fake import FakeVm as FakeMachine
from vmm.qmp.server import QmpServer
from vmm.transport.mmio_registers import MMIO_SIZE
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

_OFFERED = 0x1_3000_0244
_RAM = 1 << 20


class _Device(VirtioDevice):
    """Takes what it is given; refuses now and then. Whenever it is called, as when its memory
    is, another vCPU may write a register that C serves (`other_vcpu`)."""

    device_id = 2
    id = "disk"
    queue_sizes = (64, 16)
    config: bytes = shown()

    def __init__(self, refusals: int, other_vcpu: Callable[[], None]) -> None:
        self._refusals = refusals
        self._other_vcpu = other_vcpu
        self.keeps_shown = bool(refusals & 0x80)
        self.config = bytes(range(64))
        self.active = False

    def _maybe(self, bit: int) -> None:
        self._other_vcpu()
        if self._refusals >> bit & 1:
            raise BackendError("refused", "try again")

    def features(self) -> int:
        self._maybe(0)
        return _OFFERED

    def read_config(self, offset: int, size: int) -> bytes:
        self._maybe(1)
        return self.config[offset:offset + size].ljust(size, b"\0")

    def write_config(self, offset: int, data: bytes) -> None:
        self._maybe(2)
        self.config = (self.config[:offset] + data + self.config[offset + len(data):])[:64]

    def activate(self, features: int, queues: list[QueueConfig]) -> None:  # type: ignore[override]
        assert not self.active and not features & ~_OFFERED
        for queue in queues:
            if queue.ready:
                assert queue.size in (1, 2, 4, 8, 16, 32, 64)
                assert queue.size <= self.queue_sizes[queue.index]
                assert queue.desc % 16 == 0 and queue.desc + 16 * queue.size <= _RAM
                assert queue.avail % 2 == 0 and queue.avail + 6 + 2 * queue.size <= _RAM
                assert queue.used % 4 == 0 and queue.used + 6 + 8 * queue.size <= _RAM
        self._maybe(3)
        self.active = True

    def reset(self) -> None:
        self._maybe(4)
        self.active = False

    def pause(self, deadline: float) -> None:
        self._maybe(5)

    def resume(self) -> None:
        self._maybe(6)


class _Memory(FakeGuestMemory):
    """RAM is made once: an input changes only the transport."""

    other_vcpu: Callable[[], None]

    def host_address(self, gpa: int, size: int) -> int:
        self.other_vcpu()
        return super().host_address(gpa, size)


_memory: list[_Memory] = []


def config_space(data: bytes) -> None:
    """Accesses of a driver to a virtio-mmio slot, registers and config space, as the run loop
    gives them to C, then to Python; another vCPU's come in between."""
    if not _memory:
        _memory.append(_Memory(GuestMemory(_RAM, 0)))
    source = Input(data)
    refusals = source.number(1)
    others = [0]

    def other_vcpu() -> None:
        if others[0]:
            others[0] -= 1
            driver.registers.write(source.number(1), 4, source.number(4))

    device = _Device(refusals, other_vcpu)
    _memory[0].other_vcpu = other_vcpu
    transport = VirtioMmio(FakeMachine(), _memory[0], 0xF0100000, 5, device,  # type: ignore[arg-type]
                           bool(source.number(1) & 1))
    driver = MmioDriver(transport)
    while source:
        kind = source.number(1)
        offset = source.number(1) << (1 if kind & 0x80 else 0)
        size = 1 << (kind >> 4 & 3)
        others[0] = (kind >> 2 & 3) if kind & 3 < 2 else 0
        if offset + size > MMIO_SIZE:
            continue  # nobody's: vmm/bus/address_space.py
        if kind & 3 == 0:
            value = driver.load(offset, size)
            assert 0 <= value < 1 << 8 * size
        elif kind & 3 == 1:
            driver.store(offset, size, source.number(size))
        elif kind & 3 == 2:
            _change(device, kind)
        else:
            with contextlib.suppress(BackendError):
                if kind & 8:
                    transport.pause(time.monotonic() + 1)
                else:
                    transport.resume()
        others[0] = 0
        if not refusals & 2:  # neither C nor Python says what was
            assert driver.config(8, 8) == int.from_bytes(device.read_config(8, 8), "little")
    transport.close()


def _change(device: _Device, kind: int) -> None:
    if kind & 4:
        device.config = bytes([kind]) * 64
    if not kind & 8:
        device.on_config_change()


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
