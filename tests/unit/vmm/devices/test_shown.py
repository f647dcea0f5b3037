"""What a driver sees of a device is kept in C (vmm/transport/virtio_mmio.py) until the device
assigns something that it shows.  Here: that this can't be forgotten, and that no change is missed.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, cast

import pytest

from shared.virtio import blk, net
from tests.support.guest_ring import GuestMemory
from tests.support.mmio_driver import FakeGuestMemory, MmioDriver
from vmm.devices.virtio_balloon import GuestStatistics, VirtioBalloon
from vmm.devices.virtio_blk import CONFIG_SIZE, F_CONFIG_WCE, VirtioBlk
from vmm.devices.virtio_net import VirtioNet
from vmm.event_loop import EventLoop
from vmm.hypervisor.fake import FakeVm
from vmm.transport import mmio_registers as r
from vmm.transport.virtio_mmio import VirtioMmio

if TYPE_CHECKING:
    from vmm.devices.virtio_device import VirtioDevice
    from vmm.memory import GuestMemory as CoreMemory

DEVICES = Path(__file__).resolve().parents[4] / "vmm/devices"

# ---- no change is missed -------------------------------------------------------------------


class Rig:
    """A slot whose driver has read everything, so that C knows it."""

    def __init__(self, device: VirtioDevice) -> None:
        self.device = device
        transport = VirtioMmio(FakeVm(), cast("CoreMemory", None), 0xF0100000, 5, device,
                               lazy=True)
        self.driver = MmioDriver(transport)

    def seen(self) -> tuple[int, bytes]:
        config = b"".join(self.driver.config(offset, 4).to_bytes(4, "little")
                          for offset in range(0, 64, 4))
        return self.driver.features(), config

    def check(self, change: Callable[[], object], visible: bool = True) -> None:
        """After `change` the driver sees what the device says, and something new if `visible`."""
        self.seen()
        self.driver.forwarded.clear()
        before = self.seen()
        assert self.driver.forwarded == [], "C knows it"
        change()
        after = self.seen()
        assert after == (self.device.features(), self.device.read_config(0, 64))
        assert (after != before) == visible


@pytest.fixture
def loop() -> Iterator[EventLoop]:
    loop = EventLoop()
    yield loop
    loop.close()


class Disk(VirtioBlk):
    """The back end is here: its answers, and what was forwarded to it."""

    answer = bytes(range(CONFIG_SIZE))

    def _fetch_config(self, offset: int, size: int) -> bytes:
        return self.answer[offset:offset + size]

    def _forward_config(self, offset: int, data: bytes) -> None:
        self.answer = self.answer[:offset] + data + self.answer[offset + len(data):]


def test_disks_that_come_grow_and_go(loop: EventLoop) -> None:
    disk = Disk("slot", -1, cast("CoreMemory", None), loop)
    rig = Rig(disk)

    def grow() -> None:
        disk.answer = b"\x55" * CONFIG_SIZE
        disk._config_went_stale()

    rig.check(lambda: disk.show_disk(readonly=False))
    rig.check(grow)
    disk._features = F_CONFIG_WCE
    rig.check(lambda: disk.write_config(32, b"\1"))
    rig.check(lambda: disk.rename("other"), visible=False)
    rig.check(disk.show_empty)
    rig.check(lambda: disk.show_disk(readonly=True))
    assert rig.seen()[0] & blk.F_RO
    rig.check(disk.show_empty)
    assert not rig.seen()[0] & blk.F_RO
    disk.close()


def test_a_write_that_fails_may_have_been_carried_out(loop: EventLoop) -> None:
    class Failing(Disk):
        def _forward_config(self, offset: int, data: bytes) -> None:
            super()._forward_config(offset, data)
            raise OSError

    disk = Failing("slot", -1, cast("CoreMemory", None), loop)
    disk.show_disk(readonly=False)
    disk._features = F_CONFIG_WCE
    rig = Rig(disk)

    def write() -> None:
        with pytest.raises(OSError):
            disk.write_config(32, b"\1")

    rig.check(write)
    disk.close()


def test_nics(loop: EventLoop) -> None:
    nic = VirtioNet("slot", -1, cast("CoreMemory", None), loop, foreign=False, mac=b"\x02abcde",
                    mtu=1500)
    rig = Rig(nic)
    rig.check(nic.show_nic)
    rig.check(lambda: nic.set_link(False))
    rig.check(lambda: nic.set_link(True))
    rig.check(lambda: setattr(nic.nic_state, "link_up", False))
    rig.check(lambda: setattr(nic.nic_state, "link_up", True))
    rig.check(nic.show_failed)
    nic.next_mac = b"\x02other"
    rig.check(nic.show_nic)
    rig.check(nic.show_empty)
    assert rig.seen()[0] & net.F_STATUS
    nic.close()


def test_balloons(loop: EventLoop) -> None:
    memory = FakeGuestMemory(GuestMemory(1 << 24))
    memory.size, memory.page_size = 1 << 24, 4096  # type: ignore[attr-defined]

    class Balloon(VirtioBalloon):
        def features(self) -> int:
            return 1 << 32

        def is_in_use(self) -> bool:
            return True

    balloon = Balloon("balloon", -1, memory, loop, GuestStatistics())  # type: ignore[arg-type]
    rig = Rig(balloon)
    rig.check(lambda: balloon.set_target(1 << 20))
    rig.driver.write(r.STATUS, r.ACKNOWLEDGE | r.DRIVER)
    rig.check(lambda: rig.driver.store(r.CONFIG + 4, 4, 100))
    rig.check(lambda: rig.driver.store(r.CONFIG + 5, 1, 3))
    rig.check(balloon.reset)
    balloon.close()


def test_another_back_end(loop: EventLoop) -> None:
    """Its features need not be the last one's."""
    disk = Disk("disk", -1, cast("CoreMemory", None), loop)
    offered = [1 << 32]
    setattr(disk, "features", lambda: offered[0])  # noqa: B010
    rig = Rig(disk)

    def replace() -> None:
        offered[0] |= 1 << 9
        disk._session = None

    rig.check(replace)
    disk.close()


# ---- it can't be forgotten -----------------------------------------------------------------

# What asks the back end: another answer comes with another session, or is told.
_EXCHANGES = {"_exchange", "_fetch_config"}


class Classes(ast.NodeVisitor):
    """All classes of some sources: methods, bases, what is `shown()`."""

    def __init__(self, sources: list[str]) -> None:
        self.nodes: dict[str, ast.ClassDef] = {}
        for source in sources:
            self.visit(ast.parse(source))

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self.nodes[node.name] = node

    def line(self, name: str) -> list[ast.ClassDef]:
        """The class and those it derives from."""
        node = self.nodes.get(name)
        if node is None:
            return []
        bases = [base.id for base in node.bases if isinstance(base, ast.Name)]
        return [node, *(found for base in bases for found in self.line(base))]

    def method(self, name: str, method: str) -> list[ast.FunctionDef]:
        """It, and those that it overrides, which it may call."""
        return [item for node in self.line(name) for item in node.body
                if isinstance(item, ast.FunctionDef) and item.name == method]

    def shown(self, node: ast.ClassDef) -> set[str]:
        return {item.target.id for item in node.body
                if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
                and isinstance(item.value, ast.Call)
                and getattr(item.value.func, "id", "") == "shown"}

    def kept(self) -> list[str]:
        """Those that say that what they show may be kept."""
        return [name for name, node in self.nodes.items()
                if any(ast.unparse(item) == "keeps_shown = True" for item in node.body)]

    def reads(self, name: str) -> tuple[set[str], set[str]]:
        """Attributes that `features` and `read_config` read, with all that they call; and the
        methods that were looked into."""
        found: set[str] = set()
        visited: set[str] = set()
        waiting = ["features", "read_config"]
        while waiting:
            method = waiting.pop()
            visited.add(method)
            for function in self.method(name, method):
                for node in ast.walk(function):
                    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                        found |= self._read(node)
            calls = {attribute for attribute in found if self.method(name, attribute)}
            found -= calls
            waiting += calls - visited - _EXCHANGES - set(waiting)
        return found, visited

    @staticmethod
    def _read(node: ast.Attribute) -> set[str]:
        if isinstance(node.value, ast.Name) and node.value.id == "self":
            return {node.attr}
        inner = node.value
        if (isinstance(inner, ast.Attribute) and isinstance(inner.value, ast.Name)
                and inner.value.id == "self"):
            return {f"{inner.attr}.{node.attr}"}
        return set()

    def assigned(self, name: str, but: set[str]) -> set[str]:
        """Attributes that methods other than these assign."""
        return {node.attr for one in self.line(name) for function in one.body
                if isinstance(function, ast.FunctionDef) and function.name not in but
                for node in ast.walk(function)
                if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store | ast.Del)
                and isinstance(node.value, ast.Name) and node.value.id == "self"}


# Methods of values that don't change.
_OF_VALUES = {"encode", "to_bytes", "ljust"}


def forgettable(sources: list[str]) -> list[str]:
    """What a kept device shows though it may change without anybody being told."""
    classes = Classes(sources)
    everywhere = set().union(*(classes.shown(node) for node in classes.nodes.values()))
    wrong = []
    for name in classes.kept():
        shown = set().union(*(classes.shown(node) for node in classes.line(name)))
        reads, visited = classes.reads(name)
        changing = classes.assigned(name, {"__init__", *visited})
        for attribute in sorted(reads):
            outer, _, inner = attribute.partition(".")
            if (outer in changing and outer not in shown) or (
                    inner and inner not in everywhere | _OF_VALUES):
                wrong.append(f"{name}.{attribute}")
    return wrong


def test_what_is_shown_is_declared() -> None:
    sources = [path.read_text() for path in sorted(DEVICES.glob("*.py"))]
    assert len(Classes(sources).kept()) >= 7
    assert forgettable(sources) == []


SAMPLE = """
class Base:
    def features(self):
        return self._session.bits | self.mask
    def swap(self):
        self._session = None

class Device(Base):
    keeps_shown = True
    good: int = shown()
    def __init__(self):
        self.fixed = 1
    def read_config(self, offset, size):
        return self.helper + self.fixed + self.state.number + self.good
    @property
    def helper(self):
        return self.plain
    def change(self):
        self.plain += 1
        self.good = 2
        self.mask = 3
"""


def test_the_test_sees_what_is_forgotten() -> None:
    assert forgettable([SAMPLE]) == ["Device._session", "Device._session.bits", "Device.mask",
                                     "Device.plain", "Device.state.number"]
    assert forgettable([SAMPLE.replace("keeps_shown = True", "pass")]) == []
