"""virtio-net over vhost-user: features and queues. The data plane is native.

The front end owns the config space (MAC address, link status, MTU); what the driver sets over
the control queue is kept in memory that outlives this process.
"""

from __future__ import annotations

from fcntl import ioctl

from native import _net
from shared.errors import SystemCallError, check
from shared.statistics import HEADER_BYTES, RECORDS, page_bytes
from shared.vhost_user import messages as m
from shared.vhost_user.backend import BackendDevice
from shared.vhost_user.backend_device import SERVED_FEATURES, RefusedError
from shared.virtio import net

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from shared.memory_regions import MemoryRegion
    from shared.vhost_user.backend import Ring

ffi, lib = _net.ffi, _net.lib

RECORD = RECORDS["net"]
assert RECORD.bytes == ffi.sizeof("struct sv_net_counters")
assert lib.sv_net_state_size() <= net.STATE_BYTES

# linux/if_tun.h: what a tap may hand over whole.
_TUNSETOFFLOAD = 0x400454D0
_TUN_F_CSUM, _TUN_F_UFO = 0x01, 0x10


class NetDevice(BackendDevice):
    """One virtio-net device.

    :param taps: a descriptor for each queue pair (shared/tap.py); they stay the caller's. -1: no
        tap, nothing is received, what is sent is dropped.
    :param control: there is a control queue, the last ring.
    :param limits: packets and bytes a second, for receiving, then for transmitting; 0: none.
    :param page: a statistics page (shared/statistics.py) in writable memory, or None.
    :param state: writable memory of net.STATE_BYTES that a successor goes on with, or None.
    """

    # No config space: it is the front end's. No in-flight record: frames may be lost, and what
    # was not used when a back end ended is served again.
    protocol_features = SERVED_FEATURES & ~(m.PF_CONFIG | m.PF_INFLIGHT_SHMFD)

    def __init__(self, taps: Sequence[int], control: bool, queue_size: int, mac: bytes,
                 limits: Sequence[tuple[int, int]], page: object | None,
                 state: object | None, log: Callable[[str], None]) -> None:
        self.queue_count = 2 * len(taps) + control
        # Front ends count queue pairs of a NIC (QEMU, net/vhost-user.c); ours asks for no number.
        self.announced_queues = len(taps)
        self.max_queue_size = queue_size
        self._pairs = len(taps)
        self._control = control
        self._log = log
        # Who offers a control queue offers no UFO; the question would change a tap that serves.
        self._ufo = not control and _takes_ufo(taps[0])
        self._running: set[int] = set()
        # Both are held as long as the data plane writes to them.
        self._page = ffi.from_buffer("uint8_t[]", bytearray(page_bytes("net", self.queue_count))
                                     if page is None else page)
        self._counters = ffi.cast("struct sv_net_counters *", self._page + HEADER_BYTES)
        self._state_bytes = None if state is None else ffi.from_buffer("char[]", state)
        self._state = ffi.cast("struct sv_net_state *", self._state_bytes or ffi.NULL)
        error = ffi.new("int *")
        self._net = lib.sv_net_create(
            ffi.new("int[]", list(taps)), self._pairs, control, queue_size, mac,
            ffi.new("struct sv_rate[2]", [tuple(limit) for limit in limits]),
            self._counters, self._state, error)
        if self._net == ffi.NULL:
            raise SystemCallError(-error[0], f"Can't set up {self.queue_count} queues",
                                  "raise RLIMIT_NOFILE; is the tap still there?")

    # ---- what the guest reads --------------------------------------------------------------

    def features(self) -> int:
        """virtio 1.2, 5.1.3: everything that the data plane serves."""
        bits = net.BASE | (net.UFO if self._ufo else 0)
        if self._control:
            bits |= net.CONTROL
            if self._pairs > 1:
                bits |= net.F_MQ
        return bits

    def set_features(self, features: int) -> None:
        """The tap's offloads follow what the driver can take."""
        check(lib.sv_net_set_features(self._net, features), "The tap refuses these offloads")

    def read_config(self, offset: int, size: int) -> bytes:
        """The front end has it."""
        return bytes(size)

    def write_config(self, offset: int, data: bytes, migration: bool) -> None:
        """The front end has it."""
        raise RefusedError(95, "SET_CONFIG of a net back end", "the front end owns it")

    # ---- guest memory ----------------------------------------------------------------------

    def set_memory(self, regions: Sequence[tuple[MemoryRegion, int]]) -> None:
        """Map these regions instead of all others."""
        check(lib.sv_net_clear_regions(self._net), "Can't replace guest memory")
        for region, fd in regions:
            self.add_memory(region, fd)

    def add_memory(self, region: MemoryRegion, fd: int) -> None:
        """Map one more region."""
        check(lib.sv_net_add_region(self._net, region.guest_addr, region.size,
                                    region.file_offset, fd),
              f"Can't map guest memory at {region.guest_addr:#x}")

    def remove_memory(self, region: MemoryRegion) -> None:
        """Unmap a region."""
        check(lib.sv_net_remove_region(self._net, region.guest_addr, region.size),
              f"Can't unmap guest memory at {region.guest_addr:#x}")

    # ---- rings -----------------------------------------------------------------------------

    def start_ring(self, ring: Ring) -> None:
        """A ring that isn't enabled yet gets its thread later."""
        if ring.enabled:
            self._run(ring)

    def enable_ring(self, ring: Ring, enabled: bool) -> None:
        """Disabled rings have no thread; their index is kept."""
        if enabled:
            self._run(ring)
        elif ring.index in self._running:
            ring.base = self._halt(ring.index)

    def stop_ring(self, ring: Ring) -> int:
        """Frames that were taken are sent; buffers without a frame are available again."""
        return self._halt(ring.index) if ring.index in self._running else ring.base

    def _run(self, ring: Ring) -> None:
        if ring.index in self._running:
            return
        setup = ffi.new("struct sv_net_ring *")
        setup.size = ring.size
        setup.desc, setup.avail, setup.used = ring.desc, ring.avail, ring.used
        setup.base = ring.base
        setup.kick_fd, setup.call_fd, setup.err_fd = ring.kick_fd, ring.call_fd, ring.err_fd
        check(lib.sv_net_start(self._net, ring.index, setup), f"Can't start queue {ring.index}")
        self._running.add(ring.index)

    def _halt(self, index: int) -> int:
        reason = lib.sv_net_broken(self._net, index)
        base = check(lib.sv_net_stop(self._net, index), f"Can't stop queue {index}")
        self._running.discard(index)
        if reason != ffi.NULL:
            self._log(f"Queue {index} was broken by its driver: {ffi.string(reason).decode()}")
        return base

    def change_call(self, ring: Ring, fd: int) -> None:
        """Takes effect at once, the ring goes on."""
        check(lib.sv_net_set_call(self._net, ring.index, fd), "Can't change the call fd")

    def get_inflight(self, queue_count: int, queue_size: int) -> tuple[m.Inflight, int]:
        """Never offered."""
        raise RefusedError(95, "GET_INFLIGHT_FD of a net back end")

    def set_inflight(self, inflight: m.Inflight, fd: int) -> None:
        """Never offered."""
        raise RefusedError(95, "SET_INFLIGHT_FD of a net back end")

    def reset(self) -> None:
        """Features, filters, MAC address and active queue pairs as at the start."""
        check(lib.sv_net_reset(self._net), "Can't reset the tap")

    # ---- own -------------------------------------------------------------------------------

    @property
    def mac(self) -> bytes:
        """The MAC address in force."""
        mac = ffi.new("uint8_t[6]")
        lib.sv_net_mac(self._net, mac)
        return bytes(mac)

    def set_link(self, up: bool) -> None:
        """While the link is down frames are dropped, both ways."""
        lib.sv_net_set_link(self._net, up)

    def counters(self) -> list[dict[str, int]]:
        """The counters of each queue, by the names of its record."""
        return [{name: int(getattr(self._counters[i], name)) for name in RECORD.counters}
                for i in range(self.queue_count)]

    def close(self) -> None:
        """Stop everything, unmap everything. The taps stay the caller's."""
        if self._net != ffi.NULL:
            lib.sv_net_destroy(self._net)
            self._net = ffi.NULL


def _takes_ufo(tap: int) -> bool:
    if tap < 0:
        return True  # whatever a driver may have acknowledged to who was here before
    try:
        ioctl(tap, _TUNSETOFFLOAD, _TUN_F_CSUM | _TUN_F_UFO)
        ioctl(tap, _TUNSETOFFLOAD, 0)
    except OSError:
        return False
    return True
