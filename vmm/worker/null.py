"""The core's side of the null back end: one worker, made when a driver first asks an empty slot."""

from __future__ import annotations

import _socket
import time

from shared import log
from shared.errors import SharedError
from vmm.errors import WorkerSpawnError

TYPE_CHECKING = False  # importing typing would cost 10 ms of the start
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.devices.vhost_user import VhostUserDevice
    from vmm.vm import Vm
    from vmm.worker.process import WorkerProcess

    Done = Callable[[Exception | None], None]

NAME = "#null"  # no user's id: those are printable names without '#'
CONNECT_LIMIT = 10.0
# After so many deaths (one comes back in a minute) the slots are left without an answer.
BUDGET = 20.0
BUDGET_RATE = 1 / 60


class NullBackend:
    """Serves devices that have no worker. Main loop only."""

    def __init__(self, vm: Vm) -> None:
        self._vm = vm
        self._worker: WorkerProcess | None = None
        self._served: list[VhostUserDevice] = []
        self._budget = BUDGET
        self._refilled = time.monotonic()

    @property
    def worker(self) -> WorkerProcess | None:
        """The process, once there is one."""
        return self._worker

    def connect(self, device: VhostUserDevice) -> int:
        """A connection for this device, which can be given messages at once.

        :raises WorkerSpawnError: the worker can't be had.
        """
        worker = self._living()
        try:
            ours, theirs = _socket.socketpair(_socket.AF_UNIX,
                                              _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC)
        except OSError as error:
            raise WorkerSpawnError(f"Can't connect to the null worker: {error.strerror}",
                                   "check the limit on descriptors") from error
        try:
            order, fds = device.null_order()
            worker.orders.send("serve", _complain, [theirs.fileno(), *fds], **order)
        except (SharedError, OSError) as error:
            ours.close()
            raise WorkerSpawnError(f"The null worker can't be reached: {error}") from error
        finally:
            theirs.close()
        if device not in self._served:
            self._served.append(device)
        return ours.detach()

    def attach(self, device: VhostUserDevice, done: Done) -> None:
        """Have it serve a device whose back end is gone, or never was.

        `done(error)` is called on the main loop.
        """
        try:
            fd = self.connect(device)
        except WorkerSpawnError as error:
            done(error)
            return
        self._vm.off_loop(lambda: device.replace_backend(fd, time.monotonic() + CONNECT_LIMIT,
                                                         drain=False), done)

    def release(self, device: VhostUserDevice) -> None:
        """Somebody else serves the device now."""
        if device in self._served:
            self._served.remove(device)

    def _living(self) -> WorkerProcess:
        if self._worker is None or self._worker.state == "dead":
            nursery = self._vm.nursery()
            worker = nursery.spawn("null", NAME, {}, {})
            worker.on_end = self._ended
            if self._worker is not None:
                worker.restarts = self._worker.restarts + 1
            self._worker = worker
        return self._worker

    def _ended(self, reason: str) -> None:
        """It died: somebody must go on answering."""
        if self._vm.run_state == "shutdown":
            return
        now = time.monotonic()
        self._budget = min(BUDGET, self._budget + BUDGET_RATE * (now - self._refilled)) - 1
        self._refilled = now
        for device in list(self._served):
            if self._budget < 0:
                self._served.remove(device)
                device.on_failure("the null worker dies again and again")
                self._forsake_in_turn(device)
            else:
                self._revive_in_turn(device)

    def _forsake_in_turn(self, device: VhostUserDevice) -> None:
        """Nobody comes until a driver starts it again: `stop` and resets don't wait for that."""
        def forsake(done: Done) -> None:
            if device in self._served or not device.has_lost_backend():
                done(None)  # somebody serves it again
            else:
                self._vm.off_loop(lambda: device.detach(time.monotonic() + CONNECT_LIMIT,
                                                        forsaken=True), done)

        self._vm.hotplug.take_turn(forsake, _log_failure)

    def _revive_in_turn(self, device: VhostUserDevice) -> None:
        # A disk may be coming to this slot right now.
        self._vm.hotplug.take_turn(lambda done: self._revive(device, done), _log_failure)

    def _revive(self, device: VhostUserDevice, done: Done) -> None:
        def detached(error: Exception | None) -> None:
            if error is None:
                self.release(device)
                done(None)
            else:  # a driver started it meanwhile
                self.attach(device, done)

        if device not in self._served:
            done(None)
        elif device.is_in_use():
            self.attach(device, done)
        else:
            self._vm.off_loop(lambda: device.detach(time.monotonic() + CONNECT_LIMIT), detached)


def _complain(problem: str) -> None:
    if problem:
        log.error(f"The null worker does not serve a slot: {problem}")


def _log_failure(error: Exception | None) -> None:
    if error is not None:
        log.error(f"An empty slot has no back end: {error}")
