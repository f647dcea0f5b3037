"""The back end against a scripted front end: every request."""

from __future__ import annotations

import errno
import os
import socket
import struct

import pytest

from shared.memory_regions import MemoryRegion
from shared.vhost_user import messages as m
from shared.vhost_user.errors import ConnectionLostError
from tests.support.backend_session import REGION, SIZE, USER, Session
from tests.support.fake_backend import FEATURES


def test_features(session: Session) -> None:
    assert m.decode_u64(session.ask(m.GET_FEATURES)) == FEATURES | m.F_PROTOCOL_FEATURES
    assert m.decode_u64(session.ask(m.GET_QUEUE_NUM)) == 2
    assert m.decode_u64(session.ask(m.GET_MAX_MEM_SLOTS)) == 32
    session.done(m.SET_FEATURES, m.encode_u64(1 << 9 | m.F_PROTOCOL_FEATURES))
    assert session.device.calls == [("set_features", 1 << 9)]


def test_a_ring_starts_with_its_kick(session: Session) -> None:
    session.configure()
    assert not any(call[0] == "start_ring" for call in session.device.calls)
    session.done(m.SET_VRING_KICK, m.encode_u64(0), (session.eventfd(),))
    # Guest-physical, disabled until SET_VRING_ENABLE.
    assert session.device.calls[-1] == ("start_ring", 0, 64, 0x10_0000, 0x10_1000, 0x10_2000, 5,
                                        False)
    ring = session.backend.rings[0]
    assert ring.kick_fd >= 0
    assert ring.call_fd >= 0
    assert not os.get_blocking(ring.kick_fd)
    session.done(m.SET_VRING_ENABLE, m.encode_vring_state(0, 1))
    session.done(m.SET_VRING_ENABLE, m.encode_vring_state(0, 1))
    session.done(m.SET_VRING_ENABLE, m.encode_vring_state(0, 0))
    assert session.device.calls[-2:] == [("enable_ring", 0, True), ("enable_ring", 0, False)]


def test_without_protocol_features_rings_are_enabled_at_once(session: Session) -> None:
    session.configure()
    session.done(m.SET_FEATURES, m.encode_u64(1 << 32))
    session.done(m.SET_VRING_KICK, m.encode_u64(0), (session.eventfd(),))
    assert session.device.calls[-1][-1] is True


def test_get_vring_base_stops(running: Session) -> None:
    running.device.served = 3
    assert m.decode_vring_state(running.ask(m.GET_VRING_BASE, m.encode_vring_state(0, 0))) == (0, 8)
    assert running.device.calls == [("stop_ring", 0)]
    assert running.backend.rings[0].kick_fd == -1
    assert running.backend.rings[0].call_fd == -1
    # Asked again, it says the same and stops nothing.
    assert m.decode_vring_state(running.ask(m.GET_VRING_BASE, m.encode_vring_state(0, 0))) == (0, 8)
    assert running.device.calls == [("stop_ring", 0)]
    running.done(m.SET_VRING_KICK, m.encode_u64(0), (running.eventfd(),))
    assert running.device.calls[-1][:2] == ("start_ring", 0)
    assert running.device.calls[-1][6] == 8


def test_base_wraps_at_16_bits(running: Session) -> None:
    running.device.served = 0xFFFF
    assert m.decode_vring_state(running.ask(m.GET_VRING_BASE, m.encode_vring_state(0, 0))) == (0, 4)


def test_polling_without_descriptors(session: Session) -> None:
    session.configure()
    session.done(m.SET_VRING_CALL, m.encode_u64(m.VRING_NO_FD))
    session.done(m.SET_VRING_KICK, m.encode_u64(m.VRING_NO_FD))
    assert session.backend.rings[0].kick_fd == -1
    assert session.backend.rings[0].call_fd == -1
    assert session.device.calls[-1][0] == "start_ring"


def test_call_changes_while_running(running: Session) -> None:
    running.done(m.SET_VRING_CALL, m.encode_u64(0), (running.eventfd(),))
    running.done(m.SET_VRING_CALL, m.encode_u64(m.VRING_NO_FD))
    assert running.device.calls == [("change_call", 0, True), ("change_call", 0, False)]


def test_a_new_kick_restarts(running: Session) -> None:
    running.done(m.SET_VRING_KICK, m.encode_u64(0), (running.eventfd(),))
    assert [call[0] for call in running.device.calls] == ["stop_ring", "start_ring"]


def test_memory_changes_with_rings_at_rest(running: Session) -> None:
    more = MemoryRegion(0x100_0000, 0x1000, USER + 0x1000_0000, 0)
    running.done(m.ADD_MEM_REG, m.encode_memory_region(more), (running.ram,))
    running.done(m.REM_MEM_REG, m.encode_memory_region(more))
    running.done(m.SET_MEM_TABLE, m.encode_memory_table([REGION, more]),
                 (running.ram, running.ram))
    assert [call[0] for call in running.device.calls] == [
        "stop_ring", "add_memory", "start_ring", "stop_ring", "remove_memory", "start_ring",
        "stop_ring", "set_memory", "start_ring"]


def test_rem_mem_reg_closes_a_descriptor_that_came(session: Session) -> None:
    session.done(m.ADD_MEM_REG, m.encode_memory_region(REGION), (session.ram,))
    session.done(m.REM_MEM_REG, m.encode_memory_region(REGION), (session.ram,))
    assert session.backend.memory.regions == []


def test_memory_that_no_longer_holds_a_running_ring(running: Session) -> None:
    other = MemoryRegion(0x100_0000, SIZE, USER + 0x1000_0000, 0)
    assert running.acked(m.SET_MEM_TABLE, m.encode_memory_table([other]),
                         (running.ram,)) == errno.EINVAL
    assert not running.backend.rings[0].started


def test_a_ring_waits_for_a_region_that_comes_back_larger(running: Session) -> None:
    """As QEMU changes a region's size: REM_MEM_REG, then ADD_MEM_REG, while rings run."""
    running.device.served = 3
    running.done(m.REM_MEM_REG, m.encode_memory_region(REGION))
    ring = running.backend.rings[0]
    assert not ring.started
    assert [call[0] for call in running.device.calls] == ["stop_ring", "remove_memory"]
    # It still counts as running; its descriptors may change, and it may be disabled.
    for request, payload in ((m.SET_VRING_NUM, m.encode_vring_state(0, 32)),
                             (m.SET_VRING_BASE, m.encode_vring_state(0, 1)),
                             (m.SET_VRING_ADDR, m.encode_vring_addr(0, 0, USER, USER, USER)),
                             (m.SET_FEATURES, m.encode_u64(m.F_PROTOCOL_FEATURES))):
        assert running.acked(request, payload) == errno.EBUSY
    running.done(m.SET_VRING_CALL, m.encode_u64(0), (running.eventfd(),))
    running.done(m.SET_VRING_ENABLE, m.encode_vring_state(0, 0))
    running.done(m.SET_VRING_ENABLE, m.encode_vring_state(0, 1))
    assert len(running.device.calls) == 2
    elsewhere = MemoryRegion(0x100_0000, 0x1000, USER + 0x1000_0000, 0)
    running.done(m.ADD_MEM_REG, m.encode_memory_region(elsewhere), (running.ram,))
    assert not ring.started
    larger = MemoryRegion(REGION.guest_addr, 2 * SIZE, USER, 0)
    running.done(m.ADD_MEM_REG, m.encode_memory_region(larger), (running.memfd(2 * SIZE),))
    assert ring.started and not ring.waits
    assert running.device.calls[-1][0] == "start_ring"
    assert running.device.calls[-1][6:] == (8, True)


def test_a_ring_that_waits_for_memory_can_be_stopped(running: Session) -> None:
    running.done(m.REM_MEM_REG, m.encode_memory_region(REGION))
    assert m.decode_vring_state(running.ask(m.GET_VRING_BASE, m.encode_vring_state(0, 0))) == (0, 5)
    running.done(m.ADD_MEM_REG, m.encode_memory_region(REGION), (running.ram,))
    running.done(m.SET_VRING_BASE, m.encode_vring_state(0, 5))
    assert [call[0] for call in running.device.calls] == ["stop_ring", "remove_memory",
                                                          "add_memory"]
    running.done(m.SET_VRING_KICK, m.encode_u64(0), (running.eventfd(),))
    running.done(m.REM_MEM_REG, m.encode_memory_region(REGION))
    running.done(m.RESET_DEVICE)
    running.done(m.ADD_MEM_REG, m.encode_memory_region(REGION), (running.ram,))
    assert not running.backend.rings[0].runs


def test_config(session: Session) -> None:
    reply = session.ask(m.GET_CONFIG, m.encode_config(4, bytes(8)))
    assert m.decode_config("", reply)[:2] == (4, bytes(range(4, 12)))
    reply = session.ask(m.GET_CONFIG, m.encode_config(56, bytes(8)))
    assert m.decode_config("", reply)[1] == bytes([56, 57, 58, 59, 0, 0, 0, 0])
    session.done(m.SET_CONFIG, m.encode_config(32, b"\x01"))
    session.done(m.SET_CONFIG, m.encode_config(0, b"\x01", m.CONFIG_MIGRATION))
    assert session.device.calls == [("write_config", 32, b"\x01", False),
                                    ("write_config", 0, b"\x01", True)]


def test_config_change_goes_over_the_back_end_channel(session: Session) -> None:
    assert session.backend.config_changed() is False
    ours, theirs = socket.socketpair()
    session.done(m.SET_BACKEND_REQ_FD, b"", (theirs.fileno(),))
    assert session.backend.config_changed() is True
    assert ours.recv(100) == struct.pack("=III", 2, 1, 0)
    session.done(m.SET_BACKEND_REQ_FD, b"", (theirs.fileno(),))  # replaced, the old one closed
    ours.close()
    theirs.close()
    with pytest.raises(ConnectionLostError):
        session.backend.config_changed()


@pytest.mark.parametrize("size", [20, 24])
def test_inflight(session: Session, size: int) -> None:
    reply = session.ask(m.GET_INFLIGHT_FD, m.encode_inflight(m.Inflight(0, 0, 2, 128), size))
    assert len(reply) == size
    inflight = m.decode_inflight(reply)
    assert (inflight.queue_count, inflight.queue_size) == (2, 128)
    assert os.fstat(session.fds[-1]).st_size == inflight.mmap_size
    session.done(m.SET_INFLIGHT_FD, m.encode_inflight(inflight, size), (session.fds[-1],))
    assert session.device.calls[-1] == ("set_inflight", inflight.mmap_size, 2)
    os.close(session.device.inflight_fd)


def test_status_and_reset(running: Session) -> None:
    running.done(m.SET_STATUS, m.encode_u64(0xF))
    assert m.decode_u64(running.ask(m.GET_STATUS)) == 0xF
    running.done(m.SET_STATUS, m.encode_u64(0))
    assert running.device.calls == [("stop_ring", 0), ("reset",)]
    assert running.backend.rings[0].size == 0
    assert running.backend.memory.regions == [REGION]


def test_reset_device(running: Session) -> None:
    running.done(m.RESET_DEVICE)
    assert running.device.calls == [("stop_ring", 0), ("reset",)]
    assert running.acked(m.SET_VRING_KICK, m.encode_u64(0), (running.eventfd(),)) == errno.EINVAL


def test_reset_owner_disables(running: Session) -> None:
    running.done(m.RESET_OWNER)
    assert running.device.calls == [("enable_ring", 0, False)]


def test_close_stops_and_unmaps(running: Session) -> None:
    running.backend.close()
    assert running.device.calls == [("stop_ring", 0), ("set_memory", [])]
