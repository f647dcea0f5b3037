"""A VM as QMP sees it, without a machine: the real event loop, scripted transitions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tests.support import fake_nics
from vmm.config.model import ChardevConfig, DriveConfig, VmConfig
from vmm.devices.virtio_balloon import GuestStatistics
from vmm.errors import DeviceError, StateError, VmmError
from vmm.event_loop import EventLoop
from vmm.qmp.events import Events

if TYPE_CHECKING:
    from collections.abc import Callable

    Done = Callable[[Exception | None], None]


class FakeVcpu:
    def __init__(self, index: int) -> None:
        self.index = index
        self.thread_id = 8439 + index


class FakeImage:
    def __init__(self) -> None:
        self.fd = -1
        self.size = 1 << 20
        self.is_block_device = False


class FakeBlockNode:
    def __init__(self, config: DriveConfig, device_id: str | None) -> None:
        self.config = config
        self.image = FakeImage()
        self.device_id = device_id


class FakeWorker:
    def __init__(self, device: str) -> None:
        self.kind = "blk"
        self.device = device
        self.pid = 4711
        self.state = "running"
        self.restarts = 0
        self.engine = "io_uring"
        self.reason = ""
        self.stages = ["namespaces", "seccomp"]
        self.counters = [{"reads": 1, "read_bytes": 512}, {"reads": 2, "read_bytes": 1024}]


class FakeDevice:
    def __init__(self, id: str) -> None:
        self.id = id
        self.driver = "virtio-blk-device"
        self.slot = 0
        self.device: Any = object()
        self.worker: Any = FakeWorker(id)


class FakeOrders:
    """The guest's driver answers at once, unless `silent`; `problem`: the worker refuses."""

    def __init__(self, statistics: GuestStatistics) -> None:
        self.statistics = statistics
        self.silent = False
        self.problem = ""
        self.asked = 0
        self.forgotten: list[int] = []

    def send(self, kind: str, done: Callable[[str], None]) -> int:
        assert kind == "stats"
        self.asked += 1
        if not self.silent and not self.problem:
            self.statistics.receive({"type": "stats", "values": [4, 1000 + self.asked, 5, 4096]})
        if not self.silent:
            done(self.problem)
        return self.asked

    def forget(self, serial: int) -> bool:
        self.forgotten.append(serial)
        return True


class FakeBalloon:
    """A balloon whose guest follows at once, with 4 GiB; and its Device."""

    def __init__(self) -> None:
        self.id = "balloon0"
        self.driver = "virtio-balloon-device"
        self.slot = 1
        self.device = self
        self.active = True
        self.target = self.actual = 4 << 30
        self.statistics = GuestStatistics()
        self.worker: Any = FakeWorker("balloon0")
        self.worker.orders = FakeOrders(self.statistics)

    def is_in_use(self) -> bool:
        return self.active

    def set_target(self, size: int) -> None:
        self.target = self.actual = min(size, 4 << 30) >> 12 << 12


class FakeChardev:
    def __init__(self, config: ChardevConfig) -> None:
        self.config = config

    def filename(self) -> str:
        return "pty:/dev/pts/7"


class FakeHotplug:
    """Disks and NICs come and go without fail; there are no other devices."""

    def __init__(self, vm: FakeVm) -> None:
        self._vm = vm

    def add_node(self, family: str, config: object, done: Done) -> None:
        done(None)

    def delete_node(self, family: str, name: str, done: Done) -> None:
        done(None)

    def add_device(self, family: str, name: str, driver: str, index: int, backend: str,
                   options: Any, done: Done) -> None:
        done(None)

    def delete_device(self, name: str, done: Done) -> None:
        if not name.startswith(("drive", "net")):
            raise DeviceError(f"Device {name} not found")
        self._vm.events.emit("DEVICE_DELETED", {"device": name, "path": name})
        done(None)


class FakeSupervisor:
    def restart(self, name: str, done: Done) -> None:
        done(None)


class FakeVm:
    """`slow` keeps stop, cont and reset waiting until `release` is called."""

    def __init__(self, cpus: int = 2) -> None:
        self.config = VmConfig()
        self.config.name = "fake"
        self.config.cpu.count = self.config.cpu.max_cpus = self.config.cpu.sockets = cpus
        self.loop = EventLoop()
        self.events = Events()
        self.run_state = "running"
        self.vcpus = [FakeVcpu(index) for index in range(cpus)]
        self.blocks = {"rootfs": FakeBlockNode(DriveConfig("rootfs", "/path/to/rootfs"), "disk0")}
        self.nets: dict[str, Any] = {}
        self.balloon = FakeBalloon()
        self.devices: dict[str, Any] = {"disk0": FakeDevice("disk0"), "balloon0": self.balloon}
        self.chardevs = {"serial0": FakeChardev(ChardevConfig("serial0", "pty"))}
        self.hotplug = FakeHotplug(self)
        self.supervisor = FakeSupervisor()
        self.slow = False
        self.error: VmmError | None = None
        self.ended = False
        self._waiting: list[Callable[[], None]] = []
        self.nics = fake_nics.slots(self.nets)

    def family(self, name: str) -> str:
        return name

    def slots(self) -> list[fake_nics.FakeSlot]:
        return self.nics

    def workers(self) -> list[Any]:
        disks = (d for d in self.devices.values() if d is not self.balloon)
        return [d.worker for d in disks if d.worker is not None]

    def pause(self, done: Done) -> None:
        self._change("stop", ("running",), "paused", "STOP", done)

    def resume(self, done: Done) -> None:
        self._change("cont", ("paused", "prelaunch"), "running", "RESUME", done)

    def reset(self, done: Done) -> None:
        self._change("system_reset", ("running", "paused"), self.run_state, "RESET", done)

    def powerdown(self) -> None:
        self.events.emit("POWERDOWN", {})

    def quit(self) -> None:
        self.run_state = "shutdown"
        self.events.emit("SHUTDOWN", {"guest": False, "reason": "host-qmp-quit"})
        self.ended = True
        self.loop.call_soon(self.loop.stop)

    def release(self) -> None:
        """Let what waits be done. Any thread."""
        self.slow = False
        waiting, self._waiting = self._waiting, []
        for finish in waiting:
            self.loop.call_soon(finish)

    def _change(self, command: str, states: tuple[str, ...], state: str, event: str,
                done: Done) -> None:
        if self.run_state not in states:
            raise StateError(f"{command}: the VM is {self.run_state}",
                             f"it must be {' or '.join(states)}")

        def finish() -> None:
            if self.error is None:
                self.run_state = state
                self.events.emit(event, {"guest": False} if event == "RESET" else {})
            done(self.error)

        if self.slow:
            self._waiting.append(finish)
        else:
            self.loop.call_soon(finish)
