"""The virtio-mmio registers that C serves (virtio 1.2, 4.2.2): each with every wrong width,
alignment, selector and state."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from native._core import ffi, lib
from vmm.errors import HypervisorError
from vmm.hypervisor.virtio_registers import CONFIG_SIZE, VirtioRegisters
from vmm.transport import mmio_registers as r

pytestmark = pytest.mark.native

SIZES = (256, 16)
ONES = 0xFFFF_FFFF
SETTING_UP = r.ACKNOWLEDGE | r.DRIVER | r.FEATURES_OK
DRAFTS = (r.QUEUE_SIZE, r.QUEUE_DESC_LOW, r.QUEUE_DESC_HIGH, r.QUEUE_DRIVER_LOW,
          r.QUEUE_DRIVER_HIGH, r.QUEUE_DEVICE_LOW, r.QUEUE_DEVICE_HIGH)
WRITABLE = (r.DEVICE_FEATURES_SEL, r.DRIVER_FEATURES, r.DRIVER_FEATURES_SEL, r.QUEUE_SEL,
            r.INTERRUPT_ACK, *DRAFTS)


@pytest.fixture
def device() -> VirtioRegisters:
    return VirtioRegisters(2, SIZES)


def drafted(device: VirtioRegisters) -> list[object]:
    """All that a guest has written."""
    return [device.device_features_sel(), device.queue_sel(), device.driver_features(),
            *(device.queue(index) for index in range(len(SIZES))), device.read(0x60, 4)]


# ---- reads ---------------------------------------------------------------------------------


def test_every_register_as_it_begins(device: VirtioRegisters) -> None:
    values = {r.MAGIC_VALUE: 0x74726976, r.VERSION_REGISTER: 2, r.DEVICE_ID: 2,
              r.DEVICE_FEATURES: None, r.QUEUE_SIZE_MAX: 256, r.SHM_LEN_LOW: ONES,
              r.SHM_LEN_HIGH: ONES, r.SHM_BASE_LOW: ONES, r.SHM_BASE_HIGH: ONES}
    for offset in range(0, r.CONFIG, 4):
        assert device.read(offset, 4) == values.get(offset, 0), hex(offset)


def test_odd_reads_are_0(device: VirtioRegisters) -> None:
    device.set_status(0xFF)
    for offset in range(r.CONFIG):
        for size in (1, 2, 3, 4, 5, 8):
            if size != 4 or offset % 4:
                assert device.read(offset, size) == 0, (hex(offset), size)


def test_status_and_generation_are_as_set(device: VirtioRegisters) -> None:
    device.set_status(0x4F)
    device.set_generation(ONES)
    assert device.read(r.STATUS, 4) == 0x4F
    assert device.read(r.CONFIG_GENERATION, 4) == ONES


def test_features_on_offer(device: VirtioRegisters) -> None:
    device.set_offered(0x1234_5678_9ABC_DEF0)
    assert device.read(r.DEVICE_FEATURES, 4) == 0x9ABC_DEF0
    assert device.write(r.DEVICE_FEATURES_SEL, 4, 1)
    assert device.read(r.DEVICE_FEATURES, 4) == 0x1234_5678
    device.forget()
    assert device.read(r.DEVICE_FEATURES, 4) is None
    for sel in (2, 32, ONES):
        assert device.write(r.DEVICE_FEATURES_SEL, 4, sel)
        assert device.read(r.DEVICE_FEATURES, 4) == 0, "nobody need be asked"


@pytest.mark.parametrize(("sel", "size", "ready"), [(0, 256, 1), (1, 16, 0), (2, 0, 0),
                                                    (ONES, 0, 0)])
def test_the_selected_queue(device: VirtioRegisters, sel: int, size: int, ready: int) -> None:
    device.set_ready(0, True)
    assert device.write(r.QUEUE_SEL, 4, sel)
    assert device.read(r.QUEUE_SIZE_MAX, 4) == size
    assert device.read(r.QUEUE_READY, 4) == ready


def test_interrupts(device: VirtioRegisters) -> None:
    device.raise_bits(2)
    device.set_live(True)
    assert device.read(r.INTERRUPT_STATUS, 4) == 3
    assert device.write(r.INTERRUPT_ACK, 4, 3)
    assert device.read(r.INTERRUPT_STATUS, 4) == 1, "live: bit 0 stays"
    device.set_live(False)
    assert device.read(r.INTERRUPT_STATUS, 4) == 0
    device.raise_bits(3)
    assert device.write(r.INTERRUPT_ACK, 4, 1)
    assert device.read(r.INTERRUPT_STATUS, 4) == 2


# ---- the config space ----------------------------------------------------------------------


def test_config_space_of_any_width(device: VirtioRegisters) -> None:
    config = bytes(range(1, 61))
    device.set_config(config)
    whole = config.ljust(CONFIG_SIZE, b"\0")
    for size in (1, 2, 4, 8):
        for offset in range(CONFIG_SIZE - size + 1):
            value = int.from_bytes(whole[offset:offset + size], "little")
            assert device.read(r.CONFIG + offset, size) == value
        assert device.read(r.CONFIG + CONFIG_SIZE - size + 1, size) is None, "beyond the slot"


def test_a_shorter_config_space_leaves_nothing_of_a_longer_one(device: VirtioRegisters) -> None:
    device.set_config(bytes([255]) * CONFIG_SIZE)
    device.set_config(b"\1")
    assert device.read(r.CONFIG, 8) == 1
    assert device.read(r.CONFIG + CONFIG_SIZE - 8, 8) == 0


def test_config_space_that_is_not_known(device: VirtioRegisters) -> None:
    assert device.read(r.CONFIG, 4) is None
    device.set_config(b"\1")
    device.forget()
    device.forget()
    assert device.read(r.CONFIG, 4) is None
    device.set_config(b"\2")
    assert device.read(r.CONFIG, 4) == 2
    with pytest.raises(ValueError, match="257 bytes"):
        device.set_config(bytes(CONFIG_SIZE + 1))


def test_no_torn_config_space() -> None:
    """Versions change while another thread reads: all of one, or Python is asked."""
    device = VirtioRegisters(2, ())
    stop = threading.Event()

    def change() -> None:
        value = 0
        while not stop.is_set():
            value = value + 1 & 0xFF
            device.set_config(bytes([value]) * 8)

    thread = threading.Thread(target=change)
    thread.start()
    try:
        known = 0
        while known < 20000:
            value = device.read(r.CONFIG, 8)
            if value is not None:
                known += 1
                assert value % 0x0101_0101_0101_0101 == 0
    finally:
        stop.set()
        thread.join()


# ---- writes --------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [r.STATUS, r.QUEUE_READY])
def test_what_makes_something_happen_goes_to_python(device: VirtioRegisters,
                                                    offset: int) -> None:
    assert not device.write(offset, 4, 1)
    for size in (1, 2, 3, 8):
        assert device.write(offset, size, 1), "ignored"
    assert device.read(offset, 4) == 0


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_doorbells_and_config_writes_go_to_python(device: VirtioRegisters, size: int) -> None:
    device.set_config(bytes(CONFIG_SIZE))
    assert not device.write(r.QUEUE_NOTIFY, size, 1)
    assert not device.write(r.CONFIG + 32, size, 1)
    assert device.read(r.CONFIG + 32, size) == 0


def test_odd_writes_do_nothing(device: VirtioRegisters) -> None:
    device.set_status(SETTING_UP)
    device.raise_bits(3)
    before = drafted(device)
    for offset in range(r.CONFIG):
        for size in (1, 2, 3, 5, 8):
            if offset != r.QUEUE_NOTIFY:
                assert device.write(offset, size, (1 << 8 * size) - 1), (hex(offset), size)
        if offset % 4:
            assert device.write(offset, 4, ONES), hex(offset)
    assert drafted(device) == before


def test_registers_that_cannot_be_written(device: VirtioRegisters) -> None:
    device.set_status(SETTING_UP)
    device.raise_bits(3)
    before = drafted(device)
    for offset in range(0, r.CONFIG, 4):
        if offset not in (*WRITABLE, r.STATUS, r.QUEUE_READY, r.QUEUE_NOTIFY):
            assert device.write(offset, 4, ONES), hex(offset)
    assert drafted(device) == before
    assert device.read(r.MAGIC_VALUE, 4) == 0x74726976


@pytest.mark.parametrize(("status", "taken"), [
    (0, False), (r.ACKNOWLEDGE, False), (r.ACKNOWLEDGE | r.DRIVER, True), (r.DRIVER, True),
    (SETTING_UP, False), (SETTING_UP | r.DRIVER_OK, False), (r.FEATURES_OK, False)])
def test_driver_features_between_driver_and_features_ok(device: VirtioRegisters, status: int,
                                                        taken: bool) -> None:
    device.set_status(status)
    for sel, value in ((0, 0x1111_1111), (1, 0x2222_2222), (2, ONES), (ONES, ONES)):
        assert device.write(r.DRIVER_FEATURES_SEL, 4, sel)
        assert device.write(r.DRIVER_FEATURES, 4, value)
    assert device.driver_features() == (0x2222_2222_1111_1111 if taken else 0)


def set_queue(device: VirtioRegisters, index: int) -> None:
    assert device.write(r.QUEUE_SEL, 4, index)
    for number, offset in enumerate(DRAFTS):
        assert device.write(offset, 4, 0x100 + number)


FULL = (0x100, 0x102_0000_0101, 0x104_0000_0103, 0x106_0000_0105)


def test_a_queue_is_drafted(device: VirtioRegisters) -> None:
    device.set_status(SETTING_UP)
    set_queue(device, 1)
    assert device.queue(1) == FULL
    assert device.queue(0) == (0, 0, 0, 0)


@pytest.mark.parametrize("status", [0, r.ACKNOWLEDGE, r.ACKNOWLEDGE | r.DRIVER, r.DRIVER_OK,
                                    SETTING_UP | r.DRIVER_OK])
def test_a_queue_in_the_wrong_state(device: VirtioRegisters, status: int) -> None:
    device.set_status(status)
    set_queue(device, 0)
    assert device.queue(0) == (0, 0, 0, 0)


def test_a_ready_queue_does_not_change(device: VirtioRegisters) -> None:
    device.set_status(SETTING_UP)
    device.set_ready(0, True)
    set_queue(device, 0)
    assert device.queue(0) == (0, 0, 0, 0)
    device.set_ready(0, False)
    set_queue(device, 0)
    assert device.queue(0) == FULL


@pytest.mark.parametrize("index", [2, 3, 1 << 31, ONES])
def test_queues_that_do_not_exist(device: VirtioRegisters, index: int) -> None:
    device.set_status(SETTING_UP)
    set_queue(device, index)
    assert [device.queue(number) for number in range(2)] == [(0, 0, 0, 0)] * 2
    assert lib.sv_virtio_queue(device.handle, index, ffi.new("struct sv_virtio_draft *")) < 0
    assert lib.sv_virtio_set_ready(device.handle, index, True) < 0


def test_reset(device: VirtioRegisters) -> None:
    fresh = drafted(device)
    device.set_status(r.DRIVER)
    device.write(r.DRIVER_FEATURES_SEL, 4, 1)
    device.write(r.DRIVER_FEATURES, 4, ONES)
    device.write(r.DEVICE_FEATURES_SEL, 4, 1)
    device.set_status(SETTING_UP)
    set_queue(device, 1)
    device.set_ready(1, True)
    device.raise_bits(3)
    device.set_live(True)
    device.reset()
    assert drafted(device) == fresh
    assert device.write(r.QUEUE_SEL, 4, 1)
    assert device.read(r.QUEUE_READY, 4) == 0
    assert device.read(r.STATUS, 4) == SETTING_UP, "Python says when the reset is complete"
    device.set_status(r.DRIVER)
    device.write(r.DRIVER_FEATURES, 4, 5)
    assert device.driver_features() == 5, "its selector was reset as well"


# ---- all of it -----------------------------------------------------------------------------


def test_queues_are_bounded() -> None:
    VirtioRegisters(2, (1,) * lib.SV_VIRTIO_MAX_QUEUES)
    with pytest.raises(HypervisorError, match="1025 queues"):
        VirtioRegisters(2, (1,) * (lib.SV_VIRTIO_MAX_QUEUES + 1))


def test_concurrent_vcpus(device: VirtioRegisters) -> None:
    """Two of them draft the same queue and features: each half is one that was written."""
    device.set_status(SETTING_UP)

    def draft(value: int) -> Callable[[], None]:
        def run() -> None:
            for _ in range(5000):
                for offset in DRAFTS:
                    device.write(offset, 4, value)
        return run

    vcpus = [threading.Thread(target=draft(value)) for value in (0x1111_1111, 0x2222_2222)]
    for vcpu in vcpus:
        vcpu.start()
    while any(vcpu.is_alive() for vcpu in vcpus):
        size, *addresses = device.queue(0)
        for half in (size, *(a & ONES for a in addresses), *(a >> 32 for a in addresses)):
            assert half in (0, 0x1111_1111, 0x2222_2222)
    for vcpu in vcpus:
        vcpu.join()
