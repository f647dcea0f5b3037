"""Workers may die at any instant: this brings them back, and gives up when that is of no use.

One `Supervisor` a VM.  For each device it looks after, one thing happens at a time:

    SERVING ──worker died──▶ WAITING (back-off) ──▶ OPENING ──▶ CONNECTING (the old I/O ends,
       ▲                        ▲                                 │      the next one starts)
       │                        └───────────── it died again ◀────┤
       └────────────────────────── rings run ◀────────────────────┘
    SERVING ──restart──▶ UPGRADING ──▶ SERVING          too many deaths ──▶ GIVEN_UP

What waits (for the old worker's I/O, for the new one's answers) does so on a thread of its own
and comes back through the event loop; everything else runs on the main thread.
"""

from __future__ import annotations

import time

from shared import log
from shared.errors import StratovirtError
from vmm.errors import DeviceError, StateError

TYPE_CHECKING = False  # importing typing would cost 10 ms of the start
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Protocol

    from vmm.machine.machine import Device
    from vmm.vm import Vm
    from vmm.worker.process import WorkerProcess

    Done = Callable[[Exception | None], None]

    class Kind(Protocol):
        """How the workers of one device come to be. All raise StratovirtError."""

        def open(self, drained: bool, limit: float | None = None) -> Any:
            """What the next incarnation needs. Runs on a thread, may wait, at most `limit`
            seconds; `drained`: the living one will have finished when the next one starts."""

        def reopen(self) -> Any:
            """The same at once: the last one's I/O may still be under way."""

        def settle(self, opened: Any) -> None:
            """Wait, on a thread, for that I/O; the next one's rings may start then."""

        def discard(self, opened: Any) -> None:
            """It won't be needed any more."""

        def first(self) -> WorkerProcess:
            """The first one, at the start of the VM, on the main thread."""

        def spawn(self, opened: Any, keep: bool = False) -> WorkerProcess:
            """Ask the nursery, on the main thread; `opened` is used up, also in error, unless
            it is to be kept."""

SERVING, WAITING, OPENING, CONNECTING, UPGRADING, GIVEN_UP = (
    "serving", "waiting", "opening", "connecting", "upgrading", "given-up")

CONNECT_LIMIT = 10.0   # seconds for a new worker to come up and start its rings
DRAIN_LIMIT = 10.0     # ... for a living one to finish what it has taken
# Who dies before it has served for so long has achieved nothing; after that many in a row ...
SHORT_LIFE = 0.05
FRUITLESS_LIMIT = 5
# ... or once these are used up (they come back at a rate a second) the device is given up.
BUDGET = 40.0
BUDGET_RATE = 4.0
# Seconds before the attempt that follows so many fruitless ones.
BACK_OFF = (0.0, 0.01, 0.05, 0.2, 0.5)


class Ward:
    """One device under care."""

    __slots__ = ("budget", "death", "device", "fruitless", "kind", "refilled", "served_since",
                 "state", "waited")

    def __init__(self, device: Device, kind: Kind) -> None:
        self.device = device
        self.kind = kind
        self.state = SERVING
        self.death = 0.0         # when its worker's end was noticed
        self.waited = 0.0        # seconds since then for the I/O of those that are gone
        self.served_since = time.monotonic()
        self.fruitless = 0
        self.budget = BUDGET
        self.refilled = self.served_since

    def charge(self, now: float) -> str:
        """A worker died: why no other one should follow, "" if one should."""
        self.budget = min(BUDGET, self.budget + BUDGET_RATE * (now - self.refilled)) - 1.0
        self.refilled = now
        if now - self.served_since < SHORT_LIFE or self.state != SERVING:
            self.fruitless += 1
        else:
            self.fruitless = 0
        if self.fruitless >= FRUITLESS_LIMIT:
            return f"{self.fruitless} workers in a row died before they served"
        if self.budget < 0.0:
            return f"its workers die more often than {BUDGET_RATE:.0f} times a second"
        return ""


class Supervisor:
    """Looks after the workers of one VM."""

    def __init__(self, vm: Vm) -> None:
        self._vm = vm
        self._wards: dict[str, Ward] = {}

    # ---- who is looked after ---------------------------------------------------------------

    def watch(self, device: Device) -> None:
        """Look after a device and its worker from now on."""
        assert device.kind is not None
        ward = Ward(device, device.kind)
        self._wards[device.id] = ward
        device.vhost.on_lost = lambda text: self._vm.loop.call_soon(
            lambda: self.lost(device, text))
        self._adopt(ward)

    def release(self, device: Device) -> bool:
        """The device goes: what happens to its worker from now on is expected. False: not now,
        something happens with it that has to end first."""
        ward = self._wards.get(device.id)
        if ward is not None and ward.state not in (SERVING, GIVEN_UP):
            return False
        self._wards.pop(device.id, None)
        device.vhost.on_lost = _expected
        if device.worker is not None:
            device.worker.on_end = None
        return True

    def brings_worker(self, device: Device) -> bool:
        """A back end will come without anybody else's help: the device isn't given up."""
        ward = self._wards.get(device.id)
        return ward is not None and ward.device is device and ward.state != GIVEN_UP

    def _adopt(self, ward: Ward) -> None:
        worker = ward.device.worker
        assert worker is not None
        worker.on_end = lambda reason: self._ended(ward, worker, reason)
        if worker.state == "dead":
            self._ended(ward, worker, worker.reason)
        elif ward.device.vhost.has_lost_backend():
            # Told while something else was under way, when `lost` does nothing.
            self.lost(ward.device, "its device lost the connection to it")

    # ---- what happens ----------------------------------------------------------------------

    def _is_over(self, ward: Ward) -> bool:
        return self._vm.run_state == "shutdown" or self._wards.get(ward.device.id) is not ward

    def lost(self, device: Device, text: str) -> None:
        """The device can't use its back end any more; if the process lives, it is faulty."""
        ward, worker = self._wards.get(device.id), device.worker
        if ward is None or self._is_over(ward) or worker is None or worker.state == "dead":
            return
        if ward.state == SERVING:
            worker.put_down(text)

    def _ended(self, ward: Ward, worker: WorkerProcess, reason: str) -> None:
        """A worker is gone though nobody asked."""
        if self._is_over(ward) or worker is not ward.device.worker:
            return
        # The loss of its connection may have been seen before its report.
        if worker.lacks and not worker.restarts:
            self._vm.check_sandboxes()
        elif ward.state == SERVING:  # else whoever waits for it notices
            self._crashed(ward, worker, reason, time.monotonic())

    def _crashed(self, ward: Ward, worker: WorkerProcess, reason: str, now: float) -> None:
        self._tell_crash(ward, worker, reason)
        if ward.state == SERVING:
            ward.death, ward.waited = now, 0.0
        verdict = ward.charge(now)
        if verdict:
            self._give_up(ward, f"{verdict}; the last one: {reason}")
            return
        ward.state = WAITING
        delay = BACK_OFF[min(ward.fruitless, len(BACK_OFF) - 1)]
        if delay:
            self._vm.loop.call_later(delay, lambda: self._open(ward))
        else:
            self._open(ward)

    def _tell_crash(self, ward: Ward, worker: WorkerProcess, reason: str) -> None:
        self._vm.events.emit("WORKER_CRASHED", {"device": ward.device.id, "pid": worker.pid,
                                                "reason": reason})

    def _open(self, ward: Ward) -> None:
        if self._is_over(ward):
            return
        ward.state = OPENING
        opened: list[Any] = []

        def work() -> None:
            ward.device.vhost.lost("its process has ended")
            opened.append(ward.kind.reopen())

        def finish(error: Exception | None) -> None:
            if self._is_over(ward):
                if opened:
                    ward.kind.discard(opened[0])
            elif error is not None:
                # The image can't be had any more: no other worker could serve it.
                self._give_up(ward, str(error))
            else:
                self._spawn(ward, opened[0], settled=False)

        self._vm.off_loop(work, finish)

    def _spawn(self, ward: Ward, opened: Any, settled: bool) -> None:
        """The next worker gets ready while the last one's I/O ends."""
        ward.state = CONNECTING
        old = ward.device.worker
        assert old is not None
        try:
            worker = ward.kind.spawn(opened, keep=not settled)
        except StratovirtError as error:
            if not settled:
                ward.kind.discard(opened)
            self._crashed(ward, old, str(error), time.monotonic())
            return
        worker.restarts = old.restarts + 1
        ward.device.worker = worker
        if settled:
            self._connect(ward, worker)
        else:
            self._settle(ward, worker, opened)

    def _settle(self, ward: Ward, worker: WorkerProcess, opened: Any) -> None:
        def work() -> None:
            began = time.monotonic()
            try:
                ward.kind.settle(opened)
            finally:
                ward.waited += time.monotonic() - began

        def finish(error: Exception | None) -> None:
            if not self._is_over(ward) and error is None and worker.state == "dead":
                # It had no part in anything yet: that it died doesn't count against its kind.
                self._tell_crash(ward, worker, worker.reason)
                self._spawn(ward, opened, settled=True)
                return
            # From now on nobody but the worker holds what it was given.
            ward.kind.discard(opened)
            if self._is_over(ward):
                worker.kill()
            elif error is not None:
                worker.kill()
                self._give_up(ward, str(error))
            else:
                self._connect(ward, worker)

        self._vm.off_loop(work, finish)

    def _connect(self, ward: Ward, worker: WorkerProcess) -> None:
        device = ward.device
        rings = [0.0]

        def work() -> None:
            deadline = time.monotonic() + CONNECT_LIMIT
            device.vhost.replace_backend(worker.take_socket(), deadline, drain=False)
            rings[0] = time.monotonic()
            if not worker.wait_started(deadline):
                raise DeviceError(f"the worker did not start: {worker.reason or 'in time'}")

        def finish(error: Exception | None) -> None:
            if self._is_over(ward):
                worker.kill()
                return
            if error is None and worker.state == "dead":
                error = DeviceError(worker.reason)
            if error is not None:
                worker.kill()
                self._crashed(ward, worker, worker.reason or str(error), time.monotonic())
                return
            self._serves(ward, worker, rings[0])

        self._vm.off_loop(work, finish)

    def _serves(self, ward: Ward, worker: WorkerProcess, since: float) -> None:
        ward.state = SERVING
        ward.served_since = since
        gap = int((since - ward.death) * 1e6)
        log.info(f"Worker {worker.kind} '{worker.device}' (pid {worker.pid}) took over after "
                 f"{gap} us, {int(ward.waited * 1e6)} us of them for the last one's I/O; "
                 f"{ward.device.vhost.undone} requests are done again")
        self._vm.events.emit("WORKER_RESTARTED", {"device": ward.device.id, "pid": worker.pid,
                                                  "gap-us": gap})
        self._adopt(ward)

    def _give_up(self, ward: Ward, reason: str) -> None:
        ward.state = OPENING
        device = ward.device
        log.error(f"Device {device.id} is given up: {reason}")
        self._vm.events.emit("WORKER_GIVEN_UP", {"device": device.id, "reason": reason})

        def work() -> None:
            # Nobody may answer for requests that the kernel still works on: the driver would
            # use their memory for something else.
            device.vhost.lost("it is given up")
            ward.kind.discard(ward.kind.open(drained=False))

        def finish(error: Exception | None) -> None:
            if not self._is_over(ward):  # else: whoever ends it deals with the device
                ward.state = GIVEN_UP
                self._vm.serve_errors(device)

        self._vm.off_loop(work, finish)

    # ---- live upgrade ----------------------------------------------------------------------

    def restart(self, name: str, done: Done) -> None:
        """`worker-restart`: the device goes over to a worker from a fresh nursery.

        `done(error)` is called on the main loop when the new one serves; with an error the old
        one still does, or its death is dealt with as any other.

        :raises StateError, DeviceError: at once: no such worker, or not now.
        """
        ward = self._wards.get(name)
        if ward is None or ward.device.worker is None:
            raise DeviceError(f"There is no worker for a device '{name}'",
                              "query-workers lists those that there are")
        if ward.state != SERVING:
            raise StateError(f"The worker of '{name}' can't be restarted: it is {ward.state}",
                             "query-workers shows when it serves")
        ward.state = UPGRADING
        opened: list[Any] = []

        def finish(error: Exception | None) -> None:
            if error is not None or self._is_over(ward):
                if opened:
                    ward.kind.discard(opened[0])
                ward.state = SERVING
                self._adopt(ward)
                done(error or StateError(f"The device '{name}' went meanwhile"))
                return
            self._upgrade(ward, opened[0], done)

        self._vm.off_loop(lambda: opened.append(ward.kind.open(drained=True)), finish)

    def _upgrade(self, ward: Ward, opened: Any, done: Done) -> None:
        device = ward.device
        old = device.worker
        assert old is not None
        try:
            self._vm.retire_nursery()  # a clone of the old one would run the old code
            worker = ward.kind.spawn(opened)
        except StratovirtError as error:
            ward.state = SERVING
            self._adopt(ward)
            done(error)
            return
        worker.restarts = old.restarts + 1
        times = [0.0, 0.0]

        def work() -> None:
            deadline = time.monotonic() + CONNECT_LIMIT
            if not worker.wait_started(deadline):
                raise DeviceError(f"the new worker did not start: {worker.reason or 'in time'}")
            times[0] = time.monotonic()
            old.stopping = True  # it ends with its connection, and nobody need be told
            device.vhost.replace_backend(worker.take_socket(), times[0] + DRAIN_LIMIT, drain=True)
            times[1] = time.monotonic()

        def finish(error: Exception | None) -> None:
            if self._is_over(ward):
                worker.discard()
                done(error or StateError(f"The device '{device.id}' went meanwhile"))
            elif error is not None:
                worker.discard()
                ward.state = SERVING
                old.stopping = False
                if times[0]:
                    # Its rings are half stopped, or it has lost its connection: a worker that
                    # does not drain is replaced as one that died.
                    old.put_down(str(error))
                self._adopt(ward)
                done(error)
            else:
                old.on_end = None
                old.kill()
                device.worker = worker
                ward.death, ward.waited, device.vhost.undone = times[0], 0.0, 0
                self._serves(ward, worker, times[1])
                done(None)

        self._vm.off_loop(work, finish)


def _expected(text: str) -> None:
    """What a device calls that nobody looks after now, but will again: it waits."""
