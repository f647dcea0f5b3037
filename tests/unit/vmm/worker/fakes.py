"""A clock, an event loop, a device and workers that do what the test says, when it says so."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from vmm.worker.supervisor import Supervisor

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.machine.machine import Device
    from vmm.vm import Vm

    Done = Callable[[Exception | None], None]


class World:
    """The clock, and all that waits: in place of the event loop and of threads."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.timers: list[tuple[float, Callable[[], None]]] = []
        self.soon: list[Callable[[], None]] = []

    def monotonic(self) -> float:
        return self.now

    def call_soon(self, callback: Callable[[], None]) -> None:
        self.soon.append(callback)

    def call_later(self, delay: float, callback: Callable[[], None]) -> None:
        self.timers.append((self.now + delay, callback))

    def run(self, until: float = 0.0) -> None:
        """Everything that is due; the clock goes on to `until` at most."""
        while self.soon or any(when <= max(until, self.now) for when, _ in self.timers):
            if self.soon:
                self.soon.pop(0)()
                continue
            when, callback = min(self.timers, key=lambda timer: timer[0])
            self.timers.remove((when, callback))
            self.now = max(self.now, when)
            callback()
        self.now = max(self.now, until)


class FakeWorker:
    def __init__(self, pid: int) -> None:
        self.kind, self.device, self.pid = "blk", "disk", pid
        self.lacks = ""
        self.state, self.reason = "running", ""
        self.restarts = 0
        self.killed = self.put_down_with = ""
        self.starts = True
        self.on_end: Callable[[str], None] | None = None

    def take_socket(self) -> int:
        return 1000 + self.pid

    def wait_started(self, deadline: float) -> bool:
        return self.starts

    def kill(self) -> None:
        self.killed = "killed"

    def discard(self) -> None:
        self.killed = "discarded"

    def put_down(self, reason: str) -> None:
        self.put_down_with = reason

    def die(self, reason: str = "killed by signal 9") -> None:
        self.state, self.reason = "dead", reason
        if self.on_end is not None:
            self.on_end(reason)


class FakeBackedDevice:
    def __init__(self) -> None:
        self.undone = 0
        self.on_lost: Callable[[str], None] | None = None
        self.replaced: list[tuple[int, bool]] = []
        self.told_lost: list[str] = []
        self.hung_up = False
        self.errors: list[Exception] = []  # of the next replacements

    def has_lost_backend(self) -> bool:
        return self.hung_up

    def lost(self, text: str) -> None:
        self.told_lost.append(text)

    def replace_backend(self, fd: int, deadline: float, drain: bool) -> None:
        self.replaced.append((fd, drain))
        if self.errors:
            raise self.errors.pop(0)


class FakeKind:
    """Makes workers with rising pids."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.made: list[FakeWorker] = []
        self.opened: list[bool] = []
        self.reopened = self.settled = 0
        self.kept = 0  # what was reopened and is still held
        self.settle_error: Exception | None = None
        self.discarded = 0
        self.wait = 0.0  # how long the old I/O takes
        self.open_error: Exception | None = None
        self.spawn_errors: list[Exception] = []
        self.stillborn = 0  # so many more don't start

    def open(self, drained: bool, limit: float | None = None) -> str:
        self.opened.append(drained)
        self.world.now += self.wait
        if self.open_error is not None:
            raise self.open_error
        return "image"

    def reopen(self) -> str:
        if self.open_error is not None:
            raise self.open_error
        self.reopened += 1
        self.kept += 1
        return "image"

    def settle(self, opened: str) -> None:
        self.settled += 1
        self.world.now += self.wait
        if self.settle_error is not None:
            raise self.settle_error

    def discard(self, opened: str) -> None:
        self.kept -= bool(self.kept)
        self.discarded += 1

    def spawn(self, opened: str, keep: bool = False) -> FakeWorker:
        if not keep:
            self.kept -= bool(self.kept)
        if self.spawn_errors:
            raise self.spawn_errors.pop(0)
        worker = FakeWorker(100 + len(self.made))
        if self.stillborn:
            self.stillborn -= 1
            worker.starts, worker.reason = False, "it is stillborn"
        self.made.append(worker)
        return worker


class FakeDevice:
    def __init__(self, kind: FakeKind) -> None:
        self.id = "disk"
        self.vhost = FakeBackedDevice()
        self.kind = kind
        self.worker: FakeWorker | None = FakeWorker(99)


class FakeVm:
    def __init__(self, world: World) -> None:
        self.run_state = "running"
        self.loop = world
        self.events = self
        self.told: list[tuple[str, dict[str, Any]]] = []
        self.served_errors = self.checked_sandboxes = 0
        self.retired = 0
        self.held: list[Callable[[], None]] | None = None  # threads that don't get on

    def emit(self, name: str, data: dict[str, Any]) -> None:
        self.told.append((name, data))

    def names(self) -> list[str]:
        return [name for name, _ in self.told]

    def off_loop(self, work: Callable[[], None], finish: Done) -> None:
        def run() -> None:
            error: Exception | None = None
            try:
                work()
            except Exception as caught:
                error = caught
            finish(error)

        if self.held is not None:
            self.held.append(run)
        else:
            self.loop.call_soon(run)

    def serve_errors(self, device: FakeDevice) -> None:
        self.served_errors += 1

    def check_sandboxes(self) -> None:
        self.checked_sandboxes += 1

    def retire_nursery(self) -> None:
        self.retired += 1


class Case:
    def __init__(self) -> None:
        self.world = World()
        self.vm = FakeVm(self.world)
        self.kind = FakeKind(self.world)
        self.device = FakeDevice(self.kind)
        self.supervisor = Supervisor(cast("Vm", self.vm))
        self.supervisor.watch(cast("Device", self.device))

    @property
    def worker(self) -> FakeWorker:
        assert self.device.worker is not None
        return self.device.worker

    def die(self, after: float = 1.0) -> None:
        """The worker dies after it has lived for so long."""
        self.world.run(self.world.now + after)
        self.worker.die()
        self.world.run()

    def restart(self) -> list[Exception | None]:
        results: list[Exception | None] = []
        self.supervisor.restart("disk", results.append)
        return results
